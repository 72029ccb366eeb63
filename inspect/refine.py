"""Edge refinement: class probabilities follow the edges of the image, around large defects only.

For labelling: outlines that a person need not redraw. It is no option of the scan: whether a component is
tiny is known when it is whole, and a component may cross any number of tiles.
"""

from collections.abc import Callable

import numpy as np
import torch
from kornia.filters import guided_blur
from numpy.typing import NDArray
from rollsight.inspect.defects import EIGHT, label_mask
from rollsight.inspect.errors import USAGE, UserError
from scipy import ndimage
from torch import Tensor

TINY_PX = 64  # smaller components stay as they are: smoothing takes the smallest defects first
REACH_PX = 5  # around a large component; also half the CRF's window (ConvCRF, arXiv:1805.04777: 11 x 11)

# Best boundary F1 on 40 val scenes of neu_clean (bench/refine.py --choose, 2026-11-22).
GUIDED_RADIUS_PX = 2
GUIDED_EPS = 1e-4  # of gray squared: the contrast of an edge that is kept is its root
CRF_STEPS = 5  # of mean field: Krähenbühl & Koltun find it settled after as many
CRF_STRENGTH = 4.0  # nats by which the whole neighbourhood can outvote the net
CRF_NEAR_PX = 3.0  # standard deviation of the appearance kernel, along and across
CRF_GRAY = 0.02  # of white: its standard deviation in gray
CRF_SMOOTH = 0.2  # weight of the smoothness kernel beside the appearance kernel's 1
CRF_SMOOTH_PX = 1.0

Refiner = Callable[[Tensor, Tensor], Tensor]


def refine(
    image: NDArray[np.float32], probabilities: NDArray[np.float32], method: str
) -> NDArray[np.float32]:
    """Class probabilities whose borders lie on those of the image: (K + 1, H, W) -> the same.

    image (M, H, W) or (H, W) in [0, 1]; probabilities sum to 1, background first; method is a name in
    REFINERS. Only pixels within REACH_PX of a component of TINY_PX or more can change; a smaller component
    (8-connected, of the plain argmax) keeps its pixels and the ring around them, so it is the same
    component afterwards. Raises UserError for another method, ValueError for arrays that do not fit.
    """
    planes = image[None] if image.ndim == 2 else image
    if planes.ndim != 3 or probabilities.ndim != 3 or planes.shape[1:] != probabilities.shape[1:]:
        raise ValueError(
            f"image {image.shape} and probabilities {probabilities.shape}: "
            "needed (M, H, W) or (H, W), and (K + 1, H, W) of the same size"
        )
    if method not in REFINERS:
        raise UserError(f"no refinement {method!r}: there are {', '.join(REFINERS)}", USAGE)
    free = _free(probabilities)
    if not free.any():
        return probabilities.copy()
    with torch.inference_mode():
        refined = REFINERS[method](
            torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32)),
            torch.from_numpy(np.ascontiguousarray(probabilities, dtype=np.float32)),
        )
    return np.where(free, refined.numpy(), probabilities)


def _free(probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where refinement may change something: (H, W)."""
    ids, count = label_mask(probabilities.argmax(axis=0).astype(np.uint8))
    large = np.bincount(ids.ravel(), minlength=count + 1) >= TINY_PX
    large[0] = False
    near: NDArray[np.bool_] = ndimage.binary_dilation(large[ids], EIGHT, iterations=REACH_PX)
    kept: NDArray[np.bool_] = ndimage.binary_dilation((ids > 0) & ~large[ids], EIGHT)
    return near & ~kept


def guided(
    image: Tensor, probabilities: Tensor, radius_px: int = GUIDED_RADIUS_PX, eps: float = GUIDED_EPS
) -> Tensor:
    """Guided filter (He et al. 2013, doi:10.1109/TPAMI.2012.213): (M, H, W), (K + 1, H, W) -> the latter.

    In each window of 2 radius_px + 1 the probabilities are a linear function of the image, so their steps
    lie where the image has one. The filter keeps sums; only what it takes below 0 has to be cut.
    """
    filtered: Tensor = guided_blur(
        image[None], probabilities[None], kernel_size=2 * radius_px + 1, eps=eps, border_type="replicate"
    )[0].clamp(min=0)
    return filtered / filtered.sum(dim=0)


def crf(
    image: Tensor,
    probabilities: Tensor,
    strength: float = CRF_STRENGTH,
    near_px: float = CRF_NEAR_PX,
    gray: float = CRF_GRAY,
    smooth: float = CRF_SMOOTH,
    steps: int = CRF_STEPS,
) -> Tensor:
    """Mean field of a CRF over windows: (M, H, W), (K + 1, H, W) -> the latter.

    Krähenbühl & Koltun 2011, arXiv:1210.5644, eq. 3 (an appearance and a smoothness kernel, Potts labels) and
    algorithm 1, with pairs no further apart than REACH_PX (Teichmann & Cipolla 2018, arXiv:1805.04777). The
    messages to a pixel are divided by its kernels' sum, so that a border or a noisy part is not bound less.
    """
    unary = probabilities.clamp(min=1e-6).log()
    q = probabilities
    for _ in range(steps):
        message = torch.zeros_like(q)
        total = torch.zeros_like(image[:1])
        for dy in range(REACH_PX + 1):
            for dx in range(-REACH_PX, REACH_PX + 1):
                if (dy, dx) <= (0, 0):
                    continue  # each pair once; its kernel counts both ways
                here, there = _shifted(q.shape[1:], dy, dx)
                unlike = (image[:, *here] - image[:, *there]).square().mean(dim=0, keepdim=True)
                apart = float(dy * dy + dx * dx)
                kernel = torch.exp(-unlike / (2 * gray**2) - apart / (2 * near_px**2))
                kernel += smooth * np.exp(-apart / (2 * CRF_SMOOTH_PX**2))
                message[:, *here] += kernel * q[:, *there]
                message[:, *there] += kernel * q[:, *here]
                total[:, *here] += kernel
                total[:, *there] += kernel
        q = (unary + strength * message / total).softmax(dim=0)
    return q


def _shifted(shape: torch.Size, dy: int, dx: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The pixels of an (H, W) plane that have a neighbour at (dy >= 0, dx), and those neighbours."""
    height, width = shape
    here = slice(0, max(height - dy, 0)), slice(max(0, -dx), max(width - max(0, dx), 0))
    there = slice(dy, height), slice(max(0, dx), max(width + min(0, dx), 0))
    return here, there


REFINERS: dict[str, Refiner] = {"guided": guided, "crf": crf}
