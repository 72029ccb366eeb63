"""Promotion through gates: what passes becomes the default, what does not is told why; and the way back."""

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import CONFIG, FAILED, USAGE, UserError
from rollsight.inspect.models import DEFAULT, open_model, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.promoted import POINTER, read_pointer
from rollsight.inspect.promotion import GATES_FILE, Verdict, called, judge, promote, roll_back
from rollsight.jobs.cli import main

AT = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
PASSED = [Verdict("x test", "miou >= 0", "0.5", True)]


@pytest.fixture
def plant(tmp_path: Path, small_model) -> Plant:
    """Two models that differ in their thresholds, and test data of four groups with twelve pits."""
    plant = Plant(tmp_path / "plant")
    for name, threshold in (("one", 0.5), ("two", 0.9)):
        shutil.copytree(small_model.folder, plant.models / name)
        update_card(open_model(name, plant.models), name=name, thresholds={"pit": threshold, "scratch": 0.5})
    data = plant.home / "labels"
    data.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,mask,split,group"]
    for i in range(4):
        image, mask = rng.normal(128, 4, (64, 64)), np.zeros((64, 64), np.uint8)
        for y, x in ((6, 6), (6, 38), (38, 6)):
            image[y : y + 20, x : x + 20], mask[y : y + 20, x : x + 20] = 230, 1
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(data / f"{i}.png")
        Image.fromarray(mask).save(data / f"{i}_mask.png")
        lines.append(f"{i}.png,{i}_mask.png,test,piece-{i}")
    (data / "manifest.csv").write_text("\n".join(lines))
    (data / "classes.json").write_text('["pit", "scratch"]')
    return plant


def gates(plant: Plant, text: str) -> None:
    (plant.home / GATES_FILE).write_text(f"gates:\n  - {{data: labels, {text}}}\n")


def test_a_model_that_passes_every_gate_is_what_default_means(plant):
    gates(plant, "at_least: {miou: 0.0}, at_most: {fa_per_mpx: 1e9}")
    model, verdicts = judge(plant, "one")
    step = promote(plant, model, verdicts, by="qe", at=AT)

    assert [verdict.gate for verdict in verdicts] == [
        "groups that it was trained on: none",
        "miou >= 0",
        "fa_per_mpx <= 1e+09",
    ]
    assert all(verdict.passed for verdict in verdicts)
    assert (step.model, step.by, step.at) == ("one", "qe", "2026-11-24T12:00:00+00:00")
    assert plant.model("default").folder == plant.models / "one"
    [kept] = read_pointer(plant.models).history
    assert [gate["gate"] for gate in kept.gates] == [verdict.gate for verdict in verdicts]


def test_a_shut_gate_keeps_the_default_and_is_named(plant):
    gates(plant, "at_least: {miou: 0.99}")
    model, verdicts = judge(plant, "one")
    with pytest.raises(UserError, match=r"1 of 2 gates are shut \(miou >= 0.99 on labels test: 0\.") as fault:
        promote(plant, model, verdicts, by="qe", at=AT)

    assert fault.value.exit_code == FAILED
    assert plant.model("default").folder == DEFAULT
    assert not (plant.models / POINTER).exists()


def test_no_worse_is_held_against_the_present_default_on_the_same_images(plant):
    """The same net as its own rival differs by nothing in what no threshold decides: no margin stops it."""
    promote(plant, plant.model("one"), PASSED, by="qe", at=AT)
    gates(plant, "no_worse: {miou: 0.0}")
    _, [_, same] = judge(plant, "two")
    gates(plant, "no_worse: {recall_tiny_small: 0.5}")
    _, [_, few] = judge(plant, "two")

    assert (same.passed, same.found) == (True, "difference 0.000 (0.000 to 0.000)")
    assert (few.passed, few.found) == (False, "difference too few defects or groups to tell")


def test_fewer_than_ten_defects_are_a_shut_gate(plant):
    """Nine pits in all, none of them small: no figure of defects is told, on neither side of a gate."""
    manifest = plant.home / "labels" / "manifest.csv"
    manifest.write_text("\n".join(manifest.read_text().splitlines()[:-1]))
    promote(plant, plant.model("one"), PASSED, by="qe", at=AT)
    gates(plant, "at_least: {miou: 0.0, f1_h: 0.0}, at_most: {fa_per_mpx: 1e9}, no_worse: {miou: 1.0}")
    _, [_, miou, f1_h, alarms, compared] = judge(plant, "two")

    assert [verdict.passed for verdict in (miou, f1_h, alarms, compared)] == [False, False, True, False]
    assert miou.found == f1_h.found == "too few defects or groups to tell"


