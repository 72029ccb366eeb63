"""Which rolls are due: closed, and not yet inspected with this model and these rules since they closed."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rollsight.inspect.errors import UserError
from rollsight.inspect.models import Model
from rollsight.inspect.plant import Plant
from rollsight.inspect.roll_state import last_written, strip_at
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import inserted, put_alert
from rollsight.jobs.ledger.schema import Run
from rollsight.jobs.sites import Site
from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

NEVER = datetime(1970, 1, 1, tzinfo=UTC)  # `closed_at` of a roll whose description is not there
AGAIN = {  # states of a run that is made due again where its roll is found as it was, and why
    "replaced": "its model and rules are those that hold once more",
    "gone": "the roll is there again",
}


def closed_or_never(path: Path) -> datetime:
    """When a roll was closed; NEVER where it does not say or cannot be read: its scan says why."""
    try:
        return last_written(path) or NEVER
    except UserError:
        return NEVER


def is_pattern(name: str) -> bool:
    """Whether it stands for rolls by pattern, not for one by its id."""
    return any(mark in name for mark in "*?[")


def matches(roll_id: str, pattern: str) -> bool:
    """Whether the id is that, or fits the pattern, such as CGL2-*."""
    return fnmatch.fnmatchcase(roll_id, pattern)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rolls of the plant are meant: by id or pattern, and by line."""

    rolls: tuple[str, ...] = ()  # ids and patterns such as CGL2-*; empty: all
    line: str | None = None
    since: datetime | None = None  # only rolls closed since; those that a night began before are ended anyway

    def takes(self, roll_id: str, line_id: str | None) -> bool:
        """Whether the roll is meant; one whose line cannot be read (None) is, so that someone tells of it."""
        if self.line is not None and line_id is not None and line_id != self.line:
            return False
        return not self.rolls or any(matches(roll_id, pattern) for pattern in self.rolls)

    def named(self) -> Iterator[str]:
        """The ids that are named outright: they must be there."""
        return (roll for roll in self.rolls if not is_pattern(roll))


@dataclass(frozen=True, slots=True)
class Job:
    """What to inspect and how, whoever asks for it: the model is opened, the rules are read."""

    name: str
    model: Model
    model_name: str  # as asked for
    rules: str | None = None
    rules_hash: str = ""
    selection: Selection = Selection()
    priority: int = 0
    workers: int = 0
    rescan: bool = False

    @property
    def matches(self) -> tuple[str, str]:
        return self.model.hash, self.rules_hash


@dataclass(frozen=True, slots=True)
class Due:
    """What a look at the plant found."""

    made: int  # runs that are new in the ledger
    known: int  # rolls that the ledger knows as they are, inspected or on their way
    growing: int  # rolls that are not closed yet
    missing: tuple[str, ...]  # rolls that are named but not there


@dataclass(frozen=True, slots=True)
class Found:
    """A closed roll, or one that cannot be read: the scan says why."""

    roll_id: str
    closed_at: datetime
    line_id: str | None  # "" of a roll of no line, which no line's job takes; None where it cannot be read


def find_due(site: Site, job: Job, slot_id: int | None, day: str) -> Due:
    """Write a run into the ledger for each roll that is due; `day` dates the alert of a missing roll.

    Only descriptions of rolls that the ledger does not know are read, so thousands of old ones cost a look at
    a file's time each.
    """
    with site.ledger.read() as session:
        known = _known(session, job)
    found: list[Found] = []
    old = growing = 0
    for roll_id in site.plant.roll_ids():
        if not _may_match(job.selection, roll_id):
            continue
        closed_at = closed_or_never(site.plant.roll_path(roll_id))
        if not job.rescan and (roll_id, closed_at) in known:
            old += 1
            continue
        if job.selection.since is not None and NEVER < closed_at < job.selection.since:
            continue
        roll = _closed(site.plant, roll_id, closed_at)
        if roll is None:
            growing += 1
        elif job.selection.takes(roll_id, roll.line_id):
            found.append(roll)
    there = set(site.plant.roll_ids())
    missing = tuple(roll for roll in job.selection.named() if roll not in there)
    now = site.clock()

    def put(session: Session) -> int:
        for roll_id in missing:
            put_alert(
                session,
                now,
                f"missing:{roll_id}:{job.name}:{day}",
                "missing",
                f"roll {roll_id} is not there",
                f"Job {job.name} of {day} names it, and {site.plant.rolls} does not hold it.",
                roll_id=roll_id,
            )
        _replace(session, job, now)
        return sum(_put(session, job, roll, slot_id, now) for roll in found)

    made = site.ledger.keep(put)
    return Due(made, old, growing, missing)


