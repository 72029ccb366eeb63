"""How a strip passes the camera: speed, encoder and time of each line, dropped lines, lamps that drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rollsight.synth.noise import Doubles, generator, wave

RUN_M_S = 8.0  # in the middle of the strip
THREAD_M_S = 1.2  # while the head is threaded, and again at the tail
RAMP_SHARE = 0.12  # of the strip is spent on speeding up, and as much on slowing down

DROPS_PER_KM = 20.0  # bursts of dropped lines; a strip of over 2 m has one at least
LONG_DROP_SHARE = 0.15  # of them last for dozens of lines, the others for one to eight

WARM_UP = 0.1  # how much brighter the lamp is when it has just been lit
WARM_UP_M = 60.0  # after which a third of that is left
WANDER = 0.05  # of the lamp over hundreds of metres
SLOW_LIGHT = 0.05  # how much more light a line gets at a standstill: the exposure lasts longer


@dataclass(frozen=True, slots=True)
class Travel:
    """Speed over the strip: threaded slowly, evenly faster, run, evenly slower.

    The camera is fired by the encoder, one count per line, so lines stay evenly apart in mm at any speed and
    only their times tell of the ramp. Without a ramp the strip runs at RUN_M_S from head to tail.
    """

    lines: int
    mm_per_line: float
    ramp: bool

    def speed(self, y0: int, y1: int) -> Doubles:
        """m/s at lines y0..y1-1: (n,)."""
        y = np.arange(y0, y1, dtype=np.float64)
        if not self.ramp:
            return np.full(y.shape, RUN_M_S)
        # v^2 grows evenly with the way under even acceleration
        share = np.clip(np.minimum(y, self.lines - 1 - y) / self._ramp_lines, 0.0, 1.0)
        speed: Doubles = np.sqrt(THREAD_M_S**2 + (RUN_M_S**2 - THREAD_M_S**2) * share)
        return speed

    def encoder(self, y0: int, y1: int) -> NDArray[np.int64]:
        """Encoder counts at lines y0..y1-1, one per line; they go on through dropped lines: (n,)."""
        return np.arange(y0, y1, dtype=np.int64)

    def t_ns(self, y0: int, y1: int) -> NDArray[np.int64]:
        """Nanoseconds since line 0 at lines y0..y1-1, strictly rising: (n,)."""
        y = np.arange(y0, y1, dtype=np.float64)
        metres = self.mm_per_line / 1000.0
        if not self.ramp:
            return np.rint(1e9 * y * metres / RUN_M_S).astype(np.int64)
        # Even acceleration a: t = (v - v0) / a, from either end; between the ramps the way over the speed.
        ramp_m = self._ramp_lines * metres
        a = (RUN_M_S**2 - THREAD_M_S**2) / (2 * ramp_m)
        up = (self.speed(y0, y1) - THREAD_M_S) / a
        whole = (RUN_M_S - THREAD_M_S) / a
        last = self.lines - 1 - self._ramp_lines  # the line that slowing down begins at
        run = whole + np.clip(y - self._ramp_lines, 0.0, None) * metres / RUN_M_S
        end = whole + (last - self._ramp_lines) * metres / RUN_M_S
        seconds = np.where(y < self._ramp_lines, up, np.where(y <= last, run, end + whole - up))
        return np.rint(1e9 * seconds).astype(np.int64)

    @property
    def _ramp_lines(self) -> float:
        return max(RAMP_SHARE * (self.lines - 1), 1e-6)


def dropped_lines(seed: int, lines: int, mm_per_line: float) -> list[tuple[int, int]]:
    """Half-open ranges of lines that the camera or the grabber lost, in order, none touching another."""
    rng = generator(seed, 30)
    metres = lines * mm_per_line / 1000.0
    count = int(rng.poisson(DROPS_PER_KM * metres / 1000.0)) + (metres > 2.0)
    ranges: list[tuple[int, int]] = []
    for start in sorted(int(at) for at in rng.integers(1, max(lines - 1, 2), count)):
        long = rng.random() < LONG_DROP_SHARE
        height = int(rng.integers(20, 120)) if long else int(rng.integers(1, 9))
        stop = min(start + height, lines)
        if start < stop and (not ranges or start > ranges[-1][1] + 8):
            ranges.append((start, stop))
    return ranges


def lamp(seed: int, mode: int, y0: int, y1: int, mm_per_line: float) -> Doubles:
    """How bright the lamp of a mode is at lines y0..y1-1, about 1: warming up, then wandering: (n,)."""
    y = np.arange(y0, y1, dtype=np.float64) * mm_per_line / 1000.0
    wander = WANDER * wave((seed, 33, mode), y0, y1, 40_000.0) + 0.4 * WANDER * wave(
        (seed, 34, mode), y0, y1, 5_000.0
    )
    light: Doubles = (1 + wander) * (1 + WARM_UP * np.exp(-y / WARM_UP_M) - 0.3 * WARM_UP)
    return light


def slow_light(speed: Doubles) -> Doubles:
    """The light on a line at this speed in m/s, relative to one at RUN_M_S: (n,)."""
    light: Doubles = 1 + SLOW_LIGHT * (1 - speed / RUN_M_S)
    return light


def joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges in order, those that overlap or touch as one."""
    merged: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], b))
        else:
            merged.append((a, b))
    return tuple(merged)
