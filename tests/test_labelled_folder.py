"""Labels in and out: no pixel is lost, groups and splits are kept, and a fault leaves nothing behind."""

import csv
import json
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from rollsight.inspect.coco import read_coco, write_coco
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.label_check import check_labels
from rollsight.inspect.labelled_folder import Grouping, read_inside, whole_folder, write_labels
from rollsight.inspect.labelme import read_labelme, write_labelme
from rollsight.inspect.labels import open_labels

FORMATS = {"coco": (write_coco, read_coco), "labelme": (write_labelme, read_labelme)}
both = pytest.mark.parametrize("tool", FORMATS)


def make_folder(root, masks, split="train", group="coil-7", source=""):
    """A labelled folder with classes pit and scratch, and a gray image for each mask."""
    (root / split / "images").mkdir(parents=True)
    (root / split / "masks").mkdir()
    rows = [("image", "mask", "split", "group", "source")]
    for number, mask in enumerate(masks):
        names = (f"{split}/images/{number}.png", f"{split}/masks/{number}.png")
        Image.fromarray(np.full(mask.shape, 90 + number, np.uint8)).save(root / names[0])
        Image.fromarray(mask).save(root / names[1])
        rows.append((*names, split, group, source))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (root / "classes.json").write_text(json.dumps(["pit", "scratch"]))
    return open_labels(root)


def there_and_back(data, tool, folder):
    write, read = FORMATS[tool]
    write(data, folder / "out")
    write_labels(folder / "back", read(folder / "out"))
    return open_labels(folder / "back")


def by_name(data):
    return sorted(data.samples, key=lambda sample: (sample.split, sample.image.name))


def ring_and_specks():
    """A ring with a hole, one pixel, two components that touch at a corner, others on all borders, ignore."""
    mask = np.zeros((20, 24), np.uint8)
    mask[4:12, 4:12], mask[6:10, 6:10], mask[7, 7] = 1, 0, 2
    mask[15, 15] = mask[16, 16] = 1
    mask[15, 16] = 2
    mask[0, :5] = mask[-1, -3:] = 2
    mask[:3, -1] = mask[-4:, 0] = 1
    mask[10:14, 18:22] = 255
    return mask


# Round trips


@both
def test_holes_single_pixels_corners_and_borders_come_back_as_they_were(tmp_path, tool):
    data = make_folder(tmp_path / "data", [ring_and_specks()])

    [back] = there_and_back(data, tool, tmp_path).samples

    assert np.array_equal(back.read()[1], ring_and_specks())


# Few values on few pixels: components that touch, holes and borders are the rule.
masks = npst.arrays(
    np.uint8,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from([0, 0, 1, 1, 2, 255]),
)


@both
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(masks, min_size=4, max_size=4))
def test_a_round_trip_loses_no_pixel(tmp_path_factory, tool, drawn):
    folder = tmp_path_factory.mktemp(tool)
    data = make_folder(folder / "data", drawn)

    back = there_and_back(data, tool, folder)

    assert back.classes == data.classes
    for sample, mask in zip(by_name(back), drawn, strict=True):
        assert np.array_equal(sample.read()[1], mask)


@both
def test_splits_groups_classes_sources_and_image_bytes_are_kept(labelled_folder, tmp_path, tool):
    data = open_labels(labelled_folder)

    back = there_and_back(data, tool, tmp_path)

    assert back.classes == data.classes
    assert [(s.split, s.group, s.image.read_bytes()) for s in by_name(back)] == [
        (s.split, s.group, s.image.read_bytes()) for s in by_name(data)
    ]
    assert not check_labels([tmp_path / "back"]).faults


@both
def test_the_source_of_labels_is_carried_on(tmp_path, tool):
    data = make_folder(tmp_path / "data", [ring_and_specks()], source="line 3, May")

    assert there_and_back(data, tool, tmp_path).samples[0].source == "line 3, May"


@both
def test_labels_without_a_source_get_the_file_they_were_in(tmp_path, tool):
    data = make_folder(tmp_path / "data", [ring_and_specks()])

    [back] = there_and_back(data, tool, tmp_path).samples

    assert back.source == {"coco": "coco:train.json", "labelme": "labelme:0.json"}[tool]


def test_the_manifest_has_the_columns_of_the_public_sets(tmp_path):
    there_and_back(make_folder(tmp_path / "data", [ring_and_specks()]), "coco", tmp_path)

    [row] = csv.DictReader((tmp_path / "back" / "manifest.csv").open())

    assert row["classes"] == "1 2"
    assert (row["width"], row["height"], len(row["sha256_16"])) == ("24", "20", 16)


@both
def test_a_manifest_with_absolute_paths_goes_out_too(labelled_folder, tmp_path, monkeypatch, tool):
    """The names are those of the same manifest with relative paths, wherever the command was given."""
    manifest = labelled_folder / "manifest.csv"
    manifest.write_text(re.sub(r"\d(_mask)?\.png", rf"{labelled_folder}/\g<0>", manifest.read_text()))
    monkeypatch.chdir(tmp_path)

    back = there_and_back(open_labels(Path("labelled")), tool, tmp_path)

    assert [sample.image.name for sample in by_name(back)] == ["5.png", *(f"{i}.png" for i in range(5))]


