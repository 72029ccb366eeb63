"""The ticker: makes the slots that have become due, runs them, and sees to what did not happen.

One `tick` is all there is: the embedded ticker calls it again and again, an outside scheduler calls it as a
command. Any number of them may tick on one ledger. Time decides nothing but which slots are made: what is to
be inspected is what is due, so a machine that slept or a clock that was set back loses no roll and doubles
none.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from rollsight.inspect.errors import CONFIG, FAILED, LOCKED, PARTIAL, USAGE, UserError
from rollsight.jobs.due import Job
from rollsight.jobs.lateness import late_since
from rollsight.jobs.ledger.claims import Lease as SlotLease
from rollsight.jobs.ledger.claims import LeaseLostError, claim, fail, finish, lease_of
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import inserted, put_alert
from rollsight.jobs.ledger.schema import Event, Run, Slot
from rollsight.jobs.ledger.success import last_success
from rollsight.jobs.making import run_making
from rollsight.jobs.night_file import write_night
from rollsight.jobs.nightly import OnRoll, open_job, run_night, told_of
from rollsight.jobs.schedule import BY_HAND, ON_TIME, AnyJob, Scheduled, moments
from rollsight.jobs.schedule import Job as Entry
from rollsight.jobs.sites import Site
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

GRAVITY = (0, LOCKED, PARTIAL, CONFIG)  # the exit code of a tick is the worst of its slots
AHEAD = timedelta(minutes=5)  # how far the clock of another scheduler may be before this one
ABANDONED = timedelta(days=8)  # a night by hand that comes once a week still finds what it left


@dataclass(frozen=True, slots=True)
class Tick:
    """What one tick did."""

    made: int  # slots that were new and due
    left_out: int  # slots that were new and not run: missed, and not to be caught up
    ran: list[tuple[str, datetime, int, str]] = field(default_factory=list)  # job, moment, exit code, line

    @property
    def exit_code(self) -> int:
        return max((code for _, _, code, _ in self.ran), key=_gravity, default=0)


def tick(site: Site, *, on_roll: OnRoll | None = None) -> Tick:
    """Make the slots that are due by now, put alerts of what is late, run all that can be claimed.

    A fault of one job is written into its slot and does not stop the others. Raises UserError 75 where the
    ledger stays away, StoppedError at SIGTERM.
    """
    made = left_out = 0
    site.ledger.keep(lambda session: end_abandoned(site, session))
    for entry in site.line.jobs:
        new, skipped = site.ledger.keep(lambda session, entry=entry: make_slots(site, session, entry))  # type: ignore[misc]
        made, left_out = made + new, left_out + skipped
        # Before the work, which takes hours, and may be the success that was missing.
        site.ledger.keep(lambda session, entry=entry: tell_late(site, session, entry))  # type: ignore[misc]
    told = Tick(made, left_out)
    names = [entry.name for entry in site.line.jobs]
    done: set[int] = set()  # a slot that waits again is for the next tick
    while (taken := _take(site, names, done)) is not None:
        lease, job, at, deadline = taken
        done.add(lease.id)
        code, line = run_slot(site, lease, site.line.job(job), deadline, on_roll=on_roll)
        told.ran.append((job, at, code, line))
    return told


def make_slots(site: Site, session: Session, entry: Scheduled) -> tuple[int, int]:
    """Write the job's moments since its last slot into the ledger; how many are due, how many left out.

    A job that is new begins now. Missed moments are caught up as the job says; one on which a slot stands is
    never made again, so a clock that was set back makes none until it has come to where it was. A slot
    ahead of the clock hinders none before it.
    """
    now = site.clock()
    past = (Slot.job == entry.name, Slot.scheduled_for <= now)
    last = session.scalar(select(func.max(Slot.scheduled_for)).where(*past))
    if last is None:
        last = session.scalar(
            select(func.max(Event.at)).where(Event.kind == "job.seen", Event.detail == entry.name)
        )
    if last is None:
        add_event(session, now, "job.seen", detail=entry.name)
        return 0, 0
    oldest = now - timedelta(hours=entry.max_age_h)
    found = list(moments(entry, site.line.zone_of(entry), max(last, oldest), now))
    made = left_out = 0
    for at in found:
        late = now - at > ON_TIME
        skip = None
        if late and entry.catch_up == "none":
            skip = "missed, and catch_up is none"
        elif late and entry.catch_up == "latest" and at != found[-1]:
            skip = "missed, and catch_up is latest"
        elif now > at + timedelta(hours=entry.deadline_h):
            skip = f"missed, and its deadline of {entry.deadline_h:g} h is over"
        if add_slot(site, session, entry.name, at, entry=entry, skip=skip) is not None:
            made, left_out = made + (skip is None), left_out + (skip is not None)
    return made, left_out


def add_slot(
    site: Site,
    session: Session,
    job: str,
    at: datetime,
    *,
    entry: Scheduled | None = None,
    skip: str | None = None,
) -> int | None:
    """Write a slot into the ledger unless it is there; its id, None where it was."""
    row: dict[str, object] = {
        "job": job,
        "scheduled_for": at,
        "state": "due" if skip is None else "skipped",
        "error": skip,
        "priority": 0 if entry is None else entry.priority,
        "deadline": None if entry is None else at + timedelta(hours=entry.deadline_h),
        "created_at": site.clock(),
        "attempt": 0,
        "fencing_token": 0,
    }
    if not inserted(session, Slot, row):
        return None
    key = session.scalar(select(Slot.id).where(Slot.job == job, Slot.scheduled_for == at))
    kind = "slot.made" if skip is None else "slot.skipped"
    add_event(session, site.clock(), kind, slot_id=key, detail=skip or job)
    return key


def _take(
    site: Site, names: list[str], done: set[int]
) -> tuple[SlotLease, str, datetime, datetime | None] | None:
    """Claim the next slot of one of these jobs; those whose deadline is over are ended on the way."""

    def take(session: Session) -> tuple[SlotLease, str, datetime, datetime | None] | None:
        while True:
            where = (Slot.job.in_(names), Slot.id.not_in(done))
            row = claim(session, Slot, site.clock(), site.owner, where=where)
            if row is None:
                return None
            lease = lease_of(row)
            if row.deadline is None or site.clock() <= row.deadline:
                return lease, row.job, row.scheduled_for, row.deadline
            state = "skipped" if row.report is None else "partial"
            line = "its deadline is over: what is left is due next time"
            # Not ended now: a night that nobody worked through is no success to go by.
            finish(
                session,
                lease,
                site.clock(),
                state,
                ended_at=row.ended_at,
                error=line,
                exit_code=PARTIAL,
            )

    return site.ledger.keep(take)


def run_slot(
    site: Site,
    lease: SlotLease,
    entry: AnyJob | None,
    until: datetime | None,
    *,
    job: Job | None = None,
    on_roll: OnRoll | None = None,
    early: bool = False,
    with_reference: bool = True,
) -> tuple[int, str]:
    """Run a slot that is held; its exit code and one line. Its faults are written into the ledger.

    entry: of line.yaml; else `job` is what to do. Raises what ends the whole process: StoppedError, a ledger
    that stays away.
    """
    try:
        if entry is not None and not isinstance(entry, Entry):
            return 0, run_making(site, entry, lease)
        night = run_night(
            site,
            job or open_job(site, entry),
            lease,
            on_roll=on_roll,
            until=until,
            early=early,
            with_reference=with_reference,
        )
    except LeaseLostError as lost:
        return LOCKED, f"{lost}: it goes on there"
    except Exception as fault:
        told, code = told_of(fault)
        site.ledger.keep(lambda session: _failed(site, session, lease, told, code))
        _retell(site, lease)
        return code, told
    return night.exit_code, night.line


def _retell(site: Site, lease: SlotLease) -> None:
    """Write the night's file again, now that the ledger says how the slot failed."""
    with site.ledger.read() as session:
        report = session.get_one(Slot, lease.id).report
    if report is not None:
        with suppress(UserError, OSError):  # a disk that refuses: the ledger has it, the next slot writes it
            write_night(site, report)


