"""A folder of TIFF, PNG or JPG strips in, a roll out; one file in memory at a time, nothing half-made."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFile
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.rolls import (
    IMAGE_DTYPES,
    MAX_LINES,
    MAX_MODES,
    MAX_WIDTH,
    SHARD_LINES,
    Roll,
    RollWriter,
    Strip,
    check_absent,
    check_roll_id,
    strip_problem,
)

TIFF_SUFFIXES = (".tif", ".tiff")
PILLOW_SUFFIXES = (".png", ".jpg", ".jpeg")
METADATA_NAMES = ("strip.json", "strip.yaml", "strip.yml")
DEFAULT_LIGHTING = ("bright",)
MAX_STRIP_BYTES = 2 * 2**30  # of one file's pixels, decoded: what ingest holds at a time
MAX_METADATA_BYTES = 2**16

# What tifffile decodes without its optional codec package: none, deflate (two numbers), packbits, LZMA.
_TIFFFILE_COMPRESSIONS = (1, 8, 32946, 32773, 34925)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # TIFF 6.0, PhotometricInterpretation
_PLANES_APART = 2  # TIFF 6.0, PlanarConfiguration
_PREVIEW = 1  # TIFF 6.0, NewSubfileType, bit 0
_PILLOW_MODES = {"L": (1, "uint8"), "I;16": (1, "uint16"), "I;16B": (1, "uint16"), "RGB": (3, "uint8")}
_LUMA = np.array([299, 587, 114], np.uint32)  # ITU-R BT.601, thousandths
_MANDATORY = ("mm_per_px_x", "mm_per_line", "side")
_TEXTS = ("line_id", "started_at", "heat", "grade", "flatfield_id")


@dataclass(frozen=True, slots=True)
class _Picture:
    """One strip file, from its header."""

    path: Path
    lines: int
    width: int  # px
    dtype: str  # "uint8" | "uint16"


def ingest_strips(
    folder: Path,
    destination: Path,
    strip: Strip,
    *,
    units: Literal["mm", "px"] = "mm",
    overwrite: bool = False,
    on_lines: Callable[[int, int | None], None] | None = None,
) -> Roll:
    """Stack the images of `folder`, in natural order, along the strip into the roll `destination`.

    destination is the roll's final place `<roll-id>.zarr`. Files are TIFF, PNG or JPG, uint8 or uint16, gray;
    RGB becomes its ITU-R BT.601 luma. `strip.json` or `strip.yaml` beside the images gives the Strip fields
    that `strip` leaves at None or (). units "px" allows a strip without mm_per_px_x, mm_per_line and side.
    on_lines(done, total) is called after each block of lines.

    UserError in one line that names the file: no images, mixed widths or depths, an unreadable image, one
    over 2 GiB decoded, a missing field (exit 2), an existing roll (exit 2). All headers are read before
    anything is written, and whatever stops it later leaves no roll.
    """
    folder, destination = Path(folder), Path(destination)
    check_roll_id(strip.roll_id)
    check_absent(destination, overwrite=overwrite)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name the folder that holds the strip images", USAGE)
    strip = _complete(strip, folder, units)
    pictures = _check_pictures(folder)
    first, total = pictures[0], sum(picture.lines for picture in pictures)
    if total > MAX_LINES:
        raise UserError(f"{folder} holds {total} lines: the limit of a roll is {MAX_LINES}")
    with RollWriter(
        destination, strip, first.width, first.dtype, total_lines=total, overwrite=overwrite
    ) as writer:
        done = 0
        for picture in pictures:
            pixels = _decode(picture)
            for y in range(0, picture.lines, SHARD_LINES):
                block = _gray(pixels[y : y + SHARD_LINES], first.dtype)
                writer.append(block[None])
                done += block.shape[0]
                if on_lines is not None:
                    on_lines(done, total)
            del pixels, block  # before the next file is decoded
        return writer.close()


def natural_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort key by name, its numbers as numbers: img2 before img10; then by plain name (img02, img2)."""
    parts = re.split(r"([0-9]+)", path.name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def _check_pictures(folder: Path) -> list[_Picture]:
    """The images of the folder in order, all of one width and depth, from their headers."""
    suffixes = (*TIFF_SUFFIXES, *PILLOW_SUFFIXES)
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(".")
    ]
    if not paths:
        raise UserError(f"{folder} holds no images: needed files that end in {', '.join(suffixes)}")
    pictures = [_read_header(path) for path in sorted(paths, key=natural_order)]
    first = pictures[0]
    for picture in pictures:
        if picture.width != first.width:
            raise UserError(
                f"{picture.path} is {picture.width} px wide but {first.path.name} is {first.width} px:"
                " all strips of a roll must have one width"
            )
        if picture.dtype != first.dtype:
            raise UserError(
                f"{picture.path} is {picture.dtype} but {first.path.name} is {first.dtype}:"
                " all strips of a roll must have one depth"
            )
    return pictures


