"""A whole roll: plan, bands over an executor, receipts, completeness check, table, summary, page.

A run's folder is `runs/<roll>/<run-id>/`; the run id is the hash of the plan. A run that was interrupted
goes on with the bands that have no valid receipt, and ends the same.
"""

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rollsight.inspect import defects
from rollsight.inspect.engines import open_engine
from rollsight.inspect.errors import LOCKED, PARTIAL, UserError
from rollsight.inspect.linescan import CellRow
from rollsight.inspect.models import Model
from rollsight.inspect.plant import Plant
from rollsight.inspect.report.page import write_page
from rollsight.inspect.rolls import LabelWriter, Roll
from rollsight.inspect.scan import (
    BAND_LINES,
    Plan,
    Receipt,
    check_bands,
    plan_scan,
    receipt_path,
    scan_band,
    write_durably,
)
from rollsight.jobs.cluster import run_threads, slots

COVERAGE_NEEDED = 0.99  # below it the verdict is HOLD; a rules file may ask for more
EDGE_STEP = 16  # every 16th row of cells (1024 lines) gives the page its strip edges
MAX_BLIND_LISTED = 2000  # rectangles in the summary; the receipts hold all


@dataclass(frozen=True, slots=True)
class Run:
    """A finished scan: its folder, defect table and summary (the keys of summary.json)."""

    folder: Path
    table: pa.Table
    summary: dict[str, Any]


def scan_roll(
    plant: Plant,
    roll: Roll,
    model: Model,
    *,
    engine: str = "auto",
    band_lines: int | None = None,
    core_lines: int | None = None,
    halo: int | None = None,
    threads: int | None = None,
    on_band: Callable[[int, int], None] | None = None,
) -> Run:
    """Find the defects of `roll` with `model`; a run already begun goes on, one already finished is read.

    band_lines is the work unit, a multiple of the window's core (default 2048 lines; a begun run keeps
    its own). threads is how many bands run at once, by default one per core. `on_band(lines done, lines
    in all)` is called as bands are committed. Raises UserError: 75 where another process scans it now, 3
    where bands are missing at the end.
    """
    started = time.perf_counter()
    engine_name, run_engine = open_engine(model, engine)
    sizes = {} if core_lines is None else {"core_lines": core_lines}
    plan = plan_scan(roll, model, engine_name, halo=halo, **sizes)
    check_bands(roll.lines, band_lines or plan.core_lines, plan.core_lines)
    folder = plant.run(roll.roll_id, plan.run_id)
    receipts = folder / "bands"
    receipts.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        label, band_lines = _mask(roll, plan, band_lines)
        write_durably(
            folder / "plan.json", json.dumps(asdict(plan) | {"run_id": plan.run_id}, indent=1).encode()
        )
        bands = check_bands(roll.lines, band_lines, plan.core_lines)
        committed = _committed(plan, bands, label, receipts)
        done = sum(y1 - y0 for y0, y1 in committed)
        missing = [band for band in bands if band not in committed]
        if on_band is not None:
            on_band(done, roll.lines)

        def work(band: tuple[int, int]) -> Receipt:
            return scan_band(plan, roll, run_engine, *band, label, receipts)

        for receipt in run_threads(work, missing, threads or slots()):
            done += receipt.y1 - receipt.y0
            if on_band is not None:
                on_band(done, roll.lines)
        # Receipts on disk are the truth: nothing that this process remembers counts.
        valid = _committed(plan, bands, label, receipts)
        if absent := [band for band in bands if band not in valid]:
            raise UserError(
                f"roll {roll.roll_id}: {len(absent)} of {len(bands)} bands have no receipt, the first at "
                f"line {absent[0][0]}: scan it again, finished bands are kept",
                PARTIAL,
            )
        label.close()
        table = defects.table(
            defects.join([receipt.components for receipt in valid.values()]),
            plan.classes,
            roll.strip,
            roll_id=roll.roll_id,
            run_id=plan.run_id,
        )
        summary = _summary(roll, model, plan, list(valid.values()), table)
        summary["executor"] = "threads"
        summary["band_lines"] = band_lines
        seconds = time.perf_counter() - started
        scanned = sum(y1 - y0 for y0, y1 in missing) * roll.width * roll.modes
        summary |= {"seconds": round(seconds, 3), "mpix_s": round(scanned / 1e6 / seconds, 3)}
        if not missing:
            summary |= _told_before(folder)
        _write_outputs(folder, table, summary)
        write_page(folder, roll, partial(roll.read_label, plan.run_id))
    return Run(folder, table, summary)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the run for this process; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being scanned by another process: try again later", LOCKED
            ) from None
        yield


def _mask(roll: Roll, plan: Plan, band_lines: int | None) -> tuple[LabelWriter, int]:
    """The mask of the run and its band size: that of the run begun before, if there is one."""
    if not os.access(roll.path, os.W_OK):
        raise UserError(
            f"{roll.path} is read-only: the class mask is written beside the image, so it must be writable"
        )
    if (roll.path / "labels" / plan.run_id).is_dir():
        label = LabelWriter.open(roll.path, plan.run_id)
        return label, label.shard_lines
    band_lines = band_lines or max(BAND_LINES, plan.core_lines)
    label = LabelWriter.create(
        roll.path, plan.run_id, plan.classes, lines=roll.lines, width=roll.width, shard_lines=band_lines
    )
    return label, band_lines