def _failed(site: Site, session: Session, lease: SlotLease, told: str, code: int) -> None:
    now = site.clock()
    try:
        state = fail(session, lease, now, told, code, site.draw)
    except LeaseLostError:
        return  # given back, or taken over: it is run again in any case
    if state == "failed":
        row = session.get_one(Slot, lease.id)
        put_alert(
            session,
            now,
            f"dead:slot:{lease.id}:{lease.token}",
            "dead",
            f"job {row.job} of {row.scheduled_for:%Y-%m-%d %H:%M} UTC cannot run: {told}",
            "It is not tried again by itself. When it is corrected: inspect jobs retry",
        )


def tell_late(site: Site, session: Session, entry: Scheduled) -> None:
    """The dead man's switch: an alert where the job is late, once per last success."""
    now = site.clock()
    if (since := late_since(site, session, entry, now)) is None:
        return
    last = last_success(session, now).get(entry.name)
    hours = site.line.late_after(entry).total_seconds() / 3600
    put_alert(
        session,
        now,
        f"late:{entry.name}:{since.isoformat()}",
        "late",
        f"job {entry.name} is late: no success for more than {hours:g} h",
        f"The last one ended at {last:%Y-%m-%d %H:%M} UTC." if last else "It never succeeded.",
    )


def begin_by_hand(site: Site) -> SlotLease:
    """A slot of the moment for `inspect jobs nightly`, held; older ones whose process died are ended."""
    now = site.clock()

    def begin(session: Session) -> SlotLease:
        while (row := claim(session, Slot, now, site.owner, where=(Slot.job == BY_HAND,))) is not None:
            told = "its process died: what it left is inspected by a later night"
            finish(session, lease_of(row), now, "partial", error=told, exit_code=PARTIAL)
        key = add_slot(site, session, BY_HAND, now)
        if key is None:
            raise UserError(
                f"a night by hand began at this very moment ({now.isoformat()}): try again", LOCKED
            )
        row = claim(session, Slot, now, site.owner, where=(Slot.id == key,))
        assert row is not None, "it was made in this transaction"
        return lease_of(row)

    return site.ledger.keep(begin)


