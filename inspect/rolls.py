"""A roll on disk: one OME-Zarr 0.5 group on Zarr v3. The only file that knows the zarr layout.

    <roll-id>.zarr/
      zarr.json          attributes `ome` (multiscales) and `strip` (what a Strip holds)
      0, 1, 2, ...       uint8 or uint16, axes c, y, x; each level a quarter of the one before, by mean
      lines/             encoder int64, t_ns int64, valid uint8: one value per line
      labels/<name>/     class masks, uint8, axes y, x; 0 background, 1..K classes, 255 not inspected

A roll under construction lives beside its place as `.<roll-id>.partial.zarr` and is renamed when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import ArrayLike, DTypeLike, NDArray
from rollsight.inspect.errors import LOCKED, PARTIAL, USAGE, UserError
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

CHUNK = 1024  # px, both ways: few and big, since zarr-python pays about one coroutine per chunk
SHARD_LINES = 4096
LINE_CHUNK = 65536  # of the per-line arrays
FACTOR = 4  # from one pyramid level to the next, both ways
MIN_LEVEL_WIDTH = 16  # px; a level narrower than this shows nothing
NOT_INSPECTED = 255  # label value

SIDES = ("top", "bottom")
SCHEMA = 1
IMAGE_DTYPES = ("uint8", "uint16")

# Metadata is untrusted: sizes are held against these before anything is allocated.
MAX_LINES = 2**31
MAX_WIDTH = 2**17
MAX_MODES = 16
MAX_LINE_BYTES = 2**20  # all modes: 4 modes of 128k px of uint16
MAX_METADATA_BYTES = 2**22
MAX_OVERVIEW_BYTES = 2**30
CODECS = {"bytes", "zstd", "blosc", "gzip", "crc32c", "sharding_indexed"}

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".zarr"
_ARRAY_CONFIG = {"write_empty_chunks": True}  # so a shard that is not there is damage, never black strip
_LINE_ARRAYS = {"encoder": "int64", "t_ns": "int64", "valid": "uint8"}

# zarr's default (cpu + 4 threads) is for one reader that has the machine. Here every band has a reader of its
# own, so a small pool is enough and keeps the cores for the nets. A user's own setting stands.
if zarr.config.get("threading.max_workers") is None:
    zarr.config.set({"threading.max_workers": 4, "async.concurrency": 4})


@dataclass(frozen=True, slots=True)
class Strip:
    """What is known about the strip on a roll; the group attribute `strip`."""

    roll_id: str
    side: str | None  # "top" | "bottom"; None only where units are px
    lighting: tuple[str, ...]  # one name per mode, in the order of axis c
    mm_per_px_x: float | None  # across the strip; None where units are px
    mm_per_line: float | None  # along the strip; None where units are px
    width_mm: float | None = None  # ordered width
    line_id: str | None = None
    started_at: str | None = None  # ISO 8601
    heat: str | None = None
    grade: str | None = None
    scale: tuple[float, ...] | None = None  # per mode: the raw value that is white; default 255 or 65535
    flatfield_id: str | None = None
    closed: bool = False
    lines: int = 0

    @property
    def units(self) -> str:
        """ "mm" where both pixel sizes are known, else "px"."""
        return "px" if self.mm_per_px_x is None or self.mm_per_line is None else "mm"


def check_roll_id(roll_id: str) -> str:
    """Return `roll_id` if it can name a file and nothing else; else UserError with the usage exit code."""
    if not _ID.fullmatch(roll_id):
        raise UserError(
            f"roll id {roll_id[:80]!r} is not usable: it must be 1 to 64 of A-Z a-z 0-9 . _ -"
            " and start with a letter or digit",
            USAGE,
        )
    return roll_id


def roll_path(rolls_folder: Path, roll_id: str) -> Path:
    """Where the roll of this id lives; an id that could leave the folder is refused."""
    return rolls_folder / f"{check_roll_id(roll_id)}{_SUFFIX}"


@dataclass(frozen=True, slots=True, eq=False)
class Roll:
    """A whole roll, read-only. Cheap to open; pickled as its path, so it can be sent to a worker."""

    path: Path
    strip: Strip
    width: int  # px across
    dtype: np.dtype[Any]  # uint8 or uint16
    levels: int  # pyramid levels with level 0
    _array: Any = field(repr=False)

    def __reduce__(self) -> tuple[Callable[[Path], Roll], tuple[Path]]:
        return open_roll, (self.path,)

    @property
    def roll_id(self) -> str:
        return self.strip.roll_id

    @property
    def modes(self) -> int:
        """Lighting modes: the length of axis c."""
        return len(self.strip.lighting)

    @property
    def lines(self) -> int:
        return self.strip.lines

    @property
    def white(self) -> tuple[float, ...]:
        """Per mode: the raw value that counts as 1.0."""
        return self.strip.scale or (float(np.iinfo(self.dtype).max),) * self.modes

    def read(self, y0: int, y1: int) -> NDArray[Any]:
        """Lines y0 to y1 (half-open) of all modes, raw: (C, y1 - y0, W). UserError where damaged."""
        _check_span(y0, y1, self.lines)
        return _read(self._array, (slice(None), slice(y0, y1)), self.path)

    def read_unit(self, y0: int, y1: int) -> NDArray[np.float32]:
        """Lines y0 to y1 over the white of their mode, float32 in [0, 1]: (C, y1 - y0, W)."""
        unit = self.read(y0, y1).astype(np.float32)
        unit /= np.asarray(self.white, np.float32)[:, None, None]
        return np.minimum(unit, np.float32(1), out=unit)  # a sensor may go beyond the white of its scale

    def read_lines(self, name: str, y0: int, y1: int) -> NDArray[Any]:
        """Per line y0 to y1: "encoder" int64 counts, "t_ns" int64 or "valid" uint8 (0, 1): (y1 - y0,)."""
        _check_span(y0, y1, self.lines)
        layout = _check_array(self.path / "lines" / name)
        if layout.shape != (self.lines,) or layout.dtype != _LINE_ARRAYS[name]:
            raise _corrupt(self.path / "lines" / name, f"found {layout.dtype} {layout.shape}")
        return _read(_open_array(self.path, f"lines/{name}"), slice(y0, y1), self.path)

    def overview(self, level: int) -> NDArray[Any]:
        """The whole roll at a pyramid level: (C, ceil(lines / 4^level), ceil(W / 4^level)), raw dtype."""
        if not 0 <= level < self.levels:
            raise ValueError(f"level is {level} but the roll has levels 0 to {self.levels - 1}")
        height, width = _level_shape(self.lines, self.width, level)
        if self.modes * height * width * self.dtype.itemsize > MAX_OVERVIEW_BYTES:
            raise ValueError(
                f"level {level} is {height} x {width} px, too large to hold: take a higher level"
            )
        array = self._array if level == 0 else _open_array(self.path, str(level))
        return _read(array, slice(None), self.path)

    def label_names(self) -> list[str]:
        """The finished labels of this roll."""
        return _registered_labels(self.path)

    def read_label(self, name: str, y0: int, y1: int) -> NDArray[np.uint8]:
        """Lines y0 to y1 of the label: (y1 - y0, W), 0 background, 1..K classes, 255 not inspected."""
        _check_span(y0, y1, self.lines)
        self._check_label(name)
        layout = _check_array(self.path / "labels" / name / "0")
        if layout.shape != (self.lines, self.width) or layout.dtype != "uint8":
            raise _corrupt(
                self.path / "labels" / name,
                f"the mask is {layout.dtype} {layout.shape}, the roll {self.lines} x {self.width}",
            )
        return _read(_open_array(self.path, f"labels/{name}/0"), slice(y0, y1), self.path)

    def label_classes(self, name: str) -> tuple[str, ...]:
        """Class names of the label; class i has mask value i + 1."""
        self._check_label(name)
        return _label_classes(self.path / "labels" / name)

    def _check_label(self, name: str) -> None:
        if name not in self.label_names():
            known = ", ".join(self.label_names()) or "none"
            raise UserError(f"roll {self.roll_id} has no finished label {name[:80]!r}; it has: {known}")


def open_roll(path: Path) -> Roll:
    """Open a whole roll.

    UserError, in one line that names the path: missing, not closed, corrupt or foreign metadata, sizes beyond
    reason, a shard missing. Nothing is allocated before the sizes were checked.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"no roll at {path}: check the id, or make it with `inspect ingest` or `inspect simulate`"
        )
    if path.name.startswith("."):
        raise UserError(f"{path} is a roll under construction: it was interrupted or is still being written")
    attributes = _group_attributes(path)
    strip = _strip_from(attributes.get("strip"), path)
    if not strip.closed:
        raise UserError(
            f"roll {path} is not closed: it was interrupted or is still being written; ingest it again"
        )
    if path.name != f"{strip.roll_id}{_SUFFIX}":
        raise UserError(
            f"{path} holds the roll {strip.roll_id}: its folder must be named {strip.roll_id}{_SUFFIX}"
        )
    levels = _level_count(attributes, path)

    layout = _check_array(path / "0")
    if layout.dtype not in IMAGE_DTYPES or len(layout.shape) != 3:
        raise _corrupt(path, f"array 0 is {layout.dtype} with {len(layout.shape)} axes; needed c, y, x")
    modes, lines, width = layout.shape
    if (
        modes * width * np.dtype(layout.dtype).itemsize > MAX_LINE_BYTES
        or max(modes / MAX_MODES, width / MAX_WIDTH) > 1
    ):
        raise _corrupt(path, f"{modes} modes of {width} px are beyond {MAX_MODES} of {MAX_WIDTH}")
    if modes != len(strip.lighting) or lines != strip.lines:
        raise _corrupt(
            path,
            f"array 0 has {modes} modes and {lines} lines,"
            f" the strip attribute {len(strip.lighting)} and {strip.lines}",
        )
    if layout.shard != (modes, SHARD_LINES, _padded(width)) or layout.chunk != (1, CHUNK, CHUNK):
        raise _corrupt(
            path, f"array 0 has shards {layout.shard} of chunks {layout.chunk}: not a roll of ours"
        )
    for level in range(1, levels):
        expected = (modes, *_level_shape(lines, width, level))
        found = _check_array(path / str(level))
        if found.shape != expected or found.dtype != layout.dtype:
            raise _corrupt(
                path, f"level {level} is {found.dtype} {found.shape}; needed {layout.dtype} {expected}"
            )
    if (missing := _missing_shard(path / "0", layout)) is not None:
        raise UserError(f"roll {path} is damaged: {missing} is missing; ingest it again")
    return Roll(path, strip, width, np.dtype(layout.dtype), levels, _open_array(path, "0"))


