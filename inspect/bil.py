"""Raw line-scan pixels, band-interleaved by line (BIL), with a JSON sidecar: `coil.bil` and `coil.json`.

A file is `header_bytes`, then per line: `line_prefix_bytes`, the px of each lighting mode one mode after
another, `line_suffix_bytes`. The sidecar says

    lines, width_px           whole numbers
    bits                      8, 10, 12, 14 or 16 per px
    lighting                  names of the modes in their order; default ["bright"]
    byte_order                "little" (default) or "big", of 16-bit containers
    align                     where fewer bits lie in 16: "low" (default) or "high" (grabbers do both)
    packed                    12 bits only: "Mono12p" (GenICam PFNC) or "Mono12Packed" (GigE Vision), both
                              with 2 px in 3 bytes
    header_bytes, line_prefix_bytes, line_suffix_bytes      default 0
    line_table                a CSV in the same folder, a row per line: encoder, t_ns, valid or some of them

and the fields of a strip: side, mm_per_px_x, mm_per_line, units, scale, ... White is the largest value of the
bits unless scale says otherwise.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.roll_format import IMAGE_DTYPES, MAX_LINE_BYTES, MAX_WIDTH, SHARD_LINES
from rollsight.inspect.roll_sites import check_absent
from rollsight.inspect.rolls import Roll
from rollsight.inspect.sources import (
    STRIP_KEYS,
    Block,
    OnLines,
    Units,
    complete,
    digest,
    read_fields,
    shown,
    strip_fields,
    write_roll,
)
from rollsight.inspect.strips import MAX_LINES, Strip, check_roll_id

BLOCK_BYTES = 2**24  # read at a time; more is not faster (measured 2026-11: 4 to 64 MiB within 5 %)
DEPTHS = (8, 10, 12, 14, 16)
PACKINGS = ("Mono12p", "Mono12Packed")
BYTE_ORDERS = ("little", "big")
ALIGNMENTS = ("low", "high")
LINE_COLUMNS = ("encoder", "t_ns", "valid")

_SKIPS = ("header_bytes", "line_prefix_bytes", "line_suffix_bytes")
SIDECAR_FIELDS = {"lines", "width_px", "bits", "byte_order", "align", "packed", "line_table", *_SKIPS}
_MAX_SKIP = 2**20  # bytes beside the pixels of a line, and of the header


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the file is cut, checked."""

    lines: int
    width: int  # px
    modes: int
    bits: int
    packed: str | None
    byte_order: str
    align: str
    header: int  # bytes, as the next two
    prefix: int
    suffix: int

    @property
    def dtype(self) -> str:
        return IMAGE_DTYPES[self.bits > 8]

    @property
    def mode_bytes(self) -> int:
        """Of one line of one mode."""
        if self.packed is not None:
            return self.width * 3 // 2
        return self.width * (1 if self.bits == 8 else 2)

    @property
    def line_bytes(self) -> int:
        return self.prefix + self.modes * self.mode_bytes + self.suffix

    @property
    def unused(self) -> int:
        """The bits of a 16-bit container that no px of this depth sets."""
        if self.bits == 8 or self.packed is not None:
            return 0
        used = (1 << self.bits) - 1
        return 0xFFFF & ~(used << (16 - self.bits) if self.align == "high" else used)

    @property
    def white(self) -> float | None:
        """The largest value; None where that is the depth's own default."""
        if self.bits in (8, 16):
            return None
        largest = (1 << self.bits) - 1
        return float(largest << (16 - self.bits) if self.align == "high" else largest)


