"""Labelled data: images with class masks, in groups that never straddle train, val and test.

Three layouts are read: a folder with `manifest.csv` and `classes.json`; a plain mask folder with
`images/` and `masks/` (or the same under `train/`, `val/`, `test/`) and `classes.json`; a roll with the
class mask `truth` beside it, or a folder of such rolls. The group of a sample is its coil, scene or piece:
what a split must not cut.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.pictures import is_left_inverted
from rollsight.inspect.rolls import Roll, open_roll

IGNORE = 255  # the mask value of pixels that nobody labelled or inspected
SPLITS = ("train", "val", "test")
COLUMNS = ("image", "mask", "split", "group")  # of manifest.csv; others may stand beside them
ANY_SPLIT = "any"  # of a roll: it is what it is given as, and its coil is the group
SHARES = (0.70, 0.85)  # where a plain folder has no split: train below the first, val below the second
MAX_SIDE = 16_384  # px: a labelled image is a patch; whole rolls come as rolls
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # as Pillow names them: no other of its decoders is tried
TRUTH_LABEL = "truth"  # the class mask of a roll that is known to be right; a scan's has the id of its run
ROLL_TILE = 256  # px: the tile in which a labelled roll is sampled
CLEAN_TILES = 0.5  # clean tiles kept per tile with a defect

OnFault = Callable[[str, str], None]  # kind and line of a fault; the sample that has it is left out


def refuse(kind: str, line: str) -> None:
    """What `open_labels` does of a fault unless told otherwise: a UserError with its line."""
    raise UserError(line)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image file with its mask file."""

    image: Path
    mask: Path
    split: str
    group: str
    source: str = ""  # where its labels come from, as far as anybody said

    def read(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Image (1, H, W) in [0, 1] and mask (H, W), 0 background, index + 1 of the class, 255 ignore."""
        image = self.read_image()
        return image, self.read_mask(image.shape[1:])

    def read_image(self) -> NDArray[np.float32]:
        """The image (1, H, W) in [0, 1] alone."""
        return read_gray(self.image)[None]

    def read_mask(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The mask alone; UserError where it is not of the image's `shape` (H, W)."""
        mask = np.asarray(open_image(self.mask))
        if mask.ndim != 2 or mask.shape != shape:
            size = " x ".join(map(str, mask.shape[::-1]))
            raise UserError(
                f"{self.mask}: the mask is {size} px, its image {self.image.name} is "
                f"{shape[1]} x {shape[0]}: they must be of one size, one value per pixel"
            )
        if mask.dtype.kind not in "bui" or not 0 <= mask.min() <= mask.max() <= IGNORE:
            raise UserError(
                f"{self.mask}: mask values {mask.min()} to {mask.max()}: a mask holds whole numbers 0 to 255"
            )
        return mask.astype(np.uint8)


@dataclass(frozen=True, slots=True)
class RollTile:
    """One square of a roll whose class mask is known.

    The last tile of an axis ends with the roll, so it overlaps the one before: there its mask is 255, since
    that px is the other's.
    """

    roll: Roll
    label: str
    y: int
    x: int
    split: str
    group: str
    seen_y: int = 0  # its first lines that are the tile's above
    seen_x: int = 0  # its first px across that are the tile's beside it

    def read(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Image (M, 256, 256) in [0, 1] and mask (256, 256), as `ImageFile.read`."""
        image = self.read_image()
        return image, self.read_mask(image.shape[1:])

    def read_image(self) -> NDArray[np.float32]:
        """The image (M, 256, 256) in [0, 1] alone."""
        return self.roll.read_unit(self.y, self.y + ROLL_TILE)[:, :, self.x : self.x + ROLL_TILE]

    def read_mask(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The mask alone, of the tile's `shape` (H, W)."""
        mask = self.roll.read_label(self.label, self.y, self.y + shape[0])[:, self.x : self.x + shape[1]]
        mask[: self.seen_y] = mask[:, : self.seen_x] = IGNORE
        return mask


Sample = ImageFile | RollTile


@dataclass(frozen=True, slots=True)
class LabelledData:
    """Samples of one source and the classes that source labels: mask value = index + 1."""

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]

    def of_split(self, split: str) -> "LabelledData":
        """The samples of one split; UserError where there is none."""
        chosen = tuple(sample for sample in self.samples if sample.split in (split, ANY_SPLIT))
        if not chosen:
            found = sorted({sample.split for sample in self.samples})
            raise UserError(f"{self.root}: no images of split {split!r}: it has {', '.join(found)}", USAGE)
        return LabelledData(self.root, self.classes, chosen)

    def groups(self) -> list[str]:
        return sorted({sample.group for sample in self.samples})

    def read(self, sample: Sample) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Image and mask of one of the samples; UserError where `check` refuses the mask."""
        image, mask = sample.read()
        self.check(sample, mask)
        return image, mask

    def check(self, sample: Sample, mask: NDArray[np.uint8]) -> None:
        """UserError where the mask of a sample has a value beyond the classes."""
        where = sample.mask if isinstance(sample, ImageFile) else sample.roll.location
        check_values(mask, self.classes, where, self.root)

    def digest(self) -> str:
        """SHA-256 over the files and groups, so that a model's card can name its data."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for sample in self.samples:
            if isinstance(sample, ImageFile):
                digest.update(sample.image.read_bytes() + sample.mask.read_bytes())
            else:
                image, mask = sample.read()
                digest.update(image.tobytes() + mask.tobytes())
            digest.update(f"{sample.split} {sample.group}".encode())
        return digest.hexdigest()


def describe(data: LabelledData, split: str) -> dict[str, Any]:
    """What a card says of a source: never a path, which is one machine's."""
    groups = data.groups()
    several = f"{len(groups)} rolls, {groups[0]} to {groups[-1]}" if len(groups) > 1 else f"roll {groups[0]}"
    return {
        "source": several if is_rolls(data) else data.root.name,
        "split": split,
        "images": len(data.samples),
        "groups": len(groups),
        "group_names": groups,
        "digest": data.digest(),
    }


def is_rolls(data: LabelledData) -> bool:
    """Whether the data is of labelled rolls: they have no splits."""
    return all(sample.split == ANY_SPLIT for sample in data.samples)


def open_labels(root: Path, on_fault: OnFault = refuse) -> LabelledData:
    """The labelled data under `root`; UserError names what is missing or contradictory.

    With another `on_fault` what is wrong with single samples, and with the list of classes (then none), is
    told to it instead, one call per fault; only a folder that cannot be read at all is refused.
    """
    if root.suffix == ".zarr":
        return _from_roll(open_roll(root))
    if rolls := sorted(root.glob("[!.]*.zarr")):
        parts = [_from_roll(open_roll(path)) for path in rolls]
        if any(part.classes != parts[0].classes for part in parts):
            raise UserError(f"{root}: the rolls' masks have different classes: give them one by one")
        return LabelledData(
            root, parts[0].classes, tuple(sample for part in parts for sample in part.samples)
        )
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder of labelled data: give one with images, masks and classes.json"
        )
    try:
        classes = _read_classes(root / "classes.json")
    except UserError as fault:
        on_fault("classes", str(fault))
        classes = ()
    listed = (root / "manifest.csv").is_file()
    samples = list(_from_manifest(root, on_fault) if listed else _from_folders(root, on_fault))
    if not samples:
        raise UserError(f"{root}: no image with a mask found: expected images/ and masks/ with equal names")
    check_straddling(root, samples, on_fault)
    return LabelledData(root, classes, tuple(samples))


