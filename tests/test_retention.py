"""Retention: in two phases, never what is needed; what stays can be read without what went."""

import json
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.masks import registered_masks
from rollsight.inspect.plant import Plant
from rollsight.inspect.roll_places import LocalPlace
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.jobs.afterwards import RETAIN_BEGUN, RETAINED, follow_up
from rollsight.jobs.ledger.schema import Artifact, Event, Hold, Run
from rollsight.jobs.retention import DELETED, _remove, _take_away, keep_of, retain
from rollsight.jobs.scan_job import lock, scan_roll
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from sqlalchemy import select

NOW = datetime(2026, 11, 24, 6, 30, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def scanned(tmp_path_factory, small_model) -> Path:
    """A plant with one small roll, really scanned; copied by the tests that change it."""
    home = tmp_path_factory.mktemp("plant")
    plant = Plant(home)
    image = np.random.default_rng(0).normal(128, 8, (1, 300, 320)).clip(0, 255).astype(np.uint8)
    strip = Strip("C1", "top", ("bright",), 0.8, 1.0)
    with RollWriter(plant.roll_path("C1"), strip, 320, np.uint8) as writer:
        writer.append(image)
    scan_roll(plant, plant.roll("C1"), small_model, threads=1)
    return home


@pytest.fixture
def site(ledger, scanned, tmp_path) -> Site:
    """A copy of that plant, inspected at NOW by what the ledger says."""
    home = tmp_path / "plant"
    shutil.copytree(scanned, home)
    summary = json.loads(next(home.glob("runs/C1/*/summary.json")).read_text())
    line = {"retention": {"masks_d": 90, "raw_d": 365, "grace_d": 7}}
    with ledger.write() as session:
        facts = {"model": "m", "model_hash": "0", "state": "done", "created_at": NOW, "ended_at": NOW}
        facts |= {"run_id": summary["run_id"], "verdict": "UNGRADED"}
        session.add(Run(roll_id="C1", closed_at=NOW, **facts))
    for told in (*home.glob("runs/C1/*/summary.json"), home / "rolls" / "C1.zarr" / "zarr.json"):
        os.utime(told, (NOW.timestamp(), NOW.timestamp()))
    return Site(Plant(home), ledger, LineFile(**line), Clock(), random.Random(1))


def steps(site: Site, **options) -> list[tuple[str, str]]:
    return [(step.action, step.kind) for step in retain(site, **options)]


def mask_of(site: Site) -> Path:
    [run] = site.plant.home.glob("runs/C1/*")
    return site.plant.home / "rolls" / "C1.zarr" / "labels" / run.name


def test_a_mask_goes_in_two_phases_and_tables_and_page_stay(site):
    """Not before 90 days, then marked, then gone a week later; the roll lists it no more, and is not due."""
    mask, roll = mask_of(site), site.plant.home / "rolls" / "C1.zarr"
    [run] = site.plant.home.glob("runs/C1/*")
    before = (roll / "zarr.json").stat().st_mtime_ns

    assert steps(site) == []
    site.clock.now = NOW + timedelta(days=90)
    assert steps(site) == [("mark", "mask")]
    site.clock.now += timedelta(days=6)
    assert steps(site) == [] and mask.is_dir()
    assert registered_masks(LocalPlace(roll)) == [mask.name]
    site.clock.now += timedelta(days=1)
    assert steps(site) == [("delete", "mask")]

    assert not mask.exists()
    assert registered_masks(LocalPlace(roll)) == []
    assert (roll / "zarr.json").stat().st_mtime_ns == before  # a later date would make the roll due again
    assert site.plant.roll("C1").lines == 300
    assert pq.read_table(run / "defects.parquet").num_rows >= 0
    assert "<html" in (run / "report.html").read_text()
    with site.ledger.read() as session:
        rows = {row.kind: row for row in session.scalars(select(Artifact))}
        kinds = session.scalars(select(Event.kind).where(Event.kind.startswith("artifact")))
        assert list(kinds) == ["artifact.marked", "artifact.deleted"]
        assert rows["mask"].deleted_at == site.clock.now and rows["mask"].bytes > 0
        assert rows["components"].expires_at is None and rows["raw"].deleted_at is None


def test_a_dry_run_tells_and_touches_nothing(site):
    site.clock.now = NOW + timedelta(days=91)
    assert steps(site, dry_run=True) == [("mark", "mask")]
    with site.ledger.read() as session:
        assert session.scalars(select(Artifact)).all() == []
    retain(site)
    site.clock.now += timedelta(days=7)

    assert steps(site, dry_run=True) == [("delete", "mask")]
    assert mask_of(site).is_dir()


def test_nothing_of_a_roll_on_hold_or_with_an_open_run_goes(site):
    """Held before the mark it is not marked; held after it, it is unmarked, and the grace begins anew."""
    site.clock.now = NOW + timedelta(days=91)
    with site.ledger.write() as session:
        hold = Hold(roll_id="C1", reason="claim 4711", by="qe", held_at=NOW)
        session.add(hold)
    assert steps(site) == []
    with site.ledger.write() as session:
        session.scalars(select(Hold)).one().released_at = site.clock.now
    assert steps(site) == [("mark", "mask")]
    with site.ledger.write() as session:
        session.add(
            Run(roll_id="C1", closed_at=NOW, rescan=1, model="m", model_hash="0", state="due", created_at=NOW)
        )
    site.clock.now += timedelta(days=8)
    [step] = retain(site)
    assert (step.action, step.why) == ("unmark", "it has an open run")
    with site.ledger.write() as session:
        session.scalars(select(Run).where(Run.rescan == 1)).one().state = "done"
    assert steps(site) == [("mark", "mask")]
    assert mask_of(site).is_dir()


def test_nothing_goes_under_the_hands_of_a_scan(site):
    site.clock.now = NOW + timedelta(days=91)
    retain(site)
    site.clock.now += timedelta(days=8)
    [run] = site.plant.home.glob("runs/C1/*")
    with lock(run):
        assert steps(site) == [("wait", "mask")]

    assert steps(site) == [("delete", "mask")]


def test_images_go_by_rule_with_the_masks_in_them_but_not_those_of_a_held_verdict(site):
    site.clock.now = NOW + timedelta(days=366)
    with site.ledger.write() as session:
        session.scalars(select(Run)).one().verdict = "HOLD"
    assert steps(site) == [("mark", "mask")]
    with site.ledger.write() as session:
        session.scalars(select(Run)).one().verdict = "UNGRADED"
    assert steps(site) == [("mark", "raw")]
    site.clock.now += timedelta(days=8)

    assert sorted(steps(site)) == [("delete", "mask"), ("delete", "raw")]
    assert site.plant.roll_ids() == []
    assert steps(site) == []
    assert next(site.plant.home.glob("runs/C1/*/report.html")).is_file()


def test_a_roll_that_nobody_inspected_keeps_its_image(site):
    with site.ledger.write() as session:
        session.scalars(select(Run)).one().state = "failed"
    site.clock.now = NOW + timedelta(days=366)

    assert steps(site) == [("mark", "mask")]


def test_images_stay_that_a_later_run_held_back_during_the_grace(site):
    site.clock.now = NOW + timedelta(days=366)
    assert ("mark", "raw") in steps(site)
    with site.ledger.write() as session:
        facts = {"model": "m", "model_hash": "0", "state": "done", "created_at": NOW, "verdict": "BLOCKED"}
        session.add(Run(roll_id="C1", closed_at=NOW, rescan=1, ended_at=site.clock.now, **facts))
    site.clock.now += timedelta(days=8)
    before = [step for step in retain(site, dry_run=True) if step.kind == "raw"]
    told = [step for step in retain(site) if step.kind == "raw"]

    assert [(step.action, step.why) for step in told] == [("unmark", "its verdict is BLOCKED")]
    assert before == told
    assert site.plant.roll_ids() == ["C1"]
    assert steps(site) == []


def test_a_roll_made_again_is_not_inspected_by_what_was_said_of_the_old_one(site):
    """Before its mark and after it; what is there now was closed a day later, and its run died."""
    later = NOW + timedelta(days=1)
    description = site.plant.roll_path("C1") / "zarr.json"
    site.clock.now = NOW + timedelta(days=366)
    assert ("mark", "raw") in steps(site)
    os.utime(description, (later.timestamp(),) * 2)
    with site.ledger.write() as session:
        facts = {"model": "m", "model_hash": "0", "state": "dead", "created_at": later}
        session.add(Run(roll_id="C1", closed_at=later, **facts))
    for day in (367, 376, 385):
        site.clock.now = NOW + timedelta(days=day)
        assert [step for step in steps(site, dry_run=True) if step[1] == "raw"] == []
        assert [step for step in steps(site) if step[1] == "raw"] == []
    assert site.plant.roll_ids() == ["C1"]


def test_an_image_made_again_while_the_rest_is_taken_away_stays(site):
    """Closed again after the look at the plant and before its turn."""
    site.clock.now = NOW + timedelta(days=366)
    retain(site)
    site.clock.now += timedelta(days=8)
    with site.ledger.read() as session:
        marked = session.scalars(select(Artifact).where(Artifact.kind == "raw")).one()
        session.expunge(marked)
    os.utime(site.plant.roll_path("C1") / "zarr.json", (site.clock.now.timestamp(),) * 2)

    step = _take_away(site, marked, "marked", keep_of(site.line))
    assert (step.action, step.why) == ("unmark", "it was made again since")
    assert site.plant.roll_ids() == ["C1"]


def test_two_processes_may_remove_the_same_leftover(site):
    left = site.plant.rolls / f"{DELETED}C9.zarr-1"
    for number in range(2000):
        (left / str(number // 50)).mkdir(parents=True, exist_ok=True)
        (left / str(number // 50) / str(number)).touch()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(_remove, left) for _ in range(4)]:
            done.result()

    assert not left.exists()


def test_two_tickers_apply_the_rule_once_a_day(site):
    """Side by side at the same moment; the claim is in the ledger before anything is taken away."""
    together = threading.Barrier(4)

    def ticker() -> list[str]:
        together.wait()
        return follow_up(site)

    with ThreadPoolExecutor(4) as pool:
        told = [done.result() for done in [pool.submit(ticker) for _ in range(4)]]
    assert told == [[]] * 4
    with site.ledger.read() as session:
        kinds = session.scalars(select(Event.kind).where(Event.kind.startswith("retention")))
        assert list(kinds) == [RETAIN_BEGUN, RETAINED]


def test_below_the_reserve_a_marked_mask_goes_before_its_grace_ends_but_no_image(site):
    site = replace(site, line=LineFile(retention={"raw_d": 91, "reserve_gb": 1e9}))
    site.clock.now = NOW + timedelta(days=92)

    assert sorted(steps(site)) == [("delete", "mask"), ("mark", "mask"), ("mark", "raw")]
    assert not mask_of(site).exists()
    assert site.plant.roll_ids() == ["C1"]


def test_what_a_killed_process_moved_aside_is_removed_and_written_off(site):
    """Killed between the move and the ledger's commit: the next round ends it."""
    site.clock.now = NOW + timedelta(days=91)
    retain(site)
    mask = mask_of(site)
    aside = mask.with_name(f"{DELETED}{mask.name}-1")
    mask.rename(aside)

    assert steps(site) == []
    assert not aside.exists()
    with site.ledger.read() as session:
        assert session.scalars(select(Artifact.deleted_at).where(Artifact.kind == "mask")).one() is not None


def test_a_mask_that_was_made_again_is_kept_again(site):
    mask = mask_of(site)
    copy = site.plant.home / "copy"
    shutil.copytree(mask, copy)
    site.clock.now = NOW + timedelta(days=91)
    retain(site)
    site.clock.now += timedelta(days=8)
    retain(site)
    copy.rename(mask)
    told = next(site.plant.home.glob("runs/C1/*/summary.json"))
    os.utime(told, (site.clock.now.timestamp(),) * 2)

    assert steps(site) == []
    assert mask.is_dir()


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"masks_d": 0}, "line.yaml: retention.masks_d: Input should be greater than 0"),
        ({"mask_d": 3}, "line.yaml: retention.mask_d: Extra inputs are not permitted"),
        ({"grace_d": -1}, "retention.grace_d"),
    ],
)
def test_a_rule_that_cannot_be_is_one_line(rule, told):
    with pytest.raises(UserError, match=told) as fault:
        keep_of(LineFile(retention=rule))

    assert fault.value.exit_code == CONFIG
