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
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rollsight.inspect import defects
from rollsight.inspect.along_strip import faint_lines
from rollsight.inspect.errors import FAILED, LOCKED, PARTIAL, UserError
from rollsight.inspect.models import Model
from rollsight.inspect.plant import Plant
from rollsight.inspect.report.page import write_page
from rollsight.inspect.roll_places import place_of
from rollsight.inspect.rolls import MAX_LINES, LabelWriter, Roll, write_durably
from rollsight.inspect.scan import (
    BAND_SIZES,
    CPU_BAND_LINES,
    Plan,
    Receipt,
    check_bands,
    plan_scan,
    receipt_path,
    slot_bytes,
)
from rollsight.inspect.tiles import CELL
from rollsight.jobs.cluster import Executor, Threads, scan_bands, window
from rollsight.jobs.executors import open_executor
from rollsight.jobs.summary import from_strip_edge, strip_edges, summarise
from rollsight.jobs.workers import Band, BandJob, Fault, Setup, probe

MASK = "mask.zarr"  # in a run's folder, where the roll is remote or read-only
IMAGE = "image.txt"  # beside it: which image it is of
OUTPUTS = ("summary.json", "report.html", "defects.csv", "defects.parquet", "faint_lines.csv")
SUSPECT_DEATHS = 2  # scans that died while a band was at work in them: the next one gives it its own process
FAINT_LINES = pa.schema(
    [("class", pa.string())]
    + [(name, pa.float64()) for name in ("x_mm", "y_m", "length_mm", "evidence", "in_table")]
    + [(name, pa.int64()) for name in ("x0", "y0", "x1", "y1")]
)
NAMED = 5  # bands in an error; the others are counted


@dataclass(frozen=True, slots=True)
class Run:
    """A finished scan: its folder, defect table and summary (the keys of summary.json)."""

    folder: Path
    table: pa.Table
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Planned:
    """A scan that is planned; nothing is written yet."""

    roll: Roll
    model: Model
    plan: Plan
    setup: Setup
    folder: Path  # runs/<roll>/<run-id>

    @property
    def receipts(self) -> Path:
        return self.folder / "bands"

    @property
    def mask(self) -> Path | None:
        """The folder of the mask where it cannot lie beside the image: the roll is remote or read-only."""
        own = self.folder / MASK
        return own if own.is_dir() or not self.roll.is_writable else None

    def open_mask(self) -> LabelWriter:
        """The mask of the run begun before; UserError where there is none, or a damaged one."""
        return LabelWriter.open(self.roll.location, self.plan.run_id, folder=self.mask)

    def bands(self, band_lines: int) -> list[Band]:
        return check_bands(self.roll.lines, band_lines, self.plan.core_lines)

    def receipt(self, band: Band, label: LabelWriter) -> Receipt | None:
        """The receipt of a band if it is valid: of this plan, and with the shard that it names on disk."""
        path = receipt_path(self.receipts, band[0])
        if not path.is_file():
            return None
        try:
            receipt = Receipt.read(path)
            same = (receipt.run_id, receipt.y0, receipt.y1) == (self.plan.run_id, *band)
            return receipt if same and receipt.shard_sha256 == label.shard_checksum(band[0]) else None
        except (ValueError, KeyError, TypeError, UserError):
            return None  # a damaged receipt or shard: the band is done again


def plan_roll(
    plant: Plant,
    roll: Roll,
    model: Model,
    executor: Executor,
    *,
    engine: str = "auto",
    device: str = "auto",
    core_lines: int | None = None,
    halo: int | None = None,
    along: str = "",
) -> Planned:
    """What scanning `roll` with `model` on `executor` would be; UserError where a worker cannot take part."""
    facts, device = executor.facts(engine, device)
    sizes = {} if core_lines is None else {"core_lines": core_lines}
    plan = plan_scan(roll, model, facts, halo=halo, along=along, **sizes)
    setup = Setup(model.folder.resolve(), model.hash, device, plan.threads, facts)
    return Planned(roll, model, plan, setup, plant.run(roll.roll_id, plan.run_id))


