"""Claim: the morning page of 1000 rolls is under 3 MB, is made in seconds, and opens in under 2 s.

A ledger with 29 nights of 26 rolls and one of 1000, each run with a real defect table of 50 to 400 rows in
eight classes. The page is made twice: the first time every table of the window is read, then only new ones
would be. Opened three times in headless Chromium, until it has drawn.

    python bench/morning_page.py --rolls 1000
"""

import argparse
import json
import random
import resource
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _browser import CHROMIUM, opened
from report import write_result
from rollsight.inspect.plant import Plant
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.ledger.schema import Run
from rollsight.jobs.morning_job import SCORES_FILE, make_page
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site

NOW = datetime(2026, 11, 24, 5, 30, tzinfo=UTC)
CLASSES = ("inclusion", "patches", "scratches", "pit", "roll_mark", "scale", "edge_crack", "drops")
NIGHTS, USUAL = 29, 26
SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rolls", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        plant = Plant(Path(name))
        site = Site(plant, open_ledger(None, plant), LineFile(line="CGL2"), lambda: NOW, random.Random(SEED))
        fill(site, asked.rolls)
        first, page = timed(site)
        again, page = timed(site)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        kept = page.with_name(SCORES_FILE).stat().st_size
        told = [opened(page.parent) for _ in range(3)] if CHROMIUM is not None else []
        complaints = [line for each in told for line in each["complaints"]]
        assert complaints == [], complaints
        figures = {
            "rolls": asked.rolls,
            "runs_in_window": asked.rolls + NIGHTS * USUAL,
            "made_first_s": round(first, 2),
            "made_again_s": round(again, 2),
            "peak_rss_mb": round(peak),
            "page_mb": round(page.stat().st_size / 1e6, 3),
            "memory_of_scores_mb": round(kept / 1e6, 3),
            "opens_s": [round(each["ms"] / 1000, 2) for each in told] or None,
        }
    write_result("morning_page", figures, SEED)
    print(json.dumps(figures))


def fill(site: Site, rolls: int) -> None:
    """Runs as nights leave them: rows in the ledger, tables and pages on disk."""
    rng = np.random.default_rng(SEED)
    rows = []
    for night in range(NIGHTS, -1, -1):
        for i in range(USUAL if night else rolls):
            at = NOW - timedelta(days=night, seconds=60 + 80 * i)
            rows.append(run(site, f"C{night:02d}{i:05d}-02", at, rng))
    with site.ledger.write() as session:
        session.add_all(rows)


def run(site: Site, roll_id: str, at: datetime, rng: np.random.Generator) -> Run:
    run_id = f"{rng.integers(2**48):012x}"
    folder = site.plant.home / "runs" / roll_id / run_id
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<html></html>")
    count = int(rng.integers(50, 400))
    kind = rng.choice(len(CLASSES), count)
    scores = rng.beta(8, 2, count).astype(np.float32)
    table = pa.table({"class": np.array(CLASSES)[kind], "score": scores})
    pq.write_table(table, folder / "defects.parquet")
    held = rng.random() < 0.05
    return Run(
        roll_id=roll_id,
        closed_at=at,
        ended_at=at,
        created_at=at,
        model="default",
        model_hash="0" * 64,
        state="done",
        run_id=run_id,
        folder=f"runs/{roll_id}/{run_id}",
        line_id=f"CGL{rng.integers(1, 4)}",
        length_m=float(rng.uniform(900, 2600)),
        width_mm=1250.0,
        coverage=0.97 if held else float(1 - rng.exponential(0.001)),
        verdict="HOLD" if held else "UNGRADED",
        reasons=json.dumps(["coverage 97.00% is under 99%: parts were not inspected (dark, dropped)"]),
        defects=count,
        by_class=json.dumps(
            dict(zip(CLASSES, np.bincount(kind, minlength=len(CLASSES)).tolist(), strict=True))
        ),
        seconds=60.0,
    )


def timed(site: Site) -> tuple[float, Path]:
    start = time.perf_counter()
    page = make_page(site)
    return time.perf_counter() - start, page


if __name__ == "__main__":
    main()
