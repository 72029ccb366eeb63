"""What a mill hands over in, a roll out: image strips, raw BIL or the patches of an inspection system.

Constant memory whatever the size; nothing half-made stands under the roll's name; an ingest that was killed
goes on where it stopped, if its files are the same, and ends with the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.bil import ingest_bil
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.patch_export import ingest_patches, is_patch_export
from rollsight.inspect.pictures import (
    MAX_DECODED_BYTES,
    SUFFIXES,
    Picture,
    decode,
    read_header,
    to_gray,
)
from rollsight.inspect.roll_format import SHARD_LINES
from rollsight.inspect.roll_sites import check_absent
from rollsight.inspect.rolls import Roll
from rollsight.inspect.sources import (
    METADATA_NAMES,
    STRIP_KEYS,
    Block,
    OnLines,
    Units,
    complete,
    digest,
    one_of,
    read_fields,
    strip_fields,
    write_roll,
)
from rollsight.inspect.strips import MAX_LINES, MAX_MODES, Strip, check_roll_id

Frame = tuple[Picture, ...]  # the files of one stretch of strip, one per lighting mode


@dataclass(frozen=True, slots=True)
class Ingested:
    """A roll, and what the user should know of how its source was read."""

    roll: Roll
    notes: tuple[str, ...]


def ingest(
    source: Path,
    destination: Path | str,
    strip: Strip,
    *,
    units: Units = "mm",
    length_m: float | None = None,
    overwrite: bool = False,
    on_lines: OnLines | None = None,
) -> Ingested:
    """Make whatever `source` is the roll at `destination`, a path or URL that ends in `<roll-id>.zarr`.

    A CSV, or a folder with one, is a patch export (`ingest_patches`); another file is raw BIL with a sidecar
    (`ingest_bil`); another folder holds image strips (`ingest_strips`). length_m, of the strip, is for patch
    exports only. UserError in one line.
    """
    source = Path(source)
    if is_patch_export(source):
        if units == "px":
            raise UserError(f"{source} is a patch export: its places are in mm, so units px cannot be", USAGE)
        patches = ingest_patches(
            source, destination, strip, length_m=length_m, overwrite=overwrite, on_lines=on_lines
        )
        return Ingested(patches.roll, (*patches.notes, f"events: {patches.events}"))
    if length_m is not None:
        raise UserError(f"{source} shows its own length: length_m is for patch exports only", USAGE)
    make = ingest_bil if source.is_file() else ingest_strips
    return Ingested(make(source, destination, strip, units=units, overwrite=overwrite, on_lines=on_lines), ())


def ingest_strips(
    folder: Path,
    destination: Path | str,
    strip: Strip,
    *,
    units: Units = "mm",
    overwrite: bool = False,
    on_lines: OnLines | None = None,
) -> Roll:
    """Stack the images of `folder`, in natural order, along the strip into the roll `destination`.

    destination is the roll's final place `<roll-id>.zarr`, a path or a URL. Files are TIFF, PNG, JPG or BMP,
    uint8 or uint16, gray; RGB becomes its ITU-R BT.601 luma. A folder without images of its own may hold one
    sub-folder per lighting mode, with the same strips in each; their order is that of `lighting`, or of their
    names. `strip.json` or `strip.yaml` beside the images gives the Strip fields that `strip` leaves at None
    or (). units "px" allows a strip without mm_per_px_x, mm_per_line and side. on_lines(done, total) is
    called after each block of lines, and first with those that a killed ingest of the same files left.

    UserError in one line that names the file: no images, mixed widths or depths, modes of different length,
    an unreadable image, one over 2 GiB decoded, a missing field (exit 2), an existing roll (exit 2). All
    headers are read before anything is written, and a broken source leaves no roll.
    """
    folder = Path(folder)
    check_roll_id(strip.roll_id)
    check_absent(destination, overwrite=overwrite)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name the folder that holds the strip images", USAGE)
    beside = one_of(folder, METADATA_NAMES)
    said = {} if beside is None else strip_fields(read_fields(beside, STRIP_KEYS), beside)
    modes = _mode_folders(folder)
    names = tuple(path.name for path in modes) or ("bright",)
    strip = complete(strip, said, beside or folder / METADATA_NAMES[1], units, names)
    if len(strip.lighting) != len(names) or (modes and {*strip.lighting} != {*names}):
        raise UserError(
            f"roll {strip.roll_id} from {folder}: lighting names {', '.join(strip.lighting)} but the folder"
            f" holds {', '.join(names) if modes else 'one mode'}: needed a sub-folder per mode, of its name",
            USAGE,
        )
    frames = _check_frames([folder / name for name in strip.lighting] if modes else [folder])
    first, total = frames[0][0], sum(frame[0].lines for frame in frames)
    if total > MAX_LINES:
        raise UserError(f"{folder} holds {total} lines: the limit of a roll is {MAX_LINES}")
    files = [picture.path for frame in frames for picture in frame]
    return write_roll(
        destination,
        strip,
        first.width,
        first.dtype,
        total,
        lambda start: _blocks(frames, first.dtype, start),
        source=digest(files if beside is None else [beside, *files]),
        overwrite=overwrite,
        on_lines=on_lines,
    )


def natural_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort key by name, its numbers as numbers: img2 before img10; then by plain name (img02, img2)."""
    parts = re.split(r"([0-9]+)", path.name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def _images(folder: Path) -> list[Path]:
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    return sorted(found, key=natural_order)


def _mode_folders(folder: Path) -> list[Path]:
    """The sub-folders with images, in order, where the folder itself has none; else []."""
    if _images(folder):
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    modes = sorted((path for path in found if _images(path)), key=natural_order)
    if len(modes) > MAX_MODES:
        raise UserError(f"{folder} holds {len(modes)} folders of images: the limit is {MAX_MODES} modes")
    return modes


def _check_frames(folders: list[Path]) -> list[Frame]:
    """The images of one folder per mode, in order, all of one width and depth, from their headers."""
    by_mode = [[read_header(path) for path in _images(folder)] for folder in folders]
    if not by_mode[0]:
        raise UserError(f"{folders[0]} holds no images: needed files that end in {', '.join(SUFFIXES)}")
    first = by_mode[0][0]
    for folder, pictures in zip(folders, by_mode, strict=True):
        if len(pictures) != len(by_mode[0]):
            raise UserError(
                f"{folder} holds {len(pictures)} images but {folders[0]} {len(by_mode[0])}: each mode needs"
                " the same strips"
            )
        for picture, same in zip(pictures, by_mode[0], strict=True):
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
            if picture.lines != same.lines:
                raise UserError(
                    f"{picture.path} has {picture.lines} lines but {same.path} has {same.lines}: the modes of"
                    " a strip must have one length"
                )
    frames = list(zip(*by_mode, strict=True))
    for frame in frames:
        size = sum(picture.decoded_bytes for picture in frame)
        if size > MAX_DECODED_BYTES:
            raise UserError(
                f"{frame[0].path} and its other modes are {size / 2**30:.1f} GiB decoded: the limit is"
                f" {MAX_DECODED_BYTES / 2**30:.0f} GiB; cut them along the strip"
            )
    return frames


def _blocks(frames: list[Frame], dtype: str, start: int) -> Iterator[Block]:
    """The roll from line `start` on, as blocks (C, up to 4096, W); one frame is decoded at a time."""
    first_line = 0
    for frame in frames:
        lines = frame[0].lines
        if first_line + lines > start:
            pixels: list[NDArray[Any]] = [decode(picture) for picture in frame]
            for y in range(max(0, start - first_line), lines, SHARD_LINES):
                yield np.stack([to_gray(part[y : y + SHARD_LINES], dtype) for part in pixels]), {}
            del pixels  # before the next frame is decoded
        first_line += lines
