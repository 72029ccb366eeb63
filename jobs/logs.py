"""The log: one JSON object per line, for whatever collects logs. It is the ledger's events as they happen.

Every change of state is an event, written with that change. Once its transaction is committed it is a line
here too, with roll, run, slot and job where they are known; what is rolled back never was, and is no line.
Files are opened to append, so processes may share one; to rotate, logrotate's `copytruncate` does. A log that
cannot be written any more, as on a full disk, is told of once on stderr and stops nothing.
"""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import structlog
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.jobs.ledger.schema import Event, Run, Slot
from sqlalchemy import event
from sqlalchemy.orm import Session
from sqlalchemy.orm.util import identity_key

LOG_VARIABLE = "ROLLSIGHT_LOG"
STDERR = "-"
_PENDING = "rollsight_log"  # key of a session's info
_WARNING = ("retry", "lost", "out", "low", "skipped", "again", "partial")
_ERROR = ("failed", "dead", "gone")


def log_events(where: str, **bound: Any) -> Callable[[], None]:
    """From now on write the events of this process to `where`, a file or - for stderr, each with `bound`.

    Returns what ends it. UserError 78 where the file cannot be written.
    """
    file = _opened(where)
    logger = structlog.wrap_logger(
        structlog.WriteLogger(file),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
    ).bind(**bound)

    lost = False  # it was told that lines are lost

    def collect(session: Session, *_: Any) -> None:
        lines = session.info.setdefault(_PENDING, [])
        lines += [_facts(session, row) for row in session.new if isinstance(row, Event)]

    def write(session: Session) -> None:
        nonlocal lost
        for facts in session.info.pop(_PENDING, ()):
            verb = facts["event"].rpartition(".")[2]
            level = "error" if verb in _ERROR else "warning" if verb in _WARNING else "info"
            try:
                getattr(logger, level)(**facts)
            except (OSError, ValueError) as fault:  # what it tells of is committed: the work goes on
                if not lost:
                    lost = True
                    _tell_lost(where, fault)

    def forget(session: Session) -> None:
        session.info.pop(_PENDING, None)

    listeners = (("before_flush", collect), ("after_commit", write), ("after_rollback", forget))
    for name, listener in listeners:
        event.listen(Session, name, listener)

    def end() -> None:
        for name, listener in listeners:
            event.remove(Session, name, listener)
        if file is not sys.stderr:
            with contextlib.suppress(OSError):  # told of where a line was lost
                file.close()

    return end


def _facts(session: Session, row: Event) -> dict[str, Any]:
    """An event as a line; run and job from rows that the session holds, without asking the database."""
    run = session.identity_map.get(identity_key(Run, row.run_key)) if row.run_key is not None else None
    slot = session.identity_map.get(identity_key(Slot, row.slot_id)) if row.slot_id is not None else None
    facts = {
        "timestamp": row.at.isoformat(),
        "event": row.kind,
        "roll": row.roll_id or (run.roll_id if run is not None else None),
        "run_id": run.run_id if run is not None else None,
        "run": row.run_key,
        "slot": row.slot_id,
        "job": slot.job if slot is not None else None,
        "owner": row.owner,
        "token": row.token,
        "detail": row.detail,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _tell_lost(where: str, fault: Exception) -> None:
    told = fault.strerror if isinstance(fault, OSError) else str(fault)
    with contextlib.suppress(OSError, ValueError):  # a stderr that is closed or full
        print(f"log {where}: {told}: lines are lost; the ledger has all of them", file=sys.stderr)


def _opened(where: str) -> TextIO:
    if where == STDERR:
        return sys.stderr
    try:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        # Nothing is kept in a buffer: what a full disk refuses is not tried again at close or at exit.
        raw: Any = io.FileIO(where, "a")  # a raw file will do where all is written through
        return io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
    except OSError as error:
        raise UserError(f"log {where}: {error.strerror}: name a file that may be written", CONFIG) from None
