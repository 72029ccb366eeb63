"""The check before a night: a fixed reference strip, scanned anew, gives what it gave before.

In the spirit of VDI/VDE 2632 part 4.1: a surface inspection system proves its stability on reference pieces.
The first result with a model makes the band: counts per class and mean gray per lighting mode, each with a
tolerance from line.yaml. `reference_bands.json` in the plant folder keeps it; a person may change it there.
"""

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.roll_format import SUFFIX
from rollsight.inspect.rolls import Roll, open_roll, write_durably
from rollsight.jobs.cluster import Executor
from rollsight.jobs.due import Job
from rollsight.jobs.ledger.claims import LeaseLostError
from rollsight.jobs.ledger.database import LedgerAwayError
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Slot, Stability
from rollsight.jobs.scan_job import MASK, plan_roll, scan_roll
from rollsight.jobs.schedule import LineFile, StabilityCheck
from rollsight.jobs.sites import Site
from sqlalchemy import select
from sqlalchemy.orm import Session

BANDS_FILE = "reference_bands.json"
STABILITY_FILE = "stability.json"
SCRATCH = ".stability"  # in the plant folder: a folder for each check under way
LEFT_S = 86400.0  # what a check that was killed left there is removed after so long
LEAST_COUNT = 2  # a band of counts is at least this wide to each side
GRAY_LINES = 4096  # read at once

Figures = dict[str, dict[str, float]]  # {"counts": {class: n}, "gray": {mode: mean, 0 to 1}}
Bands = dict[str, dict[str, list[float]]]  # the same with [low, high]


def reference_path(plant: Plant, line: LineFile) -> Path:
    """Where the reference strip lies: beside the rolls, not among them."""
    return plant.home / f"{line.stability.roll}{SUFFIX}"


def forget_bands(plant: Plant) -> None:
    """The next result with each model makes a new band: the strip is another one."""
    (plant.home / BANDS_FILE).unlink(missing_ok=True)


def check_stability(
    site: Site, job: Job, slot_id: int, executor: Executor, check: Callable[[], None] | None = None
) -> dict[str, Any] | None:
    """Scan the reference strip and hold it against its band; None where the plant has no strip.

    The result goes to stability.json beside night.json and into the ledger, with an alert where a figure is
    out of its band or the check fails, and once where line.yaml says `stability:` and there is no strip. A
    night that is taken up again after a kill does not check twice. UserError 78 where the strip is required
    and not there or the bands cannot be read, 75 where the ledger stays away; LeaseLostError of `check`.
    """
    path = reference_path(site.plant, site.line)
    if not path.is_dir():
        if site.line.stability.required:
            raise UserError(
                f"no reference strip at {path}: make one with `inspect jobs reference`, or ingest one there",
                CONFIG,
            )
        if "stability" in site.line.model_fields_set:
            _tell_absent(site, path)
        return None
    with site.ledger.read() as session:
        if session.scalar(select(Stability.id).where(Stability.slot_id == slot_id)) is not None:
            return None
        report = session.get_one(Slot, slot_id).report
    assert report is not None, "run_night notes it first"
    read_bands(site.plant.home / BANDS_FILE)  # a person's mistake is told before the strip is scanned
    try:
        found = measure(site.plant, open_roll(path), job, executor, check)
        told = site.ledger.keep(lambda session: judge(site, session, job, path.stem, found, slot_id))
    except (LeaseLostError, LedgerAwayError):
        raise
    except Exception as fault:  # whatever it is, the night goes on: the rolls may be well
        error = str(fault) if isinstance(fault, UserError) else f"{type(fault).__name__}: {fault}"
        error, now = " ".join(error.split()), site.clock()
        subject = "the reference strip cannot be checked"
        site.ledger.keep(
            lambda session: put_alert(session, now, f"stability:{slot_id}", "stability", subject, error)
        )
        told = {"at": now.isoformat(), "in_band": False, "out": [f"{subject}: {error}"]}
    folder = (site.plant.home / report).parent
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / STABILITY_FILE, json.dumps(told, indent=1).encode())
    return told


def _tell_absent(site: Site, path: Path) -> None:
    now = site.clock()
    subject = f"no reference strip at {path.name}: nights are not checked"
    body = (
        f"line.yaml has `stability:`, and {path} is not there. Make one with `inspect jobs reference`, or "
        "take the key away. `required: true` lets no night begin without it."
    )
    site.ledger.keep(
        lambda session: put_alert(session, now, f"stability:absent:{path.stem}", "stability", subject, body)
    )


