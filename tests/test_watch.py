"""A drop folder with real strips: what is taken, when, what is refused; and rolls scanned as they grow."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import SHARD_LINES, RollWriter, Strip
from rollsight.jobs.cluster import Threads
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.ledger.schema import Alert, Run
from rollsight.jobs.nightly import open_job
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.watch import Watched, look
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
