"""The scan of the reference strip before a night, on a small real strip."""

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from rollsight.inspect.errors import UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import Roll, RollWriter, Strip, open_roll
from rollsight.jobs.cluster import Threads
from rollsight.jobs.due import Job
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.nightly import open_job
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.stability import LEFT_S, SCRATCH, measure


@pytest.fixture
def job(tmp_path: Path) -> Job:
    plant = Plant(tmp_path)
    ledger = open_ledger(None, plant)
    site = Site(plant, ledger, LineFile(), draw=random.Random(0))
    ledger.close()
    return open_job(site, None, model="default", rules=None)


@pytest.fixture
def strip(tmp_path: Path) -> Roll:
    """200 lines of bright noise, of a mean gray of 125 of 255."""
    path = tmp_path / "reference.zarr"
    pixels = np.random.default_rng(0).integers(120, 131, (1, 200, 128), dtype=np.uint8)
    with RollWriter(path, Strip("reference", "top", ("bright",), 1.0, 1.0), 128, np.uint8) as writer:
        writer.append(pixels)
    return open_roll(path)


@pytest.fixture
def threads():
    executor = Threads(1)
    yield executor
    executor.close()


def test_two_checks_at_once_do_not_take_each_others_scan_away(tmp_path, job, strip, threads):
    """The second begins and ends while the first is at work: the first one's folder stays where it is."""
    scratch = tmp_path / SCRATCH
    found, here = [], []

    def check() -> None:
        if not found:
            [own] = scratch.iterdir()
            (own / "mine").touch()
            found.append(measure(Plant(tmp_path), strip, job, threads))
            here.append((own / "mine").is_file())

    first = measure(Plant(tmp_path), strip, job, threads, check)
    assert here == [True]
    assert found == [first]
    assert first["gray"]["bright"] == pytest.approx(125 / 255, abs=0.002)


def test_a_check_leaves_nothing_behind_and_sweeps_what_a_killed_one_left(tmp_path, job, strip, threads):
    scratch = tmp_path / SCRATCH
    for name in ("killed", "at-work"):
        (scratch / name / "runs").mkdir(parents=True)
    long_ago = time.time() - LEFT_S - 60
    os.utime(scratch / "killed", (long_ago, long_ago))

    def refuse() -> None:
        raise UserError("told to stop in the midst of it")

    measure(Plant(tmp_path), strip, job, threads)
    with pytest.raises(UserError, match="in the midst"):
        measure(Plant(tmp_path), strip, job, threads, refuse)
    assert [path.name for path in scratch.iterdir()] == ["at-work"]
