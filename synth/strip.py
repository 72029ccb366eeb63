"""The simulated coil: hot-rolled strip of any length with planted defects, whose truth is known exactly.

Every random number is drawn from a generator keyed by (seed, what it is for, where on the strip), so a line
of the strip looks the same whichever block it is asked for in, and blocks need not remember each other.
The image is built in tiles of `TILE_LINES` lines (noise and texture keyed by tile and by lattice row); the
defects are drawn by a Poisson process per planning cell of `CELL_LINES` lines and lie wholly inside their
cell, except long scratches and roll marks, which are planned once for the whole strip.

Sizes of shapes are in pixels (what a network sees); positions, the pitch of a roll mark and the truth table
are in mm. Gray values are chosen to lie near those of the NEU hot-rolled sets (Song and Yan 2013).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.rolls import SHARD_LINES, LabelWriter, Roll, RollWriter, Strip
from scipy import ndimage

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.uint8]
Bools = NDArray[np.bool_]

CLASSES: tuple[str, ...] = (
    "inclusion",
    "patches",
    "scratches",
    "pit",
    "roll_mark",
    "scale",
    "edge_crack",
)
"""Class names; a pixel of class i has mask value i + 1, and 0 is sound strip or background."""

ROLL_DIAMETER_MM = 600.0
ROLL_PITCH_MM = math.pi * ROLL_DIAMETER_MM  # one imprint per turn of the damaged roll, here 1885.0 mm

DEFECTS_PER_M = {
    "inclusion": 0.6,
    "patches": 0.3,
    "scratches": 0.3,
    "pit": 0.5,
    "scale": 0.35,
    "edge_crack": 0.3,
}
"""Planted groups per metre of strip at density 1; a group has one to about fifteen connected components."""

LONG_SCRATCHES_PER_M = 0.05
ROLL_MARK_CAMPAIGNS_PER_M = 0.012

TILE_LINES = 256
CELL_LINES = 1536  # longer than the tallest stamp, and no multiple of a scan band
COARSE = 4  # the slow fields are computed on every fourth line and interpolated between
MIN_WIDTH_PX = 128
DARK_LINES = 100  # lines of the default blackout: 0.3 % of a 30 m strip
DARK_FROM_LINES = 20_000  # a shorter strip has no default blackout

# Texture fields: (lattice cell along in lines, lattice cell across in px, standard deviation in gray levels).
FIELDS: tuple[tuple[int, int, float], ...] = (
    (16, 6, 1.7),  # oxide grain, drawn out along rolling
    (32, 16, 2.0),  # oxide mottling
    (96, 48, 2.5),  # cloudy oxide
    (512, 3, 1.6),  # fine streaks along rolling
    (1024, 20, 2.4),  # broad streaks
    (1024, 260, 5.0),  # slow drift over the strip
)
GRAIN = 4.2  # standard deviation of the line-by-line grain in gray levels, neighbours correlated
SENSOR = 1.3  # standard deviation of the pixel noise in gray levels
VISIBLE = 0.4  # a pixel belongs to the truth where the shape reaches this share of its full contrast
FAINTEST_GRAY = 24.0  # strip never falls under this before the column gain, so no defect reads as background

TRUTH_LABEL = "truth"  # name of the class mask on a simulated roll
TRUTH_FILE = "truth.parquet"  # the truth table, in the roll's folder

TRUTH_SCHEMA = pa.schema(
    [
        ("defect_id", pa.int64()),
        ("class", pa.string()),
        ("x_mm", pa.float64()),
        ("y_m", pa.float64()),
        ("width_mm", pa.float64()),
        ("length_mm", pa.float64()),
        ("area_mm2", pa.float64()),
        ("area_px", pa.int64()),
        ("periodic_group", pa.int64()),
        ("x0", pa.int64()),
        ("y0", pa.int64()),
        ("x1", pa.int64()),
        ("y1", pa.int64()),
    ]
)


def _rng(*key: int) -> np.random.Generator:
    """A counter-based generator that depends on its key alone (Salmon et al. 2011, Philox)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _taps(start: int, stop: int, cell: float) -> tuple[NDArray[np.int64], Doubles]:
    """Cubic B-spline knots of the positions start..stop-1: first knot (n,) and weights (4, n)."""
    at = np.arange(start, stop, dtype=np.float64) / cell
    knot = np.floor(at).astype(np.int64)
    t = at - knot
    weights = np.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3],
    )
    return knot, weights / 6.0


