"""The gallery of the page: each crop a small picture of one defect, in true proportions, with its outline."""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.defect_mask import defect_mask
from rollsight.inspect.report.strip_map import Defects, Frame, nice
from rollsight.inspect.rolls import NOT_INSPECTED, Roll

ReadMask = Callable[
    [int, int], NDArray[np.uint8]
]  # lines [y0, y1) -> (y1 - y0, W), 0 background, i + 1 class i
Bools = NDArray[np.bool_]

CROPS = 60  # in the gallery
PICTURES = 120  # in the gallery: with more lighting modes fewer crops, so that the page stays under 8 MB
PER_CLASS = 3  # at least, of each class that was found
TILE = (300, 200)  # px: along, across
CONTEXT = 1.6  # of the defect's size is shown
MIN_PX = 32  # px of the roll across a crop: a pit is shown in its surroundings
THIN_PX = 2.5  # a defect that would be thinner in the crop is shown with its long side shrunk
BLOCK_LINES = 1024  # read at once
MIN_CONTRAST = 0.12  # of white: what at least spans black to white, so that noise on clean steel stays quiet
JPEG_QUALITY = 78
MODES = 3  # lighting modes shown of a defect, side by side
MAX_PATH = 5_000  # characters of an outline; a longer one is made coarser


@dataclass(frozen=True, slots=True)
class Bar:
    """A scale bar."""

    share: float  # per cent of the crop's side
    size: float  # mm or px


@dataclass(frozen=True, slots=True)
class Crop:
    """One picture per lighting mode and what is drawn over it."""

    images: tuple[bytes, ...]  # JPEG, TILE
    view: str  # the SVG view box that the outlines are in
    outline: str  # SVG path around this defect
    others: str  # SVG path around other defects in the crop
    along: Bar
    across: Bar
    shrunk: str | None  # "length" or "width" where that side is shrunk
    ratio: float  # how many times more the shrunk side is shrunk


