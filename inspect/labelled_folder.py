"""A folder of labelled data made of other tools' files, or handed to them: all of it or nothing.

Readers of foreign files (`coco`, `labelme`) give one image at a time, or the line that says what is wrong
with it. What they share stands here: which name, split and group an image gets, and how a mask falls into
shapes.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from rollsight.inspect.defects import label_mask
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.label_check import CLEAN
from rollsight.inspect.labels import (
    COLUMNS,
    IGNORE,
    IMAGE_SUFFIXES,
    MAX_SIDE,
    SPLITS,
    ImageFile,
    LabelledData,
    OnFault,
    check_straddling,
    open_image,
    read_gray,
    refuse,
    split_of,
)
from rollsight.inspect.roll_places import disk_errors, sync_tree
from scipy import ndimage

# The names that Labelme's own converters give to pixels that nobody labelled, and to the background.
IGNORE_NAME, BACKGROUND_NAME = "__ignore__", "_background_"
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_IMAGE_BYTES = 2**30  # of one image file
# Of one shape: pycocotools takes 80 bytes per px of outline, Pillow minutes for one of 5e7 px.
MAX_OUTLINE_PX = 10**6
MANIFEST = (*COLUMNS, "classes", "width", "height", "sha256_16", "source")


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image with its labels, on the way in."""

    name: PurePosixPath  # under <split>/images
    content: bytes  # of the image file, which is kept as it is
    mask: NDArray[np.uint8]  # (H, W), 0 background, index + 1 of the class, 255 ignore
    split: str
    group: str
    source: str  # where the labels come from, as the manifest will say
    untouched: bool = False  # proposed by a model, and nobody has looked at it


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a reader found: the images come one by one, a broken one as the fault that says why."""

    classes: tuple[str, ...]
    total: int
    images: Iterator[LabelledImage | UserError]


@dataclass(frozen=True, slots=True)
class Written:
    """What became of it."""

    counts: dict[str, dict[str, int]]  # split -> class -> images that hold it; "clean" those with none
    left_out: int  # proposals that nobody has looked at


def write_labels(
    out: Path,
    incoming: Incoming,
    *,
    untouched: bool = False,
    on_fault: OnFault = refuse,
    on_image: Callable[[int, int], None] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Written:
    """Write the new folder `out`: `<split>/images`, `<split>/masks`, classes.json, manifest.csv.

    Image files keep their bytes. Proposals that nobody has looked at are left out unless `untouched`. With
    another `on_fault` every fault is told to it first; then too a single one ends in a UserError, and there
    is no folder. `beside` gets the hidden folder when all images are in it, to add files of its own.
    """
    faults = 0

    def tell(kind: str, line: str) -> None:
        nonlocal faults
        on_fault(kind, line)
        faults += 1

    rows, samples, left_out = [], [], 0
    counts: dict[str, dict[str, int]] = {}
    seen: set[PurePosixPath] = set()
    with whole_folder(out) as staging:
        for number, image in enumerate(incoming.images, start=1):
            if isinstance(image, UserError):
                tell("broken", str(image))
            elif image.untouched and not untouched:
                left_out += 1
            elif (mask_name := f"{image.split}/masks" / image.name.with_suffix(".png")) in seen:
                tell(
                    "twice", f"{image.name} stands twice in {image.split}, or with another suffix: rename one"
                )
            else:
                seen.add(mask_name)
                row = _write_image(staging, image, mask_name)
                rows.append(row)
                samples.append(ImageFile(out / row[0], out / row[1], image.split, image.group))
                held = [incoming.classes[int(value) - 1] for value in row[4].split()] or [CLEAN]
                of_split = counts.setdefault(image.split, {"images": 0})
                for name in ("images", *held):
                    of_split[name] = of_split.get(name, 0) + 1
            if on_image is not None:
                on_image(number, incoming.total)
        check_straddling(out, samples, tell)
        if faults:
            raise UserError(f"{out} was not written: mend the {faults} faults, or take those files out")
        if not rows:
            raise UserError(
                f"{out} was not written: no labelled image, and {left_out} proposals nobody looked at"
            )
        with (staging / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([MANIFEST, *sorted(rows)])
        (staging / "classes.json").write_text(json.dumps(incoming.classes), encoding="utf-8")
        if beside is not None:
            beside(staging)
    return Written({split: counts[split] for split in SPLITS if split in counts}, left_out)


def _write_image(staging: Path, image: LabelledImage, mask_name: PurePosixPath) -> tuple[str, ...]:
    """The image and its mask, written; its line of the manifest."""
    from PIL import Image

    image_name = f"{image.split}/images" / image.name
    for name in (image_name, mask_name):
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
    (staging / image_name).write_bytes(image.content)
    Image.fromarray(image.mask).save(staging / mask_name, optimize=True)
    height, width = image.mask.shape
    held = [str(value) for value in np.unique(image.mask).tolist() if 0 < value < IGNORE]
    digest = hashlib.sha256(image.content).hexdigest()[:16]
    return (
        *(str(image_name), str(mask_name), image.split, image.group),
        *(" ".join(held), str(width), str(height), digest, image.source),
    )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder that takes the name `out`, durably, when the block ends well, else is removed.

    UserError (exit 2) where there is something at `out` already.
    """
    if out.exists():
        raise UserError(f"{out} is there already: give the name of a new folder", USAGE)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield staging
            staging.chmod(0o755)
            sync_tree(staging)
            staging.rename(out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def read_inside(root: Path, name: str) -> tuple[PurePosixPath, bytes]:
    """The image file that a label file names, relative to `root`, and its bytes.

    A name with the backslashes of Windows is understood. UserError where it is not there, too large, no
    image's name, or outside of `root`, be it by a link.
    """
    relative = plain_name(name)
    path = root / relative
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path}: lies outside of {root}: images must be in the folder that is imported")
        if not path.is_file():
            raise UserError(f"{path}: no such image: put it there, or say where it is with --images")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise UserError(f"{path}: over {MAX_IMAGE_BYTES >> 30} GiB: ingest it as a roll")
        return relative, path.read_bytes()
    except (OSError, ValueError) as error:  # a name too long, or with a zero in it
        raise UserError(f"{str(path)[:200]!r} cannot be read: {error}"[:300]) from None


