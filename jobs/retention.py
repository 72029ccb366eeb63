"""Retention: what takes room goes by the plant's rule, in two phases, and never what someone still needs.

    retention: {masks_d: 90, raw_d: 30, raw_keep: [HOLD, BLOCKED], grace_d: 7, reserve_gb: 50}

Class masks go after 90 days, components (defect table, page, summary) stay for ever, images stay unless the
plant says after how many days. First a thing is marked; after the grace it is taken away. A roll with a run
that is open, on hold, or being scanned keeps all it has, and what was marked is unmarked. Where the disk is
below the reserve, masks that are marked go before their grace ends, oldest first; images never do.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from rollsight.inspect.errors import UserError
from rollsight.inspect.masks import take_away
from rollsight.inspect.roll_places import sync
from rollsight.inspect.roll_state import last_written, strip_at
from rollsight.jobs.channels import part_of_line
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import inserted
from rollsight.jobs.ledger.schema import Artifact, Hold, Run
from rollsight.jobs.scan_job import lock
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from sqlalchemy import select, text
from sqlalchemy.orm import Session

MASK, RAW, COMPONENTS = "mask", "raw", "components"
OPEN = ("due", "running", "retry")
DELETED = ".deleted-"  # begins the name of what is being removed


class Keep(BaseModel):
    """`retention:` of line.yaml; days from when a thing was made, None for ever."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    masks_d: float | None = Field(default=90.0, gt=0, le=36_500)
    raw_d: float | None = Field(default=None, gt=0, le=36_500)  # images of rolls that were inspected
    raw_keep: tuple[str, ...] = ("HOLD", "BLOCK", "BLOCKED")  # verdicts whose rolls keep their images
    grace_d: float = Field(default=7.0, ge=0, le=36_500)  # from mark to removal
    reserve_gb: float | None = Field(default=None, ge=0)  # None: disk_reserve_gb of line.yaml

    def days(self, kind: str) -> float | None:
        return {MASK: self.masks_d, RAW: self.raw_d}.get(kind)


@dataclass(frozen=True, slots=True)
class Step:
    """What was done with one thing, or would be."""

    action: str  # mark, delete, unmark, wait
    kind: str  # mask, raw
    roll_id: str
    run_id: str | None
    path: str  # relative to the plant folder
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class _Thing:
    """A thing on disk that the ledger should know."""

    path: Path
    kind: str
    roll_id: str
    run_id: str | None
    created_at: datetime


def keep_of(line: LineFile) -> Keep:
    """The rule of line.yaml; UserError 78 that names what is wrong."""
    return part_of_line(Keep, "retention", line.retention)


def retain(site: Site, *, dry_run: bool = False) -> list[Step]:
    """Mark what has come of age, take away what was marked a grace ago; with `dry_run` tell, and do nothing.

    May be killed at any moment: what was moved aside is removed the next time.
    """
    keep = keep_of(site.line)
    if not dry_run:
        _sweep(site)
        _register(site)
    steps = _mark(site, keep, dry_run=dry_run)
    return [*steps, *_delete(site, keep, dry_run=dry_run)]


def _things(site: Site) -> Iterator[_Thing]:
    """Images, masks and defect tables of the plant."""
    runs = site.plant.home / "runs"
    for told in sorted(runs.glob("[!.]*/*/summary.json")):
        folder, written = told.parent, datetime.fromtimestamp(told.stat().st_mtime, UTC)
        roll_id, run_id = folder.parent.name, folder.name
        beside = site.plant.rolls / f"{roll_id}.zarr" / "labels" / run_id
        for mask in (beside, folder / "mask.zarr"):
            if mask.is_dir():
                yield _Thing(mask, MASK, roll_id, run_id, written)
        if (folder / "defects.parquet").is_file():
            yield _Thing(folder / "defects.parquet", COMPONENTS, roll_id, run_id, written)
    for roll_id in site.plant.roll_ids():
        path = site.plant.roll_path(roll_id)
        if (closed_at := last_written(path)) is not None:
            yield _Thing(path, RAW, roll_id, None, closed_at)


