"""Where there is strip in the image: two edges that wander, a head and a tail that end unevenly."""

from __future__ import annotations

import numpy as np
from rollsight.synth.noise import Doubles, Floats, Mask, cloud, generator, wave

MIN_WIDTH_PX = 128


class Outline:
    """The strip's outline in the camera's field; the drive side is the left.

    The strip takes about 95 % of the field and wanders in it. With `ends` the head and the tail lie within
    the image: `sheared` ones are cut straight and a little askew, others are the tongue or the fish tail
    that rolling leaves. `head` and `tail` are the numbers of lines at either end that they reach into.
    """

    def __init__(self, seed: int, lines: int, width_px: int, *, ends: bool, sheared: bool) -> None:
        self.seed = seed
        self.lines = lines
        self.width_px = width_px
        self.margin = max(0.025 * width_px, 14.0)  # px of background each side; the wander stays within it
        self._head: Doubles | None = None  # (width_px,): lines before the strip begins
        self._tail: Doubles | None = None  # (width_px,): lines after the strip has ended
        self.head = self.tail = 0
        if ends:
            self._head, self._tail = (self._end(key, sheared) for key in (31, 32))
            self.head, self.tail = (int(end.max()) + 3 for end in (self._head, self._tail))

    def edges(self, y0: int, y1: int) -> tuple[Doubles, Doubles]:
        """The edges at lines y0..y1-1, px from the left of the image: (n,) each."""
        left, right = self.sides(y0, y1)
        rough = 0.6
        return (
            left + rough * wave((self.seed, 13), y0, y1, 12.0),
            right + rough * wave((self.seed, 14), y0, y1, 12.0),
        )

    def sides(self, y0: int, y1: int) -> tuple[Doubles, Doubles]:
        """The two edges without their roughness: slow wander of the whole strip, slower change of width."""
        room = self.margin - 4.0
        wander = room * (
            0.6 * wave((self.seed, 10), y0, y1, 6000.0) + 0.28 * wave((self.seed, 11), y0, y1, 1500.0)
        )
        narrower = 0.06 * room * (1 + wave((self.seed, 12), y0, y1, 4000.0))
        return self.margin + wander + narrower, self.width_px - self.margin + wander - narrower

    def cut_out(self, y0: int, y1: int, gray: Floats, white: Mask, image: Mask) -> None:
        """Put background beyond the outline and let the light fall off towards the edges, in `image` (h, W).

        gray (h, W): the strip's gray levels; white (h or more, W): white bytes, the noise of the background.
        """
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
            mixed = covered * shade * gray[:, a:b] + (1 - covered) * background(white[: y1 - y0, a:b])
            image[:, a:b] = mixed.astype(np.uint8)
        if y0 < self.head or self.lines - self.tail < y1:
            covered = self._between_ends(y0, y1)
            mixed = covered * image + (1 - covered) * background(white[: y1 - y0])
            image[:] = mixed.astype(np.uint8)

    def _between_ends(self, y0: int, y1: int) -> Doubles:
        """How much of each pixel lies between head and tail, in [0, 1]: (y1 - y0, width_px)."""
        assert self._head is not None and self._tail is not None
        y = np.arange(y0, y1, dtype=np.float64)[:, None]
        covered: Doubles = np.clip(np.minimum(y + 1 - self._head, self.lines - self._tail - y), 0.0, 1.0)
        return covered

    def _end(self, key: int, sheared: bool) -> Doubles:
        """Lines between the end of the image and the end of the strip, per column: (width_px,)."""
        rng = generator(self.seed, key)
        u = np.clip(np.linspace(-1.05, 1.05, self.width_px), -1.0, 1.0)
        gap = rng.uniform(8.0, 40.0)
        if sheared:
            askew = rng.uniform(-26.0, 26.0)
            shape = np.abs(askew) + askew * u + 0.7 * cloud(rng, 2, self.width_px, 50.0, 5.0)[0]
        else:
            depth = rng.uniform(90.0, 300.0)
            bulge = np.abs(u - rng.uniform(-0.2, 0.2)) ** rng.uniform(1.6, 2.6)
            shape = depth * (bulge if rng.random() < 0.5 else 1.2 - bulge)  # tongue or fish tail
            ragged = 0.05 * cloud(rng, 2, self.width_px, 50.0, 90.0)[0]
            shape = shape + depth * (ragged + 0.012 * cloud(rng, 2, self.width_px, 50.0, 9.0)[0])
        whole = gap + np.maximum(shape - shape.min(), 0.0)
        longest = 0.1 * self.lines  # a short strip has short ends
        end: Doubles = whole * min(1.0, longest / whole.max())
        return end


def background(white: Mask) -> Doubles:
    """The table under the strip, which reflects little: 1 to 8."""
    gray: Doubles = 1.0 + (white >> 5).astype(np.float64)
    return gray
