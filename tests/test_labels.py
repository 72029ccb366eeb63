"""Labelled data: each layout is read with its groups, and what cannot be right is refused in one line."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, MAX_SIDE, ROLL_TILE, ImageFile, open_labels
from rollsight.inspect.rolls import LabelWriter, RollWriter, Strip, roll_path

DATA = Path(os.environ.get("ROLLSIGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pair(root, name, value=1, size=(6, 8), suffix=".png"):
    """An image of one gray and its mask of one value, under images/ and masks/."""
    save(root / "images" / f"{name}{suffix}", np.full(size, 100, dtype=np.uint8))
    save(root / "masks" / f"{name}.png", np.full(size, value, dtype=np.uint8))


def write_classes(root, names=("pit", "scratch")):
    (root / "classes.json").write_text(json.dumps(names))


def write_manifest(root, *rows, columns=("image", "mask", "split", "group")):
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def refused(root, match):
    """The line that `root` is refused with, whether by opening it or by reading it."""
    with pytest.raises(UserError, match=match) as error:
        for sample in open_labels(root).samples:
            sample.read()
    assert "\n" not in str(error.value)
    return error.value


@pytest.fixture
def plain(tmp_path):
    """images/ and masks/ with three images of their own and two of one coil."""
    for name in ("a", "b", "c", "coil-7/d", "coil-7/e"):
        write_pair(tmp_path, name)
    write_classes(tmp_path)
    return tmp_path


def write_roll(folder, roll_id, mask, modes=1, classes=("pit", "scratch"), name="truth"):
    """A gray roll with the mask (lines, W) beside it, named as given."""
    lines, width = mask.shape
    strip = Strip(roll_id, "top", tuple(f"mode-{i}" for i in range(modes)), mm_per_px_x=1.0, mm_per_line=1.0)
    path = roll_path(folder, roll_id)
    with RollWriter(path, strip, width, np.uint8) as writer:
        writer.append(np.full((modes, lines, width), 128, dtype=np.uint8))
    write_mask(path, name, mask, classes)
    return path


def write_mask(path, name, mask, classes=("pit", "scratch")):
    lines, width = mask.shape
    labels = LabelWriter.create(path, name, classes, lines=lines, width=width, shard_lines=4096)
    labels.write(0, mask)
    labels.close()


# The layouts


def test_a_manifest_folder_has_its_classes_splits_and_groups(labelled_folder):
    data = open_labels(labelled_folder)

    assert data.classes == ("pit", "scratch")
    assert [sample.split for sample in data.samples] == ["train"] * 4 + ["val", "test"]
    assert data.groups() == [f"piece-{i}" for i in range(6)]


def test_an_image_is_gray_in_0_to_1_and_a_mask_is_its_values(labelled_folder):
    image, mask = open_labels(labelled_folder).samples[0].read()

    assert (image.shape, image.dtype) == ((1, 72, 80), np.float32)
    assert 0 <= image.min() < 0.5 < image.max() <= 1
    assert (mask.shape, mask.dtype) == ((72, 80), np.uint8)
    assert set(np.unique(mask)) == {0, 1}


def test_further_columns_and_a_byte_order_mark_are_no_trouble(tmp_path):
    write_pair(tmp_path, "a")
    write_classes(tmp_path)
    text = "note,image,mask,split,group\nfine,images/a.png,masks/a.png,val,g\n"
    (tmp_path / "manifest.csv").write_text(text, encoding="utf-8-sig")

    [sample] = open_labels(tmp_path).samples

    assert (sample.split, sample.group) == ("val", "g")


def test_the_group_in_a_plain_folder_is_the_sub_folder_else_the_image(plain):
    groups = [sample.group for sample in open_labels(plain).samples]

    assert sorted(groups) == ["a", "b", "c", "coil-7", "coil-7"]


def test_a_plain_folder_is_split_by_the_hash_of_the_group(tmp_path):
    for i in range(60):
        write_pair(tmp_path, f"image-{i:02}", size=(2, 2))
    write_classes(tmp_path)
    before = {sample.group: sample.split for sample in open_labels(tmp_path).samples}

    for i in range(60, 80):
        write_pair(tmp_path, f"image-{i:02}", size=(2, 2))
    after = {sample.group: sample.split for sample in open_labels(tmp_path).samples}

    assert before.items() <= after.items()  # more data moves nothing
    assert Counter(after.values()) == {"train": 55, "val": 19, "test": 6}  # the same on any machine
    assert (after["image-00"], after["image-01"]) == ("val", "train")


def test_split_folders_give_the_split(tmp_path):
    for split in ("train", "val", "test"):
        write_pair(tmp_path / split, f"{split}-1")
    write_classes(tmp_path)

    assert sorted(sample.split for sample in open_labels(tmp_path).samples) == ["test", "train", "val"]


def test_equal_file_names_in_two_split_folders_are_two_images(tmp_path):
    for split in ("train", "val"):
        write_pair(tmp_path / split, "0001")
    write_classes(tmp_path)

    assert open_labels(tmp_path).groups() == ["train/0001", "val/0001"]


def test_a_colour_jpg_with_a_png_mask_is_read_as_gray(tmp_path):
    save(tmp_path / "images" / "a.jpg", np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8))
    save(tmp_path / "masks" / "a.png", np.ones((8, 8), dtype=np.uint8))
    write_classes(tmp_path)

    image, _ = open_labels(tmp_path).samples[0].read()

    assert image == pytest.approx(0.299, abs=0.01)  # ITU-R 601


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_read_to_the_full(tmp_path, suffix):
    save(tmp_path / "images" / f"a{suffix}", np.array([[0, 65535], [13107, 1]], dtype=np.uint16))
    save(tmp_path / "masks" / "a.png", np.ones((2, 2), dtype=np.uint8))
    write_classes(tmp_path)

    image, _ = open_labels(tmp_path).samples[0].read()

    assert image[0] == pytest.approx(np.array([[0, 1], [0.2, 1 / 65535]]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_with_white_as_zero_is_turned(tmp_path, dtype):
    write_pair(tmp_path, "a", size=(2, 2), suffix=".tif")
    write_classes(tmp_path)
    white = np.iinfo(dtype).max
    stored = np.array([[white, 0], [white, white]], dtype=dtype)
    tifffile.imwrite(tmp_path / "images" / "a.tif", stored, photometric="miniswhite")

    image, _ = open_labels(tmp_path).samples[0].read()

    assert image.tolist() == [[[0, 1], [0, 0]]]


def test_a_roll_gives_its_tiles_with_a_defect_and_half_as_many_clean(tmp_path):
    mask = np.zeros((12 * ROLL_TILE, 2 * ROLL_TILE + 40), dtype=np.uint8)
    mask[100 : 8 * ROLL_TILE : 200, 10:20] = 2
    path = write_roll(tmp_path, "coil-1", mask, modes=2)

    data = open_labels(path)

    defect = [(sample.read()[1] == 2).any() for sample in data.samples]
    assert data.classes == ("pit", "scratch")
    assert sum(defect) == 8
    assert 0 < len(defect) - sum(defect) <= 5
    assert {(sample.group, sample.split) for sample in data.samples} == {("coil-1", "any")}
    image, tile = data.samples[0].read()
    assert (image.shape, tile.shape) == ((2, ROLL_TILE, ROLL_TILE), (ROLL_TILE, ROLL_TILE))
    assert image == pytest.approx(128 / 255)


def test_the_last_px_and_lines_of_a_roll_are_in_a_tile_and_none_is_in_two(tmp_path):
    """A tile that ends with the roll leaves to the one before it what both see."""
    mask = np.zeros((ROLL_TILE + 130, 2 * ROLL_TILE + 40), dtype=np.uint8)
    mask[::64, ::30] = mask[-1, -1] = 1

    samples = open_labels(write_roll(tmp_path, "coil-1", mask)).samples

    counted = np.zeros(mask.shape, dtype=np.int64)
    for sample in samples:
        _, tile = sample.read()
        own = counted[sample.y : sample.y + ROLL_TILE, sample.x : sample.x + ROLL_TILE]
        assert own.shape == tile.shape == (ROLL_TILE, ROLL_TILE)
        own += tile != IGNORE
    assert (counted == 1).all()
    assert sum((sample.read()[1] == 1).sum() for sample in samples) == mask.sum()


def test_an_edge_crack_in_the_last_px_of_a_roll_is_a_tile_to_learn_from(tmp_path):
    mask = np.zeros((ROLL_TILE, ROLL_TILE + 226), dtype=np.uint8)
    mask[40:60, -4:] = 1

    [sample] = open_labels(write_roll(tmp_path, "coil-1", mask)).samples

    assert sample.x == 226
    assert (sample.read()[1] == 1).sum() == 80


def test_a_folder_of_rolls_is_one_source_with_a_group_for_each_coil(tmp_path):
    mask = np.zeros((ROLL_TILE, ROLL_TILE), dtype=np.uint8)
    mask[5, 5] = 1
    for roll_id in ("coil-1", "coil-2"):
        write_roll(tmp_path, roll_id, mask)

    data = open_labels(tmp_path)

    assert data.groups() == ["coil-1", "coil-2"]
    assert len(data.of_split("train").samples) == len(data.of_split("val").samples) == 2


def test_rolls_with_different_classes_are_refused(tmp_path):
    mask = np.ones((ROLL_TILE, ROLL_TILE), dtype=np.uint8)
    write_roll(tmp_path, "coil-1", mask)
    write_roll(tmp_path, "coil-2", mask, classes=("pit",))

    refused(tmp_path, "different classes")


def test_a_roll_without_a_mask_or_without_a_defect_is_refused(tmp_path):
    clean = write_roll(tmp_path / "clean", "coil-1", np.zeros((ROLL_TILE, ROLL_TILE), dtype=np.uint8))
    refused(clean, "marks no defect")

    strip = Strip("coil-2", "top", ("bright",), mm_per_px_x=1.0, mm_per_line=1.0)
    with RollWriter(roll_path(tmp_path, "coil-2"), strip, 8, np.uint8) as writer:
        writer.append(np.zeros((1, 4, 8), dtype=np.uint8))
    refused(writer.path, "no class mask beside it")


def test_what_a_scan_found_on_a_roll_is_no_label(tmp_path):
    """Judged by it a model is faultless, and trained on it a model learns its own faults."""
    found = np.ones((ROLL_TILE, ROLL_TILE), dtype=np.uint8)
    path = write_roll(tmp_path, "coil-1", found, name="3f0c9a2b71de")

    refused(path, "only class masks are 3f0c9a2b71de, as scans leave them.* are named 'truth'")

    truth = np.zeros_like(found)
    truth[5:9, 5:9] = 2
    write_mask(path, "truth", truth)
    [sample] = open_labels(path).samples
    assert np.array_equal(sample.read()[1], truth)


@pytest.mark.parametrize("size", [(ROLL_TILE, ROLL_TILE - 1), (ROLL_TILE - 1, ROLL_TILE)])
def test_a_roll_smaller_than_a_tile_is_refused_as_such(tmp_path, size):
    small = write_roll(tmp_path, "coil-1", np.ones(size, dtype=np.uint8))

    refused(small, f"{size[0]} lines of {size[1]} px: a labelled roll needs at least 256 of both")


# Splits and the digest


def test_a_split_that_is_not_there_is_refused_with_those_that_are(plain):
    write_manifest(plain, ("images/a.png", "masks/a.png", "val", "a"))

    with pytest.raises(UserError, match="no images of split 'train': it has val") as error:
        open_labels(plain).of_split("train")
    assert error.value.exit_code == USAGE


def test_a_group_in_two_splits_is_refused(plain):
    rows = [(f"images/{name}.png", f"masks/{name}.png", "train", "coil-1") for name in "ab"]
    write_manifest(plain, *rows, ("images/c.png", "masks/c.png", "test", "coil-1"))

    refused(plain, "group 'coil-1' is in train and in test")


def test_a_sub_folder_in_two_split_folders_is_refused(tmp_path):
    for split in ("train", "val"):
        write_pair(tmp_path / split, f"coil-1/{split}")
    write_classes(tmp_path)

    refused(tmp_path, "group 'coil-1' is in train and in val")


def test_the_digest_changes_with_a_pixel_a_mask_a_group_and_a_class(labelled_folder):
    digests = [open_labels(labelled_folder).digest(), open_labels(labelled_folder).digest()]
    manifest = labelled_folder / "manifest.csv"

    save(labelled_folder / "0.png", np.zeros((72, 80), dtype=np.uint8))
    digests.append(open_labels(labelled_folder).digest())
    save(labelled_folder / "0_mask.png", np.zeros((72, 80), dtype=np.uint8))
    digests.append(open_labels(labelled_folder).digest())
    manifest.write_text(manifest.read_text().replace("piece-3", "piece-9"))
    digests.append(open_labels(labelled_folder).digest())
    write_classes(labelled_folder, ["pit", "scale"])
    digests.append(open_labels(labelled_folder).digest())

    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


# What cannot be right


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder")


def test_a_folder_without_pairs_is_refused(tmp_path):
    write_classes(tmp_path)
    refused(tmp_path, "no image with a mask found")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("{}", "list of 1 to 254"),
        ("[]", "list of 1 to 254"),
        ('["pit", "pit"]', "different"),
        ('["pit", 3]', "list of 1 to 254"),
        ('[""]', "list of 1 to 254"),
        (json.dumps([str(i) for i in range(255)]), "list of 1 to 254"),
    ],
    ids=lambda text: text[:12],
)
def test_a_broken_list_of_classes_is_refused(plain, text, match):
    (plain / "classes.json").write_text(text, encoding="utf-8", errors="surrogateescape")

    refused(plain, f"classes.json.*{match}")


def test_a_missing_list_of_classes_is_named(plain):
    (plain / "classes.json").unlink()
    refused(plain, "classes.json: not found")


def test_an_image_without_a_mask_is_named(plain):
    (plain / "masks" / "b.png").unlink()
    refused(plain, r"images/b.png: no mask .*masks/b.png")


@pytest.mark.parametrize("size", [(6, 9), (5, 8), (6, 8, 3)])
def test_a_mask_of_another_size_is_refused_with_both_sizes(plain, size):
    save(plain / "masks" / "b.png", np.ones(size, dtype=np.uint8))

    refused(plain, r"masks/b.png: the mask is .* px, its image b.png is 8 x 6")


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((6, 8), 256, dtype=np.uint16),
        np.full((6, 8), -1, dtype=np.int32),
        np.ones((6, 8), dtype=np.float32),
    ],
    ids=["256", "-1", "float"],
)
def test_a_mask_with_values_that_do_not_fit_a_byte_is_refused(labelled_folder, pixels):
    save(labelled_folder / "mask.tif", pixels)
    save(labelled_folder / "image.png", np.zeros((6, 8), dtype=np.uint8))
    write_manifest(labelled_folder, ("image.png", "mask.tif", "train", "g"))

    refused(labelled_folder, r"mask.tif: mask values .* whole numbers 0 to 255")


def test_a_mask_may_be_black_and_white_or_have_a_palette(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    write_classes(tmp_path)
    Image.fromarray(np.eye(6, 8, dtype=bool)).save(tmp_path / "masks" / "a.png")
    palette = Image.fromarray(np.full((6, 8), 2, dtype=np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "masks" / "b.png")

    a, b = open_labels(tmp_path).samples

    assert np.array_equal(a.read()[1], np.eye(6, 8))
    assert (b.read()[1] == 2).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_an_image_of_32_bits_is_refused(tmp_path, dtype):
    save(tmp_path / "images" / "a.tif", np.full((6, 8), 1000, dtype=dtype))
    save(tmp_path / "masks" / "a.png", np.ones((6, 8), dtype=np.uint8))
    write_classes(tmp_path)

    refused(tmp_path, "a.tif: 32 bits per pixel")


def test_an_image_that_ought_to_be_a_roll_is_refused_before_it_is_read(tmp_path):
    Image.new("L", (MAX_SIDE + 1, 1)).save(tmp_path / "long.png")
    file = ImageFile(tmp_path / "long.png", tmp_path / "long.png", "train", "g")

    with pytest.raises(UserError, match=r"long.png: 16385 x 1 px is over 16384: ingest it as a roll"):
        file.read()


def test_a_png_whose_pixels_are_damaged_is_refused(plain):
    path = plain / "images" / "b.png"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"IDAT") + 9] + content[content.index(b"IDAT") + 12 :])

    refused(plain, "images/b.png: not a readable image")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the damage
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(suffix=st.sampled_from([".png", ".jpg", ".tif", ".bmp"]), data=st.data())
def test_a_damaged_image_is_read_or_refused_in_one_line(tmp_path, suffix, data):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    save(tmp_path / "mask.png", np.ones((8, 8), dtype=np.uint8))

    try:
        image, _ = ImageFile(path, tmp_path / "mask.png", "train", "g").read()
    except UserError as error:
        assert path.name in str(error)
    else:
        assert image.shape == (1, 8, 8)


def manifest_row(**changes):
    row = {"image": "images/a.png", "mask": "masks/a.png", "split": "train", "group": "g", **changes}
    return tuple(row.values())


@pytest.mark.parametrize("column", ["image", "mask"])
@pytest.mark.parametrize(
    "path", ["../secret.png", "images/../../secret.png", "images", "images/none.png", "a\\b"]
)
def test_a_manifest_may_name_files_of_its_folder_only(plain, column, path):
    root = plain / "inner"
    write_pair(root, "a")
    write_classes(root)
    save(plain / "secret.png", np.ones((6, 8), dtype=np.uint8))
    write_manifest(root, manifest_row(**{column: path}))

    refused(root, r"manifest.csv line 2: no file .* in the data's folder")


def test_an_absolute_path_or_a_link_out_of_the_folder_is_refused(plain):
    root = plain / "inner"
    write_pair(root, "a")
    write_classes(root)
    write_manifest(root, manifest_row(image=str(plain / "images" / "a.png")))
    refused(root, "line 2: no file")

    (root / "link.png").symlink_to(plain / "images" / "a.png")
    write_manifest(root, manifest_row(), manifest_row(image="link.png"))
    refused(root, "line 3: no file")


@pytest.mark.parametrize("given", ["absolute", "relative", "link"])
@pytest.mark.parametrize(
    "name",
    [
        "./images/a.png",
        "images//a.png",
        "../inner/images/a.png",
        "{root}/images/a.png",
        "{link}/images/a.png",
    ],
)
def test_however_a_manifest_spells_a_path_it_is_below_the_root(tmp_path, monkeypatch, given, name):
    """So an export or a split can tell it from there."""
    root, link = tmp_path / "inner", tmp_path / "link"
    write_pair(root, "a")
    write_classes(root)
    link.symlink_to(root)
    monkeypatch.chdir(tmp_path)
    opened = {"absolute": root, "relative": Path("inner"), "link": link}[given]
    write_manifest(root, manifest_row(image=name.format(root=root, link=link)))

    [sample] = open_labels(opened).samples

    assert sample.image == opened / "images" / "a.png"


def test_an_image_that_is_a_link_within_the_folder_keeps_its_name(plain):
    (plain / "link.png").symlink_to(plain / "images" / "a.png")
    (plain / "more").symlink_to(plain / "images")
    for name in ("link.png", str(plain / "link.png"), "more/a.png", str(plain / "more" / "a.png")):
        write_manifest(plain, manifest_row(image=name))

        [sample] = open_labels(plain).samples

        assert sample.image == plain / name


@pytest.mark.parametrize("column", ["image", "mask", "split", "group"])
def test_a_manifest_without_a_column_or_a_value_is_refused_by_name(plain, column):
    columns = [name for name in ("image", "mask", "split", "group") if name != column]
    write_manifest(plain, [manifest_row()[0]] * 3, columns=columns)
    refused(plain, f"manifest.csv: no column {column}: it needs")

    write_manifest(plain, manifest_row(**{column: ""}))
    refused(plain, f"manifest.csv line 2: no {column}")


@pytest.mark.parametrize(
    "content", [b"image,mask,split,group\nimages/a.png\n", b"\xff\xfe\x00", b"a\x00b\n", b""]
)
def test_a_broken_manifest_is_refused(plain, content):
    (plain / "manifest.csv").write_bytes(content)
    refused(plain, "manifest.csv")


# The real data


def shared(name):
    if not (DATA / name / "classes.json").is_file():
        pytest.skip(
            f"no labelled data at {DATA / name}: set $ROLLSIGHT_DATA to the folder that holds {name}/"
        )
    return open_labels(DATA / name)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "classes", "groups", "images"),
    [
        ("neu_clean", ("inclusion", "patches", "scratches"), 960, {"train": 620, "val": 169, "test": 171}),
        ("mt", ("blowhole", "break", "crack", "fray", "uneven"), 109, {"train": 232, "val": 80, "test": 145}),
    ],
)
def test_the_public_sets_open_with_disjoint_groups(name, classes, groups, images):
    data = shared(name)
    parts = {split: data.of_split(split) for split in images}

    assert data.classes == classes
    assert {split: len(part.samples) for split, part in parts.items()} == images
    assert len(data.groups()) == groups == sum(len(part.groups()) for part in parts.values())


@pytest.mark.shared
@pytest.mark.parametrize("name", ["neu_clean", "mt"])
def test_images_and_masks_of_the_public_sets_fit_each_other(name):
    data = shared(name)
    for sample in data.samples[::25]:
        image, mask = sample.read()
        assert image.shape == (1, *mask.shape)
        assert mask[mask != IGNORE].max(initial=0) <= len(data.classes)
