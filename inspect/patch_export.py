"""The patches of an existing inspection system: a CSV with a row per event, and the images it names.

Often the only thing a mill can hand over. It has no whole strip, so what comes out is a canvas of the strip's
size that holds each patch at its place and is *not inspected* everywhere else:

- a roll: `inspect scan` finds, measures and shows on the strip map what our model sees in those patches. All
  else is white to the end of the scale, which a scan reads as saturated, on lines with valid 0 where there is
  no patch: not inspected either way. A scan judges cells of 64 px: one that patches fill by half or more is
  inspected, its rest repeats the patch's border; another is not, its part of a patch is there but not looked
  at. So the coverage is about the area of the patches, and the verdict HOLD. The white costs next to nothing
  on disk.
- `<roll-id>.events.parquet` beside it: the rows of the CSV as a defect table (the columns of
  `defects.SCHEMA`, and event, code, image), to be held against ours: same classes, same places?

What it does not give: anything between the patches, so no false-alarm rate, no missed defects of the old
system, no periodic marks beyond those it found, no grade. Borders of patches are steps that no strip has; a
few px of repeated border outside hide most of them from the net, but a defect found at a border is to be
doubted (147 patches of 200 px of simulated strip, 2026-11: 11 false defects at borders, 43 with plain white
beside them; coverage told 10.4 %, true 11.1 %). Events are no labels: they have boxes and names, no masks, so
`inspect train` learns nothing from them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rollsight.inspect.defects import SCHEMA
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.linescan import NOT_INSPECTED_SHARE
from rollsight.inspect.pictures import SUFFIXES, Picture, decode, read_header, to_gray
from rollsight.inspect.roll_format import MAX_WIDTH, SHARD_LINES
from rollsight.inspect.roll_places import LocalPlace, place_of, write_durably
from rollsight.inspect.roll_sites import check_absent
from rollsight.inspect.rolls import Roll
from rollsight.inspect.sources import (
    METADATA_NAMES,
    STRIP_KEYS,
    Block,
    OnLines,
    complete,
    digest,
    one_of,
    read_fields,
    shown,
    strip_fields,
    write_roll,
)
from rollsight.inspect.strips import MAX_LINES, Strip, check_roll_id
from rollsight.inspect.tiles import CELL
from scipy import ndimage

COLUMN_FILES = ("columns.json", "columns.yaml", "columns.yml")
POSITIONS = {  # what x and y are of; the image lies around the middle of the defect
    "centre": "the middle of the defect",
    "corner": "the corner of the defect nearest to drive side and head",
    "patch": "the first px of the image",
}
MAX_CSV_BYTES = 2**28
MAX_EVENTS = 1_000_000
SCALE_TOLERANCE = 0.01  # of the strip's mm per px: an event of 1 m is then 1 cm off at most
ONE_PLACE_PX = 1  # rows that name one image agree on its place within this

EVENTS_SCHEMA = pa.schema(
    [*SCHEMA, ("event", pa.string()), ("code", pa.string()), ("image", pa.string())], metadata=SCHEMA.metadata
)

# What a column may be called, in lower case without blanks, signs and unit. Two that match are refused.
ALIASES = {
    "event": "id event eventid eventno defectid defectno defectnr defectnumber no nr number fehlernr",
    "class": "class classname defectclass defectname defecttype type label klasse fehlerklasse fehlerart",
    "code": "code classcode classid classno defectcode defectclassid fehlercode",
    "x": "x xpos posx positionx xposition xcoordinate cd cdpos cdposition posacross acrossposition positioncd"
    " distanceds distancefromds distdriveside distancefromdriveside posquer",
    "y": "y ypos posy positiony yposition ycoordinate md mdpos mdposition posalong alongposition positionmd"
    " lengthposition distancefromhead distancehead coilposition poslaengs",
    "width": "width defectwidth sizex sizecd widthcd dx breite",
    "length": "length defectlength sizey sizemd lengthmd dy laenge länge",
    "image": "image imagefile imagename imagefilename imagepath filename file picture defectimage bild",
    "mm_per_px_x": "mmperpx mmperpixel mmperpxx resolution resolutionx pixelsize pixelsizex",
    "mm_per_line": "mmperline mmperpxy resolutiony pixelsizey",
}
_COLUMN_OF = {alias: column for column, aliases in ALIASES.items() for alias in aliases.split()}
_LENGTHS = ("x", "y", "width", "length")  # the columns with a unit
_UNITS = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
_HEADER = re.compile(r"(.*?)[\s_.]*[\[(/ _]\s*(mm|cm|m)\s*[\])]?", re.IGNORECASE)
_KEPT_SHARE = 1 - NOT_INSPECTED_SHARE  # of a cell's px that patches must show, else it is not inspected
_FRINGE_PX = 9  # around patches and kept cells; with 30 the streaks look like scratches (measured 2026-11)
_SLACK_MM = 50.0  # strip wander, and defects at the edge: a position may lie that far outside
_MAX_MM = 1e9
_MAX_ROWS_TOLD = 5
_MAX_TEXT = 256


@dataclass(frozen=True, slots=True)
class Columns:
    """Which header holds what, and in which unit."""

    headers: dict[str, str]  # our column -> header of the CSV
    mm_per_unit: dict[str, float]  # for x, y, width, length
    position: str  # "centre" | "corner" | "patch"

    def told(self) -> str:
        """One line for the user: what was taken for what."""
        units = {mm: unit for unit, mm in _UNITS.items()}
        parts = [
            f"{column} = {header!r}"
            + (f" in {units[self.mm_per_unit[column]]}" if column in _LENGTHS else "")
            for column, header in self.headers.items()
        ]
        return f"columns: {', '.join(parts)}; x and y are {POSITIONS[self.position]}"


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the CSV, in mm."""

    row: int  # line of the file, as a spreadsheet counts
    event: str | None
    name: str  # of the class; the code where there is no name
    code: str | None
    x_mm: float
    y_mm: float
    width_mm: float | None
    length_mm: float | None
    image: str | None
    mm_per_px_x: float | None
    mm_per_line: float | None


