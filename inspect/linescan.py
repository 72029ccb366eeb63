"""What a line-scan image says of itself: where the strip is, and which parts of it cannot be inspected.

Everything is decided per row of cells (64 lines on the canonical grid), from the raw gray alone, so it is
the same however the roll is cut into bands. Pixel 0 is on the drive side.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.tiles import CELL

# Of white. Bare background and failed lamps lie below, the darkest public strip above (measured).
DARK = 16 / 255
SATURATED = 0.995  # of white: the sensor's end
NOT_INSPECTED_SHARE = 0.5  # of a cell's strip pixels: above it the cell is not inspected
EDGE_RUN = 8  # px: a strip edge is the first run of this many bright columns, so dust does not move it
MIN_STRIP = 0.1  # of the image width: less than that is no strip


@dataclass(frozen=True, slots=True)
class NotInspected:
    """A rectangle of the roll that could not be inspected, in px, half-open."""

    x0: int
    y0: int
    x1: int
    y1: int
    reason: str  # "dark" | "saturated" | "dropped"


@dataclass(frozen=True, slots=True)
class CellRow:
    """One row of cells: lines, strip edges in px (None: no strip seen), what could not be inspected."""

    y0: int
    y1: int
    left: int | None
    right: int | None
    not_inspected_px: int  # strip pixels not inspected
    not_inspected: tuple[NotInspected, ...]


def read_row(
    gray: NDArray[np.float32],
    valid: NDArray[np.bool_],
    y0: int,
    above: NDArray[np.float32] | None = None,
    cell: int = CELL,
) -> CellRow:
    """Judge the lines y0 to y0 + h of a roll, a row of cells or the shorter last one.

    gray (M, h, W) in [0, 1]; valid (h,) False for lines that the camera dropped; above (M, W) the line
    before the first, where there is one. The brightest lighting mode counts for dark (a dark-field image
    is dark where the strip is good), each for saturated.
    """
    height, width = gray.shape[1:]
    brightest = gray.max(axis=0)
    lit = (brightest >= DARK).mean(axis=1) >= MIN_STRIP
    # A textured line that repeats the one before it to the last bit was dropped and filled in by the grabber.
    before = gray[:, :1] - 1 if above is None else above[:, None]  # the roll's first line repeats nothing
    repeats = (gray == np.concatenate([before, gray[:, :-1]], axis=1)).all(axis=(0, 2))
    dropped = ~valid | (repeats & lit & (np.ptp(brightest, axis=1) > 0))
    edges = _edges(brightest[lit & ~dropped]) if (lit & ~dropped).any() else None
    if edges is None:
        reason = "dropped" if dropped.any() else "dark"
        return CellRow(
            y0, y0 + height, None, None, height * width, (NotInspected(0, y0, width, y0 + height, reason),)
        )
    left, right = edges
    strip = brightest[:, left:right]
    dark_line = (strip < DARK).mean(axis=1) > NOT_INSPECTED_SHARE
    lost = np.zeros((height, right - left), dtype=np.bool_)
    not_inspected: list[NotInspected] = []
    for lines, reason in ((dropped, "dropped"), (dark_line & ~dropped, "dark")):
        not_inspected += [NotInspected(left, y0 + a, right, y0 + b, reason) for a, b in runs(lines)]
    lost[dropped | dark_line] = True
    for reason, planes in (
        ("dark", strip < DARK),
        ("saturated", (gray[:, :, left:right] >= SATURATED).any(axis=0)),
    ):
        counted = planes & ~lost
        share = _per_cell(counted, left, cell) / np.maximum(_per_cell(~lost, left, cell), 1)
        for a, b in runs(share > NOT_INSPECTED_SHARE):
            x0, x1 = max(left, (left // cell + a) * cell), min(right, (left // cell + b) * cell)
            not_inspected.append(NotInspected(x0, y0, x1, y0 + height, reason))
            lost[:, x0 - left : x1 - left] = True
    return CellRow(y0, y0 + height, left, right, int(lost.sum()), tuple(not_inspected))


def runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The runs of True in a 1-D array, as half-open intervals."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in changes.reshape(-1, 2)]


def _edges(gray: NDArray[np.float32]) -> tuple[int, int] | None:
    """First and one past the last column of the strip; gray (h, W), lit lines only."""
    bright = gray.mean(axis=0) >= DARK
    long_runs = [(a, b) for a, b in runs(bright) if b - a >= EDGE_RUN]
    if not long_runs or long_runs[-1][1] - long_runs[0][0] < MIN_STRIP * bright.size:
        return None
    return long_runs[0][0], long_runs[-1][1]


def _per_cell(flags: NDArray[np.bool_], left: int, cell: int) -> NDArray[np.int64]:
    """How many flags are set in each cell that the strip from column `left` touches: (h, w) -> (cells,)."""
    columns = flags.sum(axis=0)
    cells = (np.arange(left, left + columns.size) // cell) - left // cell
    return np.bincount(cells, weights=columns).astype(np.int64)
