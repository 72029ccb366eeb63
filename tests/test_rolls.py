"""A roll on disk: what is written is read, and nothing half-made or foreign is taken for a roll."""

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import ome_zarr_models
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Zstd
from ome_zarr_models.v05 import Image
from rollsight.inspect.errors import LOCKED, PARTIAL, USAGE, UserError
from rollsight.inspect.rolls import (
    NOT_INSPECTED,
    SHARD_LINES,
    LabelWriter,
    Roll,
    RollWriter,
    Strip,
    check_roll_id,
    open_roll,
    quarter,
    roll_path,
)

STRIP = Strip("coil-1", "top", ("bright",), mm_per_px_x=0.8, mm_per_line=1.0)


def write_roll(folder: Path, pixels, strip=STRIP, **options) -> Roll:
    """A roll of the pixels (C, lines, W)."""
    with RollWriter(
        roll_path(folder, strip.roll_id), strip, pixels.shape[2], pixels.dtype, **options
    ) as writer:
        writer.append(pixels)
    return open_roll(writer.location)


def noise(*shape: int, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.fixture
def roll(tmp_path):
    return write_roll(tmp_path, noise(1, 100, 70))


def change(path: Path, edit) -> None:
    """Edit the JSON of a zarr.json in place."""
    metadata = json.loads(path.read_text())
    edit(metadata)
    path.write_text(json.dumps(metadata))


def refusal(path: Path) -> str:
    """The one line with which the roll at path is refused."""
    with pytest.raises(UserError) as error:
        open_roll(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 9000), max_size=6), dtype=st.sampled_from([np.uint8, np.uint16]))
def test_blocks_of_any_height_give_the_same_roll(tmp_path, cuts, dtype):
    """Level 0, every pyramid level and the line records do not depend on how the lines arrived."""
    lines = 9001
    pixels = noise(2, lines, 67, dtype=dtype)
    strip = Strip("any", "bottom", ("bright", "dark"), 0.5, 1.0)
    with RollWriter(tmp_path / "any.zarr", strip, 67, dtype, overwrite=True) as writer:
        for y0, y1 in zip([0, *sorted({*cuts})], [*sorted({*cuts}), lines], strict=True):
            writer.append(pixels[:, y0:y1])
    roll = open_roll(tmp_path / "any.zarr")
    assert np.array_equal(roll.read(0, lines), pixels)
    assert roll.levels == 2
    assert np.array_equal(roll.overview(1), quarter(pixels))
    assert np.array_equal(roll.read_lines(0, lines).encoder, np.arange(lines))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("modes", range(1, 9))
def test_a_roll_has_one_to_eight_modes_of_either_depth_with_a_scale_each(tmp_path, modes, dtype):
    """Pixels, white, pyramid and line records, mode by mode."""
    scale = tuple(100.0 + 17 * mode for mode in range(modes))
    strip = Strip("coil-1", "top", tuple(f"lamp-{mode}" for mode in range(modes)), 0.5, 1.0, scale=scale)
    pixels = noise(modes, 150, 70, dtype=dtype)
    roll = write_roll(tmp_path, pixels, strip)
    assert (roll.modes, roll.dtype, roll.white, roll.strip.lighting) == (modes, dtype, scale, strip.lighting)
    assert np.array_equal(roll.read(3, 140), pixels[:, 3:140])
    assert np.array_equal(roll.overview(1), quarter(pixels))
    white = np.float32(scale)[:, None, None]
    assert np.array_equal(roll.read_unit(0, 150), np.minimum(pixels.astype(np.float32) / white, 1))
    assert roll.read_lines(0, 150).valid.all()


def test_nine_modes_are_refused(tmp_path):
    strip = Strip("coil-1", "top", tuple("abcdefghi"), 0.5, 1.0)
    with pytest.raises(UserError, match="1 to 8 modes"):
        RollWriter(tmp_path / "coil-1.zarr", strip, 70, np.uint8)


def test_a_level_is_the_mean_of_each_4_by_4_pixels():
    pixels = noise(2, 8, 12, dtype=np.uint16)
    mean = pixels.reshape(2, 2, 4, 3, 4).mean(axis=(2, 4))
    assert np.array_equal(quarter(pixels), np.floor(mean + 0.5))