@dataclass(frozen=True, slots=True)
class Patch:
    """An image on the canvas; it may hang over its borders."""

    row: int
    picture: Picture
    x0: int  # px of the canvas
    y0: int


@dataclass(frozen=True, slots=True)
class PatchRoll:
    """What an export became."""

    roll: Roll
    events: str  # the defect table, path or URL
    notes: tuple[str, ...]  # what was recognised and what is missing, one line each


def is_patch_export(source: Path) -> bool:
    """Whether `source` is a CSV or a folder with one."""
    return source.suffix.lower() == ".csv" if source.is_file() else bool(_csv_files(source))


def ingest_patches(
    source: Path,
    destination: Path | str,
    strip: Strip,
    *,
    length_m: float | None = None,
    overwrite: bool = False,
    on_lines: OnLines | None = None,
) -> PatchRoll:
    """Make the export `source`, a CSV or the folder of one, the roll `destination` and its table of events.

    strip, and `strip.json` or `strip.yaml` in the folder, must give side, mm_per_px_x, mm_per_line, width_mm
    and, there or here, length_m of the strip: without its size there is no coverage. The CSV has one row per
    event, separated by comma, semicolon or tab; decimal commas where the separator is none. Its columns are
    recognised by their headers (`ALIASES`, unit in brackets or after _, mm where there is none), or said in
    `columns.json` or `columns.yaml`:

        class: DEFECT_TYPE      # and event, code, x, y, width, length, image, mm_per_px_x, mm_per_line
        y_unit: m               # and x_unit, width_unit, length_unit: mm, cm or m
        position: centre        # what x and y are of, see `POSITIONS`; centre by default

    x is from the drive side, y from the head. Where patches overlap, the later row covers the earlier. What
    hangs over the strip's edge is cut. An event whose image is not there stays in the table, without a patch.

    UserError in one line: columns not found or ambiguous (exit 2), no image at all, and rows, each named,
    with no number where one is needed, a place outside the strip, an image that is broken, of another depth,
    of another scale, or named by two rows at two places. No roll comes without its table; where the ingest
    fails both stay as they were, except that an object store may keep the new table.
    """
    source = Path(source)
    check_roll_id(strip.roll_id)
    check_absent(destination, overwrite=overwrite)
    table = _csv_of(source)
    folder = table.parent
    strip, length_m, known = _strip_of(strip, folder, length_m)
    width, lines = _canvas(strip, length_m)
    column_file = one_of(folder, COLUMN_FILES)
    columns, events = _read_events(table, column_file)
    placed = _place(events, columns, table, strip, length_m)
    patches = list(dict.fromkeys(patch for patch in placed if patch is not None))
    if not patches:
        named = next((event.image for event in events if event.image), None)
        raise UserError(
            f"{table}: none of the images of its {len(events)} rows is in {folder}"
            + (f", for instance {shown(named)}" if named else "")
            + ": put the images beside the CSV, or name their column in columns.yaml"
        )
    dtype = patches[0].picture.dtype
    beside = [path for path in (known, column_file) if path is not None]
    buffer = io.BytesIO()
    pq.write_table(_event_table(events, columns, placed, strip), buffer)
    beside_roll = place_of(str(destination).rpartition("/")[0] or ".")
    name = f"{strip.roll_id}.events.parquet"
    with contextlib.ExitStack() as undo:

        def blocks(start: int) -> Iterator[Block]:
            yield from _blocks(patches, dtype, width, lines, start)
            # Before the roll is whole: one that stands there without its table would be refused as existing.
            if isinstance(beside_roll, LocalPlace):
                file, roll_path = beside_roll.path / name, place_of(destination).path
                held = file.read_bytes() if file.is_file() else None
                undo.callback(_restore, file, held, roll_path, _inode(roll_path))
            beside_roll.write(name, buffer.getvalue())

        roll = write_roll(
            destination,
            strip,
            width,
            dtype,
            lines,
            blocks,
            source=digest([table, *beside, *dict.fromkeys(patch.picture.path for patch in patches)]),
            overwrite=overwrite,
            on_lines=on_lines,
        )
        undo.pop_all()
    return PatchRoll(roll, str(beside_roll / name), _notes(events, columns, placed, width, lines))