def _from_manifest(root: Path, on_fault: OnFault) -> Iterator[ImageFile]:
    manifest = root / "manifest.csv"
    for number, row in enumerate(manifest_rows(manifest), start=2):
        if empty := [name for name in COLUMNS if not row[name]]:  # None where the line is short
            on_fault(
                "manifest", f"{manifest} line {number}: no {', '.join(empty)}: each image needs all four"
            )
            continue
        image, mask = (file_within(root, row[name]) for name in ("image", "mask"))
        for name, path in (("image", image), ("mask", mask)):
            if path is None:
                on_fault(
                    "missing", f"{manifest} line {number}: no file {root / row[name]} in the data's folder"
                )
        if image is not None and mask is not None:
            yield ImageFile(image, mask, row["split"], row["group"], row.get("source") or "")


def file_within(root: Path, name: str) -> Path | None:
    """The file that a manifest names, below `root` by name too; None where it is not there or lies outside.

    So an absolute name, or one with "..", gives the same path as the relative one.
    """
    path = root / name
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises where a name is too long)
        return None
    real, inside = path.resolve(), root.resolve()
    if not real.is_relative_to(inside):
        return None
    plain = Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps "..")
    for folder in (Path(os.path.abspath(root)), inside):  # noqa: PTH100
        if plain.is_relative_to(folder) and plain.resolve() == real:
            return root / plain.relative_to(folder)
    return root / real.relative_to(inside)


