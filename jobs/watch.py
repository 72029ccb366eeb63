"""A drop folder: what comes in is ingested when it is complete, and inspected at once; growing rolls too.

An entry of the folder is a sub-folder of image strips or of a patch export, or a raw file with its JSON
sidecar; its name is the roll's id, and `strip.json` or the sidecar tells the rest. It is complete when a
`.done` file lies in it (beside a raw file: NAME.done), or when nothing in it has changed for a while. What
was ingested stays where it is: the roll of its name says that it is done, and where retention took the roll
away, the ledger says so; only an entry that changed since is taken again. Where the roll is still there, a
person is told of the change: what came late was not inspected.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import CONFIG, LOCKED, USAGE, UserError
from rollsight.inspect.ingest import ingest
from rollsight.inspect.models import CARD
from rollsight.inspect.promoted import POINTER
from rollsight.inspect.roll_state import last_written, strip_at
from rollsight.inspect.strips import Strip, check_roll_id, is_plain_name
from rollsight.jobs.cluster import Executor
from rollsight.jobs.due import Job, find_due
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Artifact, Event, Run
from rollsight.jobs.live_job import scan_so_far
from rollsight.jobs.nightly import OnRoll, candidates, open_job, rolls_away, short_of_disk
from rollsight.jobs.retention import RAW
from rollsight.jobs.sites import Site
from rollsight.jobs.ticker import begin_by_hand, run_slot
from rollsight.jobs.workers import FULL
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

DONE = ".done"
SIDECAR = ".json"
SETTLE_S = 30.0
FULL_S = 60.0  # after a disk was full for an entry none is begun for so long
INGESTED = "roll.ingested"  # event; detail: {"entry", "look"}

Look = tuple[int, int, int]  # files, bytes, newest change in ns
Files = dict[Path, tuple[int, int, int]]  # inode, bytes, change in ns of what is there


class FolderAwayError(UserError):
    """There is no such drop folder: it is named wrongly, or its disk is away."""

    def __init__(self, message: str) -> None:
        super().__init__(message, USAGE)


@dataclass(slots=True)
class Watched:
    """What is remembered from look to look; lost with the process, and found again by the next."""

    looks: dict[str, tuple[Look, float]] = field(default_factory=dict)  # entry -> how it was, since when
    refused: dict[str, Look] = field(default_factory=dict)  # entry -> how it was when it was refused
    taken: dict[str, tuple[int, ...]] = field(default_factory=dict)  # entry of a roll -> its last `changes`
    full_until: float = -math.inf  # monotonic: no entry is begun before
    job: Job | None = None  # as it was opened last
    stuck: Job | None = None  # its set-up failed a night: none is begun until it is opened anew
    opened: Files = field(default_factory=dict)  # how its model's and rules' files were then
    is_short: bool = False  # of disk or of rolls, and told
    looked: bool = False  # once at least
    faults: tuple[str, ...] = ()  # of the last look


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look came to."""

    ingested: tuple[str, ...]  # rolls
    refused: tuple[tuple[str, str], ...]  # entry and one line
    waiting: tuple[str, ...]  # entries that are not complete
    growing: tuple[str, ...]  # rolls that were scanned on as they grow
    exit_code: int = 0  # of the scans
    told: str = ""
    faults: tuple[str, ...] = ()  # that are new, a line each: what may pass by itself


def look_on(
    site: Site, folder: Path, watched: Watched, *, model: str | None, rules: str | None, **options: Any
) -> Seen:
    """Look once more, as `look` with these options, and model and rules as they are now; no model: ingest.

    What is wrong at the first look is raised. Later a ledger or a disk that is away for a moment, and a model
    or rules that cannot be opened, are told in `faults`, once while they last.
    """
    job, seen, faults = None, Seen((), (), (), ()), []
    try:
        job = None if model is None else job_now(site, watched, model, rules)
    except UserError as fault:
        if not watched.looked:
            raise
        faults.append(str(fault))
    try:
        seen = look(site, folder, watched, job=job, **options)
    except UserError as fault:
        if not watched.looked or not (fault.exit_code == LOCKED or isinstance(fault, FolderAwayError)):
            raise
        faults.append(str(fault))
    except OSError as fault:
        if not watched.looked:
            raise
        faults.append(f"{fault.filename or folder}: {fault.strerror or fault}")
    new = tuple(fault for fault in faults if fault not in watched.faults)
    watched.looked, watched.faults = True, tuple(faults)
    return replace(seen, faults=new)


