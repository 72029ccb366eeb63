"""Retraining: trained on from the present model, held against the gates, promoted by nobody."""

import json
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import describe, open_labels
from rollsight.inspect.models import DEFAULT, open_model, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.promotion import GATES_FILE, judge, promote
from rollsight.inspect.recipe import Recipe
from rollsight.jobs.cli import main
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
    (plant.home / GATES_FILE).write_text("gates: [{data: labels, at_most: {fa_per_mpx: 999999}}]")
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
    assert report["gates"][1]["gate"] == "fa_per_mpx <= 999999"
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


@pytest.fixture
def run(plant, monkeypatch, capsys):
    """`inspect jobs retrain` from `small` with the labels, one step: its exit code and output."""

    def run(*words: str) -> tuple[int, str]:
        told = ["--data", str(plant.home / "labels"), "--from", "small", "--home", str(plant.home)]
        command = ["inspect", "jobs", "retrain", *told, "--steps", "1", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*command, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_retrained_model_that_was_promoted_is_neither_fitted_nor_judged_again(plant, run):
    """The same command every night ends well, and what decides the plant's default stays as it was."""
    name = json.loads(run("--json")[1])["model"]
    update_card(plant.model(name), calibrated_on={})
    promote(plant, *judge(plant, name), by="qe", at=AT)
    card = plant.model("default").card

    code, out = run()
    assert code == 0 and "it is the plant's default already" in out
    code, out = run("--json")
    told = json.loads(out)
    assert (code, told["model"], told["is_new"]) == (0, name, False)
    assert (told["is_default"], told["gates"]) == (True, None)
    report = json.loads(Path(told["report"]).read_text())
    assert (report["is_default"], report["gates"], report["promoted"]) == (True, None, False)
    assert plant.model("default").card == card


def test_labels_without_a_class_that_the_model_knows_are_refused_before_a_training(plant):
    """Data that lists the others as well is enough, in whatever order."""
    data, others = plant.home / "labels", plant.home / "others"
    shutil.copytree(data, others)
    (others / "classes.json").write_text('["dent", "scratch"]')
    before = sorted(plant.models.iterdir())

    with pytest.raises(UserError, match=r"labels dent, scratch; model small knows pit as well") as told:
        retrain(plant, [others], RECIPE, at=AT, start="small")
    assert told.value.exit_code == USAGE
    assert sorted(plant.models.iterdir()) == before

    both = retrain(plant, [others, data], replace(RECIPE, batch=2), at=AT, start="small")
    assert plant.model(both.name).card.classes == ("dent", "scratch", "pit")


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
