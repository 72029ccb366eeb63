"""Whether a probability means what it says: calibration error, and the temperature that mends it.

Judged within 16 px of the truth or of the prediction: on a strip nearly all the rest is certain, right and
uninteresting. One image at a time; what stays are sums.
"""

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.labels import IGNORE
from rollsight.inspect.metrics import dilate

BINS = 15
NEAR_PX = 16
# Candidates: a step of 5 %, 1 among them.
TEMPERATURES = np.exp(np.linspace(-np.log(4), np.log(4), 57))
SAMPLE_PX = 2000  # of an image, evenly spread, for the fit


def near(truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The judged px within 16 px of a defect of either map; maps (H, W), 0 background, 255 ignore."""
    known = truth != IGNORE
    close: NDArray[np.bool_] = dilate(((truth > 0) & known) | (predicted > 0), NEAR_PX) & known
    return close


class Reliability:
    """Counts per bin of confidence, the largest probability of a pixel."""

    def __init__(self) -> None:
        self.n = np.zeros(BINS, dtype=np.int64)
        self.right = np.zeros(BINS, dtype=np.int64)
        self.confidence = np.zeros(BINS)  # sum
        self.nats = 0.0  # sum of -log p of the truth

    def add(self, logits: NDArray[np.float32], truth: NDArray[np.uint8]) -> None:
        """Count pixels: logits (K + 1, n), background first; truth (n,) in 0..K."""
        if not truth.size:
            return
        z = logits - logits.max(axis=0)
        total = np.exp(z).sum(axis=0, dtype=np.float64)
        column = np.minimum((BINS / total).astype(np.int64), BINS - 1)
        self.n += np.bincount(column, minlength=BINS)
        self.right += np.bincount(column[z.argmax(axis=0) == truth], minlength=BINS)
        self.confidence += np.bincount(column, 1 / total, BINS)
        self.nats += float((np.log(total) - z[truth, np.arange(truth.size)]).sum())

    def error(self) -> float | None:
        """Expected calibration error: Guo et al. 2017, arXiv:1706.04599, eq. 3. None without pixels."""
        n = int(self.n.sum())
        return float(np.abs(self.right - self.confidence).sum() / n) if n else None

    def bins(self) -> list[dict[str, float]]:
        """The bins that hold pixels: mean confidence, share that is right, n."""
        return [
            {"confidence": float(c / n), "right": float(r / n), "n": int(n)}
            for n, r, c in zip(self.n, self.right, self.confidence, strict=True)
            if n
        ]


def evenly(mask: NDArray[np.bool_], most: int = SAMPLE_PX) -> NDArray[np.int64]:
    """Flat indices of at most `most` px of mask, evenly spread."""
    found = np.flatnonzero(mask)
    return found[:: max(1, -(-found.size // most))]
