"""`inspect evaluate`, `compare` and `calibrate` as a user calls them, on six small images."""

import json
import re
import shutil
import sys

import pytest
from PIL import Image
from rollsight.inspect.models import SHIPPED, decides, open_model, update_card
from rollsight.inspect.promoted import Step, add_step
from rollsight.jobs.cli import main


@pytest.fixture
def plant(small_model, tmp_path):
    """A plant with the untrained model twice, the second one with low thresholds."""
    models = tmp_path / "plant" / "models"
    for name in ("one", "two"):
        shutil.copytree(small_model.folder, models / name)
    two = open_model("two", models)
    update_card(two, name="two", thresholds={"pit": 0.2, "scratch": 0.2}, metrics=[])
    return tmp_path / "plant"


@pytest.fixture
def data(labelled_folder):
    """All images in split val."""
    manifest = labelled_folder / "manifest.csv"
    manifest.write_text(re.sub("train|test", "val", manifest.read_text()))
    return labelled_folder


@pytest.fixture
def inspect(plant, monkeypatch, capsys):
    """Run `inspect ARGUMENTS --home PLANT`: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect", *map(str, arguments), "--home", str(plant)])
        with pytest.raises(SystemExit) as done:
            main()
        told = capsys.readouterr()
        return done.value.code, told.out, told.err

    return run


def test_evaluate_prints_its_figures_and_writes_a_page_among_the_runs(inspect, plant, data):
    code, out, _ = inspect("evaluate", "one", "--data", data, "--split", "val", "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["n_images"] == 6
    assert {"froc", "precision_recall", "aupro", "calibration"} <= figures.keys()
    page = plant / "runs" / "evaluations" / "small-labelled-val.html"
    assert figures["page"] == str(page)
    assert page.read_text().startswith("<!doctype html>")


def test_the_page_goes_where_it_is_said_and_a_person_reads_the_figures(inspect, data, tmp_path):
    code, out, _ = inspect("evaluate", "one", "--data", data, "--split", "val", "--page", tmp_path / "p.html")
    assert code == 0
    assert (tmp_path / "p.html").is_file()
    assert "boundary F1 at 2 px" in out and "area under PRO" in out


def test_evaluate_of_what_nobody_labelled_tells_no_rate_of_false_alarms(inspect, data):
    """Every px of the split is 255: a dash for each figure that has nothing to stand on."""
    for mask in data.glob("*_mask.png"):
        Image.new("L", (80, 72), 255).save(mask)
    code, out, err = inspect("evaluate", "one", "--data", data, "--split", "val")

    assert (code, err) == (0, "")
    assert "false alarms - per Mpx; thresholds" in out


def test_compare_tells_differences_with_what_they_show(inspect, plant, data):
    """Of the same images twice, in other groups: twelve defects, none of them small."""
    manifest = data / "manifest.csv"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines, *(line.replace("piece", "again") for line in lines[1:])]))
    code, out, _ = inspect("compare", "one", "two", "--data", data, "--split", "val", "--json")
    told = json.loads(out)
    assert code == 0
    assert [row["name"] for row in told["models"]] == ["one", "two"]
    [difference] = told["differences"]
    assert difference["miou"] == {"value": 0.0, "low": 0.0, "high": 0.0, "says": "not shown"}
    assert difference["recall_tiny_small"]["value"] is None
    assert "is not shown: its interval holds 0" in told["words"][0]
    with Image.open(told["plot"]) as image:
        assert image.format == "PNG"
    assert plant in (plant / "runs" / "evaluations" / "x").parents


def test_compare_in_words_and_of_one_model_alone(inspect, data):
    code, out, _ = inspect("compare", "one", "two", "--data", data, "--split", "val")
    assert code == 0
    assert "two against one" in out and "plot: " in out
    code, _, err = inspect("compare", "one", "--data", data, "--split", "val")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "two or more" in err


def test_calibrate_keeps_thresholds_temperature_and_digest_in_the_model(inspect, plant, data):
    before = open_model("one", plant / "models")
    code, out, _ = inspect("calibrate", "one", "--data", data, "--json")
    told, after = json.loads(out), open_model("one", plant / "models")

    assert code == 0
    assert after.card.thresholds == told["thresholds"] != before.card.thresholds
    assert after.card.temperature == told["temperature"]
    assert after.card.calibrated_on["split"] == "val"
    assert len(after.card.calibrated_on["digest"]) == 64
    assert after.card.budget is None and "no budget" in after.card.thresholds_basis
    assert [(m["data"], m["split"]) for m in after.card.metrics] == [("labelled", "val")]
    assert after.hash == before.hash


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("default",), 2, "default"),
        (("fast",), 2, "belongs to the package"),
        ((SHIPPED["fast"],), 2, "belongs to the package"),
        (("one", "--split", "test"), 2, "test"),
        (("one", "--budget", "0"), 2, "--budget"),
        (("one", "--budget", "inf"), 2, "--budget inf: it must be a finite number above 0"),
        (("one", "--budget", "nan"), 2, "--budget nan: it must be a finite number above 0"),
        (("one", "--budget", "1"), 1, "cannot be shown on 0.0346 Mpx"),
        (("nope",), 1, "nope"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line_and_nothing_changes(
    inspect, plant, data, arguments, code, named
):
    before = (plant / "models" / "one" / "card.json").read_bytes()
    found, _, err = inspect("calibrate", *arguments, "--data", data)
    assert (found, len(err.splitlines())) == (code, 1)
    assert named in err
    assert (plant / "models" / "one" / "card.json").read_bytes() == before


@pytest.mark.parametrize("model", ["default", "fast", SHIPPED["fast"], SHIPPED["default"] / "."])
def test_no_figure_is_written_into_the_package(inspect, data, model):
    before = [(folder / "card.json").read_bytes() for folder in SHIPPED.values()]
    code, _, err = inspect("evaluate", model, "--data", data, "--split", "val", "--card")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "belongs to the package" in err
    assert [(folder / "card.json").read_bytes() for folder in SHIPPED.values()] == before


def test_a_promoted_default_is_the_plants_own_to_judge_and_to_fit(inspect, plant, data):
    """Fitted it is no longer what was promoted, which is said, with the way on."""
    one = open_model("one", plant / "models")
    add_step(
        plant / "models",
        Step(model="one", model_hash=one.hash, decides=decides(one.card), at="", by="qe", why="promoted"),
    )
    code, _, err = inspect("evaluate", "default", "--data", data, "--split", "val", "--card")
    assert (code, err) == (0, "")
    assert [m["split"] for m in open_model("default", plant / "models").card.metrics] == ["val"]

    code, _, err = inspect("calibrate", "default", "--data", data)
    assert code == 0
    assert "as `default` nothing opens it until `inspect models promote one`" in err
    assert "where a gate has no_worse that needs a default to compare with: `inspect models rollback`" in err
    assert open_model("one", plant / "models").card.calibrated_on["split"] == "val"

    asked = "at_most: {fa_per_mpx: 1000000}, no_worse: {fa_per_mpx: 1000000}"
    (plant / "gates.yaml").write_text(f"gates: [{{data: {data}, split: val, {asked}}}]")
    code, _, err = inspect("models", "promote", "one")
    assert code == 78 and "`inspect models rollback`" in err
    assert [inspect("models", *words)[0] for words in (("rollback",), ("promote", "one"))] == [0, 0]
    assert inspect("evaluate", "default", "--data", data, "--split", "val")[0] == 0
