"""Nights over small real rolls: what is due, what goes wrong, what a kill leaves; on both databases."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollsight.inspect.errors import CONFIG, LOCKED, PARTIAL, USAGE, UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.roll_state import last_written
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.jobs.cluster import Threads
from rollsight.jobs.commands.jobs import open_at_work
from rollsight.jobs.doctor import examine
from rollsight.jobs.due import find_due
from rollsight.jobs.ledger.claims import LEASE_S, LeaseLostError, claim, lease_of
from rollsight.jobs.ledger.database import Ledger, open_ledger
from rollsight.jobs.ledger.schema import Alert, Band, Event, Run, Slot, Stability
from rollsight.jobs.ledger.success import last_success
from rollsight.jobs.nightly import Night, open_job, run_night
from rollsight.jobs.retry import try_again
from rollsight.jobs.scan_job import scan_roll
from rollsight.jobs.schedule import BY_HAND, LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.stability import BANDS_FILE, SCRATCH
from rollsight.jobs.stopping import StoppedError
from rollsight.jobs.ticker import begin_by_hand, tick
from sqlalchemy import func, select, update

START = datetime(2026, 11, 24, 1, 30, tzinfo=UTC)
LINES, WIDTH = 200, 128


class Wall:
    """A clock that says what it is told, a moment later each time."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now


def make_roll(path: Path, seed: int = 0, *, dark: bool = False, line_id: str | None = None) -> None:
    """A small roll of bright noise with a black stripe across it; `dark`: half of it cannot be inspected."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(120, 130, (1, LINES, WIDTH), dtype=np.uint8)
    if dark:
        pixels[:, LINES // 2 :] = 0
    strip = Strip(path.stem, "top", ("bright",), 1.0, 1.0, line_id=line_id)
    with RollWriter(path, strip, WIDTH, np.uint8, overwrite=True) as writer:
        writer.append(pixels)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rolls to copy: making one takes longer than copying it."""
    folder = tmp_path_factory.mktemp("templates")
    make_roll(folder / "R.zarr")
    make_roll(folder / "D.zarr", dark=True)
    return folder


@pytest.fixture
def put(templates: Path, tmp_path: Path) -> Callable[..., Path]:
    """Put a roll of this id into the plant, closed so many hours before START."""

    def copy(roll_id: str, hours: float = 1, *, dark: bool = False, line_id: str | None = None) -> Path:
        path = Plant(tmp_path).roll_path(roll_id)
        shutil.copytree(templates / ("D.zarr" if dark else "R.zarr"), path)
        about = json.loads((path / "zarr.json").read_bytes())
        about["attributes"]["strip"] |= {"roll_id": roll_id, "line_id": line_id}
        (path / "zarr.json").write_text(json.dumps(about))
        at = (START - timedelta(hours=hours)).timestamp()
        os.utime(path / "zarr.json", (at, at))
        return path

    return copy


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    plant = Plant(tmp_path)
    ledger = open_ledger(None, plant)
    yield Site(plant, ledger, LineFile(disk_reserve_gb=0), Wall(), random.Random(0))
    ledger.close()


@pytest.fixture
def any_site(ledger: Ledger, tmp_path: Path) -> Site:
    """On SQLite and on PostgreSQL."""
    return Site(Plant(tmp_path), ledger, LineFile(disk_reserve_gb=0), Wall(), random.Random(0))


def night(site: Site, **options: Any) -> Night:
    asked = {key: options.pop(key) for key in ("selection", "priority", "rescan") if key in options}
    job = open_job(site, None, model="default", rules=None, **asked)
    return run_night(site, job, begin_by_hand(site), early=True, **options)


def states(site: Site) -> dict[str, str]:
    with site.ledger.read() as session:
        return {row.roll_id: row.state for row in session.scalars(select(Run).order_by(Run.id))}


def kinds(site: Site) -> list[tuple[str, str | None]]:
    with site.ledger.read() as session:
        return [(row.kind, row.roll_id) for row in session.scalars(select(Alert).order_by(Alert.id))]


def done_events(site: Site) -> Counter[str | None]:
    with site.ledger.read() as session:
        return Counter(session.scalars(select(Event.roll_id).where(Event.kind == "run.done")))


