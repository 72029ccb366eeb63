"""The contact sheet docs/surfaces.png: each surface in both lighting modes, a close-up of each class.

Run by hand where the simulated coil changes: `python bench/_surfaces.py`. All of it is simulated strip.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rollsight.synth.strip import LIGHTINGS, MARKERS, SURFACES, SimulatedStrip

SHEET = Path(__file__).parents[1] / "docs" / "surfaces.png"
WINDOWS = {"hot-rolled": (6, 900), "cold-rolled": (4, 1850), "galvanised": (4, 4000)}  # seed, first line
PANEL_W, PANEL_H = 320, 220  # px of the sheet, half of those of the strip
CLOSE_UP = 84  # px of the sheet
COLUMNS = 5
TEXT, GAP = 16, 8
LEVELS = 5  # gray levels that become one: the sheet is to stay under 400 kB
PAPER, INK = 255, 30
WIDTH = 3 * PANEL_W + 4 * GAP


def main() -> None:
    close_ups = [(surface, name) for surface in SURFACES for name in classes_first_seen_on(surface)]
    rows = -(-len(close_ups) // COLUMNS)
    top = TEXT + 2 * (PANEL_H + GAP) + 2 * GAP
    sheet = Image.new("L", (WIDTH, top + rows * (CLOSE_UP + TEXT + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, (surface, (seed, y0)) in enumerate(WINDOWS.items()):
        x = GAP + column * (PANEL_W + GAP)
        draw.text((x, 2), f"{surface}: bright field above, dark field below", INK, font)
        strip = SimulatedStrip(
            12.0, seed, 2 * PANEL_W, surface=surface, lighting=LIGHTINGS, density=3.0, blackouts=()
        )
        for mode, image in enumerate(strip.block(y0, y0 + 2 * PANEL_H)[0]):
            sheet.paste(shrunk(image, PANEL_W, PANEL_H), (x, TEXT + mode * (PANEL_H + GAP)))
    step = (WIDTH - GAP) // COLUMNS
    pictures = [(name, close_up(surface, name)) for surface, name in close_ups]
    pictures += [("head as rolled", head("hot-rolled")), ("head sheared", head("cold-rolled"))]
    for number, (name, images) in enumerate(pictures):
        x, y = GAP + number % COLUMNS * step, top + number // COLUMNS * (CLOSE_UP + TEXT + GAP)
        for mode, image in enumerate(images):
            sheet.paste(shrunk(image, CLOSE_UP, CLOSE_UP), (x + mode * (CLOSE_UP + 2), y))
        draw.text((x, y + CLOSE_UP + 1), name, INK, font)
    SHEET.parent.mkdir(exist_ok=True)
    sheet.save(SHEET, optimize=True)


def classes_first_seen_on(surface: str) -> list[str]:
    """The classes that no surface before this one has; the markers with the last."""
    earlier = list(SURFACES)[: list(SURFACES).index(surface)]
    seen = {name for other in earlier for name in SURFACES[other].classes}
    markers = MARKERS if surface == list(SURFACES)[-1] else ()
    return [name for name in (*SURFACES[surface].classes, *markers) if name not in seen]


def close_up(surface: str, name: str) -> NDArray[np.uint8]:
    """Both modes of the strip around one defect of middling size: (2, n, n)."""
    strip = SimulatedStrip(16.0, 2, 900, surface=surface, lighting=LIGHTINGS, density=4.0, blackouts=())
    found = sorted(
        (row for row in strip.truth.to_pylist() if row["class"] == name), key=lambda row: row["area_px"]
    )
    row = found[2 * len(found) // 3]
    size = int(np.clip(1.15 * max(min(row["x1"] - row["x0"], 300), min(row["y1"] - row["y0"], 300)), 84, 300))
    y, x = ((row[a] + row[b]) // 2 - size // 2 for a, b in (("y0", "y1"), ("x0", "x1")))
    y, x = (int(np.clip(at, 0, end - size)) for at, end in ((y, strip.lines), (x, strip.width_px)))
    return strip.block(y, y + size)[0][:, :, x : x + size]


def head(surface: str) -> NDArray[np.uint8]:
    """Both modes of the first lines of a strip: (2, n, n)."""
    strip = SimulatedStrip(12.0, 6, 640, surface=surface, lighting=LIGHTINGS, effects=("ends",), clean=True)
    return strip.block(0, 640)[0]


def shrunk(image: NDArray[np.uint8], width: int, height: int) -> Image.Image:
    """The image at the given size, in few gray levels."""
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX), dtype=np.float64)
    return Image.fromarray((np.rint(small / LEVELS) * LEVELS).clip(0, 250).astype(np.uint8))


if __name__ == "__main__":
    main()
