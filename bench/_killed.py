"""`kill -9` at random moments of a night: what tests/test_nightly.py and nights.py share.

    python bench/_killed.py HOME --moments 20 --seed 4

A night is a process of its own, forked from one that has imported all that it needs, so that what is killed
is the night and not its start. No image is opened before the fork: tensorstore's threads do not survive it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import UserError
from rollsight.inspect.plant import Plant
from rollsight.jobs.doctor import examine
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.ledger.schema import Band, Event, Run
from rollsight.jobs.nightly import open_job, run_night
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.ticker import begin_by_hand
from sqlalchemy import func, select


def warm() -> None:
    """Read in what a night reads in late; nothing of it may start a thread."""
    import onnxruntime  # noqa: F401
    import pyarrow.compute
    import pyarrow.dataset  # noqa: F401
    from PIL import Image

    Image.init()


def one_night(home: Path, model: str, ledger: str | None = None) -> int:
    """A night over the plant, to its end; its exit code."""
    plant = Plant(home)
    site = Site(plant, open_ledger(ledger, plant), LineFile(disk_reserve_gb=0))
    try:
        job = open_job(site, None, model=model, rules=None)
        return run_night(site, job, begin_by_hand(site), early=True).exit_code
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    finally:
        site.ledger.close()


def forked(home: Path, model: str, kill_after_s: float | None = None, ledger: str | None = None) -> int:
    """A night in a forked process, killed after a while; its exit code, -9 where it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = one_night(home, model, ledger)
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)  # it is not yet waited for, so the id is still its own
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_nights(home: Path, moments: int, seed: int, model: str = "default") -> dict[str, Any]:
    """Nights over the rolls of the plant, each killed once and then finished by another.

    Moments are drawn evenly over the length of a night that is not disturbed. Counts what was lost (rolls not
    done), doubled (ends of a roll beyond its first) and what receipts and ledger differ in.
    """
    warm()
    draw = random.Random(seed)
    kept = home.with_name(f"{home.name}-kept")
    shutil.copytree(home, kept)
    rolls = len(Plant(kept).roll_ids())
    begun = time.monotonic()
    assert forked(home, model) == 0
    length = time.monotonic() - begun
    calm = results(home)
    total: Counter[str] = Counter()
    for _ in range(moments):
        shutil.rmtree(home)
        shutil.copytree(kept, home)
        killed = forked(home, model, draw.uniform(0, length)) == -signal.SIGKILL
        code = forked(home, model)
        plant = Plant(home)
        ledger = open_ledger(None, plant)
        site = Site(plant, ledger, LineFile())
        with ledger.read() as session:
            done = session.scalar(select(func.count()).select_from(Run).where(Run.state == "done")) or 0
            ends = Counter(session.scalars(select(Event.run_key).where(Event.kind == "run.done")))
            bands = session.scalar(select(func.count()).select_from(Band)) or 0
        total["nights"] += 1
        total["killed"] += killed
        total["lost"] += rolls - done + (code != 0)
        total["doubled"] += sum(count - 1 for count in ends.values())
        receipts = len(list((home / "runs").glob("*/*/bands/*.json")))
        total["differences"] += len(examine(site, mend=False)) + abs(receipts - bands)
        total["differences"] += results(home) != calm
        ledger.close()
    shutil.rmtree(kept)
    return {"seconds_of_a_night": round(length, 2), **{name: total[name] for name in _COUNTED}}


_COUNTED = ("nights", "killed", "lost", "doubled", "differences")


def results(home: Path) -> dict[str, Any]:
    """What was found on each roll: run, coverage and defects by class."""
    keys = ("run_id", "coverage", "defects", "by_class")
    found = {}
    for path in (home / "runs").glob("*/*/summary.json"):
        told = json.loads(path.read_bytes())
        found[told["roll_id"]] = [told[key] for key in keys]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="default")
    said = parser.parse_args()
    print(json.dumps(kill_nights(said.home, said.moments, said.seed, said.model)))