class RollWriter:
    """Write a roll block by block in constant memory: one shard of 4096 lines, and its pyramid, is held.

    path is the roll's final place `<roll-id>.zarr`; nothing is there before `close`. As a context manager it
    closes at the end, and on an exception leaves nothing behind. total_lines, where known, is a promise: more
    or fewer lines are refused. UserError: existing roll without overwrite (exit 2), an incomplete Strip
    (exit 2), another process writing the same roll (exit 75), a full disk. The next writer removes what
    a killed one left.
    """

    def __init__(
        self,
        path: Path,
        strip: Strip,
        width: int,
        dtype: DTypeLike,
        *,
        total_lines: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self._strip = _complete(strip, self.path)
        self._dtype = np.dtype(dtype)
        modes = len(strip.lighting)
        if self._dtype.name not in IMAGE_DTYPES:
            raise UserError(f"roll {strip.roll_id} would be {self._dtype}: pixels must be uint8 or uint16")
        if not (0 < width <= MAX_WIDTH and modes * width * self._dtype.itemsize <= MAX_LINE_BYTES):
            raise UserError(f"roll {strip.roll_id} would be {width} px wide: the limit is {MAX_WIDTH} px")
        if total_lines is not None and not 0 < total_lines <= MAX_LINES:
            raise UserError(f"roll {strip.roll_id} would have {total_lines} lines: needed 1 to {MAX_LINES}")
        self._modes, self._width = modes, width
        self._total_lines = total_lines
        self._staging = self.path.with_name(f".{strip.roll_id}.partial{_SUFFIX}")
        self._replaced = self.path.with_name(f".{strip.roll_id}.replaced{_SUFFIX}")
        self._done = 0
        self._lock: int | None = _claim(self._staging)
        try:
            self._restore()
            check_absent(self.path, overwrite=overwrite)
            with _disk_errors(self.path):
                self._create()
        except BaseException:
            self.abort()
            raise

    def _create(self) -> None:
        """Make the empty arrays in the staging folder; their line count is set at close."""
        _write_group(self._staging, {"strip": {"schema": SCHEMA, **asdict(self._strip)}})
        _write_group(self._staging / "lines", {})
        _write_group(self._staging / "labels", {"ome": {"version": "0.5", "labels": []}})
        store = _ShardStore(self._staging)
        self._levels: list[_Rows] = []
        coarser: Callable[[NDArray[Any]], None] | None = None
        for level in reversed(range(level_count(self._width))):
            width = _level_shape(0, self._width, level)[1]
            # Levels 1 and 2 go shard by shard with level 0; above, such shards would be slivers.
            lines = SHARD_LINES // FACTOR**level if level <= 2 else SHARD_LINES
            array = zarr.create_array(
                store=store,
                name=str(level),
                shape=(self._modes, MAX_LINES, width),
                shards=(self._modes, lines, _padded(width)),
                chunks=(1, min(CHUNK, lines), CHUNK),
                dtype=self._dtype,
                compressors=ZstdCodec(level=1),
                fill_value=0,
                dimension_names=("c", "y", "x"),
                config=_ARRAY_CONFIG,
            )
            rows = _Rows(array, (self._modes, lines, width), 1, self._dtype, coarser)
            self._levels.insert(0, rows)
            coarser = partial(_append_mean, rows)
        self._records: dict[str, _Rows] = {}
        for name, dtype in _LINE_ARRAYS.items():
            array = zarr.create_array(
                store=store,
                name=f"lines/{name}",
                shape=(MAX_LINES,),
                chunks=(LINE_CHUNK,),
                dtype=dtype,
                compressors=ZstdCodec(level=1),
                fill_value=0,
                dimension_names=("y",),
                config=_ARRAY_CONFIG,
            )
            self._records[name] = _Rows(array, (LINE_CHUNK,), 0, np.dtype(dtype))

    def append(
        self,
        block: NDArray[Any],
        *,
        encoder: ArrayLike | None = None,
        t_ns: ArrayLike | None = None,
        valid: ArrayLike | None = None,
    ) -> None:
        """Add lines at the tail. block (C, h, W) of the roll's dtype, any h >= 1.

        Per line (h,): encoder int64 counts, default the line's index; t_ns int64, default 0; valid 0 or 1,
        default 1.
        """
        expected = (self._modes, block.shape[1] if block.ndim == 3 else 0, self._width)
        if block.shape != expected or block.dtype != self._dtype:
            raise ValueError(
                f"block is {block.dtype} {block.shape};"
                f" the roll takes {self._dtype} ({self._modes}, lines, {self._width})"
            )
        height = block.shape[1]
        limit = self._total_lines or MAX_LINES
        if self._done + height > limit:
            raise UserError(f"roll {self._strip.roll_id} gets more than the {limit} lines announced")
        index = np.arange(self._done, self._done + height, dtype=np.int64)
        given = {
            "encoder": index if encoder is None else encoder,
            "t_ns": 0 if t_ns is None else t_ns,
            "valid": 1 if valid is None else valid,
        }
        with _disk_errors(self.path):
            for name, values in given.items():
                rows = self._records[name]
                rows.append(np.broadcast_to(np.asarray(values), (height,)).astype(rows.dtype))
            self._levels[0].append(block)
        self._done += height

    def close(self) -> Roll:
        """Write what is buffered, freeze the line count, make it durable and move the roll to its place."""
        try:
            with _disk_errors(self.path):
                self._close()
        except BaseException:
            self.abort()
            raise
        self._release()
        return open_roll(self.path)

    def _close(self) -> None:
        if self._done == 0:
            raise UserError(f"roll {self._strip.roll_id} got no lines: nothing was written")
        if self._total_lines is not None and self._done != self._total_lines:
            raise UserError(
                f"roll {self._strip.roll_id} got {self._done} of the {self._total_lines} lines announced"
            )
        for level, rows in enumerate(self._levels):
            rows.flush()
            _set_lines(self._staging / str(level), 1, _level_shape(self._done, self._width, level)[0])
        for name, rows in self._records.items():
            rows.flush()
            _set_lines(self._staging / "lines" / name, 0, self._done)
        self._strip = replace(self._strip, closed=True, lines=self._done)
        attributes = {
            "ome": {
                "version": "0.5",
                "multiscales": [_multiscale(self._strip, len(self._levels), modes=True)],
            },
            "strip": {"schema": SCHEMA, **asdict(self._strip)},
        }
        _write_group(self._staging, attributes)
        _sync_tree(self._staging)
        if self.path.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.path.rename(self._replaced)
        self._staging.rename(self.path)
        _sync(self.path.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def abort(self) -> None:
        """Leave nothing of the unfinished roll."""
        if self._lock is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._restore()
            self._release()

    def _restore(self) -> None:
        """Bring back the roll that `close` had set aside when it was killed between its two renames."""
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RollWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            self.abort()
        elif self._lock is not None:
            self.close()


class LabelWriter:
    """A class mask beside the image: the OME-Zarr label `labels/<name>`, written by whole shards.

    Different shards may be written at once, from threads or processes; one shard has one writer (zarr-python
    loses chunks when two write into one shard: zarr-python#3682). A shard is durable when `write` returns.
    Readers see the label after `close`; what was not written is 255, not inspected.
    """

    def __init__(
        self, folder: Path, classes: tuple[str, ...], lines: int, width: int, shard_lines: int
    ) -> None:
        """For `create` and `open`, which check what they find."""
        self.folder = folder  # <roll>.zarr/labels/<name>
        self.classes = classes
        self.lines = lines
        self.width = width
        self.shard_lines = shard_lines
        self._array = zarr.open_array(
            store=_DurableStore(folder), path="0", mode="r+", zarr_format=3, config=_ARRAY_CONFIG
        )

    @property
    def name(self) -> str:
        return self.folder.name

    @classmethod
    def create(
        cls, roll_path: Path, name: str, classes: tuple[str, ...], *, lines: int, width: int, shard_lines: int
    ) -> LabelWriter:
        """Make the label, or go on with the one that is there; UserError if that has other classes or sizes.

        lines and width in px, those of the roll; shard_lines a multiple of 16. Class i has mask value i + 1.
        """
        roll_path = Path(roll_path)
        _check_label_name(name)
        if not 0 < len(classes) < NOT_INSPECTED or len(set(classes)) != len(classes):
            raise ValueError(f"a label has 1 to {NOT_INSPECTED - 1} different classes, not {classes}")
        if shard_lines <= 0 or shard_lines % 16:
            raise ValueError(f"shard_lines is {shard_lines}: needed a multiple of 16")
        strip = _strip_from(_group_attributes(roll_path).get("strip"), roll_path)
        found = _check_array(roll_path / "0").shape[-1]
        if lines != strip.lines or width != found:
            raise UserError(
                f"the mask {name} is {lines} x {width} px but the roll {strip.roll_id} is"
                f" {strip.lines} x {found} px: they must be equal"
            )
        folder = roll_path / "labels" / name
        if not folder.exists():
            staging = folder.with_name(f".{name}.{uuid.uuid4().hex}.partial")
            with _disk_errors(folder):
                try:
                    _create_label(staging, strip, classes, lines, width, shard_lines)
                    staging.rename(folder)
                    _sync(folder.parent)
                except BaseException as error:
                    shutil.rmtree(staging, ignore_errors=True)
                    made_by_another = isinstance(error, OSError) and error.errno in (
                        errno.ENOTEMPTY,
                        errno.EEXIST,
                    )
                    if not made_by_another:
                        raise
        writer = cls.open(roll_path, name)
        if (writer.classes, writer.lines, writer.width, writer.shard_lines) != (
            classes,
            lines,
            width,
            shard_lines,
        ):
            raise UserError(
                f"label {folder} exists with {writer.lines} x {writer.width} px, shards of"
                f" {writer.shard_lines} lines and classes {', '.join(writer.classes)}: use another name"
            )
        return writer

    @classmethod
    def open(cls, roll_path: Path, name: str) -> LabelWriter:
        """Open a label made by `create`, finished or not, to write shards; UserError if there is none."""
        folder = Path(roll_path) / "labels" / _check_label_name(name)
        if not folder.is_dir():
            raise UserError(f"no label {name} in roll {roll_path}")
        layout = _check_array(folder / "0")
        if layout.dtype != "uint8" or len(layout.shape) != 2 or layout.shard[1] < layout.shape[1]:
            raise _corrupt(folder, f"array 0 is {layout.dtype} {layout.shape} in shards {layout.shard}")
        return cls(folder, _label_classes(folder), layout.shape[0], layout.shape[1], layout.shard[0])

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
        with _disk_errors(self.folder):
            for y in range(y0, end, self.shard_lines):
                part = mask[y - y0 : y - y0 + self.shard_lines]
                self._array[y : y + part.shape[0]] = part
                # The store synced the file and its folder; the entries of the folders above may be new too.
                _sync(self._shard(y).parent.parent)
                _sync(self.folder / "0")

    def shard_checksum(self, y0: int) -> str:
        """sha256, hex, of the bytes on disk of the shard that starts at line y0; UserError if missing."""
        if y0 % self.shard_lines or not 0 <= y0 < self.lines:
            raise ValueError(f"no shard starts at line {y0}")
        try:
            with self._shard(y0).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"shard {self._shard(y0)} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Build the pyramid (each 4th pixel, so values stay classes), let readers see the label. Idempotent.

        UserError (exit 3) while a shard is missing. One process closes.
        """
        if (missing := _missing_shard(self.folder / "0", _check_array(self.folder / "0"))) is not None:
            raise UserError(f"label {self.folder} is not finished: {missing} is missing", PARTIAL)
        with _disk_errors(self.folder):
            for level in range(1, level_count(self.width)):
                self._write_level(level)
            _sync_tree(self.folder)
            _register_label(self.folder)

    def _write_level(self, level: int) -> None:
        finer = _open_array(self.folder, str(level - 1))
        height, width = _level_shape(self.lines, self.width, level)
        array = zarr.open_array(
            store=_ShardStore(self.folder),
            path=str(level),
            mode="r+",
            zarr_format=3,
            config=_ARRAY_CONFIG,
        )
        for y0 in range(0, height, SHARD_LINES):
            shard = np.empty((min(SHARD_LINES, height - y0), width), np.uint8)
            for y in range(0, shard.shape[0], CHUNK):  # a slab of the finer level at a time keeps memory low
                part = shard[y : y + CHUNK]
                start = (y0 + y) * FACTOR
                rows = _read(finer, slice(start, start + part.shape[0] * FACTOR), self.folder)
                part[...] = rows[::FACTOR, ::FACTOR]
            array[y0 : y0 + shard.shape[0]] = shard

    def _shard(self, y0: int) -> Path:
        return self.folder / "0" / "c" / str(y0 // self.shard_lines) / "0"


def level_count(width: int) -> int:
    """Pyramid levels, with level 0, of a roll of this width in px: down to the last at least 16 px wide."""
    count = 1
    while _level_shape(0, width, count)[1] >= MIN_LEVEL_WIDTH:
        count += 1
    return count


def quarter(block: NDArray[Any]) -> NDArray[Any]:
    """The mean of each 4 x 4 px, halves rounded up: (C, h, W) -> (C, ceil(h / 4), ceil(W / 4)), same dtype.

    At the right and lower border the mean is over the pixels that are there.
    """
    modes, height, width = block.shape
    rows, columns = _level_shape(height, width, 1)
    total = np.uint16 if block.dtype == np.uint8 else np.uint32  # 16 x the largest value fits
    by_row = np.zeros((modes, rows, width), total)
    for i in range(FACTOR):
        part = block[:, i::FACTOR]
        by_row[:, : part.shape[1]] += part
    sums = np.zeros((modes, rows, columns), total)
    for i in range(FACTOR):
        part = by_row[:, :, i::FACTOR]
        sums[:, :, : part.shape[2]] += part
    in_row = np.minimum(FACTOR, height - FACTOR * np.arange(rows))
    in_column = np.minimum(FACTOR, width - FACTOR * np.arange(columns))
    count = np.outer(in_row, in_column).astype(total)
    mean: NDArray[Any] = (sums + count // 2) // count
    return mean.astype(block.dtype)


def check_absent(path: Path, *, overwrite: bool) -> None:
    """UserError with the usage exit code where the roll exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"roll {path} exists: choose another id, or say --overwrite", USAGE)


class _ShardStore(LocalStore):  # type: ignore[misc] # zarr is untyped to mypy (follow_imports = "skip")
    """Local files for a writer of whole shards: blind to what a shard held before.

    zarr reads a shard before each write into it, so one cut short by a power cut could not be written again.
    """

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        if not key.endswith("zarr.json"):
            return None
        return await super().get(key, prototype, byte_range)


class _DurableStore(_ShardStore):
    """The same, and what was set survives a power cut: LocalStore renames into place but never syncs."""

    async def set(self, key: str, value: Any) -> None:
        path = Path(self.root) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a thread: all arrays of the process share this one event loop, and a sync may take its time.
        await asyncio.to_thread(write_durably, path, value.as_buffer_like())


def _append_mean(rows: _Rows, finer: NDArray[Any]) -> None:
    rows.append(quarter(finer))


class _Rows:
    """Rows on their way into one array: gathered until they fill a shard, which is then written at once."""

    def __init__(
        self,
        array: Any,
        shape: tuple[int, ...],
        axis: int,
        dtype: np.dtype[Any],
        on_written: Callable[[NDArray[Any]], None] | None = None,
    ) -> None:
        self.dtype = dtype
        self._array = array
        self._buffer = np.empty(shape, dtype)
        self._axis = axis
        self._on_written = on_written  # gets each shard once; the rows are only lent
        self._held = 0  # rows in the buffer
        self._start = 0  # row of the array where the buffer starts

    def append(self, block: NDArray[Any]) -> None:
        size, taken = block.shape[self._axis], 0
        while taken < size:
            count = min(size - taken, self._buffer.shape[self._axis] - self._held)
            self._buffer[self._part(self._held, self._held + count)] = block[self._part(taken, taken + count)]
            self._held += count
            taken += count
            if self._held == self._buffer.shape[self._axis]:
                self.flush()

    def flush(self) -> None:
        """Write what is held: the rows of a full shard, or at the end of the roll the last few."""
        if self._held == 0:
            return
        rows = self._buffer[self._part(0, self._held)]
        self._array[self._part(self._start, self._start + self._held)] = rows
        self._start += self._held
        self._held = 0
        if self._on_written is not None:
            self._on_written(rows)

    def _part(self, start: int, stop: int) -> tuple[slice, ...]:
        return (*(slice(None),) * self._axis, slice(start, stop))


@dataclass(frozen=True, slots=True)
class _Layout:
    """What an array's metadata says, within bounds."""

    shape: tuple[int, ...]
    dtype: str
    shard: tuple[int, ...]  # the file's extent; equal to chunk where the array has no shards
    chunk: tuple[int, ...]


def _level_shape(height: int, width: int, level: int) -> tuple[int, int]:
    """Rows and columns at a level; ceil(ceil(n / 4) / 4) = ceil(n / 16), so one division will do."""
    step = FACTOR**level
    return -(-height // step), -(-width // step)


def _padded(width: int) -> int:
    """A shard is a whole number of chunks, so it overhangs the array on the right."""
    return -(-width // CHUNK) * CHUNK


def _check_span(y0: int, y1: int, lines: int) -> None:
    if not 0 <= y0 < y1 <= lines:
        raise ValueError(f"lines {y0} to {y1} are not within the roll's {lines}")


def _corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a readable roll: {reason}")


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written becomes one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free the disk or choose another place"
        ) from error


def _read(array: Any, part: slice | tuple[slice, ...], path: Path) -> NDArray[Any]:
    try:
        return np.asarray(array[part])
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # zarr raises whatever its codecs do: a bad checksum, a bad frame, a short file
        raise UserError(f"{path} is damaged: its pixels cannot be read ({error})") from error


def _open_array(group: Path, name: str) -> Any:
    try:
        return zarr.open_array(store=LocalStore(group, read_only=True), path=name, mode="r", zarr_format=3)
    except Exception as error:  # what the checks before did not foresee in foreign metadata
        raise _corrupt(group / name, str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file, else UserError."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_METADATA_BYTES:
                raise _corrupt(path, f"metadata over {MAX_METADATA_BYTES} bytes")
            data = file.read()
    except OSError as error:
        raise _corrupt(path, error.strerror or str(error)) from error
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"the JSON is broken ({error})") from error
    if not isinstance(found, dict):
        raise _corrupt(path, "the JSON is no object")
    return found


def _group_attributes(path: Path) -> dict[str, Any]:
    metadata = _read_json(path / "zarr.json")
    attributes = metadata.get("attributes", {})
    if metadata.get("zarr_format") != 3 or metadata.get("node_type") != "group":
        raise _corrupt(path / "zarr.json", "needed a group of Zarr v3")
    if not isinstance(attributes, dict):
        raise _corrupt(path / "zarr.json", "attributes is no object")
    return attributes


def _sizes(raw: object, path: Path, what: str) -> tuple[int, ...]:
    if not isinstance(raw, list) or not 1 <= len(raw) <= 3:
        raise _corrupt(path, f"{what} is {str(raw)[:60]}; needed 1 to 3 sizes")
    if any(type(size) is not int or not 0 < size <= MAX_LINES for size in raw):
        raise _corrupt(path, f"{what} is {str(raw)[:60]}; needed sizes from 1 to {MAX_LINES}")
    return tuple(raw)


def _check_array(folder: Path) -> _Layout:
    """The layout of the array in `folder`, from its metadata alone; UserError where beyond the bounds."""
    path = folder / "zarr.json"
    metadata = _read_json(path)
    if metadata.get("zarr_format") != 3 or metadata.get("node_type") != "array":
        raise _corrupt(path, "needed an array of Zarr v3")
    shape = _sizes(metadata.get("shape"), path, "shape")
    try:
        shard = _sizes(metadata["chunk_grid"]["configuration"]["chunk_shape"], path, "chunk_shape")
        codecs = metadata["codecs"]
        chunk = shard
        if codecs[0]["name"] == "sharding_indexed":
            chunk = _sizes(codecs[0]["configuration"]["chunk_shape"], path, "inner chunk_shape")
            codecs = [*codecs, *codecs[0]["configuration"]["codecs"]]
        names = {codec["name"] for codec in codecs}
        dtype = metadata["data_type"]
        separator = metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
        regular = metadata["chunk_grid"]["name"] == "regular"
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _corrupt(path, f"the array metadata is incomplete ({error!r})") from error
    if dtype not in (*IMAGE_DTYPES, "int64"):
        raise _corrupt(path, f"data type {str(dtype)[:40]}")
    if not regular or separator != "/" or metadata["chunk_key_encoding"].get("name") != "default":
        raise _corrupt(path, "needed a regular chunk grid with default chunk keys")
    if not names <= CODECS:
        raise _corrupt(path, f"unknown codec {str(sorted(map(str, names - CODECS)))[:80]}")
    if not len(shape) == len(shard) == len(chunk) or any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise _corrupt(path, f"shape {shape}, shards {shard} and chunks {chunk} do not fit")
    if math.prod(shard) * np.dtype(dtype).itemsize > MAX_LINE_BYTES * SHARD_LINES:
        raise _corrupt(path, f"shards of {shard} are too large")
    return _Layout(shape, dtype, shard, chunk)


def _missing_shard(folder: Path, layout: _Layout) -> Path | None:
    """The first shard file of the array that is not there or empty."""
    counts = [range(-(-size // extent)) for size, extent in zip(layout.shape, layout.shard, strict=True)]
    for index in itertools.product(*counts):
        shard = folder.joinpath("c", *map(str, index))
        if not shard.is_file() or shard.stat().st_size == 0:
            return shard
    return None


def _level_count(attributes: dict[str, Any], path: Path) -> int:
    """Levels of the pyramid, from the `ome` attribute; their paths must be "0", "1", ... and nothing else."""
    try:
        datasets = attributes["ome"]["multiscales"][0]["datasets"]
        paths = [dataset["path"] for dataset in datasets]
    except (KeyError, TypeError, IndexError) as error:
        raise _corrupt(path / "zarr.json", "no OME-Zarr 0.5 multiscales") from error
    if not 0 < len(paths) <= 16 or paths != [str(level) for level in range(len(paths))]:
        raise _corrupt(path / "zarr.json", f"multiscales paths are {str(paths)[:60]}; needed 0, 1, ...")
    return len(paths)


def _strip_from(raw: object, path: Path) -> Strip:
    """The Strip of a roll's attributes, each value checked; keys of later versions are left aside."""
    where = path / "zarr.json"
    if not isinstance(raw, dict):
        raise _corrupt(where, "the attribute strip is missing")
    if raw.get("schema") != SCHEMA:
        raise _corrupt(where, f"strip schema is {str(raw.get('schema'))[:20]}; needed {SCHEMA}")
    values: dict[str, Any] = {}
    for name in (entry.name for entry in fields(Strip)):
        value = raw.get(name)
        values[name] = tuple(value) if isinstance(value, list) else value
    closed, lines = values["closed"], values["lines"]
    if type(closed) is not bool or type(lines) is not int or not 0 <= lines <= MAX_LINES:
        raise _corrupt(where, f"strip says closed {str(closed)[:20]}, lines {str(lines)[:20]}")
    problem = strip_problem(strip := Strip(**values))
    if problem is not None:
        raise _corrupt(where, problem)
    return strip


def strip_problem(strip: Strip) -> str | None:
    """What is wrong with the values of a complete Strip, field and value in words; None where nothing is."""
    if not isinstance(strip.roll_id, str) or not _ID.fullmatch(strip.roll_id):
        return f"roll_id is {str(strip.roll_id)[:80]!r}"
    if strip.units == "mm" and strip.side is None:
        return "side is missing: it must be top or bottom"
    if strip.side is not None and strip.side not in SIDES:
        return f"side is {str(strip.side)[:40]!r}: it must be top or bottom"
    if (strip.mm_per_px_x is None) != (strip.mm_per_line is None):
        return "mm_per_px_x and mm_per_line must both be given, or neither"
    lighting = strip.lighting
    if not isinstance(lighting, tuple) or not 1 <= len(lighting) <= MAX_MODES:
        return f"lighting is {str(lighting)[:60]}: it must name 1 to {MAX_MODES} modes"
    if not all(isinstance(mode, str) and 0 < len(mode) <= 64 for mode in lighting) or len({*lighting}) < len(
        lighting
    ):
        return f"lighting is {str(lighting)[:60]}: it must be different names"
    for name in ("mm_per_px_x", "mm_per_line", "width_mm"):
        value = getattr(strip, name)
        if value is not None and not _is_positive(value):
            return f"{name} is {str(value)[:40]}: it must be a number over 0"
    if strip.scale is not None:
        if not isinstance(strip.scale, tuple) or len(strip.scale) != len(lighting):
            return f"scale is {str(strip.scale)[:60]}: it must be one number per lighting mode"
        if not all(_is_positive(value) for value in strip.scale):
            return f"scale is {str(strip.scale)[:60]}: it must be numbers over 0"
    for name in ("line_id", "started_at", "heat", "grade", "flatfield_id"):
        value = getattr(strip, name)
        if value is not None and (not isinstance(value, str) or len(value) > 256):
            return f"{name} is {str(value)[:40]}: it must be text of at most 256 characters"
    return None


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < cast(float, value) < 1e9  # which also leaves out nan and inf


def _complete(strip: Strip, path: Path) -> Strip:
    """The Strip of a roll to be written, or UserError with the usage exit code."""
    check_roll_id(strip.roll_id)
    if path.name != f"{strip.roll_id}{_SUFFIX}":
        raise UserError(f"{path} must be named {strip.roll_id}{_SUFFIX}", USAGE)
    if (problem := strip_problem(strip)) is not None:
        raise UserError(f"roll {strip.roll_id}: {problem}", USAGE)
    return replace(strip, closed=False, lines=0)


def _multiscale(strip: Strip, levels: int, *, modes: bool) -> dict[str, Any]:
    """OME-Zarr 0.5 multiscales entry: y along the strip from its head, x across from the first pixel.

    The mean of 4 x 4 px lies in their middle, hence the translation; a label's level takes the first of four.
    """
    unit = {"unit": "millimeter"} if strip.units == "mm" else {}
    size = (strip.mm_per_line or 1.0, strip.mm_per_px_x or 1.0)
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] if modes else []
    axes += [{"name": "y", "type": "space", **unit}, {"name": "x", "type": "space", **unit}]
    datasets = []
    for level in range(levels):
        step = FACTOR**level
        head = [1.0] if modes else []
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": head + [step * mm for mm in size]}]
        if modes and level:
            middle = [0.0] + [(step - 1) / 2 * mm for mm in size]
            transforms.append({"type": "translation", "translation": middle})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    kind = "mean" if modes else "nearest"
    return {"name": strip.roll_id, "type": kind, "axes": axes, "datasets": datasets}


def _create_label(
    staging: Path, strip: Strip, classes: tuple[str, ...], lines: int, width: int, shard_lines: int
) -> None:
    """The empty label: all its arrays and metadata, durable, for the caller to move to its place."""
    levels = level_count(width)
    named = [*enumerate(classes, start=1), (NOT_INSPECTED, "not inspected")]
    ome = {
        "version": "0.5",
        "multiscales": [_multiscale(strip, levels, modes=False)],
        "image-label": {
            "properties": [{"label-value": value, "class": name} for value, name in named],
            "source": {"image": "../../"},
        },
    }
    _write_group(staging, {"ome": ome})
    for level in range(levels):
        shard = SHARD_LINES if level else shard_lines  # above level 0 there is one writer, at close
        zarr.create_array(
            store=_ShardStore(staging),
            name=str(level),
            shape=_level_shape(lines, width, level),
            shards=(shard, _padded(_level_shape(0, width, level)[1])),
            chunks=(math.gcd(shard, CHUNK), CHUNK),
            dtype="uint8",
            compressors=ZstdCodec(level=1),
            fill_value=NOT_INSPECTED,
            dimension_names=("y", "x"),
            config=_ARRAY_CONFIG,
        )
    _sync_tree(staging)


def _check_label_name(name: str) -> str:
    if not _ID.fullmatch(name):
        raise UserError(f"label name {name[:80]!r} is not usable: 1 to 64 of A-Z a-z 0-9 . _ -", USAGE)
    return name


def _registered_labels(roll: Path) -> list[str]:
    """The labels that `labels/zarr.json` lists; [] where the roll has none."""
    if not (roll / "labels" / "zarr.json").exists():
        return []
    ome = _group_attributes(roll / "labels").get("ome")
    names = ome.get("labels") if isinstance(ome, dict) else None
    if not isinstance(names, list) or not all(
        isinstance(name, str) and _ID.fullmatch(name) for name in names
    ):
        raise _corrupt(roll / "labels" / "zarr.json", "needed a list of label names")
    return names


def _register_label(folder: Path) -> None:
    """Add the label to the list that readers go by; two runs that close at once wait for each other."""
    labels = folder.parent
    handle = os.open(labels, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        names = _registered_labels(labels.parent)
        if folder.name not in names:
            attributes = {"ome": {"version": "0.5", "labels": [*names, folder.name]}}
            write_durably(labels / "zarr.json", _group_json(attributes))
    finally:
        os.close(handle)


def _label_classes(folder: Path) -> tuple[str, ...]:
    """Class names in the order of their values, from the `image-label` properties."""
    try:
        properties = _group_attributes(folder)["ome"]["image-label"]["properties"]
        named = {entry["label-value"]: entry["class"] for entry in properties}
    except (KeyError, TypeError) as error:
        raise _corrupt(
            folder / "zarr.json", "no image-label properties with label-value and class"
        ) from error
    named.pop(NOT_INSPECTED, None)
    if sorted(named) != [*range(1, len(named) + 1)] or not all(
        isinstance(name, str) for name in named.values()
    ):
        raise _corrupt(folder / "zarr.json", "label values must be 1 to the number of classes")
    return tuple(named[value] for value in sorted(named))


def _set_lines(folder: Path, axis: int, lines: int) -> None:
    """Freeze an array's length. By its metadata: zarr's own resize would look for every chunk cut off."""
    metadata = _read_json(folder / "zarr.json")
    metadata["shape"][axis] = lines
    (folder / "zarr.json").write_text(json.dumps(metadata, indent=2))


def _group_json(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=2).encode()


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """For folders under construction, which are synced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_bytes(_group_json(attributes))


def write_durably(path: Path, data: Any) -> None:
    """The file holds either what it held or all of data (bytes), also after a power cut.

    UserError where the disk is full or the folder not writable.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with _disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Make the bytes of a file, or the entries of a folder, durable: a rename may be lost in a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(top: Path) -> None:
    """Make all files and folders under `top` durable. One pass at the end: each sync waits for the disk."""
    for folder, _, names in os.walk(top):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _claim(staging: Path) -> int:
    """An empty staging folder and the lock on it, which a kill gives back; UserError (exit 75) if held."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            staging.mkdir()
        except FileExistsError:
            stale = True
        else:
            stale = False
        handle = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise UserError(f"{staging} is being written by another process: wait for it", LOCKED) from error
        if not stale and staging.exists() and os.fstat(handle).st_ino == staging.stat().st_ino:
            return handle
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(staging)
        os.close(handle)
    raise UserError(f"{staging} is being written by another process: wait for it", LOCKED)