def _register(site: Site) -> None:
    """Write into the ledger what it does not know; what came back after it was deleted counts as new."""
    found = {site.relative(thing.path): thing for thing in _things(site)}

    def put(session: Session) -> None:
        known = {row.path: row for row in session.scalars(select(Artifact))}
        for path, thing in found.items():
            row = known.get(path)
            if row is None:
                single = thing.path.is_file()
                facts: dict[str, object] = {
                    "path": path,
                    "kind": thing.kind,
                    "roll_id": thing.roll_id,
                    "run_id": thing.run_id,
                    "sha256": hashlib.sha256(thing.path.read_bytes()).hexdigest() if single else None,
                    "bytes": thing.path.stat().st_size if single else None,
                    "created_at": thing.created_at,
                }
                inserted(session, Artifact, facts)
            elif row.deleted_at is not None or (row.kind == RAW and row.created_at != thing.created_at):
                row.created_at, row.marked_at, row.deleted_at = thing.created_at, None, None
        for path, row in known.items():
            if (
                path not in found and row.deleted_at is None
            ):  # taken away by hand, or by a sweep that was killed
                row.deleted_at = site.clock()

    site.ledger.keep(put)


def _mark(site: Site, keep: Keep, *, dry_run: bool) -> list[Step]:
    """First phase: mark what has come of age."""
    now = site.clock()

    def mark(session: Session) -> list[Step]:
        guarded, verdicts = _guarded(session), _verdicts(session)
        steps = []
        if dry_run:
            rows = _as_rows(site, session)
            session.expunge_all()  # nothing of it is written
        else:
            live = Artifact.deleted_at.is_(None), Artifact.kind.in_((MASK, RAW))
            rows = session.scalars(select(Artifact).where(*live)).all()
        for row in rows:
            days = keep.days(row.kind)
            row.expires_at = None if days is None else row.created_at + timedelta(days=days)
            if row.expires_at is None:
                row.marked_at = None  # the rule was changed
                continue
            if row.expires_at > now:
                row.marked_at = None
                continue
            if row.marked_at is not None or row.roll_id in guarded:
                continue
            path = site.plant.home / row.path
            if row.kind == RAW and _why_kept(path, row, verdicts, keep) is not None:
                continue
            row.bytes = _bytes_of(path)
            row.marked_at = now
            if not dry_run:
                add_event(session, now, "artifact.marked", roll_id=row.roll_id, detail=row.path)
            steps.append(_step("mark", row, f"older than {days:g} days; goes after {keep.grace_d:g} more"))
        return steps

    if dry_run:
        with site.ledger.read() as session:
            return mark(session)
    return site.ledger.keep(mark)


def _delete(site: Site, keep: Keep, *, dry_run: bool) -> list[Step]:
    """Second phase: take away what was marked a grace ago, and masks sooner where the disk is short."""
    now = site.clock()
    reserve = 1e9 * (site.line.disk_reserve_gb if keep.reserve_gb is None else keep.reserve_gb)
    with site.ledger.read() as session:
        marked = session.scalars(
            select(Artifact)
            .where(Artifact.marked_at.is_not(None), Artifact.deleted_at.is_(None))
            .order_by(Artifact.marked_at, Artifact.created_at)
        ).all()
        session.expunge_all()
    steps = []
    freed = 0  # by a dry run, which changes no disk
    for row in marked:
        assert row.marked_at is not None
        over = row.marked_at + timedelta(days=keep.grace_d) <= now
        short = row.kind == MASK and shutil.disk_usage(site.plant.home).free + freed < reserve
        if not over and not short:
            continue
        why = f"marked {row.marked_at:%Y-%m-%d}" + (
            "" if over else f", and under {reserve / 1e9:g} GB are free"
        )
        if not dry_run:
            steps.append(_take_away(site, row, why, keep))
        elif (reason := _told_by(site, row, keep)) is not None:
            steps.append(_step("unmark", row, reason))
        else:
            freed += row.bytes or 0
            steps.append(_step("delete", row, why))
    return steps


def _told_by(site: Site, row: Artifact, keep: Keep) -> str | None:
    """Of a dry run: why a marked thing would stay."""
    with site.ledger.read() as session:
        return _reason(session, site.plant.home / row.path, row, keep)


def _reason(session: Session, path: Path, row: Artifact, keep: Keep) -> str | None:
    """Why a marked thing stays after all: a hold, an open run, and for images all that the mark asked for.

    A grace is long: a run that ended during it may hold the roll back, and the roll may be another one.
    """
    if (reason := _guarded(session).get(row.roll_id)) is not None:
        return reason
    if row.kind != RAW or not path.exists():
        return None
    return _why_kept(path, row, _verdicts(session), keep)


