"""Where on a roll a defect can be put: strip that the line scan takes as inspected, with nothing on it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.linescan import CellRow, read_row
from rollsight.inspect.rolls import Roll
from rollsight.inspect.tiles import CELL
from rollsight.synth.mask_bank import Bools, Plane


@dataclass(frozen=True, slots=True)
class Ground:
    """Some lines of a roll with one lighting mode, whole rows of cells."""

    y0: int
    image: Plane  # (h, W) in [0, 1]
    rows: tuple[CellRow, ...]
    free: Bools  # (h, W) inspected strip that no class mask marks
    left: NDArray[np.int64]  # (h,) px where the strip begins; `left` is `right` where no strip is seen
    right: NDArray[np.int64]  # (h,) one past its last
    _valid: Bools  # (h,) False for lines that the camera dropped
    _above: Plane | None  # (1, W) the line before the first

    def same_with(self, lines: slice, columns: slice, change: NDArray[np.floating]) -> bool:
        """Whether the line scan sees strip and lost parts as before with `change` added to a window."""
        image = self.image.copy()
        image[lines, columns] = (image[lines, columns] + change).clip(0, 1)
        return judged(image, self._valid, self.y0, self._above) == self.rows


def read_ground(roll: Roll, label: str | None, y0: int, y1: int) -> Ground:
    """Lines y0 to y1 of a roll, up to whole rows of cells; label: the mask of what is on it already."""
    y0, y1 = y0 // CELL * CELL, min(-(-y1 // CELL) * CELL, roll.lines)
    unit = roll.read_unit(max(0, y0 - 1), y1)[0]
    above, image = (unit[:1], unit[1:]) if y0 else (None, unit)
    valid = roll.read_lines(y0, y1).valid
    rows = judged(image, valid, y0, above)
    free = np.zeros(image.shape, dtype=np.bool_)
    left, right = np.zeros((2, len(image)), dtype=np.int64)
    for row in rows:
        lines = slice(row.y0 - y0, row.y1 - y0)
        if row.left is not None and row.right is not None:
            left[lines], right[lines] = row.left, row.right
            free[lines, row.left : row.right] = True
        for lost in row.not_inspected:
            free[lost.y0 - y0 : lost.y1 - y0, lost.x0 : lost.x1] = False
    if label is not None:
        free &= roll.read_label(label, y0, y1) == 0
    return Ground(y0, image, rows, free, left, right, valid, above)


def judged(image: Plane, valid: Bools, y0: int, above: Plane | None) -> tuple[CellRow, ...]:
    """The rows of cells of lines (h, W) from y0 on, as a scan judges them."""
    rows = []
    for y in range(0, len(image), CELL):
        before = image[y - 1 : y] if y else above
        rows.append(read_row(image[None, y : y + CELL], valid[y : y + CELL], y0 + y, above=before))
    return tuple(rows)
