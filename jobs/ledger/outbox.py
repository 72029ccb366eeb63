"""Alerts on their way out: written with the change that they tell of, sent later by `alerts.py`."""

from datetime import datetime

from rollsight.jobs.ledger.schema import Alert
from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session


def put_alert(
    session: Session,
    now: datetime,
    key: str,
    kind: str,
    subject: str,
    body: str = "",
    *,
    roll_id: str | None = None,
) -> bool:
    """Put an alert into the outbox, unless one of this key was put there before; whether it is new."""
    row: dict[str, object] = {
        "dedupe_key": key[:200],
        "kind": kind,
        "subject": subject,
        "body": body or subject,
        "roll_id": roll_id,
        "created_at": now,
        "attempts": 0,
    }
    return inserted(session, Alert, row)


def inserted(session: Session, table: type, row: dict[str, object]) -> bool:
    """Insert the row unless a unique constraint says that it is there; whether it was new."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    statement: Insert = dialect.insert(table).values(**row).on_conflict_do_nothing()
    return bool(session.execute(statement.returning(table.id)).first())  # type: ignore[attr-defined]