def _committed(
    plan: Plan, bands: list[tuple[int, int]], label: LabelWriter, folder: Path
) -> dict[tuple[int, int], Receipt]:
    """The bands with a valid receipt, in order: of this plan, and with the shard that it names on disk."""
    valid = {}
    for y0, y1 in bands:
        path = receipt_path(folder, y0)
        if not path.is_file():
            continue
        try:
            receipt = Receipt.read(path)
            whole = (receipt.run_id, receipt.y0, receipt.y1) == (plan.run_id, y0, y1)
            whole = whole and receipt.shard_sha256 == label.shard_checksum(y0)
        except (ValueError, KeyError, TypeError, UserError):
            whole = False  # a damaged receipt or shard: the band is done again
        if whole:
            valid[y0, y1] = receipt
    return valid


def _summary(
    roll: Roll, model: Model, plan: Plan, receipts: list[Receipt], table: pa.Table
) -> dict[str, Any]:
    rows = [row for receipt in receipts for row in receipt.rows]
    left, right = strip_edges(rows, roll.width)
    heights = np.array([row.y1 - row.y0 for row in rows])
    strip_px = int(((right - left) * heights).sum())
    # Where no strip was seen all of it is blind: as wide as the rows around it say.
    blind_px = sum(
        row.blind_px if row.left is not None else int(right[i] - left[i]) * int(heights[i])
        for i, row in enumerate(rows)
    )
    coverage = 1 - blind_px / strip_px if strip_px else 0.0
    strip = roll.strip
    width_px = float(np.median(right - left))
    blind = [asdict(blind) for row in rows for blind in row.blind]
    reasons = []
    if coverage < COVERAGE_NEEDED:
        why = ", ".join(sorted({part["reason"] for part in blind})) or "no strip seen"
        reasons.append(
            f"coverage {coverage:.2%} is under {COVERAGE_NEEDED:.0%}: parts were not inspected ({why})"
        )
    counts = Counter(table["class"].to_pylist())
    return {
        "roll_id": roll.roll_id,
        "run_id": plan.run_id,
        "model": model.card.name,
        "model_hash": model.hash,
        "engine": plan.engine,
        "engine_version": plan.engine_version,
        "units": strip.units,
        "lines": roll.lines,
        "width_px": roll.width,
        "length_m": None if strip.mm_per_line is None else roll.lines * strip.mm_per_line / 1000,
        "width_mm": None if strip.mm_per_px_x is None else round(width_px * strip.mm_per_px_x, 3),
        "coverage": coverage,
        "verdict": "HOLD" if reasons else "UNGRADED",
        "reasons": reasons or ["no rules file was asked for, so the roll is not graded"],
        "defects": table.num_rows,
        "by_class": {name: counts.get(name, 0) for name in plan.classes},
        "classes": list(plan.classes),
        "thresholds": dict(zip(plan.classes, plan.thresholds, strict=True)),
        "not_inspected": _merged(blind)[:MAX_BLIND_LISTED],
        "edges": [
            [row.y0, int(left[i]), int(right[i])]
            for i, row in enumerate(rows)
            if i % EDGE_STEP == 0 or i == len(rows) - 1
        ],
        "mm_per_px_x": strip.mm_per_px_x,
        "mm_per_line": strip.mm_per_line,
        "side": strip.side,
        "line_id": strip.line_id,
        "lighting": list(strip.lighting),
        "stage_seconds": {
            stage: round(sum(receipt.seconds[stage] for receipt in receipts), 3)
            for stage in ("read", "net", "mask", "write")
        },
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": plan.code,
        "notes": list(model.card.notes),
    }


def strip_edges(rows: list[CellRow], width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Left and right edge of each row of cells in px; where no strip was seen, between its neighbours'."""
    seen = [i for i, row in enumerate(rows) if row.left is not None]
    if not seen:
        return np.zeros(len(rows), dtype=np.int64), np.full(len(rows), width, dtype=np.int64)
    at = np.arange(len(rows))
    left = np.interp(at, seen, [rows[i].left or 0 for i in seen])
    right = np.interp(at, seen, [rows[i].right or 0 for i in seen])
    return np.round(left).astype(np.int64), np.round(right).astype(np.int64)


def _merged(blind: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rectangles that continue the one above them made one: a failed lamp is one part, not a hundred."""
    merged: dict[tuple[int, int, str, int], dict[str, Any]] = {}
    for part in blind:
        key = (part["x0"], part["x1"], part["reason"])
        above = merged.pop((*key, part["y0"]), None)
        whole = {**part, "y0": above["y0"]} if above else dict(part)
        merged[*key, part["y1"]] = whole
    return sorted(merged.values(), key=lambda part: (part["y0"], part["x0"]))


def _told_before(folder: Path) -> dict[str, Any]:
    """When a run that is only read again was made and how fast; empty where its summary is not whole."""
    try:
        before = json.loads((folder / "summary.json").read_bytes())
        return {key: before[key] for key in ("created_at", "seconds", "mpix_s")}
    except (OSError, ValueError, KeyError):
        return {}


def _write_outputs(folder: Path, table: pa.Table, summary: dict[str, Any]) -> None:
    """Table and summary, each put in place whole; the summary last: it says that the run is finished."""
    parquet = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet)
    write_durably(folder / "defects.parquet", parquet.getvalue().to_pybytes())
    csv = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, csv)
    write_durably(folder / "defects.csv", csv.getvalue().to_pybytes())
    write_durably(folder / "summary.json", json.dumps(summary, indent=1).encode())
