"""A roll: one OME-Zarr 0.5 group on Zarr v3, in a folder of a local disk or under the URL of an object store.

    <roll-id>.zarr/
      zarr.json          attributes `ome` (multiscales) and `strip` (what a Strip holds)
      0, 1, 2, ...       uint8 or uint16, axes c, y, x; each level a quarter of the one before, by mean
      lines/             encoder int64, t_ns int64, valid uint8: one value per line
      labels/<name>/     class masks, uint8, axes y, x; 0 background, 1..K classes, 255 not inspected
      frontier.json      only while it is written: how many lines are safely there

Three ways to come into being, and what each promises when its writer is killed:

- Staged, the usual one: a roll under construction lies beside its place as `.<roll-id>.partial.zarr` and is
  renamed when it is whole. With a `source` it can go on after a kill, from its last whole shard.
- Live: the roll stands under its name from the start, not closed. Each whole shard of 4096 lines is synced,
  then frontier.json is renamed into place; readers with live=True see the lines up to there. A kill loses at
  most the unfinished shard; what lies past the frontier is written over when the writer goes on.
- Remote, by URL: an object store has neither lock nor rename nor fsync. The roll is whole when its zarr.json
  says closed, and that is the last PUT. What falls short of a local disk: an overwritten roll is gone as soon
  as its successor begins; a killed writer leaves objects until the next one, and cannot go on; of two
  writers at once the later takes over, which the earlier notices at its next shard, or not at all if its PUT
  is on the way just then. Live and resume are refused there; a class mask lies in a local folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.masks import LabelWriter, is_closed, mask_classes, read_mask, registered_masks
from rollsight.inspect.pyramid import FACTOR, Rows, level_count, level_shape, quarter
from rollsight.inspect.roll_format import (
    CHUNK,
    IMAGE_DTYPES,
    LINE_ARRAYS,
    LINE_CHUNK,
    MAX_LINE_BYTES,
    MAX_WIDTH,
    NOT_INSPECTED,
    SHARD_LINES,
    SUFFIX,
    Layout,
    array_shape,
    check_array,
    check_files,
    check_levels,
    corrupt,
    create_array,
    group_attributes,
    group_json,
    image_layout,
    lines_layout,
    open_for_reading,
    open_for_writing,
    parse_json,
    read_array,
    read_json,
    roll_attributes,
    set_lines,
    strip_from,
)
from rollsight.inspect.roll_places import LocalPlace, Place, RemotePlace, place_of, write_durably
from rollsight.inspect.roll_sites import FRONTIER, check_absent, site_of
from rollsight.inspect.strips import MAX_LINES, MAX_MODES, SIDES, Strip, check_roll_id, strip_problem

__all__ = [  # what the other modules know of rolls
    "CHUNK",
    "IMAGE_DTYPES",
    "MAX_LINES",
    "MAX_LINE_BYTES",
    "MAX_MODES",
    "MAX_WIDTH",
    "NOT_INSPECTED",
    "SHARD_LINES",
    "SIDES",
    "LabelWriter",
    "Lines",
    "Roll",
    "RollWriter",
    "Strip",
    "check_absent",
    "check_roll_id",
    "level_count",
    "open_roll",
    "quarter",
    "roll_path",
    "strip_problem",
    "write_durably",
]

MAX_OVERVIEW_BYTES = 2**30
_LIVE_LEVELS = 3  # of the pyramid, with level 0: those whose shards go with the shards of level 0


class Lines(NamedTuple):
    """What is known of each line: encoder int64 counts, t_ns int64, valid bool; each (h,)."""

    encoder: NDArray[np.int64]
    t_ns: NDArray[np.int64]
    valid: NDArray[np.bool_]


def roll_path(rolls_folder: Path, roll_id: str) -> Path:
    """Where the roll of this id lives; an id that could leave the folder is refused."""
    return rolls_folder / f"{check_roll_id(roll_id)}{SUFFIX}"


@dataclass(frozen=True, slots=True, eq=False)
class Roll:
    """A roll, read-only: whole, or as far as it is written. Pickled as its location, for a worker."""

    location: Path | str  # a path, or the URL of an object store
    strip: Strip  # of a roll that grows: closed is False, lines those readable when it was opened
    width: int  # px across
    dtype: np.dtype[Any]  # uint8 or uint16
    levels: int  # pyramid levels with level 0
    _place: Place = field(repr=False)
    _arrays: dict[str, Any] = field(default_factory=dict, repr=False)  # opened when they are first read

    def __reduce__(self) -> tuple[Callable[..., Roll], tuple[Path | str, int | None]]:
        return _reopen, (self.location, None if self.strip.closed else self.lines)

    @property
    def path(self) -> Path:
        """The roll's folder; UserError where the roll is in an object store."""
        return self._place.path

    @property
    def is_writable(self) -> bool:
        """Whether a class mask can lie beside the image; else it needs a folder of its own."""
        return isinstance(self._place, LocalPlace) and os.access(self._place.path, os.W_OK)

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

    def frontier(self) -> tuple[int, bool]:
        """The lines readable now, and whether the roll is closed, so that no more will come."""
        return _frontier(self._place)

    def at(self, lines: int) -> Roll:
        """The roll as it is now, its first `lines` lines; ValueError beyond the frontier."""
        now = open_roll(self.location, live=isinstance(self._place, LocalPlace))
        if not 0 <= lines <= now.lines:
            raise ValueError(f"roll {self.roll_id} has {now.lines} lines now, not {lines}")
        if lines == now.lines:
            return now
        strip = replace(now.strip, closed=False, lines=lines)
        return replace(now, strip=strip, levels=min(now.levels, _LIVE_LEVELS), _arrays={})

    def read(self, y0: int, y1: int) -> NDArray[Any]:
        """Lines y0 to y1 (half-open) of all modes, raw: (C, y1 - y0, W). UserError where damaged."""
        _check_span(y0, y1, self.lines)
        return read_array(self._level(0), (slice(None), slice(y0, y1)), self._place)

    def read_unit(self, y0: int, y1: int) -> NDArray[np.float32]:
        """Lines y0 to y1 over the white of their mode, float32 in [0, 1]: (C, y1 - y0, W)."""
        unit = self.read(y0, y1).astype(np.float32)
        unit /= np.asarray(self.white, np.float32)[:, None, None]
        return np.minimum(unit, np.float32(1), out=unit)  # a sensor may go beyond the white of its scale

    def read_lines(self, y0: int, y1: int) -> Lines:
        """What is known of the lines y0 to y1. UserError where damaged, or not of one value per line."""
        _check_span(y0, y1, self.lines)
        part = slice(y0, y1)
        encoder, t_ns, valid = (
            read_array(self._record(name), part, f"{self._place}/lines/{name}") for name in LINE_ARRAYS
        )
        return Lines(encoder, t_ns, valid.astype(np.bool_))

    def overview(self, level: int) -> NDArray[Any]:
        """The whole roll at a pyramid level: (C, ceil(lines / 4^level), ceil(W / 4^level)), raw dtype.

        Of a roll that is not closed only the levels under 3 are there.
        """
        if not 0 <= level < self.levels:
            raise ValueError(f"level is {level} but the roll has levels 0 to {self.levels - 1}")
        height, width = level_shape(self.lines, self.width, level)
        if self.modes * height * width * self.dtype.itemsize > MAX_OVERVIEW_BYTES:
            raise ValueError(
                f"level {level} is {height} x {width} px, too large to hold: take a higher level"
            )
        return read_array(self._level(level), (slice(None), slice(0, height)), self._place)

    def label_names(self) -> list[str]:
        """The finished labels of this roll."""
        return registered_masks(self._place)

    def read_label(self, name: str, y0: int, y1: int, *, folder: Path | None = None) -> NDArray[np.uint8]:
        """Lines y0 to y1 of the label: (y1 - y0, W), 0 background, 1..K classes, 255 not inspected.

        folder: where the mask lies if not beside the image.
        """
        _check_span(y0, y1, self.lines)
        return read_mask(self._label(name, folder), (self.lines, self.width), y0, y1)

    def label_classes(self, name: str, *, folder: Path | None = None) -> tuple[str, ...]:
        """Class names of the label; class i has mask value i + 1."""
        return mask_classes(self._label(name, folder))

    def _label(self, name: str, folder: Path | None) -> Place:
        if folder is not None:
            if not is_closed(folder):
                raise UserError(f"roll {self.roll_id} has no finished label {name[:80]!r} at {folder}")
            return LocalPlace(folder)
        if name not in (names := self.label_names()):
            known = ", ".join(names) or "none"
            raise UserError(f"roll {self.roll_id} has no finished label {name[:80]!r}; it has: {known}")
        return self._place / "labels" / name

    def _level(self, level: int) -> Any:
        layout = image_layout(level, self.modes, self.lines, self.width, self.dtype.name)
        return self._open(str(level), layout)

    def _record(self, name: str) -> Any:
        return self._open(f"lines/{name}", lines_layout(name, self.lines))

    def _open(self, name: str, needed: Layout) -> Any:
        """The array, its metadata and its files checked when it is first asked for."""
        if name not in self._arrays:
            layout = _checked(self._place / name, needed, closed=self.strip.closed)
            if name != "0":  # whose files open_roll has looked for
                check_files(self._place / name, layout, needed.shape[needed.axes.index("y")])
            self._arrays[name] = open_for_reading(self._place, name, layout)
        return self._arrays[name]


