"""What is known about the strip on a roll, and which values it may have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from rollsight.inspect.errors import USAGE, UserError

SIDES = ("top", "bottom")
MAX_MODES = 8
MAX_LINES = 2**31

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Strip:
    """What is known about the strip on a roll; the group attribute `strip`."""

    roll_id: str
    side: str | None  # "top" | "bottom"; None only where units are px
    lighting: tuple[str, ...]  # one name per mode, in the order of axis c
    mm_per_px_x: float | None  # across the strip; None where units are px
    mm_per_line: float | None  # along the strip; None where units are px
    width_mm: float | None = None  # ordered width
    line_id: str | None = None
    started_at: str | None = None  # ISO 8601
    heat: str | None = None
    grade: str | None = None
    scale: tuple[float, ...] | None = None  # per mode: the raw value that is white; default 255 or 65535
    flatfield_id: str | None = None
    closed: bool = False
    lines: int = 0

    @property
    def units(self) -> str:
        """ "mm" where both pixel sizes are known, else "px"."""
        return "px" if self.mm_per_px_x is None or self.mm_per_line is None else "mm"


def is_plain_name(name: object) -> bool:
    """Whether `name` can name a file and nothing else: 1 to 64 of A-Z a-z 0-9 . _ -"""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: str, of: str) -> str:
    """Return `name` if it can name a file and nothing else; else UserError (usage) that says `of` what."""
    if not is_plain_name(name):
        raise UserError(
            f"{of} {name[:80]!r} is not usable: it must be 1 to 64 of A-Z a-z 0-9 . _ -"
            " and start with a letter or digit",
            USAGE,
        )
    return name


def check_roll_id(roll_id: str) -> str:
    """`check_name` of a roll's id."""
    return check_name(roll_id, "roll id")


def strip_problem(strip: Strip) -> str | None:
    """What is wrong with the values of a complete Strip, field and value in words; None where nothing is."""
    if not is_plain_name(strip.roll_id):
        return f"roll_id is {str(strip.roll_id)[:80]!r}"
    if strip.units == "mm" and strip.side is None:
        return "side is missing: it must be top or bottom"
    if strip.side is not None and strip.side not in SIDES:
        return f"side is {str(strip.side)[:40]!r}: it must be top or bottom"
    if (strip.mm_per_px_x is None) != (strip.mm_per_line is None):
        return "mm_per_px_x and mm_per_line must both be given, or neither"
    lighting = strip.lighting
    if not isinstance(lighting, tuple) or not 1 <= len(lighting) <= MAX_MODES:
        return f"lighting is {str(lighting)[:60]}: it must name 1 to {MAX_MODES} modes"
    if not all(isinstance(mode, str) and 0 < len(mode) <= 64 for mode in lighting) or len({*lighting}) < len(
        lighting
    ):
        return f"lighting is {str(lighting)[:60]}: it must be different names"
    for name in ("mm_per_px_x", "mm_per_line", "width_mm"):
        value = getattr(strip, name)
        if value is not None and not _is_positive(value):
            return f"{name} is {str(value)[:40]}: it must be a number over 0"
    if strip.scale is not None:
        if not isinstance(strip.scale, tuple) or len(strip.scale) != len(lighting):
            return f"scale is {str(strip.scale)[:60]}: it must be one number per lighting mode"
        if not all(_is_positive(value) for value in strip.scale):
            return f"scale is {str(strip.scale)[:60]}: it must be numbers over 0"
    for name in ("line_id", "started_at", "heat", "grade", "flatfield_id"):
        value = getattr(strip, name)
        if value is not None and (not isinstance(value, str) or len(value) > 256):
            return f"{name} is {str(value)[:40]}: it must be text of at most 256 characters"
    return None


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < cast(float, value) < 1e9  # which also leaves out nan and inf
