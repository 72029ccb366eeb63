"""What sound strip looks like: three surfaces, each in bright and in dark field, and what grows on them.

A surface is a stack of smooth fields, a grain, the spangle of zinc where there is one, and the light and
pixels of the camera. All of it is drawn in tiles of `TILE_LINES` lines, keyed by seed and lattice row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from rollsight.synth.noise import Floats, Mask, cloud, generator, lattice, taps, wave

TILE_LINES = 256
COARSE = 4  # the slow fields are computed on every fourth line and interpolated between
LIGHTINGS = ("bright", "dark")
"""Lighting modes: the camera in the mirror direction of the lamp, and out of it (light at a low angle)."""

SPANGLE_LINES, SPANGLE_PX = 16, 18  # the lattice cell of a zinc crystal; about 15 mm either way
BORDER = 24.0  # px^2 by which the second point is farther than the first: below it lies a crystal's border


@dataclass(frozen=True, slots=True)
class Look:
    """Sound strip in one lighting mode; gray levels of 0 to 255."""

    level: tuple[float, float]  # between these lies the mean gray of a strip
    fields: tuple[tuple[int, int, float], ...]  # (cell along in lines, cell across in px, deviation)
    grain: float  # deviation of the line-by-line grain, neighbours correlated
    sensor: float  # deviation of the pixel noise
    drift: float  # how far the mean moves along the strip
    falloff: tuple[float, float]  # between these lies how much darker the field is at its ends
    dull: float = 0.0  # how much coarser the grain is per gray level below the mean
    spangle: float = 0.0  # contrast of the zinc crystals
    shine: float = 0.0  # how much the brightest of them stand out
    border: float = 0.0  # how much darker (below 0: brighter) their borders are
    faintest: float = 24.0  # strip never falls under this before the column gain, so none reads as background


@dataclass(frozen=True, slots=True)
class Surface:
    """A kind of strip. `per_m`: planted groups per metre at density 1; a group has one to twenty parts."""

    name: str
    classes: tuple[
        str, ...
    ]  # a pixel of class i has mask value i + 1; markers and drops follow where planted
    per_m: dict[str, float]
    bars_per_m: dict[str, float]  # of what lies across the whole width
    looks: dict[str, Look] = field(repr=False)
    effects: tuple[str, ...]  # those it comes with
    sheared: bool  # the ends were cut, else they are as rolled


# Gray values of the hot-rolled look lie near those of the NEU sets (Song and Yan 2013).
HOT_ROLLED_BRIGHT = Look(
    level=(106.0, 148.0),
    fields=(
        (16, 6, 1.7),  # oxide grain, drawn out along rolling
        (32, 16, 2.0),  # oxide mottling
        (96, 48, 2.5),  # cloudy oxide
        (512, 3, 1.6),  # fine streaks along rolling
        (1024, 20, 2.4),  # broad streaks
        (1024, 260, 5.0),  # slow drift over the strip
    ),
    grain=4.2,
    sensor=1.3,
    drift=8.0,
    falloff=(0.08, 0.2),
    dull=0.03,
)
# In dark field the same fields turn about: what mirrors less scatters more.
HOT_ROLLED_DARK = Look(
    level=(44.0, 60.0),
    fields=(
        (16, 6, -1.2),
        (32, 16, -1.3),
        (96, 48, -1.5),
        (512, 3, -1.2),
        (1024, 20, -1.0),
        (1024, 260, -1.8),
    ),
    grain=4.0,
    sensor=1.5,
    drift=3.0,
    falloff=(0.04, 0.14),
    faintest=5.0,
)
COLD_ROLLED_BRIGHT = Look(
    level=(148.0, 176.0),
    fields=(
        (96, 1, 2.0),  # the grinding of the work roll, printed on the strip
        (384, 2, 2.0),
        (20, 8, 0.9),  # faint mottling
        (768, 12, 2.2),  # bands of more and of less shine
        (1600, 90, 3.2),
        (1024, 320, 4.5),  # flatness: waves turn the mirror
    ),
    grain=2.3,
    sensor=1.2,
    drift=5.0,
    falloff=(0.1, 0.22),
)
COLD_ROLLED_DARK = Look(
    level=(34.0, 46.0),
    fields=(
        (96, 1, -1.5),
        (384, 2, -1.3),
        (20, 8, -0.6),
        (768, 12, -1.1),
        (1600, 90, -1.2),
        (1024, 320, -1.6),
    ),
    grain=1.8,
    sensor=1.4,
    drift=2.0,
    falloff=(0.04, 0.12),
    faintest=5.0,
)
GALVANISED_BRIGHT = Look(
    level=(140.0, 172.0),
    fields=(
        (10, 5, 1.2),
        (64, 40, 2.0),  # zinc thicker and thinner
        (512, 22, 1.5),  # wiped along the strip
        (1024, 300, 4.5),
    ),
    grain=2.6,
    sensor=1.2,
    drift=5.0,
    falloff=(0.08, 0.2),
    spangle=9.0,
    shine=3.0,
    border=0.9,
)
GALVANISED_DARK = Look(
    level=(44.0, 58.0),
    fields=((10, 5, -0.9), (64, 40, -1.0), (512, 22, -0.9), (1024, 300, -1.6)),
    grain=2.4,
    sensor=1.5,
    drift=2.5,
    falloff=(0.04, 0.12),
    spangle=6.0,
    shine=5.0,
    border=-0.9,
    faintest=5.0,
)

EFFECTS = ("lamp_drift", "speed_ramp", "ends", "weld", "dropped_lines", "drops")
"""What a line does to an image beyond the steel itself. Each can be asked for on any surface."""

DROPS_PER_M = {"water_drop": 0.15, "oil_drop": 0.12}
"""Pseudo-defects: they are planted and named like defects, and never count as such."""

HOT_ROLLED = Surface(
    name="hot-rolled",
    classes=("inclusion", "patches", "scratches", "pit", "roll_mark", "scale", "edge_crack"),
    per_m={
        "inclusion": 0.6,
        "patches": 0.3,
        "scratches": 0.3,
        "pit": 0.5,
        "scale": 0.35,
        "edge_crack": 0.3,
    },
    bars_per_m={},
    looks={"bright": HOT_ROLLED_BRIGHT, "dark": HOT_ROLLED_DARK},
    effects=(),
    sheared=False,
)
COLD_ROLLED = Surface(
    name="cold-rolled",
    classes=(
        "scratches",
        "roll_mark",
        "inclusion",
        "sliver",
        "stain",
        "rubber_mark",
        "hole",
        "bruise",
        "coil_break",
        "edge_crack",
        "chatter_mark",
        "roll_stop",
    ),
    per_m={
        "scratches": 0.3,
        "inclusion": 0.25,
        "sliver": 0.15,
        "stain": 0.25,
        "rubber_mark": 0.25,
        "hole": 0.1,
        "bruise": 0.2,
        "coil_break": 0.15,
        "edge_crack": 0.15,
    },
    bars_per_m={"chatter_mark": 0.03, "roll_stop": 0.03},
    looks={"bright": COLD_ROLLED_BRIGHT, "dark": COLD_ROLLED_DARK},
    effects=EFFECTS,
    sheared=True,
)
GALVANISED = Surface(
    name="galvanised",
    classes=(
        "scratches",
        "roll_mark",
        "sliver",
        "stain",
        "rubber_mark",
        "hole",
        "bruise",
        "bare_spot",
        "dross",
        "air_knife_line",
        "white_rust",
    ),
    per_m={
        "scratches": 0.25,
        "sliver": 0.12,
        "stain": 0.12,
        "rubber_mark": 0.15,
        "hole": 0.06,
        "bruise": 0.15,
        "bare_spot": 0.35,
        "dross": 0.5,
        "air_knife_line": 0.2,
        "white_rust": 0.2,
    },
    bars_per_m={},
    looks={"bright": GALVANISED_BRIGHT, "dark": GALVANISED_DARK},
    effects=EFFECTS,
    sheared=True,
)
SURFACES = {surface.name: surface for surface in (HOT_ROLLED, COLD_ROLLED, GALVANISED)}


class Texture:
    """Sound strip of one surface in one lighting mode: `tile` draws it, `gain` is what lamp and pixels do.

    The bright mode of a seed does not change when a dark one is asked for beside it.
    """

    def __init__(self, surface: Surface, lighting: str, seed: int, width_px: int) -> None:
        self.look = surface.looks[lighting]
        self.gain = self._column_gain(seed, lighting, width_px)
        self._seed = seed
        self._own = 100 * LIGHTINGS.index(lighting)  # keys that the modes do not share
        self._width = width_px
        self._taps_x = [taps(0, width_px, cell_x) for _, cell_x, _ in self.look.fields]
        self._level = float(generator(seed, self._own + 2).uniform(*self.look.level))
        self._rough = float(generator(seed, 18).uniform(0.8, 1.2))  # no two strips look alike

    def tile(self, tile: int) -> tuple[Floats, Mask]:
        """Gray levels before the column gain (TILE_LINES, width_px) float32, and white bytes of that shape.

        The bytes are the noise that the background under the strip is made of.
        """
        look, y0 = self.look, tile * TILE_LINES
        white, grain = self._noise(tile)
        gray = self._slow(y0)
        if look.dull:
            grain *= 1.0 - look.dull * gray  # dull oxide is coarser than bright strip
        grain *= np.float32(look.grain * self._rough)
        gray += grain
        if look.spangle:
            gray += self._spangle(tile)
        sensor = white.astype(np.float32)
        sensor *= look.sensor / 73.9
        gray += sensor
        slow = wave((self._seed, self._own + 15), y0, y0 + TILE_LINES, 3000.0)
        level = self._level - look.sensor / 73.9 * 127.5 + look.drift * slow
        gray += level.astype(np.float32)[:, None]
        return gray, white

    def _column_gain(self, seed: int, lighting: str, width_px: int) -> Floats:
        """Lamp profile across the field times the gain of each pixel: (width_px,) about 1."""
        u = np.linspace(-1.0, 1.0, width_px)
        rng = generator(seed, 100 * LIGHTINGS.index(lighting) + 1)
        lamp = 1.03 - rng.uniform(*self.look.falloff) * u**2 + rng.uniform(-0.04, 0.04) * u
        ripple = 1 + 0.012 * cloud(rng, 2, width_px, 50.0, 70.0)[0]
        pixel = 1 + 0.007 * (rng.random((4, width_px)) * 2 - 1).sum(axis=0) / 1.155
        gain: Floats = (lamp * ripple * pixel).astype(np.float32)
        return gain

    def _slow(self, y0: int) -> Floats:
        """The smooth texture of the tile that starts at line y0, gray levels: (TILE_LINES, width_px)."""
        rows = TILE_LINES // COARSE + 1
        coarse: Floats = np.zeros((rows, self._width), dtype=np.float32)
        for number, (cell_y, _, sigma) in enumerate(self.look.fields):
            kx, wx = self._taps_x[number]
            ky, wy = taps(y0 // COARSE, y0 // COARSE + rows, cell_y / COARSE)
            values = lattice((self._seed, 20 + number), int(ky[0]), int(ky[-1]) + 4, int(kx[-1]) + 4)
            values = (values * (self._rough * sigma / 0.276)).astype(np.float32)
            wide = sum(wx[k].astype(np.float32) * values[:, kx + k] for k in range(4))
            at = ky - ky[0]
            for k in range(4):
                coarse += wy[k].astype(np.float32)[:, None] * wide[at + k]
        step = coarse[1:] - coarse[:-1]
        t: Floats = np.linspace(0.0, 1.0, COARSE, endpoint=False, dtype=np.float32)[None, :, None]
        fine: Floats = step[:, None, :] * t
        fine += coarse[:-1, None, :]
        slow: Floats = fine.reshape(TILE_LINES, self._width)
        return slow

    def _noise(self, tile: int) -> tuple[Mask, Floats]:
        """White bytes (TILE_LINES, width_px) uint8 and, filtered from them, grain of deviation 1, float32."""
        width = self._width + 2

        def white(index: int, lines: int) -> Mask:
            sequence = np.random.SeedSequence((self._seed, self._own + 5, index))
            raw = np.random.Philox(sequence).random_raw((lines * width + 7) // 8)
            return raw.astype("<u8", copy=False).view(np.uint8)[: lines * width].reshape(lines, width)

        # The filter looks three lines ahead only: each tile needs the head of the next, never its whole.
        here = white(tile, TILE_LINES)
        rows = np.concatenate([here, white(tile + 1, 3)]).astype(np.uint16)
        for _ in range(3):
            rows = rows[:-1] + rows[1:]  # binomial 1 3 3 1 along
        for _ in range(2):
            rows = rows[:, :-1] + rows[:, 1:]  # binomial 1 2 1 across; at most 32 * 255, so uint16 holds it
        grain = rows.astype(np.float32)
        grain -= 32 * 127.5
        grain *= 1.0 / (73.9 * math.sqrt(20.0 * 6.0))
        return here[:, 1:-1], grain

    def _spangle(self, tile: int) -> Floats:
        """Crystals of zinc (TILE_LINES, width_px), gray levels: cells of the nearest of jittered points.

        Worley 1996, A cellular texture basis function, on a lattice of SPANGLE_LINES x SPANGLE_PX; the nine
        points around a pixel's cell are asked. The same crystals lie under both modes, and one that shines in
        the first need not in the second.
        """
        look = self.look
        down, across = TILE_LINES // SPANGLE_LINES, -(-self._width // SPANGLE_PX)
        first = tile * down
        shape = (down + 2, across + 2, 6)
        facts = lattice((self._seed, 40), first, first + down + 2, (across + 2) * 6).reshape(shape)
        facts = facts.astype(np.float32)
        py = (facts[..., 0] * np.float32(0.48) + np.float32(0.5)) * SPANGLE_LINES  # the point, in its cell
        px = (facts[..., 1] * np.float32(0.48) + np.float32(0.5)) * SPANGLE_PX
        own = facts[..., 2] if self._own == 0 else facts[..., 3]
        gray = np.float32(look.spangle) * (own + look.shine * np.maximum(own - np.float32(0.6), 0.0))
        steep = np.float32(1.1 * look.spangle) * facts[..., 4:6]  # a crystal is brighter to one of its sides
        y, x = (np.arange(n, dtype=np.float32) + np.float32(0.5) for n in (SPANGLE_LINES, SPANGLE_PX))
        value: Floats = np.empty((down, SPANGLE_LINES, across, SPANGLE_PX), dtype=np.float32)
        for row in range(down):  # one row of cells at a time stays in the cache
            nearest: Floats = np.full(value.shape[1:], 1e9, dtype=np.float32)
            second: Floats = nearest.copy()
            for i in range(3):
                dy = y[:, None] - (py[row + i] + (i - 1) * SPANGLE_LINES)  # (lines, cells)
                for j in range(3):
                    cells = slice(j, j + across)
                    dx = x - (px[row + i, cells, None] + (j - 1) * SPANGLE_PX)  # (cells, px)
                    distance = (dy * dy)[:, cells, None] + dx * dx
                    closer = distance < nearest
                    np.minimum(second, np.maximum(distance, nearest), out=second)
                    np.minimum(nearest, distance, out=nearest)
                    slope_y = steep[row + i, cells, 0] * dy[:, cells] / SPANGLE_LINES + gray[row + i, cells]
                    slope_x = steep[row + i, cells, 1, None] * dx / SPANGLE_PX
                    np.copyto(value[row], slope_y[:, :, None] + slope_x, where=closer)
            second -= nearest  # small along the border of two crystals
            np.minimum(second, np.float32(BORDER), out=second)
            second -= np.float32(BORDER)
            second *= np.float32(look.spangle * look.border / BORDER)
            value[row] += second
        tiled: Floats = value.reshape(TILE_LINES, across * SPANGLE_PX)[:, : self._width]
        return tiled
