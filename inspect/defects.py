"""Defects: components of the class mask, joined across bands, in mm.

A band knows its components by integer facts that can be merged (area, box, first pixel) and by its
largest probability, whose maximum does not depend on the order. Where two bands meet, runs of one class
that touch (8-connected) are one defect: union-find over the seams. So the table is the same for any cut.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rollsight.inspect.rolls import NOT_INSPECTED
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

EIGHT = np.ones((3, 3), dtype=np.int8)
SCHEMA_VERSION = 1
# Integer facts of a component, and how two parts of one defect merge.
FACTS: dict[str, np.ufunc] = {
    "area_px": np.add,
    "x0": np.minimum,
    "y0": np.minimum,
    "x1": np.maximum,
    "y1": np.maximum,
    "strip_x0": np.minimum,  # from the drive-side edge of each line's row of cells: strip wander removed
    "strip_x1": np.maximum,
}
SCHEMA = pa.schema(
    [
        ("defect_id", pa.int64()),  # first pixel in raster order: y * width + x
        ("roll_id", pa.string()),
        ("run_id", pa.string()),
        ("class", pa.string()),
        ("x_mm", pa.float64()),  # left side, from the drive-side edge of the strip; null without pixel sizes
        ("y_m", pa.float64()),  # first line, from the head of the roll
        ("width_mm", pa.float64()),  # across the strip
        ("length_mm", pa.float64()),  # along the strip
        ("area_mm2", pa.float64()),  # of the mask, not of its box
        ("area_px", pa.int64()),
        ("score", pa.float32()),  # largest probability inside the mask, 0 to 1
        ("severity", pa.string()),
        ("lighting", pa.string()),
        ("periodic_group", pa.int64()),
        ("review", pa.string()),
        ("x0", pa.int64()),  # box in px of the roll, half-open
        ("y0", pa.int64()),
        ("x1", pa.int64()),
        ("y1", pa.int64()),
    ],
    metadata={"rollsight_defects": str(SCHEMA_VERSION)},
)


class Scale(Protocol):
    """What a defect table needs to know of a roll."""

    @property
    def mm_per_px_x(self) -> float | None: ...
    @property
    def mm_per_line(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Components:
    """The components of one band: equal-length arrays, and the seam runs that name them by index."""

    classes: NDArray[np.int64]  # 1..K
    first_px: NDArray[np.int64]  # y * width + x of the first pixel in raster order
    score: NDArray[np.float32]
    facts: dict[str, NDArray[np.int64]]
    top: NDArray[np.int64]  # (runs, 3) first px, one past the last px, component: on the band's first line
    bottom: NDArray[np.int64]  # the same on its last line

    def __len__(self) -> int:
        return len(self.classes)

    def to_json(self) -> dict[str, Any]:
        """Lists of exact numbers (a float32 is exact in JSON's decimal digits)."""
        return {
            "classes": self.classes.tolist(),
            "first_px": self.first_px.tolist(),
            "score": self.score.astype(np.float64).tolist(),
            "facts": {name: values.tolist() for name, values in self.facts.items()},
            "top": self.top.tolist(),
            "bottom": self.bottom.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Components":
        return cls(
            np.array(data["classes"], dtype=np.int64),
            np.array(data["first_px"], dtype=np.int64),
            np.array(data["score"], dtype=np.float32),
            {name: np.array(data["facts"][name], dtype=np.int64) for name in FACTS},
            np.array(data["top"], dtype=np.int64).reshape(-1, 3),
            np.array(data["bottom"], dtype=np.int64).reshape(-1, 3),
        )


def label_mask(mask: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
    """8-connected components class by class: mask (H, W) -> ids (H, W) from 1, 0 background; their number.

    255 counts as background.
    """
    ids = np.zeros(mask.shape, dtype=np.int32)
    count = 0
    for value in np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[1:NOT_INSPECTED]) + 1:
        found, n = ndimage.label(mask == value, structure=EIGHT)
        np.add(found, count, out=ids, where=found > 0)
        count += n
    return ids, count


def band_components(
    mask: NDArray[np.uint8], score: NDArray[np.float32], left: NDArray[np.int64], y0: int
) -> Components:
    """The components of a band's mask (h, W), 0 background, 255 not inspected, first line y0.

    score (h, W) probability of the mask's class; left (h,) the strip's drive-side edge in px.
    """
    ids, n = label_mask(mask)
    ys, xs = np.nonzero(ids)  # raster order
    of = ids[ys, xs] - 1
    strip_x = xs - left[ys]
    facts = {
        "area_px": np.bincount(of, minlength=n).astype(np.int64),
        "x0": _extreme(np.minimum, of, xs, n),
        "y0": _extreme(np.minimum, of, ys + y0, n),
        "x1": _extreme(np.maximum, of, xs + 1, n),
        "y1": _extreme(np.maximum, of, ys + y0 + 1, n),
        "strip_x0": _extreme(np.minimum, of, strip_x, n),
        "strip_x1": _extreme(np.maximum, of, strip_x + 1, n),
    }
    classes = np.zeros(n, dtype=np.int64)
    classes[of] = mask[ys, xs]
    best = np.zeros(n, dtype=np.float32)
    np.maximum.at(best, of, score[ys, xs])
    first = _extreme(np.minimum, of, (ys + y0).astype(np.int64) * mask.shape[1] + xs, n)
    return Components(classes, first, best, facts, _seam(ids[0]), _seam(ids[-1]))


def _extreme(ufunc: np.ufunc, of: NDArray[np.int32], values: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    limits = np.iinfo(np.int64)
    result = np.full(n, limits.max if ufunc is np.minimum else limits.min, dtype=np.int64)
    ufunc.at(result, of, values)
    return result


def _seam(line: NDArray[np.int32]) -> NDArray[np.int64]:
    """The runs of components on one line: (runs, 3) first px, one past the last, component index."""
    starts = np.flatnonzero(np.diff(line, prepend=0) != 0)
    ends = np.append(starts[1:], line.size)
    on = line[starts] > 0
    return np.stack([starts[on], ends[on], line[starts[on]] - 1], axis=1).astype(np.int64)


def join(bands: Sequence[Components]) -> Components:
    """One table of the whole roll's components from its bands in order; seams are joined by union-find.

    Sorted by first pixel, so the order and the ids are the same however the roll was cut.
    """
    offsets = np.cumsum([0, *(len(band) for band in bands)])
    pairs = [
        _touching(upper, lower, int(offsets[i]), int(offsets[i + 1]))
        for i, (upper, lower) in enumerate(pairwise(bands))
    ]
    total = int(offsets[-1])
    edges = np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64)
    graph = coo_array((np.ones(len(edges), dtype=np.int8), (edges[:, 0], edges[:, 1])), shape=(total, total))
    n, of = connected_components(graph, directed=False) if total else (0, np.zeros(0, dtype=np.int32))

    def merged(ufunc: np.ufunc, parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
        values = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
        if ufunc is not np.add:
            return _extreme(ufunc, of, values, n)
        sums = np.zeros(n, dtype=np.int64)
        np.add.at(sums, of, values)
        return sums

    first = merged(np.minimum, (band.first_px for band in bands))
    order = np.argsort(first, kind="stable")
    classes = merged(np.minimum, (band.classes for band in bands))  # all parts of a defect are of one class
    score = np.zeros(n, dtype=np.float32)
    np.maximum.at(score, of, np.concatenate([*(band.score for band in bands), np.zeros(0, np.float32)]))
    facts = {
        name: merged(ufunc, (band.facts[name] for band in bands))[order] for name, ufunc in FACTS.items()
    }
    none = np.zeros((0, 3), dtype=np.int64)
    return Components(classes[order], first[order], score[order], facts, none, none)


def at_least(components: Components, a_min_px: int) -> Components:
    """The components of at least a_min_px; after the stitching, so that a cut never makes one too small."""
    keep = components.facts["area_px"] >= a_min_px
    return Components(
        components.classes[keep],
        components.first_px[keep],
        components.score[keep],
        {name: values[keep] for name, values in components.facts.items()},
        components.top,
        components.bottom,
    )


def _touching(upper: Components, lower: Components, upper_at: int, lower_at: int) -> NDArray[np.int64]:
    """Pairs of components of two bands whose runs touch across the seam, diagonals included: (pairs, 2)."""
    found = []
    for start, end, component in upper.bottom:
        # 8-connected: a run [a, b) touches [c, d) below it when c <= b and d >= a.
        near = lower.top[(lower.top[:, 0] <= end) & (lower.top[:, 1] >= start)]
        found += [
            (upper_at + component, lower_at + other)
            for other in near[:, 2]
            if upper.classes[component] == lower.classes[other]
        ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def table(
    components: Components, classes: Sequence[str], scale: Scale, *, roll_id: str, run_id: str
) -> pa.Table:
    """The defect table of a roll, in mm and m; without pixel sizes those columns are null, and px hold."""
    n, facts = len(components), components.facts

    def in_mm(px: NDArray[np.int64], mm_per_px: float | None, per: float = 1.0) -> pa.Array:
        if scale.mm_per_px_x is None or mm_per_px is None:
            return pa.nulls(n, pa.float64())
        return pa.array(px * mm_per_px / per)

    area_of_px = None
    if scale.mm_per_px_x is not None and scale.mm_per_line is not None:
        area_of_px = scale.mm_per_px_x * scale.mm_per_line
    columns: dict[str, Any] = {
        "defect_id": components.first_px,
        "roll_id": pa.array([roll_id] * n, pa.string()),
        "run_id": pa.array([run_id] * n, pa.string()),
        "class": pa.array([classes[c - 1] for c in components.classes], pa.string()),
        "x_mm": in_mm(facts["strip_x0"], scale.mm_per_px_x),
        "y_m": in_mm(facts["y0"], scale.mm_per_line, per=1000.0),
        "width_mm": in_mm(facts["strip_x1"] - facts["strip_x0"], scale.mm_per_px_x),
        "length_mm": in_mm(facts["y1"] - facts["y0"], scale.mm_per_line),
        "area_mm2": in_mm(facts["area_px"], area_of_px),
        "area_px": facts["area_px"],
        "score": components.score,
        **{
            name: pa.nulls(n, SCHEMA.field(name).type)
            for name in ("severity", "lighting", "periodic_group", "review")
        },
        **{name: facts[name] for name in ("x0", "y0", "x1", "y1")},
    }
    return pa.table(columns, schema=SCHEMA)