def manifest_rows(manifest: Path) -> Iterator[dict[str, str]]:
    """The lines of a manifest by column, all columns in the order of its first line.

    UserError where it is no table, lacks one of COLUMNS or has a line with more cells than columns.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:  # with or without Excel's mark
            rows = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise UserError(f"{manifest}: no column {', '.join(missing)}: it needs {', '.join(COLUMNS)}")
            for row in rows:
                if beyond := row.get(None):  # under this key DictReader puts further cells
                    named = len(row) - 1
                    raise UserError(
                        f"{manifest} line {rows.line_num}: {named + len(beyond)} cells, but the first line "
                        f"names {named} columns: take out {beyond[0]!r}, or name its column"
                    )
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{manifest}: not a CSV file in UTF-8 ({error})") from None


def _from_folders(root: Path, on_fault: OnFault) -> Iterator[ImageFile]:
    """Plain folders: a group is the sub-folder of `images/`, else the image itself.

    The same sub-folder in two splits is one group that straddles them; the same file name is not.
    """
    split_folders = [name for name in SPLITS if (root / name / "images").is_dir()]
    for part in [root / name for name in split_folders] or [root]:
        images = part / "images"
        for image in sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
            relative = image.relative_to(images)
            mask = part / "masks" / relative.with_suffix(".png")
            if not mask.is_file():
                on_fault(
                    "missing", f"{image}: no mask {mask}: each image needs one (all 0 where it is clean)"
                )
                continue
            alone = f"{part.name}/{relative.stem}" if split_folders else relative.stem
            group = str(relative.parent) if len(relative.parts) > 1 else alone
            yield ImageFile(image, mask, part.name if split_folders else split_of(group), group)


def split_of(group: str) -> str:
    """The split of a group where the folder names none: by a hash, so it stays when data is added."""
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return SPLITS[sum(share >= bound for bound in SHARES)]


def _from_roll(roll: Roll) -> LabelledData:
    """Tiles of a labelled roll: each with a defect, and half as many clean ones; the group is the coil.

    The tiles cover the roll to its right side and its last line. The mask is the one named `truth`: those of
    scans are what a model found, which teaches it nothing and finds it faultless.
    """
    names = roll.label_names()
    if not names:
        raise UserError(f"{roll.path}: the roll has no class mask beside it: nothing to learn from")
    if TRUTH_LABEL not in names:
        raise UserError(
            f"{roll.path}: its only class masks are {', '.join(names)}, as scans leave them, and what a "
            f"model found neither teaches nor judges one: give a roll whose labels are named {TRUTH_LABEL!r}"
        )
    if min(roll.lines, roll.width) < ROLL_TILE:
        raise UserError(
            f"{roll.path}: {roll.lines} lines of {roll.width} px: a labelled roll needs at least {ROLL_TILE} "
            "of both; give smaller images as a folder with images, masks and classes.json"
        )
    clean_share = np.random.default_rng(0)
    samples = []
    with_defect = clean = 0
    for y, seen_y in _tile_origins(roll.lines):
        mask = roll.read_label(TRUTH_LABEL, y, y + ROLL_TILE)[seen_y:]
        gray = roll.read_unit(y + seen_y, y + ROLL_TILE).mean(axis=(0, 1))
        for x, seen_x in _tile_origins(roll.width):
            own = slice(x + seen_x, x + ROLL_TILE)
            defect = bool(((mask[:, own] > 0) & (mask[:, own] != IGNORE)).any())
            # Clean tiles of the strip, and of its edges; not of the bare background beside it.
            wanted = clean < CLEAN_TILES * with_defect and gray[own].mean() > 0.05
            if defect or (wanted and clean_share.random() < 0.5):
                samples.append(RollTile(roll, TRUTH_LABEL, y, x, ANY_SPLIT, roll.roll_id, seen_y, seen_x))
                with_defect, clean = with_defect + defect, clean + (not defect)
    if not samples:
        raise UserError(f"{roll.path}: its mask {TRUTH_LABEL!r} marks no defect: nothing to learn from")
    return LabelledData(roll.path, roll.label_classes(TRUTH_LABEL), tuple(samples))


def _tile_origins(size: int) -> Iterator[tuple[int, int]]:
    """First px of each tile along an axis of `size` px, and how many of its px are the one's before it."""
    yield from ((start, 0) for start in range(0, size - ROLL_TILE + 1, ROLL_TILE))
    if rest := size % ROLL_TILE:
        yield size - ROLL_TILE, ROLL_TILE - rest


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        inside = sorted(found.parent.name for found in path.parent.glob("*/classes.json"))
        advice = f"; its folders {', '.join(inside)} have one: name one of them" if inside else ""
        if not advice and any(path.parent.glob("*.json")):
            advice = "; Labelme and COCO files become labelled data by `inspect labels import`"
        raise UserError(f"{path}: not found: it lists the class names, mask value = index + 1{advice}")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): expected a list of class names") from None
    return check_classes(path, names)


