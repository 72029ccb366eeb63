"""The morning page of a plant: what the ledger and the runs say, as plain facts for the page."""

import contextlib
import json
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rollsight.inspect.report.morning import (
    Check,
    Morning,
    Night,
    RollLine,
    Scores,
    Stability,
    Trouble,
    write_morning,
)
from rollsight.inspect.rolls import write_durably
from rollsight.inspect.trends import SCORE_BINS
from rollsight.jobs import alerts
from rollsight.jobs.channels import listed
from rollsight.jobs.due import NEVER
from rollsight.jobs.lateness import late_since, missed, worst_check
from rollsight.jobs.ledger import schema
from rollsight.jobs.ledger.schema import Alert, Event, Run, Slot
from rollsight.jobs.ledger.success import last_success
from rollsight.jobs.schedule import LATE_H, moments
from rollsight.jobs.sites import Site
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

NIGHTS = 30
SINCE_H = 24.0
OLD_H = 26.0  # after it a page is old: a night and what it may be late by
PAGE = "index.html"
SCORES_FILE = ".scores.json"  # histograms of runs in the window, so that each table is read once

UNDONE = ("failed", "dead", "skipped", "partial", "retry")  # of a slot: a person may have to see to it

Histograms = dict[str, list[int]]  # class -> (SCORE_BINS,) counts


def make_page(site: Site, *, since_h: float = SINCE_H) -> Path:
    """Write `runs/index.html` of the plant; its path. The last `since_h` hours are its night."""
    return write_morning(site.plant.home / "runs" / PAGE, gather(site, since_h=since_h))


def gather(site: Site, *, since_h: float = SINCE_H) -> Morning:
    """What the page shows: rolls of the last `since_h` hours and all that wait, trends over 30 days."""
    now, zone = site.clock(), site.line.zone_of(None)
    since, first = now - timedelta(hours=since_h), now - timedelta(days=NIGHTS)
    with site.ledger.read() as session:
        recent = or_(
            Run.ended_at >= first, Run.closed_at >= first, Run.state.in_(("due", "running", "retry"))
        )
        # A run that was replaced is due anew under another row, or wanted no more.
        runs = newest(session.scalars(select(Run).where(recent, Run.state != "replaced").order_by(Run.id)))
        gone = session.scalars(
            select(Alert).where(
                Alert.kind == "missing", Alert.created_at >= since, Alert.roll_id.is_not(None)
            )
        ).all()
        stability = _stability(site, session, now, since, zone)
        jobs = _last_success(site, session, now, zone)
        troubles = _troubles(site, session, now, since, zone)
        channels = listed(site.line)
        waiting = alerts.overdue(session, now, channels) if channels.all else None
        session.expunge_all()
    tonight = [run for run in runs if _is_of(run, since)]
    several = len({run.model for run in tonight}) > 1
    rolls = [roll_line(site, run, zone, named=several) for run in tonight]
    known = {roll.roll_id for roll in rolls}
    rolls += [
        RollLine(alert.roll_id or "", "missing", reasons=(alert.body,))
        for alert in {alert.roll_id: alert for alert in gone}.values()
        if alert.roll_id not in known
    ]
    hashes = Counter(run.model_hash for run in tonight if run.state == "done")
    of_model = hashes.most_common(1)[0][0] if hashes else None
    judged = [run for run in runs if run.state == "done" and run.model_hash == of_model]
    return Morning(
        title=site.line.line or site.plant.home.resolve().name,
        made_at=now.astimezone(zone),
        since=since.astimezone(zone),
        rolls=tuple(rolls),
        nights=_nights(runs, judged, now, zone),
        stability=stability,
        scores=_scores(site, judged, since),
        model=next((run.model for run in judged), None),
        jobs=jobs,
        alerts_waiting=waiting,
        troubles=troubles,
        old_at=_old_at(site, now),
    )


def newest(runs: Iterable[Run]) -> list[Run]:
    """Of each roll, model and rules the last run, in the order given: an older one is history."""
    found: dict[tuple[str, str, str], Run] = {}
    for run in runs:
        key = (run.roll_id, run.model_hash, run.rules_hash)
        found.pop(key, None)
        found[key] = run
    return list(found.values())


