"""The strip map and the length profile of the page: pure geometry, from pixels to places on a drawing.

The strip lies on its side: length runs left to right from the head, the drive side is at the top. `along` and
`across` are in mm where the roll has a scale, else in px; `across` is 0 at the drive-side edge, strip wander
removed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

PLOT_PX = 1150  # css px: the usual width of a plot; decides what is long enough to draw at its real extent
STRETCHED_PX = 300  # css px: height of the stretched map
TO_SCALE_PX = 18  # css px: the strip to scale is folded into rows of at least this height
TO_SCALE_MAX_PX = 280  # css px: a short strip to scale is drawn no higher
MAX_ROWS = 24  # rows of the folded map
MARGIN = 0.04  # of the strip's width, drawn outside each edge
MARK_PX = (2.6, 10.0)  # css px: radius of the smallest and the largest mark
CROWD = 2000  # with more defects than this all marks shrink, to no less than CROWDED of their size
CROWDED = 0.45
TO_SCALE_MARK = 0.55  # the same marks on the small map
MAX_BINS = 50  # bars of the length profile, and columns of the density map
DENSITY_ROWS = 12  # of the density map, across the strip
LABEL_PX = 14  # css px that the label of a row of the folded map needs
MAX_RECTS = 2000  # not-inspected parts per drawing, largest first: as many as a summary lists


@dataclass(frozen=True, slots=True)
class Frame:
    """From px of the roll to places on the strip."""

    lines: int
    width_px: int
    per_line: float  # mm, or 1 where units are px
    per_px: float  # mm, or 1 where units are px
    edge_lines: Floats  # (E,) lines at which the edges are known, rising
    left_px: Floats  # (E,) drive-side edge
    right_px: Floats  # (E,) operator-side edge

    @property
    def length(self) -> float:
        """Of the roll, mm or px."""
        return self.lines * self.per_line

    @property
    def width(self) -> float:
        """Of the strip at its widest, mm or px."""
        return float((self.right_px - self.left_px).max()) * self.per_px

    def left(self, line: ArrayLike) -> Floats:
        """The drive-side edge at these lines, px."""
        return np.asarray(np.interp(np.asarray(line, np.float64), self.edge_lines, self.left_px), np.float64)

    def right(self, line: ArrayLike) -> Floats:
        """The operator-side edge at these lines, px."""
        return np.asarray(np.interp(np.asarray(line, np.float64), self.edge_lines, self.right_px), np.float64)

    def rect(self, part: dict[str, Any]) -> tuple[float, float, float, float]:
        """A not-inspected part {x0, y0, x1, y1} px as (along0, across0, along1, across1), cut to the strip.

        Wander within one part is small beside the part, so its middle line stands for it.
        """
        left, right = (
            float(self.left((part["y0"] + part["y1"]) / 2)),
            float(self.right((part["y0"] + part["y1"]) / 2)),
        )
        x0, x1 = min(max(part["x0"], left), right), min(max(part["x1"], left), right)
        return (
            max(part["y0"], 0) * self.per_line,
            (x0 - left) * self.per_px,
            min(part["y1"], self.lines) * self.per_line,
            (x1 - left) * self.per_px,
        )


def is_exact(summary: dict[str, Any]) -> bool:
    """Whether the listed parts say just what was not inspected; older summaries do not tell."""
    return bool(summary.get("not_inspected_exact", True))


def frame_of(summary: dict[str, Any]) -> Frame:
    """The frame of a run. Edges traced where over half of the width was not inspected are not believed.

    Where parts were joined over inspected strip nothing tells these, and all are believed.
    """
    lines, width_px = int(summary["lines"]), int(summary["width_px"])
    mm = summary["units"] == "mm"
    blind = [
        (part["y0"], part["y1"])
        for part in (summary["not_inspected"] if is_exact(summary) else ())
        if min(part["x1"], width_px) - max(part["x0"], 0) > width_px / 2
    ]
    edges = sorted(
        (float(y), float(left), float(right))
        for y, left, right in summary["edges"]
        if right > left and not any(y0 <= y < y1 for y0, y1 in blind)
    ) or [(0.0, 0.0, float(width_px))]
    known = np.array(edges, np.float64)
    return Frame(
        lines,
        width_px,
        float(summary["mm_per_line"]) if mm else 1.0,
        float(summary["mm_per_px_x"]) if mm else 1.0,
        known[:, 0],
        known[:, 1],
        known[:, 2],
    )


@dataclass(frozen=True, slots=True)
class Defects:
    """The defect table as columns, one value per defect, largest area first; mm and mm2, or px."""

    ids: NDArray[np.int64]
    kind: NDArray[np.int64]  # index into the classes of the run
    along: Floats  # from the head to its first line
    across: Floats  # from the drive-side edge to its near side
    length: Floats
    width: Floats
    area: Floats
    score: Floats
    boxes: NDArray[np.int64]  # (N, 4) x0, y0, x1, y1 px, half-open

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64] | slice) -> "Defects":
        """These rows, in this order."""
        return Defects(*(getattr(self, name)[rows] for name in self.__slots__))


def defects_of(table: pa.Table, frame: Frame, classes: Sequence[str], *, mm: bool) -> Defects:
    """The columns the page draws. Class names must be among `classes`; in px units the box is the measure."""

    def column(name: str) -> Floats:
        return np.asarray(table[name].to_numpy(), np.float64)

    names = table["class"].to_pylist()
    index = {name: i for i, name in enumerate(classes)}
    boxes = np.stack(
        [np.asarray(table[name].to_numpy(), np.int64) for name in ("x0", "y0", "x1", "y1")], axis=1
    )
    if mm:
        along, across = column("y_m") * 1000.0, column("x_mm")
        length, width, area = column("length_mm"), column("width_mm"), column("area_mm2")
    else:
        x0, y0, x1, y1 = boxes.astype(np.float64).T
        along, across = y0, x0 - frame.left((y0 + y1) / 2)
        length, width = y1 - y0, x1 - x0
        area = column("area_px")
    ids = np.asarray(table["defect_id"].to_numpy(), np.int64)
    kind = np.array([index[name] for name in names], np.int64)
    found = Defects(ids, kind, along, across, length, width, area, column("score"), boxes)
    return found.take(np.lexsort((ids, -area)))


def nice(value: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least `value` > 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= value * (1 - 1e-9))


def ticks(end: float, count: int) -> list[float]:
    """Round positions from 0 to at most `end` > 0, about `count` of them."""
    step = nice(end / count)
    return [i * step for i in range(int(end / step * (1 + 1e-9)) + 1)]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Area to radius: the disc of a mark is in proportion to the area, between two limits."""

    largest: float  # area drawn at the largest radius, mm2 or px
    small: float  # css px
    large: float  # css px

    def radius(self, area: float) -> float:
        """Radius in css px."""
        return min(self.large, max(self.small, self.large * math.sqrt(max(area, 0.0) / self.largest)))

    @property
    def smallest(self) -> float:
        """Up to this area all marks have the smallest radius."""
        return self.largest * (self.small / self.large) ** 2


