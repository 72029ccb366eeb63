"""The mask of one defect: of all that its class has in its box, the component that the box is of."""

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.defects import EIGHT
from scipy import ndimage


def defect_mask(found: NDArray[np.bool_], box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """The component of `found` (h, w) that reaches most sides of box (x0, y0, x1, y1); of equals the largest.

    Two that both reach all four would cross, and be one: where the whole box is in `found`, it is the defect.
    """
    inside = np.s_[max(box[1], 0) : max(box[3], 0), max(box[0], 0) : max(box[2], 0)]
    ids, count = ndimage.label(found[inside], structure=EIGHT)
    mask = np.zeros_like(found)
    if count:
        area = np.bincount(ids.ravel(), minlength=count + 1)
        sides = np.zeros_like(area)
        for side in (ids[0], ids[-1], ids[:, 0], ids[:, -1]):
            sides[np.unique(side)] += 1
        mask[inside] = ids == (sides * (found.size + 1) + area)[1:].argmax() + 1
    return mask
