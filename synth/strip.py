"""The simulated coil: strip of any length with planted defects, whose truth is known exactly.

Every random number is drawn from a generator keyed by (seed, what it is for, where on the strip), so a line
of the strip looks the same whichever block it is asked for in, and blocks need not remember each other.
The image is built in tiles of `TILE_LINES` lines. Texture comes from surfaces.py, what is planted from
plan.py, the outline from outline.py, speed and lamps from travel.py.

Sizes of shapes are in pixels (what a network sees); positions, the pitch of a roll mark and the truth table
are in mm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import TRUTH_LABEL
from rollsight.inspect.rolls import SHARD_LINES, LabelWriter, Roll, RollWriter, Strip
from rollsight.synth.noise import Bools, Doubles, Floats, Mask, generator
from rollsight.synth.outline import MIN_WIDTH_PX, Outline, background
from rollsight.synth.plan import ROLL_PITCH_MM, Plan, Rates
from rollsight.synth.surfaces import (
    DROPS_PER_M,
    EFFECTS,
    HOT_ROLLED,
    LIGHTINGS,
    SURFACES,
    TILE_LINES,
    Texture,
)
from rollsight.synth.travel import Travel, dropped_lines, joined, lamp, slow_light

__all__ = [
    "CLASSES",
    "EFFECTS",
    "LIGHTINGS",
    "MARKERS",
    "ROLL_PITCH_MM",
    "SURFACES",
    "TRUTH_FILE",
    "TRUTH_LABEL",
    "SimulatedStrip",
    "simulate_roll",
]

CLASSES = HOT_ROLLED.classes
"""The classes of hot-rolled strip as it comes; of any strip: `SimulatedStrip.classes`."""

MARKERS = ("weld", *DROPS_PER_M)
"""Classes that are no defects: the weld marks a coil's end, drops of water and oil only look like defects."""

DARK_LINES = 100  # lines of the default blackout: 0.3 % of a 30 m strip
DARK_FROM_LINES = 20_000  # a shorter strip has no default blackout

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


