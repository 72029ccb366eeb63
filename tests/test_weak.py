"""Weak supervision: what the pooling says, what a pseudo-mask may hold, and the way from labels to masks."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import IGNORE, open_labels
from rollsight.inspect.weak import learn, open_weak, pooled, pseudo_mask, write_pseudo
from rollsight.jobs.commands.weak import weak
from torch import nn


@pytest.fixture
def weak_folder(labelled_folder):
    """The labelled folder with one training mask left; `classes` says what the other images hold."""
    rows = list(csv.DictReader((labelled_folder / "manifest.csv").open()))
    for i, row in enumerate(rows):
        row["classes"] = ("pit", "2")[i % 2]
        if row["split"] == "train" and i != 1:
            row["mask"] = ""
    with (labelled_folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return labelled_folder


class Evidence(nn.Module):
    """Logits that are the image itself: class 1 where it is light, class 2 where it is dark, by 5 nats."""

    def forward(self, x):
        lead = 20 * (x - 0.5)
        return torch.cat([torch.zeros_like(x), lead - 5, -lead - 5], dim=1)


def image_with(value: float) -> np.ndarray:
    image = np.full((1, 64, 64), 0.5, np.float32)
    image[0, 16:32, 16:32] = value
    return image


def test_pooling_lies_between_the_mean_and_the_maximum():
    logits = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lead = nn.functional.avg_pool2d(logits[:, 1:] - logits[:, :1], 4)

    nearly_mean, between, nearly_peak = (pooled(logits, r) for r in (1e-2, 1.0, 1e4))

    torch.testing.assert_close(nearly_mean, lead.mean(dim=(2, 3)), atol=5e-3, rtol=0)
    torch.testing.assert_close(nearly_peak, lead.amax(dim=(2, 3)), atol=1e-3, rtol=0)
    assert (nearly_mean < between).all() and (between < nearly_peak).all()


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_pseudo_mask_holds_only_classes_that_the_image_holds(calibrated):
    """Without that knowledge the light square would be class 1."""
    light = image_with(1.0)

    known = pseudo_mask(Evidence(), light, (1,), calibrated=calibrated)
    other = pseudo_mask(Evidence(), light, (2,), calibrated=calibrated)

    assert (known[20:28, 20:28] == 1).all() and (known[40:, 40:] != 1).all()
    assert not (other == 1).any()


def test_a_clean_image_is_background_all_over():
    assert not pseudo_mask(Evidence(), image_with(1.0), (), calibrated=False).any()


def test_what_is_doubtful_is_ignored():
    image = image_with(1.0)
    image[0, 40:56, 40:56] = 0.84  # a third of the square's evidence

    mask = pseudo_mask(Evidence(), image, (1,), calibrated=False, refinement="none")

    assert (mask[16:32, 16:32] == 1).all() and (mask[40:56, 40:56] == IGNORE).all() and mask[0, 0] == 0


def test_where_a_class_was_not_found_nothing_is_background():
    mask = pseudo_mask(Evidence(), image_with(1.0), (1, 2), calibrated=True, refinement="none")

    assert set(np.unique(mask)) == {1, IGNORE}


def test_labels_become_masks_that_training_reads(weak_folder, tmp_path, capsys):
    out = tmp_path / "made"

    weak(weak_folder, out, steps=2, threads=1, as_json=True)

    told = json.loads(capsys.readouterr().out)
    assert told["data"] == str(out) and told["counts"]["train"]["images"] == 4
    data = open_labels(out)
    assert data.classes == ("pit", "scratch") and len(data.samples) == 6
    rows = {row["image"]: row for row in csv.DictReader((out / "manifest.csv").open())}
    assert rows["train/images/1.png"]["source"] == "mask"
    assert rows["train/images/0.png"]["source"] == "image labels (2 steps, seed 0)"
    kept, given = (
        np.asarray(Image.open(path)) for path in (out / "train/masks/1.png", weak_folder / "1_mask.png")
    )
    np.testing.assert_array_equal(kept, given)
    for sample in data.of_split("train").samples:
        values = set(np.unique(sample.read()[1]).tolist())
        assert values <= {0, IGNORE, 1 if int(sample.image.stem) % 2 == 0 else 2}
    assert not (tmp_path / ".made.weak").exists()
    with pytest.raises(UserError, match="is there already"):
        weak(weak_folder, out, steps=2)


def test_learning_goes_on_where_it_stopped(weak_folder, tmp_path, monkeypatch):
    data = open_weak(weak_folder).of_split("train")
    monkeypatch.setattr("rollsight.inspect.weak.SAVE_EVERY", 1)

    def stop(step: int, steps: int) -> None:
        if step == 1:
            raise KeyboardInterrupt

    whole = learn(data, tmp_path / "whole", steps=2)
    with pytest.raises(KeyboardInterrupt):
        learn(data, tmp_path / "cut", steps=2, on_step=stop)
    resumed = learn(data, tmp_path / "cut", steps=2)

    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, atol=0, rtol=0)


def test_folders_that_say_too_little_are_refused_in_one_line(weak_folder, tmp_path):
    manifest = weak_folder / "manifest.csv"
    good = manifest.read_text()

    def refused(text: str, line: str) -> None:
        manifest.write_text(text)
        with pytest.raises(UserError, match=line):
            open_weak(weak_folder)

    refused(good.replace(",pit", ",dent"), "class 'dent': needed one of pit, scratch, or its mask value")
    refused(good.replace("0.png,", "none.png,"), "no file .*none.png in the data's folder")
    refused(good.replace(",val,", ",holdout,"), "needed a split of train, val, test")
    refused(good.replace("piece-4", "piece-0"), "group 'piece-0' is in val and train")
    refused(good.replace(",classes", ",remarks"), "no mask, and no column `classes`")
    manifest.write_text(good)
    data = open_weak(weak_folder).of_split("train")
    only_pits = type(data)(data.root, data.classes, tuple(s for s in data.samples if s.present == (1,)))
    with pytest.raises(UserError, match="no image for training holds scratch"):
        learn(only_pits, tmp_path / "run", steps=1)


def test_a_mask_value_beyond_the_classes_is_refused_whether_the_manifest_tells_the_classes_or_not(
    weak_folder,
):
    Image.fromarray(np.full((72, 80), 3, dtype=np.uint8)).save(weak_folder / "1_mask.png")
    with pytest.raises(UserError, match=r"1_mask.png: mask value 3, but .* has 2 classes"):
        open_weak(weak_folder)

    manifest = weak_folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("piece-1,2", "piece-1,"))
    with pytest.raises(UserError, match=r"1_mask.png: mask value 3, but .* has 2 classes"):
        open_weak(weak_folder)


def test_what_has_no_mask_judges_nothing(weak_folder, tmp_path):
    data = open_weak(weak_folder)
    samples = tuple(s for s in data.samples if s.split != "val")
    blind = [type(s)(s.image, s.present, None, s.split, s.group) for s in data.samples if s.split == "val"]

    write_pseudo(
        Evidence(), type(data)(data.root, data.classes, (*samples, *blind)), tmp_path / "out", "test"
    )

    assert {sample.split for sample in open_labels(tmp_path / "out").samples} == {"train", "test"}


def test_a_manifest_with_absolute_paths_is_written_with_the_names_of_the_relative_ones(
    weak_folder, tmp_path, monkeypatch
):
    manifest = weak_folder / "manifest.csv"
    manifest.write_text(re.sub(r"\d(_mask)?\.png", rf"{weak_folder}/\g<0>", manifest.read_text()))
    monkeypatch.chdir(tmp_path)

    write_pseudo(Evidence(), open_weak(Path("labelled")), tmp_path / "out", "test")

    assert sorted(sample.image.name for sample in open_labels(tmp_path / "out").samples) == [
        f"{i}.png" for i in range(6)
    ]