def _read_header(path: Path) -> _Picture:
    """Sizes and depth, without decoding a pixel; UserError where they are not those of a strip."""
    with _reading(path):
        lines, width, samples, dtype = _tiff_header(path) if _is_tiff(path) else _pillow_header(path)
    if not (0 < width <= MAX_WIDTH and lines > 0):
        raise UserError(f"{path} is {width} x {lines} px: needed 1 to {MAX_WIDTH} px across")
    size = lines * width * samples * np.dtype(dtype).itemsize
    if size > MAX_STRIP_BYTES:
        raise UserError(
            f"{path} is {width} x {lines} px, {size / 2**30:.1f} GiB decoded: the limit of one file is"
            f" {MAX_STRIP_BYTES / 2**30:.0f} GiB; cut it along the strip"
        )
    return _Picture(path, lines, width, dtype)


def _is_tiff(path: Path) -> bool:
    """Whether tifffile decodes this file; pillow takes the rest, also LZW and JPEG inside TIFF."""
    if path.suffix.lower() not in TIFF_SUFFIXES:
        return False
    with tifffile.TiffFile(path) as tiff:
        # A preview is harmless; any other second page would be dropped in silence.
        if any(not page.subfiletype & _PREVIEW for page in itertools.islice(tiff.pages, 1, 17)):
            raise UserError(f"{path} has several pages: needed one strip per file")
        return tiff.pages.first.compression in _TIFFFILE_COMPRESSIONS


def _tiff_header(path: Path) -> tuple[int, int, int, str]:
    """Lines, px across, samples per pixel, dtype."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        kind, samples, dtype = int(page.photometric), int(page.samplesperpixel), str(page.dtype)
        if (kind, samples) not in ((_WHITE_IS_ZERO, 1), (_BLACK_IS_ZERO, 1), (_RGB, 3)):
            raise UserError(f"{path} has {samples} samples of photometric kind {kind}: needed gray or RGB")
        if dtype not in IMAGE_DTYPES or page.bitspersample not in (8, 16) or page.imagedepth != 1:
            raise UserError(f"{path} has {page.bitspersample} bits of {dtype}: needed uint8 or uint16")
        return int(page.imagelength), int(page.imagewidth), samples, dtype


def _pillow_header(path: Path) -> tuple[int, int, int, str]:
    """Lines, px across, samples per pixel, dtype."""
    with _open_image(path) as image:
        raw_mode = _raw_mode(image)
        # pillow would cut 16-bit RGB to 8 bits without a word.
        if image.mode not in _PILLOW_MODES or (image.mode == "RGB" and "16" in raw_mode):
            raise UserError(f"{path} holds pixels of kind {raw_mode}: needed gray, or RGB of 8 bits")
        samples, dtype = _PILLOW_MODES[image.mode]
        return image.height, image.width, samples, dtype


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the file itself stores a pixel, as pillow names it."""
    arguments = image.tile[0][3] if image.mode == "RGB" and image.tile else image.mode
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _decode(picture: _Picture) -> NDArray[Any]:
    """All pixels of one file: (lines, W) gray or (lines, W, 3) RGB; UserError where broken or changed."""
    path = picture.path
    with _reading(path):
        if _is_tiff(path):
            with tifffile.TiffFile(path) as tiff:
                page = tiff.pages.first
                pixels = np.asarray(page.asarray(maxworkers=1))
                if page.photometric == _WHITE_IS_ZERO:
                    pixels = np.invert(pixels)
                if page.samplesperpixel == 3 and page.planarconfig == _PLANES_APART:
                    pixels = np.moveaxis(pixels, 0, -1)
        else:
            with _open_image(path) as image:
                pixels = np.asarray(image)
    size = (picture.lines, picture.width)
    if pixels.shape not in (size, (*size, 3)) or pixels.dtype.newbyteorder("=") != np.dtype(picture.dtype):
        raise UserError(f"{path} changed while it was read: ingest the folder when it is complete")
    return pixels