def _restore(file: Path, held: bytes | None, roll: Path, standing: int | None) -> None:
    """Give `file` the bytes that it held, None for none, unless another roll than `standing` is there now."""
    if _inode(roll) != standing:  # interrupted when it was whole already
        return
    if held is not None:
        write_durably(file, held)
    elif file.is_file():
        file.unlink()


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _csv_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".csv" and path.is_file() and not path.name.startswith(".")
    )


def _csv_of(source: Path) -> Path:
    if source.is_file():
        return source
    found = _csv_files(source)
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise UserError(
            f"{source} holds {len(found)} CSV files ({names}): needed one with a row per event; name it",
            USAGE,
        )
    return found[0]


def _strip_of(strip: Strip, folder: Path, length_m: float | None) -> tuple[Strip, float, Path | None]:
    """The complete strip, its length in m, and the file that said so."""
    path = one_of(folder, METADATA_NAMES)
    said = {} if path is None else read_fields(path, STRIP_KEYS | {"length_m"})
    where = path or folder / METADATA_NAMES[1]
    length_m = said.get("length_m") if length_m is None else length_m
    strip = complete(strip, strip_fields(said, where), where, "mm", ("bright",))
    if strip.units == "px":
        raise UserError(
            f"{where}: units is px: the places of events are in mm, so a patch export is too", USAGE
        )
    missing = [
        name for name, value in (("width_mm", strip.width_mm), ("length_m", length_m)) if value is None
    ]
    if missing:
        options = " ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(
            f"roll {strip.roll_id}: {', '.join(missing)} missing: a patch export does not show how large the"
            f" strip is; say {options}, or write it in {where}",
            USAGE,
        )
    if type(length_m) not in (int, float) or not 0 < float(length_m or 0) < 1e6:
        raise UserError(f"length_m is {shown(length_m)}: it must be a number of metres over 0", USAGE)
    if len(strip.lighting) != 1:
        raise UserError(
            f"roll {strip.roll_id}: lighting names {len(strip.lighting)} modes, a patch export holds one",
            USAGE,
        )
    return strip, float(length_m or 0), path


def _canvas(strip: Strip, length_m: float) -> tuple[int, int]:
    """Width in px and lines."""
    assert strip.width_mm and strip.mm_per_px_x and strip.mm_per_line
    width, lines = (
        round(min(mm / per_px, 2.0**62))  # a tiny mm per px gives infinity
        for mm, per_px in ((strip.width_mm, strip.mm_per_px_x), (length_m * 1000, strip.mm_per_line))
    )
    if not (0 < width <= MAX_WIDTH and 0 < lines <= MAX_LINES):
        raise UserError(
            f"a strip of {strip.width_mm:g} mm x {length_m:g} m at {strip.mm_per_px_x:g} x"
            f" {strip.mm_per_line:g} mm per px is {width} x {lines} px: needed 1 to {MAX_WIDTH} px and"
            f" {MAX_LINES} lines",
            USAGE,
        )
    return width, lines


