"""Retraining: trained on from the present model, held against the gates, promoted by nobody."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.labels import describe, open_labels
from rollsight.inspect.models import DEFAULT, open_model, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.promotion import GATES_FILE
from rollsight.inspect.recipe import Recipe
from rollsight.jobs.retrain_job import retrain
from rollsight.jobs.train_job import learned_from

AT = datetime(2026, 11, 24, 2, 0, tzinfo=UTC)
RECIPE = Recipe(steps=2, batch=1, mosaic=1, crop_px=64)


@pytest.fixture
def plant(tmp_path: Path, small_model, labelled_folder) -> Plant:
    """A plant whose model `small` has labels to learn from, and a gate on their test split."""
    plant = Plant(tmp_path / "plant")
    shutil.copytree(small_model.folder, plant.models / "small")
    update_card(open_model("small", plant.models), name="small")
    shutil.copytree(labelled_folder, plant.home / "labels")
    (plant.home / GATES_FILE).write_text("gates: [{data: labels, at_least: {miou: 0.0}}]")
    return plant


def test_new_labels_are_learned_once_told_of_and_promoted_by_nobody(plant):
    data = plant.home / "labels"
    first = retrain(plant, [data], RECIPE, at=AT, start="small")
    model = plant.model(first.name)
    report = json.loads(first.report.read_text())

    assert first.is_new and first.passed
    assert model.card.recipe["init"] == plant.model("small").hash
    assert (model.card.net, model.card.classes) == ("unet_lite", ("pit", "scratch"))
    assert model.card.calibrated_on["split"] == "val"
    assert report["gates"][1]["gate"] == "miou >= 0"
    assert report["from"]["model"] == "small" and report["promoted"] is False
    assert plant.model("default").folder == DEFAULT

    again = retrain(plant, [data], RECIPE, at=AT, start="small")
    assert (again.name, again.is_new) == (first.name, False)
    assert plant.model(again.name).card == model.card

    mask = np.array(Image.open(data / "0_mask.png"))
    mask[:4, :4] = 1
    Image.fromarray(mask).save(data / "0_mask.png")
    (plant.home / GATES_FILE).unlink()
    changed = retrain(plant, [data], RECIPE, at=AT, start="small")
    assert changed.is_new and changed.name != first.name
    assert changed.verdicts is None and not changed.passed


def test_a_retrained_model_is_not_judged_on_what_the_one_before_was_trained_on(plant):
    """The gate's test split was what `small` learned from: retrained on the train split it knows it still."""
    data = open_labels(plant.home / "labels")
    seen = describe(data.of_split("test"), "train")
    small = update_card(plant.model("small"), trained_on=[seen])
    told = retrain(plant, [data.root], RECIPE, at=AT, start="small")

    card = plant.model(told.name).card
    assert [source["groups"] for source in card.trained_on] == [4, 1]
    assert card.groups() == {f"piece-{i}" for i in (0, 1, 2, 3, 5)}
    assert not told.passed
    assert told.verdicts is not None
    assert (told.verdicts[0].found, told.verdicts[0].passed) == ("1: piece-5", False)
    assert small.card.groups() == {"piece-5"}


def test_what_both_trainings_learned_from_stands_once_and_a_group_is_named_once(plant):
    """Labels that have grown are another source; of their older state only what is gone is named."""
    data = open_labels(plant.home / "labels")
    before, now = (describe(data.of_split(split), "train") for split in ("train", "val"))
    older = before | {"digest": "0" * 64, "group_names": ["piece-1", "gone"]}
    bare = {"source": "written by hand"}
    begun = update_card(plant.model("small"), trained_on=[before, older, bare])

    assert learned_from([before], None) == [before]
    assert learned_from([before], begun) == [before, older | {"group_names": ["gone"]}, bare]
    assert learned_from([now], begun)[:2] == [now, before]
