"""A drawn defect group: what it adds to the gray in each lighting mode, and which of its pixels are truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from rollsight.synth.noise import Bools, Doubles, Floats
from scipy import ndimage

VISIBLE = 0.4  # a pixel belongs to the truth where the shape reaches this share of its full contrast

EIGHT = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True, slots=True)
class Stamp:
    """A drawn defect group at its place on the strip."""

    name: str  # the class
    y0: int  # first line
    x0: int  # first pixel
    delta: Floats  # (h, w) gray levels to add in bright field, before the column gain
    mask: Bools  # (h, w) where the truth says defect
    cover: Floats | None  # (h, w) the shape alone, in [0, 1]; None once the stamp is finished
    group: int | None = None  # periodic_group
    dark: Floats | None = None  # (h, w) gray levels to add in dark field; None where nobody asked yet

    @property
    def y1(self) -> int:
        return self.y0 + int(self.mask.shape[0])

    @property
    def x1(self) -> int:
        return self.x0 + int(self.mask.shape[1])

    def touches(self, y0: int, x0: int, y1: int, x1: int, gap: int = 4) -> bool:
        """Whether the half-open box comes within `gap` px of this stamp's box."""
        return y0 < self.y1 + gap and self.y0 < y1 + gap and x0 < self.x1 + gap and self.x0 < x1 + gap

    def at(self, y0: int, x0: int, group: int | None = None) -> Stamp:
        """The same stamp at another place."""
        return replace(self, y0=y0, x0=x0, group=group)


@dataclass(frozen=True, slots=True)
class Part:
    """One 8-connected part of the truth: a row of the truth table in px, box half-open."""

    name: str
    group: int | None
    x0: int
    y0: int
    x1: int
    y1: int
    area: int


def parts(stamp: Stamp) -> Iterator[Part]:
    """The connected parts of a stamp's mask."""
    labels, _ = ndimage.label(stamp.mask, EIGHT)
    areas = np.bincount(labels.ravel())
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        yield Part(
            stamp.name,
            stamp.group,
            stamp.x0 + columns.start,
            stamp.y0 + rows.start,
            stamp.x0 + columns.stop,
            stamp.y0 + rows.stop,
            int(areas[number]),
        )


def cut(
    name: str,
    alpha: Doubles,
    gray: Doubles | float,
    smallest: int = 4,
    y0: int = 0,
    x0: int = 0,
    halo: Doubles | None = None,
) -> Stamp | None:
    """Cut a shape to its visible parts: alpha (h, w) in [0, 1], its full contrast in gray levels.

    Visible parts under `smallest` px are taken out of image and truth alike. `halo` (h, w) gray levels is
    added around what is left and is no truth: a burr, a lip, a rim. None when nothing is left.
    """
    labels, count = ndimage.label(alpha >= VISIBLE, EIGHT)
    if count == 0:
        return None
    kept = np.bincount(labels.ravel(), minlength=count + 1) >= smallest
    kept[0] = False
    mask: Bools = kept[labels]
    regions, count = ndimage.label(alpha > 0.02, EIGHT)
    shown = np.zeros(count + 1, dtype=bool)
    shown[np.unique(regions[mask])] = True
    shown[0] = False
    if not mask.any():
        return None
    seen = shown[regions]
    delta = np.where(seen, alpha * gray, 0.0).astype(np.float32)
    drawn = (delta != 0) | mask
    if halo is not None:
        near = ndimage.binary_dilation(seen, EIGHT, iterations=4)
        delta += np.where(near, halo, 0.0).astype(np.float32)
        drawn |= near & (halo != 0)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    return Stamp(
        name,
        y0 + int(rows[0]),
        x0 + int(columns[0]),
        delta[box].copy(),
        mask[box].copy(),
        np.where(seen[box], alpha[box], 0.0).astype(np.float32),
    )


@dataclass(frozen=True, slots=True)
class DarkField:
    """What a class sends back from light at a low angle, gray levels at full contrast.

    Polished strip throws such light away from the camera and stays dark. Rough matter scatters it (`body`),
    a sharp edge catches it all around (`edge`: the bright ring of a pit), and a gentle slope turns bright
    where it faces the lamp and dark where it does not (`flank`: dents and marks). What lies flat and is no
    rougher than the strip, such as a stain, has none of the three and shows in bright field alone.
    """

    body: float = 0.0
    edge: float = 0.0
    flank: float = 0.0


DARK_FIELDS: dict[str, DarkField] = {
    "inclusion": DarkField(body=-5, edge=26),
    "patches": DarkField(body=7),
    "scratches": DarkField(body=72),
    "pit": DarkField(body=-14, edge=95),
    "roll_mark": DarkField(edge=14, flank=62),
    "scale": DarkField(body=20, edge=22),
    "edge_crack": DarkField(body=-10, edge=70),
    "sliver": DarkField(body=8, edge=48, flank=34),
    "stain": DarkField(),
    "rubber_mark": DarkField(body=-9),
    "hole": DarkField(body=-30, edge=95),
    "bruise": DarkField(edge=6, flank=58),
    "coil_break": DarkField(flank=52),
    "chatter_mark": DarkField(flank=30),
    "roll_stop": DarkField(edge=10, flank=54),
    "bare_spot": DarkField(body=24, edge=42),
    "dross": DarkField(edge=30, flank=80),
    "air_knife_line": DarkField(flank=30),
    "white_rust": DarkField(body=46),
    "weld": DarkField(body=22, edge=26, flank=46),
    "water_drop": DarkField(body=-6, edge=66),
    "oil_drop": DarkField(body=-11),
}
LAMP = (0.8, 0.6)  # towards the dark-field lamp: along the strip, across it


def finished(stamp: Stamp, dark: bool) -> Stamp:
    """The stamp with what it adds in dark field, if asked, and without its cover, of no use from here on.

    Edges and slopes are those of the cover; what is strong in bright field is strong in dark field.
    """
    assert stamp.cover is not None
    if not dark:
        return replace(stamp, cover=None)
    seen = DARK_FIELDS[stamp.name]
    cover = np.pad(stamp.cover, 3, mode="edge")
    gray = seen.body * cover
    if seen.edge:
        down, across = np.gradient(ndimage.gaussian_filter(cover, 0.6))
        gray += seen.edge * np.minimum(2.2 * np.hypot(down, across), 1.0)
    if seen.flank:
        down, across = np.gradient(ndimage.gaussian_filter(cover, 1.6))
        gray += seen.flank * np.clip(5.0 * (LAMP[0] * down + LAMP[1] * across), -1.0, 1.0)
    gray *= np.clip(np.abs(stamp.delta).max() / 45.0, 0.55, 1.3)
    return replace(stamp, cover=None, dark=gray[3:-3, 3:-3].astype(np.float32))
