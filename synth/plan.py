"""What is planted where: defects by a Poisson process per cell, roll marks, long scratches and bars by strip.

Local defects lie wholly inside their planning cell of `CELL_LINES` lines, so a cell is planned without its
neighbours and forgotten again. Long scratches, roll marks and bars are planned once for the whole strip, a
few bytes each. Nothing touches another; nothing lies where the image shows no strip.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rollsight.synth.bars import BAR_LINES, Bars, chatter_field
from rollsight.synth.noise import Doubles, Floats, Mask, generator, wave
from rollsight.synth.outline import Outline
from rollsight.synth.painters import NEAR_EDGES, PAINTERS, dent, edge_crack
from rollsight.synth.stamps import DARK_FIELDS, VISIBLE, Part, Stamp, finished, parts
from rollsight.synth.travel import joined

ROLL_DIAMETER_MM = 600.0
ROLL_PITCH_MM = math.pi * ROLL_DIAMETER_MM  # one imprint per turn of the damaged roll, here 1885.0 mm

LONG_SCRATCHES_PER_M = 0.05
ROLL_MARK_CAMPAIGNS_PER_M = 0.012
CELL_LINES = 1536  # longer than the tallest stamp, and no multiple of a scan band
BARS_FROM_M = 6.0  # a strip of this length has each kind of bar once at least
WELD_FROM_LINES = 1200  # a shorter strip has no weld


@dataclass(frozen=True, slots=True)
class LongScratch:
    """A scratch of metres, planned for the whole strip and drawn line by line."""

    index: int
    y0: int
    y1: int
    start_px: float  # from the drive-side edge at its first line
    drift_px: float  # how far it has moved across at its last line
    half_px: float  # half its width
    gray: float


@dataclass(frozen=True, slots=True)
class RollMarks:
    """The imprints of one damaged roll: one dent, fixed pitch, fixed distance from the drive side."""

    group: int
    first: float  # line of the first imprint's first line
    pitch: float  # lines
    count: int
    offset_px: float  # of the imprint's left, from the drive-side edge
    dent: Stamp


@dataclass(frozen=True, slots=True)
class Rates:
    """Planted groups per metre of strip: local ones, bars; both empty on clean strip."""

    per_m: Mapping[str, float]
    bars_per_m: Mapping[str, float]
    weld: bool


class Plan:
    """Everything planted on a strip. `values`: class -> mask value; `dark`: draw for dark field too.

    `gaps` are half-open line ranges that show no strip; nothing is planted there.
    """

    def __init__(
        self,
        outline: Outline,
        mm_per_line: float,
        density: float,
        rates: Rates,
        values: Mapping[str, int],
        gaps: Sequence[tuple[int, int]],
        *,
        dark: bool,
    ) -> None:
        self.outline = outline
        self.lines = outline.lines
        self.seed = outline.seed
        self._mm_per_line = mm_per_line
        self._metres = self.lines * mm_per_line / 1000.0
        self._density = density
        self._rates = rates
        self._values = values
        self._dark = dark
        self._set_gaps(gaps)
        self._phase = int(generator(self.seed, 3).integers(1, CELL_LINES))  # so cells and bands do not align
        self._marks = self._plan_roll_marks()
        self.bars = self._plan_bars()
        self._set_gaps([*gaps, *((bars.y0, bars.y1) for bars in self.bars)])
        self._scratches = self._plan_long_scratches()
        self._cells: dict[int, list[Stamp]] = {}

    def paint(self, y0: int, y1: int, planes: Sequence[Floats], mask: Mask) -> None:
        """Draw lines y0..y1-1 into the gray of each mode (h, W), bright first, and into mask (h, W)."""
        for stamp in self._stamps(y0, y1):
            a, b = max(stamp.y0, y0), min(stamp.y1, y1)
            inner = slice(a - stamp.y0, b - stamp.y0)
            place = (slice(a - y0, b - y0), slice(stamp.x0, stamp.x1))
            for gray, delta in zip(planes, (stamp.delta, stamp.dark), strict=False):
                assert delta is not None
                gray[place] += delta[inner]
            mask[place][stamp.mask[inner]] = self._values[stamp.name]
        for scratch in self._scratches:
            if scratch.y0 < y1 and y0 < scratch.y1:
                for a, b in self._pieces(max(scratch.y0, y0), min(scratch.y1, y1)):
                    self._draw(scratch, a, b, y0, planes, mask)

    def parts(self) -> list[Part]:
        """Every 8-connected part of the truth, in the order of its first line."""
        found: list[Part] = []
        for cell in range(self._cell_of(0), self._cell_of(self.lines - 1) + 1):
            for stamp in self._cell(cell):
                found += parts(stamp)
        for stamp in self._imprints(0, self.lines):
            found += parts(stamp)
        for bars in self.bars:
            for stamp in bars.stamps(self.outline, 0, self.lines):
                found += parts(stamp)
        for scratch in self._scratches:
            found += self._scratch_parts(scratch)
        return sorted(found, key=lambda part: (part.y0, part.x0, part.name))

    def _stamps(self, y0: int, y1: int) -> Iterator[Stamp]:
        """Every stamp that reaches lines y0..y1-1: roll marks, bars, then the planned cells."""
        yield from self._imprints(y0, y1)
        for bars in self.bars:
            if bars.y0 < y1 and y0 < bars.y1:
                for stamp in bars.stamps(self.outline, y0, y1):
                    yield finished(stamp, self._dark)
        for cell in range(self._cell_of(y0), self._cell_of(y1 - 1) + 1):
            for stamp in self._cell(cell):
                if stamp.y0 < y1 and y0 < stamp.y1:
                    yield stamp

    # -- where nothing can lie ------------------------------------------------------------------------------

    def _set_gaps(self, gaps: Sequence[tuple[int, int]]) -> None:
        self._gaps = joined(gaps)
        self._gap_ends = [b for _, b in self._gaps]

    def _blocked(self, y0: int, y1: int, near: int = 2) -> bool:
        """Whether a gap comes within `near` lines of y0..y1-1."""
        at = bisect_right(self._gap_ends, y0 - near)
        return at < len(self._gaps) and self._gaps[at][0] < y1 + near

    def _pieces(self, y0: int, y1: int) -> Iterator[tuple[int, int]]:
        """What the gaps leave of lines y0..y1-1."""
        for a, b in self._gaps[bisect_right(self._gap_ends, y0) :]:
            if a >= y1:
                break
            if y0 < a:
                yield y0, a
            y0 = b
        if y0 < y1:
            yield y0, y1

    # -- roll marks and bars --------------------------------------------------------------------------------

    def _plan_roll_marks(self) -> list[RollMarks]:
        """One damaged roll, and more by chance on long strip; planned once, a few bytes per 80 m."""
        if not self._rates.per_m:
            return []
        rng = generator(self.seed, 6)
        pitch = ROLL_PITCH_MM / self._mm_per_line
        wanted = 0 if self._density == 0 else 1
        wanted += int(rng.poisson(ROLL_MARK_CAMPAIGNS_PER_M * self._metres * self._density))
        marks: list[RollMarks] = []
        for number in range(wanted):
            imprint = dent(rng)
            first = rng.random() * (pitch if number == 0 else self.lines)
            count = int(rng.integers(15, 60))
            for _ in range(10):
                offset = rng.uniform(0.08, 0.88) * (self.outline.width_px - 2 * self.outline.margin)
                near = [
                    m for m in marks if m.first < first + count * pitch and first < m.first + m.count * pitch
                ]
                if all(abs(offset - other.offset_px) > 60 for other in near):
                    imprint = finished(imprint, self._dark)
                    marks.append(RollMarks(len(marks) + 1, first, pitch, count, offset, imprint))
                    break
        return marks

    def _imprints(self, y0: int, y1: int) -> Iterator[Stamp]:
        """The roll marks that reach lines y0..y1-1, whole lines and pixels apart so that all are the same."""
        for marks in self._marks:
            h, w = marks.dent.mask.shape
            first = max(0, math.floor((y0 - h - marks.first) / marks.pitch))
            last = min(marks.count - 1, math.ceil((y1 - marks.first) / marks.pitch))
            for k in range(first, last + 1):
                y = round(marks.first + k * marks.pitch)
                if y + h <= y0 or y >= y1 or y + h > self.lines or self._blocked(y, y + h):
                    continue
                left, right = self.outline.sides(y + h // 2, y + h // 2 + 1)
                x = round(float(left[0]) + marks.offset_px)
                if x + w < right[0] - 4:
                    yield marks.dent.at(y, x, marks.group)

    def _plan_bars(self) -> list[Bars]:
        """The weld near one end of the strip, then chatter marks and roll stops wherever there is room."""
        rng = generator(self.seed, 35)
        planned: list[Bars] = []
        if self._rates.weld and self.lines >= WELD_FROM_LINES:
            height = BAR_LINES["weld"]
            for _ in range(50):
                away = int(rng.uniform(150.0, min(0.3 * self.lines, 2500.0)))
                y0 = self.outline.head + away
                if rng.random() < 0.5:
                    y0 = self.lines - self.outline.tail - away - height
                if not self._blocked(y0, y0 + height):
                    planned.append(Bars("weld", 0, y0, 0.0, 1, height))
                    break
        for name, rate in self._rates.bars_per_m.items():
            count = int(rng.poisson(rate * self._metres * self._density))
            if self._metres >= BARS_FROM_M and self._density > 0:
                count = max(count, 1)
            for _ in range(count):
                index = len(planned) + 1
                if name == "chatter_mark":
                    bars = chatter_field(rng, index, len(self._marks) + index, self._mm_per_line)
                else:
                    bars = Bars(name, index, 0, 0.0, 1, BAR_LINES[name])
                for _ in range(20):
                    bars = replace(bars, y0=int(rng.integers(2, max(self.lines - bars.y1 + bars.y0 - 2, 3))))
                    others = any(bars.y0 < o.y1 + 60 and o.y0 < bars.y1 + 60 for o in planned)
                    if not others and bars.y1 < self.lines and not self._blocked(bars.y0, bars.y1):
                        planned.append(bars)
                        break
        return planned

    # -- long scratches -------------------------------------------------------------------------------------

    def _plan_long_scratches(self) -> list[LongScratch]:
        """Scratches of 1 to 20 m; on strip of 8 m or more the first is at least 40 % of it (up to 20 m)."""
        if not self._rates.per_m:
            return []
        rng = generator(self.seed, 7)
        certain = 1 if self._metres >= 8 and self._density > 0 else 0
        wanted = certain + int(rng.poisson(LONG_SCRATCHES_PER_M * self._metres * self._density))
        strip = self.outline.width_px - 2 * self.outline.margin
        scratches: list[LongScratch] = []
        for number in range(wanted):
            metres = min(float(rng.lognormal(1.2, 0.7)), 20.0)
            if number < certain:
                metres = max(metres, 0.4 * min(self._metres, 50.0))
            length = min(int(max(metres, 1.0) * 1000 / self._mm_per_line), self.lines - 8)
            if length < CELL_LINES // 2:
                continue
            y0 = int(rng.integers(4, self.lines - length - 3))
            drift = float(np.clip(rng.normal(0.0, 10.0), -18.0, 18.0))
            half = rng.uniform(0.5, 2.0)
            gray = rng.uniform(28.0, 80.0) if rng.random() < 0.6 else -rng.uniform(24.0, 46.0)
            for _ in range(20):
                u = rng.uniform(0.06, 0.94) * strip
                lanes = [
                    marks.offset_px + marks.dent.mask.shape[1] / 2
                    for marks in self._marks
                    if marks.first < y0 + length + 64 and y0 - 64 < marks.first + marks.count * marks.pitch
                ]
                lanes += [s.start_px for s in scratches if s.y0 < y0 + length + 8 and y0 < s.y1 + 8]
                if all(abs(u - lane) > 52 for lane in lanes):
                    scratches.append(LongScratch(number, y0, y0 + length, u, drift, half, gray))
                    break
        return scratches

    def _path(self, scratch: LongScratch, y0: int, y1: int) -> Doubles:
        """The middle of a long scratch on lines y0..y1-1, px from the left of the image: (n,)."""
        left, _ = self.outline.sides(y0, y1)
        along = (np.arange(y0, y1) - scratch.y0) / (scratch.y1 - scratch.y0)
        sway = 3.0 * wave((self.seed, 16, scratch.index), y0, y1, 400.0)
        path: Doubles = left + scratch.start_px + scratch.drift_px * along + sway
        return path

    def _trace(self, scratch: LongScratch, y0: int, y1: int) -> tuple[int, Doubles]:
        """Coverage of a long scratch on lines y0..y1-1: first pixel x, and (n, columns) in [0, 1]."""
        path = self._path(scratch, y0, y1)
        reach = scratch.half_px + 0.5
        x0 = int(path.min() - reach)
        x = np.arange(x0, int(path.max() + reach) + 1) + 0.5
        return x0, np.clip(reach - np.abs(x - path[:, None]), 0.0, 1.0)

    def _draw(
        self, scratch: LongScratch, a: int, b: int, origin: int, planes: Sequence[Floats], mask: Mask
    ) -> None:
        x0, covered = self._trace(scratch, a, b)
        place = (slice(a - origin, b - origin), slice(x0, x0 + covered.shape[1]))
        if planes:
            strength = 0.85 + 0.15 * wave((self.seed, 17, scratch.index), a, b, 90.0)
            for gray, full in zip(planes, (scratch.gray, DARK_FIELDS["scratches"].body), strict=False):
                gray[place] += (covered * strength[:, None] * full).astype(np.float32)
        mask[place][covered >= VISIBLE] = self._values["scratches"]

    def _scratch_parts(self, scratch: LongScratch) -> Iterator[Part]:
        """A long scratch is one part, or as many as the gaps leave of it."""
        for start, stop in self._pieces(scratch.y0, scratch.y1):
            x_min, x_max, area = self.outline.width_px, 0, 0
            for y in range(start, stop, 4096):
                x0, covered = self._trace(scratch, y, min(y + 4096, stop))
                seen = covered >= VISIBLE
                columns = np.flatnonzero(seen.any(axis=0))
                x_min, x_max = min(x_min, x0 + int(columns[0])), max(x_max, x0 + int(columns[-1]) + 1)
                area += int(seen.sum())
            yield Part("scratches", None, x_min, start, x_max, stop, area)

    # -- local defects --------------------------------------------------------------------------------------

    def _cell_of(self, y: int) -> int:
        return (y + self._phase) // CELL_LINES

    def _cell(self, cell: int) -> list[Stamp]:
        """The defects of one planning cell, none touching another; the last few cells are remembered."""
        if not self._rates.per_m:
            return []
        known = self._cells.get(cell)
        if known is None:
            known = self._plan_cell(cell)
            while len(self._cells) >= 3:
                self._cells.pop(next(iter(self._cells)))
            self._cells[cell] = known
        return known

    def _plan_cell(self, cell: int) -> list[Stamp]:
        start = max(cell * CELL_LINES - self._phase, 0) + 2
        stop = min((cell + 1) * CELL_LINES - self._phase, self.lines) - 2
        if stop - start < 32:
            return []
        rng = generator(self.seed, 8, cell)
        metres = (stop - start) * self._mm_per_line / 1000.0
        left, right = self.outline.edges(start, stop)
        lanes = [
            (s, max(start, s.y0), min(stop, s.y1)) for s in self._scratches if s.y0 < stop and start < s.y1
        ]
        paths = [(a, b, self._path(s, a, b)) for s, a, b in lanes]
        taken = list(self._imprints(start, stop))
        planned: list[Stamp] = []

        def free(stamp: Stamp) -> bool:
            y0, x0, y1, x1 = stamp.y0, stamp.x0, stamp.y1, stamp.x1
            if self._blocked(y0, y1) or any(other.touches(y0, x0, y1, x1) for other in (*taken, *planned)):
                return False
            for a, b, path in paths:
                near = path[max(y0 - 4, a) - a : max(min(y1 + 4, b) - a, 0)]
                if near.size and near.min() - 7 < x1 and x0 < near.max() + 7:
                    return False
            return True

        for name, rate in self._rates.per_m.items():
            for _ in range(int(rng.poisson(rate * metres * self._density))):
                for _ in range(6):
                    stamp = self._place(rng, name, start, stop, left, right)
                    if stamp is not None and free(stamp):
                        planned.append(finished(stamp, self._dark))
                        break
        return planned

    def _place(
        self, rng: np.random.Generator, name: str, start: int, stop: int, left: Doubles, right: Doubles
    ) -> Stamp | None:
        """Draw one group of the class at a random place on lines start..stop-1; None when it does not fit."""
        if name == "edge_crack":
            height = int(rng.integers(32, 90))
            if stop - start < height:
                return None
            y = int(rng.integers(start, stop - height + 1))
            rows = slice(y - start, y - start + height)
            return edge_crack(rng, left[rows], right[rows], y, self.outline.width_px)
        stamp = PAINTERS[name](rng)
        if stamp is None:
            return None
        h, w = stamp.mask.shape
        if stop - start < h:
            return None
        y = int(rng.integers(start, stop - h + 1))
        rows = slice(y - start, y - start + h)
        low, high = int(left[rows].max()) + 6, int(right[rows].min()) - 6 - w
        if high <= low:
            return None
        x = int(rng.integers(low, high))
        if name in NEAR_EDGES and rng.random() < 0.75:
            outer = (x - low) // 5
            x = low + outer if rng.random() < 0.5 else high - 1 - outer
        return stamp.at(y, x)