def test_an_area_too_small_to_show_so_few_false_alarms_is_a_shut_gate(plant):
    """Without any alarm the upper limit on 0.01 Mpx is 300 per Mpx."""
    update_card(plant.model("one"), thresholds={"pit": 0.999, "scratch": 0.999})
    gates(plant, "at_most: {fa_per_mpx: 30}")
    _, [_, few] = judge(plant, "one")

    assert not few.passed and few.found.startswith("0.000") and "Mpx are too few to show it" in few.found


def test_a_model_that_is_worse_by_more_than_the_margin_is_stopped(plant):
    """The default marks almost nothing, the candidate almost all: more false alarms, beyond any chance."""
    update_card(plant.model("one"), thresholds={"pit": 0.05, "scratch": 0.05})
    update_card(plant.model("two"), thresholds={"pit": 0.999, "scratch": 0.999})
    promote(plant, plant.model("two"), PASSED, by="qe", at=AT)
    gates(plant, "no_worse: {fa_per_mpx: 1}")
    _, [_, strict] = judge(plant, "one")
    gates(plant, "no_worse: {fa_per_mpx: 1e6}")
    _, [_, wide] = judge(plant, "one")

    assert (strict.passed, wide.passed) == (False, True)
    assert float(strict.found.split()[1]) > 100


def test_figures_on_what_a_model_was_trained_on_let_nothing_pass(plant):
    trained = {"source": "labels", "split": "train", "images": 1, "groups": 1, "group_names": ["piece-2"]}
    update_card(plant.model("one"), trained_on=[trained])
    gates(plant, "at_least: {miou: 0.0}")
    _, verdicts = judge(plant, "one")

    assert (verdicts[0].passed, verdicts[0].found) == (False, "1: piece-2")


def test_each_way_back_undoes_one_promotion_down_to_the_shipped_model(plant):
    for name in ("one", "two"):
        promote(plant, plant.model(name), PASSED, by="qe", at=AT)

    assert called(roll_back(plant, by="qe", at=AT)) == "one"
    assert plant.model("default").folder == plant.models / "one"
    promote(plant, plant.model("two"), PASSED, by="qe", at=AT)
    assert called(roll_back(plant, by="qe", at=AT)) == "one"
    assert called(roll_back(plant, by="qe", at=AT)) == "shipped"
    assert plant.model("default").folder == DEFAULT
    with pytest.raises(UserError, match="nothing to roll back to"):
        roll_back(plant, by="qe", at=AT)
    assert [step.why for step in read_pointer(plant.models).history] == [
        *("promoted", "promoted", "rolled back"),
        *("promoted", "rolled back", "rolled back"),
    ]


def test_a_promoted_model_that_was_changed_or_is_gone_is_not_used(plant):
    promote(plant, plant.model("one"), PASSED, by="qe", at=AT)
    update_card(plant.model("one"), thresholds={"pit": 0.1, "scratch": 0.5})
    with pytest.raises(UserError, match="was changed after it was promoted") as changed:
        plant.model("default")
    shutil.rmtree(plant.models / "one")
    with pytest.raises(UserError, match="'one' is not in") as gone:
        plant.model("default")

    assert changed.value.exit_code == gone.value.exit_code == CONFIG
    assert called(roll_back(plant, by="qe", at=AT)) == "shipped"
    assert plant.model("default").folder == DEFAULT


def test_where_the_model_before_is_gone_the_way_to_the_shipped_one_is_told(plant):
    for name in ("one", "two"):
        promote(plant, plant.model(name), PASSED, by="qe", at=AT)
    shutil.rmtree(plant.models / "one")

    with pytest.raises(
        UserError, match=r"no model 'one': .* take .*default.json away to return to the shipped"
    ):
        roll_back(plant, by="qe", at=AT)


def test_a_model_of_classes_that_the_default_lacks_is_promoted_where_no_gate_compares(plant):
    """The first model of a plant whose defects are not those of the shipped one."""
    (plant.home / "labels" / "classes.json").write_text('["dent", "burr"]')
    update_card(plant.model("one"), classes=("dent", "burr"), thresholds={"dent": 0.5, "burr": 0.5})
    gates(plant, "no_worse: {miou: 0.1}")
    with pytest.raises(UserError, match="they share no class"):
        judge(plant, "one")
    gates(plant, "at_most: {fa_per_mpx: 1e9}")
    promote(plant, *judge(plant, "one"), by="qe", at=AT)

    assert plant.model("default").folder == plant.models / "one"


