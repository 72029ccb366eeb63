"""Alerts on their way out: written with the change that they tell of, sent later by `alerts.py`."""

from collections.abc import Sequence
from datetime import datetime

from rollsight.jobs.ledger.schema import Alert, Run
from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

HELD_BACK = ("HOLD", "BLOCK", "BLOCKED")  # verdicts that a person is told of at once


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
        "subject": subject.replace("\0", "?"),  # which PostgreSQL takes in no text
        "body": (body or subject).replace("\0", "?"),
        "roll_id": None if roll_id is None else roll_id[:64],
        "created_at": now,
        "attempts": 0,
    }
    return inserted(session, Alert, row)


def put_held_back(session: Session, now: datetime, run: Run, reasons: Sequence[str]) -> None:
    """Put the alert of a run that is done and whose verdict holds the roll back, once for each such run."""
    if run.verdict not in HELD_BACK:
        return
    kind = "hold" if run.verdict == "HOLD" else "blocked"
    put_alert(
        session,
        now,
        f"{kind}:{run.roll_id}:{run.run_id}:{run.rescan}:{run.closed_at.isoformat()}",
        kind,
        f"roll {run.roll_id} is on {run.verdict}: {reasons[0] if reasons else 'no reason is told'}",
        "\n".join([*reasons, f"Page: {run.folder}/report.html"]),
        roll_id=run.roll_id,
    )


def inserted(session: Session, table: type, row: dict[str, object]) -> bool:
    """Insert the row unless a unique constraint says that it is there; whether it was new."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    statement: Insert = dialect.insert(table).values(**row).on_conflict_do_nothing()
    return bool(session.execute(statement.returning(table.id)).first())  # type: ignore[attr-defined]