def test_every_closed_roll_is_inspected_once_and_one_bad_roll_stops_no_other(any_site: Site, put) -> None:
    site = any_site
    put("R1", 3)
    put("R2", 2, dark=True)
    (put("R3", 9) / "zarr.json").write_text("{}")
    RollWriter(site.plant.roll_path("R4"), Strip("R4", "top", ("b",), 1.0, 1.0), WIDTH, "uint8", live=True)

    first = night(site)

    assert first.exit_code == PARTIAL
    assert states(site) == {"R1": "done", "R2": "done", "R3": "retry"}
    assert first.told["counts"] == {"done": 2, "retry": 1}
    assert first.told["plant"]["growing"] == 1
    rolls = {roll["roll_id"]: roll for roll in first.told["rolls"]}
    assert rolls["R2"]["verdict"] == "HOLD"
    assert "needed a group of Zarr v3" in rolls["R3"]["error"]
    assert (site.plant.home / rolls["R1"]["page"]).is_file()
    assert json.loads(first.report.read_bytes()) == json.loads(json.dumps(first.told))
    assert sorted(kinds(site)) == [("hold", "R2"), ("unreadable", "R3")]
    with site.ledger.read() as session:
        row = session.scalars(select(Run).where(Run.roll_id == "R1")).one()
        assert (row.lines, row.length_m, row.verdict, row.exit_code) == (LINES, 0.2, "UNGRADED", 0)
        assert session.scalars(select(Band.roll_id)).all().count("R1") == 1

    night(site)
    assert done_events(site) == {"R1": 1, "R2": 1}
    assert sorted(kinds(site)) == [("hold", "R2"), ("unreadable", "R3")]


def test_rolls_come_by_priority_then_age(site: Site, put) -> None:
    for roll_id, hours in (("young", 1), ("old", 5), ("middle", 3)):
        put(roll_id, hours)
    seen = []

    def scan(plant: Plant, roll: Any, *rest: Any, **options: Any) -> Any:
        seen.append(roll.roll_id)
        return scan_roll(plant, roll, *rest, **options)

    job = open_job(site, None, model="default", rules=None, priority=3)
    from rollsight.jobs.due import Selection, find_due

    find_due(site, replace(job, selection=Selection(("middle",))), None, "today")
    night(site, scan=scan)
    assert seen == ["middle", "old", "young"]


def test_other_code_makes_no_old_roll_due_but_rescan_and_a_new_roll_of_the_same_name_do(
    site: Site, put
) -> None:
    put("R1")
    night(site)
    with site.ledger.write() as session:
        session.execute(update(Run).values(code="0.0.1+other", run_id="of-old-code"))
    night(site)
    assert done_events(site) == {"R1": 1}
    night(site, rescan=True)
    assert done_events(site) == {"R1": 2}
    shutil.rmtree(site.plant.roll_path("R1"))
    put("R1", 0.5)
    night(site)
    night(site)
    assert done_events(site) == {"R1": 3}
    with site.ledger.read() as session:
        assert [row.rescan for row in session.scalars(select(Run).order_by(Run.id))] == [0, 1, 0]


def test_other_rules_make_a_roll_due_once_more(site: Site, put) -> None:
    put("R1")
    night(site)
    (site.plant.home / "rules.yaml").write_text("limits: []")
    job = open_job(site, None, model="default", rules="rules.yaml")
    for _ in range(2):
        run_night(site, job, begin_by_hand(site))
    assert done_events(site) == {"R1": 2}


def test_a_selection_takes_rolls_by_pattern_and_line_and_tells_of_one_that_is_not_there(
    site: Site, put
) -> None:
    from rollsight.jobs.due import Selection

    put("A-1", line_id="CGL1")
    put("A-2", line_id="CGL2")
    put("B-1", line_id="CGL2")
    put("A-3")
    told = night(site, selection=Selection(("A-*",), "CGL2"))
    assert (told.exit_code, states(site)) == (0, {"A-2": "done"})
    told = night(site, selection=Selection(("B-1", "B-9")))
    assert (told.exit_code, states(site)) == (PARTIAL, {"A-2": "done", "B-1": "done"})
    assert told.told["plant"]["missing"] == ("B-9",)
    assert told.line == f"1 done; roll B-9 is not there: {told.report}"  # A-2 was another slot's
    assert kinds(site) == [("missing", "B-9")]