def _replace(session: Session, job: Job, now: datetime) -> None:
    """End what still waits for this job's model or rules as they were: no job would ever take it up."""
    waiting = select(Run).where(
        Run.model == job.model_name,
        Run.rules.is_(None) if job.rules is None else Run.rules == job.rules,
        or_(Run.model_hash != job.model.hash, Run.rules_hash != job.rules_hash),
        Run.state.in_(("due", "retry")),
    )
    for run in session.scalars(waiting.with_for_update(skip_locked=True)):
        if job.selection.takes(run.roll_id, run.line_id):
            run.state, run.ended_at = "replaced", now
            run.error = f"{job.model_name} or its rules are others now: the roll is due with them"
            add_event(session, now, "run.replaced", run_key=run.id, roll_id=run.roll_id, detail=run.error)


def _known(session: Session, job: Job) -> set[tuple[str, datetime]]:
    """The rolls that are inspected or on their way; what was replaced or gone is neither."""
    rows = session.execute(
        select(Run.roll_id, Run.closed_at).where(
            Run.model_hash == job.model.hash, Run.rules_hash == job.rules_hash, Run.state.not_in(AGAIN)
        )
    )
    return {(roll_id, closed_at) for roll_id, closed_at in rows}


def _may_match(selection: Selection, roll_id: str) -> bool:
    return selection.takes(roll_id, None)


def _closed(plant: Plant, roll_id: str, closed_at: datetime) -> Found | None:
    """The roll; None while it grows. One that cannot be read counts as closed: its scan says why."""
    try:
        strip = strip_at(plant.roll_path(roll_id))
    except UserError:
        return Found(roll_id, closed_at, None)
    return Found(roll_id, closed_at, strip.line_id or "") if strip.closed else None


def _put(session: Session, job: Job, roll: Found, slot_id: int | None, now: datetime) -> bool:
    """Make the run due unless it is there; with `rescan` once more, unless one still waits.

    One that was replaced or gone is due again.
    """
    same = (
        Run.roll_id == roll.roll_id,
        Run.closed_at == roll.closed_at,
        Run.model_hash == job.model.hash,
        Run.rules_hash == job.rules_hash,
    )
    rescan = 0
    if job.rescan:
        last = session.scalar(select(func.max(Run.rescan)).where(*same))
        waits = session.scalar(
            select(func.count()).select_from(Run).where(*same, Run.state.in_(("due", "running", "retry")))
        )
        if waits:
            return False
        rescan = 0 if last is None else last + 1
    row: dict[str, object] = {
        "roll_id": roll.roll_id,
        "closed_at": roll.closed_at,
        "line_id": roll.line_id,
        "model": job.model_name,
        "model_hash": job.model.hash,
        "rules": job.rules,
        "rules_hash": job.rules_hash,
        "rescan": rescan,
        "priority": job.priority,
        "slot_id": slot_id,
        "state": "due",
        "attempt": 0,
        "created_at": now,
    }
    if inserted(session, Run, row | {"fencing_token": 0}):
        add_event(session, now, "run.made", slot_id=slot_id, roll_id=roll.roll_id)
        return True
    for state, told in AGAIN.items():
        ended = (*same, Run.rescan == rescan, Run.state == state)
        again = update(Run).where(*ended).values(**row, not_before=None, ended_at=None, error=None)
        if (key := session.scalar(again.returning(Run.id))) is not None:
            add_event(
                session, now, "run.again", run_key=key, slot_id=slot_id, roll_id=roll.roll_id, detail=told
            )
            return True
    return False
