"""A drop folder: what comes in is ingested when it is complete, and inspected at once; growing rolls too.

An entry of the folder is a sub-folder of image strips or of a patch export, or a raw file with its JSON
sidecar; its name is the roll's id, and `strip.json` or the sidecar tells the rest. It is complete when a
`.done` file lies in it (beside a raw file: NAME.done), or when nothing in it has changed for a while. What
was ingested stays where it is: the roll of its name says that it is done.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.ingest import ingest
from rollsight.inspect.roll_state import last_written, strip_at
from rollsight.inspect.strips import Strip, check_roll_id, is_plain_name
from rollsight.jobs.cluster import Executor
from rollsight.jobs.due import Job, find_due
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Run
from rollsight.jobs.live_job import scan_so_far
from rollsight.jobs.nightly import OnRoll, candidates
from rollsight.jobs.sites import Site
from rollsight.jobs.ticker import begin_by_hand, run_slot
from sqlalchemy import and_, or_, select

DONE = ".done"
SIDECAR = ".json"
SETTLE_S = 30.0

Look = tuple[int, int, int]  # files, bytes, newest change in ns


@dataclass(slots=True)
class Watched:
    """What is remembered from look to look; lost with the process, and found again by the next."""

    looks: dict[str, tuple[Look, float]] = field(default_factory=dict)  # entry -> how it was, since when
    refused: dict[str, Look] = field(default_factory=dict)  # entry -> how it was when it was refused


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look came to."""

    ingested: tuple[str, ...]  # rolls
    refused: tuple[tuple[str, str], ...]  # entry and one line
    waiting: tuple[str, ...]  # entries that are not complete
    growing: tuple[str, ...]  # rolls that were scanned on as they grow
    exit_code: int = 0  # of the scans
    told: str = ""


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
    told once by an alert, and taken up again when it changes. UserError where there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name the folder that rolls are dropped into", USAGE)
    ingested, refused, waiting = [], [], []
    for entry in entries(folder):
        roll_id = entry.stem if entry.is_file() else entry.name
        if is_plain_name(roll_id) and last_written(site.plant.roll_path(roll_id)) is not None:
            continue
        now_look = look_at(entry)
        if watched.refused.get(entry.name) == now_look:
            continue
        before, since = watched.looks.get(entry.name, (None, 0.0))
        if before != now_look:
            since = monotonic()
            watched.looks[entry.name] = (now_look, since)
        if not is_marked(entry) and (now_look[0] == 0 or monotonic() - since < settle_s):
            waiting.append(entry.name)
            continue
        try:
            take(site, entry, roll_id)
        except UserError as fault:
            watched.refused[entry.name] = now_look
            refused.append((entry.name, str(fault)))
            _tell(site, entry, now_look, str(fault))
        else:
            ingested.append(roll_id)
    growing = tuple(_scan_growing(site, job, live)) if job is not None and live is not None else ()
    code, told = 0, ""
    if job is not None and is_due(site, job):
        code, told = run_slot(
            site, begin_by_hand(site), None, None, job=job, on_roll=on_roll, with_reference=False
        )
    return Seen(tuple(ingested), tuple(refused), tuple(waiting), growing, code, told)


def entries(folder: Path) -> Iterator[Path]:
    """Sub-folders, and files with a sidecar of their name, in order; hidden ones are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix in (SIDECAR, DONE):
            continue
        if path.is_dir() or path.with_suffix(SIDECAR).is_file():
            yield path


def look_at(entry: Path) -> Look:
    """How the entry is now: it grows as long as this changes."""
    files = [entry, entry.with_suffix(SIDECAR)] if entry.is_file() else list(entry.rglob("*"))
    count = size = newest = 0
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # a file that is renamed as it is whole
            status = path.stat()
            if path.is_file():
                count, size = count + 1, size + status.st_size
            newest = max(newest, status.st_mtime_ns)
    return count, size, newest


def is_marked(entry: Path) -> bool:
    """Whether someone says that it is complete."""
    return (entry.with_suffix(DONE) if entry.is_file() else entry / DONE).exists()


def take(site: Site, entry: Path, roll_id: str) -> None:
    """Make the roll of an entry; UserError in one line where it cannot be."""
    check_roll_id(roll_id)
    strip = Strip(roll_id=roll_id, side=None, lighting=(), mm_per_px_x=None, mm_per_line=None)
    ingest(entry, site.plant.roll_path(roll_id), strip)
    now = site.clock()
    with site.ledger.write() as session:
        add_event(session, now, "roll.ingested", roll_id=roll_id, detail=entry.name)


def is_due(site: Site, job: Job) -> bool:
    """Whether a roll can be begun now; those that are new in the plant go into the ledger."""
    now = site.clock()
    find_due(site, job, None, f"{now:%Y-%m-%d}")
    begins = or_(Run.state == "due", and_(Run.state == "retry", Run.not_before <= now))
    with site.ledger.read() as session:
        keys = candidates(session, job)
        return session.scalar(select(Run.id).where(Run.id.in_(keys), begins).limit(1)) is not None


def _tell(site: Site, entry: Path, how: Look, told: str) -> None:
    now = site.clock()
    key = f"drop:{entry.name[:80]}:{'.'.join(map(str, how))}"
    subject = f"{entry.name[:80]} in the drop folder cannot be ingested"
    site.ledger.keep(lambda session: put_alert(session, now, key, "unreadable", subject, told))


def _scan_growing(site: Site, job: Job, executor: Executor) -> Iterator[str]:
    """Scan on what grows; a roll that cannot be read now is told of when it is closed, or is read later."""
    for roll_id in site.plant.roll_ids():
        with contextlib.suppress(UserError):
            if strip_at(site.plant.roll_path(roll_id)).closed:
                continue
            roll = site.plant.roll(roll_id, live=True)
            if scan_so_far(site.plant, roll, job.model, executor) is not None:
                yield roll_id