def plain_name(name: str) -> PurePosixPath:
    """`name` as a relative path of an image without `..`; UserError where it is none."""
    normal = os.path.normpath(PureWindowsPath(name).as_posix())
    path = PurePosixPath(normal)
    if path.is_absolute() or path.parts[:1] in ((), ("..",)) or not normal.isprintable():
        raise UserError(f"image {name[:200]!r}: needed a path inside the folder that is imported")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"image {name[:200]!r}: needed one of {', '.join(IMAGE_SUFFIXES)}")
    return path


def size_of(path: PurePath, content: bytes, said: tuple[int | None, int | None]) -> tuple[int, int]:
    """(H, W) of an image that can be read; `said` is the height and width that its label file gives.

    UserError where they differ, or where the file asks to be turned when shown: then nobody can know
    whether its labels are for the turned one.
    """
    if open_image(path, content).getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
        raise UserError(f"{path}: its EXIF data says that it is to be turned: store it upright")
    height, width = read_gray(path, content).shape
    for found, needed in ((height, said[0]), (width, said[1])):
        if needed not in (None, found):
            raise UserError(
                f"{path}: {width} x {height} px, but its labels are for {said[1]} x {said[0]} px: "
                "give the image that was labelled"
            )
    return height, width


def name_within(path: PurePosixPath) -> PurePosixPath:
    """The path without the folders for splits and images that it begins with: train/images/a.png is a.png."""
    parts = list(path.parts)
    while len(parts) > 1 and parts[0].lower() in (*SPLIT_WORDS, "images"):
        parts.pop(0)
    return PurePosixPath(*parts)


