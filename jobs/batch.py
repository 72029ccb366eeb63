"""Which rolls a command is given: ids, patterns, a CSV, a line, a time since which they were closed."""

import csv
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.roll_state import last_written, strip_at
from rollsight.inspect.strips import is_plain_name
from rollsight.jobs.due import closed_or_never, is_pattern, matches
from rollsight.jobs.schedule import read_line

MAX_ROWS = 100_000
_SPAN = re.compile(r"(\d{1,6})([hd])")


def choose_rolls(
    plant: Plant,
    rolls: Sequence[str] = (),
    *,
    batch: Path | None = None,
    since: str | None = None,
    line: str | None = None,
    now: datetime | None = None,
) -> list[str]:
    """The rolls meant, each once: those named and in the batch in their order, others by age.

    rolls: ids, URLs, or patterns such as CGL2-*. batch: a CSV with the column roll_id, and priority if it has
    one (higher first). since: closed since a date or moment, or 36h or 3d ago. line: of this line. The last
    two leave out what does not fit; alone they take all closed rolls of the plant that do. UserError 2
    where nothing is named or the CSV cannot be read, 1 where a pattern or filter fits no roll.
    """
    chosen: dict[str, None] = {}
    for name in rolls:
        chosen.update(dict.fromkeys(_matching(plant, name) if is_pattern(name) else [name]))
    if batch is not None:
        chosen.update(dict.fromkeys(read_batch(batch)))
    if since is None and line is None:
        if not chosen:
            raise UserError("no ROLL is named: name some, or say --batch, --since or --line", USAGE)
        return list(chosen)
    if remote := next((name for name in chosen if "://" in name), None):
        raise UserError(f"--since and --line choose rolls of the plant, and {remote} is none", USAGE)
    start = None if since is None else since_of(plant, since, now or datetime.now(UTC))
    kept = [name for name in chosen or by_age(plant) if _fits(plant, name, start, line)]
    if not kept:
        said = " ".join(f"--{name} {value}" for name, value in (("since", since), ("line", line)) if value)
        raise UserError(f"no closed roll of {plant.rolls} fits {said}")
    return kept


def read_batch(path: Path) -> list[str]:
    """The rolls of a CSV by priority, then in their order; UserError with the line that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames is None or "roll_id" not in rows.fieldnames:
                has = ", ".join(rows.fieldnames or ()) or "none"
                raise UserError(f"{path} needs a column roll_id; it has {has[:200]}", USAGE)
            found: list[tuple[int, str]] = []
            for row in rows:
                if len(found) == MAX_ROWS:
                    raise UserError(f"{path} has over {MAX_ROWS:,} rows: give it in parts", USAGE)
                found.append(_row(path, rows.line_num, row))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: name a CSV file that is there", USAGE) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable as CSV ({error}): save it as UTF-8", USAGE) from None
    if not found:
        raise UserError(f"{path} names no roll", USAGE)
    return [roll_id for _, roll_id in sorted(found, key=lambda row: -row[0])]  # stable: ties keep their order


def by_age(plant: Plant) -> list[str]:
    """All rolls of the plant, the one closed first first."""
    return sorted(plant.roll_ids(), key=lambda roll_id: closed_or_never(plant.roll_path(roll_id)))


def _row(path: Path, number: int, row: dict[str, str | None]) -> tuple[int, str]:
    roll_id, priority = (row["roll_id"] or "").strip(), (row.get("priority") or "0").strip()
    if not is_plain_name(roll_id):
        raise UserError(f"{path}, line {number}: {roll_id[:80]!r} is no roll id", USAGE)
    try:
        return int(priority), roll_id
    except ValueError:
        raise UserError(f"{path}, line {number}: priority {priority[:20]!r} is no number", USAGE) from None


def _matching(plant: Plant, pattern: str) -> list[str]:
    found = [roll_id for roll_id in plant.roll_ids() if matches(roll_id, pattern)]
    if not found:
        raise UserError(f"no roll of {plant.rolls} fits {pattern!r}")
    return found


def since_of(plant: Plant, told: str, now: datetime) -> datetime:
    """The moment that --since means; a date or moment without a zone is one of the plant's zone."""
    try:
        if span := _SPAN.fullmatch(told.strip()):
            return now - timedelta(hours=int(span[1]) * (24 if span[2] == "d" else 1))
        at = datetime.fromisoformat(told.strip())
    except (ValueError, OverflowError):
        raise UserError(
            f"--since {told[:60]!r}: it is a date, a moment (2026-11-24T06:00), or a span like 36h or 3d",
            USAGE,
        ) from None
    return at.replace(tzinfo=read_line(plant).zone_of(None)) if at.tzinfo is None else at


def _fits(plant: Plant, roll_id: str, start: datetime | None, line: str | None) -> bool:
    """Closed, since `start`, of the line; a roll that cannot be read fits, so that the scan says why."""
    path = plant.roll_path(roll_id)
    closed_at = last_written(path)
    if closed_at is None or (start is not None and closed_at < start):
        return False
    try:
        strip = strip_at(path)
    except UserError:
        return True
    return strip.closed and (line is None or strip.line_id == line)
