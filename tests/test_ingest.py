"""A folder of strips in, a roll out: in order, unchanged, or refused in one line that names the file."""

import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.ingest import ingest, ingest_strips, natural_order
from rollsight.inspect.rolls import Strip, open_roll

STRIP = Strip("coil-1", "top", ("bright",), mm_per_px_x=0.8, mm_per_line=1.0)
UNSAID = Strip("coil-1", None, (), None, None)


def noise(lines: int, width: int = 30, dtype=np.uint8, seed: int = 0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (lines, width), dtype, endpoint=True)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "strips"
    path.mkdir()
    return path


@pytest.fixture
def destination(tmp_path):
    (tmp_path / "rolls").mkdir()
    return tmp_path / "rolls/coil-1.zarr"


def refusal(folder: Path, destination: Path, strip: Strip = STRIP, **options) -> str:
    """The one line with which the folder is refused; nothing is written."""
    with pytest.raises(UserError) as error:
        ingest_strips(folder, destination, strip, **options)
    assert "\n" not in str(error.value)
    assert list(destination.parent.iterdir()) == []
    return str(error.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds next to nothing."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [part(b"IHDR", size), part(b"IDAT", zlib.compress(b"\0" * 9)), part(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_strips_are_stacked_in_natural_order(folder, destination):
    parts = [noise(5000, seed=1), noise(70, seed=2), noise(3, seed=3)]
    for name, part in zip(("img1.png", "img2.tif", "IMG10.PNG"), parts, strict=True):
        Image.fromarray(part).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._img1.png").write_bytes(b"what another system leaves behind")
    told = []
    roll = ingest_strips(folder, destination, STRIP, on_lines=lambda done, total: told.append((done, total)))
    assert np.array_equal(roll.read(0, 5073)[0], np.concatenate(parts))
    assert told == [(4096, 5073), (5000, 5073), (5070, 5073), (5073, 5073)]
    assert roll.strip.closed and roll.lines == 5073


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=8, unique=True))
def test_numbers_in_names_sort_as_numbers(numbers):
    paths = sorted((Path(f"strip_{number}_a.png") for number in numbers), key=natural_order)
    assert [int(path.name.split("_")[1]) for path in paths] == sorted(numbers)


def test_a_name_that_starts_with_a_number_sorts_beside_one_that_does_not():
    names = ["b1.png", "10.png", "2.png", "a.png", "02.png"]
    assert sorted(names, key=lambda name: natural_order(Path(name))) == [
        "02.png",
        "2.png",
        "10.png",
        "a.png",
        "b1.png",
    ]


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_of_either_depth_is_kept_bit_for_bit(folder, destination, dtype, compression):
    Image.fromarray(noise(40, dtype=dtype)).save(folder / "a.tif", compression=compression)
    roll = ingest_strips(folder, destination, STRIP)
    assert roll.dtype == dtype
    assert np.array_equal(roll.read(0, 40)[0], noise(40, dtype=dtype))


def test_big_endian_and_tiled_tiff_are_kept_bit_for_bit(folder, destination):
    pixels = noise(100, dtype=np.uint16)
    tifffile.imwrite(folder / "a.tif", pixels, byteorder=">")
    tifffile.imwrite(folder / "b.tiff", pixels, tile=(16, 16))
    assert np.array_equal(ingest_strips(folder, destination, STRIP).read(0, 200)[0], np.tile(pixels, (2, 1)))