def open_roll(location: Path | str, *, live: bool = False) -> Roll:
    """Open a whole roll by its path or URL; with `live` also one that still grows, up to its frontier.

    UserError, in one line that names the place: missing, not closed, corrupt or foreign metadata, sizes
    beyond reason, a shard missing; a URL whose fsspec package is missing; `live` on an object store. Nothing
    is allocated before the sizes were checked.
    """
    place = place_of(location)
    if isinstance(place, RemotePlace):
        if live:
            raise UserError(f"{place} is in an object store: only a roll on a local disk can grow", USAGE)
        if place.read("zarr.json") is None:
            raise UserError(f"no roll at {place}: check the URL")
    elif not place.path.is_dir():
        raise UserError(
            f"no roll at {place}: check the id, or make it with `inspect ingest` or `inspect simulate`"
        )
    if place.name.startswith("."):
        raise UserError(f"{place} is a roll under construction: it was interrupted or is still being written")
    published = _published(place) if live else 0
    attributes = group_attributes(place)
    strip = strip_from(attributes, place)
    if not strip.closed:
        if not live:
            raise UserError(
                f"roll {place} is not closed: it was interrupted or is still being written;"
                " scan it with --live, or make it again"
            )
        strip = replace(strip, lines=published)
    if place.name != f"{strip.roll_id}{SUFFIX}":
        raise UserError(
            f"{place} holds the roll {strip.roll_id}: its folder must be named {strip.roll_id}{SUFFIX}"
        )
    modes, _, width = array_shape(place / "0", 3)
    dtype = read_json(place / "0").get("data_type")
    if dtype not in IMAGE_DTYPES:
        raise corrupt(place, f"array 0 is {str(dtype)[:40]}; needed uint8 or uint16")
    if width > MAX_WIDTH or modes * width * np.dtype(dtype).itemsize > MAX_LINE_BYTES:
        raise corrupt(place, f"{modes} modes of {width} px are beyond {MAX_MODES} of {MAX_WIDTH}")
    if modes != len(strip.lighting):
        raise corrupt(place, f"array 0 has {modes} modes, the strip attribute {len(strip.lighting)}")
    levels = check_levels(attributes, width, place)
    for level in range(levels):
        needed = image_layout(level, modes, strip.lines, width, dtype)
        layout = _checked(place / str(level), needed, closed=strip.closed)
        if level == 0:
            check_files(place / "0", layout, strip.lines)
    levels = levels if strip.closed else min(levels, _LIVE_LEVELS)
    found: Path | str = place.path if isinstance(place, LocalPlace) else place.url
    return Roll(found, strip, width, np.dtype(dtype), levels, place)


