"""What lies across the whole width of the strip: chatter marks, roll stops, the weld."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rollsight.synth.noise import Doubles, cloud, generator
from rollsight.synth.outline import Outline
from rollsight.synth.stamps import VISIBLE, Stamp

CHATTER_PITCH_MM = (16.0, 60.0)  # of the marks that a swinging mill stand leaves
BAR_LINES = {"weld": 52, "roll_stop": 26}  # the stamp's height


@dataclass(frozen=True, slots=True)
class Bars:
    """One weld or roll stop, or a field of chatter marks: evenly spaced bars from edge to edge."""

    name: str
    index: int
    y0: int  # first line
    pitch: float  # lines
    count: int
    height: int  # lines of one bar
    group: int | None = None  # periodic_group of chatter marks

    @property
    def y1(self) -> int:
        """The line after the last."""
        return self._start(self.count - 1) + self.height

    def stamps(self, outline: Outline, y0: int, y1: int) -> Iterator[Stamp]:
        """The bars that reach lines y0..y1-1."""
        for k in range(self.count):
            start = self._start(k)
            if start < y1 and y0 < start + self.height:
                yield self._bar(outline, start)

    def _start(self, k: int) -> int:
        return self.y0 + round(k * self.pitch)

    def _bar(self, outline: Outline, y0: int) -> Stamp:
        # Chatter marks of a field are alike: one generator for all of them, as one vibration made them.
        rng = generator(outline.seed, 36, self.index)
        alpha, gray = BARS[self.name](rng, self.height, outline.width_px)
        left, right = outline.edges(y0, y0 + self.height)
        middle = np.arange(outline.width_px) + 0.5
        inside = (middle > left[:, None]) & (middle < right[:, None])
        return Stamp(
            self.name,
            y0,
            0,
            gray.astype(np.float32),
            (alpha >= VISIBLE) & inside,
            alpha.astype(np.float32),
            self.group,
        )


def chatter_bar(rng: np.random.Generator, height: int, width: int) -> tuple[Doubles, Doubles]:
    """A faint bar, swelling and fading across the width: its cover and its gray levels, (height, width)."""
    y = (np.arange(height) + 0.5) / height
    profile = np.sin(np.pi * y) ** 1.4
    across = np.clip(0.82 + 0.12 * cloud(rng, 2, width, 50.0, 90.0)[:1], 0.6, 1.0)
    alpha: Doubles = profile[:, None] * across
    return alpha, -rng.uniform(13.0, 22.0) * alpha


def roll_stop(rng: np.random.Generator, height: int, width: int) -> tuple[Doubles, Doubles]:
    """A line across where a roll stood still on the strip, with a lighter line beside it."""
    y, across = _across(rng, height, width, bow=3.5)
    half = rng.uniform(1.4, 3.2)
    strength = np.clip(0.86 + 0.12 * cloud(rng, 2, width, 50.0, 40.0)[:1], 0.6, 1.0)
    alpha = np.clip(half + 0.5 - np.abs(y - across), 0.0, 1.0) * strength
    beside = np.clip(1.6 - np.abs(y - across - half - 2.0), 0.0, 1.0) * strength
    return alpha, -rng.uniform(26.0, 46.0) * alpha + rng.uniform(10.0, 20.0) * beside


def weld(rng: np.random.Generator, height: int, width: int) -> tuple[Doubles, Doubles]:
    """The seam to the next coil: a rippled bead between two dark lines, the steel beside it heat-tinted."""
    y, across = _across(rng, height, width, bow=1.5)
    half = rng.uniform(4.5, 7.5)
    off = y - across
    edge = half + 0.7 * cloud(rng, 2, width, 50.0, 3.0)[:1]
    bead = np.clip(edge - np.abs(off) + 0.5, 0.0, 1.0)
    ripple = cloud(rng, height, width, 2.6, 3.4)
    notch = np.clip(1 - np.abs(np.abs(off) - edge) / 1.6, 0.0, 1.0)
    tint = np.exp(-((off / (2.3 * half)) ** 2))
    gray = bead * (14.0 + 17.0 * ripple) - 52.0 * notch - rng.uniform(12.0, 24.0) * tint
    return bead, gray


def _across(rng: np.random.Generator, height: int, width: int, bow: float) -> tuple[Doubles, Doubles]:
    """Line numbers (height, 1), and the middle of a slightly bowed and wavy line across (1, width)."""
    u = np.linspace(-1.0, 1.0, width)[None, :]
    middle = height / 2 + rng.uniform(-bow, bow) * (u**2 - 0.5) + 0.3 * cloud(rng, 2, width, 50.0, 60.0)[:1]
    return np.arange(height, dtype=np.float64)[:, None] + 0.5, middle


BARS = {"chatter_mark": chatter_bar, "roll_stop": roll_stop, "weld": weld}


def chatter_field(rng: np.random.Generator, index: int, group: int, mm_per_line: float) -> Bars:
    """A field of chatter marks at its pitch, its place (`y0`) still to be found."""
    pitch = max(rng.uniform(*CHATTER_PITCH_MM) / mm_per_line, 6.0)
    count = int(rng.integers(6, 22))
    return Bars("chatter_mark", index, 0, pitch, count, max(int(0.6 * pitch), 4), group)
