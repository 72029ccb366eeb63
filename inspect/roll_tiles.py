"""Tiles of a labelled roll and the marks that go on beyond them: each is judged once, and as large as it is.

A mark is followed up to REACH_PX beyond a tile, so what is held does not grow with the roll. Of one that is
longer still its beginning is judged, and the rest in no tile.
"""

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.defects import label_mask
from rollsight.inspect.labels import IGNORE, ROLL_TILE, RollTile
from rollsight.inspect.metrics import dilate
from rollsight.inspect.reliability import NEAR_PX

REACH_PX = 512  # with this and a halo of 256 px a tile takes 2.3 Mpx at most; a window of a scan has 3.9

Box = tuple[slice, slice]  # lines and px across


def judged_truth(tile: RollTile) -> tuple[NDArray[np.uint8], Box]:
    """What a tile is judged by, (H, W), and where it lies in the roll; all else in it is 255.

    It is the whole of each mark that begins in the tile (its first px line by line), with all within 16 px of
    it, and the rest of the tile but for the marks that begin in another one and all within 16 px of those. So
    a mark on the border of two tiles is one mark with its own area, as on the stitched map, and no px counts
    twice.
    """
    mask, (top, left) = _around(tile)
    ids, count = label_mask(mask)
    y, x = tile.y - top, tile.x - left
    core = slice(y + tile.seen_y, y + ROLL_TILE), slice(x + tile.seen_x, x + ROLL_TILE)
    marks = np.zeros(count + 1, dtype=np.bool_)
    marks[_begun(ids, core)] = True
    own = marks[ids]
    inside = own.copy()
    inside[core] = True
    within = _box(inside, 2 * NEAR_PX)  # of the marks of other tiles no others matter
    others, own = (ids[within] > 0) & ~own[within], own[within]
    counted = np.zeros(mask.shape, dtype=np.bool_)
    counted[core] = True
    counted[within] = ((counted[within] | dilate(own, NEAR_PX)) & ~dilate(others, NEAR_PX)) | own
    rows, columns = _box(counted, 0) if counted.any() else core
    truth = np.where(counted[rows, columns], mask[rows, columns], np.uint8(IGNORE))
    place = slice(rows.start + top, rows.stop + top), slice(columns.start + left, columns.stop + left)
    return truth, place


def whole_components(tile: RollTile, mask: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """As `augment.component_areas` of the tile's mask (H, W); areas with what lies beyond the tile."""
    around, (top, left) = _around(tile)
    found, count = label_mask(around)
    areas = np.bincount(found.ravel(), minlength=count + 1)
    height, width = mask.shape
    ids = found[tile.y - top : tile.y - top + height, tile.x - left : tile.x - left + width]
    ids = np.where((mask > 0) & (mask != IGNORE), ids, 0)
    present = np.unique(ids[ids > 0])
    number = np.zeros(count + 1, dtype=np.int32)
    number[present] = np.arange(1, len(present) + 1)
    return number[ids], np.append((ids == 0).sum(), areas[present])


def _around(tile: RollTile) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """The roll's mask up to REACH_PX around a tile, and the first line and px of that."""
    top, left = max(0, tile.y - REACH_PX), max(0, tile.x - REACH_PX)
    bottom = min(tile.roll.lines, tile.y + ROLL_TILE + REACH_PX)
    lines = tile.roll.read_label(tile.label, top, bottom)
    return lines[:, left : tile.x + ROLL_TILE + REACH_PX], (top, left)


def _begun(ids: NDArray[np.int32], core: Box) -> NDArray[np.int32]:
    """The components of ids (H, W) whose first px line by line lies in `core`."""
    ys, xs = np.nonzero(ids)
    found, first = np.unique(ids[ys, xs], return_index=True)
    rows, columns = core
    y, x = ys[first], xs[first]
    inside = (y >= rows.start) & (y < rows.stop) & (x >= columns.start) & (x < columns.stop)
    begun: NDArray[np.int32] = found[inside]
    return begun


def _box(plane: NDArray[np.bool_], margin: int) -> Box:
    """The smallest box around what is set in a plane (H, W), larger by `margin` px as far as that goes."""
    rows, columns = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
    height, width = plane.shape
    return (
        slice(max(0, int(rows[0]) - margin), min(height, int(rows[-1]) + 1 + margin)),
        slice(max(0, int(columns[0]) - margin), min(width, int(columns[-1]) + 1 + margin)),
    )