def _reopen(location: Path | str, lines: int | None) -> Roll:
    return open_roll(location) if lines is None else open_roll(location, live=True).at(lines)


def _checked(place: Place, needed: Layout, *, closed: bool) -> Layout:
    """The array's layout: that needed, or of more lines where it still grows; UserError for any other."""
    if not closed:
        axis, shape = needed.axes.index("y"), [*needed.shape]
        shape[axis] = max(shape[axis], array_shape(place, len(shape))[axis])
        needed = replace(needed, shape=tuple(shape))
    check_array(place, needed)
    return needed


def _frontier(place: Place) -> tuple[int, bool]:
    published = _published(place) if isinstance(place, LocalPlace) else 0
    strip = strip_from(group_attributes(place), place)
    return (strip.lines, True) if strip.closed else (published, False)


def _published(place: Place) -> int:
    """The lines that frontier.json says are there; read it before zarr.json, since it goes after that."""
    data = place.read(FRONTIER)
    lines = 0 if data is None else parse_json(data, f"{place}/{FRONTIER}").get("lines")
    if type(lines) is not int or not 0 <= lines <= MAX_LINES or lines % SHARD_LINES:
        raise corrupt(f"{place}/{FRONTIER}", f"lines is {str(lines)[:40]}")
    return lines