def _read_events(table: Path, column_file: Path | None) -> tuple[Columns, list[Event]]:
    """The rows of the CSV; UserError names those that cannot be read."""
    units = {f"{column}_unit" for column in _LENGTHS}
    said = {} if column_file is None else read_fields(column_file, {*ALIASES, *units, "position"})
    try:
        if table.stat().st_size > MAX_CSV_BYTES:
            raise UserError(f"{table} is over {MAX_CSV_BYTES} bytes: split it")
        with table.open("rb") as file:
            head = file.read(2**16)
        encodings = ["utf-16"] if head[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp1252"]
        for encoding in encodings:  # with or without Excel's mark, or as a Western Windows writes it
            try:
                return _parse(table, encoding, said, column_file)
            except UnicodeDecodeError as error:
                undecoded = error
        raise UserError(f"{table} is neither UTF-8 nor Windows-1252 text: {undecoded.reason}")
    except (csv.Error, OSError, UnicodeError) as error:
        raise UserError(f"{table} cannot be read as a CSV: {error}") from error


def _parse(
    table: Path, encoding: str, said: dict[str, Any], column_file: Path | None
) -> tuple[Columns, list[Event]]:
    with table.open(newline="", encoding=encoding) as file:
        first = file.readline(2**16)
        separator = max(",;\t", key=first.count)
        file.seek(0)
        rows = csv.reader(file, delimiter=separator)
        header = [cell.strip() for cell in next(rows, [])]
        columns = _columns(header, said, table, column_file)
        at = {column: header.index(name) for column, name in columns.headers.items()}
        events: list[Event] = []
        faults: list[tuple[int, str]] = []
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) < len(header):
                faults.append((rows.line_num, f"has {len(cells)} of {len(header)} cells"))
                continue
            try:
                events.append(_event(rows.line_num, cells, at, columns, comma=separator != ","))
            except ValueError as error:
                faults.append((rows.line_num, str(error)))
            if len(events) + len(faults) > MAX_EVENTS:
                raise UserError(f"{table} holds over {MAX_EVENTS} events: split it")
    if faults:
        _refuse(table, faults)
    if not events:
        raise UserError(f"{table} has a header and no row: needed one row per event")
    return columns, events


def _columns(header: list[str], said: dict[str, Any], table: Path, column_file: Path | None) -> Columns:
    """Which header holds what: as the column file says, and by `ALIASES` where it says nothing."""
    advice = f"name them in {column_file or table.with_name(COLUMN_FILES[1])}, as `y: HEADER`"
    found: dict[str, str] = {}
    for column in (column for column in ALIASES if said.get(column) is not None):
        name = str(said[column]).strip()
        if header.count(name) != 1:
            raise UserError(
                f"{column_file}: {column} is {shown(name)}, a header that {table.name} has"
                f" {header.count(name)} times: needed one of {_listed(header)}",
                USAGE,
            )
        found[column] = name
    units: dict[str, str] = {}
    by_name = {name: column for column, name in found.items()}
    for name in header:
        match = _HEADER.fullmatch(name)
        bare, unit = (match[1], match[2].lower()) if match else (name, None)
        ours = by_name.get(name) or _COLUMN_OF.get("".join(filter(str.isalpha, bare.casefold())))
        if ours is None or (ours in by_name.values() and by_name.get(name) != ours):
            continue
        if found.setdefault(ours, name) != name or header.count(name) > 1:
            raise UserError(
                f"{table}: both {shown(found[ours])} and {shown(name)} may be {ours}: {advice}", USAGE
            )
        if unit is not None:
            units[ours] = unit
    missing = [column for column in ("x", "y", "image") if column not in found]
    if "class" not in found and "code" not in found:
        missing.append("class or code")
    if missing:
        raise UserError(
            f"{table}: no column found for {', '.join(missing)} among {_listed(header)}: {advice}", USAGE
        )
    for column in _LENGTHS:
        said_unit = said.get(f"{column}_unit", units.get(column, "mm"))
        if not isinstance(said_unit, str) or said_unit not in _UNITS:
            raise UserError(
                f"{column_file}: {column}_unit is {shown(said_unit)}: it must be mm, cm or m", USAGE
            )
        units[column] = said_unit
    position = said.get("position", "centre")
    if not isinstance(position, str) or position not in POSITIONS:
        raise UserError(
            f"{column_file}: position is {shown(position)}: it must be one of {', '.join(POSITIONS)}", USAGE
        )
    headers = {column: found[column] for column in ALIASES if column in found}
    return Columns(headers, {column: _UNITS[unit] for column, unit in units.items()}, position)