def roll_line(site: Site, run: Run, zone: tzinfo, *, named: bool = False) -> RollLine:
    """What the page says of one run."""
    state, reasons = _state(run, zone)
    by_class: dict[str, int] = json.loads(run.by_class or "{}")
    done = run.state == "done"
    return RollLine(
        roll_id=run.roll_id,
        state=state,
        verdict=run.verdict,
        reasons=reasons,
        line_id=run.line_id,
        coverage=run.coverage if done else None,
        length_m=run.length_m if done else None,
        width_mm=run.width_mm if done else None,
        defects=run.defects if done else None,
        by_class=tuple(sorted(by_class.items())),
        inspected_at=run.ended_at.astimezone(zone) if done and run.ended_at else None,
        page=_link(site, run),
        model=run.model if named else None,
    )


def _state(run: Run, zone: tzinfo) -> tuple[str, tuple[str, ...]]:
    """The state of a run as the page has it, and why it needs a person."""
    told = (run.error,) if run.error else ()
    if run.state == "done":
        reasons = tuple(map(str, json.loads(run.reasons or "[]")))
        if run.verdict in ("BLOCK", "BLOCKED"):
            return "blocked", reasons
        return ("hold", reasons) if run.verdict == "HOLD" else ("fine", ())
    if run.state == "gone":
        return "missing", told
    if run.state in ("failed", "dead"):
        hint = f"given up after {run.attempt} attempts; inspect jobs retry {run.roll_id}"
        reasons = (*told, hint) if run.state == "dead" else told
        return ("unreadable" if run.run_id is None else "failed"), reasons
    if run.state == "retry":
        again = f", tried again at {run.not_before.astimezone(zone):%a %H:%M}" if run.not_before else ""
        state = "unreadable" if run.run_id is None else "partial"
        return state, (*told, f"attempt {run.attempt} failed{again}")
    if run.state == "running" and run.started_at is not None:
        return "waiting", (f"at work since {run.started_at.astimezone(zone):%a %H:%M}",)
    return "waiting", (f"due since {run.created_at.astimezone(zone):%a %d %b %H:%M}",)


def _is_of(run: Run, since: datetime) -> bool:
    """Whether a run is the night's: it ended in it, or it waits, or it failed and nobody did anything."""
    if run.state in ("done", "gone"):
        return run.ended_at is not None and run.ended_at >= since
    return True


def _link(site: Site, run: Run) -> str | None:
    if run.state != "done" or run.folder is None or not run.folder.startswith("runs/"):
        return None
    page = Path(run.folder.removeprefix("runs/")) / "report.html"
    return urllib.parse.quote(page.as_posix()) if (site.plant.home / "runs" / page).is_file() else None


def _made_at(run: Run) -> datetime | None:
    """When the strip was made; where that is not known, when it was inspected."""
    return run.ended_at if run.closed_at == NEVER else run.closed_at


def _nights(runs: Sequence[Run], judged: Sequence[Run], now: datetime, zone: tzinfo) -> tuple[Night, ...]:
    """Spans of 24 hours up to now, by when the strip was made; counts of the one model that is judged."""
    areas, whole = [0.0] * NIGHTS, [0.0] * NIGHTS
    by_class: list[Counter[str]] = [Counter() for _ in range(NIGHTS)]
    states: list[Counter[str]] = [Counter() for _ in range(NIGHTS)]

    def back(run: Run) -> int | None:
        at = _made_at(run)
        nights = None if at is None else max(0, int((now - at) / timedelta(days=1)))
        return nights if nights is not None and nights < NIGHTS else None

    for run in runs:
        if (i := back(run)) is not None:
            states[i][_state(run, zone)[0]] += 1
    for run in judged:
        i = back(run)
        if i is None or not run.length_m or not run.width_mm or run.coverage is None:
            continue
        area = run.length_m * run.width_mm / 1000
        whole[i] += area
        areas[i] += area * run.coverage
        by_class[i].update(json.loads(run.by_class or "{}"))
    return tuple(
        Night(
            (now - timedelta(days=i)).astimezone(zone).date(),
            areas[i],
            dict(by_class[i]),
            dict(states[i]),
            whole[i],
        )
        for i in reversed(range(NIGHTS))
    )


