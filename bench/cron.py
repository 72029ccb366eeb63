"""Claim: the line that `inspect jobs export cron` writes runs under a real cron, and does the work.

A plant in a folder whose name has a blank and a per cent sign, with one small simulated roll and a job that
is due every minute. The line is installed in the crontab of this user, which must be empty, a real cron
(Debian's) is started in the foreground, and within four minutes the roll must be inspected by the ledger and
the morning page be there. As root.

    python bench/cron.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import write_result
from rollsight.inspect.plant import Plant
from rollsight.jobs.hand_over import HandOver, hand_over, this_command
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.ledger.schema import Run, Slot
from rollsight.jobs.schedule import read_line
from rollsight.synth.strip import SimulatedStrip, simulate_roll
from sqlalchemy import select

WITHIN_S = 240.0
SEED = 7


def main() -> None:
    if shutil.which("cron") is None or os.geteuid() != 0:
        print("left out: needed is cron (apt-get install cron), as root")
        return
    if subprocess.run(["crontab", "-l"], capture_output=True, check=False).stdout.strip():  # noqa: S607
        print("left out: this user has a crontab, which is left as it is")
        return
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "plant 100%"
        plant = Plant(home)
        simulate_roll(plant.roll_path("coil-1"), SimulatedStrip(1.0, SEED, width_px=320, blackouts=()))
        (home / "line.yaml").write_text("jobs:\n  - {name: minutely, cron: '* * * * *'}\n")
        work = HandOver(read_line(plant), home, this_command(), every_min=1)
        [text] = hand_over("cron", work).values()
        # cron begins with an empty environment: what an uninstalled checkout needs is said in the table.
        path = f"PYTHONPATH={os.environ['PYTHONPATH']}\n" if os.environ.get("PYTHONPATH") else ""
        subprocess.run(["crontab", "-"], input=path + text, text=True, check=True)  # noqa: S607
        begun = time.monotonic()
        cron = subprocess.Popen(["cron", "-f"])  # noqa: S607
        try:
            state, slots = watched(plant, begun)
        finally:
            cron.send_signal(signal.SIGTERM)
            cron.wait(10)
            subprocess.run(["crontab", "-r"], check=True)  # noqa: S607
        seconds = round(time.monotonic() - begun, 1)
        page = (home / "runs" / "index.html").is_file()
    figures = {"roll": state, "slots_done": slots, "page": page, "after_s": seconds}
    print(json.dumps(figures))
    if state != "done" or not page:
        sys.exit("the roll was not inspected in time")
    write_result("cron", figures, SEED)


def watched(plant: Plant, begun: float) -> tuple[str | None, int]:
    """The state of the roll once it is inspected, or when time is over; and how many slots are done."""
    while True:
        time.sleep(2)
        ledger = open_ledger(None, plant)
        with ledger.read() as session:
            state = session.scalar(select(Run.state))
            slots = session.scalars(select(Slot.state)).all()
        ledger.close()
        page = (plant.home / "runs" / "index.html").is_file()
        if (state == "done" and page) or time.monotonic() - begun > WITHIN_S:
            return state, sum(slot == "done" for slot in slots)


if __name__ == "__main__":
    main()