def _listed(header: list[str]) -> str:
    return ", ".join(shown(name) for name in header[:20]) or "none"


def _event(row: int, cells: list[str], at: dict[str, int], columns: Columns, *, comma: bool) -> Event:
    """One row; ValueError says what is wrong with it. comma: 1,5 is a number."""

    def text(column: str) -> str | None:
        value = cells[at[column]].strip() if column in at else ""
        if len(value) > _MAX_TEXT or not value.isprintable():
            raise ValueError(f"{column} is {shown(value)}: needed printable text of up to {_MAX_TEXT}")
        return value or None

    def number(column: str, per: float = 1.0) -> float | None:
        value = text(column)
        if value is None:
            return None
        try:
            parsed = float(value.replace(",", ".") if comma else value) * per
        except ValueError:
            parsed = math.nan
        if not abs(parsed) < _MAX_MM:  # nor nan
            raise ValueError(f"{column} is {shown(value)}: needed a number")
        return parsed

    lengths = {column: number(column, columns.mm_per_unit[column]) for column in _LENGTHS}
    x, y = lengths["x"], lengths["y"]
    if x is None or y is None:
        raise ValueError(f"{'x' if x is None else 'y'} is empty: needed a number")
    if any((lengths[column] or 0) < 0 for column in ("width", "length")):
        raise ValueError("width or length is under 0")
    code = text("code")
    return Event(
        row,
        text("event"),
        text("class") or code or "unclassified",
        code,
        x,
        y,
        lengths["width"],
        lengths["length"],
        text("image"),
        number("mm_per_px_x"),
        number("mm_per_line"),
    )


def _refuse(table: Path, faults: list[tuple[int, str]]) -> NoReturn:
    faults = sorted(faults)
    told = "; ".join(f"row {row}: {fault}" for row, fault in faults[:_MAX_ROWS_TOLD])
    more = f"; and {len(faults) - _MAX_ROWS_TOLD} more rows" if len(faults) > _MAX_ROWS_TOLD else ""
    raise UserError(f"{table}: {told}{more}: correct these rows, or take them out")


def _place(
    events: list[Event], columns: Columns, table: Path, strip: Strip, length_m: float
) -> list[Patch | None]:
    """The image of each event on the canvas, from its header; UserError names rows that cannot be placed."""
    assert strip.width_mm and strip.mm_per_px_x and strip.mm_per_line
    images = _images(table.parent)
    faults: list[tuple[int, str]] = []
    found: list[Patch | None] = []
    first: dict[Path, Patch] = {}
    dtype: str | None = None
    for event in events:
        for axis, at, end in (("x", event.x_mm, strip.width_mm), ("y", event.y_mm, length_m * 1000)):
            if not -_SLACK_MM <= at <= end + _SLACK_MM:
                faults.append(
                    (event.row, f"{axis} is {at:g} mm but the strip ends at {end:g} mm (is the unit right?)")
                )
        for name, theirs, ours in (
            ("mm_per_px_x", event.mm_per_px_x, strip.mm_per_px_x),
            ("mm_per_line", event.mm_per_line, strip.mm_per_line),
        ):
            if theirs is not None and abs(theirs / ours - 1) > SCALE_TOLERANCE:
                faults.append(
                    (event.row, f"{name} is {theirs:g} but the strip's is {ours:g}: export it at one scale")
                )
        path = _find(event.image, images)
        if path is None:
            found.append(None)
            continue
        try:
            picture = first[path].picture if path in first else read_header(path)
        except UserError as error:
            faults.append((event.row, f"{error} (without the file the event has no patch)"))
            continue
        dtype = dtype or picture.dtype
        if picture.dtype != dtype:
            faults.append((event.row, f"{path.name} is {picture.dtype} but the images before are {dtype}"))
        middle_x, middle_y = _middle(event, columns.position, picture, strip)
        patch = Patch(
            event.row,
            picture,
            round(middle_x / strip.mm_per_px_x - picture.width / 2),
            round(middle_y / strip.mm_per_line - picture.lines / 2),
        )
        before = first.setdefault(path, patch)
        if max(abs(before.x0 - patch.x0), abs(before.y0 - patch.y0)) > ONE_PLACE_PX:
            faults.append(
                (
                    event.row,
                    f"{path.name} is also in row {before.row}, at another place: is x, y the patch's?",
                )
            )
        found.append(before)
    if faults:
        _refuse(table, faults)
    return found


