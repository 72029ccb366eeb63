"""Jobs that train and make data by night: once per slot, whole or not at all, promoting nothing."""

import json
import random
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.labels import open_labels
from rollsight.inspect.models import DEFAULT, open_model, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.promotion import judge, promote
from rollsight.jobs.ledger.database import Ledger, open_ledger
from rollsight.jobs.ledger.schema import Alert, Event, Slot
from rollsight.jobs.schedule import Job, LineFile, read_line
from rollsight.jobs.sites import Site
from rollsight.jobs.ticker import begin_slot, run_slot, tick
from rollsight.synth.data_card import open_provenance
from rollsight.synth.fitting import fit_data, fit_generator
from sqlalchemy import select

START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
AFTER = datetime(2026, 11, 21, 3, 5, tzinfo=UTC)
MADE = "labels/synthetic/rare-2026-11-21T0300Z"
RARE = {
    "name": "rare",
    "kind": "synthetic",
    "cron": "0 3 * * *",
    "defect_class": "scratch",
    "labels": "clean",
}
LEARN = {"name": "learn", "kind": "retrain", "cron": "0 3 * * *", "data": "labelled", "model": "small"}


class Wall:
    """A clock that says what it is told."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def generators(few_scenes, small_fit, tmp_path_factory) -> Path:
    """A folder with a generator of scratches after a few steps."""
    folder = tmp_path_factory.mktemp("generators")
    fit_generator(fit_data(open_labels(few_scenes), "scratch"), folder / "scratch", small_fit)
    return folder


@pytest.fixture
def home(tmp_path, generators, few_scenes) -> Path:
    """A plant with that generator, and the steel it is used on."""
    home = tmp_path / "plant"
    shutil.copytree(generators, home / "generators")
    shutil.copytree(few_scenes, home / "clean")
    return home


def site_of(home: Path, clock: Wall, *jobs: dict[str, Any]) -> Site:
    plant = Plant(home)
    line = LineFile(jobs=jobs, disk_reserve_gb=0)  # type: ignore[arg-type]
    return Site(plant, open_ledger(None, plant), line, clock, random.Random(0))


def events(ledger: Ledger, kind: str) -> list[dict[str, Any]]:
    with ledger.read() as session:
        return [json.loads(told) for told in session.scalars(select(Event.detail).where(Event.kind == kind))]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_slot_makes_its_synthetic_data_once_and_the_next_one_makes_other_data(home):
    clock = Wall(START)
    site = site_of(home, clock, {**RARE, "n": 3, "seed": 5})
    tick(site)
    clock.now = AFTER
    [(job, _, code, line)] = tick(site).ran

    assert (job, code) == ("rare", 0) and MADE in line
    data = open_labels(home / MADE)
    assert len(data.samples) == 3 and data.classes == ("pit", "scratch")
    [told] = events(site.ledger, "data.made")
    night = json.loads((home / "runs/2026-11-21/night.json").read_text())
    assert told["data"] == MADE and told["samples"] == 3
    assert [(slot["job"], slot["state"], slot["made"]) for slot in night["slots"]] == [("rare", "done", told)]
    assert tick(site).ran == []

    clock.now = AFTER.replace(day=22)
    assert [code for _, _, code, _ in tick(site).ran] == [0]
    other = open_provenance(home / MADE.replace("-21T", "-22T"))
    assert {line["sha256"] for line in other}.isdisjoint(
        line["sha256"] for line in open_provenance(home / MADE)
    )
    site.ledger.close()


KILLED = """
import os, random, signal, sys
from datetime import datetime
from pathlib import Path
from rollsight.synth import compose
sys.path.insert(0, sys.argv[2])
from test_making import AFTER, RARE, Wall, site_of
from rollsight.jobs.ticker import begin_slot, run_slot
site = site_of(Path(sys.argv[1]), Wall(AFTER), {**RARE, "n": 3})
slot, _ = begin_slot(site, site.line.jobs[0], AFTER.replace(minute=0))
whole = compose.data_card
when = sys.argv[3]
if when == "half":
    compose.data_card = lambda *told: os.kill(os.getpid(), signal.SIGKILL)
else:
    from rollsight.jobs import making
    making.finish = lambda *told, **more: os.kill(os.getpid(), signal.SIGKILL)