def test_16_bit_png_is_kept_bit_for_bit(folder, destination):
    Image.fromarray(noise(40, dtype=np.uint16)).save(folder / "a.png")
    assert np.array_equal(
        ingest_strips(folder, destination, STRIP).read(0, 40)[0], noise(40, dtype=np.uint16)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_with_white_as_zero_is_turned(folder, destination, dtype):
    """Whoever decodes it: tifffile the first, pillow the second, which is in LZW."""
    gray = noise(40, dtype=dtype)
    tifffile.imwrite(folder / "a.tif", np.invert(gray), photometric="miniswhite")
    # pillow turns 8 bits as it saves, and saves 16 bits as they are.
    pixels = gray if dtype == np.uint8 else np.invert(gray)
    Image.fromarray(pixels).save(folder / "b.tif", compression="tiff_lzw", tiffinfo={262: 0})
    assert np.array_equal(ingest_strips(folder, destination, STRIP).read(0, 80)[0], np.tile(gray, (2, 1)))


def test_a_preview_page_in_a_tiff_is_left_aside(folder, destination):
    with tifffile.TiffWriter(folder / "a.tif") as writer:
        writer.write(noise(40))
        writer.write(noise(40)[::4, ::4], subfiletype=1)
    assert ingest_strips(folder, destination, STRIP).lines == 40


def test_equal_channels_become_gray_unchanged(folder, destination):
    gray = noise(40)
    Image.fromarray(np.dstack([gray] * 3)).save(folder / "a.png")
    tifffile.imwrite(folder / "b.tif", np.dstack([gray] * 3), photometric="rgb")
    tifffile.imwrite(folder / "c.tif", np.stack([gray] * 3), photometric="rgb", planarconfig="separate")
    assert np.array_equal(ingest_strips(folder, destination, STRIP).read(0, 120)[0], np.tile(gray, (3, 1)))


def test_other_colours_become_their_luma(folder, destination):
    Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8)).save(folder / "a.png")
    Image.fromarray(np.full((4, 4, 3), (0, 255, 0), np.uint8)).save(folder / "b.png")
    roll = ingest_strips(folder, destination, STRIP)
    assert {*roll.read(0, 4).flat} == {76} and {*roll.read(4, 8).flat} == {150}  # 0.299 and 0.587 of 255


def test_gray_jpeg_is_taken(folder, destination):
    Image.fromarray(np.full((16, 24), 128, np.uint8)).save(folder / "a.JPG", "JPEG")
    assert np.all(ingest_strips(folder, destination, STRIP).read(0, 16) == 128)