def _check_span(y0: int, y1: int, lines: int) -> None:
    if not 0 <= y0 < y1 <= lines:
        raise ValueError(f"lines {y0} to {y1} are not within the roll's {lines}")


class RollWriter:
    """Write a roll block by block in constant memory: one shard of 4096 lines, and its pyramid, is held.

    location is the roll's final place `<roll-id>.zarr`, a path or a URL; nothing opens there before `close`,
    but with `live` readers that ask for it see the lines up to the frontier. total_lines, where known, is a
    promise: more or fewer lines are refused. source, where said, is a digest of where the lines come from:
    then each whole shard is made durable, and after a kill `resume` goes on with the same source.

    As a context manager it closes at the end. On an exception it leaves nothing behind, but where it could be
    resumed only a UserError does that, not a Ctrl-C; a live roll stays in any case. UserError: existing roll
    without overwrite (exit 2), an incomplete Strip (exit 2), `live` at a URL (exit 2), another process
    writing the same roll (exit 75), a full disk. The next writer removes what a killed one left.
    """

    def __init__(
        self,
        location: Path | str,
        strip: Strip,
        width: int,
        dtype: DTypeLike,
        *,
        total_lines: int | None = None,
        overwrite: bool = False,
        live: bool = False,
        source: str = "",
        _resume: bool = False,
    ) -> None:
        place = place_of(location)
        self.location = location
        self.committed = 0  # lines that no kill can take any more; counted where the writer can be resumed
        self._strip = _complete(strip, place)
        self._dtype = np.dtype(dtype)
        self._modes, self._width = len(strip.lighting), width
        self._total_lines = total_lines
        self._done = 0
        self._ended = False  # closed, aborted or failed
        self._source = source
        if self._dtype.name not in IMAGE_DTYPES:
            raise UserError(f"roll {strip.roll_id} would be {self._dtype}: pixels must be uint8 or uint16")
        if not (0 < width <= MAX_WIDTH and self._modes * width * self._dtype.itemsize <= MAX_LINE_BYTES):
            raise UserError(f"roll {strip.roll_id} would be {width} px wide: the limit is {MAX_WIDTH} px")
        if total_lines is not None and not 0 < total_lines <= MAX_LINES:
            raise UserError(f"roll {strip.roll_id} would have {total_lines} lines: needed 1 to {MAX_LINES}")
        self._resumable = live or source != ""
        self._site = site_of(place, strip.roll_id, live=live, durable=self._resumable)
        try:
            with place.errors():
                left = self._site.begin(self._attributes(), overwrite=overwrite, resume=_resume)
                if left and not self._fits():
                    self._site.drop(overwrite=overwrite)
                    left = False
                if left:
                    self._go_on()
                else:
                    self._create()
        except BaseException as error:
            self._fail(error)
            raise

    @classmethod
    def resume(
        cls,
        location: Path | str,
        strip: Strip,
        width: int,
        dtype: DTypeLike,
        *,
        source: str,
        total_lines: int | None = None,
        overwrite: bool = False,
        live: bool = False,
    ) -> RollWriter:
        """Go on behind the whole shards that a killed writer left: `lines_written` says from which line.

        Only where its source, strip, width and dtype were the same; else what it left is dropped and the roll
        begins anew, but a live roll is dropped with overwrite only. UserError (exit 2) at a URL.
        """
        return cls(
            location,
            strip,
            width,
            dtype,
            total_lines=total_lines,
            overwrite=overwrite,
            live=live,
            source=source,
            _resume=True,
        )

    @property
    def lines_written(self) -> int:
        """The lines in the roll so far, those still in the buffer with them."""
        return self._done

    @property
    def path(self) -> Path:
        """The roll's final folder; UserError where it is to lie in an object store."""
        return place_of(self.location).path

    @property
    def building(self) -> Path:
        """Where the roll lies until `close`: masks and files put there come to its place with it.

        UserError where it is to lie in an object store.
        """
        return self._site.home.path

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
        if self._ended:
            raise ValueError(f"the writer of roll {self._strip.roll_id} has ended")
        height = block.shape[1]
        limit = self._total_lines or MAX_LINES
        if self._done + height > limit:
            raise UserError(f"roll {self._strip.roll_id} gets more than the {limit} lines announced")
        index = np.arange(self._done, self._done + height, dtype=np.int64)
        records = {
            "encoder": _per_line("encoder", index if encoder is None else encoder, height),
            "t_ns": _per_line("t_ns", np.zeros(height, np.int64) if t_ns is None else t_ns, height),
            "valid": _per_line("valid", np.ones(height, np.uint8) if valid is None else valid, height),
        }
        try:
            with self._site.home.errors():
                self._append(block, records)
        except BaseException as error:
            self._fail(error)
            raise

    def _append(self, block: NDArray[Any], records: dict[str, NDArray[Any]]) -> None:
        taken, height = 0, block.shape[1]
        while taken < height:
            count = min(height - taken, SHARD_LINES - self._done % SHARD_LINES)
            is_whole = (self._done + count) % SHARD_LINES == 0
            if is_whole:
                self._site.check()
            part = slice(taken, taken + count)
            for name, rows in self._records.items():
                rows.append(records[name][part])
            self._levels[0].append(block[:, part])
            self._done += count
            taken += count
            if is_whole and self._resumable:
                self._advance()

    def _advance(self) -> None:
        """Publish the shard that is whole now: all its bytes are durable before the frontier says so."""
        for rows in self._records.values():
            rows.write_held()
        self._site.home.write(FRONTIER, json.dumps({"lines": self._done}).encode())
        self.committed = self._done

    def close(self) -> Roll:
        """Write what is buffered, freeze the line count, make it durable and move the roll to its place."""
        if self._ended:
            raise ValueError(f"the writer of roll {self._strip.roll_id} has ended")
        try:
            with self._site.home.errors():
                self._close()
        except BaseException as error:
            self._fail(error)
            raise
        self._ended = True
        return open_roll(self.location)

    def _close(self) -> None:
        if self._done == 0:
            raise UserError(f"roll {self._strip.roll_id} got no lines: nothing was written")
        if self._total_lines is not None and self._done != self._total_lines:
            raise UserError(
                f"roll {self._strip.roll_id} got {self._done} of the {self._total_lines} lines announced"
            )
        self._site.check()
        for rows in (*self._levels, *self._records.values()):
            rows.flush()
        self._set_lines(self._done)
        self._strip = replace(self._strip, closed=True, lines=self._done)
        self._site.commit(roll_attributes(self._strip, self._width))

    def abort(self) -> None:
        """Leave nothing of the unfinished roll; a live one stays, to be resumed."""
        self._ended = True
        self._site.abort()

    def _fail(self, error: BaseException) -> None:
        """Leave nothing, or after what is no mistake of the user's, such as Ctrl-C, all to go on with."""
        if self._resumable and not isinstance(error, UserError):
            self._ended = True
            self._site.release()
        else:
            self.abort()

    def _attributes(self) -> dict[str, Any]:
        """The group's attributes until the roll is closed."""
        return roll_attributes(self._strip, self._width, writer={"source": self._source})

    def _layouts(self, lines: int) -> dict[str, Layout]:
        """All arrays of the roll, the pyramid's first."""
        image = {
            str(level): image_layout(level, self._modes, lines, self._width, self._dtype.name)
            for level in range(level_count(self._width))
        }
        return image | {f"lines/{name}": lines_layout(name, lines) for name in LINE_ARRAYS}

    def _create(self) -> None:
        """Make the empty arrays; their line count is set at close."""
        home = self._site.home
        for name, layout in self._layouts(MAX_LINES).items():
            create_array(home, name, layout)
        (home / "lines").write("zarr.json", group_json({}))
        (home / "labels").write("zarr.json", group_json({"ome": {"version": "0.5", "labels": []}}))
        self._site.created()
        self._open_rows(0)

    def _open_rows(self, done: int) -> None:
        """Go on behind `done` lines, which are whole shards of the levels that go with level 0."""
        self._done = done
        self._levels: list[Rows] = []
        self._records: dict[str, Rows] = {}
        coarser: Callable[[NDArray[Any]], None] | None = None
        for name, layout in reversed(self._layouts(MAX_LINES).items()):
            array, dtype = open_for_writing(self._site.home, name), np.dtype(layout.dtype)
            if name.isdigit():
                shape = (self._modes, layout.shard[1], layout.shape[2])
                rows = Rows(array, shape, 1, dtype, coarser)
                coarser = rows.append_mean
                if int(name) < _LIVE_LEVELS:
                    rows.start_at(done // FACTOR ** int(name))
                self._levels.insert(0, rows)
            else:
                rows = Rows(array, layout.shard, 0, dtype)
                rows.start_at(done - done % LINE_CHUNK)
                self._records[name.removeprefix("lines/")] = rows

    def _fits(self) -> bool:
        """Whether what a killed writer left is of this roll and source, with all that its frontier says."""
        home = self._site.home
        try:
            attributes = group_attributes(home)
            mine = attributes.get("writer") == {"source": self._source}
            if not mine or strip_from(attributes, home) != self._strip:
                return False
            lines = _published(home)
            for name, needed in self._layouts(max(lines, 1)).items():
                layout = _checked(home / name, needed, closed=False)
                if not name.isdigit() or int(name) < _LIVE_LEVELS:
                    check_files(home / name, layout, needed.shape[needed.axes.index("y")] if lines else 0)
        except UserError:
            return False
        return True

    def _go_on(self) -> None:
        """Take up the line arrays and the upper pyramid where the whole shards end."""
        home = self._site.home
        done = _published(home)
        self._set_lines(MAX_LINES)  # killed in `close`, a writer leaves them cut
        self._open_rows(done)
        self.committed = done
        if done == 0:
            return
        layouts = self._layouts(MAX_LINES)
        for name, rows in self._records.items():
            array = open_for_reading(home, f"lines/{name}", layouts[f"lines/{name}"])
            if done % LINE_CHUNK:
                rows.append(read_array(array, slice(done - done % LINE_CHUNK, done), home))
        if len(self._levels) > _LIVE_LEVELS:
            name = str(_LIVE_LEVELS - 1)
            array, height = open_for_reading(home, name, layouts[name]), done // FACTOR ** (_LIVE_LEVELS - 1)
            rows_at_once = layouts[name].shard[1]  # as the live writer hands them on: no more memory than it
            for y in range(0, height, rows_at_once):
                part = (slice(None), slice(y, min(y + rows_at_once, height)))
                self._levels[_LIVE_LEVELS].append_mean(read_array(array, part, home))

    def _set_lines(self, lines: int) -> None:
        for name, layout in self._layouts(lines).items():
            axis = layout.axes.index("y")
            set_lines(self._site.home / name, axis, layout.shape[axis])

    def __enter__(self) -> RollWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
        elif not self._ended:
            self.close()


def _per_line(name: str, values: ArrayLike, height: int) -> NDArray[Any]:
    """The values of a line array (h,) in its dtype; ValueError where it cannot hold them."""
    found = np.asarray(values)
    if found.shape != (height,):
        raise ValueError(f"{name} has shape {found.shape} for a block of {height} lines")
    dtype = np.dtype(LINE_ARRAYS[name])
    exact = found.astype(dtype) if found.dtype.kind in "bui" else None
    if exact is None or not np.array_equal(exact, found) or (name == "valid" and exact.max(initial=0) > 1):
        needed = "0 or 1" if name == "valid" else f"{dtype} counts"
        raise ValueError(f"{name} holds other values than {needed}")
    return exact


def _complete(strip: Strip, place: Place) -> Strip:
    """The Strip of a roll to be written, or UserError with the usage exit code."""
    check_roll_id(strip.roll_id)
    if place.name != f"{strip.roll_id}{SUFFIX}":
        raise UserError(f"{place} must be named {strip.roll_id}{SUFFIX}", USAGE)
    if (problem := strip_problem(strip)) is not None:
        raise UserError(f"roll {strip.roll_id}: {problem}", USAGE)
    return replace(strip, closed=False, lines=0)
