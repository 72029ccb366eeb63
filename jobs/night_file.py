"""night.json: what became of a night, written from the ledger, so that it is the same after any kill."""

import json
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rollsight.inspect.rolls import write_durably
from rollsight.jobs.due import NEVER, Due
from rollsight.jobs.ledger.schema import Run, Slot
from rollsight.jobs.sites import Site
from rollsight.jobs.stability import STABILITY_FILE
from sqlalchemy import select

NIGHT_FILE = "night.json"


def report_of(site: Site, slot: Slot) -> str:
    """Where night.json of a slot lies, by the date of the plant's zone, relative to the plant folder."""
    day = slot.scheduled_for.astimezone(site.line.zone_of(None)).date()
    return f"runs/{day.isoformat()}/{NIGHT_FILE}"


def made_file(report: str, slot: Slot) -> str:
    """Where it stands what the slot of a job that inspects nothing has made: beside its night.json."""
    name = f"made-{slot.job}-{slot.scheduled_for:%Y-%m-%dT%H%MZ}.json"
    return Path(report).with_name(name).as_posix()


def write_night(site: Site, report: str, due: Due | None = None) -> dict[str, Any]:
    """Write night.json from the ledger: all slots of that date with the rolls they worked on."""
    with site.ledger.read() as session:
        slots = session.scalars(select(Slot).where(Slot.report == report).order_by(Slot.scheduled_for)).all()
        runs = session.scalars(
            select(Run)
            .where(Run.slot_id.in_([slot.id for slot in slots]))
            .order_by(Run.priority.desc(), Run.closed_at)
        ).all()
        told: dict[str, Any] = {
            "schema": 1,
            "date": Path(report).parent.name,
            "zone": site.line.zone,
            "slots": [_slot(slot) | {"made": _made(site, report, slot)} for slot in slots],
            "counts": dict(Counter(run.state for run in runs)),
            "rolls": [_roll(run) for run in runs],
        }
    if due is not None:
        told["plant"] = {key: value for key, value in asdict(due).items() if key != "made"}
    path = site.plant.home / report
    if due is None and path.is_file():  # what the plant held was told by the night that looked
        told |= {key: value for key, value in json.loads(path.read_bytes()).items() if key == "plant"}
    path.parent.mkdir(parents=True, exist_ok=True)
    stability = path.with_name(STABILITY_FILE)
    told["stability"] = json.loads(stability.read_bytes()) if stability.is_file() else None
    write_durably(path, json.dumps(told, indent=1).encode())
    return told


def _made(site: Site, report: str, slot: Slot) -> Any:
    path = site.plant.home / made_file(report, slot)
    return json.loads(path.read_bytes()) if path.is_file() else None


def _slot(slot: Slot) -> dict[str, Any]:
    return {
        "job": slot.job,
        "scheduled_for": slot.scheduled_for.isoformat(),
        "started_at": _iso(slot.started_at),
        "ended_at": _iso(slot.ended_at),
        "state": slot.state,
        "exit_code": slot.exit_code,
        "error": slot.error,
    }


def _roll(run: Run) -> dict[str, Any]:
    return {
        "roll_id": run.roll_id,
        "state": run.state,
        "run_id": run.run_id,
        "closed_at": None if run.closed_at == NEVER else run.closed_at.isoformat(),
        "model": run.model,
        "rules": run.rules,
        "attempt": run.attempt,
        "verdict": run.verdict,
        "coverage": run.coverage,
        "length_m": run.length_m,
        "defects": run.defects,
        "by_class": None if run.by_class is None else json.loads(run.by_class),
        "seconds": run.seconds,
        "error": run.error,
        "page": f"{run.folder}/report.html" if run.state == "done" else None,
    }


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
