"""A paste of which outline and mean gray are left: an editor then has a defect to make, and not to retouch.

An editor that begins from a whole paste learns to leave it alone: it changed 3 gray levels inside of marks
(measured), and what it made was the paste. Where the start has lost the mark's texture, that is to be made.
"""

from typing import Any

import numpy as np
from rollsight.synth.gan import RING_PX
from rollsight.synth.mask_bank import Bools, Plane
from scipy import ndimage

VISIBLE = 0.5  # of the steel's own spread: less contrast is no label, unless the mark has no more at home
KINDS = ("low-pass", "plain")
SMOOTH_PX = 4.0  # standard deviation of the low-pass
EDGE_PX = 0.8  # of the fading at the outline
EDGE_REACH_PX = 2  # where that ends: before the ring that the contrast is measured against
CONTRAST = (
    0.5,
    1.4,
)  # limits of the drawn contrast, of the paste's; two standard deviations of its logarithm


def surroundings(inside: Bools) -> Bools:
    """The ring (H, W) that a contrast is measured against."""
    near, far = (ndimage.binary_dilation(inside, np.ones((2 * r + 1, 2 * r + 1))) for r in RING_PX)
    ring: Bools = far & ~near
    return ring


def contrast_at(image: Plane, inside: Bools) -> float:
    """Mean gray of a mark's px less that of its ring, 0 without a ring: both (H, W)."""
    around = surroundings(inside)
    if not around.any():
        return 0.0
    return float(image[inside].mean() - image[around].mean())


def degraded(
    under: Plane, pasted: Plane, inside: Bools, rng: np.random.Generator
) -> tuple[Plane, dict[str, Any]] | None:
    """The canvas with the mark's px drawn plain or smooth, at a contrast of its own; and what was drawn.

    under, pasted: the canvas (H, W) without the mark and with it; inside its px. The contrast is log-normal
    between CONTRAST times the paste's, of its sign, and never so small that it would be no label. None for a
    mark that is not told by its mean gray: without its texture nothing would be there.
    """
    around = surroundings(inside)
    own = contrast_at(pasted, inside)
    kind = KINDS[int(rng.integers(len(KINDS)))]
    low, high = np.log(CONTRAST)
    factor = float(np.exp(np.clip(rng.normal((low + high) / 2, (high - low) / 4), low, high)))
    least = VISIBLE * float(under[around].std()) if around.any() else np.inf
    if abs(own) <= least:
        return None
    wanted = float(np.sign(own)) * max(factor * abs(own), least)
    ring = float(under[around].mean())
    alpha = ndimage.gaussian_filter(inside.astype(np.float32), EDGE_PX, radius=EDGE_REACH_PX)
    anew = np.full(under.shape, ring, dtype=np.float32)
    if kind == "low-pass":
        weight = inside.astype(np.float32)
        smooth = ndimage.gaussian_filter(pasted * weight, SMOOTH_PX)
        smooth /= ndimage.gaussian_filter(weight, SMOOTH_PX).clip(1e-6)
        anew += (smooth - smooth[inside].mean()) * (wanted / own)
    # Contrast is linear in what is added, so how much brings it to what is wanted is known.
    faded = under + alpha * (anew - under)
    shift = (wanted + ring - faded[inside].mean()) / alpha[inside].mean()
    out: Plane = (faded + alpha * shift).clip(0, 1).astype(np.float32)
    return out, {
        "kind": kind,
        "contrast": round(contrast_at(out, inside), 4),
        "of_paste": round(wanted / own, 4),
    }
