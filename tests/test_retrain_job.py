"""Retraining: trained on from the present model, held against the gates, promoted by nobody."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.models import DEFAULT, open_model, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.promotion import GATES_FILE
from rollsight.inspect.recipe import Recipe
from rollsight.jobs.retrain_job import retrain

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
