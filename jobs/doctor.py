"""Receipts on disk and the ledger held against each other, both ways; what can be put right is.

Receipts are the truth of what was scanned: a finished run that the ledger does not know is written into it, a
band too. What the ledger says is done and the disk does not hold is due again. Nothing on disk is changed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import UserError
from rollsight.inspect.models import Model, model_names
from rollsight.inspect.roll_state import last_written
from rollsight.jobs.due import NEVER, closed_or_never
from rollsight.jobs.ledger.bands import receipts_in, record_bands
from rollsight.jobs.ledger.claims import is_gone
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import put_held_back
from rollsight.jobs.ledger.schema import Artifact, Band, Run, Slot
from rollsight.jobs.sites import Site
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

TOLD_FOR_S = 2 * 86400.0  # a run that ended longer ago is adopted without an alert


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference, and whether it was put right."""

    kind: str  # of the event: doctor.KIND
    roll_id: str
    run_id: str
    told: str
    mended: bool


def examine(site: Site, *, mend: bool = True) -> list[Finding]:
    """All differences; with `mend` those that can be put right are, each in a transaction of its own."""
    found: list[Finding] = []
    folders = {folder.name: folder for folder in run_folders(site.plant.home / "runs")}
    with site.ledger.read() as session:
        runs = {row.run_id: row for row in session.scalars(select(Run)) if row.run_id is not None}
        bands = dict(iter(session.execute(select(Band.run_id, func.count()).group_by(Band.run_id))))
        # What retention took away is missing by right.
        kept_no_more = set(session.scalars(select(Artifact.run_id).where(Artifact.deleted_at.is_not(None))))
        session.expunge_all()
    for run_id, folder in sorted(folders.items(), key=lambda item: str(item[1])):
        found += _on_disk(site, folder, runs.get(run_id), bands.get(run_id, 0), mend, run_id in kept_no_more)
    for run_id, row in sorted(runs.items()):
        if row.state == "done" and run_id not in folders and run_id not in kept_no_more:
            found.append(_vanished(site, row, mend))
    known = {run_id for run_id, row in runs.items() if row.state == "done"} | folders.keys()
    found += [_orphan(site, run_id, count, mend) for run_id, count in bands.items() if run_id not in known]
    found += _held_by_nobody(site, mend)
    return found


def run_folders(runs: Path) -> Iterator[Path]:
    """The folders of all runs begun: runs/<roll>/<run_id> with a plan."""
    return (path.parent for path in runs.glob("*/*/plan.json"))


def is_finished(folder: Path) -> bool:
    """Whether the run was finished: its page is the last thing that a scan writes."""
    return (folder / "report.html").is_file() and (folder / "summary.json").is_file()


def _on_disk(
    site: Site, folder: Path, row: Run | None, recorded: int, mend: bool, pruned: bool
) -> list[Finding]:
    roll_id, run_id = folder.parent.name, folder.name
    found: list[Finding] = []
    receipts = sum(1 for _ in receipts_in(folder))
    if is_finished(folder) and (row is None or row.state not in ("done", "running")):
        told = (
            "finished on disk, unknown to the ledger"
            if row is None
            else f"finished on disk, {row.state} in the ledger"
        )
        did = mend and _adopt(site, folder, row)
        return [Finding("adopted", roll_id, run_id, told, did)]
    if pruned:
        return []
    if row is not None and row.state == "done" and not is_finished(folder):
        found.append(_vanished(site, row, mend))
    elif receipts > recorded:
        if mend:
            site.ledger.keep(lambda session: record_bands(session, folder, roll_id, site.clock()))
        told = f"{receipts} receipts on disk, {recorded} bands in the ledger"
        found.append(Finding("bands", roll_id, run_id, told, mend))
    elif receipts < recorded:
        if mend:
            site.ledger.keep(lambda session: _recount(site, session, folder, roll_id))
        told = f"{receipts} receipts on disk, {recorded} bands in the ledger: the others are struck out"
        found.append(Finding("bands", roll_id, run_id, told, mend))
    return found


