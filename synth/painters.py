"""The defects and the drops, one painter per class: a generator in, a stamp out.

Sizes are in pixels. The classes of hot-rolled strip come first, in the order in which they were first drawn:
every number they take from their generator is part of the strips they have made. Shapes after the field's
descriptions (Verein Deutscher Eisenhuettenleute, Surface defects in hot rolled flat steel products, 1996) and
after the public pictures of NEU (Song and Yan 2013) and GC10-DET (Lv et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from rollsight.synth.noise import Doubles, cloud
from rollsight.synth.stamps import VISIBLE, Stamp, cut


def ramp(values: Doubles, soft: float = 1.0) -> Doubles:
    """Signed distance in px (inside positive) to coverage in [0, 1], over `soft` px."""
    covered: Doubles = np.clip(values / soft + 0.5, 0.0, 1.0)
    return covered


def inclusion(rng: np.random.Generator) -> Stamp | None:
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
        rough = cloud(rng, height, 2, 7.0, 50.0)[:, :1]
        sway = cloud(rng, height, 2, 26.0, 50.0)[:, :1]
        edge = half * (1 - t**2) ** 0.7 * (1 + 0.22 * rough) - np.abs(x - cx - 1.1 * sway)
        alpha = np.maximum(alpha, np.where(t < 1, ramp(edge, rng.uniform(1.2, 2.4)), 0.0))
    gray = -rng.uniform(15.0, 58.0) * np.clip(1 + 0.12 * cloud(rng, height, width, 5.0, 3.0), 0.75, 1.3)
    return cut("inclusion", alpha, gray, smallest=10)


def patches(rng: np.random.Generator) -> Stamp | None:
    """A dark blotch with a frayed outline, or a few of them."""
    height, width = int(rng.integers(60, 330)), int(rng.integers(40, 190))
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None, :]
    shape = cloud(rng, height, width, 42.0, 26.0) + 0.35 * cloud(rng, height, width, 9.0, 6.0)
    level = 0.6 + 0.45 * shape - 1.7 * np.maximum(y**2 + x**2 - 0.15, 0.0) ** 1.3
    level = np.where(y**2 + x**2 < 1, level, -1.0)
    alpha = np.clip(level / rng.uniform(0.25, 0.7) + VISIBLE, 0.0, 1.0) ** 1.2
    alpha *= np.clip((1 - y**2 - x**2) / 0.12, 0.0, 1.0)
    gray = -rng.uniform(22.0, 62.0) * np.clip(1 + 0.13 * cloud(rng, height, width, 4.0, 3.0), 0.7, 1.4)
    return cut("patches", alpha, gray, smallest=60)


def short_scratches(rng: np.random.Generator) -> Stamp | None:
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
    strength = np.clip(0.85 + 0.15 * cloud(rng, height, 2, 12.0, 50.0)[:, :1], 0.7, 1.0)
    return cut("scratches", alpha, gray * strength, smallest=20)


def pits(rng: np.random.Generator) -> Stamp | None:
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
    return cut("pit", alpha, -rng.uniform(30.0, 72.0))


def scale(rng: np.random.Generator) -> Stamp | None:
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
        comet = ramp(np.where(y < cy, head, body), 1.6) * (1 - 0.35 * s)
        alpha = np.maximum(alpha, np.where(y < cy + tail, comet, 0.0))
    alpha *= np.clip(1 + 0.18 * cloud(rng, height, width, 2.5, 2.5), 0.55, 1.0)
    return cut("scale", alpha, -rng.uniform(22.0, 52.0), smallest=10)


def dent(rng: np.random.Generator) -> Stamp:
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
    stamp = cut("roll_mark", alpha, gray, smallest=40)
    assert stamp is not None  # the smallest radius leaves over 40 px
    h, w = stamp.mask.shape
    delta = stamp.delta + (
        0.5 * VISIBLE * 40.0 * rim[stamp.y0 : stamp.y0 + h, stamp.x0 : stamp.x0 + w]
    ).astype(np.float32)
    return replace(stamp, y0=0, x0=0, delta=delta)


def edge_crack(
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
        jag = cloud(rng, 2, span, 50.0, 4.0)[:1] * 0.8
        middle = start + np.clip(rng.normal(0.0, 0.25), -0.4, 0.4) * (depth - reach / 2) + jag
        half = rng.uniform(1.4, 3.2) * np.clip(1 - depth / reach, 0.0, 1.0) ** 0.6
        crack = np.where(depth < reach, ramp(half - np.abs(y - middle), 1.2), 0.0)
        alpha = np.maximum(alpha, crack)
    alpha[depth <= 0] = 0.0
    return cut("edge_crack", alpha, -rng.uniform(38.0, 75.0), smallest=10, y0=y_start, x0=x0)


def sliver(rng: np.random.Generator) -> Stamp | None:
    """One to three overlapped tongues of metal along rolling, the lip in shadow and its edge shining."""
    height, width = int(90 + 460 * rng.random() ** 1.7), 96
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha = np.zeros((height, width))
    lip = np.zeros((height, width))
    for number in range(int(min(rng.geometric(0.6), 3))):
        length = height * (0.92 if number == 0 else rng.uniform(0.25, 0.7))
        top = 3.0 + rng.random() * (height - length - 6.0)
        half = rng.uniform(3.0, 10.0) * (1.0 if number == 0 else 0.6)
        centre = width / 2 + rng.normal(0.0, 9.0) * (number > 0)
        t = np.clip((y - top) / length, 0.0, 1.0)
        torn = 0.09 * cloud(rng, height, 2, 4.0, 0.4) + 0.14 * cloud(rng, height, 2, 23.0, 0.4)
        sway = 2.2 * cloud(rng, height, 2, 70.0, 50.0)[:, :1]
        torn = np.where(x < centre + sway, torn[:, :1], torn[:, 1:])  # its two sides tear apart from another
        outline = half * (np.sin(math.pi * t**0.6) ** 0.7) * (1 + torn) - np.abs(x - centre - sway)
        tongue = np.where((t > 0) & (t < 1), ramp(outline, 1.6), 0.0)
        alpha = np.maximum(alpha, tongue)
        side = 1.0 if rng.random() < 0.5 else -1.0
        rim = np.clip(1 - np.abs(outline) / 1.6, 0.0, 1.0) * (tongue > 0)
        lip += rim * np.where(side * (x - centre - sway) > 0, 26.0, -30.0)
    streaks = cloud(rng, height, width, 50.0, 1.6)
    gray = -rng.uniform(16.0, 40.0) * np.clip(1 + 0.3 * streaks, 0.35, 1.7)
    return cut("sliver", alpha, gray, smallest=40, halo=lip)


def stain(rng: np.random.Generator) -> Stamp | None:
    """What a dried pool of rinse water or emulsion leaves: flat, blurred, darker along its outline."""
    height, width = int(rng.integers(50, 320)), int(rng.integers(40, 200))
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None, :]
    rough = 0.26 * cloud(rng, height, width, 50.0, 34.0) + 0.05 * cloud(rng, height, width, 9.0, 7.0)
    level = np.minimum(0.62, 0.9 - y**2 - x**2) + rough * np.clip(2.2 - 2.2 * (y**2 + x**2), 0.0, 1.0)
    alpha = np.clip(level / 0.16, 0.0, 1.0) * np.clip((1 - y**2 - x**2) / 0.1, 0.0, 1.0)
    rim = np.exp(-(((level - 0.14) / 0.09) ** 2))
    inner = 0.62 + 0.22 * np.clip(cloud(rng, height, width, 26.0, 14.0), -1.5, 1.5)
    gray = -rng.uniform(15.0, 34.0) * np.clip(np.maximum(inner, 1.25 * rim), 0.42, 1.4)
    return cut("stain", alpha, gray, smallest=100)


def rubber_mark(rng: np.random.Generator) -> Stamp | None:
    """One to five black smears that a rubber roll left: longer than wide, blunt start, thinning end."""
    height, width = 300, 72
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha = np.zeros((height, width))
    for _ in range(int(min(rng.geometric(0.45), 5))):
        length = 18.0 + 190.0 * rng.random() ** 2
        top = rng.uniform(4.0, height - length - 4.0)
        centre = width / 2 + rng.normal(0.0, 10.0)
        half = rng.uniform(1.6, 4.6)
        t = (y - top) / length
        frayed = cloud(rng, height, width, 16.0, 1.4)
        body = half * np.clip(1 - t, 0.0, 1.0) ** 0.35 * (1 + 0.2 * frayed) - np.abs(x - centre)
        faded = np.clip(1.15 - 0.75 * t + 0.15 * frayed, 0.0, 1.0)
        alpha = np.maximum(alpha, np.where((t >= 0) & (t < 1), ramp(body, 1.4) * faded, 0.0))
    return cut("rubber_mark", alpha, -rng.uniform(48.0, 88.0), smallest=20)


def hole(rng: np.random.Generator) -> Stamp | None:
    """A hole with a torn outline and a bright burr; through it the camera sees the dark below."""
    size = 72
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    squeeze = rng.uniform(1.0, 2.2)  # drawn out along rolling
    angle, distance = np.arctan2(y / squeeze, x), np.hypot(y / squeeze, x)
    torn = sum(rng.uniform(0, 0.3) / k * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(1, 9))
    radius = (2.2 + 11.0 * rng.random() ** 1.5) * (1 + torn)
    alpha = np.clip(radius - distance + 0.5, 0.0, 1.0)
    burr = np.clip(1 - np.abs(distance - radius - 1.3) / 1.3, 0.0, 1.0)
    lit = 0.6 + 0.4 * np.cos(angle - rng.uniform(0, 6.28))
    return cut("hole", alpha, -220.0, smallest=10, halo=rng.uniform(25.0, 50.0) * burr * lit)


def bruise(rng: np.random.Generator) -> Stamp | None:
    """One to four shallow dents from handling, each with a lit and a shaded flank."""
    height, width = 150, 110
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha, shade = np.zeros((height, width)), np.zeros((height, width))
    for _ in range(int(min(rng.geometric(0.5), 4))):
        cy, cx = rng.uniform(28.0, height - 28.0), rng.uniform(24.0, width - 24.0)
        long, short, turn = rng.uniform(7.0, 22.0), rng.uniform(4.0, 9.0), rng.uniform(0, math.pi)
        along = (y - cy) * math.cos(turn) + (x - cx) * math.sin(turn)
        aside = (x - cx) * math.cos(turn) - (y - cy) * math.sin(turn) + 0.012 * along**2
        depth = 1 - (along / long) ** 2 - (aside / short) ** 2
        alpha = np.maximum(alpha, np.clip(1.8 * depth, 0.0, 1.0))
        shade += np.where(depth > 0, 0.55 + 1.5 * aside / short, 0.0)
    gray = -rng.uniform(18.0, 34.0) * np.clip(shade, -0.9, 1.8)
    return cut("bruise", alpha, gray, smallest=30)


def coil_break(rng: np.random.Generator) -> Stamp | None:
    """Creases across rolling, at uneven distances, where the strip kinked as it was uncoiled."""
    count = int(rng.integers(3, 10))
    steps = rng.uniform(11.0, 34.0, count)
    height, width = int(steps.sum()) + 24, int(70 + 350 * rng.random() ** 1.8)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha, lit = np.zeros((height, width)), np.zeros((height, width))
    bow = rng.normal(0.0, 4.0) * (2 * x / width - 1) ** 2
    for place in 10.0 + np.cumsum(steps) - steps[0]:
        a, b = np.sort(rng.random(2)) * (0.4, 0.55) + (0.0, 0.45)
        span = np.clip(np.minimum(x - a * width, b * width - x) / 9.0, 0.0, 1.0)
        middle = place + bow + 1.3 * cloud(rng, 2, width, 50.0, 22.0)[:1]
        strength = np.clip(0.85 + 0.2 * cloud(rng, 2, width, 50.0, 30.0)[:1], 0.5, 1.0) * span
        alpha = np.maximum(alpha, np.clip(2.1 - np.abs(y - middle), 0.0, 1.0) * strength)
        lit += 20.0 * np.clip(1.8 - np.abs(y - middle - 3.2), 0.0, 1.0) * strength
    return cut("coil_break", alpha, -rng.uniform(18.0, 36.0), smallest=24, halo=lit)


def bare_spot(rng: np.random.Generator) -> Stamp | None:
    """One spot, or a scatter of them, where zinc did not wet the steel: dark, with a thick bright rim."""
    height, width = 150, 90
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha, rim = np.zeros((height, width)), np.zeros((height, width))
    frayed = cloud(rng, height, width, 3.2, 3.2)
    for number in range(int(min(rng.geometric(0.4), 8))):
        spread = 0.0 if number == 0 else 1.0
        cy = float(np.clip(height / 2 + spread * rng.normal(0.0, 26.0), 18, height - 19))
        cx = float(np.clip(width / 2 + spread * rng.normal(0.0, 15.0), 18, width - 19))
        radius = 1.8 + 8.0 * rng.random() ** 2.2
        level = radius - np.hypot((y - cy) / rng.uniform(1.0, 1.5), x - cx) + 0.14 * radius * frayed
        alpha = np.maximum(alpha, ramp(level, 1.4))
        rim = np.maximum(rim, np.clip(1 - np.abs(level + 1.9) / 1.7, 0.0, 1.0))
    gray = -rng.uniform(42.0, 84.0) * np.clip(1 + 0.12 * frayed, 0.7, 1.3)
    return cut("bare_spot", alpha, gray, halo=rng.uniform(12.0, 26.0) * rim * (alpha < 0.3))


def dross(rng: np.random.Generator) -> Stamp | None:
    """One grain of dross under the zinc, or up to twenty: small bumps, each with a glint and a shadow."""
    height, width = 190, 100
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha, glint = np.zeros((height, width)), np.zeros((height, width))
    placed: list[tuple[float, float]] = []
    for _ in range(int(min(rng.geometric(0.16), 20))):
        cy = float(np.clip(rng.normal(height / 2, 38.0), 8, height - 9))
        cx = float(np.clip(rng.normal(width / 2, 19.0), 8, width - 9))
        if any(math.hypot(cy - a, cx - b) < 11.0 for a, b in placed):
            continue
        placed.append((cy, cx))
        radius = rng.uniform(1.5, 3.6)
        alpha = np.maximum(alpha, np.clip(radius + 0.5 - np.hypot(y - cy, x - cx), 0.0, 1.0))
        spark = np.hypot(y - cy - 0.35 * radius, x - cx - 0.35 * radius)
        glint = np.maximum(glint, np.clip(0.55 * radius + 0.5 - spark, 0.0, 1.0))
    dark, bright = rng.uniform(34.0, 62.0), rng.uniform(50.0, 95.0)
    return cut("dross", alpha, bright * glint - dark * (1 - glint), smallest=5)


def air_knife_line(rng: np.random.Generator) -> Stamp | None:
    """A soft line along rolling, or two side by side, where a clogged air knife left zinc too thick."""
    height, width = int(220 + 900 * rng.random() ** 1.5), 64
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    ends = np.clip(np.minimum(y + 1, height - y) / 60.0, 0.0, 1.0)
    alpha, beside = np.zeros((height, width)), np.zeros((height, width))
    for number in range(1 if rng.random() < 0.6 else 2):
        centre = width / 2 + 13.0 * number + 2.6 * cloud(rng, height, 2, 130.0, 50.0)[:, :1]
        half = rng.uniform(1.6, 3.4)
        strength = np.clip(0.9 + 0.16 * cloud(rng, height, 2, 45.0, 50.0)[:, :1], 0.5, 1.0) * ends
        alpha = np.maximum(alpha, np.clip((half - np.abs(x - centre)) / 2.4 + 0.5, 0.0, 1.0) * strength)
        beside -= 9.0 * np.clip(1 - np.abs(x - centre - half - 2.5) / 2.5, 0.0, 1.0) * strength
    return cut("air_knife_line", alpha, rng.uniform(18.0, 32.0), smallest=60, halo=beside)


def white_rust(rng: np.random.Generator) -> Stamp | None:
    """A powdery field of zinc hydroxide: dull in the mirror of bright field, white in dark field."""
    height, width = int(rng.integers(50, 220)), int(rng.integers(40, 130))
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None, :]
    powder = 0.6 * cloud(rng, height, width, 9.0, 7.0) + 0.5 * cloud(rng, height, width, 3.0, 2.6)
    level = 0.62 - 1.1 * (y**2 + x**2) + 0.42 * powder
    alpha = np.clip(level / 0.8 + 0.1, 0.0, 1.0) * np.clip((1 - y**2 - x**2) / 0.3, 0.0, 1.0)
    gray = -rng.uniform(24.0, 46.0) * np.clip(1 + 0.22 * powder, 0.6, 1.4)
    return cut("white_rust", alpha, gray, smallest=24)


def water_drops(rng: np.random.Generator) -> Stamp | None:
    """One to twelve drops of water: a lens with a dark rim, a lighter middle and the lamp's glint."""
    height, width = 210, 130
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha, gray = np.zeros((height, width)), np.zeros((height, width))
    for _ in range(int(min(rng.geometric(0.25), 12))):
        radius = 3.2 + 11.0 * rng.random() ** 2
        cy = float(np.clip(rng.normal(height / 2, 42.0), 26, height - 27))
        cx = float(np.clip(rng.normal(width / 2, 25.0), 20, width - 21))
        squeeze, lobe = rng.uniform(1.0, 1.6), rng.uniform(0.0, 6.28)
        angle = np.arctan2(y - cy, x - cx)
        distance = np.hypot((y - cy) / squeeze, x - cx) / (1 + 0.08 * np.cos(2 * angle + lobe)) / radius
        inside = np.clip((1 - distance) * radius + 0.5, 0.0, 1.0)
        lens = np.where(distance < 0.72, 12.0 - 10.0 * (y - cy) / radius, -46.0)
        spark = np.hypot(y - cy + 0.4 * radius, x - cx + 0.3 * radius)
        lens += 85.0 * np.clip(0.16 * radius + 0.7 - spark, 0.0, 1.0)
        gray = np.where(inside > alpha, lens, gray)
        alpha = np.maximum(alpha, inside)
    return cut("water_drop", alpha, gray, smallest=12)


