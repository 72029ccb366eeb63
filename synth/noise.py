"""Seeded noise on endless lattices: a value depends on its key and its place, never on who asks for it when.

Every generator is keyed by (seed, what it is for, where on the strip), so a line of a strip looks the same
whichever block it is asked for in, and blocks need not remember each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.uint8]
Bools = NDArray[np.bool_]


def generator(*key: int) -> np.random.Generator:
    """A counter-based generator that depends on its key alone (Salmon et al. 2011, Philox)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def taps(start: int, stop: int, cell: float) -> tuple[NDArray[np.int64], Doubles]:
    """Cubic B-spline knots of the positions start..stop-1: first knot (n,) and weights (4, n)."""
    at = np.arange(start, stop, dtype=np.float64) / cell
    knot = np.floor(at).astype(np.int64)
    t = at - knot
    weights = np.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3],
    )
    return knot, weights / 6.0


def lattice(key: tuple[int, ...], first: int, last: int, columns: int) -> Doubles:
    """Rows first..last-1 of an endless lattice of uniform values in [-1, 1): (last - first, columns)."""
    chunk = 16  # rows that share a generator
    parts = [
        generator(*key, index).random((chunk, columns))
        for index in range(first // chunk, (last - 1) // chunk + 1)
    ]
    skip = first - first // chunk * chunk
    return np.concatenate(parts)[skip : skip + last - first] * 2.0 - 1.0


def wave(key: tuple[int, ...], y0: int, y1: int, cell: float) -> Doubles:
    """A smooth random curve over lines y0..y1-1, within [-1, 1], correlated over about `cell` lines: (n,)."""
    knot, weights = taps(y0, y1, cell)
    values = lattice(key, int(knot[0]), int(knot[-1]) + 4, 1)[:, 0]
    at = knot - knot[0]
    curve: Doubles = np.zeros(y1 - y0)
    for k in range(4):
        curve += weights[k] * values[at + k]
    return curve


def cloud(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> Doubles:
    """Smooth noise of mean 0 and standard deviation about 1 for one shape: (height, width)."""
    ky, wy = taps(0, height, cell_y)
    kx, wx = taps(0, width, cell_x)
    values = rng.random((int(ky[-1]) + 4, int(kx[-1]) + 4)) * 2.0 - 1.0
    rows = sum(wy[k][:, None] * values[ky + k] for k in range(4))
    field: Doubles = sum(wx[k] * rows[:, kx + k] for k in range(4)) / 0.276  # 0.276: its own deviation
    return field
