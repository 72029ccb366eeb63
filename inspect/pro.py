"""Area under the per-region overlap: how much of each defect is covered, whatever its size or class.

One image at a time into histograms, so that no map is kept (anomalib issue 1651 told 1.21: hence the assert).
"""

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.labels import IGNORE
from rollsight.inspect.metrics import components

LIMIT = 0.05  # largest false-positive rate of pixels
LIMITS = (-24.0, 24.0)  # logit of the lowest and the highest bin
BINS = 4096


class Overlap:
    """Histograms of the defect's logit over defects and over background."""

    def __init__(self) -> None:
        self.regions = 0
        self.covered = np.zeros(BINS)  # sum over the truth's components of the share of their px in a bin
        self.background = np.zeros(BINS, dtype=np.int64)  # px

    def add(self, truth: NDArray[np.uint8], logit: NDArray[np.float32]) -> None:
        """Count one image: truth (H, W), 0 background, 255 ignore; logit (H, W) of "this is a defect"."""
        low, high = LIMITS
        column = np.clip((logit - low) * (BINS / (high - low)), 0, BINS - 1).astype(np.int64)
        regions = components(truth, IGNORE - 1)
        inside = regions.ids > 0
        share = 1 / np.concatenate(([1], regions.areas))
        self.regions += len(regions)
        self.covered += np.bincount(column[inside], share[regions.ids[inside]], BINS)
        self.background += np.bincount(column[truth == 0], minlength=BINS)

    def area(self, limit: float = LIMIT) -> float | None:
        """Mean overlap over the false-positive rates from 0 to limit, in [0, 1]; None without either side.

        Bergmann et al. 2021, doi:10.1007/s11263-020-01400-4, sec. 5.1: the rate is over all background px,
        the curve is linear between thresholds and cut at the limit.
        """
        total = int(self.background.sum())
        if not self.regions or not total:
            return None
        rate = np.concatenate(([0.0], np.cumsum(self.background[::-1]) / total))
        overlap = np.concatenate(([0.0], np.cumsum(self.covered[::-1]) / self.regions))
        end = int(np.searchsorted(rate, limit, side="right"))
        x = np.append(rate[:end], limit)
        y = np.append(overlap[:end], np.interp(limit, rate, overlap))
        area = float(np.trapezoid(y, x)) / limit
        assert area <= 1 + 1e-9, f"area under PRO is {area}"
        return min(area, 1.0)