def sizes_of(defects: Defects, *, crowded: bool = False) -> Sizes:
    """The largest radius is for the 98th percentile of the areas: one giant does not shrink the rest.

    crowded: smaller, the more defects there are.
    """
    largest = nice(max(float(np.percentile(defects.area, 98)), 1.0)) if len(defects) else 1.0
    shrink = max(CROWDED, min(1.0, math.sqrt(CROWD / max(len(defects), 1)))) if crowded else 1.0
    return Sizes(largest, MARK_PX[0] * shrink, MARK_PX[1] * shrink)


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawing of the strip from `start` to `start + span` along, with a margin outside both edges."""

    frame: Frame
    start: float
    span: float
    height_px: float  # css px of the drawing at its usual width
    mark_scale: float
    width_px: float = PLOT_PX

    @property
    def end(self) -> float:
        """Where the strip or the drawing ends."""
        return min(self.frame.length, self.start + self.span)

    @property
    def across_min(self) -> float:
        return -MARGIN * self.frame.width

    @property
    def across_span(self) -> float:
        return (1 + 2 * MARGIN) * self.frame.width

    def x(self, along: float) -> float:
        """Per cent from the left of the drawing."""
        return (along - self.start) / self.span * 100

    def y(self, across: float) -> float:
        """Per cent from the top of the drawing."""
        return (across - self.across_min) / self.across_span * 100

    def is_long(self, length: float, width: float, radius_px: float) -> bool:
        """Whether a defect is drawn at its real extent: longer than its mark, or across much of the strip."""
        length_px = length / self.span * self.width_px
        across_px = width / self.across_span * self.height_px
        return length_px > max(2 * radius_px, 10.0) or across_px > max(2 * radius_px, 0.25 * self.height_px)

    def rects(self, parts: Sequence[tuple[float, float, float, float]]) -> list[dict[str, float]]:
        """Not-inspected parts that fall into this drawing, in per cent, largest first, at most MAX_RECTS."""
        inside = [
            (max(a0, self.start), c0, min(a1, self.end), c1)
            for a0, c0, a1, c1 in parts
            if a1 > self.start and a0 < self.end and c1 > c0
        ]
        inside.sort(key=lambda r: -(r[2] - r[0]) * (r[3] - r[1]))
        return [
            {"x": self.x(a0), "y": self.y(c0), "w": self.x(a1) - self.x(a0), "h": self.y(c1) - self.y(c0)}
            for a0, c0, a1, c1 in inside[:MAX_RECTS]
        ]

    def marks(self, defects: Defects, sizes: Sizes, rows: Iterable[int]) -> list[dict[str, Any]]:
        """What to draw of these rows of `defects` in this drawing, in per cent, in their order."""
        drawn = []
        for i in rows:
            along, length = float(defects.along[i]), float(defects.length[i])
            across, width = float(defects.across[i]), float(defects.width[i])
            if along + length <= self.start or along >= self.start + self.span:
                continue
            radius = sizes.radius(float(defects.area[i])) * self.mark_scale
            if self.is_long(length, width, radius):
                head, tail = max(along, self.start), min(along + length, self.start + self.span)
                drawn.append(
                    {
                        "i": i,
                        "long": True,
                        "x": self.x(head),
                        "w": self.x(tail) - self.x(head),
                        "y": self.y(across),
                        "h": self.y(across + width) - self.y(across),
                    }
                )
            elif self.start <= along + length / 2 < self.start + self.span:
                x, y = self.x(along + length / 2), self.y(across + width / 2)
                drawn.append({"i": i, "long": False, "x": x, "y": y, "r": radius})
        return drawn

    def edge(self) -> str:
        """The operator-side edge as an SVG path in a view box of 100 x 100; the drive side is straight."""
        frame = self.frame
        first, last = self.start / frame.per_line, self.end / frame.per_line
        inside = frame.edge_lines[(frame.edge_lines > first) & (frame.edge_lines < last)]
        step = max(1, len(inside) // 400)
        at = np.concatenate(([first], inside[::step], [last]))
        across = (frame.right(at) - frame.left(at)) * frame.per_px
        points = (
            f"{self.x(y * frame.per_line):.2f} {self.y(x):.2f}" for y, x in zip(at, across, strict=True)
        )
        return "M" + "L".join(points)


def stretched(frame: Frame) -> Plot:
    """The whole strip in one drawing of readable height."""
    return Plot(frame, 0.0, frame.length, STRETCHED_PX, 1.0)


def to_scale(frame: Frame) -> list[Plot]:
    """The strip in true proportions, folded into rows like text where one row would be too thin to see."""
    across = (1 + 2 * MARGIN) * frame.width
    folds = 1
    while folds < MAX_ROWS and across / (frame.length / folds) * PLOT_PX < TO_SCALE_PX:
        folds += 1
    span = frame.length
    if folds > 1:  # rows of a round length, so that a reader can count them
        step = nice(frame.length / folds / 10)
        span = math.ceil(frame.length / folds / step) * step
    height = across / span * PLOT_PX
    width = PLOT_PX * min(1.0, TO_SCALE_MAX_PX / height)
    return [
        Plot(frame, row * span, span, height * width / PLOT_PX, TO_SCALE_MARK, width)
        for row in range(math.ceil(frame.length / span * (1 - 1e-9)))
    ]


@dataclass(frozen=True, slots=True)
class Profile:
    """Counts along the length."""

    bin: float  # mm or px
    counts: NDArray[np.int64]  # (bins, K)


def profile(frame: Frame, defects: Defects, classes: int) -> Profile:
    """Defects per bin of a round length and class. A defect counts where it begins."""
    size, at = _bins(frame, defects)
    counts = np.zeros((_bin_count(frame, size), classes), np.int64)
    np.add.at(counts, (at, defects.kind), 1)
    return Profile(size, counts)


def density(frame: Frame, defects: Defects, classes: int) -> NDArray[np.int64]:
    """Defects per bin of the profile, row across the strip and class: (bins, DENSITY_ROWS, K).

    A defect counts where it begins along the strip and where its middle lies across.
    """
    size, at = _bins(frame, defects)
    counts = np.zeros((_bin_count(frame, size), DENSITY_ROWS, classes), np.int64)
    middle = (defects.across + defects.width / 2) / frame.width * DENSITY_ROWS
    row = np.clip(middle.astype(np.int64), 0, DENSITY_ROWS - 1)
    np.add.at(counts, (at, row, defects.kind), 1)
    return counts


def _bins(frame: Frame, defects: Defects) -> tuple[float, NDArray[np.int64]]:
    """The round length of a bin, and the bin that each defect begins in."""
    size = nice(frame.length / MAX_BINS)
    return size, np.clip((defects.along / size).astype(np.int64), 0, _bin_count(frame, size) - 1)


def _bin_count(frame: Frame, size: float) -> int:
    return math.ceil(frame.length / size * (1 - 1e-9))