def end_abandoned(site: Site, session: Session) -> None:
    """End what waits for a model and rules that no job of line.yaml names any more.

    A night by hand or a watch may still want it: what anything was done with within `ABANDONED` stays, and so
    does everything while a night by hand is at work. Either makes due again what was ended too soon.
    """
    now = site.clock()
    by_hand = (Slot.job == BY_HAND, Slot.state == "running", Slot.lease_until >= now)
    if session.scalar(select(Slot.id).where(*by_hand).limit(1)) is not None:
        return
    named = {(entry.model, entry.rules) for entry in site.line.jobs if isinstance(entry, Entry)}
    before = now - ABANDONED
    last = select(func.max(Event.at)).where(Event.roll_id == Run.roll_id, Event.run_key == Run.id)
    touched = last.scalar_subquery()
    waiting = select(Run).where(
        Run.state.in_(("due", "retry")), Run.created_at < before, or_(touched.is_(None), touched < before)
    )
    for run in session.scalars(waiting.with_for_update(skip_locked=True)):
        if (run.model, run.rules) not in named:
            with_rules = "" if run.rules is None else f" with {run.rules}"
            run.state, run.ended_at = "replaced", now
            run.error = f"no job inspects with {run.model}{with_rules} any more, and no night by hand did so "
            run.error += f"for {ABANDONED.days} days"
            add_event(session, now, "run.replaced", run_key=run.id, roll_id=run.roll_id, detail=run.error)


def begin_slot(site: Site, entry: Scheduled, at: datetime) -> tuple[SlotLease | None, str]:
    """Make and hold the slot of a job at a moment that someone names; None where it has ended.

    UserError for a moment that is still to come.
    """
    now = site.clock()
    if at - now > AHEAD:
        raise UserError(
            f"job {entry.name} of {at.isoformat()} is still to come, it is {now:%Y-%m-%d %H:%M} UTC: name a "
            "moment that has come",
            USAGE,
        )

    def begin(session: Session) -> tuple[SlotLease | None, str]:
        add_slot(site, session, entry.name, at, entry=entry)
        row = session.scalars(select(Slot).where(Slot.job == entry.name, Slot.scheduled_for == at)).one()
        if row.state in ("done", "partial", "skipped", "failed", "dead"):
            return None, row.state
        taken = claim(session, Slot, site.clock(), site.owner, where=(Slot.id == row.id,), early=True)
        if taken is None:
            raise UserError(
                f"job {entry.name} of {at.isoformat()} is at work in {row.lease_owner}: try again later",
                LOCKED,
            )
        return lease_of(taken), "running"

    return site.ledger.keep(begin)


def ended_with(site: Site, job: str, at: datetime) -> int:
    """The exit code of a slot that has ended; what its state stands for where none was written."""
    with site.ledger.read() as session:
        row = session.scalars(select(Slot).where(Slot.job == job, Slot.scheduled_for == at)).one()
        by_state = {"done": 0, "partial": PARTIAL, "skipped": PARTIAL}
        return by_state.get(row.state, FAILED) if row.exit_code is None else row.exit_code


def deadline_of(site: Site, slot: SlotLease) -> datetime | None:
    """After it nothing further is begun; None of a slot without one."""
    with site.ledger.read() as session:
        return session.get_one(Slot, slot.id).deadline


def next_moment(site: Site, now: datetime) -> datetime | None:
    """When the next slot or retry is due; None where nothing is scheduled."""
    found = [
        next(moments(entry, site.line.zone_of(entry), now, now + timedelta(days=366)), None)
        for entry in site.line.jobs
    ]
    with site.ledger.read() as session:
        found.append(session.scalar(select(func.min(Slot.not_before)).where(Slot.state == "retry")))
    return min((at for at in found if at is not None), default=None)


def _gravity(code: int) -> int:
    return GRAVITY.index(code) if code in GRAVITY else len(GRAVITY)
