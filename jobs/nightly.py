"""A night: the reference strip first, then every roll that is due, each once; and what a person must be told.

The ledger says what is due and who does it, receipts on disk what is done. Killed at any moment, the next
night or tick goes on: a run that was at work is claimed again, its scan takes up the bands that are there,
and one that was finished but not written down is read, not repeated.
"""

import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import CONFIG, FAILED, LOCKED, PARTIAL, UserError
from rollsight.inspect.models import Model
from rollsight.inspect.rolls import Roll
from rollsight.jobs.cluster import Executor
from rollsight.jobs.due import NEVER, Due, Job, Selection, closed_or_never, find_due
from rollsight.jobs.executors import open_executor
from rollsight.jobs.ledger.claims import (
    Lease,
    LeaseLostError,
    claim,
    finish,
    lease_of,
    note,
    release,
)
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.heartbeat import Heartbeat
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Run, Slot
from rollsight.jobs.ledger.success import first_seen, last_success
from rollsight.jobs.live_job import LIVE_TABLE
from rollsight.jobs.night_file import report_of, write_night
from rollsight.jobs.roll_end import roll_done, roll_failed, roll_gone
from rollsight.jobs.scan_job import Planned, plan_roll, scan_roll
from rollsight.jobs.scan_job import Run as Scan
from rollsight.jobs.schedule import BY_HAND, rules_hash
from rollsight.jobs.schedule import Job as Entry
from rollsight.jobs.sites import Site
from rollsight.jobs.stability import check_stability
from sqlalchemy import select
from sqlalchemy.orm import Session

OPEN = ("due", "running", "retry")
MAX_ERROR = 2000  # characters of a fault that the ledger keeps
NAMED = 5  # missing rolls in the line of a night; the others are counted
DEADLINE = "the deadline"  # what a night tells begins so where it was cut short by that
DISK_RETRY = timedelta(minutes=30)

OnBand = Callable[[int, int], None]
OnRoll = Callable[[Roll, int, int], AbstractContextManager[OnBand]]  # (roll, nth, of) -> its on_band


@dataclass(frozen=True, slots=True)
class Night:
    """How a night ended."""

    report: Path  # night.json
    exit_code: int  # 0 all inspected, 3 some not, 75 not ended: go on later
    told: dict[str, Any]  # what night.json holds
    line: str  # of this slot alone: night.json tells of all slots of its date


def open_job(site: Site, entry: Entry | None, **asked: Any) -> Job:
    """The job of an entry of line.yaml with its model and rules; UserError 78 where one is missing.

    asked: of a job by hand, the fields of `Job` with `model` and `rules` as names. What was closed since the
    last success is as late as what was closed just now: an outage takes no roll from `closed_within_h`.
    """
    if entry is not None:
        rolls = () if entry.rolls == "due" else entry.rolls
        since = None
        if entry.closed_within_h is not None:
            now = site.clock()
            with site.ledger.read() as session:
                worked = last_success(session, now).get(entry.name) or first_seen(session, entry.name, now)
            since = (worked or now) - timedelta(hours=entry.closed_within_h)
        asked = {
            "name": entry.name,
            "model": entry.model,
            "rules": entry.rules,
            "selection": Selection(rolls, entry.line, since),
            "priority": entry.priority,
            "workers": entry.workers,
        } | asked
    name, rules = asked.pop("model"), asked.pop("rules")
    try:
        model: Model = site.plant.model(name)
    except UserError as fault:
        raise UserError(str(fault), CONFIG) from None
    job = asked.pop("name", BY_HAND)
    return Job(
        name=job, model=model, model_name=name, rules=rules, rules_hash=rules_hash(site.plant, rules), **asked
    )


def run_night(
    site: Site,
    job: Job,
    slot: Lease,
    *,
    on_roll: OnRoll | None = None,
    until: datetime | None = None,
    early: bool = False,
    with_reference: bool = True,
    scan: Callable[..., Scan] = scan_roll,
) -> Night:
    """Inspect all that is due for `job`, holding `slot`; the slot is ended, or waits for what is tried again.

    on_roll: told of each roll as it begins, gives its on_band. until: after it no further roll is begun.
    early: retries whose time has not come are taken too. with_reference: the reference strip is checked
    first. One bad roll never stops the others. Raises LeaseLostError where another process took the slot
    over, and StoppedError at SIGTERM, with the leases given back; UserError 75 where the ledger stays away or
    all rolls are, 78 where the set-up is at fault.
    """
    with site.ledger.read() as session:
        row = session.get_one(Slot, slot.id)
        report, day = report_of(site, row), f"{row.scheduled_for:%Y-%m-%d}"
    site.ledger.keep(lambda session: note(session, slot, report=report))
    held: list[Lease] = [slot]
    try:
        with ExitStack() as stack:
            executor = stack.enter_context(open_executor(workers=job.workers))
            beat = stack.enter_context(Heartbeat(site.ledger, site.clock, slot))
            if with_reference and short_of_disk(site) is None:
                check_stability(site, job, slot.id, executor, beat.check)
            due = find_due(site, job, slot.id, day)
            short = _work(site, job, slot, executor, beat, held, on_roll, until, early, scan)
    except BaseException as told:
        # Told to stop or taken over: all that is held goes back. A fault: the slot stays, to be failed by it.
        is_fault = isinstance(told, Exception) and not isinstance(told, LeaseLostError)
        with suppress(UserError):
            give_back(site, held[1:] if is_fault else held)
            write_night(site, report)
        raise
    return _end(site, job, slot, due, report, short)


