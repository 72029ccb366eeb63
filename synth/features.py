"""How near sets of defect crops are to each other, in features of the Lite0 encoder that comes as a wheel.

The distances are comparable with each other only: not with figures of papers, which use another network.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.nets import NETS
from rollsight.synth.degraded import surroundings
from rollsight.synth.mask_bank import Bools

CROP_PX = 96  # of every crop
CONTEXT = 1.5  # of the defect's longer side that a crop shows
SMALLEST_PX = 32  # side of a crop before it is resized
SUBSETS, SUBSET = 50, 50  # of the distance between sets
COPY_CORRELATION = 0.95  # from it on a crop is called a copy
COPY_RATIO = 0.8  # of the distances of made and of held-out crops to training ones: alarm below

Crop = NDArray[np.float32]  # (96, 96) in [0, 1]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1, half-open


def crop_of(image: NDArray[np.float32], box: Box) -> Crop:
    """The square around a box of an image (H, W); it stays in the image."""
    return _square(image, box).clip(0, 1)


def residual_of(image: NDArray[np.float32], inside: Bools, box: Box) -> Crop:
    """As `crop_of` what a defect, its px `inside` (H, W), adds to the gray around it; 0 beside it.

    A defect that was copied onto other steel is the same there, and only there.
    """
    around = surroundings(inside)
    level = image[around].mean() if around.any() else image.mean()  # of an image that is all defect
    added = np.where(inside, image - level, 0)
    return _square(added.astype(np.float32), box)


def _square(image: NDArray[np.float32], box: Box) -> Crop:
    x0, y0, x1, y1 = box
    side = round(max(SMALLEST_PX, CONTEXT * max(x1 - x0, y1 - y0)))
    side = min(side, *image.shape)
    y = int(np.clip((y0 + y1 - side) // 2, 0, image.shape[0] - side))
    x = int(np.clip((x0 + x1 - side) // 2, 0, image.shape[1] - side))
    part = Image.fromarray(np.ascontiguousarray(image[y : y + side, x : x + side]))
    return np.asarray(part.resize((CROP_PX, CROP_PX), Image.Resampling.BILINEAR))


class Features:
    """Pooled features at strides 8 and 16, (n, 152), of crops with their own mean gray taken off."""

    def __init__(self) -> None:
        net: Any = NETS["fcn"](1, pretrained=True).eval()
        self._stem, self._encoder = net.stem, net.encoder

    def __call__(self, crops: Sequence[Crop]) -> NDArray[np.float64]:
        out = []
        with torch.inference_mode():
            for start in range(0, len(crops), 32):
                x = torch.from_numpy(np.stack(crops[start : start + 32]))[:, None]
                x = (x - x.mean(dim=(2, 3), keepdim=True)) / 0.226  # ImageNet's spread
                *_, at_8, at_16 = self._encoder(self._stem(x))
                out.append(torch.cat([at_8.mean(dim=(2, 3)), at_16.mean(dim=(2, 3))], dim=1).double().numpy())
        return np.concatenate(out)


def kid(first: NDArray[np.float64], second: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Kernel distance between sets of features (n, D) and (m, D): mean and spread over subsets.

    Unbiased squared MMD with the cubic kernel (Binkowski et al. 2018, arXiv:1801.01401, sec. 4): about 0 for
    two sets of one distribution. nan where a set has fewer than 4.
    """
    size = min(SUBSET, len(first), len(second))
    if size < 4:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    values = [
        _mmd2(*(of[rng.choice(len(of), size, replace=False)] for of in (first, second)))
        for _ in range(SUBSETS)
    ]
    return float(np.mean(values)), float(np.std(values))


def _mmd2(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    n, dim = x.shape
    xx, yy, xy = (((a @ b.T) / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    pairs = n * (n - 1)
    return float((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / pairs - 2 * xy.mean())


def cosine_distances(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 - cosine of every pair: (n, D), (m, D) -> (n, m)."""
    x, y = (of / np.linalg.norm(of, axis=1, keepdims=True).clip(1e-12) for of in (x, y))
    return np.asarray(1 - x @ y.T)


def nearest_ratio(made: NDArray[np.float64], train: NDArray[np.float64], held: NDArray[np.float64]) -> float:
    """Median distance of made crops to the nearest training one, over that of held-out ones.

    About 1 where made crops are as new as real ones that nobody learned from, 0 for copies; both are held
    against the whole of `train`, since in a part of it what was copied may not be. Below COPY_RATIO: an
    alarm. nan where a set is empty.
    """
    if not len(made) or not len(train) or not len(held):
        return float("nan")
    near = [np.median(cosine_distances(of, train).min(axis=1)) for of in (made, held)]
    return float(near[0] / max(near[1], 1e-12))


def spread(features: NDArray[np.float64]) -> float:
    """Mean distance between two of a set, a measure of its diversity; nan for fewer than two."""
    n = len(features)
    return float(cosine_distances(features, features).sum() / (n * (n - 1))) if n > 1 else float("nan")


def largest_correlation(made: Sequence[Crop], train: Sequence[Crop]) -> NDArray[np.float64]:
    """Of each made residual its largest correlation with that of any training defect, in four flips: (n,).

    Of `residual_of`, at 32 x 32 px and without the mean.
    """
    known = np.concatenate([_unit([crop[::y, ::x] for crop in train]) for y in (1, -1) for x in (1, -1)])
    return np.asarray((_unit(made) @ known.T).max(axis=1))


def _unit(crops: Sequence[Crop]) -> NDArray[np.float64]:
    small = np.stack([crop.reshape(32, 3, 32, 3).mean(axis=(1, 3)).ravel() for crop in crops]).astype(
        np.float64
    )
    small = small - small.mean(axis=1, keepdims=True)
    return np.asarray(small / np.linalg.norm(small, axis=1, keepdims=True).clip(1e-12))
