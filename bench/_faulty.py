"""A scan that is hit by faults: what `faults.py` and tests/test_faults.py start as a process of its own.

    python bench/_faulty.py HOME ROLL --workers 2

$FAULTS is JSON. `witness`: a file with a line for each band begun and each receipt written. `p`, `seed`: a
band's process is killed with that probability, before its work or between shard and receipt, as decided by
band and attempt, so that a run can be repeated. `poison`: the first line of a band that always kills.
`between`: that of a band killed once between shard and receipt. `hang`: that of a band whose process is
stopped once. The product knows nothing of this: its functions are wrapped here, also in Dask workers, which
import this file as their main module.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
from functools import wraps
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.scan import Receipt
from rollsight.jobs import workers

BAND_LINES = CORE_LINES = 256


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(witness: Path, what: str, y0: int) -> int:
    """Note it in the witness, and say how often it stands there: O_APPEND, so no process loses a line."""
    with witness.open("a") as file:
        file.write(f"{what} {y0}\n")
    return witness.read_text().split("\n").count(f"{what} {y0}")


def arm(faults: dict[str, Any]) -> None:
    """Wrap what a worker does; once per process."""
    if getattr(workers.scan_band, "is_faulty", False):
        return
    witness, at_work = Path(faults["witness"]), threading.local()
    scan_band, write = workers.scan_band, Receipt.write

    @wraps(scan_band)
    def faulty_band(plan: Any, roll: Any, engine: Any, y0: int, *rest: Any) -> None:
        tries = attempt(witness, "begun", y0)
        draw = random.Random(f"{faults.get('seed', 0)}-{y0}-{tries}")
        hit = draw.random() < faults.get("p", 0)
        early = hit and draw.random() < 0.5
        at_work.is_hit = (hit and not early) or (y0 == faults.get("between") and tries == 1)
        if early or y0 == faults.get("poison"):
            die()
        if y0 == faults.get("hang") and tries == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        scan_band(plan, roll, engine, y0, *rest)

    @wraps(write)
    def faulty_write(receipt: Receipt, folder: Path) -> None:
        if at_work.is_hit:
            die()
        write(receipt, folder)
        attempt(witness, "written", receipt.y0)

    faulty_band.is_faulty = True  # type: ignore[attr-defined]
    workers.scan_band, Receipt.write = faulty_band, faulty_write  # type: ignore[method-assign]


if "FAULTS" in os.environ:
    arm(json.loads(os.environ["FAULTS"]))


def main() -> int:
    from rollsight.jobs.executors import open_executor
    from rollsight.jobs.scan_job import scan_roll

    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("roll")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--patience", type=float)
    told = parser.parse_args()
    plant = Plant(told.home)
    try:
        with open_executor(workers=told.workers, threads=told.threads) as executor:
            executor.patience_s = told.patience or executor.patience_s
            run = scan_roll(
                plant,
                plant.roll(told.roll),
                plant.model("default"),
                executor,
                device="cpu",
                band_lines=BAND_LINES,
                core_lines=CORE_LINES,
            )
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    print(json.dumps({"folder": str(run.folder), "run_id": run.summary["run_id"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