def check_classes(where: Path, names: Any) -> tuple[str, ...]:
    """Class names in the order of their mask values from 1; UserError where they are none."""
    valid = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not valid or len(set(names)) != len(names) or not 0 < len(names) < IGNORE:
        raise UserError(f"{where}: expected a list of 1 to 254 different class names")
    return tuple(names)


def check_values(mask: NDArray[np.uint8], classes: Sequence[str], where: Path | str, root: Path) -> None:
    """UserError where a mask (H, W), read from `where`, has a value beyond the classes of the data `root`."""
    if (found := int(mask[mask != IGNORE].max(initial=0))) > len(classes):
        raise UserError(
            f"{where}: mask value {found}, but {root} has {len(classes)} classes: correct the mask, or name "
            "its class in the list of classes"
        )


def check_straddling(root: Path, samples: Iterable[Sample], on_fault: OnFault) -> None:
    """Tell `on_fault` of each group that lies in two splits."""
    splits: dict[str, list[str]] = {}
    for sample in samples:
        found = splits.setdefault(sample.group, [])
        if sample.split not in found:
            found.append(sample.split)
    for group, found in splits.items():
        if len(found) > 1:
            on_fault(
                "straddles",
                f"{root}: group {group!r} is in {' and in '.join(found)}: "
                "a scene or coil must be in one split only",
            )


def open_image(path: PurePath, content: bytes | None = None) -> Image.Image:
    """The decoded image file `path`, or `content` under its name; UserError where it is no image."""
    try:
        image = Image.open(Path(path) if content is None else io.BytesIO(content), formats=IMAGE_FORMATS)
        if max(image.size) > MAX_SIDE:
            raise UserError(
                f"{path}: {image.size[0]} x {image.size[1]} px is over {MAX_SIDE}: ingest it as a roll"
            )
        image.load()
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # Pillow raises all four
        raise UserError(f"{path}: not a readable image ({error})") from None
    return image


def read_gray(path: PurePath, content: bytes | None = None) -> NDArray[np.float32]:
    """A gray image (H, W) in [0, 1], of `open_image`; colour is converted by ITU-R 601 luma."""
    image = open_image(path, content)
    if image.mode.startswith("I;16"):
        gray = np.asarray(image, dtype=np.float32) / np.float32(65535)
        return 1 - gray if is_left_inverted(image) else gray
    if image.mode in ("I", "F"):  # Pillow would cut all above 255 to white
        raise UserError(f"{path}: 32 bits per pixel: an image has 8 or 16")
    return np.asarray(image.convert("L"), dtype=np.float32) / np.float32(255)