def _gray(block: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Gray of the dtype: (h, W) or (h, W, 3) -> (h, W).

    ITU-R BT.601 luma, rounded; its weights sum to 1, so equal channels come out as they are.
    """
    if block.ndim == 3:
        luma = block[..., 0] * _LUMA[0] + block[..., 1] * _LUMA[1] + block[..., 2] * _LUMA[2]
        block = (luma + 500) // 1000
    return block.astype(dtype, copy=False)


@contextlib.contextmanager
def _open_image(path: Path) -> Iterator[ImageFile.ImageFile]:
    """pillow's image, opened but not decoded. Its own limit would refuse long strips; ours is in bytes."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a decoder raises on a broken file becomes one line that names it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the decoders do not document what they raise
        raise UserError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error


def _complete(strip: Strip, folder: Path, units: Literal["mm", "px"]) -> Strip:
    """`strip` with what the file beside the images says; UserError (exit 2) with the fields still missing."""
    given = [name for name in ("mm_per_px_x", "mm_per_line") if getattr(strip, name) is not None]
    if units == "px" and given:
        raise UserError(f"{' and '.join(given)} given together with units px: say only one of them", USAGE)
    said = _read_metadata(folder)
    if said.pop("units", "mm") == "px" and not given:
        units = "px"
    strip = replace(strip, **{name: said[name] for name in said if getattr(strip, name) in (None, ())})
    strip = replace(strip, lighting=strip.lighting or DEFAULT_LIGHTING)
    if units == "px":
        strip = replace(strip, mm_per_px_x=None, mm_per_line=None)
    elif missing := [name for name in _MANDATORY if getattr(strip, name) is None]:
        options = " ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(
            f"roll {strip.roll_id}: {', '.join(missing)} missing: say {options}, or write it in"
            f" {folder / METADATA_NAMES[1]}, or say --units px to do without millimetres",
            USAGE,
        )
    if (problem := strip_problem(strip)) is not None:
        raise UserError(f"roll {strip.roll_id} from {folder}: {problem}", USAGE)
    if len(strip.lighting) != 1:
        raise UserError(
            f"roll {strip.roll_id} from {folder}: lighting names {len(strip.lighting)} modes,"
            " a folder of strips holds one",
            USAGE,
        )
    return strip


def _read_metadata(folder: Path) -> dict[str, Any]:
    """Strip fields, and `units`, of strip.json or strip.yaml in the folder; {} where there is none."""
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if not found:
        return {}
    path = found[0]
    if len(found) > 1:
        raise UserError(f"{folder} holds {path.name} and {found[1].name}: keep one of them", USAGE)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_METADATA_BYTES + 1)
        if len(data) > MAX_METADATA_BYTES:
            raise UserError(f"{path} is over {MAX_METADATA_BYTES} bytes", USAGE)
        said = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}", USAGE) from error
    if not isinstance(said, dict):
        raise UserError(f"{path} must hold fields with values, not {type(said).__name__}", USAGE)
    known = {field.name for field in fields(Strip)} - {"roll_id", "closed", "lines"} | {"units"}
    if unknown := [str(name)[:40] for name in said if name not in known]:
        raise UserError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}", USAGE)
    for name, value in said.items():
        # Aliases let a small YAML file unfold into gigabytes of nested lists as soon as it is printed.
        entries = value if isinstance(value, list) and len(value) <= MAX_MODES else [value]
        if any(isinstance(entry, (list, dict, set, tuple)) for entry in entries):
            raise UserError(f"{path}: {name} must be a value or a list of up to {MAX_MODES}", USAGE)
    if said.get("units", "mm") not in ("mm", "px"):
        raise UserError(f"{path}: units is {str(said['units'])[:40]!r}: it must be mm or px", USAGE)
    if isinstance(said.get("lighting"), str):
        said["lighting"] = [said["lighting"]]
    # YAML reads a date, or a heat number of digits, as something else than the text it is.
    texts = {name: str(said[name]) for name in _TEXTS if said.get(name) is not None}
    said |= texts
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