def give_back(site: Site, held: list[Lease]) -> None:
    """Give back what this process still holds, the roll before its slot."""

    def back(session: Session) -> None:
        for lease in reversed(held):
            row = session.get(lease.table, lease.id)
            if row is not None and row.fencing_token == lease.token and row.state == "running":  # type: ignore[attr-defined]
                release(session, lease, site.clock())

    site.ledger.keep(back, 5.0)


def _work(
    site: Site,
    job: Job,
    slot: Lease,
    executor: Executor,
    beat: Heartbeat,
    held: list[Lease],
    on_roll: OnRoll | None,
    until: datetime | None,
    early: bool,
    scan: Callable[..., Scan],
) -> str | None:
    """Roll after roll until none is left; why it ended before that, if it did."""
    tried: set[int] = set()  # of this night: a retry by hand does not try the same roll for ever
    while True:
        beat.check()
        if (short := short_of_disk(site)) is not None:
            return short
        with site.ledger.read() as session:
            mine = [key for key in candidates(session, job) if key not in tried]
        if not mine:
            return None
        if until is not None and site.clock() > until:
            return f"{DEADLINE} {until:%H:%M} UTC has come: what is left is due next time"

        def take(session: Session, keys: list[int] = mine) -> tuple[Lease, Run] | None:
            row = claim(session, Run, site.clock(), site.owner, where=(Run.id.in_(keys),), early=early)
            if row is None:
                return None
            row.slot_id = slot.id
            session.flush()
            lease = lease_of(row)
            session.expunge(row)
            return lease, row

        taken = site.ledger.keep(take)
        if taken is None:
            return None
        lease, row = taken
        tried.add(row.id)
        held.append(lease)
        place = (len(tried), len(tried) + len(mine) - 1)
        with Heartbeat(site.ledger, site.clock, lease) as own:
            _inspect(site, job, row, lease, executor, (beat, own), on_roll, place, scan)
        held.remove(lease)


def candidates(session: Session, job: Job) -> list[int]:
    """The runs of the ledger that are open and that this job may take."""
    rows = session.execute(
        select(Run.id, Run.roll_id, Run.line_id).where(
            Run.model_hash == job.model.hash, Run.rules_hash == job.rules_hash, Run.state.in_(OPEN)
        )
    )
    return [key for key, roll_id, line_id in rows if job.selection.takes(roll_id, line_id)]


def _inspect(
    site: Site,
    job: Job,
    row: Run,
    lease: Lease,
    executor: Executor,
    beats: tuple[Heartbeat, Heartbeat],
    on_roll: OnRoll | None,
    place: tuple[int, int],
    scan: Callable[..., Scan],
) -> None:
    """One roll, to its end in the ledger. A fault of the roll is written there, not raised.

    UserError 78 where the set-up is at fault, 75 where no roll is there at all: this one is not to blame.
    """
    path = site.plant.roll_path(row.roll_id)
    if not path.is_dir():
        if (away := rolls_away(site)) is not None:
            raise UserError(away, LOCKED)
        site.ledger.keep(lambda session: roll_gone(site, session, row, lease))
        return
    closed_at = closed_or_never(path)
    if closed_at not in (NEVER, row.closed_at):
        told = "the roll was made again since: as it is now it is due by itself"
        now = site.clock()
        site.ledger.keep(lambda session: finish(session, lease, now, "replaced", error=told))
        return

    def checked(on_band: OnBand) -> OnBand:
        def on_done(done: int, lines: int) -> None:
            for beat in beats:
                beat.check()
            on_band(done, lines)

        return on_done

    planned: Planned | None = None
    unreadable = True
    try:
        if closed_at != row.closed_at:
            raise UserError(f"{path}: its description cannot be read now: check disk and rights")
        roll = site.plant.roll(row.roll_id)
        unreadable = False
        planned = plan_roll(site.plant, roll, job.model, executor)
    except Exception as fault:  # whatever it is, the other rolls are inspected
        error, code = told_of(fault)
        if code == CONFIG and not unreadable:  # the set-up is at fault: so it would be for every roll
            raise
    else:
        plan, folder = planned.plan, site.relative(planned.folder)
        facts = {"run_id": plan.run_id, "folder": folder, "code": plan.code}
        site.ledger.keep(lambda session: note(session, lease, **facts))
        try:
            bar = nullcontext(_quiet) if on_roll is None else on_roll(roll, *place)
            with bar as on_band:
                done = scan(site.plant, roll, job.model, executor, on_band=checked(on_band))
        except LeaseLostError:
            give_back(site, [lease])  # another process goes on: nothing is ours to write any more
            return
        except Exception as fault:
            error, code = told_of(fault)
            if code == CONFIG:  # a worker of another version, a model that is another now
                raise
        else:
            (done.folder / LIVE_TABLE).unlink(missing_ok=True)  # of a roll that was scanned while it grew
            site.ledger.keep(lambda session: roll_done(site, session, row, lease, done))
            return
    bands = None if planned is None else planned.folder
    site.ledger.keep(lambda session: roll_failed(site, session, row, lease, bands, error, code, unreadable))


