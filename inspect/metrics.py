"""How a segmenter is judged: pixels, instances, sizes, false alarms, and intervals over groups.

One image at a time goes into a `Tally`; what stays are integer counters per group (coil, scene, piece),
no maps. Integers make the report independent of the order of the images, and counters per group can be
summed again for each bootstrap draw: every figure is one function of those counters.

Undefined is `None`, never 0 or 1, and nothing is a mean over images: that reads 0.90 where ten images hold
one defect and it was missed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.defects import label_mask
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import IGNORE
from scipy import ndimage, special
from scipy.optimize import linear_sum_assignment

HIT_PERCENT = 10  # match H: this share of a component within reach of the other side makes it found, or true
HIT_REACH_PX = 2
TAUS = (0.1, 0.3, 0.5)  # match T: smallest IoU of a pair
BOUNDARY_PX = 2  # how far apart two boundaries may be that count as one
BUCKETS = ("tiny", "small", "medium", "large")
BUCKET_EDGES_PX = (32, 256, 4096)  # first area, in px, of small, medium and large
MIN_N = 10  # fewer truth components than this give no figure
# Sums of IoU are kept in units of 2**-32, so that they too are integers: an error under 1e-9 for each pair.
IOU_UNIT = 1 << 32
# A class that stands in two groups is missing from one bootstrap draw in seven (e**-2), and its interval then
# tells of those two groups only: figures undefined in more than a tenth of the draws get no interval.
MIN_DEFINED_DRAWS = 0.90
FOREIGN = "(foreign)"  # predicted classes that the data does not label

# Labels of one class that touch at a side or a corner are one component.

Counts = Mapping[str, NDArray[Any]]  # counter name -> (..., its own shape)


@dataclass(frozen=True, slots=True)
class Components:
    """The connected regions of one label map, N of them, numbered 1..N."""

    ids: NDArray[np.int32]  # (H, W), 0 = no component
    classes: NDArray[np.int64]  # (N,), the label of component i + 1
    areas: NDArray[np.int64]  # (N,), px outside ignore
    boxes: list[tuple[slice, slice]]  # N bounding boxes (rows, columns), half-open, px

    def __len__(self) -> int:
        return len(self.areas)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(H, W): the class of each pixel that lies in a kept component, else 0."""
        return np.concatenate(([0], self.classes))[self.ids]


def components(
    label_map: NDArray[np.uint8],
    class_count: int,
    a_min: int = 1,
    ignore: NDArray[np.bool_] | None = None,
) -> Components:
    """Connected regions of labels 1..class_count in label_map (H, W), 8-connected, each class for itself.

    Dropped are components under a_min px and those of which more than half lies in `ignore` (H, W). The part
    in ignore of a kept one is cut off after labelling, so that ignore never splits it, and counts in no area
    (as in panoptic quality, where void pixels do not affect the IoU: Kirillov et al. 2019, arXiv:1801.00868).
    """
    ids, n = label_mask(np.where(label_map <= class_count, label_map, 0).astype(np.uint8))
    classes = np.zeros(n, dtype=np.int64)
    inside = ids > 0
    classes[ids[inside] - 1] = label_map[inside]
    areas = np.bincount(ids.ravel(), minlength=n + 1)
    hidden = np.zeros_like(areas) if ignore is None else np.bincount(ids[ignore], minlength=len(areas))
    keep = (areas >= a_min) & (2 * hidden <= areas)
    keep[0] = False
    if ignore is not None or not keep[1:].all():
        ids = np.where(keep, np.cumsum(keep), 0).astype(np.int32)[ids]
    if ignore is not None:
        ids[ignore] = 0
    return Components(
        ids=ids,
        classes=classes[keep[1:]],
        areas=(areas - hidden)[keep].astype(np.int64),
        boxes=ndimage.find_objects(ids),
    )


def dilate(mask: NDArray[np.bool_], reach_px: int = HIT_REACH_PX) -> NDArray[np.bool_]:
    """Everything within reach_px of mask (H, W), counted in 8-neighbour steps: for 2 px a 5 x 5 square.

    The square, not a disk, because it is two steps of the neighbourhood that makes the components, so a drift
    of 2 px in x and y at once is still within reach. It also splits into one pass per axis.
    """
    across = mask.copy()
    for r in range(1, reach_px + 1):
        across[:, r:] |= mask[:, :-r]
        across[:, :-r] |= mask[:, r:]
    out = across.copy()
    for r in range(1, reach_px + 1):
        out[r:] |= across[:-r]
        out[:-r] |= across[r:]
    return out


