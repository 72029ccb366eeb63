"""When a job last had success: what its lateness, the status, the metrics and the morning page go by."""

from datetime import datetime

from rollsight.jobs.ledger.schema import Slot
from sqlalchemy import func, select
from sqlalchemy.orm import Session

# A slot with `ended_at` in one of these was worked through; what it left has retries or alerts of its own.
SUCCESS = ("done", "partial", "retry", "running")


def last_success(session: Session) -> dict[str, datetime]:
    """Job -> when the last of its slots ended that was worked through; a job without one is left out."""
    rows = session.execute(
        select(Slot.job, func.max(Slot.ended_at)).where(Slot.state.in_(SUCCESS)).group_by(Slot.job)
    )
    return {job: at for job, at in rows if at is not None}