def scan_roll(
    plant: Plant,
    roll: Roll,
    model: Model,
    executor: Executor | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    band_lines: int | None = None,
    core_lines: int | None = None,
    halo: int | None = None,
    threads: int | None = None,
    along: str = "",
    on_band: Callable[[int, int], None] | None = None,
) -> Run:
    """Find the defects of `roll` with `model`; a run already begun goes on, one already finished is read.

    executor is where bands run, by default `threads` threads of this process (one per core). band_lines is
    the work unit, a multiple of the window's core; by default 2048 lines, 4096 on a GPU, or less where memory
    is short (a begun run keeps its own). `along` names a class whose faint lines along the strip are looked
    for as well: `faint_lines.csv` and the summary's `faint_lines`. `on_band(lines done, lines in all)` is
    called as bands are committed. Raises UserError: 75 where another process scans it now, 3 where bands are
    missing at the end, 78 where a worker would give another result.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if executor is None:
            executor = Threads(threads)
            stack.callback(executor.close)
        scan = plan_roll(
            plant,
            roll,
            model,
            executor,
            engine=engine,
            device=device,
            core_lines=core_lines,
            halo=halo,
            along=along,
        )
        plan, folder = scan.plan, scan.folder
        check_bands(roll.lines, band_lines or plan.core_lines, plan.core_lines)
        scan.receipts.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock(folder))
        band_lines = fit_bands(scan, executor, band_lines)
        label = mask_of(scan, band_lines)
        bands = scan.bands(band_lines)
        missing = [band for band in bands if scan.receipt(band, label) is None]
        if not missing and (finished := _finished(folder)) is not None:
            return finished
        _clear(scan, bands)
        write_durably(
            folder / "plan.json", json.dumps(asdict(plan) | {"run_id": plan.run_id}, indent=1).encode()
        )
        fault = scan_missing(scan, executor, band_lines, missing, on_band)
        # Receipts on disk are the truth: nothing that this process remembers counts.
        found = {band: scan.receipt(band, label) for band in bands}
        valid = [receipt for receipt in found.values() if receipt is not None]
        if left := [band for band, receipt in found.items() if receipt is None]:
            raise UserError(_not_scanned(roll, left, len(bands), fault), PARTIAL)
        label.close()
        table = defect_table(scan, valid)
        seconds = time.perf_counter() - started
        scanned_px = sum(y1 - y0 for y0, y1 in missing) * roll.width * roll.modes
        summary = summarise(roll, model, plan, valid, table) | {
            "executor": executor.name,
            "device": plan.device,
            "band_lines": band_lines,
            "seconds": round(seconds, 3),
            "mpix_s": round(scanned_px / 1e6 / seconds, 3),
        }
        if plan.along:
            lines = faint_line_table(scan, valid, table)
            summary["faint_lines"] = lines.to_pylist()
            _write_csv(folder / "faint_lines.csv", lines)
        _write_outputs(folder, table, summary)
        write_page(folder, roll, partial(roll.read_label, plan.run_id, folder=scan.mask))
        (folder / "begun.log").unlink(missing_ok=True)
    return Run(folder, table, summary)


def defect_table(scan: Planned, receipts: list[Receipt]) -> pa.Table:
    """The defects of bands that follow each other from the roll's first line on."""
    found = defects.at_least(defects.join([receipt.components for receipt in receipts]), scan.plan.a_min_px)
    rows = [row for receipt in receipts for row in receipt.rows]
    return defects.table(
        from_strip_edge(found, rows, scan.roll.width),
        scan.plan.classes,
        scan.roll.strip,
        roll_id=scan.roll.roll_id,
        run_id=scan.plan.run_id,
    )