def oil_drops(rng: np.random.Generator) -> Stamp | None:
    """One to five drops of oil: smooth, dark, drawn out along rolling, with a pale fringe."""
    height, width = 260, 120
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    alpha, fringe = np.zeros((height, width)), np.zeros((height, width))
    for _ in range(int(min(rng.geometric(0.4), 5))):
        radius = 5.0 + 15.0 * rng.random() ** 1.8
        cy = float(np.clip(rng.normal(height / 2 - 20, 40.0), 30, height - 90))
        cx = float(np.clip(rng.normal(width / 2, 20.0), 28, width - 29))
        run = rng.uniform(1.0, 3.0)  # wind and motion pull the drop backwards
        distance = np.hypot(np.where(y > cy, (y - cy) / run, y - cy), x - cx) / radius
        alpha = np.maximum(alpha, np.clip(1.9 * (1.06 - distance), 0.0, 1.0))
        fringe = np.maximum(fringe, np.clip(1 - np.abs(distance - 1.12) / 0.14, 0.0, 1.0))
    gray = -rng.uniform(20.0, 40.0) * np.clip(1 + 0.07 * cloud(rng, height, width, 20.0, 14.0), 0.8, 1.2)
    return cut("oil_drop", alpha, gray, smallest=40, halo=rng.uniform(5.0, 11.0) * fringe * (alpha < 0.4))


Painter = Callable[[np.random.Generator], Stamp | None]

PAINTERS: dict[str, Painter] = {
    "patches": patches,
    "inclusion": inclusion,
    "scale": scale,
    "scratches": short_scratches,
    "pit": pits,
    "sliver": sliver,
    "stain": stain,
    "rubber_mark": rubber_mark,
    "hole": hole,
    "bruise": bruise,
    "coil_break": coil_break,
    "bare_spot": bare_spot,
    "dross": dross,
    "air_knife_line": air_knife_line,
    "white_rust": white_rust,
    "water_drop": water_drops,
    "oil_drop": oil_drops,
}
"""Class -> what draws one group of it, anywhere on the strip. Edge cracks and roll marks have their own."""

NEAR_EDGES = ("air_knife_line", "white_rust")  # three of four lie in the outer fifth of the strip
