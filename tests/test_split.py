"""A split by group: nothing straddles, classes are spread, the same seed gives the same bytes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.label_check import check_labels
from rollsight.inspect.labels import open_labels
from rollsight.inspect.split import stratify, write_split


@pytest.fixture
def plain(tmp_path):
    """60 images of 40 coils: 20 coils with two images; every fourth coil is clean, every tenth holds pits."""
    rng = np.random.default_rng(0)
    for i in range(60):
        coil = i % 40
        folder = tmp_path / "images" / f"coil-{coil:02}"
        folder.mkdir(parents=True, exist_ok=True)
        masks = tmp_path / "masks" / f"coil-{coil:02}"
        masks.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24)).astype(np.uint8)).save(folder / f"{i}.png")
        mask = np.zeros((24, 24), np.uint8)
        mask[5:9, 5:9] = 0 if coil % 4 == 0 else 1 if coil % 10 == 1 else 2
        Image.fromarray(mask).save(masks / f"{i}.png")
    (tmp_path / "classes.json").write_text(json.dumps(["pit", "scratch"]))
    return tmp_path


def rows_of(root):
    with (root / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(root, rows):
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_every_image_is_listed_and_no_group_straddles(plain):
    counts = write_split(plain)
    data = open_labels(plain)  # refuses a group in two splits

    assert len(data.samples) == 60
    assert {split: of_split["images"] for split, of_split in counts.items()} == {
        split: len(data.of_split(split).samples) for split in ("train", "val", "test")
    }


def test_classes_come_near_their_shares(plain):
    counts = write_split(plain, (0.5, 0.25, 0.25))

    assert [counts[split]["images"] for split in counts] == pytest.approx([30, 15, 15], abs=2)
    assert [counts[split]["pit"] for split in counts] == [3, 2, 1] or sum(
        counts[split]["pit"] for split in counts
    ) == pytest.approx(6, abs=2)
    assert all(of_split.get(name) for of_split in counts.values() for name in ("clean", "pit", "scratch"))


def test_the_same_seed_gives_the_same_bytes_and_another_another_split(plain):
    found = []
    for seed in (1, 1, 2):
        write_split(plain, seed=seed, overwrite=True)
        found.append((plain / "manifest.csv").read_bytes())

    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("number", [2, 7])
def test_a_line_with_a_cell_too_many_is_refused_and_the_manifest_kept(plain, number):
    write_split(plain)
    manifest = plain / "manifest.csv"
    lines = manifest.read_text().splitlines()
    lines[number - 1] += ",rust"
    manifest.write_text("\n".join(lines) + "\n")
    before = manifest.read_bytes()

    with pytest.raises(UserError, match=rf"line {number}: 5 cells, .* names 4 columns: take out 'rust'"):
        write_split(plain, overwrite=True)
    assert manifest.read_bytes() == before


def test_a_manifest_is_kept_unless_told(plain):
    write_split(plain)
    before = (plain / "manifest.csv").read_bytes()

    with pytest.raises(UserError, match=r"is there already: --force") as error:
        write_split(plain, seed=5)
    assert error.value.exit_code == USAGE
    assert (plain / "manifest.csv").read_bytes() == before


def test_a_manifest_that_is_replaced_keeps_groups_and_further_columns_and_puts_straddling_right(plain):
    write_split(plain)
    rows = rows_of(plain)
    for i, row in enumerate(rows):
        row |= {"split": ("train", "test")[i % 2], "group": f"heat-{i % 12}", "note": f"n{i}"}
    write_rows(plain, rows)

    write_split(plain, overwrite=True)

    after = rows_of(plain)
    assert [(row["image"], row["group"], row["note"]) for row in after] == [
        (row["image"], row["group"], row["note"]) for row in rows
    ]
    assert len({(row["group"], row["split"]) for row in after}) == 12


@pytest.mark.parametrize("spelled", ["./{}", "{root}/{}"])
def test_further_columns_are_kept_however_a_path_is_spelled(plain, monkeypatch, spelled):
    write_split(plain)
    rows = rows_of(plain)
    names = [row["image"] for row in rows]
    for i, row in enumerate(rows):
        row |= {name: spelled.format(row[name], root=plain) for name in ("image", "mask")} | {"note": f"n{i}"}
    write_rows(plain, rows)
    monkeypatch.chdir(plain.parent)

    write_split(Path(plain.name), overwrite=True)

    assert [(row["image"], row["note"]) for row in rows_of(plain)] == [
        (name, f"n{i}") for i, name in enumerate(names)
    ]


def test_a_manifest_that_changes_while_images_are_read_is_kept(plain):
    write_split(plain)
    changed = (plain / "manifest.csv").read_text().splitlines()[:-1]

    def change(done: int, total: int) -> None:
        (plain / "manifest.csv").write_text("\n".join(changed))

    with pytest.raises(UserError, match=r"manifest.csv was changed while the images were read"):
        write_split(plain, overwrite=True, on_image=change)
    assert (plain / "manifest.csv").read_text().splitlines() == changed


def test_groups_that_show_the_same_steel_become_one(plain):
    source = Image.open(plain / "images" / "coil-03" / "3.png")
    for coil, name in (("coil-07", "7"), ("coil-09", "9")):
        source.transpose(Image.Transpose.ROTATE_90).save(plain / "images" / coil / f"{name}.png")
    check = check_labels([plain])
    write_split(plain, leaks=check.leaks + check.alike)

    group_of = {row["image"].split("/")[1]: row["group"] for row in rows_of(plain)}
    assert {group_of[coil] for coil in ("coil-03", "coil-07", "coil-09")} == {"coil-03"}
    assert not check_labels([plain]).leaks


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ((0.7, 0.3), "one number of 0 or more each"),
        ((0.7, -0.1, 0.4), "one number of 0 or more each"),
        ((float("nan"), 0.5, 0.5), "one number of 0 or more each"),
        ((0.7, 0.2, 0.2), "add up to 1.1"),
    ],
)
def test_shares_that_are_none_are_refused(plain, shares, match):
    with pytest.raises(UserError, match=match) as error:
        write_split(plain, shares)
    assert error.value.exit_code == USAGE
    assert not (plain / "manifest.csv").exists()


def test_too_few_groups_are_refused(plain):
    for folder in sorted((plain / "images").iterdir())[2:]:
        for file in folder.iterdir():
            file.unlink()

    with pytest.raises(UserError, match="2 groups are too few for a"):
        write_split(plain)


def test_a_broken_pair_is_refused_before_anything_is_written(plain):
    (plain / "masks" / "coil-05" / "5.png").unlink()

    with pytest.raises(UserError, match="no mask"):
        write_split(plain)
    assert not (plain / "manifest.csv").exists()


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=60),
    st.integers(0, 9),
)
def test_every_unit_gets_one_part_that_has_a_share(held, seed):
    counts = np.array(held, np.int64)
    counts[:, 0] += counts.sum(axis=1) == 0  # a unit holds at least one image, with a class or clean
    part = stratify(counts, counts.sum(axis=1), np.array([0.8, 0.0, 0.2]), seed)

    assert set(part.tolist()) <= {0, 2}