def look(
    site: Site,
    folder: Path,
    watched: Watched,
    *,
    settle_s: float = SETTLE_S,
    job: Job | None = None,
    live: Executor | None = None,
    on_roll: OnRoll | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> Seen:
    """Look at the folder once: ingest what is complete, and with `job` inspect all that is due then.

    live: scans the bands that are there of each roll of the plant that still grows. A bad entry is refused,
    told once by an alert, and taken up again when it changes; one for which the disk has no room waits, as do
    all others for a minute. FolderAwayError where there is no such folder.
    """
    ingested, refused, waiting = [], [], []
    if not folder.is_dir():
        raise FolderAwayError(f"no folder {folder}: name the folder that rolls are dropped into")
    for entry in entries(folder):
        roll_id = entry.stem if entry.is_file() else entry.name
        if is_plain_name(roll_id) and last_written(site.plant.roll_path(roll_id)) is not None:
            if watched.taken.get(entry.name) != (now_changes := changes(entry)):
                tell_late_parts(site, entry, roll_id)
                watched.taken[entry.name] = now_changes
            continue
        if is_plain_name(roll_id) and was_taken(site, entry, roll_id):
            continue
        now_look = look_at(entry)
        if watched.refused.get(entry.name) == now_look:
            continue
        before, since = watched.looks.get(entry.name, (None, 0.0))
        if before != now_look:
            since = monotonic()
            watched.looks[entry.name] = (now_look, since)
        if not is_marked(entry) and (now_look[0] == 0 or monotonic() - since < settle_s):
            waiting.append(printable(entry.name))
            continue
        if monotonic() < watched.full_until:
            waiting.append(printable(entry.name))
            continue
        how = look_at(entry, content=True)  # before the ingest: what changes under it is told, not lost
        try:
            take(site, entry, roll_id)
        except UserError as fault:
            if look_at(entry) != now_look:  # it changed under the ingest, or its disk went away
                waiting.append(printable(entry.name))
                continue
            told_now = printable(str(fault))
            if is_full(fault):
                watched.full_until = monotonic() + FULL_S
                _tell(site, entry, now_look, told_now, "disk", "has no room in the plant, and waits for it")
                waiting.append(printable(entry.name))
                continue
            _tell(site, entry, now_look, told_now, "unreadable", "cannot be ingested")
            watched.refused[entry.name] = now_look
            refused.append((printable(entry.name), told_now))
        else:
            note_taken(site, entry, roll_id, how)
            ingested.append(roll_id)
    growing = tuple(_scan_growing(site, job, live)) if job is not None and live is not None else ()
    code, told = 0, ""
    if job is not None and job is not watched.stuck and is_due(site, job):
        if (short := short_of_disk(site) or rolls_away(site)) is not None:
            code, told = LOCKED, "" if watched.is_short else short
        else:
            code, told = run_slot(
                site, begin_by_hand(site), None, None, job=job, on_roll=on_roll, with_reference=False
            )
            watched.stuck = job if code == CONFIG else None
        watched.is_short = short is not None
    return Seen(tuple(ingested), tuple(refused), tuple(waiting), growing, code, told)


def job_now(site: Site, watched: Watched, model: str, rules: str | None) -> Job:
    """The job with model and rules as they are now; opened anew only where a file that decides them changed.

    UserError 78 as `open_job`.
    """
    deciding = (site.plant.models / POINTER, *site.plant.models.glob(f"*/{CARD}"), Path(model) / CARD)
    files: Files = {}
    for path in (*deciding, *(() if rules is None else (site.plant.home / rules,))):
        with contextlib.suppress(OSError):  # not there: `open_job` says so where it must be
            status = path.stat()
            files[path] = status.st_ino, status.st_size, status.st_mtime_ns
    if watched.job is None or watched.opened != files:
        watched.job = None  # what does not hold any more is not gone on with
        watched.job, watched.opened = open_job(site, None, model=model, rules=rules), files
    return watched.job


def entries(folder: Path) -> Iterator[Path]:
    """Sub-folders, and files with a sidecar of their name, in order; hidden ones are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix in (SIDECAR, DONE):
            continue
        if path.is_dir() or path.with_suffix(SIDECAR).is_file():
            yield path


def printable(name: str) -> str:
    """A name as ledger and terminal can hold it: what is no UTF-8 in it becomes U+FFFD."""
    try:
        return os.fsencode(name).decode("utf-8", "replace")
    except UnicodeEncodeError:  # a lone surrogate, which a JSON file may spell and no file name has
        return name.encode("utf-8", "replace").decode()


def look_at(entry: Path, *, content: bool = False) -> Look:
    """How the entry is now: it grows as long as this changes. content: without its mark of being complete."""
    files = [entry, entry.with_suffix(SIDECAR)] if entry.is_file() else list(entry.rglob("*"))
    if content:
        files = [path for path in files if path != entry / DONE]
    count = size = newest = 0
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # a file that is renamed as it is whole
            status = path.stat()
            if path.is_file():
                count, size = count + 1, size + status.st_size
            newest = max(newest, status.st_mtime_ns)
    return count, size, newest


def changes(entry: Path) -> tuple[int, ...]:
    """When, in ns, a file came into the entry or went, as its folders say, or a raw file or sidecar changed.

    A look at no single file of a folder, since there may be thousands of entries whose rolls are there.
    """
    found: list[int] = []
    with contextlib.suppress(OSError):  # someone clears up, or its disk is away: so much for now
        beside = [entry.with_suffix(SIDECAR)]
        if entry.is_dir():
            with os.scandir(entry) as inside:  # it knows folders without a look at each file
                beside = sorted(Path(item.path) for item in inside if item.is_dir())
        found += [path.stat().st_mtime_ns for path in (entry, *beside)]
    return tuple(found)


def is_full(fault: BaseException | None) -> bool:
    """Whether a disk or quota that is full stands behind a fault."""
    while fault is not None and not (isinstance(fault, OSError) and fault.errno in FULL):
        fault = fault.__cause__ or fault.__context__
    return fault is not None


def is_marked(entry: Path) -> bool:
    """Whether someone says that it is complete."""
    return (entry.with_suffix(DONE) if entry.is_file() else entry / DONE).exists()


def take(site: Site, entry: Path, roll_id: str) -> None:
    """Make the roll of an entry; UserError in one line where it cannot be."""
    check_roll_id(roll_id)
    strip = Strip(roll_id=roll_id, side=None, lighting=(), mm_per_px_x=None, mm_per_line=None)
    ingest(entry, site.plant.roll_path(roll_id), strip)


def note_taken(site: Site, entry: Path, roll_id: str, how: Look) -> None:
    """Write into the ledger of which entry the roll was made, and how that was."""
    now = site.clock()
    detail = json.dumps({"entry": printable(entry.name), "look": how})
    site.ledger.keep(lambda session: add_event(session, now, INGESTED, roll_id=roll_id, detail=detail))


def last_taken(session: Session, roll_id: str) -> tuple[datetime | None, str, Look | None]:
    """When the roll was ingested last, of which entry, and how that was; "" and None where nobody told."""
    ingested = select(Event).where(Event.kind == INGESTED, Event.roll_id == roll_id)
    event = session.scalars(ingested.order_by(Event.id.desc()).limit(1)).first()
    if event is None or not (event.detail or "").startswith("{"):
        return None if event is None else event.at, "", None
    told = json.loads(event.detail or "")
    return event.at, told["entry"], tuple(told["look"])


def tell_late_parts(site: Site, entry: Path, roll_id: str) -> None:
    """An alert, once, where an entry has more than the roll was made of: no clearing up is told of."""
    with site.ledger.read() as session:
        _, name, look = last_taken(session, roll_id)
    if look is None or name != printable(entry.name):
        return
    files, size, _ = look_at(entry, content=True)
    if files <= look[0] and size <= look[1]:
        return
    now = site.clock()
    subject = f"{roll_id}: its entry in the drop folder changed after it was ingested"
    body = (
        f"It had {look[0]} files of {look[1]} bytes, and has {files} of {size} now. What came late is not in "
        f"the roll and not inspected. To have the entry taken anew, remove {site.plant.roll_path(roll_id)}."
    )
    key = f"drop:late:{roll_id}:{'.'.join(map(str, look))}"
    site.ledger.keep(lambda session: put_alert(session, now, key, "missing", subject, body, roll_id=roll_id))


def was_taken(site: Site, entry: Path, roll_id: str) -> bool:
    """Whether a roll that is not there was made of the entry as it is, and then taken away."""
    removed = select(func.max(Artifact.deleted_at)).where(Artifact.kind == RAW, Artifact.roll_id == roll_id)
    with site.ledger.read() as session:
        at, name, look = last_taken(session, roll_id)
        gone = session.scalar(removed)
    if look is not None:
        return name == printable(entry.name) and look == look_at(entry, content=True)
    # Ingested by an older version, which told no more than the entry's name, or by hand: by the times.
    known = [moment for moment in (at, gone) if moment is not None]
    if not known:
        return False
    newest = look_at(entry, content=True)[2] // 1000
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=newest) <= max(known)


def is_due(site: Site, job: Job) -> bool:
    """Whether a roll can be begun now; those that are new in the plant go into the ledger."""
    now = site.clock()
    find_due(site, job, None, f"{now:%Y-%m-%d}")
    begins = or_(Run.state == "due", and_(Run.state == "retry", Run.not_before <= now))
    with site.ledger.read() as session:
        keys = candidates(session, job)
        return session.scalar(select(Run.id).where(Run.id.in_(keys), begins).limit(1)) is not None


def _tell(site: Site, entry: Path, how: Look, told: str, kind: str, what: str) -> None:
    now = site.clock()
    name = printable(entry.name)[:80]
    key = f"drop:{'full:' if kind == 'disk' else ''}{name}:{'.'.join(map(str, how))}"
    subject = f"{name} in the drop folder {what}"
    site.ledger.keep(lambda session: put_alert(session, now, key, kind, subject, told))


def _scan_growing(site: Site, job: Job, executor: Executor) -> Iterator[str]:
    """Scan on what grows; a roll that cannot be read now is told of when it is closed, or is read later."""
    for roll_id in site.plant.roll_ids():
        with contextlib.suppress(UserError):
            if strip_at(site.plant.roll_path(roll_id)).closed:
                continue
            roll = site.plant.roll(roll_id, live=True)
            if scan_so_far(site.plant, roll, job.model, executor) is not None:
                yield roll_id
