"""What all sources of a roll share: the strip's fields beside the pixels, and the way into the roll."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.roll_places import LocalPlace, place_of
from rollsight.inspect.rolls import Roll, RollWriter
from rollsight.inspect.strips import MAX_MODES, Strip, strip_problem

Units = Literal["mm", "px"]
OnLines = Callable[[int, int | None], None]

METADATA_NAMES = ("strip.json", "strip.yaml", "strip.yml")
MAX_METADATA_BYTES = 2**16
STRIP_KEYS = frozenset({field.name for field in fields(Strip)} - {"roll_id", "closed", "lines"} | {"units"})

# Pixels (C, h, W) and, for those lines, what `RollWriter.append` takes by name: encoder, t_ns, valid.
Block = tuple[NDArray[Any], dict[str, NDArray[Any]]]

_MANDATORY = ("mm_per_px_x", "mm_per_line", "side")
_TEXTS = ("line_id", "started_at", "heat", "grade", "flatfield_id")
_MAX_NUMBER = 2**63  # whole numbers; longer ones cannot even be printed (CPython's limit of 4300 digits)
_HEAD_BYTES = 2**16  # of each source, for the digest


def one_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The one file of these names in the folder, None where there is none; UserError (exit 2) for two."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds {found[0].name} and {found[1].name}: keep one of them", USAGE)
    return found[0] if found else None


def read_fields(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Fields and values of a small JSON or YAML file: scalars, or lists of up to 16 scalars.

    UserError (exit 2) in one line that names the file: unreadable, over 64 KiB, no fields, an unknown field,
    nested values.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_METADATA_BYTES + 1)
        if len(data) > MAX_METADATA_BYTES:
            raise UserError(f"{path} is over {MAX_METADATA_BYTES} bytes: keep only the fields in it", USAGE)
        said = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # PyYAML raises KeyError, IndexError and others on wrong values of its tags
        raise UserError(f"{path} cannot be read: {_printable(str(error))[:200]}", USAGE) from error
    if not isinstance(said, dict):
        raise UserError(f"{path} must hold fields with values, not {type(said).__name__}", USAGE)
    if unknown := [_printable(str(name))[:40] for name in said if name not in known]:
        raise UserError(
            f"{path}: unknown {', '.join(unknown[:10])}; known are {', '.join(sorted(known))}", USAGE
        )
    for name, value in said.items():
        # Aliases let a small YAML file unfold into gigabytes of nested lists as soon as it is printed.
        entries = value if isinstance(value, list) and len(value) <= MAX_MODES else [value]
        if any(isinstance(entry, (list, dict, set, tuple)) for entry in entries):
            raise UserError(f"{path}: {name} must be a value or a list of up to {MAX_MODES}", USAGE)
        for entry in entries:
            if isinstance(entry, str) and not entry.isprintable():
                raise UserError(f"{path}: {name} is {shown(entry)}: text must be printable", USAGE)
            if isinstance(entry, int) and abs(entry) >= _MAX_NUMBER:
                raise UserError(f"{path}: {name} is beyond any size here: needed a number under 2^63", USAGE)
    return said


def strip_fields(said: dict[str, Any], path: Path) -> dict[str, Any]:
    """The Strip fields, and `units`, among what `path` says, in the types that Strip has.

    UserError (exit 2) for units other than mm and px; the other values are judged in `complete`.
    """
    found = {name: value for name, value in said.items() if name in STRIP_KEYS}
    if found.get("units", "mm") not in ("mm", "px"):
        raise UserError(f"{path}: units is {shown(found['units'])}: it must be mm or px", USAGE)
    for name, kinds in (("lighting", str), ("scale", (int, float))):
        if isinstance(found.get(name), kinds):
            found[name] = [found[name]]
    # YAML reads a date, or a heat number of digits, as something else than the text it is.
    found |= {name: str(found[name]) for name in _TEXTS if found.get(name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def complete(
    strip: Strip, said: dict[str, Any], where: Path, units: Units, lighting: tuple[str, ...]
) -> Strip:
    """`strip` with what `strip_fields` found; UserError (exit 2) with what is missing or contradictory.

    where is the file named in the advice; lighting the modes of the source where nobody names them. One
    white level is that of every mode.
    """
    given = [name for name in ("mm_per_px_x", "mm_per_line") if getattr(strip, name) is not None]
    if units == "px" and given:
        raise UserError(f"{' and '.join(given)} given together with units px: say only one of them", USAGE)
    said = dict(said)
    if said.pop("units", "mm") == "px" and not given:
        units = "px"
    strip = replace(strip, **{name: said[name] for name in said if getattr(strip, name) in (None, ())})
    strip = replace(strip, lighting=strip.lighting or lighting)
    if isinstance(strip.scale, tuple) and len(strip.scale) == 1 and isinstance(strip.lighting, tuple):
        strip = replace(strip, scale=strip.scale * len(strip.lighting))
    if units == "px":
        strip = replace(strip, mm_per_px_x=None, mm_per_line=None)
    elif missing := [name for name in _MANDATORY if getattr(strip, name) is None]:
        options = " ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(
            f"roll {strip.roll_id}: {', '.join(missing)} missing: say {options}, or write it in"
            f" {where}, or say --units px to do without millimetres",
            USAGE,
        )
    if (problem := strip_problem(strip)) is not None:
        raise UserError(f"roll {strip.roll_id} from {where.parent}: {problem}", USAGE)
    return strip


def digest(paths: Iterable[Path]) -> str:
    """SHA-256, hex, of names, sizes, times of change and first 64 KiB of the files: cheap at any size.

    An interrupted ingest goes on only where this is the same. A file changed deep inside with its size and
    time kept is not seen.
    """
    found = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
            state = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        found.update(
            f"{path.name}\0{state.st_size} {state.st_mtime_ns} {len(head)}\0".encode("utf-8", "replace")
        )
        found.update(head)
    return found.hexdigest()


def write_roll(
    destination: Path | str,
    strip: Strip,
    width: int,
    dtype: str,
    lines: int,
    blocks: Callable[[int], Iterator[Block]],
    *,
    source: str,
    overwrite: bool,
    on_lines: OnLines | None,
) -> Roll:
    """Write what `blocks` yields as the roll at `destination`, a path or URL.

    blocks(start) goes from that line on: 0, or where a killed ingest of the same source, strip, width and
    dtype stopped (local paths only). source is the `digest` of the files. on_lines(done, total) is called
    after each block, and first with the lines that were there already.
    """
    if isinstance(place_of(destination), LocalPlace):
        writer = RollWriter.resume(destination, strip, width, dtype, source=source, overwrite=overwrite)
    else:  # an object store keeps nothing of a killed writer
        writer = RollWriter(destination, strip, width, dtype, overwrite=overwrite)
    with writer:
        if writer.lines_written and on_lines is not None:
            on_lines(writer.lines_written, lines)
        for pixels, per_line in blocks(writer.lines_written):
            writer.append(pixels, **per_line)
            if on_lines is not None:
                on_lines(writer.lines_written, lines)
        if writer.lines_written != lines:
            raise UserError(
                f"roll {strip.roll_id} got {writer.lines_written} of {lines} lines: its source changed while"
                " it was read; ingest it when it is complete"
            )
        return writer.close()


def shown(value: object) -> str:
    """A foreign value for an error line: short and printable, with text in quotes."""
    text = repr(value) if isinstance(value, str) else _printable(str(value))
    return text if len(text) <= 40 else text[:39] + "…"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter.isspace() else "?" for letter in text)
