"""Scenes of labelled data, and defect-centred patches cut from them at native resolution."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import ANY_SPLIT, IGNORE, ImageFile, LabelledData, is_rolls
from rollsight.inspect.rolls import Roll
from rollsight.inspect.sampling import clean_origins

PixelMm = tuple[float, float]  # mm of a px along and across the strip: they differ on a line scan

JITTER = 0.25  # of a patch's side: how far its centre lies from a px of the defect, at most


@dataclass(frozen=True, slots=True)
class Scene:
    """One labelled image of the train split."""

    image: NDArray[np.float32]  # (H, W) in [0, 1]
    mask: NDArray[np.uint8]  # (H, W), 0 background, index + 1 of the class, 255 ignore
    name: str  # of the image, within its source
    group: str  # coil, scene or piece
    mm: PixelMm | None = None  # None where nobody said
    seen: tuple[int, int] = (0, 0)  # its first lines and columns that are another scene's, ignored here


def pixel_mm(mm_per_px_x: float | None, mm_per_line: float | None) -> PixelMm | None:
    """What a user said of the size of a px, None for nothing; UserError for half of it, or for no size."""
    if mm_per_px_x is None and mm_per_line is None:
        return None
    if mm_per_px_x is None or mm_per_line is None:
        raise UserError("--mm-per-px-x and --mm-per-line: give both, or neither", USAGE)
    for name, value in (("--mm-per-px-x", mm_per_px_x), ("--mm-per-line", mm_per_line)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} {value:g}: it must be a number over 0", USAGE)
    return mm_per_line, mm_per_px_x


def mm_of(roll: Roll) -> PixelMm | None:
    """The size of a roll's px, None where it is in px."""
    strip = roll.strip
    if strip.mm_per_line is None or strip.mm_per_px_x is None:
        return None
    return strip.mm_per_line, strip.mm_per_px_x


def read_scenes(data: LabelledData, mm: PixelMm | None = None) -> list[Scene]:
    """All samples of `data`; UserError for one that is no training data, or has several lighting modes.

    A defect that was copied from val or test would be judged on itself, so such sources are refused.
    mm: the size of a px of image files, where it is known; a roll knows its own.
    """
    if mm is not None and is_rolls(data):
        raise UserError(
            f"{data.root}: a roll knows how large its px are: leave --mm-per-px-x and --mm-per-line out",
            USAGE,
        )
    scenes = []
    for sample in data.samples:
        if sample.split not in ("train", ANY_SPLIT):
            raise UserError(
                f"{data.root}: group {sample.group!r} is of split {sample.split}: synthetic data is made of "
                "the train split only",
                USAGE,
            )
        image, mask = data.read(sample)
        if len(image) != 1:
            raise UserError(f"{data.root}: {len(image)} lighting modes: synthetic defects are made in one")
        if isinstance(sample, ImageFile):
            name, size, seen = sample.image.relative_to(data.root).as_posix(), mm, (0, 0)
        else:
            name, size = f"{sample.roll.roll_id}/{sample.y}-{sample.x}", mm_of(sample.roll)
            seen = sample.seen_y, sample.seen_x
        scenes.append(Scene(image[0], mask, name, sample.group, size, seen))
    return scenes


def held_groups(data: LabelledData) -> list[str]:
    """The groups of `data` that nothing may be made of: those of val and test."""
    return sorted({sample.group for sample in data.samples if sample.split in ("val", "test")})


def refuse_held(groups: Iterable[str], held: Sequence[str], where: str) -> None:
    """UserError where one of the groups is held back for val or test."""
    if leaked := sorted(set(groups) & set(held)):
        raise UserError(
            f"{where}: group {leaked[0]!r} is in val or test of the labels: give sources of other groups",
            USAGE,
        )


def class_value(data_classes: Sequence[str], defect_class: str, where: object) -> int:
    """The mask value of a class; UserError where the data does not label it."""
    if defect_class not in data_classes:
        raise UserError(
            f"class {defect_class!r} is not known: {where} labels {', '.join(data_classes)}", USAGE
        )
    return list(data_classes).index(defect_class) + 1


def padded(plane: NDArray[np.generic], size: int, constant: int | None = None) -> NDArray[np.generic]:
    """A plane (H, W) that is at least size x size: by reflection, or with a constant."""
    pad = [(0, max(0, size - side)) for side in plane.shape]
    if not any(after for _, after in pad):
        return plane
    if constant is not None:
        return np.pad(plane, pad, constant_values=constant)
    return np.pad(plane, pad, mode="symmetric")


def patch_around(
    scene: Scene, pixels: NDArray[np.int64], size: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A patch with one of the pixels (n, 2) near its middle: image and mask, (size, size).

    The patch stays in the image, so its content is never made up; a smaller image is mirrored, and what is
    mirrored ignored.
    """
    image, mask = padded(scene.image, size), padded(scene.mask, size, constant=IGNORE)
    reach = int(JITTER * size)
    centre = pixels[rng.integers(len(pixels))] + rng.integers(-reach, reach + 1, size=2)
    y, x = np.clip(centre - size // 2, 0, np.subtract(mask.shape, size)).tolist()
    window = (slice(y, y + size), slice(x, x + size))
    return image[window].astype(np.float32), mask[window].astype(np.uint8)


@dataclass(frozen=True, slots=True)
class CleanPlaces:
    """The windows of a scene that hold no defect and no ignored px."""

    scene: Scene
    origins: NDArray[np.int64]  # (n, 2) first line and column
    gray: float  # median of its clean px


def clean_places(scenes: Sequence[Scene], size: int) -> list[CleanPlaces]:
    """Where each scene has clean windows of size x size; scenes without any are left out."""
    found = []
    for scene in scenes:
        if min(scene.mask.shape) < size:
            continue
        # 255 counts as a defect here: nobody said that it is clean.
        origins = np.argwhere(clean_origins((scene.mask > 0).astype(np.uint8), size))
        if len(origins):
            found.append(CleanPlaces(scene, origins, float(np.median(scene.image[scene.mask == 0]))))
    return found
