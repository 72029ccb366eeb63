"""A drop folder with real strips: what is taken, when, what is refused; and rolls scanned as they grow."""

import json
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import CONFIG, LOCKED, UserError
from rollsight.inspect.models import Model, decides
from rollsight.inspect.plant import Plant
from rollsight.inspect.promoted import Step, add_step
from rollsight.inspect.roll_places import disk_errors
from rollsight.inspect.rolls import SHARD_LINES, RollWriter, Strip
from rollsight.jobs import watch
from rollsight.jobs.cluster import Threads
from rollsight.jobs.ledger import database
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.schema import Alert, Artifact, Event, Run, Slot
from rollsight.jobs.nightly import open_job
from rollsight.jobs.retention import retain
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.watch import FULL_S, INGESTED, Seen, Watched, look, look_on, take
from sqlalchemy import select

STRIP = {"mm_per_px_x": 1.0, "mm_per_line": 1.0, "side": "top"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    plant = Plant(tmp_path / "plant")
    ledger = open_ledger(None, plant)
    yield Site(plant, ledger, LineFile(disk_reserve_gb=0), draw=random.Random(0))
    ledger.close()


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    folder = tmp_path / "drop"
    folder.mkdir()
    return folder


def put_strip(folder: Path, number: int = 0, *, told: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(100, 140, (80, 128), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{number:03}.png")
    if told:
        (folder / "strip.json").write_text(json.dumps(STRIP))


def test_an_entry_is_taken_when_it_is_marked_or_has_stopped_growing(site: Site, drop: Path) -> None:
    watched, now = Watched(), [0.0]

    def seen() -> tuple[tuple[str, ...], tuple[str, ...]]:
        told = look(site, drop, watched, settle_s=30, monotonic=lambda: now[0])
        return told.ingested, told.waiting

    put_strip(drop / "R1")
    put_strip(drop / "R2")
    (drop / "R2" / ".done").touch()
    (drop / "R3").mkdir()
    assert seen() == (("R2",), ("R1", "R3"))
    now[0] = 29
    put_strip(drop / "R1", 1)
    assert seen() == ((), ("R1", "R3"))
    now[0] = 58
    assert seen() == ((), ("R1", "R3")), "it grew 29 s ago"
    now[0] = 60
    assert seen() == (("R1",), ("R3",)), "an empty folder is not begun yet"
    assert seen() == ((), ("R3",))
    assert site.plant.roll("R1").lines == 160
    assert sorted(path.name for path in drop.iterdir()) == ["R1", "R2", "R3"]


def test_a_raw_file_is_taken_with_its_sidecar(site: Site, drop: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64), dtype=np.uint8)
    (drop / "B1.bil").write_bytes(pixels.tobytes())
    assert look(site, drop, Watched(), settle_s=0).waiting == ()
    (drop / "B1.json").write_text(json.dumps({**STRIP, "lines": 40, "width_px": 64, "bits": 8}))
    assert look(site, drop, Watched()).waiting == ("B1.bil",)
    (drop / "B1.done").touch()
    assert look(site, drop, Watched()).ingested == ("B1",)
    assert np.array_equal(site.plant.roll("B1").read(0, 40)[0], pixels)


def test_a_bad_entry_is_refused_and_told_once_until_it_changes(site: Site, drop: Path) -> None:
    put_strip(drop / "R1", told=False)
    put_strip(drop / "a roll")
    for _ in range(2):
        watched = Watched()  # a new process
        first = look(site, drop, watched, settle_s=0)
        assert [name for name, _ in first.refused] == ["R1", "a roll"]
        assert "mm_per_px_x" in first.refused[0][1]
        assert "is not usable" in first.refused[1][1]
        assert look(site, drop, watched, settle_s=0).refused == ()
    with site.ledger.read() as session:
        assert session.scalars(select(Alert.kind)).all() == ["unreadable", "unreadable"]
    put_strip(drop / "R1")
    assert look(site, drop, watched, settle_s=0).ingested == ("R1",)


def subjects(site: Site) -> list[tuple[str, str]]:
    with site.ledger.read() as session:
        return [(row.kind, row.subject) for row in session.scalars(select(Alert).order_by(Alert.id))]


@pytest.mark.parametrize("modes", [(), ("bright", "dark")])
def test_what_comes_into_an_entry_after_it_was_ingested_is_told_once(
    site: Site, drop: Path, modes: tuple[str, ...]
) -> None:
    """A strip image later than --settle-s is not in the roll. Clearing up is not told, nor is a late mark."""
    watched, entry = Watched(), drop / "R1"
    folders = [entry / mode for mode in modes] or [entry]
    put_strip(entry, told=not modes)
    if modes:
        (entry / "000.png").unlink()
        (entry / "strip.json").write_text(json.dumps({**STRIP, "lighting": modes}))
    for folder in folders:
        put_strip(folder, told=False)
        put_strip(folder, 1, told=False)
    assert look(site, drop, watched, settle_s=0).ingested == ("R1",)
    (entry / ".done").touch()
    look(site, drop, watched, settle_s=0)
    assert subjects(site) == []
    for number in (2, 3):
        for folder in folders:
            put_strip(folder, number, told=False)
        for looks in (watched, watched, Watched()):
            seen = look(site, drop, looks, settle_s=0)
            assert (seen.ingested, seen.waiting) == ((), ())
    told = [("missing", "R1: its entry in the drop folder changed after it was ingested")]
    assert subjects(site) == told
    shutil.rmtree(site.plant.roll_path("R1"))
    assert look(site, drop, watched, settle_s=0).ingested == ("R1",)
    assert site.plant.roll("R1").lines == 320
    for folder in folders:
        (folder / "003.png").unlink()
    look(site, drop, watched, settle_s=0)
    assert subjects(site) == told


def test_what_changes_under_an_ingest_is_told(
    site: Site, drop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_slowly(*rest: Any) -> None:
        take(*rest)
        put_strip(drop / "R1", 1)

    put_strip(drop / "R1")
    monkeypatch.setattr(watch, "take", take_slowly)
    watched = Watched()
    assert look(site, drop, watched, settle_s=0).ingested == ("R1",)
    look(site, drop, watched, settle_s=0)
    assert [kind for kind, _ in subjects(site)] == ["missing"]


def test_an_entry_that_the_disk_has_no_room_for_waits_and_is_not_refused(
    site: Site, drop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full refuses as a full disk does; no entry is begun for a minute."""
    put_strip(drop / "R1")
    put_strip(drop / "R2")
    watched, begun, now = Watched(), list[str](), [0.0]

    def take_on_full_disk(site: Site, entry: Path, roll_id: str) -> None:
        begun.append(roll_id)
        with disk_errors(site.plant.roll_path(roll_id)), Path("/dev/full").open("wb", 0) as disk:
            disk.write(b"pixels")

    def seen() -> Seen:
        return look(site, drop, watched, settle_s=0, monotonic=lambda: now[0])

    with monkeypatch.context() as patch:
        patch.setattr(watch, "take", take_on_full_disk)
        assert [(told.refused, told.waiting) for told in (seen(), seen())] == [((), ("R1", "R2"))] * 2
    assert begun == ["R1"]
    assert subjects(site) == [("disk", "R1 in the drop folder has no room in the plant, and waits for it")]
    now[0] = FULL_S
    assert seen().ingested == ("R1", "R2")


def test_where_the_rolls_are_away_or_the_set_up_fails_a_watch_begins_no_night_after_night(
    site: Site, drop: Path, small_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    put_strip(drop / "R1")

    def seen(model: str = "default") -> Seen:
        return look_on(site, drop, watched, model=model, rules=None, settle_s=0)

    def refuse(*rest: Any) -> Any:
        raise UserError("code 1 here, 2 at the worker: install the same as the others have", CONFIG)

    with monkeypatch.context() as patch:
        patch.setattr(Threads, "facts", refuse)
        assert [seen().exit_code for _ in range(3)] == [CONFIG, 0, 0]
    assert [kind for kind, _ in subjects(site)] == ["dead"]
    (site.plant.home / "rolls").rename(site.plant.home / "away")
    (drop / "R1").rename(drop.parent / "R1")
    watched.stuck = None
    later = [seen() for _ in range(2)]
    assert [told.exit_code for told in later] == [LOCKED] * 2
    assert "check whether its disk is mounted" in later[0].told and later[1].told == ""
    with site.ledger.read() as session:
        assert session.scalars(select(Slot.state)).all() == ["failed"]
    site.plant.rolls.rmdir()
    (site.plant.home / "away").rename(site.plant.home / "rolls")
    assert seen().told.startswith("1 done")


def test_a_roll_that_retention_took_away_does_not_come_back_until_its_entry_changes(
    site: Site, drop: Path
) -> None:
    """Inspected, marked and deleted by the plant's rule; a `.done` that comes late is no change."""
    put_strip(drop / "R1")
    job = open_job(site, None, model="default", rules=None)
    assert look(site, drop, Watched(), settle_s=0, job=job).ingested == ("R1",)
    line = LineFile(disk_reserve_gb=0, retention={"raw_d": 1, "grace_d": 0, "raw_keep": []})
    retain(replace(site, line=line, clock=lambda: datetime.now(UTC) + timedelta(days=2)))
    assert site.plant.roll_ids() == []

    (drop / "R1" / ".done").touch()
    for _ in range(2):
        seen = look(site, drop, Watched(), settle_s=0)
        assert (seen.ingested, seen.waiting) == ((), ())
    put_strip(drop / "R1", 1)
    assert look(site, drop, Watched(), settle_s=0).ingested == ("R1",)
    assert site.plant.roll("R1").lines == 160


def test_rolls_that_an_older_version_or_a_person_ingested_do_not_come_back_either(
    site: Site, drop: Path
) -> None:
    now = datetime.now(UTC)
    for roll_id in ("R1", "R2", "R3"):
        put_strip(drop / roll_id)
    with site.ledger.write() as session:
        add_event(session, now + timedelta(seconds=1), INGESTED, roll_id="R1", detail="R1")
        gone = Artifact(path="rolls/R2.zarr", kind="raw", roll_id="R2", created_at=now)
        gone.deleted_at = now + timedelta(seconds=1)
        session.add(gone)
    assert look(site, drop, Watched(), settle_s=0).ingested == ("R3",)
    later = (now + timedelta(seconds=2)).timestamp()
    for roll_id in ("R1", "R2"):
        os.utime(drop / roll_id / "000.png", (later, later))
    assert look(site, drop, Watched(), settle_s=0).ingested == ("R1", "R2")


def test_a_name_that_is_no_utf_8_is_refused_and_told_in_print(site: Site, drop: Path) -> None:
    put_strip(Path(os.fsdecode(os.fsencode(drop) + b"/coil-\xff\xe9")))
    assert look(site, drop, Watched()).waiting == ("coil-\ufffd\ufffd",)
    [(name, told)] = look(site, drop, Watched(), settle_s=0).refused
    assert name == "coil-\ufffd\ufffd"
    assert told.encode()
    with site.ledger.read() as session:
        [alert] = session.scalars(select(Alert))
        assert alert.subject == "coil-\ufffd\ufffd in the drop folder cannot be ingested"
        assert alert.dedupe_key.startswith("drop:coil-\ufffd\ufffd:")


def test_what_is_ingested_is_inspected_at_once_and_once(site: Site, drop: Path) -> None:
    put_strip(drop / "R1")
    job, watched = open_job(site, None, model="default", rules=None), Watched()
    first = look(site, drop, watched, settle_s=0, job=job)
    assert (first.ingested, first.exit_code) == (("R1",), 0)
    assert first.told.startswith("1 done")
    assert look(site, drop, watched, settle_s=0, job=job).told == ""
    with site.ledger.read() as session:
        assert session.scalars(select(Run.state)).all() == ["done"]


def test_a_roll_of_the_plant_is_scanned_while_it_grows_and_ended_when_it_is_closed(
    site: Site, drop: Path
) -> None:
    rng = np.random.default_rng(0)
    job, watched = open_job(site, None, model="default", rules=None), Watched()
    strip = Strip("L1", "top", ("bright",), 1.0, 1.0)
    executor = Threads(1)
    writer = RollWriter(site.plant.roll_path("L1"), strip, 64, np.uint8, live=True)
    writer.append(rng.integers(100, 140, (1, SHARD_LINES, 64), dtype=np.uint8))
    first = look(site, drop, watched, job=job, live=executor)
    assert (first.growing, first.told) == (("L1",), "")
    [live] = (site.plant.home / "runs/L1").glob("*/live.parquet")
    assert list(live.parent.glob("bands/*.json"))
    writer.append(rng.integers(100, 140, (1, 100, 64), dtype=np.uint8))
    writer.close()
    second = look(site, drop, watched, job=job, live=executor)
    assert (second.growing, second.exit_code) == ((), 0)
    assert not live.exists() and (live.parent / "report.html").is_file()
    executor.close()


def test_a_drop_folder_that_is_not_there_is_refused(site: Site, drop: Path) -> None:
    with pytest.raises(UserError, match="name the folder that rolls are dropped into"):
        look(site, drop / "none", Watched())
    assert list(drop.iterdir()) == []


def test_a_drop_folder_that_is_away_for_a_moment_is_told_once_and_gone_on_with(
    site: Site, drop: Path
) -> None:
    watched = Watched()

    def seen() -> Seen:
        return look_on(site, drop, watched, model=None, rules=None, settle_s=0)

    away = drop.rename(drop.parent / "away")
    with pytest.raises(UserError, match="name the folder that rolls are dropped into"):
        seen()
    away.rename(drop)
    assert seen().faults == ()
    drop.rename(away)
    assert [len(seen().faults) for _ in range(3)] == [1, 0, 0]
    away.rename(drop)
    put_strip(drop / "R1")
    assert (seen().ingested, seen().faults) == (("R1",), ())


def test_a_watch_follows_a_promotion_and_the_way_back(site: Site, drop: Path, small_model: Model) -> None:
    """The roll that waited for the first model is inspected with it when it holds again."""
    watched = Watched()
    shutil.copytree(small_model.folder, site.plant.models / "small")
    small = site.plant.model("small")

    def promote(name: str | None, hash_: str = "", told: str = "") -> None:
        at = "2026-11-24T12:00:00+00:00"
        add_step(
            site.plant.models,
            Step(model=name, model_hash=hash_, decides=told, at=at, by="qe", why="promoted"),
        )

    def hashes() -> list[str]:
        look_on(site, drop, watched, model="default", rules=None)
        assert watched.job is not None
        with site.ledger.read() as session:
            done = session.scalars(select(Run.model_hash).where(Run.state == "done").order_by(Run.id))
            return list(done)

    put_strip(drop / "R1")
    (drop / "R1" / ".done").touch()
    first = hashes()
    opened = watched.job
    assert hashes() == first and watched.job is opened, "not opened again"
    promote("small", small.hash, decides(small.card))
    assert hashes() == [*first, small.hash]
    promote(None)
    assert hashes() == [*first, small.hash] and watched.job is not None
    assert watched.job.model.hash == first[0]


def test_rules_that_cannot_be_read_later_are_told_and_what_is_dropped_is_ingested(
    site: Site, drop: Path
) -> None:
    rules, watched = site.plant.home / "rules.yaml", Watched()

    def seen() -> Seen:
        return look_on(site, drop, watched, model="default", rules="rules.yaml", settle_s=0)

    with pytest.raises(UserError) as fault:
        seen()
    assert fault.value.exit_code == CONFIG
    rules.write_text("limits: []")
    seen()
    rules.unlink()
    put_strip(drop / "R1")
    told = seen()
    assert (told.ingested, told.told) == (("R1",), "")
    assert "name one that is there" in told.faults[0]
    rules.write_text("limits: []")
    assert seen().told.startswith("1 done")


def test_below_the_disk_reserve_a_watch_begins_no_night_and_tells_it_once(site: Site, drop: Path) -> None:
    full = replace(site, line=LineFile(disk_reserve_gb=1e9))
    job, watched = open_job(site, None, model="default", rules=None), Watched()
    put_strip(drop / "R1")
    first, *later = [look(full, drop, watched, settle_s=0, job=job) for _ in range(3)]
    assert (first.ingested, first.exit_code) == (("R1",), LOCKED)
    assert "under the reserve" in first.told
    assert [(seen.exit_code, seen.told) for seen in later] == [(LOCKED, "")] * 2
    with site.ledger.read() as session:
        assert session.scalars(select(Slot)).all() == []
        assert session.scalars(select(Alert.kind)).all() == ["disk"]
    assert look(site, drop, watched, settle_s=0, job=job).told.startswith("1 done")


def test_a_ledger_that_is_busy_as_a_roll_was_ingested_refuses_no_entry(
    tmp_path: Path, drop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    plant = Plant(tmp_path / "plant")
    ledger = open_ledger(None, plant)
    put_strip(drop / "R1")
    other = sqlite3.connect(ledger.where, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def let_go() -> None:
        while not (plant.roll_path("R1") / "zarr.json").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        other.rollback()

    thread = threading.Thread(target=let_go)
    thread.start()
    seen = look(Site(plant, ledger, LineFile()), drop, Watched(), settle_s=0)
    thread.join()
    assert (seen.ingested, seen.refused) == (("R1",), ())
    with ledger.read() as session:
        assert session.scalars(select(Event.kind)).all() == [INGESTED]
    other.close()
    ledger.close()


def test_an_entry_whose_disk_goes_away_as_it_is_ingested_is_not_refused(site: Site, drop: Path) -> None:
    put_strip(drop / "R1")
    watched, away = Watched(), drop.parent / "away"

    def clock() -> float:
        """Called between the look at an entry and its ingest."""
        if (drop / "R1").exists():
            (drop / "R1").rename(away)
        return 0.0

    seen = look(site, drop, watched, settle_s=0, monotonic=clock)
    assert (seen.refused, seen.waiting) == ((), ("R1",))
    away.rename(drop / "R1")
    assert look(site, drop, watched, settle_s=0).ingested == ("R1",)