run_slot(site, slot, site.line.jobs[0], None)
"""


@pytest.mark.parametrize("when", ["half", "whole"])
def test_a_slot_that_was_killed_makes_the_same_data_and_leaves_nothing_half_written(home, when):
    here = str(Path(__file__).parent)
    died = subprocess.run([sys.executable, "-c", KILLED, str(home), here, when], timeout=60)
    assert died.returncode == -signal.SIGKILL
    out, left = home / MADE, list((home / "labels/synthetic").glob(".*"))
    assert (out.exists(), len(left)) == (when == "whole", when == "half")
    before = bytes_of(out)

    site = site_of(home, Wall(AFTER), {**RARE, "n": 3})
    [(_, _, code, _)] = tick(site).ran
    assert code == 0 and [path.name for path in out.parent.iterdir()] == [out.name]
    assert len(events(site.ledger, "data.made")) == 1
    made = bytes_of(out)
    assert before in ({}, made)

    shutil.rmtree(out)
    with site.ledger.write() as session:
        slot = session.scalars(select(Slot)).one()
        slot.state = "due"
    tick(site)
    assert bytes_of(out) == made
    site.ledger.close()


def test_what_a_job_needs_and_is_not_there_is_told_at_once_and_not_tried_again(home):
    jobs = (
        {**RARE, "name": "none", "generator": "dent"},
        {**RARE, "name": "other", "defect_class": "pit", "generator": "scratch"},
        {**RARE, "name": "bare", "labels": "nowhere"},
        {**LEARN, "name": "unknown", "data": "clean", "model": "nobody"},
        {**LEARN, "name": "unlabelled", "data": "nowhere"},
        {**LEARN, "name": "narrow", "data": "clean", "model": "default", "steps": 1},
    )
    clock = Wall(START)
    site = site_of(home, clock, *jobs)
    tick(site)
    clock.now = AFTER
    told = {job: (code, line) for job, _, code, line in tick(site).ran}
    said = {
        "none": "no generator: make one with `inspect synth fit`",
        "other": "generator scratch makes scratch, not pit",
        "bare": "is not there: name labelled data",
        "unknown": "nobody",
        "unlabelled": "is not there: name labelled data",
        "narrow": "give --data for each of its classes",
    }
    for job, line in said.items():
        assert told[job][0] == CONFIG and line in told[job][1], told[job]
    with site.ledger.read() as session:
        assert set(session.scalars(select(Slot.state))) == {"failed"}
        assert len(session.scalars(select(Alert).where(Alert.kind == "dead")).all()) == len(jobs)
    night = json.loads((home / "runs/2026-11-21/night.json").read_text())
    assert {slot["state"] for slot in night["slots"]} == {"failed"}
    assert not (home / "labels").exists()
    site.ledger.close()


def test_a_retraining_by_night_is_asked_of_the_gates_and_promotes_nothing(
    tmp_path, small_model, labelled_folder
):
    home = tmp_path / "plant"
    plant = Plant(home)
    shutil.copytree(small_model.folder, plant.models / "small")
    update_card(open_model("small", plant.models), name="small")
    shutil.copytree(labelled_folder, home / "labelled")
    (home / "gates.yaml").write_text("gates: [{data: labelled, at_most: {fa_per_mpx: 999999}}]")
    site = site_of(home, Wall(AFTER), {**LEARN, "steps": 1, "threads": 1})
    [entry] = site.line.jobs
    slot, _ = begin_slot(site, entry, AFTER.replace(minute=0))
    assert slot is not None
    code, line = run_slot(site, slot, entry, None)

    assert code == 0 and "every gate is open" in line
    [made] = events(site.ledger, "model.retrained")
    assert plant.model(made["model"]).card.recipe["steps"] == 1
    assert (made["is_new"], made["promoted"]) == (True, False)
    assert json.loads((home / made["report"]).read_text())["promoted"] is False
    assert plant.model("default").folder == DEFAULT
    assert begin_slot(site, entry, AFTER.replace(minute=0)) == (None, "done")

    promote(plant, *judge(plant, made["model"]), by="qe", at=AFTER)
    slot, _ = begin_slot(site, entry, AFTER.replace(minute=1))
    assert slot is not None
    code, line = run_slot(site, slot, entry, None)
    assert code == 0 and "the default already" in line
    again = events(site.ledger, "model.retrained")[-1]
    assert (again["model"], again["is_default"], again["passed"]) == (made["model"], True, None)
    site.ledger.close()


MISTAKES = {
    "rolls: due": "jobs.0: rolls is a key of kind inspect, but this job is of kind retrain",
    "n: 3": "jobs.0: n is a key of kind synthetic, but this job is of kind retrain",
    "stepz: 3": "jobs.0.stepz: Extra inputs are not permitted",
    "steps: 0": "jobs.0.steps: Input should be greater than or equal to 1",
    "kind: repaint": "jobs.0: a job has keys, and its kind is one of inspect, retrain, synthetic",
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_key_of_another_kind_is_refused_in_one_line(tmp_path, key):
    kind = "" if key.startswith("kind") else "kind: retrain, "
    job = f"{{name: n, cron: '0 1 * * *', {kind}data: labels, {key}}}"
    (tmp_path / "line.yaml").write_text(f"jobs: [{job}]")
    with pytest.raises(UserError) as told:
        read_line(Plant(tmp_path))
    assert told.value.exit_code == CONFIG and MISTAKES[key] in str(told.value)
    assert "\n" not in str(told.value)


def test_an_entry_without_a_kind_inspects(tmp_path):
    (tmp_path / "line.yaml").write_text("jobs: [{name: n, cron: '0 1 * * *'}]")
    [entry] = read_line(Plant(tmp_path)).jobs
    assert isinstance(entry, Job) and entry.rolls == "due"