def test_a_strip_longer_than_pillow_allows_is_taken(folder, destination, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.fromarray(noise(40)).save(folder / "a.png")
    assert ingest_strips(folder, destination, STRIP).lines == 40
    assert Image.MAX_IMAGE_PIXELS == 10


def test_mixed_widths_are_refused_with_the_file_named(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    tifffile.imwrite(folder / "b.tif", noise(40, 31))
    message = refusal(folder, destination)
    assert "b.tif is 31 px wide but a.png is 30 px" in message


def test_mixed_depths_are_refused_with_the_file_named(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    tifffile.imwrite(folder / "b.tif", noise(40, dtype=np.uint16))
    assert "b.tif is uint16 but a.png is uint8" in refusal(folder, destination)


@pytest.mark.parametrize("name", ["b.png", "b.tif", "b.jpg"])
@pytest.mark.parametrize(
    "content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n", b"II*\0\xff\xff\xff\xff", b"\xff\xd8\xff"]
)
def test_a_file_that_is_no_image_is_refused_with_its_name(folder, destination, name, content):
    Image.fromarray(noise(40)).save(folder / "a.png")
    (folder / name).write_bytes(content)
    assert str(folder / name) in refusal(folder, destination)


@pytest.mark.parametrize("name", ["b.png", "b.tif", "b.jpg", "deflate.tif"])
def test_a_file_cut_short_is_refused_and_leaves_no_roll(folder, destination, name):
    """Its header is whole, so this shows only when it is decoded, after the first file was written."""
    Image.fromarray(noise(5000)).save(folder / "a.png")
    options = {"compression": "tiff_adobe_deflate"} if name == "deflate.tif" else {}
    Image.fromarray(noise(400)).save(folder / name, **options)
    data = (folder / name).read_bytes()
    # TIFF written by pillow has its header and directory first.
    (folder / name).write_bytes(data[: len(data) * 2 // 3])
    assert str(folder / name) in refusal(folder, destination)


def test_an_empty_folder_is_refused(folder, destination):
    assert f"{folder} holds no images" in refusal(folder, destination)


def test_a_missing_folder_is_refused(folder, destination):
    assert str(folder / "x") in refusal(folder / "x", destination)


@pytest.mark.parametrize(("width", "height"), [(30, 2**31 - 1), (2**31 - 1, 30), (100_000, 100_000)])
def test_an_absurd_size_is_refused_before_anything_is_allocated(folder, destination, width, height):
    (folder / "a.png").write_bytes(png_header(width, height))
    tracemalloc.start()
    assert str(folder / "a.png") in refusal(folder, destination)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_pixels_that_would_lose_depth_are_refused(folder, destination):
    tifffile.imwrite(folder / "a.tif", noise(40, dtype=np.uint16).astype(np.float32))
    assert "a.tif" in refusal(folder, destination)


def test_a_palette_is_refused(folder, destination):
    Image.fromarray(noise(40)).convert("P").save(folder / "a.png")
    assert "a.png" in refusal(folder, destination)


def test_several_pages_are_refused(folder, destination):
    tifffile.imwrite(folder / "a.tif", np.stack([noise(40)] * 2), photometric="minisblack")
    assert "a.tif has several pages" in refusal(folder, destination)


def test_missing_units_are_named_with_their_options(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    message = refusal(folder, destination, UNSAID)
    assert "mm_per_px_x, mm_per_line, side missing" in message
    assert "--mm-per-px-x --mm-per-line --side" in message and "--units px" in message
    with pytest.raises(UserError, match="mm_per_line missing") as error:
        ingest_strips(folder, destination, Strip("coil-1", "top", (), 0.8, None))
    assert error.value.exit_code == USAGE


def test_units_px_need_no_millimetres(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    roll = ingest_strips(folder, destination, UNSAID, units="px")
    assert (roll.strip.units, roll.strip.mm_per_line, roll.strip.lighting) == ("px", None, ("bright",))


def test_units_px_together_with_millimetres_are_refused(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    assert "mm_per_px_x and mm_per_line given together" in refusal(folder, destination, units="px")


@pytest.mark.parametrize("name", ["strip.json", "strip.yaml"])
def test_the_file_beside_the_images_gives_what_is_not_said(folder, destination, name):
    Image.fromarray(noise(40)).save(folder / "a.png")
    said = {"side": "bottom", "mm_per_px_x": 0.5, "mm_per_line": 0.25, "lighting": "dark", "heat": 4711}
    (folder / name).write_text(json.dumps(said))
    strip = ingest_strips(folder, destination, Strip("coil-1", None, (), 0.8, None)).strip
    assert (strip.side, strip.mm_per_px_x, strip.mm_per_line) == ("bottom", 0.8, 0.25)  # what is said wins
    assert (strip.lighting, strip.heat) == (("dark",), "4711")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mm_per_pixel: 1", "mm_per_pixel"),
        ("roll_id: ../x", "roll_id"),
        ("side: left", "side"),
        ("mm_per_line: -1", "mm_per_line"),
        ("mm_per_line: [1]", "mm_per_line"),
        ("units: inch", "units"),
        ("lighting: [a, b]", "lighting"),
        ("grade: {a: 1}", "grade"),
        ("heat: [[[[1]]]]", "heat"),
        ("line_id: [", "strip.yaml"),
        ("line_id: !!python/object/apply:os.getcwd []", "strip.yaml"),
    ],
)
def test_a_wrong_field_beside_the_images_is_named(folder, destination, text, named):
    Image.fromarray(noise(40)).save(folder / "a.png")
    (folder / "strip.yaml").write_text(f"side: top\nmm_per_px_x: 1\nmm_per_line: 1\n{text}\n")
    assert named in refusal(folder, destination, UNSAID)


@pytest.mark.parametrize("text", ["- top", "", "top", "1"])
def test_a_file_beside_the_images_without_fields_is_refused(folder, destination, text):
    (folder / "strip.yaml").write_text(text)
    assert "strip.yaml must hold fields" in refusal(folder, destination, UNSAID)


def test_yaml_that_unfolds_without_end_is_refused(folder, destination):
    """Aliases of aliases: 9^30 entries once somebody prints them."""
    lines = ["line_id: &a0 [x]"] + [f"{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    text = "\n".join(lines).replace("29: ", "heat: ")
    (folder / "strip.yaml").write_text(text)
    assert "unknown" in refusal(folder, destination, UNSAID)
    (folder / "strip.yaml").write_text(f"heat: {{{', '.join(lines[1:]).replace('*a0', 'x')}}}")
    assert "heat must be a value" in refusal(folder, destination, UNSAID)


def test_two_files_beside_the_images_are_refused(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    for name in ("strip.json", "strip.yaml"):
        (folder / name).write_text("{}")
    assert "strip.json and strip.yaml" in refusal(folder, destination)


def test_an_existing_roll_is_kept_unless_overwrite_is_said(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    ingest_strips(folder, destination, STRIP)
    Image.fromarray(noise(7)).save(folder / "a.png")
    with pytest.raises(UserError, match="exists") as error:
        ingest_strips(folder, destination, STRIP)
    assert error.value.exit_code == USAGE
    assert open_roll(destination).lines == 40
    assert ingest_strips(folder, destination, STRIP, overwrite=True).lines == 7


def test_an_id_that_leaves_the_folder_is_refused(folder, destination):
    strip = Strip("../x", "top", ("b",), 1.0, 1.0)
    with pytest.raises(UserError, match="not usable"):
        ingest_strips(folder, destination.parent / "../x.zarr", strip)


def test_a_kill_in_the_middle_leaves_nothing_that_opens(folder, destination):
    """The next run starts over, and what the killed one left is gone."""
    for i in range(4):
        Image.fromarray(noise(3000, seed=i)).save(folder / f"{i}.png")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from rollsight.inspect.ingest import ingest_strips; from rollsight.inspect.rolls import Strip\n"
        "def halt(done, total):\n"
        "    if done > 6000: print('ready', flush=True); time.sleep(60)\n"
        "strip = Strip('coil-1', 'top', ('b',), 1.0, 1.0)\n"
        "ingest_strips(Path(sys.argv[1]), Path(sys.argv[2]), strip, on_lines=halt)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder, destination], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for left in destination.parent.iterdir():
        with pytest.raises(UserError):
            open_roll(left)
    with pytest.raises(UserError, match="no roll"):
        open_roll(destination)
    roll = ingest_strips(folder, destination, STRIP)
    assert [path.name for path in destination.parent.iterdir()] == ["coil-1.zarr"]
    assert np.array_equal(roll.read(0, 12000)[0], np.concatenate([noise(3000, seed=i) for i in range(4)]))


def test_one_file_is_in_memory_at_a_time(folder, tmp_path):
    def peak(files: int) -> int:
        for i in range(files):
            tifffile.imwrite(folder / f"{i}.tif", noise(4096, 512))  # 2 MB each
        tracemalloc.start()
        ingest_strips(folder, tmp_path / "coil-1.zarr", STRIP, overwrite=True)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)  # what the first use of zarr imports and caches is not the roll's
    few = peak(2)
    assert peak(8) - few < 4e6 < 6 * 4096 * 512 * 0.4


def test_a_folder_per_lighting_mode_makes_a_roll_of_several(folder, destination):
    for mode, seed in (("dark", 1), ("bright", 2)):
        (folder / mode).mkdir()
        for i, lines in enumerate((5000, 70)):
            Image.fromarray(noise(lines, seed=10 * seed + i)).save(folder / mode / f"{i}.png")
    (folder / "notes").mkdir()
    roll = ingest_strips(folder, destination, Strip("coil-1", "top", (), 0.8, 1.0))
    assert roll.strip.lighting == ("bright", "dark")  # by name where nobody says
    for axis, seed in enumerate((2, 1)):
        parts = [noise(5000, seed=10 * seed), noise(70, seed=10 * seed + 1)]
        assert np.array_equal(roll.read(0, 5070)[axis], np.concatenate(parts))
    strip = Strip("coil-1", "top", ("dark", "bright"), 0.8, 1.0)
    turned = ingest_strips(folder, destination, strip, overwrite=True)
    assert np.array_equal(turned.read(0, 9)[1], noise(5000, seed=20)[:9])


@pytest.mark.parametrize(
    ("dark", "lighting", "named"),
    [
        ([40, 40], (), "dark holds 2 images but"),
        ([41], (), "a.png has 41 lines but"),
        ([40], ("bright", "oblique"), "lighting names bright, oblique but the folder holds bright, dark"),
        ([40], ("bright",), "needed a sub-folder per mode"),
    ],
)
def test_modes_that_do_not_fit_are_refused(folder, destination, dark, lighting, named):
    for mode, sizes in (("bright", [40]), ("dark", dark)):
        (folder / mode).mkdir()
        for name, lines in zip("ab", sizes, strict=False):
            Image.fromarray(noise(lines)).save(folder / mode / f"{name}.png")
    assert named in refusal(folder, destination, Strip("coil-1", "top", lighting, 0.8, 1.0))


def test_gray_bmp_is_kept_bit_for_bit(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.bmp")
    assert np.array_equal(ingest_strips(folder, destination, STRIP).read(0, 40)[0], noise(40))


def test_a_roll_can_go_to_an_object_store(folder):
    Image.fromarray(noise(40)).save(folder / "a.png")
    roll = ingest(folder, "memory://ingest/coil-1.zarr", STRIP).roll
    assert np.array_equal(roll.read(0, 40)[0], noise(40))
    with pytest.raises(UserError, match="exists"):
        ingest(folder, "memory://ingest/coil-1.zarr", STRIP)


def test_a_length_is_for_patch_exports_only(folder, destination):
    Image.fromarray(noise(40)).save(folder / "a.png")
    with pytest.raises(UserError, match="length_m is for patch exports only") as error:
        ingest(folder, destination, STRIP, length_m=3)
    assert error.value.exit_code == USAGE
