"""Who does what: leases that end by themselves, and tokens that shut out whoever lost one.

A slot or a run is claimed in one transaction: on SQLite under BEGIN IMMEDIATE, on PostgreSQL by a row that
others skip (FOR UPDATE SKIP LOCKED). Each claim raises the row's fencing token, and every later write of the
holder is an UPDATE that asks for its own token: after a lease was taken over it changes no row, and raises
LeaseLostError.
"""

import os
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
from rollsight.inspect.errors import CONFIG, LOCKED, USAGE
from rollsight.jobs.ledger.database import Ledger
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Run, Slot
from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

LEASE_S = 180.0
HEARTBEAT_S = 30.0
MAX_ATTEMPTS = 5
FIRST_RETRY_S, LAST_RETRY_S = 60.0, 1800.0  # the bound of the wait doubles from the one to the other
NOT_TRIED_AGAIN = (CONFIG, USAGE)  # exit codes of faults that no waiting cures

Row = Slot | Run
Kind = TypeVar("Kind", Slot, Run)


class LeaseLostError(Exception):
    """The lease ran out and another process took over: whatever this one still holds is not written."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one row, as long as its token is the row's."""

    table: type[Slot] | type[Run]
    id: int
    token: int
    owner: str

    @property
    def what(self) -> str:
        return self.table.__tablename__


def this_process() -> str:
    """host:space/pid/start: a pid alone comes back after a while, and is another one in a container."""
    pid = os.getpid()
    return f"{_host()}/{pid}/{_start_of(pid)}"


def is_gone(owner: str) -> bool:
    """Whether the process of a lease ran on this machine and is no more; its lease need not be waited for.

    Clones and containers may share a host name, and the first space has one number on every Linux; a boot is
    of one machine alone. The lease of a process under another boot is waited for.
    """
    host, _, start = owner.rpartition("/")
    host, _, pid = host.rpartition("/")
    if host != _host() or _boot_in(start) != _boot_in(_start_of(os.getpid())) or not pid.isdecimal():
        return False
    try:
        return _start_of(int(pid)) != start or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def claim(
    session: Session,
    table: type[Kind],
    now: datetime,
    owner: str,
    *,
    where: Sequence[ColumnElement[bool]] = (),
    early: bool = False,
    lease_s: float = LEASE_S,
) -> Kind | None:
    """Take the next row that is due, by priority, then age; None where there is none.

    Due is what was never begun, a retry whose time has come (`early`: or not), and what another process let
    its lease run out on. That counts as a failed attempt, and the fifth one ends as a dead letter.
    """
    while True:
        row = _next(session, table, now, where, early=early)
        if row is None:
            return None
        if row.state == "running":
            row.attempt += 1
            row.error = f"{row.lease_owner} died or lost its lease"
            _tell(session, now, row, "lost", owner, row.error)
            if row.attempt >= MAX_ATTEMPTS:
                row.state, row.ended_at = "dead", now
                row.fencing_token += 1
                _bury(session, now, row, owner)
                continue
        row.state = "running"
        row.fencing_token += 1
        row.lease_owner, row.lease_until, row.heartbeat_at = owner, now + timedelta(seconds=lease_s), now
        row.not_before = row.exit_code = None
        if isinstance(row, Run):
            row.ended_at = None  # a slot keeps it: when it was worked through, before what is tried again
        row.started_at = row.started_at or now
        _tell(session, now, row, "claimed", owner)
        session.flush()
        return row


def lease_of(row: Row) -> Lease:
    """The lease on a row just claimed."""
    return Lease(type(row), row.id, row.fencing_token, row.lease_owner or "")


def held_by(ledger: Ledger, owner: str) -> list[Lease]:
    """What a process holds, slots before runs."""
    held: list[Lease] = []
    with ledger.read() as session:
        for table in (Slot, Run):
            rows = session.execute(
                select(table.id, table.fencing_token).where(
                    table.state == "running", table.lease_owner == owner
                )
            )
            held += [Lease(table, key, token, owner) for key, token in rows]
    return held


def renew(session: Session, lease: Lease, now: datetime, lease_s: float = LEASE_S) -> None:
    """Go on holding; LeaseLostError where another process took over."""
    _guarded(session, lease, lease_until=now + timedelta(seconds=lease_s), heartbeat_at=now)


def note(session: Session, lease: Lease, **columns: Any) -> None:
    """Write facts of the work under way; LeaseLostError where another process took over."""
    _guarded(session, lease, **columns)


def release(session: Session, lease: Lease, now: datetime) -> None:
    """Give the row back undone, without an attempt counted: this process was told to stop."""
    _guarded(session, lease, state="due", lease_owner=None, lease_until=None, heartbeat_at=None)
    add_event(session, now, f"{lease.what}.again", **_subject(session, lease), detail="stopped in order")


def finish(session: Session, lease: Lease, now: datetime, state: str, **columns: Any) -> bool:
    """End the work with `state`; whether this call did it.

    False where the same end was written before: the database was lost while it said so, and it is said
    again. LeaseLostError where another process took over.
    """
    ended = {"lease_owner": None, "lease_until": None, "heartbeat_at": None, "ended_at": now}
    try:
        _guarded(session, lease, state=state, **(ended | columns))
    except LeaseLostError:
        row = cast(Row | None, session.get(lease.table, lease.id))
        if row is not None and (row.fencing_token, row.state) == (lease.token, state):
            return False
        raise
    add_event(session, now, f"{lease.what}.{state}", **_subject(session, lease), detail=columns.get("error"))
    return True


