"""The pixels of TIFF, PNG, JPG and BMP files: sizes from the header first, then the whole file in gray."""

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin
from rollsight.inspect.errors import UserError
from rollsight.inspect.roll_format import IMAGE_DTYPES, MAX_WIDTH

TIFF_SUFFIXES = (".tif", ".tiff")
PILLOW_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
SUFFIXES = (*TIFF_SUFFIXES, *PILLOW_SUFFIXES)
MAX_DECODED_BYTES = 2 * 2**30  # of one file, or of one file per lighting mode: what ingest holds at a time

# What tifffile decodes without its optional codec package: none, deflate (two numbers), packbits, LZMA.
_TIFFFILE_COMPRESSIONS = (1, 8, 32946, 32773, 34925)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # TIFF 6.0, PhotometricInterpretation
_PLANES_APART = 2  # TIFF 6.0, PlanarConfiguration
_PREVIEW = 1  # TIFF 6.0, NewSubfileType, bit 0
_PILLOW_MODES = {"L": (1, "uint8"), "I;16": (1, "uint16"), "I;16B": (1, "uint16"), "RGB": (3, "uint8")}
_LUMA = np.array([299, 587, 114], np.uint32)  # ITU-R BT.601, thousandths

# It tells of broken files on stderr; here they become one line, and the core is silent.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Picture:
    """One image file, from its header."""

    path: Path
    lines: int
    width: int  # px
    dtype: str  # "uint8" | "uint16"
    samples: int  # 1 gray, 3 RGB

    @property
    def decoded_bytes(self) -> int:
        return self.lines * self.width * self.samples * np.dtype(self.dtype).itemsize


def read_header(path: Path) -> Picture:
    """Sizes and depth, without decoding a pixel; UserError where they are not those of a strip."""
    with _reading(path):
        lines, width, samples, dtype = _tiff_header(path) if _is_tiff(path) else _pillow_header(path)
    if not (0 < width <= MAX_WIDTH and lines > 0):
        raise UserError(f"{path} is {width} x {lines} px: needed 1 to {MAX_WIDTH} px across")
    picture = Picture(path, lines, width, dtype, samples)
    if picture.decoded_bytes > MAX_DECODED_BYTES:
        raise UserError(
            f"{path} is {width} x {lines} px, {picture.decoded_bytes / 2**30:.1f} GiB decoded: the limit of"
            f" one file is {MAX_DECODED_BYTES / 2**30:.0f} GiB; cut it along the strip"
        )
    return picture


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


def decode(picture: Picture) -> NDArray[Any]:
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
                if is_left_inverted(image):
                    pixels = np.invert(pixels)
    size = (picture.lines, picture.width)
    if pixels.shape not in (size, (*size, 3)) or pixels.dtype.newbyteorder("=") != np.dtype(picture.dtype):
        raise UserError(f"{path} changed while it was read: ingest the folder when it is complete")
    return pixels


def is_left_inverted(image: Image.Image) -> bool:
    """Whether 0 is white in the pixels of pillow's image: it turns such TIFFs of 8 bits, not of 16 (13.0)."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    kind = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    return image.mode.startswith("I;16") and kind == _WHITE_IS_ZERO


def to_gray(block: NDArray[Any], dtype: str) -> NDArray[Any]:
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
        with Image.open(path, formats=("PNG", "JPEG", "TIFF", "BMP")) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a decoder raises on a broken file becomes one line that names it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # pillow's, of odd metadata: the core is silent
            yield
    except UserError:
        raise
    except Exception as error:  # the decoders do not document what they raise
        # A broken file's error may quote its bytes.
        told = "".join(letter if letter.isprintable() else " " for letter in str(error)[:200])
        raise UserError(f"{path} cannot be read as an image: {told or type(error).__name__}") from error
