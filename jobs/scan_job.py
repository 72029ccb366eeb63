"""A whole roll: plan, bands over an executor, receipts, completeness check, table, summary, page.

A run's folder is `runs/<roll>/<run-id>/`; the run id is the hash of the plan. A run that was interrupted
goes on with the bands that have no valid receipt, and ends the same.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rollsight.inspect import defects
from rollsight.inspect.engines import open_engine
from rollsight.inspect.errors import LOCKED, PARTIAL, UserError
from rollsight.inspect.models import Model
from rollsight.inspect.plant import Plant
from rollsight.inspect.report.page import write_page
from rollsight.inspect.rolls import LabelWriter, Roll, write_durably
from rollsight.inspect.scan import (
    BAND_LINES,
    Plan,
    Receipt,
    check_bands,
    plan_scan,
    receipt_path,
    scan_band,
)
from rollsight.jobs.cluster import run_threads, slots
from rollsight.jobs.summary import summarise

OUTPUTS = ("summary.json", "report.html", "defects.csv", "defects.parquet")


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
    if not os.access(roll.path, os.W_OK):
        raise UserError(
            f"{roll.path} is read-only, but the class mask is written beside the image: "
            "make it writable or scan a copy"
        )
    folder = plant.run(roll.roll_id, plan.run_id)
    receipts = folder / "bands"
    receipts.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        label, band_lines = _mask(roll, plan, band_lines)
        bands = check_bands(roll.lines, band_lines, plan.core_lines)
        missing = [band for band in bands if _receipt(plan, band, label, receipts) is None]
        done = roll.lines - sum(y1 - y0 for y0, y1 in missing)
        if on_band is not None:
            on_band(done, roll.lines)
        if not missing and (finished := _finished(folder)) is not None:
            return finished
        _clear(folder, bands)
        write_durably(
            folder / "plan.json", json.dumps(asdict(plan) | {"run_id": plan.run_id}, indent=1).encode()
        )
        faults: list[UserError] = []

        def work(band: tuple[int, int]) -> int:
            try:
                scan_band(plan, roll, run_engine, *band, label, receipts)
            except UserError as fault:  # a damaged part of the roll does not stop the other bands
                faults.append(fault)
                return 0
            return band[1] - band[0]

        for lines in run_threads(work, missing, threads or slots()):
            done += lines
            if on_band is not None:
                on_band(done, roll.lines)
        # Receipts on disk are the truth: nothing that this process remembers counts.
        found = [_receipt(plan, band, label, receipts) for band in bands]
        valid = [receipt for receipt in found if receipt is not None]
        if len(valid) < len(bands):
            why = f" ({faults[0]})" if faults else ""
            raise UserError(
                f"roll {roll.roll_id}: {len(bands) - len(valid)} of {len(bands)} bands are not scanned{why}: "
                "the others are kept, scan it again when the cause is gone",
                PARTIAL,
            )
        label.close()
        table = defects.table(
            defects.at_least(defects.join([receipt.components for receipt in valid]), plan.a_min_px),
            plan.classes,
            roll.strip,
            roll_id=roll.roll_id,
            run_id=plan.run_id,
        )
        seconds = time.perf_counter() - started
        scanned_px = sum(y1 - y0 for y0, y1 in missing) * roll.width * roll.modes
        summary = summarise(roll, model, plan, valid, table) | {
            "executor": "threads",
            "band_lines": band_lines,
            "seconds": round(seconds, 3),
            "mpix_s": round(scanned_px / 1e6 / seconds, 3),
        }
        _write_outputs(folder, table, summary)
        write_page(folder, roll, partial(roll.read_label, plan.run_id))
    return Run(folder, table, summary)


def _finished(folder: Path) -> Run | None:
    """The run that lies in the folder whole, if one does: its page was written last."""
    try:
        if not (folder / "report.html").is_file():
            return None
        summary = json.loads((folder / "summary.json").read_bytes())
        return Run(folder, pyarrow.parquet.read_table(folder / "defects.parquet"), summary)
    except (OSError, ValueError):
        return None


def _clear(folder: Path, bands: list[tuple[int, int]]) -> None:
    """Remove what says that the run is finished, and receipts of bands it does not have.

    A roll that was replaced under its id has the same run: until it is scanned, nothing old may stand here.
    """
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)
    expected = {receipt_path(folder / "bands", y0) for y0, _ in bands}
    for path in (folder / "bands").iterdir():
        if path not in expected:
            path.unlink()


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
    folder = roll.path / "labels" / plan.run_id
    lines = band_lines or max(BAND_LINES, plan.core_lines)
    if folder.is_dir():
        try:
            lines = LabelWriter.open(roll.path, plan.run_id).shard_lines
        except UserError:  # damaged: no receipt can vouch for it, so it is made again
            shutil.rmtree(folder)
    label = LabelWriter.create(
        roll.path, plan.run_id, plan.classes, lines=roll.lines, width=roll.width, shard_lines=lines
    )
    return label, lines


def _receipt(plan: Plan, band: tuple[int, int], label: LabelWriter, folder: Path) -> Receipt | None:
    """The receipt of a band if it is valid: of this plan, and with the shard that it names on disk."""
    path = receipt_path(folder, band[0])
    if not path.is_file():
        return None
    try:
        receipt = Receipt.read(path)
        same = (receipt.run_id, receipt.y0, receipt.y1) == (plan.run_id, *band)
        return receipt if same and receipt.shard_sha256 == label.shard_checksum(band[0]) else None
    except (ValueError, KeyError, TypeError, UserError):
        return None  # a damaged receipt or shard: the band is done again


def _write_outputs(folder: Path, table: pa.Table, summary: dict[str, Any]) -> None:
    """Table and summary, each put in place whole; the page comes last and says that the run is finished."""
    parquet = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet)
    write_durably(folder / "defects.parquet", parquet.getvalue().to_pybytes())
    csv = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, csv)
    write_durably(folder / "defects.csv", csv.getvalue().to_pybytes())
    write_durably(folder / "summary.json", json.dumps(summary, indent=1).encode())
