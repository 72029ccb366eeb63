"""Proposals: numbered by doubt, opened by Labelme, and told from what a person has checked."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labelled_folder import write_labels
from rollsight.inspect.labelme import read_labelme
from rollsight.inspect.labels import open_labels
from rollsight.inspect.proposals import MAX_PX, propose, proposed, uncertainty_of


def by_gray(window):
    """Logits of background, pit and scratch: bright is a pit, dark a scratch, gray in between in doubt."""
    gray = window[0]
    return np.stack([np.zeros_like(gray), (gray - 0.6) * 60, (0.4 - gray) * 60]).astype(np.float32)


@pytest.fixture
def images(tmp_path):
    """Three images of 72 x 70 px: clean, a sure pit, and two doubtful ones in a folder of a coil."""
    folder = tmp_path / "images"
    (folder / "coil-7").mkdir(parents=True)
    for name, marks in (
        ("clean.png", []),
        ("sure.png", [(10, 250)]),
        ("coil-7/doubt.png", [(10, 156), (40, 155)]),
    ):
        pixels = np.full((70, 72), 128, np.uint8)
        for at, gray in marks:
            pixels[at : at + 9, at : at + 9] = gray
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def proposals(small_model, images, tmp_path):
    propose(small_model, ("torch", by_gray), images, tmp_path / "out")
    return tmp_path / "out"


def files_of(proposals):
    return {
        path.stem.split("-", 1)[1]: (path, json.loads(path.read_text())) for path in proposals.glob("*.json")
    }


def test_the_most_doubtful_image_is_the_first(proposals):
    rows = list(csv.DictReader((proposals / "ranking.csv").open()))

    assert [row["image"] for row in rows] == ["coil-7/doubt.png", "sure.png", "clean.png"]
    assert [row["group"] for row in rows] == ["coil-7", "sure", "clean"]
    assert [row["file"][:4] for row in rows] == ["0001", "0002", "0003"]
    assert float(rows[0]["uncertainty_bits"]) > float(rows[1]["uncertainty_bits"])
    assert all((proposals / row["file"]).with_suffix(".png").is_file() for row in rows)


def test_a_file_says_which_model_made_it_and_how_sure_it_is(proposals, small_model):
    _, file = files_of(proposals)["sure"]

    assert file["proposal"]["model"] == "small"
    assert file["proposal"]["model_hash"] == small_model.hash
    assert file["proposal"]["made_at"].endswith("+00:00")
    assert file["flags"] == {"reviewed": False}
    [only] = file["shapes"]
    assert (only["label"], only["points"]) == ("pit", [[10, 10], [18, 18]])
    assert only["score"] > 0.99


def test_proposals_that_nobody_looked_at_are_left_out(proposals, tmp_path):
    with pytest.raises(UserError, match="no labelled image, and 3 proposals nobody looked at"):
        write_labels(tmp_path / "none", read_labelme(proposals))

    written = write_labels(tmp_path / "all", read_labelme(proposals), untouched=True)
    samples = open_labels(tmp_path / "all").samples
    assert sum(of_split["images"] for of_split in written.counts.values()) == 3
    assert all(sample.source.startswith("proposal:small@") for sample in samples)
    assert all(sample.source.endswith(":untouched") for sample in samples)
    assert sorted(sample.image.name for sample in samples) == ["clean.png", "doubt.png", "sure.png"]


def test_reviewed_and_changed_proposals_are_told_apart(proposals, tmp_path):
    files = files_of(proposals)
    path, clean = files["clean"]
    path.write_text(json.dumps(clean | {"flags": {"reviewed": True}}))
    path, doubt = files["doubt"]
    path.write_text(json.dumps(doubt | {"shapes": doubt["shapes"][:1]}))

    written = write_labels(tmp_path / "back", read_labelme(proposals))
    states = {sample.image.name: sample for sample in open_labels(tmp_path / "back").samples}

    assert written.left_out == 1
    assert states["clean.png"].source.endswith(":reviewed")
    assert states["doubt.png"].source.endswith(":changed")
    assert states["doubt.png"].group == "coil-7"


def test_an_image_comes_back_in_its_split_beside_one_of_its_name_in_another(small_model, images, tmp_path):
    (images / "sure.png").rename(images / "a.png")
    for split, image in (("train", "a.png"), ("test", "clean.png"), ("val/images", "coil-7")):
        (images / split).mkdir(parents=True)
        (images / image).rename(images / split / image.replace("clean", "a"))
    propose(small_model, ("torch", by_gray), images, tmp_path / "out")
    write_labels(tmp_path / "back", read_labelme(tmp_path / "out"), untouched=True)

    back = open_labels(tmp_path / "back").samples
    placed = {(s.split, s.image.relative_to(tmp_path / "back").as_posix(), s.group) for s in back}
    assert placed == {
        ("train", "train/images/a.png", "train/a"),
        ("test", "test/images/a.png", "test/a"),
        ("val", "val/images/coil-7/doubt.png", "coil-7"),
    }
    listed = csv.DictReader((tmp_path / "out" / "ranking.csv").open())
    assert {row["group"] for row in listed} == {group for _, _, group in placed}


def test_another_order_of_classes_does_not_make_a_proposal_changed(proposals):
    found = read_labelme(proposals, classes=["scratch", "pit"]).images

    assert all(image.untouched for image in found)


def test_classes_that_are_not_wanted_are_background(small_model, images, tmp_path):
    propose(small_model, ("torch", by_gray), images, tmp_path / "out", classes=["scratch"])

    assert not any(file["shapes"] for _, file in files_of(tmp_path / "out").values())
    with pytest.raises(UserError, match="class 'rust': model small knows pit, scratch"):
        propose(small_model, ("torch", by_gray), images, tmp_path / "two", classes=["rust"])


def test_specks_are_not_proposed(small_model):
    image = np.full((1, 64, 64), 0.5, np.float32)
    image[0, 10, 10:12] = image[0, 30, 30:34] = 1

    mask, _, _ = proposed(small_model, by_gray, image, small_model.card.classes)

    assert np.argwhere(mask).tolist() == [[30, x] for x in range(30, 34)]


def test_refinement_moves_the_edge_of_a_large_defect_and_keeps_a_tiny_one(small_model):
    image = np.full((1, 64, 64), 0.5, np.float32)
    image[0, 10:40, 10:40] = image[0, 50:52, 50:52] = 1

    def coarse(window):  # three pixels too large all round
        logits = by_gray(window)
        logits[1, 7:43, 7:43] = 8
        return logits

    plain, _, _ = proposed(small_model, coarse, image, ("pit", "scratch"))
    better, _, _ = proposed(small_model, coarse, image, ("pit", "scratch"), "guided")

    truth = image[0] == 1
    assert ((better > 0) != truth).sum() < ((plain > 0) != truth).sum()
    assert (better[50:52, 50:52] == 1).all()


def test_an_unknown_refinement_is_refused_before_the_work_starts(small_model, images, tmp_path):
    with pytest.raises(UserError, match="no refinement 'best'") as error:
        propose(small_model, ("torch", by_gray), images, tmp_path / "out", refine="best")
    assert error.value.exit_code == USAGE


def test_a_broken_image_is_told_and_left_out(small_model, images, tmp_path):
    (images / "sure.png").write_bytes(b"no image")
    told = []

    ranked = propose(
        small_model, ("torch", by_gray), images, tmp_path / "out", on_fault=lambda *fault: told.append(fault)
    )

    assert len(ranked) == 2
    assert "sure.png: not a readable image" in told[0][1]


def test_an_image_that_is_no_patch_is_refused(small_model, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("1", (16_000, MAX_PX // 16_000 + 1)).save(tmp_path / "images" / "long.png")

    with pytest.raises(UserError, match=r"long.png: .* is over 16777216 px"):
        propose(small_model, ("torch", by_gray), tmp_path / "images", tmp_path / "out")


def test_folders_with_masks_or_without_images_are_refused(small_model, labelled_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "set" / "masks").mkdir(parents=True)
    Image.new("L", (2, 2)).save(tmp_path / "set" / "masks" / "a.png")

    for folder, match in (("empty", "no image there"), ("set", "it holds masks")):
        with pytest.raises(UserError, match=match):
            propose(small_model, ("torch", by_gray), tmp_path / folder, tmp_path / "out")


def test_doubt_is_the_entropy_of_each_region_in_bits():
    p = np.zeros((3, 8, 8), np.float32)
    p[0] = 1
    p[:, 1:3, 1:3] = np.array([0.5, 0.5, 0])[:, None, None]  # a defect or none: one bit
    p[:, 5:7, 5:7] = np.array([0, 0.5, 0.5])[:, None, None]  # which class: one bit
    assert uncertainty_of(p, 0.25) == pytest.approx(2.0)

    p[:, 5:7, 5:7] = np.array([0, 1, 0])[:, None, None]
    assert uncertainty_of(p, 0.25) == pytest.approx(1.0)
    assert uncertainty_of(np.eye(3, dtype=np.float32)[:, :1, None].repeat(4, axis=2), 0.25) == 0