@both
def test_what_cannot_go_out_is_refused(tmp_path, tool):
    write, _ = FORMATS[tool]
    odd = make_folder(tmp_path / "odd", [np.full((4, 4), 3, np.uint8)])
    part = make_folder(tmp_path / "part", [np.zeros((4, 4), np.uint8)], split="holdout")

    with pytest.raises(UserError, match=r"0.png: holds 3, but there are 2 classes"):
        write(odd, tmp_path / "out")
    with pytest.raises(UserError, match="split 'holdout': needed one of train, val, test"):
        write(part, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# All or nothing


def test_a_folder_that_is_there_is_not_written_into(tmp_path):
    (tmp_path / "out").mkdir()

    with pytest.raises(UserError, match="out is there already") as error, whole_folder(tmp_path / "out"):
        pass
    assert error.value.exit_code == USAGE


def test_an_interrupted_import_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    data = make_folder(tmp_path / "data", [ring_and_specks()])
    write_coco(data, tmp_path / "coco")

    with pytest.raises(KeyboardInterrupt):
        write_labels(tmp_path / "back", read_coco(tmp_path / "coco"), on_image=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "data"]


@both
def test_every_broken_image_is_told_and_then_nothing_is_written(tmp_path, tool):
    write, read = FORMATS[tool]
    write(make_folder(tmp_path / "data", [ring_and_specks()] * 3), tmp_path / "out")
    [missing, broken, _] = sorted((tmp_path / "out").rglob("*.png"))
    missing.unlink()
    broken.write_bytes(b"no image")
    told = []

    with pytest.raises(UserError, match="back was not written: mend the 2 faults"):
        write_labels(tmp_path / "back", read(tmp_path / "out"), on_fault=lambda *fault: told.append(fault))

    assert [kind for kind, _ in told] == ["broken", "broken"]
    assert "0.png: no such image" in told[0][1]
    assert "1.png: not a readable image" in told[1][1]
    assert not list(tmp_path.glob("*back*"))


def test_a_group_in_two_splits_and_a_name_that_stands_twice_are_refused(tmp_path):
    write_coco(make_folder(tmp_path / "data", [ring_and_specks()] * 2), tmp_path / "coco")
    file = tmp_path / "coco" / "train.json"
    content = json.loads(file.read_text())
    content["images"][1]["split"] = "val"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="group 'coil-7' is in train and in val"):
        write_labels(tmp_path / "back", read_coco(tmp_path / "coco"))

    content["images"][1] = {**content["images"][0], "id": 2}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"0.png stands twice in train"):
        write_labels(tmp_path / "back", read_coco(tmp_path / "coco"))


def test_an_image_that_is_to_be_turned_is_refused(tmp_path):
    write_coco(make_folder(tmp_path / "data", [ring_and_specks()]), tmp_path / "coco")
    image = next((tmp_path / "coco").rglob("*.png"))
    turned = Image.open(image)
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(image, exif=exif)

    with pytest.raises(UserError, match="EXIF data says that it is to be turned"):
        write_labels(tmp_path / "back", read_coco(tmp_path / "coco"))


# Names, splits, groups


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../a.png", "/etc/passwd.png", "..\\a.png", "", ".", "a\0.png", "a\n.png"]
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "inner").mkdir()

    with pytest.raises(UserError, match="inside the folder"):
        read_inside(tmp_path / "inner", name)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.png").symlink_to(tmp_path / "a.png")

    with pytest.raises(UserError, match="lies outside of"):
        read_inside(tmp_path / "inner", "a.png")


@pytest.mark.parametrize(
    ("name", "match"), [("a" * 5000 + ".png", "cannot be read"), ("a.txt", "needed one")]
)
def test_a_name_that_is_no_image_is_refused_in_a_short_line(tmp_path, name, match):
    with pytest.raises(UserError, match=match) as error:
        read_inside(tmp_path, name)
    assert len(str(error.value)) < 400


def test_the_group_is_what_is_said_else_the_folder_else_the_image():
    place = Grouping().place

    assert place(PurePosixPath("coil-7/a.png"), "val", "heat 3") == ("val", "heat 3")
    assert place(PurePosixPath("coil-7/a.png"), "val") == ("val", "coil-7")
    assert place(PurePosixPath("a.png"), "val") == ("val", "val/a")
    assert place(PurePosixPath("a.png"))[1] == "a"


def test_a_regular_expression_groups_by_its_first_bracket_or_all_of_it():
    name = PurePosixPath("cam1/coil-7_0003.png")

    assert Grouping(r"(coil-\d+)_").place(name, "val", "other")[1] == "coil-7"
    assert Grouping(r"coil-\d+").place(name, "val")[1] == "coil-7"
    with pytest.raises(UserError, match="finds no group"):
        Grouping("heat").place(name)
    with pytest.raises(UserError, match="no regular expression") as error:
        Grouping("(")
    assert error.value.exit_code == USAGE


def test_images_without_a_split_stay_in_theirs_by_group():
    assert len({Grouping().place(PurePosixPath(f"coil-7/{i}.png"))[0] for i in range(20)}) == 1


def test_the_source_column_of_a_manifest_is_read(tmp_path: Path):
    data = make_folder(tmp_path, [ring_and_specks()], source="reviewed")

    assert data.samples[0].source == "reviewed"
