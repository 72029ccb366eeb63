"""Claim: a month of nights loses no roll, inspects none twice, and tells each thing once, whatever breaks.

    python bench/month.py                          30 nights of 26 rolls on both databases
    python bench/month.py --nights 4 --rolls 5     a small one

Real nights over small rolls with a small net, each tick in a process of its own whose clock is an argument.
Half of the nights lie around the change to summer time, half around the change back; between them the machine
slept. Injected: `kill -9` at drawn moments, rolls that are damaged or gone and delivered anew a day later, a
disk below its reserve, a file system that refuses to write, two tickers at once, a clock set back, a database
that is started anew. In the end each roll, as it was delivered last, must have been inspected once, and each
thing that a person must know must have gone out to a webhook once by its key.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from datetime import time as clock
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from _postgres import Server, binaries
from _webhook import Outside
from report import write_rows
from rollsight.inspect.errors import UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.jobs.alerts import header_key, send_due
from rollsight.jobs.doctor import examine
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.ledger.schema import Alert, Event, Run
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.ticker import tick
from sqlalchemy import select

NIGHTS, ROLLS, SEED = 30, 26, 6
LINES, WIDTH = 200, 128
TEMPLATES = ("plain", "dark")
BERLIN = ZoneInfo("Europe/Berlin")
SPRING = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)  # both at the moment of the change
AUTUMN = datetime(2026, 10, 25, 1, 0, tzinfo=UTC)
TICKS_H = (0.0, 0.2, 0.7, 1.4, 2.5, 4.0)  # after half past one by the clock on the wall
FAULTS = (
    "killed",
    "damaged roll",
    "missing roll",
    "disk below the reserve",
    "write refused",
    "two tickers",
    "clock set back",
    "database restarted",
    "change of the clock",
    "slept",
)


@dataclass
class Month:
    """A plant, its ledger, and what was done to it."""

    home: Path
    ledger: str
    outside: Outside
    server: Server | None
    draw: random.Random
    templates: dict[str, Path]
    faults: Counter[str] = field(default_factory=Counter)
    expected: Counter[str] = field(default_factory=Counter)  # kinds of alerts
    delivered: dict[str, int] = field(default_factory=dict)  # roll -> when it was delivered last, in ns

    def line(self, **options: Any) -> LineFile:
        job = {"name": "nightly", "cron": "30 1 * * *", "model": "quick", "catch_up": "latest"}
        hook = {"name": "test", "url": self.outside.url, "secret_env": "MONTH_SECRET"}
        told: dict[str, Any] = {"zone": "Europe/Berlin", "jobs": [job], "alerts": {"webhooks": [hook]}}
        return LineFile(**{**told, "disk_reserve_gb": 0, **options})

    def deliver(self, roll_id: str, at: datetime, template: str = "plain") -> None:
        """Put a roll into the plant, closed at that time."""
        path = Plant(self.home).roll_path(roll_id)
        shutil.rmtree(path, ignore_errors=True)
        staging = path.with_name(f".{path.name}")
        shutil.copytree(self.templates[template], staging)
        about = json.loads((staging / "zarr.json").read_bytes())
        about["attributes"]["strip"]["roll_id"] = roll_id
        (staging / "zarr.json").write_text(json.dumps(about))
        ns = int(at.timestamp()) * 10**9 + self.draw.randrange(10**6) * 1000
        os.utime(staging / "zarr.json", ns=(ns, ns))
        staging.rename(path)
        self.delivered[roll_id] = ns

    def damage(self, roll_id: str) -> None:
        path = Plant(self.home).roll_path(roll_id) / "zarr.json"
        ns = path.stat().st_mtime_ns
        path.write_text("{")
        os.utime(path, ns=(ns, ns))

    def tick(self, at: datetime, **how: Any) -> None:
        """A tick in a process of its own; `how` is what happens to it."""
        self.wait(self.start(at, **how), how.get("kill_after_s"))

    def start(
        self,
        at: datetime,
        *,
        full: bool = False,
        refuse_bytes: int | None = None,
        kill_after_s: float | None = None,
    ) -> int:
        pid = os.fork()
        if pid:
            return pid
        begun = time.monotonic()
        code = 70
        try:
            with (self.home / "ticks.log").open("a") as log:
                os.dup2(log.fileno(), 2)
            if refuse_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (refuse_bytes, refuse_bytes))
            plant = Plant(self.home)
            line = self.line(disk_reserve_gb=1e9 if full else 0)
            site = Site(
                plant,
                open_ledger(self.ledger, plant),
                line,
                lambda: at + timedelta(seconds=time.monotonic() - begun),
                random.Random(at.timestamp()),
            )
            code = tick(site).exit_code
            send_due(site)
        except UserError as fault:
            print(at, fault, file=sys.stderr, flush=True)
            code = fault.exit_code
        finally:
            os._exit(code)

    def wait(self, pid: int, kill_after_s: float | None = None) -> None:
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.faults["killed"] += code == -signal.SIGKILL


def nights(count: int) -> Iterator[datetime]:
    """Half past one by Berlin's clock: half of the nights around each change."""
    first = (count + 1) // 2
    for change, span in ((SPRING, first), (AUTUMN, count - first)):
        for number in range(span):
            day = change.date() + timedelta(days=number - span // 2)
            yield datetime.combine(day, clock(1, 30), BERLIN).astimezone(UTC)


def one_month(month: Month, count: int, rolls: int) -> dict[str, Any]:
    """The nights with their faults; what was lost and doubled."""
    month.home.mkdir(parents=True, exist_ok=True)
    again: list[str] = []  # rolls to be delivered anew
    schedule = list(nights(count))
    month.tick(schedule[0] - timedelta(hours=6))
    for number, start in enumerate(schedule):
        day = start - timedelta(hours=2)
        for roll_id in again:
            month.deliver(roll_id, day)
        again = []
        names = [f"C{number:02}-{n:02}" for n in range(rolls)]
        for n, roll_id in enumerate(names):
            dark = n == 1
            month.expected["hold"] += dark
            month.deliver(roll_id, day - timedelta(minutes=n), "dark" if dark else "plain")
        fault = FAULTS[number % 8] if number < len(schedule) - 1 else "none"
        if number and start - schedule[number - 1] > timedelta(days=2):
            month.faults["slept"] += 1
            month.expected["late"] += 1
        if start.date() in (SPRING.date(), AUTUMN.date()):
            month.faults["change of the clock"] += 1
        if fault not in ("none", "killed"):
            month.faults[fault] += 1
        if fault == "damaged roll":
            month.damage(names[0])
            month.expected["unreadable"] += 1
            again.append(names[0])
        for nth, hours in enumerate(TICKS_H):
            at = start + timedelta(hours=hours, seconds=20)
            first = nth == 0
            if first and fault == "two tickers":
                pids = [month.start(at) for _ in range(2)]
                for pid in pids:
                    month.wait(pid)
            elif first and fault == "disk below the reserve":
                month.tick(at, full=True)
                month.expected["disk"] += 1
            elif first and fault == "write refused":
                month.tick(at, refuse_bytes=24_000)
            elif first and fault == "killed":
                month.tick(at, kill_after_s=month.draw.uniform(0.1, 0.2 * rolls))
            elif first and fault == "database restarted":
                restart(month, at)
            elif first and fault == "missing roll":
                # Planned, then gone before its turn: the tick is killed as soon as the ledger knows the roll.
                pid = month.start(at)
                gone = names[-1]
                wait_for_run(month, gone)
                month.wait(pid, 0)
                if state_of(month, gone) in (None, "done"):
                    month.faults[fault] -= 1  # the tick was faster, or never got there
                else:
                    shutil.rmtree(Plant(month.home).roll_path(gone))
                    month.expected["missing"] += 1
                    again.append(gone)
            elif nth == 2 and fault == "clock set back":
                month.tick(at - timedelta(hours=1.2))
            else:
                month.tick(at)
    end = schedule[-1] + timedelta(hours=12)
    for hours in range(0, 30, 3):
        month.tick(end + timedelta(hours=hours) if hours < 12 else end + timedelta(hours=11, minutes=hours))
    return verdict(month, count, rolls)


def restart(month: Month, at: datetime) -> None:
    """The database goes away in mid-night and comes back; SQLite's is held by another writer instead."""
    pid = month.start(at)
    time.sleep(1.0)
    if month.server is not None:
        month.server.stop()
        time.sleep(1.0)
        month.server.start()
    else:
        ledger = open_ledger(month.ledger, Plant(month.home))
        with ledger.write():
            time.sleep(2.0)
        ledger.close()
    month.wait(pid)


def wait_for_run(month: Month, roll_id: str) -> None:
    limit = time.monotonic() + 60
    while state_of(month, roll_id) is None and time.monotonic() < limit:
        time.sleep(0.02)


def state_of(month: Month, roll_id: str) -> str | None:
    ledger = open_ledger(month.ledger, Plant(month.home))
    with ledger.read() as session:
        state = session.scalar(select(Run.state).where(Run.roll_id == roll_id))
    ledger.close()
    return state


def verdict(month: Month, count: int, rolls: int) -> dict[str, Any]:
    """Every roll as it was delivered last, inspected once; every alert out once by its key."""
    plant = Plant(month.home)
    ledger = open_ledger(month.ledger, plant)
    site = Site(plant, ledger, month.line())
    with ledger.read() as session:
        runs = session.scalars(select(Run)).all()
        ends = Counter(session.scalars(select(Event.run_key).where(Event.kind == "run.done")))
        alerts = session.scalars(select(Alert)).all()
        session.expunge_all()
    done = Counter((run.roll_id, run.closed_at) for run in runs if run.state == "done")
    wanted = {
        (roll_id, datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ns // 1000))
        for roll_id, ns in month.delivered.items()
    }
    kinds = Counter(alert.kind for alert in alerts)
    kinds_dead = sum(run.state == "dead" for run in runs)
    expected = month.expected + Counter({"dead": kinds_dead})
    known = {header_key(alert.dedupe_key) for alert in alerts}
    out = month.outside.keys
    differences = examine(site, mend=False)
    ledger.close()
    if differences:
        print(differences, file=sys.stderr)
    return {
        "nights": count,
        "rolls": count * rolls,
        "delivered_anew": count and sum(run.state in ("dead", "gone", "replaced") for run in runs),
        "faults": {name: month.faults[name] for name in FAULTS},
        "lost": len(wanted - done.keys()),
        "doubled": sum(n - 1 for n in done.values()) + sum(n - 1 for n in ends.values()),
        "alerts": dict(kinds),
        "alerts_expected": dict(expected),
        "alerts_lost": sum((expected - kinds).values()) + len(known - out.keys()),
        "alerts_doubled": sum((kinds - expected).values()) + len(out.keys() - known),
        "deliveries": sum(out.values()),
        "ledger_and_receipts_differ": len(differences),
    }


def apart(work: Callable[[], object]) -> None:
    """Do it in a process of its own: threads of torch and zarr must not be there when a tick is forked."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def make_templates(folder: Path) -> None:
    """A roll of noise, and one of which half is dark."""
    rng = np.random.default_rng(SEED)
    for name in TEMPLATES:
        pixels = rng.integers(100, 140, (1, LINES, WIDTH), dtype=np.uint8)
        if name == "dark":
            pixels[:, LINES // 2 :] = 0
        strip = Strip(name, "top", ("bright",), 1.0, 1.0)
        with RollWriter(folder / f"{name}.zarr", strip, WIDTH, np.uint8) as writer:
            writer.append(pixels)


def make_model(folder: Path) -> None:
    """The small net, untrained: what it finds is of no interest here."""
    import torch
    from rollsight.inspect.models import save_model
    from rollsight.inspect.nets import NETS

    torch.manual_seed(SEED)
    card = {
        "name": "quick",
        "net": "fast",
        "classes": ("pit", "scratch"),
        "thresholds": {"pit": 0.9, "scratch": 0.9},
        "thresholds_basis": "none: the net is untrained",
    }
    save_model(folder / "quick", NETS["fast"](2).eval(), card)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nights", type=int, default=NIGHTS)
    parser.add_argument("--rolls", type=int, default=ROLLS, help="per night, at least 3")
    parser.add_argument("--backend", choices=("sqlite", "postgresql"), action="append")
    said = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["MONTH_SECRET"] = "whsec_" + "bW9udGgtb2YtbmlnaHRzLW1vbnRoLW9mLW5pZ2h0cw=="
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(lambda: make_model(folder / "model"))
        apart(lambda: make_templates(folder))
        templates = {name: folder / f"{name}.zarr" for name in TEMPLATES}
        for backend in said.backend or ("sqlite", "postgresql"):
            if backend == "postgresql" and binaries() is None:
                print("no PostgreSQL server is installed: left out", file=sys.stderr)
                continue
            home, outside = folder / backend, Outside(SEED)
            server = Server() if backend == "postgresql" else None
            try:
                url = f"sqlite:///{home / 'ledger.db'}" if server is None else server.database("month")
                shutil.copytree(folder / "model" / "quick", Plant(home).models / "quick")
                month = Month(home, url, outside, server, random.Random(SEED), templates)
                begun = time.monotonic()
                told = one_month(month, said.nights, said.rolls)
                took = round(time.monotonic() - begun, 1)
                figures.append({"backend": backend, **told, "took_s": took})
                print(json.dumps(figures[-1]), flush=True)
            finally:
                outside.close()
                if server is not None:
                    server.close()
    write_rows("month", figures, seed=SEED)


if __name__ == "__main__":
    main()
