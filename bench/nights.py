"""Claim: a night killed at any of 200 moments is finished by the next; and what planning 1000 rolls takes.

    python bench/nights.py

Plant, model and rolls are those of month.py. Each kill is of a night by itself, over
three rolls, at a moment drawn evenly over its length; then one more night must end with every roll inspected
once, with the results of a night that was not disturbed, and ledger and receipts alike.
"""

import argparse
import json
import os
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from _killed import kill_nights
from _webhook import Outside
from month import SEED, SPRING, TEMPLATES, Month, apart, make_model, make_templates
from report import write_result
from rollsight.inspect.plant import Plant
from rollsight.jobs.due import find_due
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.nightly import open_job
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site

KILLS, PLANNED, ROLLS = 200, 1000, 3


def planning(folder: Path, templates: dict[str, Path], model: Path, count: int) -> dict[str, float]:
    """A night of so many rolls: seconds and memory until all is planned, and when nothing of it is new."""
    plant = Plant(folder)
    shutil.copytree(model, plant.models / "quick")
    month = Month(
        folder, f"sqlite:///{folder / 'ledger.db'}", Outside(SEED), None, random.Random(SEED), templates
    )
    for number in range(count):
        month.deliver(f"P{number:05}", SPRING)
    month.outside.close()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        site = Site(plant, open_ledger(None, plant), LineFile())
        job = open_job(site, None, model="quick", rules=None)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            due = find_due(site, job, None, "today")
            seconds.append(time.perf_counter() - begun)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        told = {"rolls": count, "first_s": round(seconds[0], 2), "again_s": round(seconds[1], 3)}
        os.write(
            write, json.dumps(told | {"rss_mb": round(grown * 1024 / 1e6, 1), "known": due.known}).encode()
        )
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        figures: dict[str, float] = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=KILLS, help="moments of a night at which it is killed")
    parser.add_argument("--planned", type=int, default=PLANNED, help="rolls of the night that is planned")
    said = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(lambda: make_model(folder / "model"))
        apart(lambda: make_templates(folder))
        templates = {name: folder / f"{name}.zarr" for name in TEMPLATES}
        model = folder / "model" / "quick"
        figures["planning"] = planning(folder / "planned", templates, model, said.planned)
        print(json.dumps(figures), flush=True)
        home, outside = folder / "killed", Outside(SEED)
        shutil.copytree(model, Plant(home).models / "quick")
        month = Month(home, "", outside, None, random.Random(SEED), templates)
        for number in range(ROLLS):
            month.deliver(f"K{number}", SPRING)
        outside.close()
        figures["killed"] = kill_nights(home, said.kills, SEED, "quick")
        print(json.dumps(figures), flush=True)
    write_result("nights", figures, seed=SEED)


if __name__ == "__main__":
    main()
