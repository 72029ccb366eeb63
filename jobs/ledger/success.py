"""When a job last had success: what its lateness, the status, the metrics and the morning page go by."""

from datetime import datetime

from rollsight.jobs.ledger.schema import Event, Slot
from sqlalchemy import func, select
from sqlalchemy.orm import Session

# A slot with `ended_at` in one of these was worked through; what it left has retries or alerts of its own.
SUCCESS = ("done", "partial", "retry", "running")


def last_success(session: Session, by: datetime | None = None) -> dict[str, datetime]:
    """Job -> when the last of its slots ended that was worked through; a job without one is left out.

    by: what ended later does not count, since a clock that was ahead said when.
    """
    ended = (Slot.state.in_(SUCCESS), *(() if by is None else (Slot.ended_at <= by,)))
    rows = session.execute(select(Slot.job, func.max(Slot.ended_at)).where(*ended).group_by(Slot.job))
    return {job: at for job, at in rows if at is not None}


def first_seen(session: Session, job: str, by: datetime) -> datetime | None:
    """When a job of line.yaml was first ticked, by that moment; None where it never was."""
    seen = (Event.kind == "job.seen", Event.detail == job, Event.at <= by)
    return session.scalar(select(func.min(Event.at)).where(*seen))