def test_a_new_model_makes_old_rolls_due_unless_the_job_takes_late_ones_only(site: Site, put) -> None:
    put("old", 200)
    put("new", 2)
    line = LineFile(jobs=({"name": "n", "cron": "0 1 * * *", "closed_within_h": 48},))  # type: ignore[arg-type]
    entry = line.job("n")
    told = run_night(site, open_job(site, entry), begin_by_hand(site))
    assert (told.exit_code, states(site)) == (0, {"new": "done"})
    night(site)
    assert states(site) == {"new": "done", "old": "done"}


def test_an_outage_takes_no_roll_from_a_job_that_takes_late_ones_only(site: Site, put) -> None:
    """Closed 3 h before a night that did not come; inspected when the machine is back three days later."""
    line = LineFile(jobs=({"name": "n", "cron": "30 1 * * *", "closed_within_h": 26},))  # type: ignore[arg-type]
    site = replace(site, line=line.model_copy(update={"disk_reserve_gb": 0}))
    entry, clock = line.job("n"), site.clock
    put("before", 31)
    put("R1", 3)
    clock.now = START - timedelta(hours=4)  # type: ignore[attr-defined]
    tick(site)
    clock.now = START + timedelta(days=3)  # type: ignore[attr-defined]
    tick(site)
    assert states(site) == {"R1": "done"}
    clock.now += timedelta(days=1)  # type: ignore[attr-defined]
    since = open_job(site, entry).selection.since
    assert since is not None
    assert since - START == pytest.approx(timedelta(days=3, hours=-26), abs=timedelta(minutes=1))


def test_a_roll_that_went_before_its_turn_is_gone_and_told(site: Site, put) -> None:
    path = put("R1")
    put("R2", 9)

    def scan(*rest: Any, **options: Any) -> Any:
        shutil.rmtree(path, ignore_errors=True)
        return scan_roll(*rest, **options)

    assert night(site, scan=scan).exit_code == PARTIAL
    assert states(site) == {"R1": "gone", "R2": "done"}
    assert kinds(site) == [("missing", "R1")]


def test_a_roll_that_was_gone_for_a_moment_is_inspected_when_it_is_back(any_site: Site, put) -> None:
    """Moved away and back, with its file times: it is due again, and no other roll twice."""
    site = any_site
    path = put("R1")
    put("R2", 9)

    def scan(*rest: Any, **options: Any) -> Any:
        path.rename(site.plant.home / "away")
        return scan_roll(*rest, **options)

    night(site, scan=scan)
    assert states(site) == {"R1": "gone", "R2": "done"}
    (site.plant.home / "away").rename(path)
    assert night(site).exit_code == 0
    assert states(site) == {"R1": "done", "R2": "done"}
    assert done_events(site) == {"R1": 1, "R2": 1}
    with site.ledger.read() as session:
        told = session.scalars(select(Event.detail).where(Event.kind == "run.again")).all()
    assert told == ["the roll is there again"]


def test_where_no_roll_is_there_at_all_none_is_gone_and_the_night_is_tried_again(site: Site, put) -> None:
    """The disk of the rolls is not mounted as the night begins: they are due when it is back."""
    put("R1", 2)
    put("R2", 1)
    find_due(site, open_job(site, None, model="default", rules=None), None, "today")
    (site.plant.home / "rolls").rename(site.plant.home / "away")
    for _ in range(2):
        with pytest.raises(UserError, match="check whether its disk is mounted") as fault:
            night(site)
        assert fault.value.exit_code == LOCKED
    assert states(site) == {"R1": "due", "R2": "due"}
    assert kinds(site) == [("missing", None)], "told once a day"
    site.plant.rolls.rmdir()
    (site.plant.home / "away").rename(site.plant.home / "rolls")
    assert night(site).exit_code == 0
    assert states(site) == {"R1": "done", "R2": "done"}