def test_the_mean_at_the_border_is_over_the_pixels_that_are_there():
    assert np.array_equal(quarter(np.full((1, 9, 5), 200, np.uint8)), np.full((1, 3, 2), 200))


def test_a_roll_and_its_label_are_valid_ome_zarr_05(tmp_path):
    roll = write_roll(tmp_path, noise(1, 300, 70))
    label = LabelWriter.create(roll.path, "truth", ("pit", "scale"), lines=300, width=70, shard_lines=64)
    label.write(0, np.zeros((300, 70), np.uint8))
    label.close()
    group = zarr.open_group(roll.path, mode="r")
    image = ome_zarr_models.open_ome_zarr(group)
    assert isinstance(image, Image)
    assert image.ome_attributes.multiscales[0].axes[1].unit == "millimeter"
    assert image.labels.ome_attributes.labels == ["truth"]


def test_the_layout_is_that_of_the_contract(tmp_path):
    write_roll(tmp_path, noise(1, 10, 1500))
    array = zarr.open_array(tmp_path / "coil-1.zarr", path="0", mode="r")
    assert (array.shape, array.chunks, array.shards) == ((1, 10, 1500), (1, 1024, 1024), (1, 4096, 2048))
    assert array.metadata.dimension_names == ("c", "y", "x")
    inner = json.loads((tmp_path / "coil-1.zarr/0/zarr.json").read_text())["codecs"][0]["configuration"][
        "codecs"
    ]
    assert inner[1]["name"] == "zstd" and inner[1]["configuration"]["level"] == 1


def test_what_is_said_of_the_strip_is_read_back(tmp_path):
    strip = Strip(
        "s", "bottom", ("bright", "dark"), 0.5, 0.25, heat="H1", scale=(4095.0, 1023.0), width_mm=900
    )
    roll = write_roll(tmp_path, noise(2, 5, 20, dtype=np.uint16), strip)
    assert (roll.strip.heat, roll.strip.width_mm, roll.strip.units) == ("H1", 900, "mm")
    assert (roll.strip.closed, roll.lines, roll.width, roll.modes) == (True, 5, 20, 2)
    assert roll.white == (4095.0, 1023.0)


def test_unit_values_are_over_white_and_never_above_one(tmp_path):
    strip = Strip("s", "top", ("bright",), 0.5, 0.25, scale=(1000.0,))
    unit = write_roll(tmp_path, np.full((1, 2, 4), 500, np.uint16), strip).read_unit(0, 2)
    assert unit.dtype == np.float32 and np.all(unit == 0.5)
    bright = Strip("b", "top", ("bright",), 0.5, 0.25, scale=(1000.0,))
    assert np.all(write_roll(tmp_path, np.full((1, 2, 4), 1200, np.uint16), bright).read_unit(0, 2) == 1.0)


def test_line_records_are_kept(tmp_path):
    with RollWriter(tmp_path / "coil-1.zarr", STRIP, 20, np.uint8) as writer:
        writer.append(noise(1, 3, 20), encoder=[5, 9, 13], t_ns=[1, 2, 3], valid=[1, 0, 1])
    roll = open_roll(tmp_path / "coil-1.zarr")
    encoder, t_ns, valid = roll.read_lines(0, 3)
    assert (encoder.dtype, t_ns.dtype, valid.dtype) == (np.int64, np.int64, np.bool_)
    assert (encoder.tolist(), t_ns.tolist()) == ([5, 9, 13], [1, 2, 3])
    assert valid.tolist() == [True, False, True]
    assert roll.read_lines(1, 3).t_ns.tolist() == [2, 3]


