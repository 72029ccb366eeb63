"""Raw BIL with a sidecar in, a roll out: bit for bit and with its white, or refused in one line."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollsight.inspect import bil
from rollsight.inspect.bil import ingest_bil
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.ingest import ingest
from rollsight.inspect.strips import Strip

UNSAID = Strip("coil-1", None, (), None, None)
STRIP = {"side": "top", "mm_per_px_x": 0.5, "mm_per_line": 1.0}
MODES = ["bright", "dark"]


def noise(bits: int, lines: int = 50, width: int = 20, modes: int = 1, seed: int = 0):
    """(C, lines, width) of that depth, with 0 and the white in it."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (modes, lines, width))
    values[:, 0, 0], values[:, -1, -1] = 0, 2**bits - 1
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def mono12p(values) -> bytes:
    """Each px fills the next 12 bits from the lowest on: one long little-endian number."""
    number = sum(int(value) << 12 * i for i, value in enumerate(values))
    return number.to_bytes(len(values) * 3 // 2, "little")


def mono12_packed(values) -> bytes:
    pairs = [(int(a), int(b)) for a, b in zip(values[::2], values[1::2], strict=True)]
    return b"".join(bytes((a >> 4, (b & 15) << 4 | a & 15, b >> 4)) for a, b in pairs)


def write(folder: Path, pixels, dtype="<u2", pack=None, header=b"", prefix=b"", suffix=b"", **said) -> Path:
    """coil.bil of (C, lines, width) and coil.json; `said` replaces fields of the sidecar, None drops them."""
    path = folder / "coil.bil"
    lines = pixels.swapaxes(0, 1)
    coded = [
        b"".join(pack(mode) for mode in line) if pack else line.astype(dtype).tobytes() for line in lines
    ]
    path.write_bytes(header + b"".join(prefix + line + suffix for line in coded))
    fields = {
        "lines": pixels.shape[1],
        "width_px": pixels.shape[2],
        "bits": 8 if dtype == "u1" else 16,
        **({} if pixels.shape[0] == 1 else {"lighting": MODES[: pixels.shape[0]]}),
        **STRIP,
        **said,
    }
    text = json.dumps({name: value for name, value in fields.items() if value is not None})
    path.with_suffix(".json").write_text(text)
    return path


@pytest.fixture
def destination(tmp_path):
    (tmp_path / "rolls").mkdir()
    return tmp_path / "rolls/coil-1.zarr"


def refusal(path: Path, destination: Path, strip: Strip = UNSAID, **options) -> str:
    with pytest.raises(UserError) as error:
        ingest_bil(path, destination, strip, **options)
    assert "\n" not in str(error.value)
    assert list(destination.parent.iterdir()) == []
    return str(error.value)


@pytest.mark.parametrize("modes", [1, 2])
@pytest.mark.parametrize(
    ("bits", "how", "white"),
    [
        (8, {"dtype": "u1"}, 255),
        (10, {"dtype": "<u2"}, 1023),
        (12, {"dtype": "<u2"}, 4095),
        (12, {"dtype": ">u2", "byte_order": "big"}, 4095),
        (12, {"pack": mono12p, "packed": "Mono12p"}, 4095),
        (12, {"pack": mono12_packed, "packed": "Mono12Packed"}, 4095),
        (14, {"dtype": "<u2"}, 16383),
        (16, {"dtype": "<u2"}, 65535),
        (16, {"dtype": ">u2", "byte_order": "big"}, 65535),
    ],
)
def test_every_depth_is_kept_bit_for_bit_and_its_white_is_one(tmp_path, destination, bits, how, white, modes):
    pixels = noise(bits, modes=modes)
    roll = ingest_bil(write(tmp_path, pixels, bits=bits, **how), destination, UNSAID)
    assert np.array_equal(roll.read(0, 50), pixels)
    assert roll.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert roll.white == (white,) * modes
    assert roll.strip.lighting == tuple(MODES[:modes])
    unit = roll.read_unit(0, 50)
    assert unit.min() == 0 and unit[:, -1, -1].tolist() == [1] * modes


def test_px_aligned_high_keep_their_bits_and_their_white(tmp_path, destination):
    pixels = noise(12) << 4
    roll = ingest_bil(write(tmp_path, pixels, bits=12, align="high"), destination, UNSAID)
    assert np.array_equal(roll.read(0, 50), pixels)
    assert roll.white == (4095 * 16,)


def test_what_stands_beside_the_pixels_is_left_out(tmp_path, destination):
    pixels = noise(16, modes=2)
    said = {"header_bytes": 3, "line_prefix_bytes": 5, "line_suffix_bytes": 1}
    path = write(tmp_path, pixels, header=b"HDR", prefix=b"LINE:", suffix=b"\xff", **said)
    assert np.array_equal(ingest_bil(path, destination, UNSAID).read(0, 50), pixels)


@given(st.data())
def test_packed_px_are_unpacked_as_their_definitions_say(data):
    values = data.draw(
        st.lists(st.integers(0, 4095), min_size=2, max_size=40).map(lambda v: v[: len(v) // 2 * 2])
    )
    for packing, pack in (("Mono12p", mono12p), ("Mono12Packed", mono12_packed)):
        packed = np.frombuffer(pack(values), np.uint8)[None, None]
        assert bil._unpacked(packed, packing)[0, 0].tolist() == values


def test_white_and_strip_can_be_said_otherwise(tmp_path, destination):
    path = write(tmp_path, noise(12, modes=2), bits=12, scale=[4000, 3000], heat=4711)
    roll = ingest_bil(path, destination, Strip("coil-1", "bottom", (), None, None))
    assert roll.white == (4000, 3000)
    assert (roll.strip.side, roll.strip.heat) == ("bottom", "4711")


def test_one_white_is_that_of_every_mode(tmp_path, destination):
    path = write(tmp_path, noise(12, modes=2), bits=12)
    strip = Strip("coil-1", None, (), None, None, scale=(4000,))
    assert ingest_bil(path, destination, strip).white == (4000, 4000)


def test_the_line_table_gives_encoder_time_and_valid(tmp_path, destination):
    rows = [(7 * y, 10**15 + y, int(y % 3 > 0)) for y in range(5000)]
    text = "encoder,t_ns,valid\n" + "".join(f"{e},{t},{v}\n" for e, t, v in rows)
    (tmp_path / "coil.lines.csv").write_text(text)
    roll = ingest_bil(
        write(tmp_path, noise(8, 5000), dtype="u1", line_table="coil.lines.csv"), destination, UNSAID
    )
    lines = roll.read_lines(0, 5000)
    for found, expected in zip(
        (lines.encoder, lines.t_ns, lines.valid), zip(*rows, strict=True), strict=True
    ):
        assert found.tolist() == list(expected)


def test_a_line_table_may_have_one_column(tmp_path, destination):
    (tmp_path / "t.csv").write_text("valid\n" + "1\n0\n" * 25)
    roll = ingest_bil(write(tmp_path, noise(8), dtype="u1", line_table="t.csv"), destination, UNSAID)
    assert roll.read_lines(0, 50).valid.tolist() == [True, False] * 25
    assert roll.read_lines(0, 50).encoder.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("valid\n" + "1\n" * 49, "has 49 rows but coil.json says 50 lines"),
        ("valid\n" + "1\n" * 51, "has 51 rows but coil.json says 50 lines"),
        ("valid\n" + "1\n" * 49 + "2\n", "valid is neither 0 nor 1"),
        ("speed\n" + "1\n" * 50, "has the columns 'speed': needed some of encoder, t_ns, valid"),
        ("valid,valid\n" + "1,1\n" * 50, "each once"),
        ("encoder\n" + "1.5\n" * 50, "cannot be read as a CSV"),
        ("encoder,valid\n" + "1\n" * 50, "cannot be read as a CSV"),
        ("encoder,valid\n" + "1,\n" * 50, "a value is missing"),
        ("", "cannot be read as a CSV"),
    ],
)
def test_a_line_table_that_does_not_fit_is_refused(tmp_path, destination, text, named):
    (tmp_path / "t.csv").write_text(text)
    message = refusal(write(tmp_path, noise(8), dtype="u1", line_table="t.csv"), destination)
    assert "t.csv" in message and named in message


@pytest.mark.parametrize("name", ["../t.csv", "/etc/passwd", "no.csv", "", "a" * 5000, 5])
def test_a_line_table_is_a_file_beside_the_sidecar(tmp_path, destination, name):
    assert str(name)[:30] in refusal(write(tmp_path, noise(8), dtype="u1", line_table=name), destination)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"lines": None}, "lines missing"),
        ({"bits": None}, "bits missing"),
        ({"width_px": None, "lines": None}, "lines, width_px missing"),
        ({"lines": 0}, "lines is 0"),
        ({"lines": "50"}, "lines is '50'"),
        ({"lines": True}, "lines is True"),
        ({"lines": 50.0}, "lines is 50.0"),
        ({"lines": 2**40}, f"lines is {2**40}"),
        ({"width_px": -20}, "width_px is -20"),
        ({"bits": 9}, "bits is 9: it must be one of 8, 10, 12, 14, 16"),
        ({"bits": "8"}, "bits is '8'"),
        ({"byte_order": "middle"}, "byte_order is 'middle'"),
        ({"packed": "Mono10p"}, "packed is 'Mono10p'"),
        ({"packed": "Mono12p"}, "packed Mono12p with bits 8"),
        ({"packed": "Mono12p", "bits": 12, "width_px": 21}, "come in pairs"),
        ({"packed": "Mono12p", "bits": 12, "align": "high"}, "align said of packed px"),
        ({"align": "left"}, "align is 'left'"),
        ({"header_bytes": -1}, "header_bytes is -1"),
        ({"line_prefix_bytes": 2**30}, "line_prefix_bytes"),
        ({"samples": 20}, "unknown samples"),
        ({"lighting": [["bright"]]}, "lighting"),
        ({"lighting": 5}, "lighting"),
        ({"lighting": ["a", "a"]}, "lighting"),
        ({"lighting": [f"m{i}" for i in range(8)], "width_px": 2**17, "bits": 16}, "over the limit"),
        ({"side": None}, "side missing"),
        ({"mm_per_line": "1"}, "mm_per_line"),
        ({"heat": "\ud800"}, "heat"),
        ({"units": "inch"}, "units"),
    ],
)
def test_a_wrong_field_of_the_sidecar_is_named(tmp_path, destination, said, named):
    with pytest.raises(UserError) as error:
        ingest_bil(write(tmp_path, noise(8), dtype="u1", **said), destination, UNSAID)
    assert error.value.exit_code == USAGE
    assert named in str(error.value) and str(error.value).isprintable()
    assert list(destination.parent.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"lines": 1e999}', "[" * 10_000, "\0", '{"a": "x'])
def test_a_sidecar_that_is_no_object_is_refused(tmp_path, destination, text):
    path = write(tmp_path, noise(8), dtype="u1")
    path.with_suffix(".json").write_text(text)
    assert "coil.json" in refusal(path, destination)


def test_a_size_other_than_the_sidecars_is_told_with_both_numbers(tmp_path, destination):
    path = write(tmp_path, noise(16, 50, 20), lines=51)
    message = refusal(path, destination)
    assert "coil.bil holds 2000 bytes but coil.json asks for 2040" in message
    assert "50 lines fit and 0 bytes are left over" in message


@pytest.mark.parametrize(
    ("bits", "said", "dtype"), [(12, {}, ">u2"), (12, {"align": "high"}, "<u2"), (10, {}, "<u2")]
)
def test_px_beyond_their_bits_tell_of_a_wrong_sidecar(tmp_path, destination, bits, said, dtype):
    message = refusal(write(tmp_path, noise(12), dtype=dtype, bits=bits, **said), destination)
    assert "coil.bil: line" in message and f"no {bits} bits" in message and "coil.json" in message


def test_missing_files_are_named(tmp_path, destination):
    path = write(tmp_path, noise(8), dtype="u1")
    assert "name the file of raw pixels" in refusal(path.with_suffix(".json"), destination)
    assert "no file" in refusal(tmp_path / "other.bil", destination)
    path.with_suffix(".json").unlink()
    assert "has no sidecar coil.json" in refusal(path, destination)


def test_a_file_that_shrinks_while_it_is_read_leaves_no_roll(tmp_path, destination, monkeypatch):
    path = write(tmp_path, noise(8), dtype="u1")
    monkeypatch.setattr(bil, "BLOCK_BYTES", 100)

    def cut(done, total):
        with path.open("r+b") as file:
            file.truncate(10)

    assert "became shorter" in refusal(path, destination, on_lines=cut)


def test_an_absurd_sidecar_allocates_nothing(tmp_path, destination):
    path = write(tmp_path, noise(8), dtype="u1", lines=2**31, width_px=2**17)
    tracemalloc.start()
    assert "holds 1000 bytes" in refusal(path, destination)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_units_px_need_no_millimetres(tmp_path, destination):
    said = {"side": None, "mm_per_px_x": None, "mm_per_line": None}
    path = write(tmp_path, noise(8), dtype="u1", **said)
    assert ingest(path, destination, UNSAID, units="px").roll.strip.units == "px"


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(lines: int) -> int:
        path = write(tmp_path, noise(16, lines, 256))
        tracemalloc.start()
        ingest_bil(path, tmp_path / "coil-1.zarr", UNSAID, overwrite=True)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)  # what the first use of zarr imports and caches is not the roll's
    few = peak(8192)
    # A busy machine holds a shard or two more, of 2 MiB: less than half of what is added.
    assert peak(40960) - few < 8e6 < 32768 * 256 * 2 / 2