def ingest_bil(
    path: Path,
    destination: Path | str,
    strip: Strip,
    *,
    units: Units = "mm",
    overwrite: bool = False,
    on_lines: OnLines | None = None,
) -> Roll:
    """Make the raw file `path`, as the sidecar `path` with .json says, the roll `destination`.

    8 bits become uint8, others uint16, as they are; the roll's scale holds the white of the depth. What
    `strip` leaves at None or () comes from the sidecar. units and on_lines(done, total) as in
    `ingest_strips`.

    UserError in one line that names the file: a missing sidecar, unknown, missing or wrong fields (exit 2), a
    file size other than the sidecar's, a line table of another length, px beyond their bits. Sidecar, sizes
    and line table are checked before anything is written.
    """
    path = Path(path)
    check_roll_id(strip.roll_id)
    check_absent(destination, overwrite=overwrite)
    sidecar = path.with_suffix(".json")
    if sidecar == path:
        raise UserError(f"{path} is a sidecar: name the file of raw pixels beside it", USAGE)
    if not path.is_file():
        raise UserError(f"no file {path}: name the file of raw pixels", USAGE)
    if not sidecar.is_file():
        raise UserError(
            f"{path} has no sidecar {sidecar.name}: it must say lines, width_px and bits of the raw pixels",
            USAGE,
        )
    said = read_fields(sidecar, SIDECAR_FIELDS | STRIP_KEYS)
    strip = complete(strip, strip_fields(said, sidecar), sidecar, units, ("bright",))
    layout = _layout(said, len(strip.lighting), sidecar)
    _check_size(path, sidecar, layout)
    if strip.scale is None and layout.white is not None:
        strip = replace(strip, scale=(layout.white,) * layout.modes)
    table = _line_table(said, layout.lines, sidecar)

    def blocks(start: int) -> Iterator[Block]:
        with path.open("rb", buffering=0) as file:
            file.seek(layout.header + start * layout.line_bytes)
            height = max(1, min(SHARD_LINES, BLOCK_BYTES // layout.line_bytes))
            buffer = bytearray(height * layout.line_bytes)
            rows = _line_rows(table, start, height) if table is not None else itertools.repeat({})
            # The table's length was checked; were it shorter by now, the roll would miss lines: refused.
            for y, per_line in zip(range(start, layout.lines, height), rows, strict=False):
                lines = min(height, layout.lines - y)
                raw = _read(file, memoryview(buffer)[: lines * layout.line_bytes], path)
                pixels = _pixels(raw.reshape(lines, layout.line_bytes), layout)
                _check_bits(pixels, layout, y, path, sidecar)
                yield pixels, per_line

    return write_roll(
        destination,
        strip,
        layout.width,
        layout.dtype,
        layout.lines,
        blocks,
        source=digest([path, sidecar, *([] if table is None else [table])]),
        overwrite=overwrite,
        on_lines=on_lines,
    )


def _layout(said: dict[str, Any], modes: int, sidecar: Path) -> _Layout:
    """The sidecar's layout, each value within bounds; UserError (exit 2) names the field."""
    if missing := [name for name in ("lines", "width_px", "bits") if said.get(name) is None]:
        raise UserError(f"{sidecar}: {', '.join(missing)} missing: needed to cut the raw pixels", USAGE)
    bits = _one_of(said, "bits", DEPTHS, None, sidecar)
    layout = _Layout(
        lines=_whole(said, "lines", 1, MAX_LINES, sidecar),
        width=_whole(said, "width_px", 1, MAX_WIDTH, sidecar),
        modes=modes,
        bits=bits,
        packed=_one_of(said, "packed", PACKINGS, None, sidecar),
        byte_order=_one_of(said, "byte_order", BYTE_ORDERS, "little", sidecar),
        align=_one_of(said, "align", ALIGNMENTS, "low", sidecar),
        header=_whole(said, "header_bytes", 0, _MAX_SKIP, sidecar),
        prefix=_whole(said, "line_prefix_bytes", 0, _MAX_SKIP, sidecar),
        suffix=_whole(said, "line_suffix_bytes", 0, _MAX_SKIP, sidecar),
    )
    if layout.packed is not None:
        if bits != 12 or layout.width % 2:
            raise UserError(
                f"{sidecar}: packed {layout.packed} with bits {bits} and width_px {layout.width}: packed px"
                " are of 12 bits and come in pairs",
                USAGE,
            )
        if without := [name for name in ("byte_order", "align") if said.get(name) is not None]:
            raise UserError(
                f"{sidecar}: {' and '.join(without)} said of packed px: {layout.packed} fixes both,"
                " leave them out",
                USAGE,
            )
    if modes * layout.width * np.dtype(layout.dtype).itemsize > MAX_LINE_BYTES:
        raise UserError(
            f"{sidecar}: {modes} modes of {layout.width} px in {layout.bits} bits are over the limit of"
            f" {MAX_LINE_BYTES} bytes a line: split the width into several rolls",
            USAGE,
        )
    return layout


def _whole(said: dict[str, Any], name: str, least: int, most: int, sidecar: Path) -> int:
    value = said.get(name, 0)
    if type(value) is not int or not least <= value <= most:
        raise UserError(
            f"{sidecar}: {name} is {shown(value)}: needed a whole number from {least} to {most}", USAGE
        )
    return value


def _one_of(said: dict[str, Any], name: str, known: tuple[Any, ...], default: Any, sidecar: Path) -> Any:
    value = said.get(name)
    if value is None:
        return default
    if type(value) is not type(known[0]) or value not in known:
        raise UserError(
            f"{sidecar}: {name} is {shown(value)}: it must be one of {', '.join(map(str, known))}", USAGE
        )
    return value


def _check_size(path: Path, sidecar: Path, layout: _Layout) -> None:
    found = path.stat().st_size
    needed = layout.header + layout.lines * layout.line_bytes
    if found != needed:
        fit, rest = divmod(max(0, found - layout.header), layout.line_bytes)
        raise UserError(
            f"{path} holds {found} bytes but {sidecar.name} asks for {needed}: {layout.lines} lines of"
            f" {layout.line_bytes} bytes after {layout.header}; {fit} lines fit and {rest} bytes are left"
            " over: correct lines, width_px, lighting, bits or the bytes to skip"
        )


def _read(file: FileIO, into: memoryview, path: Path) -> NDArray[np.uint8]:
    """The next bytes of the file, as many as `into` takes."""
    done = 0
    while done < len(into):
        try:
            count = file.readinto(into[done:])
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if not count:
            raise UserError(f"{path} became shorter while it was read: ingest it when it is complete")
        done += count
    return np.frombuffer(into, np.uint8)


def _pixels(raw: NDArray[np.uint8], layout: _Layout) -> NDArray[Any]:
    """Raw lines (h, line_bytes) -> px (C, h, W), uint8 or uint16."""
    h = raw.shape[0]
    inner = raw[:, layout.prefix : layout.line_bytes - layout.suffix]
    by_mode = inner.reshape(h, layout.modes, layout.mode_bytes).swapaxes(0, 1)  # (C, h, bytes)
    if layout.bits == 8:
        return by_mode
    if layout.packed is not None:
        return _unpacked(by_mode, layout.packed)
    kind = "<u2" if layout.byte_order == "little" else ">u2"
    return np.ascontiguousarray(by_mode).view(kind).astype(np.uint16, copy=False)


def _unpacked(packed: NDArray[np.uint8], packing: str) -> NDArray[np.uint16]:
    """Pairs of 12-bit px in three bytes: (C, h, 3 n) -> (C, h, 2 n).

    Mono12p fills from the lowest bit on (GenICam Pixel Format Naming Convention); Mono12Packed has the high
    eight bits of a px in its own byte and both low nibbles in the middle one (GigE Vision; Basler racer
    manual).
    """
    first, middle, last = (packed[..., i::3].astype(np.uint16) for i in range(3))
    pixels = np.empty((*packed.shape[:2], packed.shape[2] // 3 * 2), np.uint16)
    if packing == "Mono12p":
        pixels[..., 0::2] = first | (middle & 15) << 8
        pixels[..., 1::2] = middle >> 4 | last << 4
    else:
        pixels[..., 0::2] = first << 4 | middle & 15
        pixels[..., 1::2] = last << 4 | middle >> 4
    return pixels


def _check_bits(pixels: NDArray[Any], layout: _Layout, y: int, path: Path, sidecar: Path) -> None:
    """Px that set bits the depth does not have tell of a wrong byte order, alignment or depth."""
    if not layout.unused or not (np.bitwise_or.reduce(pixels, axis=None) & layout.unused):
        return
    mode, line, x = np.argwhere(pixels & layout.unused)[0].tolist()
    raise UserError(
        f"{path}: line {y + line} px {x} of mode {mode} holds {pixels[mode, line, x]}, which no {layout.bits}"
        f" bits aligned {layout.align} give: correct bits, align or byte_order in {sidecar.name}"
    )


def _line_table(said: dict[str, Any], lines: int, sidecar: Path) -> Path | None:
    """The line table that the sidecar names, read through once: its columns, values and length are right."""
    name = said.get("line_table")
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(
            f"{sidecar}: line_table is {shown(name)}: needed the name of a CSV in the same folder", USAGE
        )
    table = sidecar.parent / name
    if not os.path.isfile(table):  # noqa: PTH113 (Path.is_file raises where a name is too long)
        raise UserError(
            f"no file {shown(name)} beside {sidecar}, which names it as line_table: put it there", USAGE
        )
    found = 0
    for batch in _batches(table):
        if any(column.null_count for column in batch.columns):
            raise UserError(f"{table}: a value is missing after line {found}: each line needs all of them")
        if "valid" in batch.schema.names and not np.isin(batch.column("valid"), (0, 1)).all():
            raise UserError(f"{table}: valid is neither 0 nor 1 after line {found}")
        found += batch.num_rows
    if found != lines:
        raise UserError(
            f"{table} has {found} rows but {sidecar.name} says {lines} lines: it needs one row per line"
        )
    return table


def _line_rows(table: Path, start: int, height: int) -> Iterator[dict[str, NDArray[Any]]]:
    """The rows of the line table from `start` on, as arrays of `height` rows each, the last shorter."""
    held: pa.Table | None = None
    skip = start
    for batch in _batches(table):
        part = pa.Table.from_batches([batch.slice(min(skip, batch.num_rows))])
        skip -= min(skip, batch.num_rows)
        held = part if held is None else pa.concat_tables([held, part])
        while held.num_rows >= height:
            yield _arrays(held.slice(0, height))
            held = held.slice(height)
    if held is not None and held.num_rows:
        yield _arrays(held)


def _arrays(rows: pa.Table) -> dict[str, NDArray[Any]]:
    return {name: rows.column(name).to_numpy() for name in rows.column_names}


def _batches(table: Path) -> Iterator[pa.RecordBatch]:
    """The line table in parts of about a megabyte, all columns int64."""
    try:
        with pa_csv.open_csv(
            table,
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=2**20),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(LINE_COLUMNS, pa.int64())),
        ) as reader:
            names = reader.schema.names
            if len(set(names)) < len(names) or not set(names) <= {*LINE_COLUMNS}:
                raise UserError(
                    f"{table} has the columns {shown(', '.join(names))}: needed some of"
                    f" {', '.join(LINE_COLUMNS)}, each once"
                )
            yield from reader
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table} cannot be read as a CSV: {error}") from error
