"""A roll scanned while it grows: bands as soon as their lines and their halo are there, the rest at the end.

Until the roll is closed the run's folder holds `live.parquet`, the defects so far. A defect that ends above
the last scanned line is finished: its row and its id, which is its first pixel, stay as they are (but for x
where a lamp failed at the edge: there the edge of the whole roll counts). One that reaches that line is
provisional: it may still grow, or turn out to be part of another.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from rollsight.inspect.errors import LOCKED, UserError
from rollsight.inspect.models import Model
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import Roll, open_roll, write_durably
from rollsight.inspect.scan import Receipt
from rollsight.jobs.cluster import Executor
from rollsight.jobs.scan_job import (
    Planned,
    Run,
    defect_table,
    fit_bands,
    lock,
    mask_of,
    plan_roll,
    scan_missing,
    scan_roll,
)

LIVE_TABLE = "live.parquet"
POLL_S = 1.0
PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a scan of a growing roll is."""

    lines: int  # scanned
    grown: int  # written by the line so far
    defects: int
    provisional: int


def scan_live(
    plant: Plant,
    path: Path,
    model: Model,
    executor: Executor,
    *,
    poll_s: float = POLL_S,
    patience_s: float = PATIENCE_S,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Run:
    """Scan the roll at `path` while it grows; ends as `scan_roll` of the closed roll does, with its table.

    `options` are those of `scan_roll`. Interrupted, the same call goes on. Raises UserError 75 where the
    roll neither grew nor was closed for `patience_s` seconds, or another process scans it.
    """
    waited_from, seen = time.monotonic(), -1
    while True:
        roll = open_roll(path, live=True)
        if roll.strip.closed:
            run = scan_roll(plant, roll, model, executor, **options)
            (run.folder / LIVE_TABLE).unlink(missing_ok=True)
            return run
        if roll.lines > seen:
            waited_from, seen = time.monotonic(), roll.lines
            progress = scan_so_far(plant, roll, model, executor, **options)
            if progress is not None and on_progress is not None:
                on_progress(progress)
        elif time.monotonic() - waited_from > patience_s:
            raise UserError(
                f"roll {roll.roll_id} stands at {roll.lines} lines for {patience_s:.0f} s and is not closed: "
                "what is scanned is kept; scan it again with --live when it goes on",
                LOCKED,
            )
        time.sleep(poll_s)


def scan_so_far(
    plant: Plant,
    roll: Roll,
    model: Model,
    executor: Executor,
    *,
    engine: str = "auto",
    device: str = "auto",
    band_lines: int | None = None,
    on_band: Callable[[int, int], None] | None = None,
) -> Progress | None:
    """Scan the bands whose lines and halo are there, and return; None where there is none yet."""
    if not roll.lines:
        return None
    scan = plan_roll(plant, roll, model, executor, engine=engine, device=device)
    scan.receipts.mkdir(parents=True, exist_ok=True)
    with lock(scan.folder):
        band_lines = fit_bands(scan, executor, band_lines)
        bands = [
            (y0, y0 + band_lines)
            for y0 in range(0, roll.lines, band_lines)
            if y0 + band_lines + scan.plan.halo <= roll.lines
        ]
        if not bands:
            return None
        label = mask_of(scan, band_lines)
        missing = [band for band in bands if scan.receipt(band, label) is None]
        if missing:
            fault = scan_missing(scan, executor, band_lines, missing, on_band)
            if fault is not None and fault.final:
                raise UserError(f"roll {roll.roll_id}: {fault.text}")
        return _write_so_far(scan, [scan.receipt(band, label) for band in bands])


def _write_so_far(scan: Planned, receipts: list[Receipt | None]) -> Progress:
    """Put down the defects of the bands from the first to the last before one that is missing."""
    whole: list[Receipt] = []
    for receipt in receipts:
        if receipt is None:  # it failed; at the end it is tried again
            break
        whole.append(receipt)
    lines = whole[-1].y1 if whole else 0
    table = defect_table(scan, whole)
    provisional = table["y1"].to_numpy() >= lines
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table.append_column("provisional", pa.array(provisional, pa.bool_())), sink)
    write_durably(scan.folder / LIVE_TABLE, sink.getvalue().to_pybytes())
    return Progress(lines, scan.roll.lines, table.num_rows, int(provisional.sum()))