def pick(defects: Defects, modes: int = 1) -> NDArray[np.int64]:
    """Rows of `defects` (largest first) for the gallery: the largest, with at least PER_CLASS per class."""
    count = min(CROPS, PICTURES // min(modes, MODES))
    kinds = np.unique(defects.kind)
    quota = per_class(len(kinds))
    must = [row for kind in kinds for row in np.flatnonzero(defects.kind == kind)[:quota]]
    rest = np.setdiff1d(np.arange(len(defects)), must)
    return np.sort(
        np.concatenate((np.array(must, np.int64), rest[: max(0, count - len(must))])).astype(np.int64)
    )


def per_class(kinds: int) -> int:
    """How many of each class the gallery holds at least: fewer only where classes are very many."""
    return min(PER_CLASS, max(1, PICTURES // MODES // max(kinds, 1)))


def crop(roll: Roll, read_mask: ReadMask, frame: Frame, box: NDArray[np.int64], kind: int) -> Crop:
    """Cut the defect of class index `kind` with box (x0, y0, x1, y1) px out of the roll, resampled to TILE.

    Any length is read block by block: memory is one block of lines whatever the defect's length.
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    along, across, shrunk = _view(frame, (y1 - y0) * frame.per_line, (x1 - x0) * frame.per_px)
    ratio = (along / TILE[0]) / (across / TILE[1])
    top = (y0 + y1) / 2 - along / frame.per_line / 2  # lines, may lie outside of the roll
    left = (x0 + x1) / 2 - across / frame.per_px / 2  # px, the same
    lines, width = along / frame.per_line, across / frame.per_px
    step_y, step_x = max(1, int(lines // (2 * TILE[0]))), max(1, int(width // (2 * TILE[1])))
    first, column = math.floor(top), math.floor(left)
    rows = math.ceil((top + lines - first) / step_y)
    columns = math.ceil((left + width - column) / step_x)

    image, own, others, seen = _reduced(
        roll, read_mask, (first, column), (rows, columns), (step_y, step_x), box, kind
    )
    at = first + (np.arange(rows) + 0.5) * step_y
    px = column + (np.arange(columns) + 0.5) * step_x
    seen &= (px >= frame.left(at)[:, None]) & (px < frame.right(at)[:, None])
    window = (
        (top - first) / step_y,
        (left - column) / step_x,
        (top - first + lines) / step_y,
        (left - column + width) / step_x,
    )
    return Crop(
        images=tuple(_jpeg(_stretch(mode, seen).T, window) for mode in image),
        view=f"{window[0]:.3f} {window[1]:.3f} {window[2] - window[0]:.3f} {window[3] - window[1]:.3f}",
        outline=_short_outline(own.T),
        others=_short_outline(others.T),
        along=_bar(along),
        across=_bar(across),
        shrunk=shrunk,
        ratio=max(ratio, 1 / ratio),
    )


def _view(frame: Frame, length: float, width: float) -> tuple[float, float, str | None]:
    """What a crop shows (along, across), mm or px, and the side that is shrunk for the other to be seen."""
    shape = TILE[0] / TILE[1]
    least = MIN_PX * max(frame.per_px, frame.per_line)
    across = max(CONTEXT * width, CONTEXT * length / shape, least)
    if min(length, width) * TILE[1] / across >= THIN_PX:
        return across * shape, across, None
    if length > width:
        return CONTEXT * length, max(6 * width, least), "length"
    return max(6 * length, least * shape), CONTEXT * width, "width"


def _reduced(
    roll: Roll,
    read_mask: ReadMask,
    origin: tuple[int, int],
    shape: tuple[int, int],
    steps: tuple[int, int],
    box: NDArray[np.int64],
    kind: int,
) -> tuple[NDArray[np.float32], Bools, Bools, Bools]:
    """The window at `origin` (line, px) as `shape` blocks of `steps` px.

    Returns the image (C, *shape) in [0, 1], the mean of each block, white outside of the roll; and (*shape),
    by any pixel of the block: this defect's mask, that of other defects, what was inspected.
    """
    (first, column), (rows, columns), (step_y, step_x) = origin, shape, steps
    x0, x1 = max(column, 0), min(column + columns * step_x, roll.width)
    modes = min(roll.modes, MODES)
    image = np.ones((modes, rows, columns), np.float32)
    own, others, seen = (np.zeros(shape, np.bool_) for _ in range(3))
    white = np.asarray(roll.white[:modes], np.float32)[:, None, None]
    stride = max(1, BLOCK_LINES // step_y)
    for row in range(0, rows, stride):
        count = min(stride, rows - row)
        begin = first + row * step_y
        y0, y1 = max(begin, 0), min(begin + count * step_y, roll.lines)
        if y0 >= y1:
            continue
        place = np.s_[y0 - begin : y1 - begin, x0 - column : x1 - column]
        block = np.ones((modes, count * step_y, columns * step_x), np.float32)
        block[:, *place] = np.minimum(roll.read(y0, y1)[:modes, :, x0:x1] / white, 1)
        blocks = block.reshape(modes, count, step_y, columns, step_x)
        image[:, row : row + count] = blocks.mean(axis=(2, 4))

        mask = read_mask(y0, y1)[:, x0:x1]
        lines, pixels = np.arange(y0, y1)[:, None], np.arange(x0, x1)[None, :]
        inside = (lines >= box[1]) & (lines < box[3]) & (pixels >= box[0]) & (pixels < box[2])
        mine = (mask == kind + 1) & inside
        found = (mask != 0) & (mask != NOT_INSPECTED) & ~mine
        for target, values in ((own, mine), (others, found), (seen, mask != NOT_INSPECTED)):
            flags = np.zeros((count * step_y, columns * step_x), np.bool_)
            flags[place] = values
            target[row : row + count] = flags.reshape(count, step_y, columns, step_x).any(axis=(1, 3))
    # Others of its class in its box are told apart once all lines are read: they are whole only then.
    in_blocks = (
        (int(box[0]) - column) // step_x,
        (int(box[1]) - first) // step_y,
        -((column - int(box[2])) // step_x),
        -((first - int(box[3])) // step_y),
    )
    one = defect_mask(own, in_blocks)
    return image, one, others | (own & ~one), seen


def _stretch(image: NDArray[np.float32], seen: Bools) -> NDArray[np.uint8]:
    """(h, w) in [0, 1] to uint8 over the range that the inspected strip in the picture uses."""
    low, high = np.percentile(image[seen] if bool(seen.any()) else image, (0.5, 99.5))
    spread = max(float(high - low), MIN_CONTRAST)
    low = (float(low) + float(high) - spread) / 2
    stretched: NDArray[np.uint8] = np.clip((image - low) / spread * 255, 0, 255).astype(np.uint8)
    return stretched


def _jpeg(image: NDArray[np.uint8], window: tuple[float, float, float, float]) -> bytes:
    """The window (left, top, right, bottom) of the image as a JPEG of TILE px."""
    box = (
        max(window[0], 0.0),
        max(window[1], 0.0),
        min(window[2], image.shape[1]),
        min(window[3], image.shape[0]),
    )
    out = io.BytesIO()
    picture = Image.fromarray(image).resize(TILE, Image.Resampling.BICUBIC, box=box)
    picture.save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return out.getvalue()


def data_uri(jpeg: bytes) -> str:
    """The JPEG as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _bar(side: float) -> Bar:
    """A scale bar of a round size, between a sixth and two fifths of the side."""
    size = nice(side / 6)
    return Bar(size / side * 100, size)


def _short_outline(mask: Bools) -> str:
    """The outline of a mask, its pixels taken together until the path has at most MAX_PATH characters."""
    path, step = outline(mask), 2
    while len(path) > MAX_PATH:
        height, width = (-(-size // step) * step for size in mask.shape)
        padded = np.pad(mask, ((0, height - mask.shape[0]), (0, width - mask.shape[1])))
        coarse = padded.reshape(height // step, step, width // step, step).any(axis=(1, 3))
        path, step = outline(coarse.repeat(step, axis=0).repeat(step, axis=1)), 2 * step
    return path


def outline(mask: Bools) -> str:
    """The borders of the True pixels of (h, w) as an SVG path in px: straight runs, exact and short."""
    padded = np.pad(mask, 1)
    parts = []
    level = padded[1:, 1:-1] != padded[:-1, 1:-1]  # (h + 1, w): a border above row i
    for i, start, stop in _runs(level):
        parts.append(f"M{start} {i}H{stop}")
    upright = padded[1:-1, 1:] != padded[1:-1, :-1]  # (h, w + 1): a border left of column j
    for j, start, stop in _runs(upright.T):
        parts.append(f"M{j} {start}V{stop}")
    return "".join(parts)


def _runs(borders: Bools) -> list[tuple[int, int, int]]:
    """Runs of True along the rows: (row, first column, column after the last)."""
    change = np.diff(np.pad(borders, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = np.argwhere(change == 1), np.argwhere(change == -1)
    return [(int(i), int(a), int(b)) for (i, a), (_, b) in zip(starts, stops, strict=True)]