def _middle(event: Event, position: str, picture: Picture | None, strip: Strip) -> tuple[float, float]:
    """The middle of the defect, which is that of its image, in mm."""
    assert strip.mm_per_px_x and strip.mm_per_line
    if position == "corner":
        return event.x_mm + (event.width_mm or 0) / 2, event.y_mm + (event.length_mm or 0) / 2
    if position == "patch" and picture is not None:
        return (
            event.x_mm + picture.width * strip.mm_per_px_x / 2,
            event.y_mm + picture.lines * strip.mm_per_line / 2,
        )
    return event.x_mm, event.y_mm


def _images(folder: Path) -> dict[str, Path | None]:
    """All images under the folder by each tail of their path in lower case; None where two share it."""
    found: dict[str, Path | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        parts = path.relative_to(folder).parts
        for i in range(len(parts)):
            tail = "/".join(parts[i:]).casefold()
            found[tail] = None if tail in found and i else path
    return found


def _find(name: str | None, images: dict[str, Path | None]) -> Path | None:
    """The image that a CSV names, perhaps by its path on another machine; None where it is not there."""
    if name is None:
        return None
    parts = [part.casefold() for part in PureWindowsPath(name).parts]
    for i in range(len(parts)):
        path = images.get("/".join(parts[i:]))
        if path is not None:
            return path
    return None


def _blocks(patches: list[Patch], dtype: str, width: int, lines: int, start: int) -> Iterator[Block]:
    """The canvas from line `start` on, a shard at a time; in each the patches in the order of the rows."""
    # A patch is decoded for each shard it reaches, so a canvas of any length holds one image at a time.
    reaching: dict[int, list[Patch]] = {}
    for patch in patches:
        first = max(0, patch.y0 - 2 * CELL) // SHARD_LINES
        last = min(patch.y0 + patch.picture.lines + 2 * CELL, lines) - 1
        for shard in range(first, last // SHARD_LINES + 1):
            reaching.setdefault(shard, []).append(patch)
    empty = np.full((1, SHARD_LINES, width), np.iinfo(dtype).max, dtype)
    for y0 in range(start, lines, SHARD_LINES):
        y1 = min(y0 + SHARD_LINES, lines)
        found = reaching.get(y0 // SHARD_LINES)
        if found is None:
            yield empty[:, : y1 - y0], {"valid": np.zeros(y1 - y0, np.uint8)}
        else:
            # A cell more at either end, as the fringe of its cells reaches into this shard.
            top, bottom = max(0, y0 - CELL), min(y1 + CELL, lines)
            canvas, valid = _canvas_part(found, dtype, width, top, bottom)
            yield canvas[None, y0 - top : y1 - top], {"valid": valid[y0 - top : y1 - top]}


def _canvas_part(
    patches: list[Patch], dtype: str, width: int, top: int, bottom: int
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Lines top to bottom of the canvas (h, W) and their valid bits, uint8 (h,); top lies on a cell."""
    white = np.iinfo(dtype).max
    canvas = np.full((bottom - top, width), white, dtype)
    seen = np.zeros(canvas.shape, np.bool_)
    for patch in patches:
        _paint(canvas, seen, patch, top)
    kept = _by_cell(seen) >= _KEPT_SHARE
    # A step from steel to white looks like a defect to the net: the patch's border goes on for some px,
    # but never so far that a scan would take a cell for inspected that is not kept.
    shown = ndimage.maximum_filter(seen | _in_px(kept, seen.shape), 2 * _FRINGE_PX + 1, mode="constant")
    shown &= _in_px(kept | (_by_cell(shown) < _KEPT_SHARE), seen.shape)
    canvas[~(shown | seen)] = white
    return canvas, np.repeat(kept.any(axis=1), CELL)[: bottom - top].astype(np.uint8)


def _paint(canvas: NDArray[Any], seen: NDArray[np.bool_], patch: Patch, top: int) -> None:
    """Draw the patch on the canvas (h, W), whose first line is `top`, in place, and mark its px in `seen`.

    Around it, on px that no patch before has, its border is repeated.
    """
    height, width = canvas.shape
    h, w = patch.picture.lines, patch.picture.width
    y, x = patch.y0 - top, patch.x0
    reach = CELL + _FRINGE_PX
    rows = np.arange(max(0, y - reach), min(height, y + h + reach))
    columns = np.arange(max(0, x - reach), min(width, x + w + reach))
    if not rows.size or not columns.size:
        return
    around = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    gray = to_gray(decode(patch.picture), patch.picture.dtype)
    drawn = gray[np.ix_(np.clip(rows - y, 0, h - 1), np.clip(columns - x, 0, w - 1))]
    own = np.outer((rows >= y) & (rows < y + h), (columns >= x) & (columns < x + w))
    np.copyto(canvas[around], drawn, where=own | ~seen[around])
    seen[around] |= own


def _by_cell(flags: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of set px in each cell, or in what the canvas has of it: (h, W) -> (rows, columns)."""

    def summed(px: NDArray[Any]) -> NDArray[np.int64]:
        by_row = np.add.reduceat(px, np.arange(0, px.shape[0], CELL), axis=0, dtype=np.int64)
        return np.add.reduceat(by_row, np.arange(0, px.shape[1], CELL), axis=1)

    return summed(flags) / summed(np.ones(flags.shape, np.uint8))


def _in_px(cells: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Each cell's value at all its px."""
    return cells.repeat(CELL, axis=0)[: shape[0]].repeat(CELL, axis=1)[:, : shape[1]]


def _event_table(events: list[Event], columns: Columns, placed: list[Patch | None], strip: Strip) -> pa.Table:
    """The events in the columns of the defect table; what the CSV does not say is null.

    defect_id counts from 1 in the order of the rows, as two events may share a place. The box in px is that
    of x, y, width and length on the canvas, which it may leave.
    """
    assert strip.mm_per_px_x and strip.mm_per_line
    rows = []
    for number, (event, patch) in enumerate(zip(events, placed, strict=True), start=1):
        picture = None if patch is None else patch.picture
        middle_x, middle_y = _middle(event, columns.position, picture, strip)
        x, y = middle_x - (event.width_mm or 0) / 2, middle_y - (event.length_mm or 0) / 2
        row = {
            "defect_id": number,
            "roll_id": strip.roll_id,
            "class": event.name,
            "x_mm": x,
            "y_m": y / 1000,
            "width_mm": event.width_mm,
            "length_mm": event.length_mm,
            "event": event.event,
            "code": event.code,
            "image": None if picture is None else event.image,
        }
        if event.width_mm is not None and event.length_mm is not None:
            row |= {
                "x0": math.floor(x / strip.mm_per_px_x),
                "y0": math.floor(y / strip.mm_per_line),
                "x1": math.ceil((x + event.width_mm) / strip.mm_per_px_x),
                "y1": math.ceil((y + event.length_mm) / strip.mm_per_line),
            }
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=EVENTS_SCHEMA)


def _notes(
    events: list[Event], columns: Columns, placed: list[Patch | None], width: int, lines: int
) -> tuple[str, ...]:
    patches = dict.fromkeys(patch for patch in placed if patch is not None)
    area = sum(patch.picture.lines * patch.picture.width for patch in patches)
    notes = [
        columns.told(),
        f"{len(events)} events, {len(patches)} patches that cover {min(1.0, area / (width * lines)):.3%} of"
        " the strip or less: all else is not inspected",
    ]
    if without := [event for event, patch in zip(events, placed, strict=True) if patch is None]:
        rows = ", ".join(str(event.row) for event in without[:_MAX_ROWS_TOLD])
        notes.append(f"{len(without)} events have no image in the folder and so no patch: rows {rows}, ...")
    return tuple(notes)