def _adopt(site: Site, folder: Path, row: Run | None) -> bool:
    """Write a run finished on disk into the ledger; False where it cannot be said of which roll it is."""
    try:
        told: dict[str, Any] = json.loads((folder / "summary.json").read_bytes())
        plan = json.loads((folder / "plan.json").read_bytes())
        model_hash = str(plan["model_hash"])
        facts = {
            "folder": site.relative(folder),
            "code": told["code_version"],
            "line_id": told["line_id"],
            "lines": told["lines"],
            "length_m": told["length_m"],
            "width_mm": told["width_mm"],
            "coverage": told["coverage"],
            "verdict": told["verdict"],
            "reasons": json.dumps(told["reasons"]),
            "defects": told["defects"],
            "by_class": json.dumps(told["by_class"]),
            "seconds": told["seconds"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return False
    closed_at = closed_or_never(site.plant.roll_path(folder.parent.name)) if row is None else row.closed_at
    ended = (folder / "report.html").stat().st_mtime
    if closed_at == NEVER or ended < closed_at.timestamp():
        return False  # the roll is gone, or was made again since: what was found is not of it

    def adopt(session: Session) -> None:
        now = site.clock()
        known = None if row is None else session.get(Run, row.id)
        if known is None:
            same = (
                Run.roll_id == folder.parent.name,
                Run.closed_at == closed_at,
                Run.model_hash == model_hash,
                Run.rules_hash == "",
            )
            known = session.scalars(select(Run).where(*same).order_by(Run.rescan.desc())).first()
        if known is None:
            known = Run(
                roll_id=folder.parent.name,
                closed_at=closed_at,
                model=_model_name(site, model_hash),
                model_hash=model_hash,
                created_at=now,
                state="due",
            )
            session.add(known)
        elif known.state == "done":
            return  # by other code, and read since; both stay on disk
        for name, value in facts.items():
            setattr(known, name, value)
        known.run_id, known.state, known.ended_at, known.error = folder.name, "done", now, None
        known.started_at, known.exit_code, known.lease_owner = known.started_at or now, 0, None
        session.flush()
        record_bands(session, folder, known.roll_id, now)
        if now.timestamp() - ended < TOLD_FOR_S:  # not a flood of old ones where a ledger was lost
            put_held_back(session, now, known, told["reasons"])
        add_event(session, now, "doctor.adopted", run_key=known.id, roll_id=known.roll_id, detail=folder.name)

    site.ledger.keep(adopt)
    return True


def _model_name(site: Site, model_hash: str) -> str:
    """The name of the model with this hash; the hash itself where the plant has it no more."""
    for name in model_names(site.plant.models):
        try:
            model: Model = site.plant.model(name)
        except UserError:
            continue
        if model.hash == model_hash:
            return name
    return model_hash


def _vanished(site: Site, row: Run, mend: bool) -> Finding:
    """Done in the ledger, and not finished on disk: due again, if the roll is still there."""
    roll_is_there = last_written(site.plant.roll_path(row.roll_id)) is not None
    run_id = row.run_id or ""

    def again(session: Session) -> None:
        known = session.get_one(Run, row.id)
        known.state, known.attempt, known.ended_at = "due", 0, None
        add_event(session, site.clock(), "run.again", run_key=row.id, roll_id=row.roll_id, detail="doctor")

    if mend and roll_is_there:
        site.ledger.keep(again)
    told = "done in the ledger, not on disk" + (": due again" if roll_is_there else ", and its roll is gone")
    return Finding("vanished", row.roll_id, run_id, told, mend and roll_is_there)


def _recount(site: Site, session: Session, folder: Path, roll_id: str) -> None:
    session.execute(delete(Band).where(Band.run_id == folder.name))
    record_bands(session, folder, roll_id, site.clock())
    add_event(session, site.clock(), "doctor.bands", roll_id=roll_id, detail=folder.name)


def _orphan(site: Site, run_id: str, count: int, mend: bool) -> Finding:
    """Bands of a run that is neither on disk nor done in the ledger."""
    if mend:
        site.ledger.keep(lambda session: session.execute(delete(Band).where(Band.run_id == run_id)))
    return Finding("bands", "", run_id, f"{count} bands in the ledger of a run that is not on disk", mend)


def _held_by_nobody(site: Site, mend: bool) -> list[Finding]:
    """Runs and slots of processes that died on this machine; the next tick takes them over by itself."""
    with site.ledger.read() as session:
        runs = session.scalars(select(Run).where(Run.state == "running")).all()
        slots = session.scalars(select(Slot).where(Slot.state == "running")).all()
        held = [(run.roll_id, run.run_id or "", run.lease_owner) for run in runs]
        held += [(slot.job, "", slot.lease_owner) for slot in slots]
    return [
        Finding("held", what, run_id, f"held by {owner}, which died: the next night goes on with it", False)
        for what, run_id, owner in held
        if owner is not None and is_gone(owner)
    ]