def boundary(mask: NDArray[np.bool_], ignore: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """The px of mask (H, W) that have a 4-neighbour outside of it.

    Where the image or `ignore` (H, W) cuts the mask nothing is known, so that is no boundary.
    """
    inside = np.pad(mask if ignore is None else mask | ignore, 1, constant_values=True)
    inner = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    edge = mask & ~inner
    return edge if ignore is None else edge & ~ignore


def _within_boundary_px(edge: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Everything at most BOUNDARY_PX from edge (H, W) by Euclid: 13 px around one, a square and four tips."""
    near = dilate(edge, 1)
    near[:-2] |= edge[2:]
    near[2:] |= edge[:-2]
    near[:, :-2] |= edge[:, 2:]
    near[:, 2:] |= edge[:, :-2]
    return near


def _covered(of: Components, near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,): px of each component of `of` inside near (H, W)."""
    return np.bincount(of.ids[near], minlength=len(of) + 1)[1:].astype(np.int64)


def _hits(covered_px: NDArray[np.int64], areas_px: NDArray[np.int64]) -> NDArray[np.bool_]:
    # in integers, so that exactly 10 % is a hit at any area
    return 100 * covered_px >= HIT_PERCENT * areas_px


def match_hit(side: Components, other: Components, class_aware: bool) -> NDArray[np.bool_]:
    """Match H: (N,) whether each component of `side` has 10 % of itself within 2 px of `other`.

    With class_aware only components of the same class count. For truth against prediction this is "found",
    the other way round "true". Many to one is allowed.
    """
    covered = np.zeros(len(side), dtype=np.int64)
    if not len(side) or not len(other):
        return np.zeros(len(side), dtype=bool)
    if not class_aware:
        return _hits(_covered(side, dilate(other.ids > 0)), side.areas)
    side_labels, other_labels = side.labels, other.labels
    for c in np.intersect1d(side.classes, other.classes):
        covered += _covered(side, dilate(other_labels == c) & (side_labels == c))
    return _hits(covered, side.areas)


def _partners(around: Components, others: Components) -> list[tuple[int, int]]:
    """Pairs (i, j), 0-based: 10 % of component j of `others` lies within 2 px of component i of `around`."""
    pairs: list[tuple[int, int]] = []
    if not len(around) or not len(others):
        return pairs
    for i, (rows, columns) in enumerate(around.boxes):
        crop = (
            slice(max(rows.start - HIT_REACH_PX, 0), rows.stop + HIT_REACH_PX),
            slice(max(columns.start - HIT_REACH_PX, 0), columns.stop + HIT_REACH_PX),
        )
        beside = others.ids[crop]
        if not beside.any():
            continue
        near = beside[dilate(around.ids[crop] == i + 1)]
        found, covered = np.unique(near[near > 0], return_counts=True)
        hit = _hits(covered, others.areas[found - 1])
        pairs += [(i, int(j) - 1) for j in found[hit]]
    return pairs


def _with_several(pairs: Sequence[tuple[int, int]], n: int) -> int:
    """How many of n components stand in at least two pairs."""
    return int((np.bincount([i for i, _ in pairs], minlength=n) >= 2).sum()) if pairs else 0


def pair_ious(truth: Components, predicted: Components) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs that share a pixel: (P, 2) 0-based numbers (truth, predicted), and their (P,) IoU."""
    both = (truth.ids > 0) & (predicted.ids > 0)
    joint = (truth.ids[both].astype(np.int64) - 1) * len(predicted) + predicted.ids[both] - 1
    keys, shared = np.unique(joint, return_counts=True)
    pairs = np.stack(np.divmod(keys, max(len(predicted), 1)), axis=-1)
    union = truth.areas[pairs[:, 0]] + predicted.areas[pairs[:, 1]] - shared
    return pairs, shared / union


def match_tau(
    pairs: NDArray[np.int64], ious: NDArray[np.float64], tau: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Match T: the one-to-one choice among pairs (P, 2) with IoU >= tau that has the largest sum of IoU.

    Pairs under tau are left out before the assignment, so that they cannot take a partner from a valid pair.
    """
    valid = ious >= tau
    pairs, ious = pairs[valid], ious[valid]
    rows, row_of = np.unique(pairs[:, 0], return_inverse=True)
    columns, column_of = np.unique(pairs[:, 1], return_inverse=True)
    table = np.zeros((len(rows), len(columns)))
    index = np.full(table.shape, -1, dtype=np.int64)
    table[row_of, column_of] = ious
    index[row_of, column_of] = np.arange(len(ious))
    chosen = index[linear_sum_assignment(table, maximize=True)]
    chosen = chosen[chosen >= 0]
    return pairs[chosen], ious[chosen]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of `hits` in n > 0 trials (Wilson 1927)."""
    z2 = float(special.ndtri(0.975)) ** 2
    p = hits / n
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (p * (1 - p) + z2 / (4 * n)) / n) ** 0.5 / (1 + z2 / n)
    # the ends are exactly 0 and 1 where nothing or everything is a hit; rounding must not say otherwise
    return (middle - half if hits else 0.0), (middle + half if hits < n else 1.0)


def garwood(events: int) -> tuple[float, float]:
    """95 % interval of a Poisson mean after counting `events` (Garwood 1936).

    chi2.ppf(p, 2 n) / 2 is the inverse of the regularised gamma function at n, which needs no `scipy.stats`.
    """
    low = float(special.gammaincinv(events, 0.025)) if events else 0.0
    return low, float(special.gammaincinv(events + 1, 0.975))


def _draws(
    statistics: Counts, figure: Callable[[Counts], NDArray[Any]], draws: int, seed: int
) -> NDArray[np.float64]:
    """(draws, ...): the figure of each resampling of the groups; the same seed draws the same groups."""
    groups = len(next(iter(statistics.values())))
    weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)
    # float64, for BLAS; the sums stay exact up to 2**53
    summed = {
        name: (weights.astype(np.float64) @ table.reshape(groups, -1)).reshape(draws, *table.shape[1:])
        for name, table in statistics.items()
    }
    return np.asarray(figure(summed), dtype=np.float64)


def _interval(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    defined = np.isfinite(values).mean(axis=0) >= MIN_DEFINED_DRAWS
    # columns without an interval are filled with 0 first: nanpercentile warns about columns of NaN
    low, high = np.nanpercentile(np.where(defined, values, 0.0), (2.5, 97.5), axis=0)
    return np.where(defined, low, np.nan), np.where(defined, high, np.nan)


def bootstrap(
    per_group_statistics: Counts,
    figure: Callable[[Counts], NDArray[Any]],
    draws: int = 1000,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile interval (low, high) of a figure over resampled groups (Efron 1979).

    per_group_statistics: counter name -> (G, ...), summable over G. figure: summed counters with a leading
    axis of draws -> (draws, ...). The interval has the trailing shape of the figure and is NaN where there
    are fewer than two groups or where the figure is undefined in more than a tenth of the draws.
    """
    values = _draws(per_group_statistics, figure, draws, seed)
    if len(next(iter(per_group_statistics.values()))) < 2:
        values = np.full_like(values, np.nan)
    return _interval(values)


def bootstrap_difference(
    per_group_a: Counts,
    per_group_b: Counts,
    figure: Callable[[Counts], NDArray[Any]],
    draws: int = 1000,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % interval (low, high) of figure(b) - figure(a), the same groups drawn for both.

    Row g of each table of a and b must be the same group. "Better" may be said where the interval excludes 0.
    Raises ValueError where the numbers of groups differ.
    """
    groups_a = len(next(iter(per_group_a.values())))
    groups_b = len(next(iter(per_group_b.values())))
    if groups_a != groups_b:
        raise ValueError(f"{groups_a} groups against {groups_b}: a paired difference needs the same groups")
    values = _draws(per_group_b, figure, draws, seed) - _draws(per_group_a, figure, draws, seed)
    if groups_a < 2:
        values = np.full_like(values, np.nan)
    return _interval(values)


# Figures: summed counters with any leading axes (...) -> the same leading axes; NaN = undefined.


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=out, where=np.asarray(whole) > 0)
    return out


def _class_pixels(counts: Counts) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Pixels per class, background first, (..., K + 1): right, in the truth, in the prediction."""
    pixels = counts["pixels"]
    return np.diagonal(pixels, axis1=-2, axis2=-1), pixels.sum(-1), pixels[..., :-1].sum(-2)


def class_iou(counts: Counts) -> NDArray[np.float64]:
    """Pooled IoU of background and the K classes, (..., K + 1), undefined for what is not in the truth.

    (A class that is only predicted would read 0, however little of it: its place is among the false alarms.)
    """
    right, truth, predicted = _class_pixels(counts)
    return np.where(truth > 0, _ratio(right, truth + predicted - right), np.nan)


def class_dice(counts: Counts) -> NDArray[np.float64]:
    """Pooled Dice of background and the K classes, (..., K + 1), undefined for what is not in the truth."""
    right, truth, predicted = _class_pixels(counts)
    return np.where(truth > 0, _ratio(2 * right, truth + predicted), np.nan)


def mean_iou(counts: Counts) -> NDArray[np.float64]:
    """Mean IoU over the defect classes that occur in the truth, (...)."""
    iou = class_iou(counts)[..., 1:]
    return _ratio(np.nansum(iou, axis=-1), np.isfinite(iou).sum(axis=-1))


def hit_recall(counts: Counts, found: str = "found") -> NDArray[np.float64]:
    """Share of truth components found by match H, all classes and sizes pooled, (...)."""
    return _ratio(counts[found].sum((-2, -1)), counts["truth"].sum((-2, -1)))


def hit_precision(counts: Counts, true: str = "true", predicted: str = "predicted") -> NDArray[np.float64]:
    """Share of predicted components that are true by match H, (...)."""
    return _ratio(counts[true].sum((-2, -1)), counts[predicted].sum((-2, -1)))


def harmonic(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1; 0 where only one of both is defined: alarms without any defect, or defects without any alarm."""
    recall, precision = np.asarray(recall), np.asarray(precision)
    nothing = np.isnan(recall) & np.isnan(precision)
    r, p = np.nan_to_num(recall), np.nan_to_num(precision)
    f1 = np.divide(2 * r * p, r + p, out=np.zeros(np.shape(r)), where=np.asarray(r + p) > 0)
    return np.where(nothing, np.nan, f1)


def hit_f1(counts: Counts) -> NDArray[np.float64]:
    """Harmonic mean of `hit_recall` and `hit_precision`, (...)."""
    return harmonic(hit_recall(counts), hit_precision(counts))


def tiny_small_recall(counts: Counts) -> NDArray[np.float64]:
    """Share of truth components under 256 px found by match H, all classes, (...)."""
    return _ratio(counts["found"][..., :2].sum((-2, -1)), counts["truth"][..., :2].sum((-2, -1)))


def tiny_small_f1(counts: Counts) -> NDArray[np.float64]:
    """F1 by match H of tiny and small, (...): recall of the truth, precision of the predictions of that size.

    Each side is judged by its own areas: a truth component has no size but its own, nor has a prediction.
    """
    true, predicted = (counts[name][..., :2].sum((-2, -1)) for name in ("true", "predicted"))
    return harmonic(tiny_small_recall(counts), _ratio(true, predicted))


def boundary_f1(counts: Counts) -> NDArray[np.float64]:
    """F1 at 2 px of the boundaries of the classes in the truth, (..., K): Csurka et al. 2013, BMVC, sec. 3.

    Pooled over the set: precision is the share of the predicted boundary within 2 px of the truth's, recall
    the other way round. Undefined for a class without a boundary in the truth.
    """
    edges = counts["edges"]
    f1 = harmonic(_ratio(edges[..., 2], edges[..., 3]), _ratio(edges[..., 0], edges[..., 1]))
    return np.where(edges[..., 3] > 0, f1, np.nan)


def mean_boundary_f1(counts: Counts) -> NDArray[np.float64]:
    """Mean of `boundary_f1` over the classes that have one, (...)."""
    f1 = boundary_f1(counts)
    return _ratio(np.nansum(f1, axis=-1), np.isfinite(f1).sum(axis=-1))


def alarms_per_mpx(counts: Counts) -> NDArray[np.float64]:
    """False alarms per inspected Mpx, (...)."""
    return _ratio((counts["predicted"] - counts["true"]).sum((-2, -1)) * 1e6, counts["area"])


def _headline(counts: Counts) -> NDArray[np.float64]:
    """The figures that get an interval, (..., 5 + K): see `_headline_tree`."""
    one_each = [f(counts) for f in (mean_iou, hit_recall, hit_precision, hit_f1, tiny_small_recall)]
    return np.concatenate([np.stack(one_each, axis=-1), class_iou(counts)[..., 1:]], axis=-1)


def _headline_tree(
    low: NDArray[np.float64], high: NDArray[np.float64], classes: Sequence[str], tiny_small_n: int
) -> dict[str, Any]:
    """Intervals of `_headline` under the keys that the figures have in `Tally.report`."""
    leaves = [{"low": _number(a), "high": _number(b)} for a, b in zip(low, high, strict=True)]
    if tiny_small_n < MIN_N:
        leaves[4] = {"low": None, "high": None}
    return {
        "pixel": {"miou": leaves[0], "iou": dict(zip(classes, leaves[5:], strict=True))},
        "instance": {
            "recall_h": leaves[1],
            "precision_h": leaves[2],
            "f1_h": leaves[3],
            "recall_by_size": {"tiny_small": {"recall": leaves[4]}},
        },
    }


def _number(x: Any) -> float | None:
    return None if np.isnan(x) else float(x)


def _share(hits: int, n: int) -> dict[str, Any]:
    """A recall with its n and Wilson interval; nothing but n below MIN_N."""
    if n < MIN_N:
        return {"recall": None, "n": n, "low": None, "high": None}
    low, high = wilson(hits, n)
    return {"recall": hits / n, "n": n, "low": low, "high": high}


def _rate(events: int, area_px: int) -> dict[str, Any]:
    """Alarms per inspected Mpx with their Garwood interval; None without area."""
    if area_px == 0:
        return {"alarms": events, "mpx": 0.0, "per_mpx": None, "low": None, "high": None}
    mpx = area_px / 1e6
    low, high = garwood(events)
    return {"alarms": events, "mpx": mpx, "per_mpx": events / mpx, "low": low / mpx, "high": high / mpx}


class Tally:
    """Counts images one at a time and tells all figures at the end.

    Labels: 0 background, 1..K the classes, in this order. In a truth, 255 is ignore: no pixel, no area, and
    predicted components more than half inside are dropped. (A truth component has no pixel at 255, so none
    is dropped.) In a prediction, 255 is not inspected: it predicts background there, so a defect under it is
    missed, and its pixels are no inspected area. Other values above K are foreign classes, which the data
    does not label: for a pixel or a defect of the data they are a miss, but class-aware they are no false
    alarm, since nobody said they are absent; class-agnostic they find and alarm as any other. They are
    counted apart as well.
    """

    def __init__(self, classes: tuple[str, ...], a_min: int = 1) -> None:
        """classes: names of labels 1..K. a_min: smaller components, in px, are dropped on both sides."""
        if not 1 <= len(classes) < IGNORE or len(set(classes)) != len(classes):
            raise ValueError(f"classes are {classes}: 1 to 254 different names are needed")
        self.classes = classes
        self.a_min = a_min
        self._groups: dict[str, dict[str, NDArray[np.int64]]] = {}
        k = len(classes)
        self._shapes: dict[str, tuple[int, ...]] = {
            "images": (),
            "area": (),  # inspected px
            "pixels": (k + 1, k + 2),  # truth x prediction, last column foreign
            # boundary px of the argmax: near the truth's, all; of the truth: near the argmax's, all
            "edges": (k, 4),
            "truth": (k, 4),  # truth components, class x bucket
            "found": (k, 4),
            "found_any": (k, 4),  # class-agnostic
            "predicted": (k, 4),
            "true": (k, 4),
            "predicted_any": (k + 1, 4),  # last row foreign
            "true_any": (k + 1, 4),
            "splits": (2,),  # class-aware, class-agnostic
            "merges": (2,),
            "pairs": (2, len(TAUS)),
            "pair_iou": (2, len(TAUS)),  # in units of 1 / IOU_UNIT
            "confusion": (k, k + 1),  # matched components at the lowest tau, truth x prediction
            "clean": (),  # images without any defect
            "clean_alarmed": (),
            "clean_alarms": (),
            "clean_area": (),
        }
        # label in a prediction -> column of "pixels"; not inspected is background there
        self._column = np.full(256, k + 1, dtype=np.int64)
        self._column[: k + 1] = np.arange(k + 1)
        self._column[IGNORE] = 0

    def add(
        self,
        truth: NDArray[np.uint8],
        argmax: NDArray[np.uint8],
        thresholded: NDArray[np.uint8],
        group: str,
    ) -> None:
        """Count one image of a group; all maps (H, W) uint8.

        argmax feeds the pixel figures, thresholded the instance figures and the inspected area.
        Raises ValueError for maps that differ in shape or are no uint8, UserError for a truth label above K.
        """
        for name, label_map in (("truth", truth), ("argmax", argmax), ("thresholded", thresholded)):
            if label_map.dtype != np.uint8 or label_map.ndim != 2 or label_map.shape != truth.shape:
                raise ValueError(
                    f"{name} is {label_map.shape} {label_map.dtype}: all maps must be uint8 of truth's (H, W)"
                )
        k = len(self.classes)
        ignore = truth == IGNORE
        judged = ~ignore
        pixels = np.bincount(
            truth[judged].astype(np.int64) * (k + 2) + self._column[argmax[judged]],
            minlength=(k + 1) * (k + 2),
        )
        if len(pixels) > (k + 1) * (k + 2):
            raise UserError(
                f"a truth mask of group {group} holds the value {truth[judged].max()}, but the data has "
                f"{k} classes: only 0 to {k} and {IGNORE} (ignore) are allowed"
            )
        counts: dict[str, Any] = {"images": 1, "pixels": pixels.reshape(k + 1, k + 2)}
        counts["area"] = area = int((judged & (thresholded != IGNORE)).sum())
        counts["edges"] = self._edges(truth, argmax, ignore if ignore.any() else None)
        alarms = self._count_instances(counts, truth, thresholded, ignore)
        if area and not pixels.reshape(k + 1, k + 2)[1:].any():
            counts |= {
                "clean": 1,
                "clean_area": area,
                "clean_alarms": alarms,
                "clean_alarmed": int(alarms > 0),
            }

        total = self._groups.setdefault(
            group, {name: np.zeros(shape, dtype=np.int64) for name, shape in self._shapes.items()}
        )
        for name, value in counts.items():
            total[name] += value

    def _edges(
        self, truth: NDArray[np.uint8], argmax: NDArray[np.uint8], ignore: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        """The counter "edges" of one image."""
        out = np.zeros((len(self.classes), 4), dtype=np.int64)
        for c in range(len(self.classes)):
            sides = [boundary(label_map == c + 1, ignore) for label_map in (argmax, truth)]
            for column, (side, other) in enumerate((sides, sides[::-1])):
                if n := int(side.sum()):
                    near = int((side & _within_boundary_px(other)).sum()) if other.any() else 0
                    out[c, 2 * column : 2 * column + 2] = near, n
        return out

    def _count_instances(
        self,
        counts: dict[str, Any],
        truth_map: NDArray[np.uint8],
        predicted_map: NDArray[np.uint8],
        ignore: NDArray[np.bool_],
    ) -> int:
        """Put the component counters of one image into counts; returns its class-aware false alarms."""
        k = len(self.classes)
        hidden = ignore if ignore.any() else None
        truth = components(truth_map, k, self.a_min)
        predicted = components(predicted_map, IGNORE - 1, self.a_min, hidden)
        row = self._column[predicted.classes] - 1  # 0..K-1, foreign K
        known = row < k

        def table(side: Components, rows: NDArray[np.int64], chosen: NDArray[np.bool_], height: int) -> Any:
            bucket = np.searchsorted(BUCKET_EDGES_PX, side.areas, side="right")
            return np.bincount((rows * 4 + bucket)[chosen], minlength=height * 4).reshape(height, 4)

        all_truth = np.ones(len(truth), dtype=bool)
        true = match_hit(predicted, truth, class_aware=True)
        counts["truth"] = table(truth, truth.classes - 1, all_truth, k)
        counts["found"] = table(truth, truth.classes - 1, match_hit(truth, predicted, class_aware=True), k)
        counts["found_any"] = table(
            truth, truth.classes - 1, match_hit(truth, predicted, class_aware=False), k
        )
        counts["predicted"] = table(predicted, row, known, k)
        counts["true"] = table(predicted, row, true & known, k)
        counts["predicted_any"] = table(predicted, row, known | True, k + 1)
        counts["true_any"] = table(predicted, row, match_hit(predicted, truth, class_aware=False), k + 1)
        if len(truth) and len(predicted):
            self._count_pairs(counts, truth, predicted, row)
        return int((known & ~true).sum())

    def _count_pairs(
        self, counts: dict[str, Any], truth: Components, predicted: Components, row: NDArray[np.int64]
    ) -> None:
        """Splits, merges, match T and the confusion of classes, of an image with both sides present."""
        k = len(self.classes)
        # A split: two predictions are true because of one and the same truth. A merge: one prediction finds
        # two. Each is judged by its own share, so the small pieces of a long scratch count as pieces.
        split, merged = _partners(truth, predicted), _partners(predicted, truth)
        same_split = [(g, q) for g, q in split if truth.classes[g] == predicted.classes[q]]
        same_merged = [(q, g) for q, g in merged if truth.classes[g] == predicted.classes[q]]
        counts["splits"] = np.array([_with_several(pairs, len(truth)) for pairs in (same_split, split)])
        counts["merges"] = np.array([_with_several(pairs, len(predicted)) for pairs in (same_merged, merged)])

        pairs, ious = pair_ious(truth, predicted)
        same = truth.classes[pairs[:, 0]] == predicted.classes[pairs[:, 1]]
        n = np.zeros((2, len(TAUS)), dtype=np.int64)
        iou_sum = np.zeros_like(n)
        for i, chosen in enumerate((same, same | True)):
            for j, tau in enumerate(TAUS):
                matched, matched_iou = match_tau(pairs[chosen], ious[chosen], tau)
                n[i, j] = len(matched)
                iou_sum[i, j] = np.rint(matched_iou * IOU_UNIT).astype(np.int64).sum()
        counts["pairs"], counts["pair_iou"] = n, iou_sum
        matched, _ = match_tau(pairs, ious, min(TAUS))
        cells = (truth.classes[matched[:, 0]] - 1) * (k + 1) + row[matched[:, 1]]
        counts["confusion"] = np.bincount(cells, minlength=k * (k + 1)).reshape(k, k + 1)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups seen, sorted: row g of every table of `statistics`."""
        return tuple(sorted(self._groups))

    def statistics(self) -> dict[str, NDArray[np.int64]]:
        """Counters per group, name -> (G, ...) int64, for `bootstrap`."""
        return {
            name: np.stack([self._groups[g][name] for g in self.groups])
            if self._groups
            else np.zeros((0, *shape), dtype=np.int64)
            for name, shape in self._shapes.items()
        }

    def report(self) -> dict[str, Any]:
        """All figures so far, as nested dicts of plain numbers; None = undefined or under n = 10.

        `pixel.miou` is the mean over the classes that occur in the truth, listed in `pixel.miou_classes`.
        Areas are px, since no pixel size is known here; rates are per inspected Mpx.
        """
        total = {name: table.sum(axis=0) for name, table in self.statistics().items()}
        iou, dice = class_iou(total), class_dice(total)
        names = self.classes
        alarms = total["predicted"] - total["true"]
        alarms_any = total["predicted_any"] - total["true_any"]
        area = int(total["area"])
        return {
            "n_images": int(total["images"]),
            "n_groups": len(self._groups),
            "pixel": {
                "iou": {name: _number(x) for name, x in zip(names, iou[1:], strict=True)},
                "miou": _number(mean_iou(total)),
                "miou_classes": [name for name, x in zip(names, iou[1:], strict=True) if np.isfinite(x)],
                "dice": {name: _number(x) for name, x in zip(names, dice[1:], strict=True)},
                "iou_background": _number(iou[0]),
                "boundary_f1": {name: _number(x) for name, x in zip(names, boundary_f1(total), strict=True)},
                "mean_boundary_f1": _number(mean_boundary_f1(total)),
            },
            "instance": {
                **self._instance(total, 0, "found", "true", "predicted"),
                "by_class": {name: self._class(total, c) for c, name in enumerate(names)},
                "class_agnostic": {
                    **self._instance(total, 1, "found_any", "true_any", "predicted_any"),
                    "confusion": {
                        name: dict(zip((*names, FOREIGN), map(int, total["confusion"][c]), strict=True))
                        for c, name in enumerate(names)
                    },
                },
            },
            "false_alarms": {
                **_rate(int(alarms.sum()), area),
                "by_size": dict(zip(BUCKETS, map(int, alarms.sum(0)), strict=True)),
                "clean_images": {
                    "n": int(total["clean"]),
                    "with_alarm": int(total["clean_alarmed"]),
                    **_rate(int(total["clean_alarms"]), int(total["clean_area"])),
                },
                "class_agnostic": _rate(int(alarms_any.sum()), area),
                "foreign": _rate(int(alarms_any[-1].sum()), area),
            },
        }

    def _instance(self, total: Counts, mode: int, found: str, true: str, predicted: str) -> dict[str, Any]:
        """Match H and match T, class-aware (mode 0) or class-agnostic (mode 1)."""
        recall, precision = hit_recall(total, found), hit_precision(total, true, predicted)
        truth_n, predicted_n = int(total["truth"].sum()), int(total[predicted].sum())
        by_size = list(zip(total[found].sum(0).tolist(), total["truth"].sum(0).tolist(), strict=True))
        buckets = dict(zip(BUCKETS, by_size, strict=True))
        buckets["tiny_small"] = (by_size[0][0] + by_size[1][0], by_size[0][1] + by_size[1][1])
        match_t: dict[str, dict[str, Any]] = {}
        for j, tau in enumerate(TAUS):
            pairs = total["pairs"][mode, j]
            f1 = _ratio(2 * pairs, np.asarray(truth_n + predicted_n))
            sq = _ratio(total["pair_iou"][mode, j] / IOU_UNIT, pairs)
            # PQ is SQ times F1, and 0 where something is there but nothing matched (SQ undefined)
            pq = np.where(np.isnan(sq) & ~np.isnan(f1), 0.0, sq * f1)
            match_t[str(tau)] = {"f1": _number(f1), "sq": _number(sq), "pq": _number(pq), "pairs": int(pairs)}
        return {
            "recall_h": _number(recall),
            "precision_h": _number(precision),
            "f1_h": _number(harmonic(recall, precision)),
            "n_truth": truth_n,
            "n_predicted": predicted_n,
            "splits": int(total["splits"][mode]),
            "merges": int(total["merges"][mode]),
            "recall_by_size": {name: _share(*hits_n) for name, hits_n in buckets.items()},
            "match_t": match_t,
        }

    def _class(self, total: Counts, c: int) -> dict[str, Any]:
        """Match H of class c, class-aware: recall with its interval, and the shares of the predictions."""
        predicted, true = int(total["predicted"][c].sum()), int(total["true"][c].sum())
        return {
            **_share(int(total["found"][c].sum()), int(total["truth"][c].sum())),
            "precision": true / predicted if predicted >= MIN_N else None,
            "n_predicted": predicted,
        }

    def intervals(self, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
        """95 % bootstrap intervals over the groups, {low, high} under the keys of `report`.

        For mIoU, IoU per class, recall_h, precision_h, f1_h and the recall of tiny and small defects pooled.
        None with fewer than two groups, or for a figure undefined in more than a tenth of the draws.
        """
        if not self._groups:
            nothing = np.full(5 + len(self.classes), np.nan)
            return _headline_tree(nothing, nothing, self.classes, 0)
        statistics = self.statistics()
        low, high = bootstrap(statistics, _headline, draws, seed)
        return _headline_tree(low, high, self.classes, int(statistics["truth"][..., :2].sum()))

    def difference(self, other: "Tally", draws: int = 1000, seed: int = 0) -> dict[str, Any]:
        """95 % intervals of these figures minus those of `other`, paired by group; keys as `intervals`.

        Raises ValueError where both did not count the same groups and classes.
        """
        if self.groups != other.groups or self.classes != other.classes or not self._groups:
            raise ValueError(
                f"{len(self.groups)} groups of {self.classes} against {len(other.groups)} groups of "
                f"{other.classes}: a paired difference needs the same groups and classes on both sides"
            )
        mine, theirs = self.statistics(), other.statistics()
        low, high = bootstrap_difference(theirs, mine, _headline, draws, seed)
        return _headline_tree(low, high, self.classes, int(mine["truth"][..., :2].sum()))