def test_line_records_begin_as_index_zero_and_valid(roll):
    encoder, t_ns, valid = roll.read_lines(10, 13)
    assert (encoder.tolist(), t_ns.tolist(), valid.tolist()) == ([10, 11, 12], [0, 0, 0], [True, True, True])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("encoder", [1, 2]),
        ("encoder", 5),
        ("encoder", [0.5, 1.0, 1.5]),
        ("encoder", ["1", "2", "3"]),
        ("t_ns", np.full(3, 2**63, np.uint64)),
        ("valid", [0, 1, 2]),
        ("valid", [0, 1, -1]),
    ],
)
def test_line_records_that_cannot_be_kept_are_refused_before_anything_is_written(tmp_path, name, values):
    with RollWriter(tmp_path / "coil-1.zarr", STRIP, 20, np.uint8) as writer:
        with pytest.raises(ValueError, match=name):
            writer.append(noise(1, 3, 20), **{name: values})
        assert writer.lines_written == 0
        writer.append(noise(1, 2, 20))
    assert open_roll(tmp_path / "coil-1.zarr").read_lines(0, 2).encoder.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["encoder", "t_ns", "valid"])
@pytest.mark.parametrize("damage", ["gone", "short", "empty", "garbage", "shape", "dtype", "metadata"])
def test_a_damaged_line_record_is_told_in_one_line(roll, name, damage):
    folder = roll.path / "lines" / name
    chunk = folder / "c" / "0"
    acts = {
        "gone": chunk.unlink,
        "short": lambda: chunk.write_bytes(chunk.read_bytes()[:9]),
        "empty": lambda: chunk.write_bytes(b""),
        "garbage": lambda: chunk.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(90)),
        "shape": lambda: change(folder / "zarr.json", lambda metadata: metadata.update(shape=[99])),
        "dtype": lambda: change(folder / "zarr.json", lambda metadata: metadata.update(data_type="uint16")),
        "metadata": (folder / "zarr.json").unlink,
    }
    acts[damage]()
    with pytest.raises(UserError, match=f"lines/{name}") as error:
        open_roll(roll.path).read_lines(0, 100)
    assert "\n" not in str(error.value)
    assert open_roll(roll.path).read(0, 100).shape == (1, 100, 70)


def test_a_roll_travels_to_a_worker_as_its_path(roll):
    data = pickle.dumps(roll)
    assert len(data) < 300
    assert np.array_equal(pickle.loads(data).read(10, 20), roll.read(10, 20))  # noqa: S301 # our own bytes


def test_lines_outside_the_roll_are_refused(roll):
    for y0, y1 in ((-1, 5), (5, 5), (90, 101)):
        with pytest.raises(ValueError, match="not within the roll's 100"):
            roll.read(y0, y1)


@pytest.mark.parametrize("roll_id", ["../x", "a/b", "", ".hidden", "a b", "x" * 65, "a\n", "é"])
def test_an_id_that_is_no_plain_name_is_refused(roll_id, tmp_path):
    with pytest.raises(UserError) as error:
        roll_path(tmp_path, roll_id)
    assert error.value.exit_code == USAGE
    assert "\n" not in str(error.value)


def test_a_plain_id_is_returned():
    assert check_roll_id("A1.b_c-2") == "A1.b_c-2"


def test_memory_does_not_grow_with_the_roll(tmp_path):
    """The buffer is one shard: sixteen times the lines take no more memory."""

    def peak(lines: int) -> int:
        block = noise(1, 1024, 128)
        tracemalloc.start()
        with RollWriter(tmp_path / "coil-1.zarr", STRIP, 128, np.uint8, overwrite=True) as writer:
            for _ in range(lines // 1024):
                writer.append(block)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    short, long = 2 * SHARD_LINES, 32 * SHARD_LINES
    peak(short)  # what the first use of zarr imports and caches is not the roll's
    # Which of zarr's encoded chunks the collector has not yet freed differs by a few MB, at any length.
    assert peak(long) - peak(short) < 4e6 < 0.3 * 128 * (long - short)


def test_nothing_is_at_the_final_place_before_close(tmp_path):
    writer = RollWriter(tmp_path / "coil-1.zarr", STRIP, 20, np.uint8)
    writer.append(noise(1, 5000, 20))
    assert "no roll" in refusal(tmp_path / "coil-1.zarr")
    assert "under construction" in refusal(tmp_path / ".coil-1.partial.zarr")
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["coil-1.zarr"]


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        RollWriter(tmp_path / "coil-1.zarr", STRIP, 20, np.uint8) as writer,
    ):
        writer.append(noise(1, 10, 20))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_opens_and_the_next_one_removes_it(tmp_path):
    code = (
        "import sys, time, numpy as np; from pathlib import Path; from rollsight.inspect.rolls import *\n"
        "w = RollWriter(Path(sys.argv[1]), Strip('coil-1', 'top', ('b',), 1.0, 1.0), 40, np.uint8)\n"
        "w.append(np.zeros((1, 5000, 40), np.uint8)); print('ready', flush=True); time.sleep(60)"
    )
    path = tmp_path / "coil-1.zarr"
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(UserError, match="another process") as error:
        RollWriter(path, STRIP, 20, np.uint8)
    assert error.value.exit_code == LOCKED
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert [entry.name for entry in tmp_path.iterdir()] == [".coil-1.partial.zarr"]
    assert "no roll" in refusal(path)
    write_roll(tmp_path, noise(1, 7, 20))
    assert [entry.name for entry in tmp_path.iterdir()] == ["coil-1.zarr"]