def _quiet(done: int, lines: int) -> None:
    """No bar."""


def told_of(fault: Exception) -> tuple[str, int]:
    """The one line of a fault, and its exit code."""
    if isinstance(fault, UserError):
        return str(fault)[:MAX_ERROR], fault.exit_code
    last = traceback.extract_tb(fault.__traceback__)[-1]
    told = f"{type(fault).__name__}: {fault} ({Path(last.filename).name}:{last.lineno})"
    return " ".join(told.replace("\0", "?").split())[:MAX_ERROR], FAILED


def short_of_disk(site: Site) -> str | None:
    """Why no roll may be begun for want of disk; told once a day."""
    free = shutil.disk_usage(site.plant.home).free
    reserve = site.line.disk_reserve_gb * 1e9
    if free >= reserve:
        return None
    now = site.clock()
    told = f"{free / 1e9:.1f} GB are free, under the reserve of {site.line.disk_reserve_gb:g} GB"
    body = f"{told} on the disk of {site.plant.home}. No roll is begun until there is room."

    def tell(session: Session) -> None:
        if put_alert(session, now, f"disk:{now:%Y-%m-%d}", "disk", f"disk below the reserve: {told}", body):
            add_event(session, now, "disk.low", detail=told)

    site.ledger.keep(tell)
    return told


def rolls_away(site: Site) -> str | None:
    """Why no roll may be begun where none is there, though some are due; told once a day.

    Their disk is not mounted, most likely: what is due stays due.
    """
    if site.plant.roll_ids():
        return None
    now = site.clock()
    told = f"rolls are due, and none is in {site.plant.rolls}: check whether its disk is mounted"
    key = f"missing:rolls:{now:%Y-%m-%d}"
    site.ledger.keep(lambda session: put_alert(session, now, key, "missing", told))
    return told


def _end(site: Site, job: Job, slot: Lease, due: Due, report: str, short: str | None) -> Night:
    """End the slot by what the ledger says of its rolls, and write night.json."""

    ended: Counter[str] = Counter()

    def end(session: Session) -> int:
        now = site.clock()
        keys = candidates(session, job)
        left = session.execute(
            select(Run.state, Run.not_before, Run.lease_until).where(Run.id.in_(keys))
        ).all()
        mine = Counter(session.scalars(select(Run.state).where(Run.slot_id == slot.id)))
        ended.clear()
        ended.update(mine)
        bad = mine["failed"] + mine["dead"] + mine["gone"] + len(due.missing)
        if short is not None and not short.startswith(DEADLINE):
            finish(
                session,
                slot,
                now,
                "retry",
                not_before=now + DISK_RETRY,
                ended_at=None,
                error=short,
                exit_code=LOCKED,
            )
            return LOCKED
        waits = [
            not_before or lease_until or now for state, not_before, lease_until in left if state != "due"
        ]
        if short is None and waits and job.name != BY_HAND:
            told = f"{len(waits)} rolls are tried again or at work elsewhere"
            finish(
                session,
                slot,
                now,
                "retry",
                not_before=min(waits),
                error=told,
                exit_code=PARTIAL,
            )
            return PARTIAL
        bad += len(waits)
        if short is not None:
            row = session.get_one(Slot, slot.id)
            put_alert(
                session,
                now,
                f"late:slot:{slot.id}",
                "late",
                f"job {row.job} of {row.scheduled_for:%Y-%m-%d %H:%M} UTC: {len(left)} rolls are left at its "
                "deadline",
                f"{short[0].upper()}{short[1:]}.",
            )
            # A night that ended no roll is no success to go by.
            at = now if mine.keys() - set(OPEN) else row.ended_at
            finish(session, slot, now, "partial", ended_at=at, error=short, exit_code=PARTIAL)
            return PARTIAL
        if bad:
            told = f"{bad} rolls are not inspected"
            finish(session, slot, now, "partial", error=told, exit_code=PARTIAL)
            return PARTIAL
        finish(session, slot, now, "done", error=None, exit_code=0)
        return 0

    code = site.ledger.keep(end)
    told = write_night(site, report, due=due)
    parts = [", ".join(f"{count} {state}" for state, count in sorted(ended.items())) or "nothing was due"]
    parts += [f"roll {roll} is not there" for roll in due.missing[:NAMED]]
    if len(due.missing) > NAMED:
        parts.append(f"{len(due.missing) - NAMED} more are not there")
    if short is not None:
        parts.append(short)
    path = site.plant.home / report
    return Night(path, code, told, f"{'; '.join(parts)}: {path}")
