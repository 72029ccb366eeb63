"""A class mask of a roll: an OME-Zarr label, beside the image or in a folder of its own."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import PARTIAL, USAGE, UserError
from rollsight.inspect.pyramid import FACTOR, level_count, level_shape
from rollsight.inspect.roll_format import (
    CHUNK,
    MAX_SHARD_BYTES,
    NOT_INSPECTED,
    SHARD_LINES,
    Layout,
    array_shape,
    check_array,
    corrupt,
    create_array,
    group_attributes,
    group_json,
    mask_layout,
    multiscale,
    open_for_reading,
    open_for_writing,
    read_array,
    read_json,
    set_lines,
    strip_from,
)
from rollsight.inspect.roll_places import (
    TEMPORARY,
    LocalPlace,
    Place,
    alone,
    claim,
    disk_errors,
    place_of,
    shared,
    sweep,
    sweep_claims,
    sync,
    sync_tree,
    write_durably,
)
from rollsight.inspect.strips import MAX_LINES, Strip, is_plain_name


class LabelWriter:
    """A class mask of a roll: the OME-Zarr label `labels/<name>`, written by whole shards.

    Where the roll is remote or read-only, the same label lies in a `folder` of its own, on a local disk.

    Different shards may be written at once, from threads or processes; one shard has one writer (zarr-python
    loses chunks when two write into one shard: zarr-python#3682). A shard is durable when `write` returns.
    Readers see the label after `close`; what was not written is 255, not inspected.
    """

    def __init__(
        self, folder: Path, name: str, classes: tuple[str, ...], layout: Layout, beside: bool
    ) -> None:
        """For `create` and `open`, which check what they find."""
        self.folder = folder  # <roll>.zarr/labels/<name>, or the folder given
        self.name = name
        self.classes = classes
        self.lines, self.width = layout.shape  # lines is MAX_LINES until a roll that grows is closed
        self.shard_lines = layout.shard[0]
        self._beside = beside  # in the roll, which lists its labels
        self._array = open_for_writing(LocalPlace(folder), "0")

    @classmethod
    def create(
        cls,
        roll_path: Path | str,
        name: str,
        classes: tuple[str, ...],
        *,
        lines: int | None,
        width: int,
        shard_lines: int,
        folder: Path | None = None,
    ) -> LabelWriter:
        """Make the label, or go on with the one that is there; UserError if that has other classes or sizes.

        roll_path, path or URL. lines and width in px, those of the roll; lines None while a live roll grows,
        see `freeze`. shard_lines a multiple of 16. Class i has mask value i + 1. folder: where the mask lies
        if not beside the image.
        """
        _check_label_name(name)
        if not 0 < len(classes) < NOT_INSPECTED or len(set(classes)) != len(classes):
            raise ValueError(f"a label has 1 to {NOT_INSPECTED - 1} different classes, not {classes}")
        if shard_lines <= 0 or shard_lines % 16:
            raise ValueError(f"shard_lines is {shard_lines}: needed a multiple of 16")
        roll = place_of(roll_path)
        strip = strip_from(group_attributes(roll), roll)
        found = array_shape(roll / "0", 3)[-1]
        known = strip.lines if strip.closed else None
        if (lines is not None and lines != known) or width != found:
            raise UserError(
                f"the mask {name} is {lines} x {width} px but the roll {strip.roll_id} is"
                f" {known or 'still growing'} x {found} px: they must be equal"
            )
        target = _folder(roll, name) if folder is None else folder
        with disk_errors(target):
            if target.parent.is_dir():
                sweep_claims(target.parent, target.name)
            if not target.exists():
                source = _source(roll, target) if folder is not None else "../../"
                _put(target, strip, classes, mask_layout(0, known or MAX_LINES, width, shard_lines), source)
        writer = cls.open(roll_path, name, folder=folder)
        if writer.lines == MAX_LINES and known is not None:
            writer.freeze(known)
        if (writer.classes, writer.lines, writer.width, writer.shard_lines) != (
            classes,
            known or writer.lines,
            width,
            shard_lines,
        ):
            raise UserError(
                f"label {target} exists with {writer.lines} x {writer.width} px, shards of"
                f" {writer.shard_lines} lines and classes {', '.join(writer.classes)}: use another name"
            )
        return writer

    @classmethod
    def open(cls, roll_path: Path | str, name: str, *, folder: Path | None = None) -> LabelWriter:
        """Open a label made by `create`, finished or not, to write shards; UserError if there is none."""
        _check_label_name(name)
        target = _folder(place_of(roll_path), name) if folder is None else folder
        if not target.is_dir():
            raise UserError(f"no label {name} of roll {roll_path}: there is no {target}")
        place = LocalPlace(target)
        return cls(target, name, mask_classes(place), _layout_of(place), beside=folder is None)

    def freeze(self, lines: int) -> None:
        """Say how long the roll became: a label made while it grew is MAX_LINES long until then."""
        if not 0 < lines <= MAX_LINES:
            raise ValueError(f"a roll has 1 to {MAX_LINES} lines, not {lines}")
        for level in range(level_count(self.width)):
            set_lines(LocalPlace(self.folder / str(level)), 0, level_shape(lines, self.width, level)[0])
        self.lines = lines
        self._array = open_for_writing(LocalPlace(self.folder), "0")

    def write(self, y0: int, mask: NDArray[np.uint8]) -> None:
        """Write the whole shards from line y0 on. mask (h, W), 0 background, 1..K classes, 255 not inspected.

        y0 and h are multiples of shard_lines; only a mask that ends at the last line may be shorter.
        Idempotent: what a shard held before, whole or damaged, does not matter.
        """
        end = y0 + mask.shape[0]
        if mask.dtype != np.uint8 or mask.shape[1:] != (self.width,):
            raise ValueError(
                f"mask is {mask.dtype} {mask.shape}; the label takes uint8 (lines, {self.width})"
            )
        whole = y0 % self.shard_lines == 0 and (end % self.shard_lines == 0 or end == self.lines)
        if not (whole and 0 <= y0 < end <= self.lines):
            raise ValueError(
                f"lines {y0} to {end} are not whole shards of {self.shard_lines} lines within {self.lines}"
            )
        if bool(((mask > len(self.classes)) & (mask != NOT_INSPECTED)).any()):
            raise ValueError(f"mask holds a value over {len(self.classes)}, the number of classes")
        with disk_errors(self.folder), shared(self.folder):
            for y in range(y0, end, self.shard_lines):
                part = mask[y - y0 : y - y0 + self.shard_lines]
                self._array[y : y + part.shape[0]] = part

    def shard_checksum(self, y0: int) -> str:
        """sha256, hex, of the bytes on disk of the shard that starts at line y0; UserError if missing."""
        if y0 % self.shard_lines or not 0 <= y0 < self.lines:
            raise ValueError(f"no shard starts at line {y0}")
        shard = self.folder / "0" / "c" / str(y0 // self.shard_lines) / "0"
        try:
            with shard.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"shard {shard} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Build the pyramid (each 4th pixel, so values stay classes), let readers see the label. Idempotent.

        UserError (exit 3) while a shard is missing. One process closes.
        """
        if self.lines == MAX_LINES:
            raise ValueError(f"label {self.folder} still grows: freeze its lines first")
        with disk_errors(self.folder), alone(self.folder):
            sweep(self.folder)
            layout = mask_layout(0, self.lines, self.width, self.shard_lines)
            problem = LocalPlace(self.folder / "0").unfit(layout.files(self.lines), layout.frames.file_bytes)
            if problem is not None:
                raise UserError(f"label {self.folder} is not finished: {problem}", PARTIAL)
            for level in range(1, level_count(self.width)):
                self._write_level(level)
            sync_tree(self.folder)
            if self._beside:
                _register(self.folder)
            else:
                attributes = group_attributes(LocalPlace(self.folder)) | {"closed": True}
                write_durably(self.folder / "zarr.json", group_json(attributes))

    def _write_level(self, level: int) -> None:
        place = LocalPlace(self.folder, durable=False)  # close syncs all at once
        finer = open_for_reading(
            place, str(level - 1), mask_layout(level - 1, self.lines, self.width, self.shard_lines)
        )
        height, width = level_shape(self.lines, self.width, level)
        array = open_for_writing(place, str(level))
        for y0 in range(0, height, SHARD_LINES):
            shard = np.empty((min(SHARD_LINES, height - y0), width), np.uint8)
            for y in range(0, shard.shape[0], CHUNK):  # a slab of the finer level at a time keeps memory low
                part = shard[y : y + CHUNK]
                start = (y0 + y) * FACTOR
                end = min(start + part.shape[0] * FACTOR, finer.shape[0])
                rows = read_array(finer, slice(start, end), self.folder)
                part[...] = rows[::FACTOR, ::FACTOR]
            array[y0 : y0 + shard.shape[0]] = shard


def mask_classes(place: Place) -> tuple[str, ...]:
    """Class names in the order of their values, from the `image-label` properties."""
    where = f"{place}/zarr.json"
    try:
        properties = group_attributes(place)["ome"]["image-label"]["properties"]
        named = {entry["label-value"]: entry["class"] for entry in properties}
    except (KeyError, TypeError) as error:
        raise corrupt(where, "no image-label properties with label-value and class") from error
    named.pop(NOT_INSPECTED, None)
    numbers = list(named)
    if any(type(number) is not int for number in numbers) or sorted(numbers) != [*range(1, len(named) + 1)]:
        raise corrupt(where, "label values must be 1 to the number of classes")
    if not all(isinstance(name, str) for name in named.values()):
        raise corrupt(where, "class names must be text")
    return tuple(named[value] for value in sorted(named))


def read_mask(place: Place, shape: tuple[int, int], y0: int, y1: int) -> NDArray[np.uint8]:
    """Lines y0 to y1 of the mask of a roll of this shape (lines, px): (y1 - y0, W)."""
    layout = _layout_of(place)
    if layout.shape != shape:
        raise corrupt(place, f"the mask is {layout.shape}, the roll {shape[0]} x {shape[1]}")
    return read_array(open_for_reading(place, "0", layout), slice(y0, y1), place)


def registered_masks(roll: Place) -> list[str]:
    """The labels that `labels/zarr.json` lists; [] where the roll has none."""
    labels = roll / "labels"
    if labels.read("zarr.json") is None:
        return []
    ome = group_attributes(labels).get("ome")
    names = ome.get("labels") if isinstance(ome, dict) else None
    if not isinstance(names, list) or not all(is_plain_name(name) for name in names):
        raise corrupt(f"{labels}/zarr.json", "needed a list of label names")
    return names


def is_closed(folder: Path) -> bool:
    """Whether the mask in a folder of its own is finished; False where there is none."""
    return folder.is_dir() and group_attributes(LocalPlace(folder)).get("closed") is True


def _layout_of(place: Place) -> Layout:
    """The layout of the mask's level 0; UserError where its metadata is not that of a mask."""
    where = f"{place}/0/zarr.json"
    lines, width = array_shape(place / "0", 2)
    try:
        shard_lines = read_json(place / "0")["chunk_grid"]["configuration"]["chunk_shape"][0]
    except (KeyError, TypeError, IndexError) as error:
        raise corrupt(where, "no chunk_shape") from error
    if type(shard_lines) is not int or shard_lines <= 0 or shard_lines % 16:
        raise corrupt(where, f"shards of {str(shard_lines)[:40]} lines: needed a multiple of 16")
    layout = mask_layout(0, lines, width, shard_lines)
    if shard_lines * layout.shard[1] > MAX_SHARD_BYTES:
        raise corrupt(where, f"shards of {shard_lines} lines of {width} px are too large")
    check_array(place / "0", layout)
    return layout


def _put(folder: Path, strip: Strip, classes: tuple[str, ...], layout: Layout, source: str) -> None:
    """The empty label: all its arrays and metadata, durable, moved to its place as a whole."""
    lines, width = layout.shape
    named = [*enumerate(classes, start=1), (NOT_INSPECTED, "not inspected")]
    label: dict[str, Any] = {
        "properties": [{"label-value": value, "class": name} for value, name in named],
        "source": {"image": source},
    }
    levels = level_count(width)
    ome = {"version": "0.5", "multiscales": [multiscale(strip, levels, modes=False)], "image-label": label}
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY}")
    place = LocalPlace(staging, durable=False)
    handle = claim(staging)
    try:
        place.write("zarr.json", group_json({"ome": ome}))
        for level in range(levels):
            create_array(place, str(level), mask_layout(level, lines, width, layout.shard[0]))
        sync_tree(staging)
        staging.rename(folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        # Two that create it at once: the second finds the label that the first has put there.
        if not (isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
            raise
    finally:
        os.close(handle)


def _source(roll: Place, folder: Path) -> str:
    """Where a label in a folder of its own says that its image is."""
    return os.path.relpath(roll.path, folder) if isinstance(roll, LocalPlace) else roll.url


def _folder(roll: Place, name: str) -> Path:
    if isinstance(roll, LocalPlace):
        return roll.path / "labels" / name
    raise UserError(f"{roll} is in an object store: its class mask must lie in a local folder")


def _check_label_name(name: str) -> None:
    if not is_plain_name(name):
        raise UserError(f"label name {name[:80]!r} is not usable: 1 to 64 of A-Z a-z 0-9 . _ -", USAGE)


def _register(folder: Path) -> None:
    """Add the label to the list that readers go by; two runs that close at once wait for each other."""
    labels = folder.parent
    with alone(labels):
        for left in labels.glob(f".zarr.json.*{TEMPORARY}"):
            left.unlink()
        names = registered_masks(LocalPlace(labels.parent))
        if folder.name not in names:
            attributes = {"ome": {"version": "0.5", "labels": [*names, folder.name]}}
            write_durably(labels / "zarr.json", group_json(attributes))


def take_away(folder: Path, aside: Path) -> None:
    """Take the label `labels/<name>` from its roll: off the list that readers go by, then to `aside`."""
    labels = folder.parent
    with alone(labels):
        names = [name for name in registered_masks(LocalPlace(labels.parent)) if name != folder.name]
        write_durably(labels / "zarr.json", group_json({"ome": {"version": "0.5", "labels": names}}))
        folder.rename(aside)
        sync(labels)