def test_an_existing_roll_is_kept_unless_overwrite_is_said(tmp_path):
    old = noise(1, 10, 20)
    write_roll(tmp_path, old)
    with pytest.raises(UserError, match="exists") as error:
        write_roll(tmp_path, noise(1, 3, 20))
    assert error.value.exit_code == USAGE
    assert np.array_equal(open_roll(tmp_path / "coil-1.zarr").read(0, 10), old)
    assert write_roll(tmp_path, noise(1, 3, 20), overwrite=True).lines == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["coil-1.zarr"]


def test_a_roll_set_aside_by_a_killed_overwrite_comes_back(tmp_path):
    """Killed between the two renames of close: the next writer finds the old roll and keeps it."""
    roll = write_roll(tmp_path, noise(1, 10, 20))
    roll.path.rename(tmp_path / ".coil-1.replaced.zarr")
    with pytest.raises(UserError, match="exists"):
        write_roll(tmp_path, noise(1, 3, 20))
    assert open_roll(roll.path).lines == 10


@pytest.mark.parametrize("lines", [4, 6])
def test_a_roll_of_other_length_than_announced_is_refused(tmp_path, lines):
    with pytest.raises(UserError, match="announced"):
        write_roll(tmp_path, noise(1, lines, 20), total_lines=5)
    assert list(tmp_path.iterdir()) == []


def test_a_roll_without_lines_is_refused(tmp_path):
    with (
        pytest.raises(UserError, match="no lines"),
        RollWriter(tmp_path / "coil-1.zarr", STRIP, 20, np.uint8),
    ):
        pass


@pytest.mark.parametrize(
    ("strip", "named"),
    [
        (Strip("r", "left", ("b",), 1.0, 1.0), "side"),
        (Strip("r", None, ("b",), 1.0, 1.0), "side"),
        (Strip("r", "top", (), 1.0, 1.0), "lighting"),
        (Strip("r", "top", ("b", "b"), 1.0, 1.0), "lighting"),
        (Strip("r", "top", ("b",), 1.0, None), "mm_per_line"),
        (Strip("r", "top", ("b",), 0.0, 1.0), "mm_per_px_x"),
        (Strip("r", "top", ("b",), float("nan"), 1.0), "mm_per_px_x"),
        (Strip("r", "top", ("b",), 1.0, 1.0, scale=(1.0, 2.0)), "scale"),
    ],
)
def test_an_incomplete_strip_is_refused_by_the_name_of_its_field(tmp_path, strip, named):
    with pytest.raises(UserError, match=named) as error:
        RollWriter(tmp_path / "r.zarr", strip, 20, np.uint8)
    assert error.value.exit_code == USAGE


def test_a_roll_in_px_needs_no_side_and_has_no_unit(tmp_path):
    roll = write_roll(tmp_path, noise(1, 5, 20), Strip("p", None, ("b",), None, None))
    assert roll.strip.units == "px"
    axes = json.loads((roll.path / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]["axes"]
    assert all("unit" not in axis for axis in axes)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"zarr_format": 2}', "\x00\xff"])
