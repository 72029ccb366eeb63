"""Rolls on hold: nothing of them is deleted until they are released."""

import getpass
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rollsight.inspect.errors import UserError
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.schema import Hold
from rollsight.jobs.sites import Site
from sqlalchemy import select
from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class Held:
    """One hold that stands."""

    roll_id: str
    reason: str
    by: str
    held_at: datetime


def holds(site: Site) -> list[Held]:
    """What is on hold, oldest first."""
    with site.ledger.read() as session:
        rows = session.scalars(select(Hold).where(Hold.released_at.is_(None)).order_by(Hold.held_at, Hold.id))
        return [Held(row.roll_id, row.reason, row.by, row.held_at) for row in rows]


def hold(site: Site, roll_id: str, reason: str, by: str | None = None) -> None:
    """Put a roll on hold; UserError where there is no such roll, or it is on hold already."""
    path = site.plant.roll_path(roll_id)
    if not path.is_dir() and not (site.plant.home / "runs" / roll_id).is_dir():
        raise UserError(f"no roll {roll_id!r} and no run of it in {site.plant.home}")
    now, who = site.clock(), by or whoever()

    def put(session: Session) -> None:
        if standing := _standing(session, roll_id):
            row = standing[0]
            raise UserError(
                f"roll {roll_id} is on hold since {row.held_at:%Y-%m-%d %H:%M} UTC by {row.by}: {row.reason}"
            )
        session.add(Hold(roll_id=roll_id, reason=reason, by=who, held_at=now))
        add_event(session, now, "roll.held", roll_id=roll_id, owner=who, detail=reason)

    site.ledger.keep(put)


def release(site: Site, roll_id: str, by: str | None = None) -> None:
    """End the hold of a roll; UserError where it is not on hold."""
    now, who = site.clock(), by or whoever()

    def end(session: Session) -> None:
        standing = _standing(session, roll_id)
        if not standing:
            raise UserError(f"roll {roll_id} is not on hold: `inspect rolls hold` tells what is")
        for row in standing:
            row.released_at, row.released_by = now, who
        add_event(session, now, "roll.released", roll_id=roll_id, owner=who)

    site.ledger.keep(end)


def whoever() -> str:
    """The user of this process, as the system calls them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def _standing(session: Session, roll_id: str) -> Sequence[Hold]:
    return session.scalars(select(Hold).where(Hold.roll_id == roll_id, Hold.released_at.is_(None))).all()
