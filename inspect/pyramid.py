"""The pyramid over a roll: each level a quarter of the one before, both ways, made as the lines come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

FACTOR = 4  # from one level to the next, both ways
MIN_LEVEL_WIDTH = 16  # px; a level narrower than this shows nothing


def level_shape(height: int, width: int, level: int) -> tuple[int, int]:
    """Rows and columns at a level; ceil(ceil(n / 4) / 4) = ceil(n / 16), so one division will do."""
    step = FACTOR**level
    return -(-height // step), -(-width // step)


def level_count(width: int) -> int:
    """Pyramid levels, with level 0, of a roll of this width in px: down to the last at least 16 px wide."""
    count = 1
    while level_shape(0, width, count)[1] >= MIN_LEVEL_WIDTH:
        count += 1
    return count


def quarter(block: NDArray[Any]) -> NDArray[Any]:
    """The mean of each 4 x 4 px, halves rounded up: (C, h, W) -> (C, ceil(h / 4), ceil(W / 4)), same dtype.

    At the right and lower border the mean is over the pixels that are there.
    """
    modes, height, width = block.shape
    rows, columns = level_shape(height, width, 1)
    total = np.uint16 if block.dtype == np.uint8 else np.uint32  # 16 x the largest value fits
    by_row = np.zeros((modes, rows, width), total)
    for i in range(FACTOR):
        part = block[:, i::FACTOR]
        by_row[:, : part.shape[1]] += part
    sums = np.zeros((modes, rows, columns), total)
    for i in range(FACTOR):
        part = by_row[:, :, i::FACTOR]
        sums[:, :, : part.shape[2]] += part
    in_row = np.minimum(FACTOR, height - FACTOR * np.arange(rows))
    in_column = np.minimum(FACTOR, width - FACTOR * np.arange(columns))
    count = np.outer(in_row, in_column).astype(total)
    mean: NDArray[Any] = (sums + count // 2) // count
    return mean.astype(block.dtype)


class Rows:
    """Rows on their way into one array: gathered until they fill a shard, which is then written at once."""

    def __init__(
        self,
        array: Any,
        shape: tuple[int, ...],
        axis: int,
        dtype: np.dtype[Any],
        on_written: Callable[[NDArray[Any]], None] | None = None,
    ) -> None:
        self.dtype = dtype
        self._array = array
        self._buffer = np.empty(shape, dtype)
        self._axis = axis
        self._on_written = on_written  # gets each shard once; the rows are only lent
        self._held = 0  # rows in the buffer
        self._start = 0  # row of the array where the buffer starts

    def append(self, block: NDArray[Any]) -> None:
        size, taken = block.shape[self._axis], 0
        while taken < size:
            count = min(size - taken, self._buffer.shape[self._axis] - self._held)
            self._buffer[self._part(self._held, self._held + count)] = block[self._part(taken, taken + count)]
            self._held += count
            taken += count
            if self._held == self._buffer.shape[self._axis]:
                self.flush()

    def start_at(self, row: int) -> None:
        """Go on after the rows that another writer left in whole shards."""
        self._start = row

    def write_held(self) -> None:
        """Let readers have what is gathered so far; it is written again with what joins it."""
        if self._held:
            rows = self._buffer[self._part(0, self._held)]
            self._array[self._part(self._start, self._start + self._held)] = rows

    def flush(self) -> None:
        """Write what is held: the rows of a full shard, or at the end of the roll the last few."""
        if self._held == 0:
            return
        self.write_held()
        rows = self._buffer[self._part(0, self._held)]
        self._start += self._held
        self._held = 0
        if self._on_written is not None:
            self._on_written(rows)

    def append_mean(self, finer: NDArray[Any]) -> None:
        """Add the mean of rows of the finer level, (C, h, W), h a multiple of 4 but at the roll's end."""
        self.append(quarter(finer))

    def _part(self, start: int, stop: int) -> tuple[slice, ...]:
        return (*(slice(None),) * self._axis, slice(start, stop))