def faint_line_table(scan: Planned, receipts: list[Receipt], table: pa.Table) -> pa.Table:
    """Lines along the strip that no pixel shows for sure (along_strip.py), strongest first, in mm and px.

    `in_table` is the share of a line's length where a defect of its class stands in `table` already.
    """
    per_px, per_line = scan.roll.strip.mm_per_px_x, scan.roll.strip.mm_per_line
    left, _ = strip_edges([row for receipt in receipts for row in receipt.rows], scan.roll.width)
    same = np.array(table["class"].to_pylist()) == scan.plan.along
    x0, y0, x1, y1 = (table[name].to_numpy()[same] for name in ("x0", "y0", "x1", "y1"))
    rows = []
    for line in faint_lines(np.concatenate([receipt.evidence for receipt in receipts])):
        end = min(line.y1, scan.roll.lines)
        seen = np.zeros(end - line.y0, dtype=np.bool_)
        beside = (x0 < line.x1) & (x1 > line.x0) & (y0 < end) & (y1 > line.y0)
        for a, b in zip(y0[beside], y1[beside], strict=True):
            seen[max(a - line.y0, 0) : b - line.y0] = True
        x = line.head_px - int(left[line.y0 // CELL])
        rows.append(
            {
                "class": scan.plan.along,
                "x_mm": None if per_px is None else x * per_px,  # where it begins, from the drive-side edge
                "y_m": None if per_line is None else line.y0 * per_line / 1000,
                "length_mm": None if per_line is None else (end - line.y0) * per_line,
                "evidence": round(line.evidence, 1),
                "in_table": round(float(seen.mean()), 3),
                "x0": line.x0,
                "y0": line.y0,
                "x1": min(line.x1, scan.roll.width),
                "y1": end,
            }
        )
    return pa.Table.from_pylist(rows, schema=FAINT_LINES)


def scan_missing(
    scan: Planned,
    executor: Executor,
    band_lines: int,
    missing: list[Band],
    on_band: Callable[[int, int], None] | None,
) -> Fault | None:
    """Scan the bands that are missing; why one could not be, if so.

    UserError where a worker may not take part: it differs in what decides the result.
    """
    done = scan.roll.lines - sum(y1 - y0 for y0, y1 in missing)
    first: Fault | None = None
    if on_band is not None:
        on_band(done, scan.roll.lines)
    with contextlib.closing(_results(scan, executor, band_lines, missing)) as results:
        for (y0, y1), fault in results:
            if fault is not None:
                first = first or fault
                if fault.refusal is not None:
                    raise UserError(fault.text, fault.refusal)
                if fault.final:
                    return fault
                continue
            done += y1 - y0
            if on_band is not None:
                on_band(done, scan.roll.lines)
    return first


def _results(
    scan: Planned, executor: Executor, band_lines: int, missing: list[Band]
) -> Generator[tuple[Band, Fault | None]]:
    """The bands as they are done; those at work in scans that died come last, in a process of their own."""
    need = slot_bytes(scan.plan, scan.roll.modes, band_lines)

    def results_on(executor: Executor, bands: list[Band]) -> Generator[tuple[Band, Fault | None]]:
        if bands:
            for y0, _ in bands:  # no valid one was found: to a worker a receipt is a commit
                receipt_path(scan.receipts, y0).unlink(missing_ok=True)
            job = _job(scan, executor)
            executor.begin(job, need)
            yield from scan_bands(executor, job, bands)

    with _journal(scan.folder / "begun.log") as deaths:
        suspects = [band for band in missing if executor.in_process and deaths[band[0]] >= SUSPECT_DEATHS]
        yield from results_on(executor, [band for band in missing if band not in suspects])
        if suspects:
            with open_executor(workers=1, device="cpu") as apart:
                yield from results_on(apart, suspects)


def _job(scan: Planned, executor: Executor) -> BandJob:
    location = scan.roll.location
    return BandJob(
        scan.setup,
        scan.plan,
        location.resolve() if isinstance(location, Path) else location,
        scan.roll.lines,
        not scan.roll.strip.closed,
        None if scan.mask is None else scan.mask.resolve(),
        scan.receipts.resolve(),
        (scan.folder / "begun.log").resolve() if executor.in_process else None,
        uuid.uuid4().hex,
    )


@contextlib.contextmanager
def _journal(path: Path) -> Iterator[Counter[int]]:
    """How often each band, by its first line, was at work when a scan of this run was killed.

    Bands are noted in the file as they begin (workers.scan_one). A scan that ends in order, be it by an error
    or by Ctrl-C, takes back what it noted; one that is killed cannot.
    """
    path.touch()
    size = path.stat().st_size
    try:
        yield Counter(int(line) for line in path.read_text().split() if line.isdecimal())
    finally:
        if size:
            os.truncate(path, size)
        else:
            path.unlink(missing_ok=True)


def _not_scanned(roll: Roll, missing: list[Band], count: int, fault: Fault | None) -> str:
    """The one line of a roll with bands missing, which names them."""
    per_line = roll.strip.mm_per_line
    named = [
        f"lines {y0} to {y1}"
        if per_line is None
        else f"{y0 * per_line / 1000:.2f} to {y1 * per_line / 1000:.2f} m"
        for y0, y1 in missing[:NAMED]
    ]
    if len(missing) > NAMED:
        named.append(f"{len(missing) - NAMED} more")
    why = f" ({fault.text})" if fault is not None else ""
    return (
        f"roll {roll.roll_id}: {len(missing)} of {count} bands are not scanned: {', '.join(named)}{why}: "
        "the others are kept, scan it again when the cause is gone"
    )


def fit_bands(scan: Planned, executor: Executor, asked: int | None = None) -> int:
    """Lines per band: those of the run begun before, else as asked, else the largest that memory allows.

    UserError where not even the smallest fits into what one slot may take.
    """
    with contextlib.suppress(UserError):  # no mask yet, or a damaged one
        asked = scan.open_mask().shard_lines
    core = scan.plan.core_lines
    most = CPU_BAND_LINES if scan.plan.device == "cpu" else max(BAND_SIZES)
    sizes = [asked] if asked else [max(core, size - size % core) for size in BAND_SIZES if size <= most]
    room = executor.room()
    needs = {size: slot_bytes(scan.plan, scan.roll.modes, size) for size in sizes}
    for size, need in needs.items():
        if room is None or need <= room:
            return size
    raise UserError(
        f"roll {scan.roll.roll_id}: a band of {sizes[-1]} lines needs {needs[sizes[-1]] / 1e6:.0f} MB, and "
        f"there are {(room or 0) / 1e6:.0f} MB for each band at work: take fewer --threads or --workers",
        FAILED,
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a scan would take, before it starts."""

    run_id: str
    bands: int
    bands_done: int  # by a run begun before
    band_lines: int
    slots: int  # bands at once
    memory_bytes: int  # of all bands at work at their peak
    disk_bytes: int  # of mask and receipts
    seconds: float  # for the bands left
    basis: str  # "finished bands" | "a probe of 1024 lines"


def estimate_roll(scan: Planned, executor: Executor, band_lines: int | None = None) -> Estimate:
    """What the scan would take, from its finished bands, or else from a few lines scanned in mid-roll.

    Nothing is written. Time is that of a band by itself over the slots: cores that others use are slower.
    """
    roll, plan = scan.roll, scan.plan
    band_lines = fit_bands(scan, executor, band_lines)
    bands = scan.bands(band_lines)
    need = slot_bytes(plan, roll.modes, band_lines)
    valid: list[Receipt] = []
    with contextlib.suppress(UserError):  # none was begun
        if scan.mask is not None and _is_of_another(scan, _image(roll)):
            raise UserError("what was begun is of another image")
        label = scan.open_mask()
        valid = [receipt for band in bands if (receipt := scan.receipt(band, label)) is not None]
    if valid:
        lines = sum(receipt.y1 - receipt.y0 for receipt in valid)
        seconds = sum(sum(receipt.seconds.values()) for receipt in valid)
        size = sum(
            path.stat().st_size
            for top in (label.folder, scan.receipts)
            for path in top.rglob("*")
            if path.is_file()
        )
        basis = "finished bands"
    else:
        y0 = roll.lines // 2 // plan.core_lines * plan.core_lines
        y1 = min(y0 + plan.core_lines, roll.lines)
        lines, basis = y1 - y0, f"a probe of {y1 - y0} lines"
        [(_, probed)] = window(executor, partial(probe, scan.setup, plan, roll), [(y0, y1)])
        seconds, size = probed.result()
    left = roll.lines - sum(receipt.y1 - receipt.y0 for receipt in valid)
    return Estimate(
        plan.run_id,
        len(bands),
        len(valid),
        band_lines,
        executor.slots(),
        need * executor.slots(),
        round(size / lines * roll.lines),
        seconds / lines * left / executor.slots(),
        basis,
    )


def _finished(folder: Path) -> Run | None:
    """The run that lies in the folder whole, if one does: its page was written last."""
    try:
        if not (folder / "report.html").is_file():
            return None
        summary = json.loads((folder / "summary.json").read_bytes())
        return Run(folder, pyarrow.parquet.read_table(folder / "defects.parquet"), summary)
    except (OSError, ValueError):
        return None


def _clear(scan: Planned, bands: list[Band]) -> None:
    """Remove what says that the run is finished, receipts of bands it does not have, and what a kill left.

    A roll that was replaced under its id has the same run: until it is scanned, nothing old may stand here.
    """
    for name in OUTPUTS:
        (scan.folder / name).unlink(missing_ok=True)
    expected = {receipt_path(scan.receipts, y0) for y0, _ in bands}
    strays = [path for path in scan.receipts.iterdir() if path not in expected]
    for path in (*strays, *scan.folder.glob(".*.partial")):
        path.unlink(missing_ok=True)  # a Dask worker that outlived its client may be at it still


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run for this process; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being scanned by another process: try again later", LOCKED
            ) from None
        yield


def mask_of(scan: Planned, band_lines: int) -> LabelWriter:
    """The mask of the run, to be written or to go on with."""
    told = None if scan.mask is None else _image(scan.roll)
    if told is not None and _is_of_another(scan, told):
        _forget(scan)
    roll, plan, folder = scan.roll, scan.plan, scan.mask
    place = folder or roll.path / "labels" / plan.run_id
    if place.is_dir():
        try:
            begun = scan.open_mask()
            lines = (roll.lines, MAX_LINES) if roll.strip.closed else (MAX_LINES,)
            fits = begun.lines in lines and (begun.width, begun.classes) == (roll.width, plan.classes)
        except UserError:
            fits = False
        if not fits:  # damaged, or of a roll that this one replaced: no receipt can vouch for it
            shutil.rmtree(place)
    if not place.is_dir():
        (scan.folder / "begun.log").unlink(missing_ok=True)
    label = LabelWriter.create(
        roll.location,
        plan.run_id,
        plan.classes,
        lines=roll.lines if roll.strip.closed else None,
        width=roll.width,
        shard_lines=band_lines,
        folder=folder,
    )
    if folder is not None and told is not None:
        write_durably(scan.folder / IMAGE, told.encode())
    return label


def _image(roll: Roll) -> str:
    """Where the image lies, and what tells it from another that was there before: of its first shard.

    That stays as it is while a roll grows, and of a blank one there is none: then of its description.
    """
    location = roll.location
    place = place_of(location.resolve() if isinstance(location, Path) else location)
    return f"{place} {place.version('0/c/0/0/0') or place.version('zarr.json')}\n"


def _is_of_another(scan: Planned, image: str) -> bool:
    """Whether the mask in the run's folder is of another image: nothing of that one says anything of this."""
    own, told = scan.folder / MASK, scan.folder / IMAGE
    begun = own.is_dir() and any(own.iterdir())
    return begun and (not told.is_file() or told.read_text(encoding="utf-8") != image)


def _forget(scan: Planned) -> None:
    """Remove a run's mask, receipts and outputs, the page first."""
    _clear(scan, [])
    for name in ("begun.log", IMAGE):
        (scan.folder / name).unlink(missing_ok=True)
    shutil.rmtree(scan.folder / MASK)


def _write_outputs(folder: Path, table: pa.Table, summary: dict[str, Any]) -> None:
    """Table and summary, each put in place whole; the page comes last and says that the run is finished."""
    parquet = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet)
    write_durably(folder / "defects.parquet", parquet.getvalue().to_pybytes())
    _write_csv(folder / "defects.csv", table)
    write_durably(folder / "summary.json", json.dumps(summary, indent=1).encode())


def _write_csv(path: Path, table: pa.Table) -> None:
    csv = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, csv)
    write_durably(path, csv.getvalue().to_pybytes())
