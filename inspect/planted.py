"""A scan held against the known truth of its roll: what was planted, found, missed, and falsely alarmed."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rollsight.inspect.defects import label_mask
from rollsight.inspect.metrics import HIT_PERCENT, HIT_REACH_PX, dilate
from rollsight.inspect.rolls import Roll
from rollsight.inspect.scan import A_MIN_PX


@dataclass(frozen=True, slots=True)
class Found:
    """Planted and found of one class; components, matched by hit (metrics.md, match H)."""

    planted: int
    hit: int  # planted ones found as their own class
    hit_as_other: int  # found, but as another class
    alarms: int  # found ones with nothing planted there, of any class


def against_truth(
    roll: Roll, found: pa.Table, mask: str, planted: pa.Table, truth: str = "truth"
) -> dict[str, Found]:
    """Class -> what was found of it; `mask` and `truth` name the labels that the two tables describe.

    Both tables need class, x0, y0, x1, y1 in px. Planted defects under parts that were not inspected
    count as planted and missed: the page must not look better than the strip.
    """
    names = roll.label_classes(truth)
    counts: Counter[tuple[str, str]] = Counter()
    for row in planted.select(["class", "x0", "y0", "x1", "y1"]).to_pylist():
        same, other = _hit(roll, row, own=truth, against=mask)
        counts[row["class"], "hit" if same else "other" if other else "missed"] += 1
    for row in found.select(["class", "x0", "y0", "x1", "y1"]).to_pylist():
        same, other = _hit(roll, row, own=mask, against=truth)
        counts[row["class"], "true" if same or other else "alarm"] += 1
    return {
        name: Found(
            counts[name, "hit"] + counts[name, "other"] + counts[name, "missed"],
            counts[name, "hit"],
            counts[name, "other"],
            counts[name, "alarm"],
        )
        for name in dict.fromkeys([*names, *found["class"].to_pylist()])
    }


def _hit(roll: Roll, row: dict[str, Any], own: str, against: str) -> tuple[bool, bool]:
    """Whether a component of the mask `own` is hit by the same class of `against`, and by any class."""
    margin = HIT_REACH_PX + A_MIN_PX  # so that what the crop cuts within reach is not taken for too small
    y0, y1 = max(0, row["y0"] - margin), min(roll.lines, row["y1"] + margin)
    x0, x1 = max(0, row["x0"] - margin), min(roll.width, row["x1"] + margin)
    mine = roll.read_label(own, y0, y1)[:, x0:x1]
    theirs = _without_fringes(roll.read_label(against, y0, y1)[:, x0:x1])
    value = roll.label_classes(own).index(row["class"]) + 1
    ids, _ = label_mask(np.where(mine == value, mine, 0).astype(np.uint8))
    component = _component_of_box(ids, row["y0"] - y0, row["x0"] - x0, row["y1"] - y0, row["x1"] - x0)
    names = roll.label_classes(against)
    same_value = names.index(row["class"]) + 1 if row["class"] in names else 0
    hits = []
    for near in ((theirs == same_value) & (theirs > 0), (theirs > 0) & (theirs <= len(names))):
        covered = int((component & dilate(near)).sum())
        hits.append(100 * covered >= HIT_PERCENT * int(component.sum()))
    return hits[0], hits[1]


def _without_fringes(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask without components that are too small for the defect table: they find nothing."""
    ids, n = label_mask(mask)
    small = np.bincount(ids.ravel(), minlength=n + 1) < A_MIN_PX
    small[0] = False
    return np.where(small[ids], 0, mask).astype(np.uint8)


def _component_of_box(ids: NDArray[np.int32], y0: int, x0: int, y1: int, x1: int) -> NDArray[np.bool_]:
    """The component whose box it is: among those on the box's first line, the one that fills the box."""
    on_first_line = np.unique(ids[y0, x0:x1])
    for value in on_first_line[on_first_line > 0]:
        component: NDArray[np.bool_] = ids == value
        ys, xs = np.nonzero(component)
        if (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (y0, y1, x0, x1):
            return component
    raise ValueError(f"no component with the box {(x0, y0, x1, y1)}: table and mask are not of one run")