@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json", "1/zarr.json"])
def test_corrupt_metadata_is_one_line_that_names_the_path(roll, name, content):
    (roll.path / name).write_text(content)
    refusal(roll.path)


def test_metadata_without_end_is_not_read(roll):
    (roll.path / "zarr.json").write_text(" " * 5_000_000)
    assert "metadata over" in refusal(roll.path)


@pytest.mark.parametrize(
    "shape",
    [[1, 10**15, 70], [1, 100, 10**9], [10**6, 100, 70], [1, -5, 70], [1, 2.5, 70], [1, True, 70], "x", [70]],
)
def test_an_absurd_shape_is_refused_before_anything_is_allocated(roll, shape):
    change(roll.path / "0/zarr.json", lambda metadata: metadata.update(shape=shape))
    tracemalloc.start()
    refusal(roll.path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_line_count_without_shards_behind_it_is_refused(roll):
    change(roll.path / "0/zarr.json", lambda metadata: metadata.update(shape=[1, 2**30, 70]))
    change(roll.path / "1/zarr.json", lambda metadata: metadata.update(shape=[1, 2**28, 18]))
    change(roll.path / "zarr.json", lambda metadata: metadata["attributes"]["strip"].update(lines=2**30))
    assert "is missing" in refusal(roll.path)


@pytest.mark.parametrize("chunk", [[1, 2**20, 2**20], [1, 4096, 10**9], [1, 4096], [0, 4096, 1024], None])
def test_an_absurd_shard_is_refused(roll, chunk):
    def edit(metadata):
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunk

    change(roll.path / "0/zarr.json", edit)
    refusal(roll.path)


def test_a_codec_that_runs_foreign_code_is_refused(roll):
    def edit(metadata):
        metadata["codecs"][0]["configuration"]["codecs"].append({"name": "numcodecs.pickle"})

    change(roll.path / "0/zarr.json", edit)
    assert "unknown codec" in refusal(roll.path)


def test_a_pyramid_path_that_leaves_the_roll_is_refused(roll):
    def edit(metadata):
        metadata["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] = "../../elsewhere"

    change(roll.path / "zarr.json", edit)
    refusal(roll.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("closed", False),
        ("closed", "yes"),
        ("lines", 99),
        ("lines", -1),
        ("roll_id", "../x"),
        ("roll_id", "other"),
        ("mm_per_line", "1e-3"),
        ("mm_per_line", None),
        ("mm_per_px_x", -1),
        ("lighting", ["a", "b"]),
        ("lighting", "bright"),
        ("scale", [0]),
        ("schema", 2),
        ("heat", 7),
    ],
)
def test_a_strip_attribute_that_cannot_be_is_refused(roll, field, value):
    change(roll.path / "zarr.json", lambda metadata: metadata["attributes"]["strip"].update({field: value}))
    refusal(roll.path)


def test_a_roll_that_lost_a_shard_is_refused(tmp_path):
    roll = write_roll(tmp_path, np.zeros((1, 9000, 20), np.uint8))  # black strip is written all the same
    (roll.path / "0/c/0/1/0").unlink()
    assert "0/c/0/1/0 is missing" in refusal(roll.path)


def test_a_shard_cut_short_is_told_in_one_line(roll):
    shard = roll.path / "0/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        open_roll(roll.path).read(0, 10)


def test_labels_written_by_shard_from_two_threads_read_back_whole(tmp_path):
    roll = write_roll(tmp_path, noise(1, 1000, 70))
    mask = np.random.default_rng(1).choice(np.array([0, 1, 2, NOT_INSPECTED], np.uint8), (1000, 70))
    writers = [
        LabelWriter.create(roll.path, "run", ("pit", "scale"), lines=1000, width=70, shard_lines=128)
        for _ in range(2)
    ]

    def write(shard: int) -> None:
        y = 128 * shard
        writers[shard % 2].write(y, mask[y : y + 128])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(8)))
    assert roll.label_names() == []  # not before it is closed
    writers[0].close()
    assert roll.label_names() == ["run"]
    assert roll.label_classes("run") == ("pit", "scale")
    assert np.array_equal(roll.read_label("run", 0, 1000), mask)
    level = zarr.open_array(roll.path / "labels/run", path="1", mode="r")
    assert np.array_equal(level[:], mask[::4, ::4])


