"""Claim: two tickers run each of 1000 slots once, on SQLite and on PostgreSQL; and what a band costs.

    python bench/claims.py

Two processes claim and end slots as the ticker does, each in a transaction of its own, until none is left.
What a band costs is the time in which the receipts of a run of 500 bands are read and written down, over 500:
the median of five times.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from _postgres import Server, binaries
from report import write_rows
from rollsight.inspect.plant import Plant
from rollsight.jobs.ledger.bands import receipts_in, record_bands
from rollsight.jobs.ledger.claims import claim, finish, lease_of, this_process
from rollsight.jobs.ledger.database import Ledger, open_ledger
from rollsight.jobs.ledger.schema import Band, Event, Slot
from sqlalchemy import delete, select

SLOTS, TICKERS, BANDS = 1000, 2, 500
NOW = datetime(2026, 11, 24, 1, 30, tzinfo=UTC)


def ticker(url: str, start: Path) -> None:
    """Claim and end slots until none is left; prints those claimed, and the seconds of each claim."""
    ledger = open_ledger(url, Plant(start.parent))
    owner, taken, seconds = this_process(), [], []
    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.001)
    while True:
        begun = time.perf_counter()
        lease = ledger.keep(lambda session: _claim(session, owner))
        if lease is None:
            break
        seconds.append(time.perf_counter() - begun)
        taken.append(lease.id)
        ledger.keep(lambda session, lease=lease: finish(session, lease, NOW, "done"))
    print(json.dumps({"taken": taken, "seconds": seconds}))


def _claim(session: Any, owner: str) -> Any:
    row = claim(session, Slot, NOW, owner)
    return None if row is None else lease_of(row)


def race(url: str, folder: Path, slots: int) -> dict[str, Any]:
    """Two tickers over so many slots that are due."""
    ledger = open_ledger(url, Plant(folder))
    with ledger.write() as session:
        for number in range(slots):
            at = NOW - timedelta(minutes=number)
            session.add(Slot(job="nightly", scheduled_for=at, state="due", created_at=NOW))
    start = folder / "start"
    start.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--ticker", url, "--start", str(start)]
    tickers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(TICKERS)]
    for process in tickers:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    begun = time.perf_counter()
    start.touch()
    told = [json.loads(process.communicate()[0]) for process in tickers]
    seconds = time.perf_counter() - begun
    claims = Counter(key for part in told for key in part["taken"])
    waits = sorted(wait for part in told for wait in part["seconds"])
    with ledger.read() as session:
        ended = Counter(session.scalars(select(Event.slot_id).where(Event.kind == "slot.done")))
        left = len(session.scalars(select(Slot.id).where(Slot.state != "done")).all())
    ledger.close()
    return {
        "slots": slots,
        "tickers": TICKERS,
        "by_ticker": [len(part["taken"]) for part in told],
        "claimed_once": sum(count == 1 for count in claims.values()),
        "claimed_more": sum(count > 1 for count in claims.values()),
        "ended_more": sum(count > 1 for count in ended.values()),
        "left": left,
        "claims_per_s": round(slots / seconds, 1),
        "claim_ms_median": round(1e3 * waits[len(waits) // 2], 2),
        "claim_ms_99": round(1e3 * waits[int(len(waits) * 0.99)], 2),
    }


def cost_per_band(ledger: Ledger, folder: Path) -> dict[str, float]:
    """Milliseconds per band: reading its receipt, and reading and writing it down."""
    reads, wholes = [], []
    for _ in range(5):
        begun = time.perf_counter()
        assert sum(1 for _ in receipts_in(folder)) == BANDS
        reads.append(time.perf_counter() - begun)
        with ledger.write() as session:
            session.execute(delete(Band))
        begun = time.perf_counter()
        with ledger.write() as session:
            assert record_bands(session, folder, "R1", NOW) == BANDS
        wholes.append(time.perf_counter() - begun)
    return {
        "receipt_read_ms": round(1e3 * sorted(reads)[2] / BANDS, 3),
        "band_recorded_ms": round(1e3 * sorted(wholes)[2] / BANDS, 3),
    }


def write_receipts(folder: Path) -> None:
    """Receipts as a scan writes them, each with 20 defects' worth of columns."""
    (folder / "bands").mkdir(parents=True)
    for number in range(BANDS):
        y0 = number * 2048
        facts = {"facts": {f"c{column}": list(range(20)) for column in range(16)}}
        told = {"run_id": folder.name, "y0": y0, "y1": y0 + 2048, "components": facts, "rows": []}
        told |= {"shard_sha256": f"{number:064x}", "seconds": {"read": 0.1, "net": 1.0, "mask": 0.1}}
        (folder / "bands" / f"{y0:010d}.json").write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ticker", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=int, default=SLOTS)
    said = parser.parse_args()
    if said.ticker:
        ticker(said.ticker, said.start)
        return
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = folder / "runs/R1/0123456789ab"
        write_receipts(run)
        places = {"sqlite": f"sqlite:///{folder / 'ledger.db'}"}
        server = Server() if binaries() is not None else None
        try:
            if server is not None:
                places["postgresql"] = server.database("ledger")
            for backend, url in places.items():
                figures[backend] = race(url, folder, said.slots)
                ledger = open_ledger(url, Plant(folder))
                figures[backend] |= cost_per_band(ledger, run)
                ledger.close()
                print(backend, figures[backend], flush=True)
        finally:
            if server is not None:
                server.close()
    write_rows("claims", [{"backend": backend, **told} for backend, told in figures.items()], seed=None)


if __name__ == "__main__":
    main()