def _take_away(site: Site, marked: Artifact, why: str, keep: Keep) -> Step:
    """One thing: moved aside while nobody can hold its roll or begin a run on it, then removed."""
    path = site.plant.home / marked.path
    aside = path.with_name(f"{DELETED}{path.name}-{marked.id}")

    def move(session: Session) -> Step:
        if site.ledger.backend == "postgresql":  # SQLite has one writer anyway
            session.execute(text("LOCK TABLE hold, run IN SHARE MODE"))
        row = session.get_one(Artifact, marked.id)
        if (reason := _reason(session, path, row, keep)) is not None:
            row.marked_at = None
            return _step("unmark", row, reason)
        if path.exists():
            if row.kind == MASK and path.parent.name == "labels":
                take_away(path, aside)
            else:
                path.rename(aside)
                sync(path.parent)
        row.deleted_at = site.clock()
        if row.kind == RAW:  # the masks beside the image went with it
            inside = select(Artifact).where(Artifact.path.startswith(row.path + "/", autoescape=True))
            for mask in session.scalars(inside):
                mask.deleted_at = mask.deleted_at or site.clock()
        add_event(session, site.clock(), "artifact.deleted", roll_id=row.roll_id, detail=row.path)
        return _step("delete", row, why)

    try:
        with ExitStack() as stack:
            runs = site.plant.home / "runs" / marked.roll_id
            folders = (
                [runs / marked.run_id] if marked.run_id else sorted(p for p in runs.glob("*") if p.is_dir())
            )
            for folder in folders:
                if folder.is_dir():
                    stack.enter_context(lock(folder))  # nobody scans it
            step = site.ledger.keep(move)
    except UserError as fault:
        return _step("wait", marked, str(fault))
    if aside.is_dir():
        _remove(aside)
    return step


def _sweep(site: Site) -> None:
    """Remove what was moved aside by a process that died."""
    places = (site.plant.rolls.glob(f"{DELETED}*"), site.plant.rolls.glob(f"[!.]*.zarr/labels/{DELETED}*"))
    runs = (site.plant.home / "runs").glob(f"*/*/{DELETED}*")
    for found in (*places, runs):
        for left in list(found):
            _remove(left)


def _remove(folder: Path) -> None:
    """Remove a folder that another process may be removing too."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):  # the other one was faster
            shutil.rmtree(folder)


def _guarded(session: Session) -> dict[str, str]:
    """Rolls of which nothing goes, each with its reason."""
    found = dict.fromkeys(
        session.scalars(select(Run.roll_id).where(Run.state.in_(OPEN))), "it has an open run"
    )
    held = session.execute(select(Hold.roll_id, Hold.reason).where(Hold.released_at.is_(None)))
    return found | {roll_id: f"on hold: {reason}" for roll_id, reason in held}


def _verdicts(session: Session) -> dict[tuple[str, datetime], str]:
    """The newest verdict of each inspected roll, by its id and when it was closed: an id may come again."""
    rows = session.execute(
        select(Run.roll_id, Run.closed_at, Run.verdict)
        .where(Run.state == "done")
        .order_by(Run.ended_at, Run.id)
    )
    return {(roll_id, closed_at): verdict or "" for roll_id, closed_at, verdict in rows}


def _why_kept(roll: Path, row: Artifact, verdicts: dict[tuple[str, datetime], str], keep: Keep) -> str | None:
    """Why an image stays; None where it may go: inspected as it is, and of no verdict that keeps it."""
    verdict = verdicts.get((row.roll_id, row.created_at))
    if verdict is None:
        return "it was not inspected as it is now"
    if verdict in keep.raw_keep:
        return f"its verdict is {verdict}"
    try:
        if last_written(roll) != row.created_at:
            return "it was made again since"
        return None if strip_at(roll).closed else "it is not closed"
    except UserError as fault:
        return str(fault)


def _as_rows(site: Site, session: Session) -> Sequence[Artifact]:
    """Of a dry run: the things on disk as the ledger would hold them."""
    known = {row.path: row for row in session.scalars(select(Artifact))}
    rows = []
    for thing in _things(site):
        path = site.relative(thing.path)
        row = known.get(path)
        again = row is not None and row.kind == RAW and row.created_at != thing.created_at
        if row is None or row.deleted_at is not None or again:
            facts = (thing.kind, thing.roll_id, thing.run_id, thing.created_at)
            row = Artifact(
                path=path, **dict(zip(("kind", "roll_id", "run_id", "created_at"), facts, strict=True))
            )
        if row.kind in (MASK, RAW):
            rows.append(row)
    return rows


def _step(action: str, row: Artifact, why: str) -> Step:
    return Step(action, row.kind, row.roll_id, row.run_id, row.path, row.bytes or 0, why)


def _bytes_of(path: Path) -> int:
    """What the files under the path take on disk."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.lstat().st_blocks * 512
    return total
