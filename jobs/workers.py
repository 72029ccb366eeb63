"""What a worker does, the same in the threads of this process and in a Dask worker: scan one band.

A task carries ids and paths alone and returns a line at most; image, model and mask are opened where it runs.
"""

import errno
import json
import sys
import threading
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from rollsight.inspect.engines import Engine, open_engine
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.models import open_model
from rollsight.inspect.roll_places import disk_errors
from rollsight.inspect.rolls import LabelWriter, Roll, open_roll
from rollsight.inspect.scan import Facts, Plan, facts_here, receipt_path, scan_band, scan_lines

Band = tuple[int, int]  # lines of the roll, half-open

MODELS_HELD = 2  # per process
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_FAULT = 400  # characters: a result stays under 1 kB


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process needs before its first band: the model by folder and hash, and to be as `facts` says."""

    model: Path
    model_hash: str
    device: str  # "cpu" | "cuda:0" | ...
    threads: int  # per call of the net
    facts: Facts


@dataclass(frozen=True, slots=True)
class BandJob:
    """The bands of one scan, by ids and paths."""

    setup: Setup
    plan: Plan
    roll: Path | str  # path or URL
    lines: int
    grows: bool  # the roll is not closed: its first `lines` lines are meant
    mask: Path | None  # a folder of its own, where the mask does not lie beside the image
    receipts: Path
    begun: Path | None  # where a band is noted before its work; only where its death is that of the scan
    session: str  # of one call of the scan: what a process holds open is never that of an earlier one


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a band was not scanned, in one line."""

    text: str
    final: bool = False  # the others would fail as it did
    refusal: int | None = None  # the exit code, where this worker may not take part at all


def scan_one(job: BandJob, band: Band) -> Fault | None:
    """Scan a band that has no receipt and commit it, or say what is wrong with it.

    Returned and not raised: what a Dask worker raises is tried again, on whichever worker.
    """
    try:
        engine = ready(job.setup, _worker())
    except UserError as fault:
        return Fault(str(fault)[:MAX_FAULT], True, fault.exit_code)
    if receipt_path(job.receipts, band[0]).is_file():
        return None  # committed, and the answer was lost with the worker
    try:
        roll, label = _opened(job)
        if job.begun is not None:
            with disk_errors(job.begun), job.begun.open("a") as file:
                file.write(f"{band[0]}\n")
        scan_band(job.plan, roll, engine, *band, label, job.receipts)
    except UserError as fault:
        cause = fault.__cause__
        return Fault(str(fault)[:MAX_FAULT], isinstance(cause, OSError) and cause.errno in FULL)
    return None


def probe(setup: Setup, plan: Plan, roll: Roll, band: Band) -> tuple[float, int]:
    """Seconds that scanning a band takes here, and bytes of its mask and receipt; nothing is written."""
    engine = ready(setup, _worker())
    scanned = scan_lines(plan, roll, engine, *band)
    mask = pa.Codec("zstd", compression_level=1).compress(scanned.mask)
    receipt = json.dumps([scanned.components.to_json(), [asdict(row) for row in scanned.rows]])
    return sum(scanned.seconds.values()), len(mask) + len(receipt)


def ready(setup: Setup, worker: str | None = None) -> Engine:
    """The engine that this process runs; opened and checked at the first call, held for the next ones.

    Raises UserError, which names the worker, where this process differs in what decides the result or sees
    another model.
    """
    with _lock:
        try:
            return _engine(setup)
        except UserError as fault:
            where = f"worker {worker}: " if worker else ""
            raise UserError(f"{where}{fault}", fault.exit_code) from None


@lru_cache(MODELS_HELD)
def _engine(setup: Setup) -> Engine:
    facts = facts_here(setup.facts.engine, setup.device)
    if differences := facts.differences(setup.facts):
        raise UserError(f"{differences}: install the same as the others have", CONFIG)
    model = open_model(str(setup.model), setup.model)
    if model.hash != setup.model_hash:
        raise UserError(
            f"the model in {setup.model} is {model.hash[:12]}, needed {setup.model_hash[:12]}: "
            "all workers must see the same model there",
            CONFIG,
        )
    return open_engine(model, facts.engine, setup.threads, setup.device)[1]


_lock = threading.Lock()  # two threads that begin at once load one model


@lru_cache(4)
def _opened(job: BandJob) -> tuple[Roll, LabelWriter]:
    roll = open_roll(job.roll, live=job.grows)
    if job.grows:
        roll = roll.at(job.lines)
    return roll, LabelWriter.open(job.roll, job.plan.run_id, folder=job.mask)


def facts_report(engine: str, device: str) -> dict[str, str]:
    """The facts of this process as plain text, so that another version can read them too."""
    return asdict(facts_here(engine, device))


def _worker() -> str | None:
    """The address of the Dask worker that runs this, if one does."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return str(get_worker().address)
    except ValueError:
        return None
