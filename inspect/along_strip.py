"""Evidence along the strip: a scratch too faint for any of its pixels shows in the sum over its lines.

A band keeps one number per stripe of a cell (64 lines x 8 px): how likely its class looked there, line by
line. The numbers of all bands are joined once the roll is scanned: a cumulative sum runs down the strip,
may drift across, and is carried over every border of bands, so the lines found do not depend on the cut.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.linescan import CellRow
from rollsight.inspect.tiles import CELL

STRIPE_PX = 8  # a scratch is some px wide and sways by as much within a cell; cores are multiples of it
LOG_ODDS = (-20.0, 2.0)  # nats: what one line can say; a pixel that is sure must not outvote the others
UNIT = 256  # of evidence in 1 nat: whole numbers, so that no order of sums matters
UNSEEN = -(2**15)  # beside the strip, near its edges, not inspected
EDGE_PX = 24  # within it of the strip's edges the net is less sure that there is no scratch (measured)
MIN_STRIPES = 16  # a row with fewer has no noise to measure against

# The log-likelihood ratio of "SHIFT standard deviations above its row's median" against "at the median".
SHIFT = 3.0
CAP = 4.0  # standard deviations: what one cell can add, so that a short defect does not look like a long line
DRIFT_COST = 2.0  # nats for a step of one stripe across from a cell to the next; more is no scratch
GAP = 30.0  # nats that a line may lose before it has ended: 7 cells without it, or 5 stripes aside
ALARM = 80.0  # nats; of other defects and sound strip 60 at most was seen on ten simulated strips of 6 m
APART = 3  # stripes between the lines of two scratches


@dataclass(frozen=True, slots=True)
class FaintLine:
    """One scratch along the strip that its lines together give away, in px of the roll, half-open."""

    y0: int
    y1: int
    x0: int  # of the stripes it runs through
    x1: int
    head_px: int  # middle of its first stripe; it may drift
    evidence: float  # nats for it and against sound strip


def cell_evidence(logits: NDArray[np.float32], kind: int) -> NDArray[np.int16]:
    """Evidence for class `kind` in each stripe of each cell: logits (K + 1, h, W) -> (rows, stripes).

    The mean over the cell's lines of the largest log odds in the stripe's 8 px, in 1/256 nat. h and W from a
    cell's border on; the last row and the last stripe may be cut.
    """
    others = np.delete(logits, kind, axis=0).max(axis=0)
    odds = np.clip(logits[kind] - others, *LOG_ODDS)
    peaks = np.maximum.reduceat(odds, np.arange(0, odds.shape[1], STRIPE_PX), axis=1)
    whole = np.rint(peaks * UNIT).astype(np.int64)
    firsts = np.arange(0, len(whole), CELL)
    counts = np.diff(np.append(firsts, len(whole)))
    return (np.add.reduceat(whole, firsts, axis=0) // counts[:, None]).astype(np.int16)


def hide(evidence: NDArray[np.int16], row: CellRow) -> None:
    """Mark in one row of stripes (stripes,), in place, what is not strip or was not inspected."""
    if row.left is None or row.right is None:
        evidence[:] = UNSEEN
        return
    evidence[: -(-(row.left + EDGE_PX) // STRIPE_PX)] = UNSEEN
    evidence[max(row.right - EDGE_PX, 0) // STRIPE_PX :] = UNSEEN
    for part in row.not_inspected:
        evidence[part.x0 // STRIPE_PX : -(-part.x1 // STRIPE_PX)] = UNSEEN


def faint_lines(evidence: NDArray[np.int16], alarm: float = ALARM) -> list[FaintLine]:
    """The lines along a roll whose cumulative evidence passes `alarm`, strongest first.

    evidence (rows, stripes) of all cells in order, as `cell_evidence` gives it and `hide` marks it. CUSUM
    (Page 1954, doi:10.1093/biomet/41.1-2.100) per stripe, over the best path of at most a stripe across a
    cell, as in track-before-detect; a path that has lost GAP since its best has ended. What a stripe holds is
    measured against its row of cells, by median and median absolute deviation, so that light and surface may
    change along the roll.
    """
    sums, came = _cumulative(_likelihood(evidence))
    blocked = np.zeros(sums.shape, dtype=np.bool_)
    found = []
    over = np.argwhere(sums >= alarm)
    # Of equal ones the first in raster order: the sort is stable.
    for row, stripe in over[np.argsort(-sums[*over.T], kind="stable")]:
        if blocked[row, stripe]:
            continue
        path = _path(came, blocked, int(row), int(stripe))
        first, x = path[-1]
        before = sums[first - 1, x + came[first, x]] if first and came[first, x] != STARTS else 0.0
        for y, x in path:
            blocked[y, max(0, x - APART) : x + APART + 1] = True
        gained = float(sums[row, stripe] - before)
        if gained >= alarm:
            stripes = [x for _, x in path]
            found.append(
                FaintLine(
                    first * CELL,
                    (int(row) + 1) * CELL,
                    min(stripes) * STRIPE_PX,
                    (max(stripes) + 1) * STRIPE_PX,
                    path[-1][1] * STRIPE_PX + STRIPE_PX // 2,
                    gained,
                )
            )
    return found


STARTS = 127  # in place of the step across: nothing above adds to this cell


def _likelihood(evidence: NDArray[np.int16]) -> NDArray[np.float32]:
    """Nats for a scratch in each stripe of each cell; 0 where nothing was seen."""
    nats = np.zeros(evidence.shape, dtype=np.float32)
    for row, of_row in zip(nats, evidence, strict=True):
        seen = of_row != UNSEEN
        if seen.sum() < MIN_STRIPES:
            continue
        values = of_row[seen].astype(np.float64)
        middle = np.median(values)
        spread = max(1.4826 * float(np.median(np.abs(values - middle))), 1.0)  # of a Gaussian
        row[seen] = SHIFT * (np.minimum((values - middle) / spread, CAP) - SHIFT / 2)
    return nats


def _cumulative(nats: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """The cumulative sums (rows, stripes), and by how many stripes the best path came from the row above."""
    sums = np.zeros(nats.shape, dtype=np.float32)
    came = np.full(nats.shape, STARTS, dtype=np.int8)
    # Of the path that ends in each stripe: its sum, and the largest it has had.
    before, best_before = np.zeros((2, nats.shape[1]), dtype=np.float32)
    steps = np.array([0, -1, 1], dtype=np.int8)  # of equals the straightest
    for row, own in enumerate(nats):
        padded = np.pad(before, 1)
        above = np.stack([padded[1:-1], padded[:-2] - DRIFT_COST, padded[2:] - DRIFT_COST])
        chosen = above.argmax(axis=0)
        from_above = np.take_along_axis(above, chosen[None], axis=0)[0]
        best_above = best_before[np.clip(np.arange(len(own)) + steps[chosen], 0, len(own) - 1)]
        goes_on = from_above > 0
        total = np.where(goes_on, from_above, 0) + own
        best = np.maximum(np.where(goes_on, best_above, 0), total)
        total[(total < 0) | (best - total > GAP)] = 0
        best[total == 0] = 0
        sums[row] = before = total
        best_before = best
        came[row] = np.where(goes_on, steps[chosen], STARTS)
    return sums, came


def _path(came: NDArray[np.int8], blocked: NDArray[np.bool_], row: int, stripe: int) -> list[tuple[int, int]]:
    """The cells that add up to this one, upwards, as far as no other line has taken them."""
    path = [(row, stripe)]
    while row and came[row, stripe] != STARTS:
        row, stripe = row - 1, stripe + int(came[row, stripe])
        if blocked[row, stripe]:
            break
        path.append((row, stripe))
    return path
