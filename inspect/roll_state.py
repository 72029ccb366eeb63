"""What a roll says of itself, without its image being looked at: for lists of thousands of rolls."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from rollsight.inspect.errors import UserError
from rollsight.inspect.roll_format import group_attributes, strip_from
from rollsight.inspect.roll_places import LocalPlace
from rollsight.inspect.strips import Strip


def last_written(path: Path) -> datetime | None:
    """When the roll's description was written, in UTC: at its close, once it is closed. None: no roll there.

    Copies that keep times keep it; a roll that was made again has another one.
    """
    try:
        ns = (path / "zarr.json").stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check disk and rights") from None
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ns // 1000)


def strip_at(path: Path) -> Strip:
    """What is known about the strip of the local roll there, closed or not; UserError where it is damaged."""
    place = LocalPlace(path)
    return strip_from(group_attributes(place), place)