def _scores(site: Site, judged: Sequence[Run], since: datetime) -> tuple[Scores, ...]:
    """Scores of the night against those of the nights before, class by class; each table is read once."""
    path = site.plant.home / "runs" / SCORES_FILE
    kept = _kept(path)
    found: dict[str, Histograms] = {}
    for run in judged:
        if run.run_id is None or run.folder is None:
            continue
        told = kept.get(run.run_id)
        if told is None:
            with contextlib.suppress(
                OSError, pa.ArrowException, KeyError
            ):  # a table that went is no reference
                told = histograms(site.plant.home / run.folder / "defects.parquet")
        if told is not None:
            found[run.run_id] = told
    if found.keys() - kept.keys():
        write_durably(path, json.dumps({"bins": SCORE_BINS, "runs": found}, separators=(",", ":")).encode())
    sums: list[defaultdict[str, NDArray[np.int64]]] = [
        defaultdict(lambda: np.zeros(SCORE_BINS, dtype=np.int64)) for _ in range(2)
    ]
    for run in judged:
        late = run.ended_at is not None and run.ended_at >= since
        for name, counts in found.get(run.run_id or "", {}).items():
            sums[late][name] += np.asarray(counts)
    return tuple(
        Scores(name, tuple(sums[0][name].tolist()), tuple(sums[1][name].tolist()))
        for name in sorted(sums[0].keys() | sums[1].keys())
    )


def histograms(table: Path) -> Histograms:
    """Counts of scores in SCORE_BINS bins of equal width over 0 to 1, per class of a defect table."""
    read = pq.read_table(table, columns=["class", "score"])
    names, kind = np.unique(np.asarray(read["class"].to_pylist(), dtype=object), return_inverse=True)
    bins = np.clip((read["score"].to_numpy() * SCORE_BINS).astype(int), 0, SCORE_BINS - 1)
    counts = np.bincount(kind * SCORE_BINS + bins, minlength=len(names) * SCORE_BINS)
    return {str(name): counts[i * SCORE_BINS : (i + 1) * SCORE_BINS].tolist() for i, name in enumerate(names)}


def _kept(path: Path) -> dict[str, Histograms]:
    """What was read before; nothing where the file is of another make or damaged."""
    try:
        told = json.loads(path.read_bytes())
        if told["bins"] == SCORE_BINS:
            for histogram in (h for run in told["runs"].values() for h in run.values()):
                if len(histogram) != SCORE_BINS or not all(type(n) is int for n in histogram):
                    return {}
            return told["runs"]  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {}


def _stability(
    site: Site, session: Session, now: datetime, since: datetime, zone: tzinfo
) -> Stability | None:
    """The worst of the last checks on the reference strip with its past, or why there was none."""
    worst = worst_check(site.line, session, now, now - since)
    row, is_old = (None, False) if worst is None else worst
    alert = _unchecked(site, session, now)
    if alert is not None and (row is None or row.in_band or alert.created_at > row.at):
        model = "" if row is None else row.model
        at = alert.created_at.astimezone(zone)
        return Stability(site.line.stability.roll, at, model, False, (), f"{alert.subject}: {alert.body}")
    if row is None:
        return None
    same = schema.Stability.roll_id == row.roll_id, schema.Stability.model_hash == row.model_hash
    past = session.scalars(
        select(schema.Stability).where(*same).order_by(schema.Stability.at.desc()).limit(NIGHTS)
    ).all()[::-1]
    bands = json.loads(row.bands)
    checks = []
    for what, said in (("gray", "mean gray"), ("counts", "defects")):
        values = [json.loads(getattr(each, what)) for each in past]
        for name, value in values[-1].items():
            low, high = bands[what].get(name, (0.0, 0.0))
            history = tuple(float(told[name]) for told in values if name in told)
            checks.append(Check(name, said, float(value), float(low), float(high), history))
    at = row.at.astimezone(zone)
    return Stability(row.roll_id, at, row.model, row.is_baseline, tuple(checks), is_old=is_old)