def measure(
    plant: Plant, roll: Roll, job: Job, executor: Executor, check: Callable[[], None] | None = None
) -> Figures:
    """Scan the strip anew, whatever was scanned before: its counts per class, its gray per mode.

    Several may be at work on one plant: each has a folder of its own, which is gone at the end.
    """

    def on_band(done: int, lines: int) -> None:
        if check is not None:
            check()

    with _scratch(plant) as scratch:
        planned = plan_roll(scratch, roll, job.model, executor)
        # Its mask lies in the run, not beside the image: that is what a folder of this name there says.
        (planned.folder / MASK).mkdir(parents=True)
        done = scan_roll(scratch, roll, job.model, executor, on_band=on_band)
    counts = {name: float(count) for name, count in done.summary["by_class"].items()}
    sums = np.zeros(roll.modes)
    for y0 in range(0, roll.lines, GRAY_LINES):
        sums += roll.read_unit(y0, min(y0 + GRAY_LINES, roll.lines)).sum(axis=(1, 2), dtype=np.float64)
    gray = sums / (roll.lines * roll.width)
    return {
        "counts": counts,
        "gray": {mode: round(float(mean), 6) for mode, mean in zip(roll.strip.lighting, gray, strict=True)},
    }


@contextlib.contextmanager
def _scratch(plant: Plant) -> Iterator[Plant]:
    """A plant folder for one scan; what killed ones left is swept on the way."""
    folder = plant.home / SCRATCH
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another check ended just now
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
    own = folder / uuid.uuid4().hex
    own.mkdir()
    try:
        yield Plant(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def judge(
    site: Site, session: Session, job: Job, roll_id: str, found: Figures, slot_id: int | None
) -> dict[str, Any]:
    """Hold what was found against the band of this model, which the first result makes; write both down."""
    now = site.clock()
    path = site.plant.home / BANDS_FILE
    kept = read_bands(path)
    key = f"{roll_id}:{job.model.hash}"
    is_baseline = key not in kept
    if is_baseline:
        kept[key] = bands_around(found, site.line.stability)
        write_durably(path, json.dumps(kept, indent=1).encode())
    bands = kept[key]
    out = outside(found, bands)
    row = {
        "roll_id": roll_id,
        "model": job.model_name,
        "model_hash": job.model.hash,
        "in_band": not out,
        "is_baseline": is_baseline,
    }
    session.add(
        Stability(
            at=now,
            slot_id=slot_id,
            counts=json.dumps(found["counts"]),
            gray=json.dumps(found["gray"]),
            bands=json.dumps(bands),
            out=json.dumps(out),
            **row,
        )
    )
    verb = "baseline" if is_baseline else "out" if out else "ok"
    add_event(
        session, now, f"stability.{verb}", slot_id=slot_id, roll_id=roll_id, detail="; ".join(out) or None
    )
    if out:
        put_alert(
            session,
            now,
            f"stability:{roll_id}:{slot_id if slot_id is not None else now.isoformat()}",
            "stability",
            f"stability out of band: {out[0]}" + (f" and {len(out) - 1} more" if len(out) > 1 else ""),
            "\n".join([*out, f"Reference strip {roll_id}, model {job.model_name}."]),
        )
    return {"at": now.isoformat(), **row, **found, "bands": bands, "out": out}


def bands_around(found: Figures, tolerance: StabilityCheck) -> Bands:
    """The band that a first result makes."""
    counts = {}
    for name, count in found["counts"].items():
        wide = max(LEAST_COUNT, count * tolerance.counts)
        counts[name] = [max(0.0, count - wide), count + wide]
    gray = {m: [v * (1 - tolerance.gray), v * (1 + tolerance.gray)] for m, v in found["gray"].items()}
    return {"counts": counts, "gray": gray}


def outside(found: Figures, bands: Bands) -> list[str]:
    """One line per figure that is out of its band, or has none."""
    lines = []
    for what in ("counts", "gray"):
        digits = 0 if what == "counts" else 4
        for name, value in found[what].items():
            low, high = bands[what].get(name, [0.0, 0.0])
            if not low <= value <= high:
                said = "defects" if what == "counts" else "mean gray"
                lines.append(f"{name}: {said} {value:.{digits}f}, band {low:.{digits}f} to {high:.{digits}f}")
    return lines


def read_bands(path: Path) -> dict[str, Bands]:
    """The bands kept so far; UserError 78 where a person's change cannot be read."""
    try:
        kept = json.loads(path.read_bytes())
        for bands in kept.values():
            for what in ("counts", "gray"):
                for low, high in bands[what].values():
                    float(low), float(high)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path} cannot be read: correct it, or take it away to begin with a new band", CONFIG
        ) from None
    return kept  # type: ignore[no-any-return]
