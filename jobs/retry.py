"""Another try for what was given up: by a person, when the cause is gone."""

from collections.abc import Sequence

from rollsight.inspect.errors import UserError
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.schema import Run, Slot
from rollsight.jobs.schedule import BY_HAND
from rollsight.jobs.sites import Site
from sqlalchemy import select
from sqlalchemy.orm import Session

GIVEN_UP = ("dead", "failed", "gone", "retry")


def try_again(site: Site, rolls: Sequence[str] | None) -> list[str]:
    """Make due again what was given up or waits: of these rolls, or (None) all of it, jobs too.

    Attempts count from nothing. A job's moment that is made due again is run by the next tick even after its
    deadline. The rolls and jobs; UserError where a roll has nothing to be tried again.
    """
    return site.ledger.keep(lambda session: _again(site, session, rolls))


def _again(site: Site, session: Session, rolls: Sequence[str] | None) -> list[str]:
    now = site.clock()
    wanted = select(Run).where(Run.state.in_(GIVEN_UP))
    runs = session.scalars(wanted if rolls is None else wanted.where(Run.roll_id.in_(rolls))).all()
    if rolls is not None and (without := sorted(set(rolls) - {run.roll_id for run in runs})):
        raise UserError(
            f"roll {without[0]!r} has nothing that was given up: `inspect jobs status` tells what has"
        )
    slots = {run.slot_id for run in runs}
    again = []
    for run in runs:
        run.state, run.attempt, run.not_before, run.ended_at, run.error = "due", 0, None, None, None
        add_event(session, now, "run.again", run_key=run.id, roll_id=run.roll_id, detail="by hand")
        again.append(run.roll_id)
    states = ("partial", "retry") if rolls is not None else ("partial", "retry", "failed", "dead")
    for slot in session.scalars(select(Slot).where(Slot.state.in_(states))):
        stands_for_itself = slot.state in ("failed", "dead")
        if slot.job == BY_HAND or (slot.id not in slots and not stands_for_itself):
            continue
        slot.state, slot.attempt, slot.not_before, slot.deadline = "due", 0, None, None
        add_event(session, now, "slot.again", slot_id=slot.id, detail="by hand")
        if stands_for_itself:
            again.append(f"job {slot.job} of {slot.scheduled_for:%Y-%m-%d %H:%M} UTC")
    return again
