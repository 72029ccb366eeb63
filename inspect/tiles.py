"""The canonical grid of a roll: pure geometry, the same however the work is cut.

The canvas is the roll padded right and bottom to a multiple of the cell and to at least one window.
Windows have one fixed shape; their origins, cores and halos are multiples of the cell, and a window
never leaves the canvas: it shifts inward by whole cells. Zeros outside a tile, partial cells and
misaligned origins were all measured to change the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass

CELL = 64  # px: the unit of cell-pooled attention at stride 16, and of "not inspected"


def up_to_cell(px: int, cell: int = CELL) -> int:
    """The next multiple of the cell, in px."""
    return -(-px // cell) * cell


def cell_margins(px: int, cell: int = CELL) -> tuple[int, int]:
    """Padding before and after that makes whole cells of `px`, which stay in the middle; in px."""
    missing = up_to_cell(px, cell) - px
    return missing // 2, missing - missing // 2


@dataclass(frozen=True, slots=True)
class Window:
    """One call of the net: where it reads (fixed shape) and the core it answers for, in canvas px."""

    y: int  # first line read
    x: int  # first pixel read
    core_y0: int
    core_y1: int
    core_x0: int
    core_x1: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The windows of a roll of `lines` x `width` px; all sizes in px.

    `core_lines` and `core_px` are the steps of the grid, `halo` what the net needs around a core. Raises
    ValueError for sizes off the cell grid. A window is `window_lines` x `window_px`; where one core
    spans the whole width there is no halo across.
    """

    lines: int
    width: int
    core_lines: int
    core_px: int
    halo: int
    cell: int = CELL

    def __post_init__(self) -> None:
        for name in ("core_lines", "core_px", "halo"):
            size = getattr(self, name)
            if size % self.cell or size < 0 or (size == 0 and name != "halo"):
                raise ValueError(f"{name} is {size} px: it must be a multiple of the {self.cell} px cell")
        if self.lines < 1 or self.width < 1:
            raise ValueError(f"a roll of {self.lines} lines x {self.width} px has nothing to scan")

    @property
    def window_lines(self) -> int:
        return self.core_lines + 2 * self.halo

    @property
    def window_px(self) -> int:
        full = up_to_cell(self.width, self.cell)
        return full if self.core_px >= full else min(full, self.core_px + 2 * self.halo)

    @property
    def canvas_lines(self) -> int:
        return max(up_to_cell(self.lines, self.cell), self.window_lines)

    @property
    def canvas_px(self) -> int:
        return up_to_cell(self.width, self.cell)

    @property
    def rows(self) -> int:
        """Rows of cores that hold lines of the roll."""
        return -(-self.lines // self.core_lines)

    def row_lines(self, row: int) -> tuple[int, int]:
        """The lines of the roll that a row of cores answers for: [first, last)."""
        return row * self.core_lines, min((row + 1) * self.core_lines, self.lines)

    def read_lines(self, row: int) -> tuple[int, int]:
        """The lines of the canvas that a row of windows reads: [first, last)."""
        y = _inward(row * self.core_lines - self.halo, self.window_lines, self.canvas_lines)
        return y, y + self.window_lines

    def windows(self, row: int) -> Iterator[Window]:
        """The windows of a row of cores, from the drive side."""
        y, _ = self.read_lines(row)
        core_y0 = row * self.core_lines
        core_y1 = min(core_y0 + self.core_lines, self.canvas_lines)
        for core_x0 in range(0, self.canvas_px, self.core_px):
            x = _inward(core_x0 - self.halo, self.window_px, self.canvas_px)
            yield Window(y, x, core_y0, core_y1, core_x0, min(core_x0 + self.core_px, self.canvas_px))


def _inward(start: int, size: int, canvas: int) -> int:
    """Shift a window of `size` so that it lies within [0, canvas)."""
    return max(0, min(start, canvas - size))