def _lattice(key: tuple[int, ...], first: int, last: int, columns: int) -> Doubles:
    """Rows first..last-1 of an endless lattice of uniform values in [-1, 1): (last - first, columns)."""
    chunk = 16  # rows that share a generator
    parts = [
        _rng(*key, index).random((chunk, columns)) for index in range(first // chunk, (last - 1) // chunk + 1)
    ]
    skip = first - first // chunk * chunk
    return np.concatenate(parts)[skip : skip + last - first] * 2.0 - 1.0


def _wave(key: tuple[int, ...], y0: int, y1: int, cell: float) -> Doubles:
    """A smooth random curve over lines y0..y1-1, within [-1, 1], correlated over about `cell` lines: (n,)."""
    knot, weights = _taps(y0, y1, cell)
    values = _lattice(key, int(knot[0]), int(knot[-1]) + 4, 1)[:, 0]
    at = knot - knot[0]
    curve: Doubles = np.zeros(y1 - y0)
    for k in range(4):
        curve += weights[k] * values[at + k]
    return curve


def _cloud(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> Doubles:
    """Smooth noise of mean 0 and standard deviation about 1 for one shape: (height, width)."""
    ky, wy = _taps(0, height, cell_y)
    kx, wx = _taps(0, width, cell_x)
    values = rng.random((int(ky[-1]) + 4, int(kx[-1]) + 4)) * 2.0 - 1.0
    rows = sum(wy[k][:, None] * values[ky + k] for k in range(4))
    field: Doubles = sum(wx[k] * rows[:, kx + k] for k in range(4)) / 0.276  # 0.276: its own deviation
    return field


@dataclass(frozen=True, slots=True)
class Stamp:
    """A drawn defect group at its place on the strip."""

    label: int  # mask value, index in CLASSES + 1
    y0: int  # first line
    x0: int  # first pixel
    delta: Floats  # (h, w) gray levels to add before the column gain
    mask: Bools  # (h, w) where the truth says defect
    group: int | None = None  # periodic_group of a roll mark

    def touches(self, y0: int, x0: int, y1: int, x1: int, gap: int = 4) -> bool:
        """Whether the half-open box comes within `gap` px of this stamp's box."""
        h, w = self.mask.shape
        return y0 < self.y0 + h + gap and self.y0 < y1 + gap and x0 < self.x0 + w + gap and self.x0 < x1 + gap


def _stamp(
    label: str, alpha: Doubles, gray: Doubles | float, smallest: int = 4, y0: int = 0, x0: int = 0
) -> Stamp | None:
    """Cut a shape to its visible parts: alpha (h, w) in [0, 1], its full contrast in gray levels.

    Visible parts under `smallest` px are taken out of image and truth alike. None when nothing is left.
    """
    eight = np.ones((3, 3), dtype=bool)
    parts, count = ndimage.label(alpha >= VISIBLE, eight)
    if count == 0:
        return None
    kept = np.bincount(parts.ravel(), minlength=count + 1) >= smallest
    kept[0] = False
    mask: Bools = kept[parts]
    regions, count = ndimage.label(alpha > 0.02, eight)
    shown = np.zeros(count + 1, dtype=bool)
    shown[np.unique(regions[mask])] = True
    shown[0] = False
    delta = np.where(shown[regions], alpha * gray, 0.0).astype(np.float32)
    rows, columns = np.flatnonzero(delta.any(axis=1)), np.flatnonzero(delta.any(axis=0))
    if rows.size == 0 or not mask.any():
        return None
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    return Stamp(
        CLASSES.index(label) + 1, y0 + int(rows[0]), x0 + int(columns[0]), delta[box].copy(), mask[box].copy()
    )


def _ramp(values: Doubles, soft: float = 1.0) -> Doubles:
    """Signed distance in px (inside positive) to coverage in [0, 1], over `soft` px."""
    covered: Doubles = np.clip(values / soft + 0.5, 0.0, 1.0)
    return covered


def _inclusion(rng: np.random.Generator) -> Stamp | None:
    """One to six dark spindles drawn out along rolling, side by side."""
    height, width = 260, 64
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha = np.zeros((height, width))
    for _ in range(int(min(1 + rng.geometric(0.45), 6))):
        length = 14.0 + 106.0 * rng.random() ** 2
        half = rng.uniform(1.4, 2.2 + length / 28.0)
        cy = height / 2 + rng.normal(0.0, 28.0)
        cx = width / 2 + rng.normal(0.0, 9.0)
        t = np.clip(np.abs(y - cy) / (length / 2), 0.0, 1.0)
        rough = _cloud(rng, height, 2, 7.0, 50.0)[:, :1]
        sway = _cloud(rng, height, 2, 26.0, 50.0)[:, :1]
        edge = half * (1 - t**2) ** 0.7 * (1 + 0.22 * rough) - np.abs(x - cx - 1.1 * sway)
        alpha = np.maximum(alpha, np.where(t < 1, _ramp(edge, rng.uniform(1.2, 2.4)), 0.0))
    gray = -rng.uniform(15.0, 58.0) * np.clip(1 + 0.12 * _cloud(rng, height, width, 5.0, 3.0), 0.75, 1.3)
    return _stamp("inclusion", alpha, gray, smallest=10)


def _patches(rng: np.random.Generator) -> Stamp | None:
    """A dark blotch with a frayed outline, or a few of them."""
    height, width = int(rng.integers(60, 330)), int(rng.integers(40, 190))
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None, :]
    shape = _cloud(rng, height, width, 42.0, 26.0) + 0.35 * _cloud(rng, height, width, 9.0, 6.0)
    level = 0.6 + 0.45 * shape - 1.7 * np.maximum(y**2 + x**2 - 0.15, 0.0) ** 1.3
    level = np.where(y**2 + x**2 < 1, level, -1.0)
    alpha = np.clip(level / rng.uniform(0.25, 0.7) + VISIBLE, 0.0, 1.0) ** 1.2
    alpha *= np.clip((1 - y**2 - x**2) / 0.12, 0.0, 1.0)
    gray = -rng.uniform(22.0, 62.0) * np.clip(1 + 0.13 * _cloud(rng, height, width, 4.0, 3.0), 0.7, 1.4)
    return _stamp("patches", alpha, gray, smallest=60)


def _short_scratches(rng: np.random.Generator) -> Stamp | None:
    """One to four parallel thin lines along rolling, straight or slightly bent."""
    height = int(30 + 670 * rng.random() ** 1.6)
    slant, bend = rng.normal(0.0, 0.03), rng.normal(0.0, 6.0)
    gray = rng.uniform(22.0, 85.0) if rng.random() < 0.65 else -rng.uniform(20.0, 46.0)
    t = np.arange(height) / height
    path = slant * height * t + bend * t**2
    left = 14.0 - path.min()
    width = int(path.max() + left + 40)
    x = np.arange(width)[None, :] + 0.5
    alpha = np.zeros((height, width))
    for _ in range(int(min(rng.geometric(0.55), 4))):
        half = rng.uniform(0.5, 2.0)
        a, b = sorted(rng.random(2) * 0.8)
        span = (t >= a) & (t < b + 0.2)
        centre = path + left + rng.uniform(-8.0, 24.0)
        line = np.clip(half + 0.5 - np.abs(x - centre[:, None]), 0.0, 1.0)
        alpha = np.maximum(alpha, np.where(span[:, None], line, 0.0))
    strength = np.clip(0.85 + 0.15 * _cloud(rng, height, 2, 12.0, 50.0)[:, :1], 0.7, 1.0)
    return _stamp("scratches", alpha, gray * strength, smallest=20)


def _pits(rng: np.random.Generator) -> Stamp | None:
    """Three to fourteen round dark spots, each under 32 px²."""
    height, width = 130, 80
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha = np.zeros((height, width))
    placed: list[tuple[float, float]] = []
    for _ in range(int(rng.integers(3, 15))):
        cy = float(np.clip(rng.normal(height / 2, 26.0), 5, height - 6))
        cx = float(np.clip(rng.normal(width / 2, 15.0), 5, width - 6))
        if any(math.hypot(cy - a, cx - b) < 9.0 for a, b in placed):
            continue  # touching pits would be one spot over 32 px²
        placed.append((cy, cx))
        radius = rng.uniform(1.3, 2.6)
        spot = np.clip(radius + 0.5 - np.hypot(y - cy, x - cx), 0.0, 1.0)
        alpha = np.maximum(alpha, spot)
    return _stamp("pit", alpha, -rng.uniform(30.0, 72.0))


def _scale(rng: np.random.Generator) -> Stamp | None:
    """A cluster of rolled-in scale: dark-gray comets, blunt heads up, tails along rolling."""
    height, width = 260, 120
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha = np.zeros((height, width))
    for _ in range(int(rng.integers(2, 12))):
        radius = rng.uniform(2.4, 6.0)
        tail = radius * rng.uniform(2.5, 8.0)
        cy = float(np.clip(rng.normal(height / 2 - 20, 42.0), 10, height - tail - 4))
        cx = float(np.clip(rng.normal(width / 2, 22.0), 10, width - 11))
        s = np.clip((y - cy) / tail, 0.0, 1.0)
        body = radius * (1 - s) ** 0.8 - np.abs(x - cx)
        head = radius - np.hypot(y - cy, x - cx)
        comet = _ramp(np.where(y < cy, head, body), 1.6) * (1 - 0.35 * s)
        alpha = np.maximum(alpha, np.where(y < cy + tail, comet, 0.0))
    alpha *= np.clip(1 + 0.18 * _cloud(rng, height, width, 2.5, 2.5), 0.55, 1.0)
    return _stamp("scale", alpha, -rng.uniform(22.0, 52.0), smallest=10)


def _dent(rng: np.random.Generator) -> Stamp:
    """The imprint a damaged roll leaves: a lobed dent, lit on one side and in shadow on the other."""
    size = 48
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    angle, distance = np.arctan2(y, x), np.hypot(y, x)
    lobes = (
        1 + 0.22 * np.cos(2 * angle + rng.uniform(0, 6.28)) + 0.1 * np.cos(3 * angle + rng.uniform(0, 6.28))
    )
    radius = rng.uniform(5.0, 11.0) * lobes
    alpha = np.clip((radius - distance) / 3.0 + 0.5, 0.0, 1.0)
    side = rng.uniform(0, 6.28)
    slope = (x * math.cos(side) + y * math.sin(side)) / radius
    gray = -rng.uniform(28.0, 48.0) * np.clip(0.8 + 0.7 * slope, 0.45, 1.6)
    rim = np.clip(1 - np.abs(distance - radius - 1.5) / 2.0, 0.0, 1.0) * (slope < -0.4)
    stamp = _stamp("roll_mark", alpha, gray, smallest=40)
    assert stamp is not None  # the smallest radius leaves over 40 px
    h, w = stamp.mask.shape
    delta = stamp.delta + (
        0.5 * VISIBLE * 40.0 * rim[stamp.y0 : stamp.y0 + h, stamp.x0 : stamp.x0 + w]
    ).astype(np.float32)
    return Stamp(stamp.label, 0, 0, delta, stamp.mask)


def _edge_crack(
    rng: np.random.Generator, left: Doubles, right: Doubles, y_start: int, width_px: int
) -> Stamp | None:
    """Short dark cracks that run in from one strip edge; left and right (n,): the edges from y_start on."""
    height = left.size
    drive = rng.random() < 0.5
    deepest = rng.uniform(9.0, 48.0)
    span = int(deepest) + 16
    x0 = max(0, int(left.min()) - 2) if drive else min(width_px, int(right.max()) + 3) - span
    x = x0 + np.arange(span)[None, :] + 0.5
    depth = x - left[:, None] if drive else right[:, None] - x  # (h, span) px from the edge, inside positive
    y = np.arange(height)[:, None] + 0.5
    alpha = np.zeros((height, span))
    for _ in range(int(min(rng.geometric(0.5), 4))):
        reach = deepest * rng.uniform(0.45, 1.0)
        start = rng.uniform(14.0, height - 14.0)
        jag = _cloud(rng, 2, span, 50.0, 4.0)[:1] * 0.8
        middle = start + np.clip(rng.normal(0.0, 0.25), -0.4, 0.4) * (depth - reach / 2) + jag
        half = rng.uniform(1.4, 3.2) * np.clip(1 - depth / reach, 0.0, 1.0) ** 0.6
        crack = np.where(depth < reach, _ramp(half - np.abs(y - middle), 1.2), 0.0)
        alpha = np.maximum(alpha, crack)
    alpha[depth <= 0] = 0.0
    return _stamp("edge_crack", alpha, -rng.uniform(38.0, 75.0), smallest=10, y0=y_start, x0=x0)


_LOCAL: dict[str, Callable[[np.random.Generator], Stamp | None]] = {
    "patches": _patches,
    "inclusion": _inclusion,
    "scale": _scale,
    "scratches": _short_scratches,
    "pit": _pits,
}


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


class SimulatedStrip:
    """A strip of hot-rolled steel under a line-scan camera: image, class mask and truth table.

    density is the number of planted defects relative to `DEFECTS_PER_M`; width_px is the camera's field, in
    which the strip takes about 95 % and wanders. `clean` plants nothing and leaves surface, edges, gain and
    blackouts as they are. `blackouts` are half-open line ranges with the lamp off; None gives one of 100
    lines on a strip of 20,000 lines or more, and () gives none.
    The same arguments give the same bytes, whatever the blocks. Raises UserError for a length, width, pixel
    size, density, seed or blackout that makes no strip.
    """

    def __init__(
        self,
        length_m: float,
        seed: int,
        width_px: int = 1250,
        mm_per_px_x: float = 0.8,
        mm_per_line: float = 1.0,
        clean: bool = False,
        density: float = 1.0,
        blackouts: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        for name, value in (
            ("length_m", length_m),
            ("mm_per_px_x", mm_per_px_x),
            ("mm_per_line", mm_per_line),
        ):
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}: a simulated strip needs a number above 0", USAGE)
        if not (math.isfinite(density) and density >= 0):
            raise UserError(f"density is {density}: give 0 or more (1 is usual)", USAGE)
        if seed < 0:
            raise UserError(f"seed is {seed}: give 0 or a positive whole number", USAGE)
        if width_px < MIN_WIDTH_PX:
            raise UserError(f"width_px is {width_px}: a simulated strip needs {MIN_WIDTH_PX} or more", USAGE)
        self.length_m = length_m
        self.seed = seed
        self.width_px = width_px
        self.mm_per_px_x = mm_per_px_x
        self.mm_per_line = mm_per_line
        self.clean = clean
        self.density = density
        self.lines = round(length_m * 1000.0 / mm_per_line)
        if self.lines < 1:
            raise UserError(f"length_m is {length_m}: shorter than one line of {mm_per_line} mm", USAGE)
        self.blackouts = self._blackouts(blackouts)
        self._margin = max(0.025 * width_px, 14.0)  # px of background each side; the wander stays within it
        self._gain = self._column_gain()
        self._taps_x = [_taps(0, width_px, cell_x) for _, cell_x, _ in FIELDS]
        self._level = float(_rng(seed, 2).uniform(106.0, 148.0))
        self._rough = float(_rng(seed, 18).uniform(0.8, 1.2))  # of the texture: no two strips look alike
        self._phase = int(_rng(seed, 3).integers(1, CELL_LINES))  # so that cells and bands do not align
        self._marks = [] if clean else self._plan_roll_marks()
        self._scratches = [] if clean else self._plan_long_scratches()
        self._cells: dict[int, list[Stamp]] = {}
        self._last: tuple[int, Mask, Mask] | None = None

    # -- the image ------------------------------------------------------------------------------------------

    def block(self, y0: int, y1: int) -> tuple[NDArray[np.uint8], Mask]:
        """Lines y0..y1-1: image (1, y1 - y0, width_px) uint8 and class mask (y1 - y0, width_px) uint8."""
        self._check(y0, y1)
        image: Mask = np.empty((1, y1 - y0, self.width_px), dtype=np.uint8)
        mask: Mask = np.empty((y1 - y0, self.width_px), dtype=np.uint8)
        for tile in range(y0 // TILE_LINES, (y1 - 1) // TILE_LINES + 1):
            if self._last is None or self._last[0] != tile:
                self._last = (tile, *self._tile(tile))
            _, tile_image, tile_mask = self._last
            start = tile * TILE_LINES
            a, b = max(y0, start), min(y1, start + TILE_LINES)
            image[0, a - y0 : b - y0] = tile_image[a - start : b - start]
            mask[a - y0 : b - y0] = tile_mask[a - start : b - start]
        return image, mask

    def mask(self, y0: int, y1: int) -> Mask:
        """The class mask of lines y0..y1-1 alone, (y1 - y0, width_px) uint8: many times faster than block."""
        self._check(y0, y1)
        mask: Mask = np.zeros((y1 - y0, self.width_px), dtype=np.uint8)
        self._paint(y0, y1, None, mask)
        return mask

    def edges(self, y0: int, y1: int) -> tuple[Doubles, Doubles]:
        """Where the strip begins and ends on lines y0..y1-1: px from the left of the image, (n,) each.

        A pixel is strip when its centre lies between the two. The drive side is the left.
        """
        left, right = self._sides(y0, y1)
        rough = 0.6
        return (
            left + rough * _wave((self.seed, 13), y0, y1, 12.0),
            right + rough * _wave((self.seed, 14), y0, y1, 12.0),
        )

    def _check(self, y0: int, y1: int) -> None:
        if not 0 <= y0 < y1 <= self.lines:
            raise ValueError(
                f"lines {y0} to {y1} asked of a strip of {self.lines}: need 0 <= y0 < y1 <= lines"
            )

    def _sides(self, y0: int, y1: int) -> tuple[Doubles, Doubles]:
        """The two edges without their roughness: slow wander of the whole strip, slower change of width."""
        room = self._margin - 4.0
        wander = room * (
            0.6 * _wave((self.seed, 10), y0, y1, 6000.0) + 0.28 * _wave((self.seed, 11), y0, y1, 1500.0)
        )
        narrower = 0.06 * room * (1 + _wave((self.seed, 12), y0, y1, 4000.0))
        return self._margin + wander + narrower, self.width_px - self._margin + wander - narrower

    def _column_gain(self) -> Floats:
        """Lamp profile across the field times the gain of each pixel: (width_px,) about 1."""
        u = np.linspace(-1.0, 1.0, self.width_px)
        rng = _rng(self.seed, 1)
        lamp = 1.03 - rng.uniform(0.08, 0.2) * u**2 + rng.uniform(-0.04, 0.04) * u
        ripple = 1 + 0.012 * _cloud(rng, 2, self.width_px, 50.0, 70.0)[0]
        pixel = 1 + 0.007 * (rng.random((4, self.width_px)) * 2 - 1).sum(axis=0) / 1.155
        gain: Floats = (lamp * ripple * pixel).astype(np.float32)
        return gain

    def _blackouts(self, given: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
        if given is None:
            if self.lines < DARK_FROM_LINES:
                return ()
            start = int(self.lines * _rng(self.seed, 4).uniform(0.3, 0.8))
            return ((start, start + DARK_LINES),)
        for y0, y1 in given:
            if not 0 <= y0 < y1 <= self.lines:
                raise UserError(f"blackout {y0}-{y1} does not lie on a strip of {self.lines} lines", USAGE)
        return tuple(sorted(given))

    def _slow(self, y0: int) -> Floats:
        """The smooth texture of the tile that starts at line y0, gray levels: (TILE_LINES, width_px)."""
        rows = TILE_LINES // COARSE + 1
        coarse: Floats = np.zeros((rows, self.width_px), dtype=np.float32)
        for number, (cell_y, _, sigma) in enumerate(FIELDS):
            kx, wx = self._taps_x[number]
            ky, wy = _taps(y0 // COARSE, y0 // COARSE + rows, cell_y / COARSE)
            lattice = _lattice((self.seed, 20 + number), int(ky[0]), int(ky[-1]) + 4, int(kx[-1]) + 4)
            lattice = (lattice * (self._rough * sigma / 0.276)).astype(np.float32)
            wide = sum(wx[k].astype(np.float32) * lattice[:, kx + k] for k in range(4))
            at = ky - ky[0]
            for k in range(4):
                coarse += wy[k].astype(np.float32)[:, None] * wide[at + k]
        step = coarse[1:] - coarse[:-1]
        t: Floats = np.linspace(0.0, 1.0, COARSE, endpoint=False, dtype=np.float32)[None, :, None]
        fine: Floats = step[:, None, :] * t
        fine += coarse[:-1, None, :]
        slow: Floats = fine.reshape(TILE_LINES, self.width_px)
        return slow

    def _noise(self, tile: int) -> tuple[Mask, Floats]:
        """White bytes (TILE_LINES, width_px) uint8 and, filtered from them, grain of deviation 1, float32."""
        width = self.width_px + 2

        def white(index: int, lines: int) -> Mask:
            raw = np.random.Philox(np.random.SeedSequence((self.seed, 5, index))).random_raw(
                (lines * width + 7) // 8
            )
            return raw.astype("<u8", copy=False).view(np.uint8)[: lines * width].reshape(lines, width)

        # The filter looks three lines ahead only: each tile needs the head of the next, never its whole.
        rows = np.concatenate([white(tile, TILE_LINES), white(tile + 1, 3)]).astype(np.uint16)
        for _ in range(3):
            rows = rows[:-1] + rows[1:]  # binomial 1 3 3 1 along
        for _ in range(2):
            rows = rows[:, :-1] + rows[:, 1:]  # binomial 1 2 1 across; at most 32 * 255, so uint16 holds it
        grain = rows.astype(np.float32)
        grain -= 32 * 127.5
        grain *= 1.0 / (73.9 * math.sqrt(20.0 * 6.0))
        return white(tile, TILE_LINES)[:, 1:-1], grain

    def _tile(self, tile: int) -> tuple[Mask, Mask]:
        """Image and mask of one tile, (h, width_px) uint8 each, h = TILE_LINES or what is left of it."""
        y0 = tile * TILE_LINES
        y1 = min(y0 + TILE_LINES, self.lines)
        height = y1 - y0
        white, grain = self._noise(tile)
        gray = self._slow(y0)
        grain *= 1.0 - 0.03 * gray  # dull oxide is coarser than bright strip
        grain *= np.float32(GRAIN * self._rough)
        gray += grain
        sensor = white.astype(np.float32)
        sensor *= SENSOR / 73.9
        gray += sensor
        drift = (
            self._level - SENSOR / 73.9 * 127.5 + 8.0 * _wave((self.seed, 15), y0, y0 + TILE_LINES, 3000.0)
        )
        gray += drift.astype(np.float32)[:, None]
        mask: Mask = np.zeros((height, self.width_px), dtype=np.uint8)
        gray = gray[:height]
        if not self.clean:
            self._paint(y0, y1, gray, mask)
        np.maximum(gray, np.float32(FAINTEST_GRAY), out=gray)
        gray *= self._gain
        gray += np.float32(0.5)
        np.clip(gray, 0.0, 255.0, out=gray)
        image = gray.astype(np.uint8)
        self._cut_edges(y0, y1, gray, white, image)
        for a, b in self.blackouts:
            dark = slice(max(a, y0) - y0, max(min(b, y1) - y0, 0))
            image[dark] = 1 + (white[:height][dark] >> 5)
        return image, mask

    def _cut_edges(self, y0: int, y1: int, gray: Floats, white: Mask, image: Mask) -> None:
        """Put background beyond the strip edges and let the light fall off towards them, in `image`."""
        left, right = self.edges(y0, y1)
        zones = (
            (0, min(self.width_px, int(left.max()) + 26)),
            (max(0, int(right.min()) - 26), self.width_px),
        )
        for a, b in zones:
            x = np.arange(a, b, dtype=np.float64)
            inside = np.minimum(x + 0.5 - left[:, None], right[:, None] - x - 0.5)  # px from the nearer edge
            covered = np.clip(inside + 0.5, 0.0, 1.0)
            shade = 1 - 0.2 / (1 + np.maximum(inside, 0.0) ** 2 / 36.0)
            background = 1.0 + (
                white[: y1 - y0, a:b] >> 5
            )  # 1 to 8: the table under the strip reflects little
            mixed = covered * shade * gray[:, a:b] + (1 - covered) * background
            image[:, a:b] = mixed.astype(np.uint8)

    # -- the defects ----------------------------------------------------------------------------------------

    def _paint(self, y0: int, y1: int, gray: Floats | None, mask: Mask) -> None:
        """Add the defects on lines y0..y1-1 to gray (h, W) if given, and to mask (h, W)."""
        for stamp in self._stamps(y0, y1):
            a, b = max(stamp.y0, y0), min(stamp.y0 + stamp.mask.shape[0], y1)
            inner = slice(a - stamp.y0, b - stamp.y0)
            place = (slice(a - y0, b - y0), slice(stamp.x0, stamp.x0 + stamp.mask.shape[1]))
            if gray is not None:
                gray[place] += stamp.delta[inner]
            mask[place][stamp.mask[inner]] = stamp.label
        for y in range(y0, y1, TILE_LINES):
            end = min(y + TILE_LINES, y1)
            for scratch in self._scratches:
                if scratch.y0 < end and y < scratch.y1:
                    self._draw(scratch, max(y, scratch.y0), min(end, scratch.y1), y0, gray, mask)
        for a, b in self.blackouts:
            mask[max(a, y0) - y0 : max(min(b, y1) - y0, 0)] = 0

    def _stamps(self, y0: int, y1: int) -> Iterator[Stamp]:
        """Every stamp that reaches lines y0..y1-1: roll marks, then the planned cells."""
        yield from self._imprints(y0, y1)
        for cell in range(self._cell_of(y0), self._cell_of(y1 - 1) + 1):
            for stamp in self._cell(cell):
                if stamp.y0 < y1 and y0 < stamp.y0 + stamp.mask.shape[0]:
                    yield stamp

    def _cell_of(self, y: int) -> int:
        return (y + self._phase) // CELL_LINES

    def _dark(self, y0: int, y1: int) -> bool:
        return any(a < y1 + 2 and y0 < b + 2 for a, b in self.blackouts)

    def _plan_roll_marks(self) -> list[RollMarks]:
        """One damaged roll, and more by chance on long strip; planned once, a few bytes per 80 m."""
        rng = _rng(self.seed, 6)
        pitch = ROLL_PITCH_MM / self.mm_per_line
        wanted = 0 if self.density == 0 else 1
        wanted += int(rng.poisson(ROLL_MARK_CAMPAIGNS_PER_M * self.length_m * self.density))
        marks: list[RollMarks] = []
        for number in range(wanted):
            dent = _dent(rng)
            first = rng.random() * (pitch if number == 0 else self.lines)
            count = int(rng.integers(15, 60))
            for _ in range(10):
                offset = rng.uniform(0.08, 0.88) * (self.width_px - 2 * self._margin)
                near = [
                    m for m in marks if m.first < first + count * pitch and first < m.first + m.count * pitch
                ]
                if all(abs(offset - other.offset_px) > 60 for other in near):
                    marks.append(RollMarks(len(marks) + 1, first, pitch, count, offset, dent))
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
                if y + h <= y0 or y >= y1 or y + h > self.lines or self._dark(y, y + h):
                    continue
                left, right = self._sides(y + h // 2, y + h // 2 + 1)
                x = round(float(left[0]) + marks.offset_px)
                if x + w < right[0] - 4:
                    yield Stamp(marks.dent.label, y, x, marks.dent.delta, marks.dent.mask, marks.group)

    def _plan_long_scratches(self) -> list[LongScratch]:
        """Scratches of 1 to 20 m; on strip of 8 m or more the first is at least 40 % of it (up to 20 m)."""
        rng = _rng(self.seed, 7)
        certain = 1 if self.length_m >= 8 and self.density > 0 else 0
        wanted = certain + int(rng.poisson(LONG_SCRATCHES_PER_M * self.length_m * self.density))
        strip = self.width_px - 2 * self._margin
        scratches: list[LongScratch] = []
        for number in range(wanted):
            metres = min(float(rng.lognormal(1.2, 0.7)), 20.0)
            if number < certain:
                metres = max(metres, 0.4 * min(self.length_m, 50.0))
            length = min(int(max(metres, 1.0) * 1000 / self.mm_per_line), self.lines - 8)
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
        left, _ = self._sides(y0, y1)
        along = (np.arange(y0, y1) - scratch.y0) / (scratch.y1 - scratch.y0)
        sway = 3.0 * _wave((self.seed, 16, scratch.index), y0, y1, 400.0)
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
        self, scratch: LongScratch, a: int, b: int, origin: int, gray: Floats | None, mask: Mask
    ) -> None:
        x0, covered = self._trace(scratch, a, b)
        place = (slice(a - origin, b - origin), slice(x0, x0 + covered.shape[1]))
        if gray is not None:
            strength = 0.85 + 0.15 * _wave((self.seed, 17, scratch.index), a, b, 90.0)
            gray[place] += (covered * strength[:, None] * scratch.gray).astype(np.float32)
        mask[place][covered >= VISIBLE] = CLASSES.index("scratches") + 1

    def _cell(self, cell: int) -> list[Stamp]:
        """The defects of one planning cell, none touching another; the last few cells are remembered."""
        if self.clean:
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
        rng = _rng(self.seed, 8, cell)
        metres = (stop - start) * self.mm_per_line / 1000.0
        left, right = self.edges(start, stop)
        lanes = [
            (s, max(start, s.y0), min(stop, s.y1)) for s in self._scratches if s.y0 < stop and start < s.y1
        ]
        paths = [(a, b, self._path(s, a, b)) for s, a, b in lanes]
        taken = list(self._imprints(start, stop))
        planned: list[Stamp] = []

        def free(y0: int, x0: int, y1: int, x1: int) -> bool:
            if self._dark(y0, y1) or any(other.touches(y0, x0, y1, x1) for other in (*taken, *planned)):
                return False
            for a, b, path in paths:
                near = path[max(y0 - 4, a) - a : max(min(y1 + 4, b) - a, 0)]
                if near.size and near.min() - 7 < x1 and x0 < near.max() + 7:
                    return False
            return True

        for name, rate in DEFECTS_PER_M.items():
            for _ in range(int(rng.poisson(rate * metres * self.density))):
                for _ in range(6):
                    stamp = self._place(rng, name, start, stop, left, right)
                    if stamp is None:
                        continue
                    h, w = stamp.mask.shape
                    if free(stamp.y0, stamp.x0, stamp.y0 + h, stamp.x0 + w):
                        planned.append(stamp)
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
            return _edge_crack(rng, left[rows], right[rows], y, self.width_px)
        stamp = _LOCAL[name](rng)
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
        return Stamp(stamp.label, y, int(rng.integers(low, high)), stamp.delta, stamp.mask)

    # -- the truth ------------------------------------------------------------------------------------------

    @property
    def truth(self) -> pa.Table:
        """Every planted defect, one row per 8-connected part of the mask, in the order of its first line.

        Columns as TRUTH_SCHEMA: x_mm from the drive-side edge, on the middle line of the box, to its left,
        y_m from the head to its first line, box and area in mm and px (half-open box); periodic_group numbers
        the damaged roll of a roll mark and is null for the rest.
        """
        rows: list[tuple[str, int | None, int, int, int, int, int]] = []
        for cell in range(self._cell_of(0), self._cell_of(self.lines - 1) + 1):
            for stamp in self._cell(cell):
                rows += _parts(stamp)
        for stamp in self._imprints(0, self.lines):
            rows += _parts(stamp)
        for scratch in self._scratches:
            rows += self._scratch_parts(scratch)
        rows.sort(key=lambda row: (row[3], row[2], row[0]))
        records = []
        for number, (name, group, x0, y0, x1, y1, area) in enumerate(rows, start=1):
            middle = (y0 + y1) // 2
            left, _ = self.edges(middle, middle + 1)
            records.append(
                {
                    "defect_id": number,
                    "class": name,
                    "x_mm": (x0 - float(left[0])) * self.mm_per_px_x,
                    "y_m": y0 * self.mm_per_line / 1000.0,
                    "width_mm": (x1 - x0) * self.mm_per_px_x,
                    "length_mm": (y1 - y0) * self.mm_per_line,
                    "area_mm2": area * self.mm_per_px_x * self.mm_per_line,
                    "area_px": area,
                    "periodic_group": group,
                    "x0": x0,
                    "y0": y0,
                    "x1": x1,
                    "y1": y1,
                }
            )
        return pa.Table.from_pylist(records, schema=TRUTH_SCHEMA)

    def _scratch_parts(
        self, scratch: LongScratch
    ) -> Iterator[tuple[str, int | None, int, int, int, int, int]]:
        """A long scratch is one part, or as many as the blackouts leave of it."""
        start = scratch.y0
        for a, b in (*self.blackouts, (scratch.y1, scratch.y1)):
            stop = min(a, scratch.y1)
            if start < stop:
                x_min, x_max, area = self.width_px, 0, 0
                for y in range(start, stop, 4096):
                    x0, covered = self._trace(scratch, y, min(y + 4096, stop))
                    seen = covered >= VISIBLE
                    columns = np.flatnonzero(seen.any(axis=0))
                    x_min, x_max = min(x_min, x0 + int(columns[0])), max(x_max, x0 + int(columns[-1]) + 1)
                    area += int(seen.sum())
                yield "scratches", None, x_min, start, x_max, stop, area
            start = max(start, b)


def _parts(stamp: Stamp) -> Iterator[tuple[str, int | None, int, int, int, int, int]]:
    """The connected parts of a stamp: class, periodic group, half-open box x0 y0 x1 y1, area in px."""
    parts, _ = ndimage.label(stamp.mask, np.ones((3, 3), dtype=bool))
    areas = np.bincount(parts.ravel())
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        rows, columns = box
        yield (
            CLASSES[stamp.label - 1],
            stamp.group,
            stamp.x0 + columns.start,
            stamp.y0 + rows.start,
            stamp.x0 + columns.stop,
            stamp.y0 + rows.stop,
            int(areas[number]),
        )


def simulate_roll(
    path: Path,
    simulated: SimulatedStrip,
    *,
    overwrite: bool = False,
    on_lines: Callable[[int, int], None] | None = None,
) -> Roll:
    """Write a simulated strip as the roll `path` (`<roll-id>.zarr`), in constant memory.

    Beside the image the roll gets the class mask as label `TRUTH_LABEL` and the truth table as `TRUTH_FILE`.
    on_lines(done, total) is called about every 1,000 lines. Raises UserError as RollWriter does; when it
    fails or is interrupted nothing is left at `path`.
    """
    strip = Strip(
        roll_id=path.name.removesuffix(".zarr"),
        side="top",
        lighting=("bright",),
        mm_per_px_x=simulated.mm_per_px_x,
        mm_per_line=simulated.mm_per_line,
        line_id="simulated",
    )
    lines, width = simulated.lines, simulated.width_px
    with RollWriter(path, strip, width, np.uint8, total_lines=lines, overwrite=overwrite) as writer:
        for y0 in range(0, lines, 4 * TILE_LINES):
            y1 = min(y0 + 4 * TILE_LINES, lines)
            writer.append(simulated.block(y0, y1)[0])
            if on_lines is not None:
                on_lines(y1, lines)
        roll = writer.close()
    try:
        pq.write_table(simulated.truth, path / TRUTH_FILE)
        label = LabelWriter.create(
            path, TRUTH_LABEL, CLASSES, lines=lines, width=width, shard_lines=SHARD_LINES
        )
        for y0 in range(0, lines, SHARD_LINES):
            label.write(y0, simulated.mask(y0, min(y0 + SHARD_LINES, lines)))
        label.close()
    except BaseException:
        shutil.rmtree(
            path, ignore_errors=True
        )  # a simulated roll without its truth would pass for a real one
        raise
    return roll
