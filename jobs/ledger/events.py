"""What happened, in order."""

from datetime import datetime

from rollsight.jobs.ledger.schema import Event
from sqlalchemy.orm import Session


def add_event(
    session: Session,
    at: datetime,
    kind: str,
    *,
    slot_id: int | None = None,
    run_key: int | None = None,
    roll_id: str | None = None,
    owner: str | None = None,
    token: int | None = None,
    detail: str | None = None,
) -> None:
    """Append an event; its kinds stand with the table."""
    session.add(
        Event(
            at=at,
            kind=kind,
            slot_id=slot_id,
            run_key=run_key,
            roll_id=roll_id,
            owner=owner,
            token=token,
            detail=detail,
        )
    )