@pytest.mark.parametrize("where", ["plan", "scan"])
def test_a_fault_of_the_set_up_is_the_nights_and_gives_no_roll_up(
    site: Site, put, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of another version, or a model that was replaced under the night: so it is for every roll."""
    put("R1", 2)
    put("R2", 1)

    def refuse(*rest: Any, **options: Any) -> Any:
        raise UserError("code 1 here, 2 at the worker: install the same as the others have", CONFIG)

    with monkeypatch.context() as patch:
        if where == "plan":
            patch.setattr(Threads, "facts", refuse)
        job, slot = open_job(site, None, model="default", rules=None), begin_by_hand(site)
        with pytest.raises(UserError, match="install the same") as fault:
            run_night(site, job, slot, scan=refuse if where == "scan" else scan_roll)
    assert fault.value.exit_code == CONFIG
    assert states(site) == {"R1": "due", "R2": "due"}
    assert kinds(site) == []
    assert night(site).exit_code == 0


def test_a_roll_that_no_retry_helps_is_told(any_site: Site, put) -> None:
    site = any_site
    put("R1")

    def refuse(*rest: Any, **options: Any) -> Any:
        raise UserError("R1: that cannot be asked of it", USAGE)

    assert night(site, scan=refuse).exit_code == PARTIAL
    assert states(site) == {"R1": "failed"}
    assert kinds(site) == [("dead", "R1")]
    assert try_again(site, ["R1"]) == ["R1"]


def test_a_roll_that_is_made_again_before_its_turn_is_inspected_once(site: Site, put) -> None:
    path = put("R1", 1)
    put("R2", 9)

    def scan(*rest: Any, **options: Any) -> Any:
        os.utime(path / "zarr.json", (START.timestamp(), START.timestamp()))
        return scan_roll(*rest, **options)

    assert night(site, scan=scan).exit_code == 0
    with site.ledger.read() as session:
        found = session.execute(select(Run.roll_id, Run.state).order_by(Run.id)).all()
    assert sorted(map(tuple, found)) == [("R1", "replaced"), ("R2", "done")]
    night(site)
    assert done_events(site) == {"R1": 1, "R2": 1}


def test_a_roll_that_fails_is_given_up_after_five_nights_and_taken_up_again_by_hand(
    any_site: Site, put
) -> None:
    site = any_site
    path = put("R1")
    whole = (path / "zarr.json").read_bytes()
    at = last_written(path)
    assert at is not None
    (path / "zarr.json").write_text("{}")
    os.utime(path / "zarr.json", (at.timestamp(), at.timestamp()))
    for _ in range(6):
        night(site)
    assert states(site) == {"R1": "dead"}
    assert kinds(site) == [("unreadable", "R1"), ("dead", "R1")]
    (path / "zarr.json").write_bytes(whole)
    os.utime(path / "zarr.json", (at.timestamp(), at.timestamp()))
    assert try_again(site, ["R1"]) == ["R1"]
    night(site)
    assert states(site) == {"R1": "done"}


def test_after_its_deadline_a_night_begins_no_roll_and_the_next_one_does(site: Site, put) -> None:
    put("R1", 2)
    put("R2", 1)

    def scan(*rest: Any, **options: Any) -> Any:
        site.clock.now += timedelta(hours=9)  # type: ignore[attr-defined]
        return scan_roll(*rest, **options)

    until = START + timedelta(hours=8)
    told = night(site, until=until, scan=scan)
    assert (told.exit_code, states(site)) == (PARTIAL, {"R1": "done", "R2": "due"})
    assert kinds(site) == [("late", None)]
    with site.ledger.read() as session:
        subject = session.scalars(select(Alert.subject)).one()
        assert last_success(session) == {BY_HAND: session.scalars(select(Slot.ended_at)).one()}
    assert subject == "job by-hand of 2026-11-24 01:30 UTC: 1 rolls are left at its deadline"
    assert night(site).exit_code == 0
    assert states(site) == {"R1": "done", "R2": "done"}
    assert night(site, until=until).exit_code == 0, "none is left"


def test_a_night_that_begins_no_roll_before_its_deadline_is_no_success(site: Site, put) -> None:
    put("R1")
    assert night(site, until=START - timedelta(hours=1)).exit_code == PARTIAL
    with site.ledger.read() as session:
        assert session.scalars(select(Slot.state)).all() == ["partial"]
        assert last_success(session) == {}
    assert kinds(site) == [("late", None)]


def test_what_a_holder_that_lost_its_lease_found_is_not_written(any_site: Site, put) -> None:
    """Another night takes the roll over while it is scanned; the ledger has no end of it by the first."""
    site = any_site
    put("R1")
    other = replace(site, owner="another:1/1/0.00")
    taken = []

    def scan(*rest: Any, **options: Any) -> Any:
        done = scan_roll(*rest, **options)
        with site.ledger.write() as session:
            row = claim(session, Run, site.clock() + timedelta(seconds=LEASE_S * 2), other.owner)
            assert row is not None
            taken.append(lease_of(row))
        return done

    with pytest.raises(LeaseLostError):
        night(site, scan=scan)
    assert states(site) == {"R1": "running"}
    assert done_events(site) == {}


def test_the_reference_strip_makes_a_band_and_a_change_of_it_is_told(site: Site, put) -> None:
    put("R1")
    make_roll(site.plant.home / "reference.zarr")
    first = night(site)
    assert first.told["stability"]["is_baseline"] and first.told["stability"]["in_band"]
    night(site)
    make_roll(site.plant.home / "reference.zarr", dark=True)
    third = night(site)
    assert not third.told["stability"]["in_band"]
    assert "bright: mean gray 0.24" in third.told["stability"]["out"][-1]
    assert kinds(site) == [("stability", None)]
    with site.ledger.read() as session:
        rows = session.scalars(select(Stability).order_by(Stability.id)).all()
        found = [(row.is_baseline, row.in_band) for row in rows]
    assert found == [(True, True), (False, True), (False, False)]
    assert json.loads((third.report.parent / "stability.json").read_bytes())["in_band"] is False
    (site.plant.home / BANDS_FILE).write_text('{"x": [1]}')
    with pytest.raises(UserError, match="cannot be read: correct it"):
        night(site)


def test_a_night_needs_a_reference_strip_where_line_yaml_says_so(site: Site, put) -> None:
    line = LineFile(stability={"required": True})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no reference strip at .*reference\.zarr: make one with"):
        night(replace(site, line=line))
    assert kinds(site) == []


def test_a_check_that_fails_is_told_and_the_night_goes_on(site: Site, put) -> None:
    """Its scratch folder cannot be made: a file is in its place."""
    put("R1")
    make_roll(site.plant.home / "reference.zarr")
    (site.plant.home / SCRATCH).touch()
    told = night(site)
    assert (told.exit_code, states(site)) == (0, {"R1": "done"})
    [line] = told.told["stability"]["out"]
    assert line.startswith("the reference strip cannot be checked: FileExistsError: ")
    assert kinds(site) == [("stability", None)]


def test_below_the_disk_reserve_no_strip_is_checked(site: Site, put) -> None:
    make_roll(site.plant.home / "reference.zarr")
    full = replace(site, line=LineFile(disk_reserve_gb=1e9))
    assert night(full).exit_code == LOCKED
    assert not (site.plant.home / BANDS_FILE).exists()


def test_a_strip_that_line_yaml_speaks_of_and_is_not_there_is_told_once(site: Site, put) -> None:
    night(site)
    assert kinds(site) == []  # line.yaml says nothing of it
    checked = replace(site, line=LineFile(stability={"roll": "strip7"}))  # type: ignore[arg-type]
    for _ in range(2):
        assert night(checked).exit_code == 0
    assert kinds(site) == [("stability", None)]


def test_a_ledger_that_was_lost_is_made_anew_from_the_receipts(site: Site, put, tmp_path: Path) -> None:
    put("R1")
    put("R2", 2)
    night(site)
    fresh = replace(site, ledger=open_ledger(f"sqlite:///{tmp_path / 'fresh.db'}", site.plant))
    assert [finding.kind for finding in examine(fresh, mend=False)] == ["adopted", "adopted"]
    examine(fresh)
    assert examine(fresh) == []
    assert states(fresh) == {"R1": "done", "R2": "done"}
    night(fresh)
    assert done_events(fresh) == {}, "nothing was due"
    fresh.ledger.close()


def test_what_the_ledger_says_is_done_and_the_disk_does_not_hold_is_due_again(site: Site, put) -> None:
    put("R1")
    night(site)
    [folder] = (site.plant.home / "runs/R1").iterdir()
    shutil.rmtree(folder)
    [finding] = examine(site)
    assert (finding.kind, finding.mended) == ("vanished", True)
    night(site)
    assert states(site) == {"R1": "done"}
    assert examine(site) == []
    [receipt] = (site.plant.home / "runs/R1").glob("*/bands/*.json")
    text = receipt.read_bytes()
    receipt.write_text("{")
    assert [finding.kind for finding in examine(site)] == ["bands"]
    receipt.write_bytes(text)
    assert [finding.kind for finding in examine(site)] == ["bands"]
    assert examine(site) == []


def test_what_lies_beside_the_rolls_stops_no_night(site: Site, put) -> None:
    put("R1")
    (site.plant.rolls / "R1 (copy).zarr").mkdir()
    assert night(site).exit_code == 0
    assert states(site) == {"R1": "done"}


def test_a_run_that_waits_for_a_model_that_is_replaced_is_ended_and_the_roll_due_with_the_new_one(
    site: Site, put
) -> None:
    put("R1")
    job = open_job(site, None, model="default", rules=None)
    find_due(site, job, None, "2026-11-24")
    find_due(site, replace(job, rules_hash="other"), None, "2026-11-24")
    with site.ledger.read() as session:
        found = [(run.rules_hash, run.state) for run in session.scalars(select(Run).order_by(Run.id))]
    assert found == [("", "replaced"), ("other", "due")]


def test_a_run_that_was_replaced_is_due_again_when_its_model_and_rules_return(any_site: Site, put) -> None:
    """B was promoted and rolled back, or an edit of the rules undone: the roll waits for A as at first."""
    site = any_site
    put("R1")
    job = open_job(site, None, model="default", rules=None)
    find_due(site, replace(job, model_name="a"), None, "2026-11-24")
    with site.ledger.write() as session:
        session.execute(update(Run).values(state="retry", attempt=4, not_before=START, error="no disk"))
    find_due(site, replace(job, model_name="a", rules_hash="other"), None, "2026-11-24")
    assert states(site) == {"R1": "due"}
    assert find_due(site, job, None, "2026-11-24").made == 1
    assert find_due(site, job, None, "2026-11-24").made == 0
    find_due(site, replace(job, model_name="a", rules_hash="more"), None, "2026-11-24")
    with site.ledger.read() as session:
        runs = session.scalars(select(Run).order_by(Run.id)).all()
        found = [(run.rules_hash, run.model, run.state) for run in runs]
        again = (runs[0].attempt, runs[0].not_before, runs[0].ended_at, runs[0].error)
        events = session.scalars(select(Event.kind).where(Event.run_key == runs[0].id)).all()
    assert found == [("", "default", "due"), ("other", "a", "replaced"), ("more", "a", "due")]
    assert again == (0, None, None, None)
    assert events == ["run.replaced", "run.again"]
    night(site)
    assert done_events(site) == {"R1": 1}


def test_a_roll_whose_description_cannot_be_read_for_a_moment_is_tried_again(site: Site, put) -> None:
    """The system gives an error for it (here ELOOP, on a disk EIO) as its turn comes."""
    path = put("R1", 1)
    put("R2", 9)
    away = path.parent / "away"

    def scan(*rest: Any, **options: Any) -> Any:
        (path / "zarr.json").rename(away)
        (path / "zarr.json").symlink_to("zarr.json")
        return scan_roll(*rest, **options)

    assert night(site, scan=scan).exit_code == PARTIAL
    assert states(site) == {"R1": "retry", "R2": "done"}
    assert kinds(site) == [("unreadable", "R1")]
    away.replace(path / "zarr.json")
    assert night(site).exit_code == 0
    assert states(site) == {"R1": "done", "R2": "done"}


def test_doctor_takes_what_was_found_on_a_roll_for_none_of_the_roll_that_took_its_place(
    site: Site, put
) -> None:
    """The roll was made again, and its scan failed before it touched what the first one left."""
    put("R1")
    night(site)
    [page] = (site.plant.home / "runs/R1").glob("*/report.html")
    shutil.rmtree(site.plant.roll_path("R1"))
    later = page.stat().st_mtime + 60
    os.utime(put("R1") / "zarr.json", (later, later))

    def scan(*rest: Any, **options: Any) -> Any:
        raise UserError("the worker died")

    night(site, scan=scan)
    with site.ledger.read() as session:
        assert set(session.scalars(select(Run.run_id))) == {page.parent.name}
    assert [(finding.kind, finding.mended) for finding in examine(site)] == [("adopted", False)]
    assert states(site) == {"R1": "retry"}


def test_doctor_tells_of_a_roll_on_hold_that_the_night_had_no_time_to_tell_of(site: Site, put) -> None:
    path = put("D1", dark=True)
    job = open_job(site, None, model="default", rules=None)
    find_due(site, job, None, "2026-11-24")
    scan_roll(site.plant, site.plant.roll(path.stem), job.model)
    assert [finding.kind for finding in examine(site)] == ["adopted"]
    assert kinds(site) == [("hold", "D1")]


NIGHTLY = [sys.executable, "-m", "rollsight.jobs", "jobs", "nightly"]


def test_sigterm_ends_a_night_within_ten_seconds_and_what_is_left_is_due(put, tmp_path: Path) -> None:
    for number in range(30):
        put(f"R{number:02}", number)
    process = subprocess.Popen(
        [*NIGHTLY, "--home", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while len(list((tmp_path / "runs").glob("*/*/report.html"))) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - begun < 10
    assert process.returncode == LOCKED, errors
    assert errors.strip() == "inspect: told to stop: what is left is due, the next night or tick goes on"
    ledger = open_ledger(None, Plant(tmp_path))
    with ledger.read() as session:
        found = Counter(session.scalars(select(Run.state)))
        assert found["done"] >= 1 and found["due"] >= 1 and set(found) == {"done", "due"}
        assert set(session.scalars(select(Run.attempt))) == {0}
        assert session.scalars(select(Slot.state)).all() == ["due"]
    ledger.close()


def test_told_to_stop_right_after_a_claim_the_roll_goes_back(put, tmp_path: Path) -> None:
    """The claim is in the ledger, but whoever made it has not come to remember it."""
    put("R1")
    with pytest.raises(UserError, match="told to stop"), open_at_work(tmp_path, None) as site:
        find_due(site, open_job(site, None, model="default", rules=None), None, "2026-11-24")
        with site.ledger.write() as session:
            assert claim(session, Run, site.clock(), site.owner) is not None
        raise StoppedError
    ledger = open_ledger(None, Plant(tmp_path))
    with ledger.read() as session:
        assert session.execute(select(Run.state, Run.attempt)).all() == [("due", 0)]
    ledger.close()


def test_the_embedded_ticker_runs_what_is_due_and_stops_at_sigterm(put, tmp_path: Path) -> None:
    put("R1")
    (tmp_path / "line.yaml").write_text("jobs: [{name: nightly, cron: '* * * * *', catch_up: latest}]")
    ledger = open_ledger(None, Plant(tmp_path))
    with ledger.write() as session:  # it was seen two minutes ago, so a moment is due
        now = datetime.now(UTC)
        session.add(Event(at=now - timedelta(minutes=2), kind="job.seen", detail="nightly"))
    command = [sys.executable, "-m", "rollsight.jobs", "jobs", "run", "--every-s", "0.2"]
    process = subprocess.Popen([*command, "--home", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("running nightly; next at ")
    told = process.stdout.readline()
    assert told.startswith("nightly of ") and "1 done" in told
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == LOCKED
    with ledger.read() as session:
        assert session.scalars(select(Run.state)).all() == ["done"]
    ledger.close()


def test_killed_at_20_moments_of_a_night_the_next_one_finishes_the_work(put, tmp_path: Path) -> None:
    """bench/nights.py does so at 200 moments."""
    put("R1")
    bench = Path(__file__).parent.parent / "bench" / "_killed.py"
    command = [sys.executable, str(bench), str(tmp_path), "--moments", "20", "--seed", "4"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["nights"] == 20
    assert found["killed"] >= 10
    assert (found["lost"], found["doubled"], found["differences"]) == (0, 0, 0)


def test_planning_reads_no_description_that_the_ledger_knows(site: Site, put) -> None:
    """A roll whose description was damaged after it was inspected is not looked at again."""
    path = put("R1")
    night(site)
    at = (path / "zarr.json").stat().st_mtime_ns
    (path / "zarr.json").write_text("{")
    os.utime(path / "zarr.json", ns=(at, at))
    assert night(site).exit_code == 0
    with site.ledger.read() as session:
        assert session.scalar(select(func.count()).select_from(Run)) == 1
