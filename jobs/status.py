"""What is going on now: slots, rolls at work with how far they are, what was given up, what is not sent."""

import shutil
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from rollsight.inspect.errors import UserError
from rollsight.inspect.roll_state import strip_at
from rollsight.jobs import alerts
from rollsight.jobs.channels import listed
from rollsight.jobs.lateness import late_since, worst_check
from rollsight.jobs.ledger.bands import receipts_in
from rollsight.jobs.ledger.schema import Run, Slot
from rollsight.jobs.ledger.success import last_success
from rollsight.jobs.schedule import moments
from rollsight.jobs.sites import Site
from sqlalchemy import func, select
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from rich.console import RenderableType

GIVEN_UP = ("failed", "dead", "gone")
OPEN = ("due", "running", "retry")
MAX_LISTED = 20  # of each kind on a terminal; JSON has all


def status(site: Site) -> dict[str, Any]:
    """The state of the plant's jobs, as JSON has it; times in UTC, ISO 8601."""
    now = site.clock()
    with site.ledger.read() as session:
        counts = dict(session.execute(select(Run.state, func.count()).group_by(Run.state)).all())
        open_slots = session.scalars(
            select(Slot).where(Slot.state.in_(OPEN)).order_by(Slot.scheduled_for)
        ).all()
        running = session.scalars(select(Run).where(Run.state == "running").order_by(Run.started_at)).all()
        waiting = session.scalars(select(Run).where(Run.state == "retry").order_by(Run.not_before)).all()
        lost = session.scalars(
            select(Run).where(Run.state.in_(GIVEN_UP)).order_by(Run.ended_at.desc(), Run.id.desc())
        ).all()
        unsent = alerts.waiting(session, now)
        told: dict[str, Any] = {
            "at": now.isoformat(),
            "zone": site.line.zone,
            "ledger": site.ledger.where,
            "rolls": counts,
            "slots": [_slot(row) for row in open_slots],
            "running": [_running(site, row, now) for row in running],
            "retries": [_failed(row) for row in waiting],
            "given_up": [_failed(row) for row in lost],
            "jobs": _jobs(site, session, now),
            "alerts": {
                "unsent": len(unsent),
                "overdue": alerts.overdue(session, now, listed(site.line)),
                "last_error": next((row.last_error for row in reversed(unsent) if row.last_error), None),
            },
            "stability": _stability(site, session, now),
            "disk_free_gb": round(shutil.disk_usage(site.plant.home).free / 1e9, 1),
            "disk_reserve_gb": site.line.disk_reserve_gb,
        }
    return told