def test_where_default_and_the_one_before_were_changed_a_model_is_promoted_anew(plant):
    for name in ("one", "two"):
        promote(plant, plant.model(name), PASSED, by="qe", at=AT)
    for name, fitted in (("one", 0.3), ("two", 0.4)):
        update_card(plant.model(name), thresholds={"pit": fitted, "scratch": fitted})
    gates(plant, "no_worse: {miou: 0.1}")
    with pytest.raises(UserError, match="'two' was changed after it was promoted"):
        judge(plant, "one")
    with pytest.raises(UserError, match=r"'one' was changed .* anew, or take .*default.json away"):
        roll_back(plant, by="qe", at=AT)
    gates(plant, "at_least: {miou: 0.0}")
    for name in ("two", "one"):
        promote(plant, *judge(plant, name), by="qe", at=AT)
        assert plant.model("default").folder == plant.models / name


def test_a_note_on_the_card_changes_nothing(plant):
    promote(plant, plant.model("one"), PASSED, by="qe", at=AT)
    update_card(plant.model("one"), notes=["seen in May"])

    assert plant.model("default").card.notes == ["seen in May"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is promoted only through gates"),
        ("gates: []", "gates"),
        ("gates: [{data: labels}]", "it asks for nothing"),
        ("gates: [{data: labels, at_least: {recal: 1}}]", "gates.0.at_least.recal"),
        ("gates: [{data: labels, split: train, at_least: {miou: 1}}]", "gates.0.split"),
        ("gates: [{data: labels, no_worse: {miou: -1}}]", "a margin is 0 or more"),
        ("gates: [{data: nowhere, at_least: {miou: 1}}]", "data nowhere"),
        ("gates: {", "not readable as YAML"),
    ],
)
def test_gates_that_cannot_be_asked_are_one_line(plant, text, told):
    if text is not None:
        (plant.home / GATES_FILE).write_text(text)
    with pytest.raises(UserError, match=told) as fault:
        judge(plant, "one")

    assert fault.value.exit_code == CONFIG


def test_what_is_no_model_of_the_plant_is_not_promoted(plant, small_model):
    gates(plant, "at_least: {miou: 0.0}")
    for name in ("default", str(small_model.folder)):
        with pytest.raises(UserError, match="only a model of the plant") as fault:
            judge(plant, name)
        assert fault.value.exit_code == USAGE
    promote(plant, plant.model("one"), PASSED, by="qe", at=AT)
    with pytest.raises(UserError, match="is the default already"):
        judge(plant, "one")


def test_a_damaged_list_of_promotions_is_told_not_guessed_at(plant):
    (plant.models / POINTER).write_text('{"history": [{"model": "../x"}]}')
    with pytest.raises(UserError, match=r"default.json: history.0") as fault:
        plant.model("default")
    assert fault.value.exit_code == CONFIG
    gates(plant, "at_least: {miou: 0.0}")
    with pytest.raises(UserError, match=r"default.json: history.0"):
        judge(plant, "one")


@pytest.fixture
def run(monkeypatch, capsys):
    """`inspect models` with these words: its exit code and output."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["inspect", "models", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_user_without_a_name_promotes_and_rolls_back(plant, run, monkeypatch):
    """As in a container that runs under a number which is in no passwd."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 3_000_000_017)
    gates(plant, "at_least: {miou: 0.0}")
    assert run("promote", "one", "--home", str(plant.home))[0] == 0
    code, out = run("rollback", "--home", str(plant.home), "--json")
    assert (code, json.loads(out)["by"]) == (0, "unknown")


def test_the_commands_promote_refuse_list_and_roll_back(plant, run):
    home = ("--home", str(plant.home))
    gates(plant, "at_least: {miou: 0.99}")
    code, out = run("promote", "one", *home, "--json")
    assert (code, json.loads(out)["promoted"]) == (1, False)
    code, out = run("promote", "one", *home)
    assert code == 1 and "SHUT" in out
    gates(plant, "at_least: {miou: 0.0}")
    assert run("promote", "one", *home, "--by", "qe")[0] == 0
    assert "default: one" in run(*home)[1]
    listed = [json.loads(line) for line in run(*home, "--json")[1].splitlines()]
    assert [(row["name"], row["card"]["name"]) for row in listed] == [
        ("default", "one"),
        ("fast", open_model("fast", plant.models).card.name),
        ("one", "one"),
        ("two", "two"),
    ]
    assert json.loads(run("rollback", *home, "--json")[1])["default"] == "shipped"
