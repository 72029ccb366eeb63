"""Whatever stands in the files of a source: a roll, or one line of refusal; no hang, nothing half-written."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rollsight.inspect.bil import LINE_COLUMNS, SIDECAR_FIELDS
from rollsight.inspect.errors import UserError
from rollsight.inspect.ingest import ingest
from rollsight.inspect.rolls import open_roll
from rollsight.inspect.sources import STRIP_KEYS
from rollsight.inspect.strips import Strip

# A longer run: ROLLSIGHT_FUZZ=2000 for that many of each kind.
FEW = settings(
    max_examples=int(os.environ.get("ROLLSIGHT_FUZZ", "25")), deadline=timedelta(seconds=30), database=None
)
FIELDS = {"side": "top", "mm_per_px_x": 0.5, "mm_per_line": 1.0}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**40, 2**63, 10**400, -(2**70), 8, 12, 16]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ["little", "big", "high", "Mono12p", "lines.csv", "mm", "px", "m", "top", "patch", "../x"]
    ),
    st.lists(st.one_of(st.text(max_size=3), st.integers(), st.lists(st.integers(), max_size=2)), max_size=20),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def outcome(fill: Callable[[Path], Path], units: str = "mm") -> None:
    """Ingest what `fill` puts into a folder, and hold what comes of it."""
    with tempfile.TemporaryDirectory() as name:
        source, rolls = Path(name, "source"), Path(name, "rolls")
        source.mkdir()
        rolls.mkdir()
        path = fill(source)
        strip = Strip("coil-1", None, (), None, None)
        try:
            roll = ingest(path, rolls / "coil-1.zarr", strip, units=units).roll
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 3000
            assert list(rolls.iterdir()) == []
        else:
            left = {path.name for path in rolls.iterdir()}
            assert left - {"coil-1.events.parquet"} == {"coil-1.zarr"}
            whole = open_roll(rolls / "coil-1.zarr")
            assert whole.lines == roll.lines
            whole.read(0, min(whole.lines, 100))


def raw(source: Path, sidecar: bytes, pixels: bytes, table: bytes = b"valid\n1\n") -> Path:
    (source / "coil.json").write_bytes(sidecar)
    (source / "lines.csv").write_bytes(table)
    (source / "coil.bil").write_bytes(pixels)
    return source / "coil.bil"


SIDECAR_KEYS = st.sampled_from(sorted(SIDECAR_FIELDS | STRIP_KEYS | {"other"}))


@FEW
@given(st.dictionaries(SIDECAR_KEYS, ODD, max_size=4), st.sampled_from([0, 6, 12, 24, 25]))
def test_any_values_in_a_sidecar(changes, size):
    said = {"lines": 3, "width_px": 4, "bits": 16, **FIELDS, **changes}
    outcome(lambda source: raw(source, json.dumps(said).encode(), bytes(range(size))))


@FEW
@given(
    st.binary(max_size=40) | st.text(st.sampled_from('{}[]":,0123456789.eE-+ \\u"lines bits'), max_size=60)
)
def test_any_bytes_in_a_sidecar(data):
    sidecar = data.encode(errors="replace") if isinstance(data, str) else data
    outcome(lambda source: raw(source, sidecar, b"123456"), units="px")


@FEW
@given(
    st.lists(st.sampled_from([*LINE_COLUMNS, "other", ""]), max_size=4),
    st.lists(
        st.lists(st.sampled_from(["0", "1", "-1", "", "x", "9" * 30, "1.5", '"', "\n"]), max_size=4),
        max_size=5,
    ),
)
def test_any_line_table(head, rows):
    text = "\n".join(",".join(row) for row in [head, *rows])
    said = {"lines": 3, "width_px": 4, "bits": 8, "line_table": "lines.csv", **FIELDS}
    outcome(lambda source: raw(source, json.dumps(said).encode(), bytes(12), text.encode()))


CELL = st.one_of(
    st.sampled_from(
        ["1", "2,5", "3.5", "-1", "nan", "1e400", "", "a.png", "b.png", "pit", "C:\\x\\a.png", "..\\a.png"]
    ),
    st.text(max_size=5),
)
HEADER = st.sampled_from(
    ["id", "class", "code", "x", "y [m]", "y", "width", "length", "image", "resolution", "", "é"]
)


def patches(source: Path, table: bytes, columns: object = None) -> Path:
    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(source / "a.png")
    (source / "events.csv").write_bytes(table)
    (source / "strip.json").write_text(json.dumps({**FIELDS, "width_mm": 20, "length_m": 0.1}))
    if columns is not None:
        (source / "columns.yaml").write_text(yaml.safe_dump(columns, allow_unicode=True))
    return source


@FEW
@given(
    st.lists(HEADER, max_size=6) | st.just(["id", "class", "x", "y", "image"]),
    st.lists(st.lists(CELL, min_size=3, max_size=6), max_size=4),
    st.sampled_from(",;\t"),
    st.sampled_from(["utf-8", "utf-16", "cp1252"]),
)
def test_any_table_of_events(head, rows, separator, encoding):
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([head, *rows])
    outcome(lambda source: patches(source, text.getvalue().encode(encoding, errors="replace")))


@FEW
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_in_a_table_of_events(data, below):
    outcome(lambda source: patches(source, b"class,x,y,image\n" * below + data))


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["class", "x", "y", "image", "x_unit", "y_unit", "position", "other"]),
        st.one_of(ODD, st.sampled_from(["class", "x", "y", "image", "centre", "corner"])),
        max_size=4,
    )
)
def test_any_values_in_a_column_file(columns):
    outcome(lambda source: patches(source, b"class,x,y,image\npit,5,20,a.png\n", columns))


@FEW
@given(st.dictionaries(st.sampled_from(["width_mm", "length_m", "lighting", "scale", "units", *FIELDS]), ODD))
def test_any_size_of_the_strip_of_patches(changes):
    said = {**FIELDS, "width_mm": 20, "length_m": 0.1, **changes}
    large = [said.get(name) for name in ("width_mm", "length_m")]
    # A strip of some 10 million lines is ingested all right, but not in a test.
    if any(type(value) in (int, float) and 50 < value < 1e30 for value in large):
        said |= {"width_mm": 20, "length_m": 0.1}
    if any(type(said.get(name)) in (int, float) and 0 < said[name] < 0.2 for name in FIELDS):
        said |= FIELDS

    def fill(source: Path) -> Path:
        patches(source, b"class,x,y,image\npit,5,20,a.png\n")
        (source / "strip.json").write_text(json.dumps(said))
        return source

    outcome(fill)


@FEW
@given(st.text(st.sampled_from("side: top\n-[]{}&*!|>'\"%@`#,heat 1xmm_perlinpx"), max_size=40))
@pytest.mark.parametrize(
    "head", ["", "side: top\n", "heat: !!bool x\n", "heat: !!timestamp x\n", "? {[1]: 2}\n"]
)
def test_any_text_beside_the_images(head, text):
    def fill(source: Path) -> Path:
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(source / "a.png")
        (source / "strip.yaml").write_text(head + text)
        return source

    outcome(fill, units="px")


def encoded() -> dict[str, bytes]:
    """One small image of each kind that ingest decodes, by file name."""
    gray = np.random.default_rng(0).integers(0, 256, (20, 24), np.uint8)
    found: dict[str, bytes] = {}
    for name, pixels, options in (
        ("gray.png", gray, {}),
        ("deep.png", gray.astype(np.uint16) * 257, {}),
        ("colour.png", np.dstack([gray] * 3), {}),
        ("gray.jpg", gray, {}),
        ("gray.bmp", gray, {}),
        ("lzw.tif", gray, {"compression": "tiff_lzw"}),
        ("jpeg.tif", gray, {"compression": "jpeg"}),
    ):
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name[-3:].upper())
        Image.fromarray(pixels).save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    for name, options in (
        ("plain.tif", {}),
        ("zip.tif", {"compression": "deflate"}),
        ("tiles.tif", {"tile": (16, 16)}),
        ("big.tif", {"bigtiff": True, "byteorder": ">"}),
    ):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, gray, photometric="minisblack", **options)
        found[name] = buffer.getvalue()
    return found


ENCODED = encoded()


@FEW
@given(
    st.sampled_from(sorted(ENCODED)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=4),
    st.floats(0, 1) | st.just(1.0),
)
def test_any_damage_to_an_image(name, changes, kept):
    """Bytes overwritten anywhere, the head more often, and the end cut off."""
    data = bytearray(ENCODED[name])
    for place, new in changes:
        at = int(place**3 * len(data))
        data[at : at + len(new)] = new
    data = data[: int(len(data) * kept)]

    def fill(source: Path) -> Path:
        (source / name).write_bytes(data)
        return source

    outcome(fill, units="px")
