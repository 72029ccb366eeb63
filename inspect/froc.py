"""Found defects and false alarms at every threshold: FROC, precision against recall, what a budget allows.

Class c at threshold t is the region p_c >= t, each class for itself; matched as `metrics` does it (H, within
the class). One image at a time; what stays are integer counters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.labels import IGNORE
from rollsight.inspect.metrics import BUCKET_EDGES_PX, HIT_PERCENT, HIT_REACH_PX, components, dilate
from scipy import ndimage, special

# Even in the logit, three to a unit with 0.5 among them, and on to 2 in a million for clean strip.
THRESHOLDS = tuple(
    round(float(special.expit(logit)), 7) for logit in (*(step / 3 for step in range(-9, 22)), *range(8, 14))
)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # false alarms per m2, or per Mpx without a pixel size
EIGHT = np.ones((3, 3), dtype=np.int8)


class Sweep:
    """Counters of K classes at T thresholds."""

    def __init__(self, classes: Sequence[str], thresholds: Sequence[float] = THRESHOLDS) -> None:
        """thresholds: probabilities, rising."""
        self.classes = tuple(classes)
        self.thresholds = np.array(thresholds)
        k, t = len(classes), len(thresholds)
        self.truth = np.zeros((k, 4), dtype=np.int64)  # truth components, class x size
        self.found = np.zeros((t, k, 4), dtype=np.int64)
        self.predicted = np.zeros((t, k), dtype=np.int64)
        self.true = np.zeros((t, k), dtype=np.int64)
        self.area = 0  # inspected px
        self.clean = 0  # images without any defect
        self.clean_area = 0
        self.clean_alarms = np.zeros((t, k), dtype=np.int64)
        # (K,) per image: the largest probability of each class beside all defects; and whether it was clean
        self.largest: list[tuple[bool, NDArray[Any]]] = []

    def add(self, truth: NDArray[np.uint8], p: NDArray[np.float32]) -> None:
        """Count one image: truth (H, W), 0..K and 255 ignore; p (K, H, W), probability of each class."""
        ignore = truth == IGNORE
        hidden = ignore if ignore.any() else None
        area = int(truth.size - ignore.sum())
        defects = components(truth, len(self.classes))
        clean = bool(area) and not len(defects)
        self.area += area
        self.clean += clean
        self.clean_area += area if clean else 0
        beside = ~dilate((truth > 0) & ~ignore, HIT_REACH_PX) & ~ignore
        if beside.any():
            self.largest.append((clean, p[:, beside].max(axis=1)))
        buckets = np.searchsorted(BUCKET_EDGES_PX, defects.areas, side="right")
        for c in range(len(self.classes)):
            # p >= thresholds[i] is level > i
            level = np.searchsorted(self.thresholds, p[c], side="right").astype(np.uint8)
            own = defects.classes == c + 1
            self.truth[c] += np.bincount(buckets[own], minlength=4)
            reach = None
            if own.any():
                ids = np.where(truth == c + 1, defects.ids, 0)
                seen = level if hidden is None else np.where(hidden, 0, level).astype(np.uint8)
                at = _found_at(ids, seen, np.flatnonzero(own) + 1, defects.areas)
                for bucket, below in zip(buckets[own], at, strict=True):
                    self.found[:below, c, bucket] += 1
                reach = dilate(truth == c + 1, HIT_REACH_PX)
            predicted, true = _components_at(level, len(self.thresholds), reach, hidden)
            self.predicted[:, c] += predicted
            self.true[:, c] += true
            if clean:
                self.clean_alarms[:, c] += predicted

    def alarms(self) -> NDArray[np.int64]:
        """(T, K): false alarms that a budget counts: on clean images, where there are, else on all.

        A rising threshold may raise their number, where it breaks one false region into many. Below 0.5 a
        sinking one may not lower it: that alarms melt into one that floods the image is no gain.
        """
        counted = (self.clean_alarms if self.clean else self.predicted - self.true).copy()
        low = slice(None, int(np.searchsorted(self.thresholds, 0.5)) + 1)
        counted[low] = np.maximum.accumulate(counted[low][::-1], axis=0)[::-1]
        return counted

    @property
    def alarm_mpx(self) -> float:
        """The inspected area that `alarms` stand on, Mpx."""
        return (self.clean_area if self.clean else self.area) / 1e6

    def quiet(self, share: float) -> NDArray[np.float64]:
        """(K,) the quantile `share` over images of the largest probability of each class beside all defects.

        Over clean images, where there are; 1 where no image shows anything beside defects.
        """
        largest = [p for clean, p in self.largest if clean or not self.clean] or [np.ones(len(self.classes))]
        return np.quantile(np.array(largest, dtype=np.float64).reshape(-1, len(self.classes)), share, axis=0)

    def froc(self, scale: float = 1.0) -> dict[str, Any]:
        """Recall against false alarms, one threshold for all classes, and its mean at RATES.

        scale: m2 per Mpx where the pixel size is known; rates are per Mpx without. The recall at a rate is
        the highest with no more alarms; between measured points linear, as the mean sensitivity of CAMELYON16
        (Ehteshami Bejnordi et al. 2017, JAMA 318:2199).
        """
        area = self.alarm_mpx * scale
        curves = {
            "curve": (self.found.sum(axis=(1, 2)), int(self.truth.sum())),
            "curve_tiny_small": (self.found[:, :, :2].sum(axis=(1, 2)), int(self.truth[:, :2].sum())),
        }
        told: dict[str, Any] = {"rates": list(RATES), "recall": None, "score": None}
        for name, (found, n) in curves.items():
            if not n or not area:
                told[name] = []
                continue
            rate = np.append(self.alarms().sum(axis=1) / area, 0.0)
            recall = np.append(found / n, 0.0)
            order = np.lexsort((recall, rate))
            rate, recall = rate[order], np.maximum.accumulate(recall[order])
            told[name] = [{"rate": float(x), "recall": float(y)} for x, y in zip(rate, recall, strict=True)]
            if name == "curve":
                at = np.interp(RATES, rate, recall)
                told |= {"recall": at.tolist(), "score": float(at.mean())}
        return told

    def precision_recall(self) -> dict[str, list[dict[str, float]]]:
        """Per class, at each threshold that predicts anything: hit precision and recall of its components."""
        return {
            name: [
                {
                    "threshold": float(t),
                    "precision": float(self.true[i, c] / self.predicted[i, c]),
                    "recall": float(self.found[i, c].sum() / self.truth[c].sum()),
                }
                for i, t in enumerate(self.thresholds)
                if self.predicted[i, c]
            ]
            for c, name in enumerate(self.classes)
            if self.truth[c].any()
        }


def _found_at(
    ids: NDArray[np.int32], level: NDArray[np.uint8], chosen: NDArray[np.int64], areas: NDArray[np.int64]
) -> list[int]:
    """For each truth component of `chosen`: the number of thresholds at which it is found.

    A px is within reach of the region of a threshold where the largest level around it is above that
    threshold; the component is found while a tenth of its px are.
    """
    reached = ndimage.maximum_filter(level, size=2 * HIT_REACH_PX + 1, mode="constant")
    inside = ids > 0
    number, value = ids[inside], reached[inside]
    order = np.lexsort((-value.astype(np.int16), number))
    number, value = number[order], value[order]
    starts = np.searchsorted(number, chosen)
    needed = -(-HIT_PERCENT * areas[chosen - 1] // 100)  # px
    return [int(v) for v in value[starts + needed - 1]]


def _components_at(
    level: NDArray[np.uint8],
    thresholds: int,
    reach: NDArray[np.bool_] | None,
    hidden: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(T,) components of the region of each threshold, and those of them that are true."""
    predicted, true = np.zeros(thresholds, dtype=np.int64), np.zeros(thresholds, dtype=np.int64)
    ys, xs = np.nonzero(level)
    if not ys.size:
        return predicted, true
    crop = (slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1))
    level = level[crop]
    hidden = None if hidden is None else hidden[crop]
    reach = None if reach is None else reach[crop]
    present = np.bincount(level.ravel(), minlength=thresholds + 1)
    for i in range(thresholds):
        if i and not present[i]:  # no px lies between this threshold and the last one: the same region
            predicted[i], true[i] = predicted[i - 1], true[i - 1]
            continue
        ids, n = ndimage.label(level > i, structure=EIGHT)
        if not n:
            break
        areas = np.bincount(ids.ravel(), minlength=n + 1)[1:]
        keep = np.ones(n, dtype=bool)
        if hidden is not None:
            cut = np.bincount(ids[hidden], minlength=n + 1)[1:]
            keep = 2 * cut <= areas
            areas = areas - cut
            ids = np.where(hidden, 0, ids)
        predicted[i] = keep.sum()
        if reach is not None:
            covered = np.bincount(ids[reach], minlength=n + 1)[1:]
            true[i] = (keep & (100 * covered >= HIT_PERCENT * areas)).sum()
    return predicted, true