def _unchecked(site: Site, session: Session, now: datetime) -> Alert | None:
    """The alert of the last check that could not be made, unless its job made one since.

    Where no job of line.yaml tried it, such as a night by hand, any check since counts.
    """
    check = schema.Stability
    names = [job.name for job in site.line.jobs]
    # The alert of a check that was made, and was out of band, is as old as the check.
    of_check = select(check.id).where(check.at == Alert.created_at).exists()
    failed = (Alert.kind == "stability", Alert.created_at >= now - timedelta(days=NIGHTS), ~of_check)
    for alert in session.scalars(select(Alert).where(*failed).order_by(Alert.created_at.desc())):
        since = select(check.id).where(check.at > alert.created_at)
        if (slot := alert.dedupe_key.removeprefix("stability:")).isdecimal():
            job = session.scalar(select(Slot.job).where(Slot.id == int(slot), Slot.job.in_(names)))
            if job is not None:
                since = since.join(Slot, Slot.id == check.slot_id).where(Slot.job == job)
        if session.scalar(since.limit(1)) is None:
            return alert
    return None


def _troubles(
    site: Site, session: Session, now: datetime, since: datetime, zone: tzinfo
) -> tuple[Trouble, ...]:
    """What jobs did not do: late ones, moments not begun, slots of the night that did not end well."""
    last = last_success(session, now)
    told = []
    for job in site.line.jobs:
        if (late := late_since(site, session, job, now)) is not None:
            hours = site.line.late_after(job).total_seconds() / 3600
            why = "no success since" if job.name in last else "it never succeeded"
            told.append(Trouble(job.name, "late", late.astimezone(zone), f"{why}; late after {hours:g} h"))
        if (moment := missed(site, session, job, now)) is not None:
            why = "no tick made it due: is `inspect jobs run`, or what ticks in its place, at work?"
            told.append(Trouble(job.name, "missed", moment.astimezone(zone), why))
    undone: defaultdict[tuple[str, str], list[Slot]] = defaultdict(list)
    for slot in _undone(site, session, now, since):
        undone[slot.job, slot.state].append(slot)
    for (name, state), slots in undone.items():
        why = slots[-1].error or "no reason is told"
        if state == "retry" and (again := slots[-1].not_before) is not None:
            why += f"; tried again at {again.astimezone(zone):%a %H:%M}"
        if len(slots) > 1:
            why += f"; {len(slots) - 1} more since {slots[0].scheduled_for.astimezone(zone):%a %d %b %H:%M}"
        told.append(Trouble(name, state, slots[-1].scheduled_for.astimezone(zone), why))
    return tuple(told)


def _undone(site: Site, session: Session, now: datetime, since: datetime) -> list[Slot]:
    """Slots that did not end well since, or wait; not those that a later one of their job made good."""
    happened = select(Event.slot_id).where(
        Event.at >= since, Event.kind.in_([f"slot.{state}" for state in UNDONE])
    )
    # Of a job that no file names, such as a night by hand, nobody may come back to what waits.
    waits = and_(Slot.state == "retry", Slot.job.in_([job.name for job in site.line.jobs]))
    lately = or_(Slot.ended_at >= since, Slot.created_at >= since, Slot.id.in_(happened), waits)
    well = (Slot.state == "done", Slot.scheduled_for <= now)  # a clock that was ahead made good nothing since
    last = select(Slot.job, func.max(Slot.scheduled_for)).where(*well).group_by(Slot.job)
    made_good = dict(session.execute(last).all())
    slots = session.scalars(
        select(Slot).where(Slot.state.in_(UNDONE), lately).order_by(Slot.scheduled_for, Slot.id)
    )
    return [slot for slot in slots if slot.job not in made_good or made_good[slot.job] < slot.scheduled_for]


def _old_at(site: Site, now: datetime) -> datetime:
    """When this page should have made place: after a day, or where a moment passes and it is still there."""
    old = now + timedelta(hours=OLD_H)
    for job in site.line.jobs:
        upcoming = next(moments(job, site.line.zone_of(job), now, old), None)
        old = old if upcoming is None else min(old, upcoming + timedelta(hours=LATE_H))
    return old


def _last_success(
    site: Site, session: Session, now: datetime, zone: tzinfo
) -> tuple[tuple[str, datetime | None], ...]:
    last = last_success(session, now)
    names = [job.name for job in site.line.jobs] or sorted(last)
    return tuple((name, last[name].astimezone(zone) if name in last else None) for name in names)