def split_said(words: Iterable[str]) -> str:
    """The split that the last of such words names, "" where none does."""
    found = [SPLIT_WORDS[word.lower()] for word in words if word.lower() in SPLIT_WORDS]
    return found[-1] if found else ""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which group an image belongs to."""

    by: str = ""  # a regular expression; its first bracket, else all that it matches, names the group

    def __post_init__(self) -> None:
        try:
            re.compile(self.by)
        except re.error as error:
            raise UserError(f"--group-by {self.by}: no regular expression: {error}", USAGE) from None

    def place(self, name: PurePosixPath, split: str = "", group: str = "") -> tuple[str, str]:
        """Split and group of the image `name`; `split` and `group` are what its label file says, or "".

        The group: by the expression, else as said, else the sub-folder, else the image is its own. Where
        no split is said, a hash of the group decides, as in plain folders. UserError where the expression
        finds nothing in the name.
        """
        if self.by:
            found = re.search(self.by, str(name))
            group = (found[1] if found.re.groups else found[0]) or "" if found else ""
            if not group:
                raise UserError(f"{name}: --group-by {self.by} finds no group in it: give one that does")
        elif not group:
            # Equal names in two splits are two images.
            alone = f"{split}/{name.with_suffix('')}" if split else str(name.with_suffix(""))
            group = str(name.parent) if len(name.parts) > 1 else alone
        return split or split_of(group), group


def check_outline(points: NDArray[np.float64]) -> None:
    """UserError for points (n, 2) of a shape that no image can have, before it is drawn."""
    if (farthest := np.abs(points).max()) > 2 * MAX_SIDE:
        raise UserError(f"a point lies at {farthest:g} px, far out of the image")
    length = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()
    if length > MAX_OUTLINE_PX:
        raise UserError(f"its outline is {length:g} px long: the limit is {MAX_OUTLINE_PX}")


def values_of(classes: Iterable[str]) -> dict[str, int]:
    """Name -> mask value: the classes from 1, and the two names that are none."""
    return {BACKGROUND_NAME: 0, IGNORE_NAME: IGNORE} | {name: i for i, name in enumerate(classes, start=1)}


def shapes_of(
    mask: NDArray[np.uint8], classes: tuple[str, ...]
) -> Iterator[tuple[str, int, int, NDArray[np.bool_]]]:
    """The shapes that make up a mask (H, W), none over another: name, x, y and pixels (h, w) of each.

    One per 8-connected component of a class, and one for all that is 255.
    """
    ids, _ = label_mask(mask)
    for number, (ys, xs) in enumerate(ndimage.find_objects(ids), start=1):
        inside = ids[ys, xs] == number
        yield classes[mask[ys, xs][inside][0] - 1], xs.start, ys.start, inside
    for ys, xs in ndimage.find_objects((mask == IGNORE).astype(np.uint8)):
        yield IGNORE_NAME, xs.start, ys.start, mask[ys, xs] == IGNORE


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One image with its mask, on the way out."""

    sample: ImageFile
    name: PurePosixPath  # <split>/<path>, under which it goes
    mask: NDArray[np.uint8]


def outgoing(data: LabelledData, on_image: Callable[[int, int], None] | None = None) -> Iterator[Outgoing]:
    """The images of `data`, whole and with names of their own; UserError for what cannot go out."""
    seen: set[PurePosixPath] = set()
    for number, sample in enumerate(data.samples, start=1):
        if not isinstance(sample, ImageFile):
            raise UserError(f"{data.root}: a roll's mask is an OME-Zarr label, which tools open as it is")
        if sample.split not in SPLITS:
            raise UserError(f"{sample.image}: split {sample.split!r}: needed one of {', '.join(SPLITS)}")
        name = sample.split / name_within(PurePosixPath(sample.image.relative_to(data.root).as_posix()))
        if name.with_suffix("") in seen:
            raise UserError(f"{sample.image}: another image has its name, suffix aside: rename one")
        seen.add(name.with_suffix(""))
        mask = sample.read()[1]
        if beyond := [value for value in np.unique(mask).tolist() if len(data.classes) < value < IGNORE]:
            raise UserError(f"{sample.mask}: holds {beyond[0]}, but there are {len(data.classes)} classes")
        yield Outgoing(sample, name, mask)
        if on_image is not None:
            on_image(number, len(data.samples))
