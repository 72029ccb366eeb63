"""How the work on a roll ends in the ledger, each end in one transaction with the alert that it needs."""

import json
from pathlib import Path

from rollsight.inspect.errors import FAILED
from rollsight.jobs.ledger.bands import record_bands
from rollsight.jobs.ledger.claims import Lease, fail, finish
from rollsight.jobs.ledger.outbox import put_alert, put_held_back
from rollsight.jobs.ledger.schema import Run
from rollsight.jobs.scan_job import Run as Scan
from rollsight.jobs.sites import Site
from sqlalchemy.orm import Session


def roll_done(site: Site, session: Session, row: Run, lease: Lease, done: Scan) -> None:
    """It was inspected: its figures and bands, and an alert where its verdict holds it back."""
    told, now = done.summary, site.clock()
    finish(
        session,
        lease,
        now,
        "done",
        run_id=told["run_id"],
        folder=site.relative(done.folder),
        code=told["code_version"],
        line_id=told["line_id"] or "",
        lines=told["lines"],
        length_m=told["length_m"],
        width_mm=told["width_mm"],
        coverage=told["coverage"],
        verdict=told["verdict"],
        reasons=json.dumps(told["reasons"]),
        defects=told["defects"],
        by_class=json.dumps(told["by_class"]),
        seconds=told["seconds"],
        error=None,
        exit_code=0,
    )
    record_bands(session, done.folder, row.roll_id, now)
    put_held_back(session, now, session.get_one(Run, lease.id, populate_existing=True), told["reasons"])


def roll_gone(site: Site, session: Session, row: Run, lease: Lease) -> None:
    """It was due and is no longer there: an alert."""
    error = f"roll {row.roll_id} was due and is no longer in {site.plant.rolls}"
    now = site.clock()
    finish(session, lease, now, "gone", error=error, exit_code=FAILED)
    key = f"missing:{row.roll_id}:{row.closed_at.isoformat()}"
    put_alert(session, now, key, "missing", error, roll_id=row.roll_id)


def roll_failed(
    site: Site,
    session: Session,
    row: Run,
    lease: Lease,
    folder: Path | None,
    error: str,
    code: int,
    unreadable: bool,
) -> None:
    """It was not inspected: a retry or its end, the bands it has; an alert where no retry helps it."""
    now = site.clock()
    state = fail(session, lease, now, error, code, site.draw)
    if folder is not None:
        record_bands(session, folder, row.roll_id, now)
    if unreadable:
        key = f"unreadable:{row.roll_id}:{row.closed_at.isoformat()}"
        put_alert(
            session, now, key, "unreadable", f"roll {row.roll_id} cannot be read", error, roll_id=row.roll_id
        )
    if state == "failed":
        put_alert(
            session,
            now,
            f"dead:run:{lease.id}:{lease.token}",
            "dead",
            f"roll {row.roll_id}: given up, no retry helps",
            f"It ended with: {error}\nWhen the cause is gone: inspect jobs retry {row.roll_id}",
            roll_id=row.roll_id,
        )