def tables(told: dict[str, Any]) -> "RenderableType":
    """The status for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, expand=True)
        for column in columns:
            made.add_column(column, overflow="fold")
        return made

    short = partial(_short, zone=ZoneInfo(told["zone"]))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(told["rolls"].items())) or "none yet"
    head = Text.assemble(
        ("Rolls: ", "bold"), counts, f"    {told['disk_free_gb']:g} GB free, times in {told['zone']}"
    )
    if told["disk_free_gb"] < told["disk_reserve_gb"]:
        head.append(f", under the reserve of {told['disk_reserve_gb']:g} GB", "bold red")
    parts: list[RenderableType] = [head]
    jobs = table("Jobs", "job", "last success", "next", "now")
    for job in told["jobs"]:
        late = Text("late", "bold red") if job["late"] else Text(job["state"] or "-")
        jobs.add_row(job["name"], short(job["last_success"]), short(job["next"]), late)
    parts.append(jobs)
    if told["running"]:
        at_work = table("At work", "roll", "done", "", "since", "by")
        for run in told["running"][:MAX_LISTED]:
            share = run["share"]
            bar = ProgressBar(total=1.0, completed=share or 0.0, width=30)
            done = "-" if share is None else f"{share:.0%}"
            by = Text(run["owner"] or "-", "" if run["alive"] else "yellow")
            at_work.add_row(run["roll_id"], done, bar, short(run["started_at"]), by)
        parts.append(at_work)
    for title, key in (("Tried again", "retries"), ("Given up: inspect jobs retry", "given_up")):
        if rows := told[key]:
            failed = table(f"{title} ({len(rows)})", "roll", "state", "attempts", "again at", "why")
            for row in rows[:MAX_LISTED]:
                again = short(row["not_before"])
                failed.add_row(row["roll_id"], row["state"], str(row["attempt"]), again, row["error"] or "")
            parts.append(failed)
    if told["alerts"]["unsent"]:
        late = told["alerts"]["overdue"]
        n = told["alerts"]["unsent"]
        line = Text(f"{n} alert{'' if n == 1 else 's'} nobody was told of", "bold red" if late else "")
        parts.append(line.append(f": {told['alerts']['last_error']}" if told["alerts"]["last_error"] else ""))
    stable = told["stability"]
    if stable is not None:
        well = "not checked since" if stable["old"] else "in band,"
        said = Text(well) if stable["in_band"] else Text("out of band,", "bold red")
        parts.append(
            Text.assemble(("Stability: ", "bold"), said, f" {short(stable['at'])}, model {stable['model']}")
        )
    return Group(*parts)


def _running(site: Site, run: Run, now: datetime) -> dict[str, Any]:
    """A roll at work, and how far its receipts on disk say it is."""
    done = lines = None
    if run.folder is not None:
        done = sum(facts["y1"] - facts["y0"] for facts in receipts_in(site.plant.home / run.folder))
        try:
            lines = strip_at(site.plant.roll_path(run.roll_id)).lines
        except UserError:  # damaged meanwhile: its scan says so
            lines = None
    return {
        "roll_id": run.roll_id,
        "run_id": run.run_id,
        "started_at": _iso(run.started_at),
        "lines_done": done,
        "lines": lines,
        "share": min(1.0, done / lines) if done is not None and lines else None,
        "owner": run.lease_owner,
        "alive": run.lease_until is not None and run.lease_until > now,
        "attempt": run.attempt,
    }


def _failed(run: Run) -> dict[str, Any]:
    return {
        "roll_id": run.roll_id,
        "state": run.state,
        "attempt": run.attempt,
        "not_before": _iso(run.not_before),
        "error": run.error,
    }


def _slot(slot: Slot) -> dict[str, Any]:
    return {
        "job": slot.job,
        "scheduled_for": _iso(slot.scheduled_for),
        "state": slot.state,
        "not_before": _iso(slot.not_before),
        "error": slot.error,
    }


def _stability(site: Site, session: Session, now: datetime) -> dict[str, Any] | None:
    """The worst of the last checks on the reference strip; None where there was none."""
    if (worst := worst_check(site.line, session, now)) is None:
        return None
    check, is_old = worst
    return {"at": _iso(check.at), "in_band": check.in_band, "model": check.model, "old": is_old}


def _jobs(site: Site, session: Session, now: datetime) -> list[dict[str, Any]]:
    """The jobs of line.yaml: last success, next moment, whether one is late."""
    last = last_success(session, now)
    at_work = dict(
        session.execute(select(Slot.job, Slot.state).where(Slot.state.in_(OPEN)).order_by(Slot.id)).all()
    )
    told = []
    for job in site.line.jobs:
        zone = site.line.zone_of(job)
        upcoming = next(moments(job, zone, now, now + timedelta(days=366)), None)
        told.append(
            {
                "name": job.name,
                "last_success": _iso(last.get(job.name)),
                "next": _iso(upcoming),
                "state": at_work.get(job.name),
                "late": late_since(site, session, job, now) is not None,
            }
        )
    return told


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _short(at: str | None, zone: ZoneInfo) -> str:
    """An ISO time for a table, in the zone of the plant."""
    return "-" if at is None else f"{datetime.fromisoformat(at).astimezone(zone):%d %b %H:%M}"