def test_a_label_goes_on_where_another_process_left_it(tmp_path):
    roll = write_roll(tmp_path, noise(1, 200, 70))
    first = LabelWriter.create(roll.path, "run", ("pit",), lines=200, width=70, shard_lines=64)
    first.write(0, np.ones((128, 70), np.uint8))
    again = LabelWriter.open(roll.path, "run")
    with pytest.raises(UserError, match="not finished") as error:
        again.close()
    assert error.value.exit_code == PARTIAL
    again.write(128, np.zeros((72, 70), np.uint8))
    again.close()
    again.close()
    assert roll.label_names() == ["run"]
    assert roll.read_label("run", 0, 200).sum() == 128 * 70


def test_a_shard_damaged_by_a_power_cut_can_be_written_again(tmp_path):
    roll = write_roll(tmp_path, noise(1, 100, 70))
    label = LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    mask = np.ones((64, 70), np.uint8)
    label.write(0, mask)
    checksum = label.shard_checksum(0)
    shard = roll.path / "labels/run/0/c/0/0"
    shard.write_bytes(shard.read_bytes()[:40])
    assert label.shard_checksum(0) != checksum
    label.write(0, mask)
    assert label.shard_checksum(0) == checksum


def test_what_was_not_written_reads_as_not_inspected(tmp_path):
    roll = write_roll(tmp_path, noise(1, 100, 70))
    LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    array = zarr.open_array(roll.path / "labels/run", path="0", mode="r")
    assert np.all(array[:] == NOT_INSPECTED)


def test_a_mask_of_another_size_is_refused(roll):
    with pytest.raises(UserError, match="90 x 70 px but the roll coil-1 is 100 x 70 px"):
        LabelWriter.create(roll.path, "run", ("pit",), lines=90, width=70, shard_lines=64)


def test_a_label_with_other_classes_is_not_written_over(roll):
    LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    with pytest.raises(UserError, match="use another name"):
        LabelWriter.create(roll.path, "run", ("scale",), lines=100, width=70, shard_lines=64)


@pytest.mark.parametrize(("y0", "height"), [(32, 64), (0, 50), (64, 40), (0, 128)])
def test_a_mask_that_is_not_whole_shards_is_refused(roll, y0, height):
    label = LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    with pytest.raises(ValueError, match="not whole shards"):
        label.write(y0, np.zeros((height, 70), np.uint8))


def test_a_mask_value_without_a_class_is_refused(roll):
    label = LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    with pytest.raises(ValueError, match="value over 1"):
        label.write(0, np.full((64, 70), 2, np.uint8))


@pytest.mark.parametrize("name", ["../x", "a/b", ".x"])
def test_a_label_name_that_leaves_the_roll_is_refused(roll, name):
    with pytest.raises(UserError, match="not usable"):
        LabelWriter.create(roll.path, name, ("pit",), lines=100, width=70, shard_lines=64)
    with pytest.raises(UserError, match="no finished label"):
        roll.read_label(name, 0, 10)


def test_labels_closed_at_once_are_all_listed(roll):
    labels = [
        LabelWriter.create(roll.path, f"run{i}", ("pit",), lines=100, width=70, shard_lines=64)
        for i in range(4)
    ]
    for label in labels:
        label.write(0, np.zeros((100, 70), np.uint8))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(LabelWriter.close, labels))
    assert sorted(roll.label_names()) == ["run0", "run1", "run2", "run3"]


def test_a_roll_opens_in_a_few_milliseconds(tmp_path):
    roll = write_roll(tmp_path, np.zeros((1, 20_000, 40), np.uint8))
    start = time.perf_counter()
    for _ in range(10):
        open_roll(roll.path)
    assert (time.perf_counter() - start) / 10 < 0.1