def fail(
    session: Session, lease: Lease, now: datetime, error: str, exit_code: int, draw: random.Random
) -> str:
    """End a failed attempt: the state is then retry, dead after five of them, or failed where no retry helps.

    Where something else was at work on it (exit code 75) the attempt does not count, however often.
    The wait is drawn evenly between nothing and a bound that doubles from 1 to 30 minutes: full jitter
    (M. Brooker, Exponential backoff and jitter, AWS architecture blog, 2015), so that what failed together
    does not come back together.
    """
    row = cast(Row | None, session.get(lease.table, lease.id))
    if row is None or row.fencing_token != lease.token or row.state != "running":
        raise LeaseLostError(f"{lease.what} {lease.id} was taken over")
    attempt = row.attempt + (exit_code != LOCKED)
    columns: dict[str, Any] = {"attempt": attempt, "error": error, "exit_code": exit_code}
    if exit_code in NOT_TRIED_AGAIN:
        state = "failed"
    elif attempt >= MAX_ATTEMPTS:
        state = "dead"
    else:
        state = "retry"
        columns |= {"ended_at": None, "not_before": now + timedelta(seconds=wait_s(attempt, draw))}
    finish(session, lease, now, state, **columns)
    if state == "dead":
        session.refresh(row)
        _bury(session, now, row, lease.owner)
    return state


def wait_s(attempt: int, draw: random.Random) -> float:
    """How long to wait after that many failures, in seconds."""
    return draw.uniform(0, min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** max(0, attempt - 1)))


def _next(
    session: Session,
    table: type[Kind],
    now: datetime,
    where: Sequence[ColumnElement[bool]],
    *,
    early: bool,
) -> Kind | None:
    holders = session.scalars(
        select(table.lease_owner).where(table.state == "running", table.lease_owner.is_not(None)).distinct()
    )
    gone = [holder for holder in holders if holder is not None and is_gone(holder)]
    retry: ColumnElement[bool] = table.state == "retry"
    if not early:
        retry = and_(retry, or_(table.not_before.is_(None), table.not_before <= now))
    lapsed = or_(table.lease_until.is_(None), table.lease_until < now, table.lease_owner.in_(gone))
    due = or_(table.state == "due", retry, and_(table.state == "running", lapsed))
    age = Slot.scheduled_for if table is Slot else Run.closed_at
    return session.scalars(
        select(table)
        .where(due, *where)
        .order_by(table.priority.desc(), age, table.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).first()


def _guarded(session: Session, lease: Lease, **columns: Any) -> None:
    table = lease.table
    held = (table.id == lease.id, table.fencing_token == lease.token, table.state == "running")
    changed = session.execute(
        update(table).where(*held).values(**columns).execution_options(synchronize_session="fetch")
    )
    if changed.rowcount != 1:  # type: ignore[attr-defined]  # of an UPDATE it is there
        raise LeaseLostError(f"{lease.what} {lease.id} was taken over")


def _bury(session: Session, now: datetime, row: Row, owner: str) -> None:
    """A dead letter: told once."""
    if isinstance(row, Slot):
        what, roll_id = f"job {row.job} of {row.scheduled_for:%Y-%m-%d %H:%M} UTC", None
    else:
        what, roll_id = f"roll {row.roll_id}", row.roll_id
    _tell(session, now, row, "dead", owner, row.error)
    put_alert(
        session,
        now,
        f"dead:{row.__tablename__}:{row.id}:{row.fencing_token}",
        "dead",
        f"{what}: given up after {row.attempt} attempts",
        f"The last one ended with: {row.error}\nWhen the cause is gone: inspect jobs retry",
        roll_id=roll_id,
    )


def _tell(
    session: Session, now: datetime, row: Row, verb: str, owner: str, detail: str | None = None
) -> None:
    kind = f"{row.__tablename__}.{verb}"
    subject: dict[str, Any] = {"slot_id": row.id} if isinstance(row, Slot) else _of_run(row)
    add_event(session, now, kind, **subject, owner=owner, token=row.fencing_token, detail=detail)


def _of_run(row: Run) -> dict[str, Any]:
    return {"run_key": row.id, "slot_id": row.slot_id, "roll_id": row.roll_id}


def _subject(session: Session, lease: Lease) -> dict[str, Any]:
    row = cast(Row, session.get_one(lease.table, lease.id))
    about = {"slot_id": row.id} if isinstance(row, Slot) else _of_run(row)
    return {**about, "owner": lease.owner, "token": lease.token}


def _host() -> str:
    """This machine, and the space in which its process ids count (Linux: containers have their own)."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 (a link that is no path)
    except OSError:
        space = 0
    return f"{socket.gethostname()}:{space}"


def _boot_in(start: str) -> str:
    """The boot that a start counts from; "" where it counts seconds."""
    return start.rpartition(":")[0]


def _start_of(pid: int) -> str:
    """When a process began, as no step of the clock moves it: boot and ticks since (Linux), else seconds.

    psutil adds the time of the boot, which a step of the clock moves: every live lease then looked dead.
    Raises psutil.NoSuchProcess.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        told = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        raise psutil.NoSuchProcess(pid) from None
    except OSError:
        return f"{psutil.Process(pid).create_time():.2f}"
    return f"{boot}:{told.rpartition(')')[2].split()[19]}"  # proc_pid_stat(5): field 22, starttime
