"""What should have happened by now and did not: jobs without success, moments not begun, old checks.

Alerts, status, metrics and morning page go by it.
"""

from datetime import datetime, timedelta

from rollsight.jobs.ledger.schema import Slot, Stability
from rollsight.jobs.ledger.success import first_seen, last_success
from rollsight.jobs.schedule import ON_TIME, Job, LineFile, Scheduled, moments
from rollsight.jobs.sites import Site
from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

CHECKED_WITHIN = timedelta(hours=24)  # a check on the reference strip is old after that, or a job's distance
MISSED_WITHIN = timedelta(days=3)  # how far back a moment is looked for that nobody began


def late_since(site: Site, session: Session, job: Scheduled, now: datetime) -> datetime | None:
    """Since when the job is without success, where that is longer than it may be; None: it is not late.

    A slot that is at work may be the success that is missing: until its deadline it is waited for.
    """
    since = last_success(session, now).get(job.name) or _known_since(session, job, now)
    if since is None or now - since <= site.line.late_after(job):
        return None
    in_time = or_(Slot.deadline.is_(None), Slot.deadline >= now)
    at_work = select(Slot.id).where(Slot.job == job.name, *_at_work(now), in_time).limit(1)
    return since if session.scalar(at_work) is None else None


def missed(site: Site, session: Session, job: Scheduled, now: datetime) -> datetime | None:
    """The job's last moment where no slot was made for it: nothing ticks. None: it was seen to.

    Where a slot is at work its ticker comes to the others after it.
    """
    known = _known_since(session, job, now)
    if known is None:
        return None
    until = now - ON_TIME
    last = max(moments(job, site.line.zone_of(job), max(known, until - MISSED_WITHIN), until), default=None)
    if last is None:
        return None
    made = and_(
        Slot.job == job.name, or_(*(at.between(last, now) for at in (Slot.scheduled_for, Slot.created_at)))
    )
    seen_to = select(Slot.id).where(or_(made, and_(*_at_work(now)))).limit(1)
    return last if session.scalar(seen_to) is None else None


def _at_work(now: datetime) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return Slot.state == "running", Slot.lease_until >= now


def _known_since(session: Session, job: Scheduled, now: datetime) -> datetime | None:
    """When a tick first saw the job; of one that another scheduler runs, when its first slot was made."""
    made = select(func.min(Slot.created_at)).where(Slot.job == job.name, Slot.created_at <= now)
    return first_seen(session, job.name, now) or session.scalar(made)


def worst_check(
    line: LineFile, session: Session, now: datetime, within: timedelta = CHECKED_WITHIN
) -> tuple[Stability, bool] | None:
    """Of the last checks with each model the one that counts, and whether it is old: out of band, old, well.

    Models are those that jobs name, and those checked `within`; where no such was ever checked, the last one.
    A model whose jobs come more seldom is old after their distance.
    """
    ids = select(func.max(Stability.id)).group_by(Stability.model)
    checks = session.scalars(select(Stability).where(Stability.id.in_(ids)).order_by(Stability.id)).all()
    distance: dict[str, timedelta] = {}
    for job in line.jobs:
        if isinstance(job, Job):
            distance[job.model] = min(line.late_after(job), distance.get(job.model, timedelta.max))
    used = [check for check in checks if check.model in distance or now - check.at <= within]

    def is_old(check: Stability) -> bool:
        return now - check.at > max(within, distance.get(check.model, within))

    def rank(check: Stability) -> tuple[bool, bool, datetime]:
        return check.in_band, not is_old(check), check.at

    found = min(used or checks[-1:], key=rank, default=None)
    return None if found is None else (found, is_old(found))