def shard(frame: bytes, start: int, length: int) -> bytes:
    """A shard of four chunks that says of its first where it lies, and of the others that there are none."""
    index = struct.pack("<QQ", start, length) + 3 * struct.pack("<QQ", 2**64 - 1, 2**64 - 1)
    return frame + index + struct.pack("<I", int.from_bytes(google_crc32c.Checksum(index).digest(), "big"))


def bomb(claimed: int) -> bytes:
    """A zstd frame of 256 MiB of zeros whose header claims another size."""
    frame = bytearray(Zstd(level=1).encode(np.zeros(2**28, np.uint8)))
    assert frame[4] >> 5 == 0b100  # the size takes four bytes behind one for the window
    frame[6:10] = claimed.to_bytes(4, "little")
    return bytes(frame)


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("attack", ["honest", "lying", "index", "overflow", "unsized"])
def test_a_shard_that_claims_a_huge_size_is_refused_without_taking_it(roll, monkeypatch, attack, reader):
    monkeypatch.setenv("ROLLSIGHT_READER", reader)
    frame = bomb(2**28 if attack == "honest" else 2**20) if attack in ("honest", "lying") else b"x" * 50
    if attack == "unsized":  # decoders without a size to go by let their buffer grow
        frame = bytearray(bomb(2**28))
        frame[4] &= 0b00111111
        del frame[6:10]
    start, length = {"index": (0, 2**62), "overflow": (2**63, 2**63)}.get(attack, (0, len(frame)))
    (roll.path / "0/c/0/0/0").write_bytes(shard(bytes(frame), start, length))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="damaged"):
        roll.read(0, 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_shard_larger_than_its_pixels_is_not_read(roll):
    with (roll.path / "0/c/0/0/0").open("r+b") as file:
        file.truncate(2**33)  # sparse
    assert "over the" in refusal(roll.path)


def test_metadata_that_is_a_pipe_is_not_waited_for(roll):
    (roll.path / "0/zarr.json").unlink()
    os.mkfifo(roll.path / "0/zarr.json")
    assert "no plain file" in refusal(roll.path)


NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf")]),
    st.integers(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "../../x", "a\nb", "\x00", "x" * 5000, "int64", "uint8", "zstd", "gzip", [], {}, [[]]]
    ),
    st.lists(st.integers(-2, 2**40), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places(found, at=()) -> list[tuple]:
    """The way to every value in a JSON document."""
    entries = (
        found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    )
    return [at] + [way for key, value in entries for way in places(value, (*at, key))]


def put(found, way, value):
    """The document with the value at that place."""
    if not way:
        return value
    target = found
    for key in way[:-1]:
        target = target[key]
    target[way[-1]] = value
    return found


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A roll with a label, and what its metadata is: file to text."""
    roll = write_roll(tmp_path_factory.mktemp("fuzz"), noise(1, 100, 70))
    label = LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    label.write(0, np.zeros((100, 70), np.uint8))
    label.close()
    return roll.path, {path: path.read_text() for path in sorted(roll.path.rglob("zarr.json"))}


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), reader=st.sampled_from(["zarr", "tensorstore"]))
def test_whatever_the_metadata_says_there_is_a_roll_or_one_line(fuzzed, monkeypatch, data, reader):
    """One value anywhere in the metadata of the group, an array, the lines or the label is another."""
    monkeypatch.setenv("ROLLSIGHT_READER", reader)
    path, texts = fuzzed
    file = data.draw(st.sampled_from([*texts]))
    found = json.loads(texts[file])
    for _ in range(data.draw(st.integers(1, 2))):
        way = data.draw(st.sampled_from(places(found)))
        found = put(found, way, data.draw(NASTY))
    file.write_text(json.dumps(found))
    try:
        roll = open_roll(path)
        assert roll.read(0, 100).shape == (1, 100, 70)
        for level in range(1, roll.levels):
            roll.overview(level)
        assert roll.read_lines(0, 100).valid.shape == (100,)
        if "run" in roll.label_names():
            assert roll.read_label("run", 0, 100).shape == (100, 70)
            roll.label_classes("run")
        LabelWriter.open(path, "run")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    finally:
        file.write_text(texts[file])