class SimulatedStrip:
    """A strip of steel under a line-scan camera: image, class mask and truth table.

    surface is a name in SURFACES; lighting is ("bright",) or ("bright", "dark"), and the bright mode is the
    same either way. effects are names in EFFECTS; None gives those the surface comes with: none on hot-rolled
    strip, all on the others. `classes` names the classes this strip can hold: a pixel of class i has mask
    value i + 1, and 0 is sound strip or background. Those in MARKERS are in mask and truth, but no defects.

    density is the number of planted defects relative to the surface's `per_m`; width_px is the camera's
    field, in which the strip takes about 95 % and wanders. `clean` plants nothing, no weld and no drops
    either, and leaves the rest as it is. `blackouts` are half-open line ranges with the lamp off; None gives
    one of 100 lines on a strip of 20,000 lines or more, and () gives none. `dropped` are those the camera
    lost: black.
    The same arguments give the same bytes, whatever the blocks. Raises UserError for arguments that make no
    strip.
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
        surface: str = HOT_ROLLED.name,
        lighting: Collection[str] = LIGHTINGS[:1],
        effects: Collection[str] | None = None,
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
        if surface not in SURFACES:
            raise UserError(f"surface is {surface!r}: there are {', '.join(SURFACES)}", USAGE)
        if tuple(lighting) not in (LIGHTINGS[:1], LIGHTINGS):
            raise UserError(f"lighting is {','.join(lighting)}: give bright, or bright,dark", USAGE)
        kind = SURFACES[surface]
        asked = kind.effects if effects is None else effects
        unknown = [name for name in asked if name not in EFFECTS]
        if unknown:
            raise UserError(f"effect {unknown[0]!r} is not known: there are {', '.join(EFFECTS)}", USAGE)
        self.length_m = length_m
        self.seed = seed
        self.width_px = width_px
        self.mm_per_px_x = mm_per_px_x
        self.mm_per_line = mm_per_line
        self.clean = clean
        self.density = density
        self.surface = surface
        self.lighting = tuple(lighting)
        self.effects = tuple(name for name in EFFECTS if name in asked)
        self.lines = round(length_m * 1000.0 / mm_per_line)
        if self.lines < 1:
            raise UserError(f"length_m is {length_m}: shorter than one line of {mm_per_line} mm", USAGE)
        self.blackouts = self._blackouts(blackouts)
        self.dropped: tuple[tuple[int, int], ...] = ()
        if "dropped_lines" in self.effects:
            self.dropped = joined(dropped_lines(seed, self.lines, mm_per_line))
        drops = DROPS_PER_M if "drops" in self.effects else {}
        self.classes = (*kind.classes, *(("weld",) if "weld" in self.effects else ()), *drops)
        self.travel = Travel(self.lines, mm_per_line, ramp="speed_ramp" in self.effects)
        self._outline = Outline(seed, self.lines, width_px, ends="ends" in self.effects, sheared=kind.sheared)
        self._textures = [Texture(kind, mode, seed, width_px) for mode in self.lighting]
        self._plan = Plan(
            self._outline,
            mm_per_line,
            density,
            Rates({}, {}, False)
            if clean
            else Rates({**kind.per_m, **drops}, kind.bars_per_m, "weld" in self.effects),
            {name: value for value, name in enumerate(self.classes, start=1)},
            self._gaps(),
            dark="dark" in self.lighting,
        )
        self._last: tuple[int, Mask, Mask] | None = None

    # -- the image ------------------------------------------------------------------------------------------

    def block(self, y0: int, y1: int) -> tuple[NDArray[np.uint8], Mask]:
        """Lines y0..y1-1: image (modes, y1 - y0, width_px) uint8, class mask (y1 - y0, width_px) uint8."""
        self._check(y0, y1)
        image: Mask = np.empty((len(self.lighting), y1 - y0, self.width_px), dtype=np.uint8)
        mask: Mask = np.empty((y1 - y0, self.width_px), dtype=np.uint8)
        for tile in range(y0 // TILE_LINES, (y1 - 1) // TILE_LINES + 1):
            if self._last is None or self._last[0] != tile:
                self._last = (tile, *self._tile(tile))
            _, tile_image, tile_mask = self._last
            start = tile * TILE_LINES
            a, b = max(y0, start), min(y1, start + TILE_LINES)
            image[:, a - y0 : b - y0] = tile_image[:, a - start : b - start]
            mask[a - y0 : b - y0] = tile_mask[a - start : b - start]
        return image, mask

    def mask(self, y0: int, y1: int) -> Mask:
        """The class mask of lines y0..y1-1 alone, (y1 - y0, width_px) uint8: many times faster than block."""
        self._check(y0, y1)
        mask: Mask = np.zeros((y1 - y0, self.width_px), dtype=np.uint8)
        for y in range(y0, y1, TILE_LINES):
            end = min(y + TILE_LINES, y1)
            self._plan.paint(y, end, [], mask[y - y0 : end - y0])
        return mask

    def edges(self, y0: int, y1: int) -> tuple[Doubles, Doubles]:
        """Where the strip begins and ends on lines y0..y1-1: px from the left of the image, (n,) each.

        A pixel is strip when its centre lies between the two. The drive side is the left. Head and tail may
        leave less of a line than its edges say.
        """
        return self._outline.edges(y0, y1)

    def lines_of(self, y0: int, y1: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Bools]:
        """Of lines y0..y1-1: encoder counts, ns since line 0, whether the camera kept the line: (n,) each."""
        self._check(y0, y1)
        valid: Bools = np.ones(y1 - y0, dtype=bool)
        for a, b in self.dropped:
            valid[_overlap(a, b, y0, y1)] = False
        return self.travel.encoder(y0, y1), self.travel.t_ns(y0, y1), valid

    def _check(self, y0: int, y1: int) -> None:
        if not 0 <= y0 < y1 <= self.lines:
            raise ValueError(
                f"lines {y0} to {y1} asked of a strip of {self.lines}: need 0 <= y0 < y1 <= lines"
            )

    def _blackouts(self, given: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
        if given is None:
            if self.lines < DARK_FROM_LINES:
                return ()
            start = int(self.lines * generator(self.seed, 4).uniform(0.3, 0.8))
            return ((start, start + DARK_LINES),)
        for y0, y1 in given:
            if not 0 <= y0 < y1 <= self.lines:
                raise UserError(f"blackout {y0}-{y1} does not lie on a strip of {self.lines} lines", USAGE)
        return tuple(sorted(given))

    def _gaps(self) -> list[tuple[int, int]]:
        """Line ranges where nothing is planted: no light, no line, no whole strip."""
        ends = [(0, self._outline.head), (self.lines - self._outline.tail, self.lines)]
        return [*self.blackouts, *self.dropped, *((a, b) for a, b in ends if a < b)]

    def _tile(self, tile: int) -> tuple[Mask, Mask]:
        """Image (modes, h, width_px) and mask (h, width_px) of a tile, h = TILE_LINES or what is left."""
        y0 = tile * TILE_LINES
        y1 = min(y0 + TILE_LINES, self.lines)
        height = y1 - y0
        drawn = [texture.tile(tile) for texture in self._textures]
        planes = [gray[:height] for gray, _ in drawn]
        mask: Mask = np.zeros((height, self.width_px), dtype=np.uint8)
        self._plan.paint(y0, y1, planes, mask)
        image: Mask = np.empty((len(planes), height, self.width_px), dtype=np.uint8)
        for mode, (texture, gray, (_, white)) in enumerate(zip(self._textures, planes, drawn, strict=True)):
            np.maximum(gray, np.float32(texture.look.faintest), out=gray)
            gray *= texture.gain
            light = self._light(mode, y0, y1)
            if light is not None:
                gray *= light[:, None]
            gray += np.float32(0.5)
            np.clip(gray, 0.0, 255.0, out=gray)
            image[mode] = gray
            self._outline.cut_out(y0, y1, gray, white, image[mode])
            for a, b in self.blackouts:
                dark = _overlap(a, b, y0, y1)
                image[mode, dark] = background(white[:height][dark])
            for a, b in self.dropped:
                image[mode, _overlap(a, b, y0, y1)] = 0
        return image, mask

    def _light(self, mode: int, y0: int, y1: int) -> Floats | None:
        """How bright lines y0..y1-1 of a mode are, about 1: (n,); None where nothing changes the light."""
        light: Doubles = np.ones(y1 - y0)
        if "lamp_drift" in self.effects:
            light *= lamp(self.seed, mode, y0, y1, self.mm_per_line)
        if "speed_ramp" in self.effects:
            light *= slow_light(self.travel.speed(y0, y1))
        for bars in self._plan.bars:
            if bars.name == "weld":  # beyond it lies another coil, a little brighter or darker
                beyond = np.arange(y0, y1) - (bars.y0 + bars.height // 2)
                if bars.y0 < self.lines // 2:
                    beyond = -beyond
                light[beyond > 0] *= generator(self.seed, 37).uniform(0.92, 1.08)
        if not self.effects:
            return None
        lit: Floats = light.astype(np.float32)
        return lit

    # -- the truth ------------------------------------------------------------------------------------------

    @property
    def truth(self) -> pa.Table:
        """Everything planted, one row per 8-connected part of the mask, in the order of its first line.

        Columns as TRUTH_SCHEMA: x_mm from the drive-side edge, on the middle line of the box, to its left,
        y_m from the head to its first line, box and area in mm and px (half-open box); periodic_group numbers
        the damaged roll of a roll mark or the field of a chatter mark and is null for the rest.
        """
        records = []
        for number, part in enumerate(self._plan.parts(), start=1):
            middle = (part.y0 + part.y1) // 2
            left, _ = self.edges(middle, middle + 1)
            records.append(
                {
                    "defect_id": number,
                    "class": part.name,
                    "x_mm": (part.x0 - float(left[0])) * self.mm_per_px_x,
                    "y_m": part.y0 * self.mm_per_line / 1000.0,
                    "width_mm": (part.x1 - part.x0) * self.mm_per_px_x,
                    "length_mm": (part.y1 - part.y0) * self.mm_per_line,
                    "area_mm2": part.area * self.mm_per_px_x * self.mm_per_line,
                    "area_px": part.area,
                    "periodic_group": part.group,
                    "x0": part.x0,
                    "y0": part.y0,
                    "x1": part.x1,
                    "y1": part.y1,
                }
            )
        return pa.Table.from_pylist(records, schema=TRUTH_SCHEMA)


def _overlap(a: int, b: int, y0: int, y1: int) -> slice:
    """The lines a..b-1 within the block y0..y1-1, counted from its first."""
    return slice(max(a, y0) - y0, max(min(b, y1) - y0, 0))


def simulate_roll(
    path: Path,
    simulated: SimulatedStrip,
    *,
    overwrite: bool = False,
    on_lines: Callable[[int, int], None] | None = None,
) -> Roll:
    """Write a simulated strip as the roll `path` (`<roll-id>.zarr`), in constant memory.

    Beside the image the roll gets the class mask as label `TRUTH_LABEL` and the truth table as `TRUTH_FILE`.
    on_lines(done, total) is called about every 1,000 lines. Raises UserError as RollWriter does. Image and
    truth stand at `path` at once, or nothing does, killed or not.
    """
    strip = Strip(
        roll_id=path.name.removesuffix(".zarr"),
        side="top",
        lighting=simulated.lighting,
        mm_per_px_x=simulated.mm_per_px_x,
        mm_per_line=simulated.mm_per_line,
        line_id="simulated",
    )
    lines, width = simulated.lines, simulated.width_px
    with RollWriter(path, strip, width, np.uint8, total_lines=lines, overwrite=overwrite) as writer:
        for y0 in range(0, lines, 4 * TILE_LINES):
            y1 = min(y0 + 4 * TILE_LINES, lines)
            encoder, t_ns, valid = simulated.lines_of(y0, y1)
            writer.append(simulated.block(y0, y1)[0], encoder=encoder, t_ns=t_ns, valid=valid)
            if on_lines is not None:
                on_lines(y1, lines)
        pq.write_table(simulated.truth, writer.building / TRUTH_FILE)
        label = LabelWriter.create(
            writer.building, TRUTH_LABEL, simulated.classes, lines=None, width=width, shard_lines=SHARD_LINES
        )
        label.freeze(lines)
        for y0 in range(0, lines, SHARD_LINES):
            label.write(y0, simulated.mask(y0, min(y0 + SHARD_LINES, lines)))
        label.close()
        return writer.close()  # with its truth: without it, it would pass for a real roll
