"""Everything wrong with labelled data is told at once, each with the file it is in."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.label_check import check_labels

DATA = Path(os.environ.get("ROLLSIGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def grain(seed, size=(60, 60)):
    return np.random.default_rng(seed).integers(60, 190, size).astype(np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(root, name, image, mask):
    save(root / "images" / f"{name}.png", image)
    save(root / "masks" / f"{name}.png", mask)


def marked(value=1, size=(60, 60)):
    mask = np.zeros(size, np.uint8)
    mask[10:20, 10:20] = value
    return mask


def write_manifest(root, *rows):
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "split", "group"), *rows])


def row(name, split, group):
    return f"images/{name}.png", f"masks/{name}.png", split, group


@pytest.fixture
def sound(tmp_path):
    """Six images of six pieces, two classes, nothing wrong."""
    root = tmp_path / "sound"
    for i in range(6):
        write(root, f"{i}", grain(i), marked(1 + i % 2))
    (root / "classes.json").write_text(json.dumps(["pit", "scratch"]))
    splits = ("train", "train", "val", "val", "test", "test")
    write_manifest(root, *(row(i, split, f"p{i}") for i, split in enumerate(splits)))
    return root


def kinds(root):
    return Counter(fault.kind for fault in check_labels([root]).faults)


def test_sound_data_has_no_fault_and_is_counted(sound):
    check = check_labels([sound])

    assert (check.faults, check.leaks, check.alike) == ((), (), ())
    assert (check.images, check.groups) == (6, 6)
    assert check.counts == {split: {"pit": 1, "scratch": 1} for split in ("train", "val", "test")}


def test_every_fault_of_a_folder_is_told_at_once(sound):
    (sound / "images" / "0.png").write_bytes(b"no picture")
    save(sound / "masks" / "1.png", marked(1, (60, 61)))
    save(sound / "masks" / "2.png", marked(7))
    save(sound / "masks" / "3.png", np.full((60, 60), 255, np.uint8))
    Image.fromarray(grain(9, (60, 60, 3))).save(sound / "masks" / "4.png")
    save(sound / "masks" / "nobody.png", marked())
    rows = [row(i, "train", "p") for i in range(5)]
    write_manifest(
        sound,
        *rows,
        row(0, "train", "p"),
        row(5, "test", "p"),
        row(6, "test", "q"),
        ("images/5.png", "masks/5.png", "", "q"),
        ("images/5.png", "masks/5.png", "holdout", "r"),
    )

    check = check_labels([sound])

    assert Counter(fault.kind for fault in check.faults) == {
        "missing": 2,  # image and mask of 6
        "manifest": 1,
        "straddles": 1,
        "broken": 4,  # 0 twice, 1, 4
        "values": 1,
        "ignored": 1,
        "twice": 2,
        "stray": 1,
        "split": 1,
        "unused": 1,  # pit
    }
    lines = "\n".join(fault.line for fault in check.faults)
    for words in (
        "0.png: not a readable image",
        "1.png: the mask is 61 x 60 px",
        "2.png: its mask holds 7, but there are 2 classes",
        "nobody.png: no image",
        "line 9: no file",
        "class 'pit' occurs in no mask",
        "'holdout' is read by nothing",
    ):
        assert words in lines
    assert all("\n" not in fault.line for fault in check.faults)


def test_data_without_a_list_of_classes_is_checked_for_all_else(sound):
    (sound / "classes.json").unlink()
    (sound / "images" / "0.png").write_bytes(b"")

    assert kinds(sound) == {"classes": 1, "broken": 1}


def test_an_image_without_a_mask_in_plain_folders_is_told_beside_the_others(sound):
    (sound / "manifest.csv").unlink()
    (sound / "masks" / "2.png").unlink()
    (sound / "masks" / "4.png").unlink()

    assert kinds(sound) == {"missing": 2}


def test_steel_in_two_splits_is_a_leak_and_in_two_groups_of_one_a_warning(sound):
    save(sound / "images" / "4.png", np.rot90(grain(0)))
    save(sound / "images" / "1.png", np.clip(grain(0) * 0.9 + 10, 0, 255).astype(np.uint8))

    check = check_labels([sound])

    [leak], [alike] = check.leaks, check.alike
    assert (leak.kind, leak.splits, leak.groups) == ("turned", ("train", "test"), ("p0", "p4"))
    assert (alike.kind, alike.splits) == ("near", ("train", "train"))


def test_a_broken_mask_does_not_hide_the_leak_of_its_image(sound):
    save(sound / "images" / "4.png", grain(0))
    save(sound / "masks" / "4.png", marked(1, (9, 9)))

    check = check_labels([sound])

    assert [fault.kind for fault in check.faults] == ["broken"]
    assert [leak.kind for leak in check.leaks] == ["exact"]


def test_several_folders_are_one_body_and_equal_group_names_in_them_are_different_groups(sound, tmp_path):
    other = tmp_path / "other"
    write(other, "x", grain(0), marked(1))
    (other / "classes.json").write_text(json.dumps(["dent"]))
    write_manifest(other, row("x", "test", "p0"))

    check = check_labels([sound, other])

    assert check.images == 7
    assert [leak.groups for leak in check.leaks] == [(f"{sound}: p0", f"{other}: p0")]
    assert check.counts["test"] == {"pit": 1, "scratch": 1, "dent": 1}


def test_progress_is_told_for_images_and_pairs(sound):
    images, pairs = [], []
    check_labels([sound], lambda *done: images.append(done), lambda *done: pairs.append(done))

    assert images == [(i, 6) for i in range(1, 7)]
    assert [done for done, _ in pairs] == list(range(1, pairs[0][1] + 1))


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        check_labels([tmp_path / "gone"])
