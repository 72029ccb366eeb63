"""Rolls that grow, are killed, lie in an object store, are read by another library: the same pixels."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from ome_zarr.io import parse_url
from ome_zarr.reader import Label, Reader
from rollsight.inspect.errors import CONFIG, LOCKED, USAGE, UserError
from rollsight.inspect.roll_places import claim
from rollsight.inspect.rolls import (
    MAX_LINES,
    NOT_INSPECTED,
    SHARD_LINES,
    LabelWriter,
    RollWriter,
    Strip,
    open_roll,
)

STRIP = Strip("coil-1", "top", ("bright",), mm_per_px_x=0.8, mm_per_line=1.0)
TWO_MODES = Strip("coil-1", "top", ("bright", "dark"), 0.5, 0.5, scale=(4095.0, 1023.0))


def noise(*shape: int, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def refusal(act) -> UserError:
    """The one line, and exit code, with which the act is refused."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return error.value


def assert_same(roll, other) -> None:
    """Pixels, every level of the pyramid, and what is known of the lines."""
    assert (roll.strip, roll.levels) == (other.strip, other.levels)
    assert np.array_equal(roll.read(0, roll.lines), other.read(0, other.lines))
    for level in range(1, roll.levels):
        assert np.array_equal(roll.overview(level), other.overview(level))
    for mine, theirs in zip(roll.read_lines(0, roll.lines), other.read_lines(0, other.lines), strict=True):
        assert np.array_equal(mine, theirs)


# ---- live and resume


def test_a_live_roll_is_read_up_to_its_last_whole_shard(tmp_path):
    path, pixels = tmp_path / "coil-1.zarr", noise(1, 9000, 70)
    writer = RollWriter(path, STRIP, 70, np.uint8, live=True)
    roll = open_roll(path, live=True)
    assert (roll.lines, roll.strip.closed, roll.frontier()) == (0, False, (0, False))
    writer.append(pixels[:, :4000])
    assert roll.frontier() == (0, False)
    writer.append(pixels[:, 4000:8500], valid=np.zeros(4500, np.bool_))
    assert (roll.frontier(), writer.lines_written, writer.committed) == ((8192, False), 8500, 8192)
    assert "--live" in str(refusal(lambda: open_roll(path)))
    grown = roll.at(8192)
    assert np.array_equal(grown.read(0, 8192), pixels[:, :8192])
    assert np.array_equal(grown.read_lines(0, 8192).valid, np.arange(8192) < 4000)
    assert grown.overview(1).shape == (1, 2048, 18)
    with pytest.raises(ValueError, match="8192 lines now"):
        roll.at(8193)
    part = pickle.loads(pickle.dumps(roll.at(5000)))  # noqa: S301 # our own bytes
    assert (part.lines, part.strip.closed) == (5000, False)
    writer.append(pixels[:, 8500:])
    closed = writer.close()
    assert roll.frontier() == (9000, True)
    assert np.array_equal(closed.read(0, 9000), pixels)
    assert part.at(9000).strip.closed
    assert [entry.name for entry in tmp_path.iterdir()] == ["coil-1.zarr"]
    assert not (path / "frontier.json").exists()


def test_a_live_roll_becomes_the_same_files_as_one_written_at_once(tmp_path):
    pixels = noise(2, 9001, 67, dtype=np.uint16)
    for name, live in (("a", False), ("b", True)):
        with RollWriter(tmp_path / name / "coil-1.zarr", TWO_MODES, 67, np.uint16, live=live) as writer:
            for y in range(0, 9001, 3000):
                writer.append(pixels[:, y : y + 3000])

    def files(name):
        top = tmp_path / name
        return {file.relative_to(top): file.read_bytes() for file in top.rglob("*") if file.is_file()}

    assert files("a") == files("b")


WRITE = """
import sys, numpy as np; from pathlib import Path; from rollsight.inspect.rolls import RollWriter, Strip
pixels = np.load(sys.argv[2], mmap_mode="r")
strip = Strip("coil-1", "top", ("bright",), mm_per_px_x=0.8, mm_per_line=1.0)
with RollWriter.resume(
    Path(sys.argv[1]), strip, pixels.shape[2], np.uint8, source="s", live=sys.argv[3] == "live"
) as writer:
    for y in range(writer.lines_written, pixels.shape[1], 700):
        print(writer.committed, flush=True)
        y1 = min(y + 700, pixels.shape[1])
        index = np.arange(y, y1)
        writer.append(np.ascontiguousarray(pixels[:, y:y1]), encoder=3 * index, t_ns=index)
"""


@pytest.mark.parametrize("kind", ["live", "staged"])
def test_a_writer_killed_again_and_again_ends_with_the_same_roll(tmp_path, kind):
    """SIGKILL loses no line up to the frontier, and the end is that of an undisturbed writer."""
    pixels = noise(
        1, 5 * SHARD_LINES + 100, 1000
    )  # wide enough for a level that is not written shard by shard
    np.save(tmp_path / "pixels.npy", pixels)
    path = tmp_path / "rolls" / "coil-1.zarr"
    command = [sys.executable, "-c", WRITE, path, tmp_path / "pixels.npy", kind]
    committed = 0
    for kill_after in (3, 9, 8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            said = [int(process.stdout.readline()) for _ in range(kill_after)]
            os.kill(process.pid, signal.SIGKILL)
        assert said[0] >= committed
        committed = said[-1]
        if kind == "live":
            roll = open_roll(path, live=True)
            assert roll.lines >= committed
            if roll.lines:
                assert np.array_equal(roll.read(0, roll.lines), pixels[:, : roll.lines])
                assert np.array_equal(roll.read_lines(0, roll.lines).encoder, 3 * np.arange(roll.lines))
        else:
            assert "no roll" in str(refusal(lambda: open_roll(path)))
    assert committed > 0
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    with RollWriter(tmp_path / "coil-1.zarr", STRIP, 1000, np.uint8) as writer:
        index = np.arange(pixels.shape[1])
        writer.append(pixels, encoder=3 * index, t_ns=index)
    assert_same(open_roll(path), open_roll(tmp_path / "coil-1.zarr"))
    assert [entry.name for entry in path.parent.iterdir()] == ["coil-1.zarr"]
    assert not [*path.rglob("*.partial")]


def interrupted(path: Path, pixels, lines: int, **options) -> None:
    """A writer that Ctrl-C stops after `lines` lines."""
    with (
        pytest.raises(KeyboardInterrupt),
        RollWriter(path, STRIP, pixels.shape[2], np.uint8, source="s", **options) as writer,
    ):
        writer.append(pixels[:, :lines])
        raise KeyboardInterrupt


@pytest.mark.parametrize("live", [False, True])
def test_a_resumed_writer_takes_up_line_arrays_in_mid_chunk(tmp_path, live):
    """Chunks of the line arrays hold 65536 lines, 16 shards: the frontier lies within one."""
    pixels = noise(1, 75_000, 20)
    path = tmp_path / "coil-1.zarr"
    interrupted(path, pixels, 70_000, live=live)
    home = path if live else tmp_path / ".coil-1.partial.zarr"
    (home / "0" / "c" / "0" / "16" / "x.partial").write_bytes(b"left by a kill")
    for name in ("0", "lines/valid"):  # as a kill within `close` leaves them
        file = home / name / "zarr.json"
        file.write_text(file.read_text().replace(str(MAX_LINES), "70000"))
    with RollWriter.resume(path, STRIP, 20, np.uint8, source="s", live=live) as writer:
        assert writer.lines_written == writer.committed == 17 * SHARD_LINES
        writer.append(pixels[:, writer.lines_written :])
    with RollWriter(tmp_path / "other" / "coil-1.zarr", STRIP, 20, np.uint8) as writer:
        writer.append(pixels)
    assert_same(open_roll(path), open_roll(tmp_path / "other" / "coil-1.zarr"))
    assert not [*path.rglob("*.partial")]


@pytest.mark.parametrize(
    ("strip", "width", "dtype", "source"),
    [
        (STRIP, 20, np.uint8, "another"),
        (STRIP, 21, np.uint8, "s"),
        (STRIP, 20, np.uint16, "s"),
        (Strip("coil-1", "bottom", ("bright",), 0.8, 1.0), 20, np.uint8, "s"),
    ],
)
def test_what_another_source_left_is_not_gone_on_with(tmp_path, strip, width, dtype, source):
    path = tmp_path / "coil-1.zarr"
    interrupted(path, noise(1, 5000, 20), 5000)
    writer = RollWriter.resume(path, strip, width, dtype, source=source)
    assert writer.lines_written == 0
    writer.append(noise(1, 10, width, dtype=dtype))
    assert writer.close().lines == 10


def test_a_damaged_leftover_is_dropped(tmp_path):
    path = tmp_path / "coil-1.zarr"
    interrupted(path, noise(1, 9000, 20), 9000)
    (tmp_path / ".coil-1.partial.zarr" / "0" / "c" / "0" / "1" / "0").unlink()
    writer = RollWriter.resume(path, STRIP, 20, np.uint8, source="s")
    assert writer.lines_written == 0
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_live_roll_is_never_replaced_unasked(tmp_path):
    """Its lines may have been scanned already: not another source nor a new writer takes its place."""
    path, pixels = tmp_path / "coil-1.zarr", noise(1, 5000, 20)
    interrupted(path, pixels, 5000, live=True)
    for act in (
        lambda: RollWriter(path, STRIP, 20, np.uint8, live=True),
        lambda: RollWriter(path, STRIP, 20, np.uint8),
        lambda: RollWriter.resume(path, STRIP, 20, np.uint8, source="another", live=True),
    ):
        error = refusal(act)
        assert (error.exit_code, "exists" in str(error)) == (USAGE, True)
    assert open_roll(path, live=True).lines == SHARD_LINES
    with RollWriter.resume(path, STRIP, 20, np.uint8, source="another", live=True, overwrite=True) as writer:
        assert writer.lines_written == 0
        writer.append(pixels[:, :7])
    assert open_roll(path).lines == 7


def test_two_writers_of_one_roll_exclude_each_other_however_they_write(tmp_path):
    path = tmp_path / "coil-1.zarr"
    writer = RollWriter(path, STRIP, 20, np.uint8, live=True)
    for live in (False, True):
        act = lambda live=live: RollWriter(path, STRIP, 20, np.uint8, live=live, overwrite=True)  # noqa: E731
        assert refusal(act).exit_code == LOCKED
    writer.append(noise(1, 10, 20))
    assert writer.close().lines == 10


@pytest.mark.parametrize("content", ["", "[]", '{"lines": -1}', '{"lines": 4097}', '{"lines": 1e3}', "{}"])
def test_a_damaged_frontier_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "coil-1.zarr"
    interrupted(path, noise(1, 5000, 20), 5000, live=True)
    (path / "frontier.json").write_text(content)
    assert "frontier.json" in str(refusal(lambda: open_roll(path, live=True)))


def test_a_frontier_without_shards_behind_it_is_refused(tmp_path):
    path = tmp_path / "coil-1.zarr"
    interrupted(path, noise(1, 5000, 20), 5000, live=True)
    (path / "frontier.json").write_text('{"lines": 8192}')
    assert "is missing" in str(refusal(lambda: open_roll(path, live=True)))


def test_a_disk_that_is_full_ends_the_writer_in_one_line(tmp_path):
    """A folder where the shard should go stands for the full disk: the system refuses the write."""
    writer = RollWriter(tmp_path / "coil-1.zarr", STRIP, 20, np.uint8, source="s")
    (tmp_path / ".coil-1.partial.zarr" / "0" / "c" / "0" / "0" / "0").mkdir(parents=True)
    assert "cannot write" in str(refusal(lambda: writer.append(noise(1, 5000, 20))))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="has ended"):
        writer.append(noise(1, 10, 20))


# ---- masks


def test_a_mask_grows_with_its_roll_and_is_frozen_with_it(tmp_path):
    path, pixels = tmp_path / "coil-1.zarr", noise(1, 9000, 70)
    writer = RollWriter(path, STRIP, 70, np.uint8, live=True)
    writer.append(pixels)
    mask = (pixels[0] > 250).astype(np.uint8)
    options = {"width": 70, "shard_lines": 2048}
    label = LabelWriter.create(path, "run", ("pit",), lines=None, **options)
    label.write(0, mask[:8192])
    with pytest.raises(ValueError, match="not whole shards"):
        label.write(8192, mask[8192:])
    with pytest.raises(ValueError, match="freeze"):
        label.close()
    roll = writer.close()
    label = LabelWriter.create(path, "run", ("pit",), lines=9000, **options)
    label.write(8192, mask[8192:])
    label.close()
    assert np.array_equal(roll.read_label("run", 0, 9000), mask)


def test_a_mask_that_holds_nothing_inspected_is_written(tmp_path):
    """All of it is the fill value: zarr would leave such a shard out, and no receipt could name it."""
    roll = whole_roll(tmp_path / "coil-1.zarr", noise(1, 100, 70))
    label = LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=112)
    label.write(0, np.full((100, 70), NOT_INSPECTED, np.uint8))
    assert len(label.shard_checksum(0)) == 64
    label.close()
    assert np.all(roll.read_label("run", 0, 100) == NOT_INSPECTED)


def whole_roll(location, pixels, strip=STRIP):
    with RollWriter(location, strip, pixels.shape[2], pixels.dtype) as writer:
        writer.append(pixels)
    return open_roll(location)


def test_a_mask_can_lie_in_a_folder_of_its_own(tmp_path):
    roll = whole_roll(tmp_path / "coil-1.zarr", noise(1, 100, 70))
    folder = tmp_path / "runs" / "mask.zarr"
    mask = noise(100, 70) % 3
    label = LabelWriter.create(
        roll.path, "run", ("pit", "scale"), lines=100, width=70, shard_lines=64, folder=folder
    )
    label.write(0, mask[:64])
    assert "no finished label" in str(refusal(lambda: roll.read_label("run", 0, 10, folder=folder)))
    again = LabelWriter.open(roll.path, "run", folder=folder)
    again.write(64, mask[64:])
    again.close()
    assert np.array_equal(roll.read_label("run", 0, 100, folder=folder), mask)
    assert roll.label_classes("run", folder=folder) == ("pit", "scale")
    assert roll.label_names() == []
    assert sorted(path.name for path in roll.path.iterdir()) == ["0", "1", "labels", "lines", "zarr.json"]


def test_what_a_killed_process_left_beside_a_mask_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    roll = whole_roll(tmp_path / "coil-1.zarr", noise(1, 100, 70))
    labels = roll.path / "labels"
    (labels / ".run.dead.partial" / "0").mkdir(parents=True)
    lock = claim(labels / ".run.alive.partial")
    label = LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    assert sorted(path.name for path in labels.iterdir()) == [".run.alive.partial", "run", "zarr.json"]
    os.close(lock)
    (label.folder / "0" / "0.dead.partial").write_bytes(b"half a shard")
    (labels / ".zarr.json.dead.partial").write_bytes(b"{")
    label.write(0, np.zeros((100, 70), np.uint8))
    label.close()
    LabelWriter.create(roll.path, "run", ("pit",), lines=100, width=70, shard_lines=64)
    assert not [*roll.path.rglob("*.partial")]


# ---- object stores


@pytest.fixture(scope="module")
def s3_server():
    """A local S3 server with an empty bucket, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").call_s3("create_bucket", Bucket="plant")
        yield environment
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request):
    """The URL of a roll in an object store that holds nothing else."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    top = {"memory": "memory://plant", "s3": "s3://plant"}[request.param]
    store, root = fsspec.url_to_fs(top, use_listings_cache=False)
    for name in store.find(root):
        store.rm(name)
    return f"{top}/rolls/coil-1.zarr"


def objects(url: str) -> dict[str, bytes]:
    """All that lies under the URL."""
    store, root = fsspec.url_to_fs(url, use_listings_cache=False)
    return {name.split("coil-1.zarr/")[1]: store.cat_file(name) for name in store.find(root)}


def test_a_roll_in_an_object_store_holds_the_bytes_of_one_on_disk(tmp_path, url):
    pixels = noise(2, 9001, 67, dtype=np.uint16)
    roll = whole_roll(url, pixels, TWO_MODES)
    local = whole_roll(tmp_path / "coil-1.zarr", pixels, TWO_MODES)
    assert_same(roll, local)
    on_disk = {
        str(file.relative_to(local.path)): file.read_bytes()
        for file in local.path.rglob("*")
        if file.is_file()
    }
    assert objects(url) == on_disk
    assert (roll.location, roll.is_writable, local.is_writable) == (url, False, True)
    assert roll.frontier() == (9001, True)
    assert "object store" in str(refusal(lambda: roll.path))
    assert np.array_equal(pickle.loads(pickle.dumps(roll)).read(5, 9), pixels[:, 5:9])  # noqa: S301


def test_nothing_in_an_object_store_opens_before_its_last_put(url):
    writer = RollWriter(url, STRIP, 20, np.uint8)
    writer.append(noise(1, 5000, 20))
    assert "not closed" in str(refusal(lambda: open_roll(url)))
    before = {name for name in objects(url) if name != "zarr.json"}
    writer.close()
    store, root = fsspec.url_to_fs(url, use_listings_cache=False)
    assert before < {*objects(url)}
    if url.startswith("memory"):
        times = {name: store.modified(name) for name in store.find(root)}
        assert max(times, key=times.get).endswith("coil-1.zarr/zarr.json")


def test_an_exception_leaves_no_object(url):
    with pytest.raises(KeyboardInterrupt), RollWriter(url, STRIP, 20, np.uint8) as writer:
        writer.append(noise(1, 5000, 20))
        raise KeyboardInterrupt
    assert objects(url) == {}


def test_an_existing_roll_in_an_object_store_is_replaced_only_if_that_is_said(url):
    whole_roll(url, noise(1, 9000, 20))
    error = refusal(lambda: RollWriter(url, STRIP, 20, np.uint8))
    assert (error.exit_code, "exists" in str(error)) == (USAGE, True)
    writer = RollWriter(url, STRIP, 20, np.uint8, overwrite=True)
    assert "not closed" in str(refusal(lambda: open_roll(url)))  # a weaker promise than that of a disk
    writer.append(noise(1, 5, 20))
    assert writer.close().lines == 5
    assert "0/c/0/1/0" not in objects(url)


def test_foreign_objects_under_the_url_are_not_removed_unasked(url):
    store, root = fsspec.url_to_fs(url)
    store.pipe_file(f"{root}/.zattrs", b"{}")
    assert "exists" in str(refusal(lambda: RollWriter(url, STRIP, 20, np.uint8)))
    assert objects(url) == {".zattrs": b"{}"}


def test_a_writer_whose_roll_was_taken_over_stops_at_its_next_shard(url):
    """There is no lock in an object store: what a killed writer left looks like the work of a living one."""
    first = RollWriter(url, STRIP, 20, np.uint8)
    first.append(noise(1, 4000, 20))
    pixels = noise(1, 5000, 20)
    second = RollWriter(url, STRIP, 20, np.uint8)
    second.append(pixels)
    error = refusal(lambda: first.append(noise(1, 100, 20)))
    assert (error.exit_code, "another writer" in str(error)) == (LOCKED, True)
    with pytest.raises(ValueError, match="has ended"):
        first.close()
    assert np.array_equal(second.close().read(0, 5000), pixels)


def test_what_needs_a_disk_is_refused_in_an_object_store(url):
    for act in (
        lambda: RollWriter(url, STRIP, 20, np.uint8, live=True),
        lambda: RollWriter.resume(url, STRIP, 20, np.uint8, source="s"),
        lambda: open_roll(url, live=True),
    ):
        assert refusal(act).exit_code == USAGE
    assert objects(url) == {}


def test_an_object_that_is_gone_or_cut_short_is_told_in_one_line(url):
    whole_roll(url, noise(1, 9000, 20))
    store, root = fsspec.url_to_fs(url)
    shard = store.cat_file(f"{root}/0/c/0/1/0")
    store.pipe_file(f"{root}/0/c/0/1/0", shard[:100])
    assert "damaged" in str(refusal(lambda: open_roll(url).read(5000, 5010)))
    store.rm(f"{root}/0/c/0/1/0")
    assert "0/c/0/1/0 is missing" in str(refusal(lambda: open_roll(url)))


def test_the_mask_of_a_remote_roll_lies_on_the_local_disk(tmp_path, url):
    roll = whole_roll(url, noise(1, 100, 70))
    options = {"lines": 100, "width": 70, "shard_lines": 64}
    assert "local folder" in str(refusal(lambda: LabelWriter.create(url, "run", ("pit",), **options)))
    label = LabelWriter.create(url, "run", ("pit",), **options, folder=tmp_path / "mask.zarr")
    label.write(0, np.ones((100, 70), np.uint8))
    label.close()
    assert np.all(roll.read_label("run", 0, 100, folder=tmp_path / "mask.zarr") == 1)
    attributes = json.loads((tmp_path / "mask.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["ome"]["image-label"]["source"]["image"] == url


def test_a_remote_roll_that_is_not_there_is_told_in_one_line(url):
    assert "no roll at" in str(refusal(lambda: open_roll(url)))


@pytest.mark.parametrize(
    ("location", "said", "exit_code"),
    [
        ("gs://bucket/coil-1.zarr", "pip install 'rollsight[remote]'", CONFIG),
        ("nosuch://bucket/coil-1.zarr", "nosuch", USAGE),
        ("simplecache::memory://coil-1.zarr", "one plain URL", USAGE),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line(location, said, exit_code):
    for act in (
        lambda: open_roll(location),
        lambda: RollWriter(location, STRIP, 20, np.uint8),
    ):
        error = refusal(act)
        assert (said in str(error), error.exit_code) == (True, exit_code)


def test_a_bucket_that_is_not_there_is_one_line(s3_server):
    url = "s3://elsewhere/coil-1.zarr"
    assert url in str(refusal(lambda: open_roll(url)))
    assert url in str(refusal(lambda: RollWriter(url, STRIP, 20, np.uint8)))


def test_a_file_url_is_a_path(tmp_path):
    whole_roll(f"file://{tmp_path}/coil-1.zarr", noise(1, 10, 20))
    assert open_roll(f"file://{tmp_path}/coil-1.zarr").path == tmp_path / "coil-1.zarr"


# ---- other readers


SPAN = st.tuples(st.integers(0, 4999), st.integers(0, 4999)).map(
    lambda ends: (ends[0], max(ends[0] + 1, ends[1]))
)


@pytest.mark.parametrize(("modes", "width", "dtype"), [(1, 1, np.uint8), (3, 1100, np.uint16)])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spans=st.lists(SPAN, min_size=1, max_size=3))
def test_tensorstore_and_zarr_read_the_same_bytes(tmp_path, monkeypatch, modes, width, dtype, spans):
    pytest.importorskip("tensorstore")
    lines, path = 5000, tmp_path / "coil-1.zarr"
    pixels = noise(modes, lines, width, dtype=dtype)
    if not path.exists():
        whole_roll(path, pixels, Strip("coil-1", "top", tuple("abc"[:modes]), 1.0, 1.0))
    found = {}
    for reader in ("tensorstore", "zarr"):
        monkeypatch.setenv("ROLLSIGHT_READER", reader)
        roll = open_roll(path)
        found[reader] = [roll.read(y0, y1) for y0, y1 in spans]
        found[reader] += [roll.overview(level) for level in range(1, roll.levels)]
        found[reader] += roll.read_lines(0, lines)
    for mine, theirs in zip(*found.values(), strict=True):
        assert (mine.dtype, mine.tobytes()) == (theirs.dtype, theirs.tobytes())
    y0, y1 = spans[0]
    assert np.array_equal(found["zarr"][0], pixels[:, y0:y1])


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_either_reader_tells_a_lost_shard(tmp_path, monkeypatch, reader):
    """A shard that goes while the roll is open is no black strip."""
    monkeypatch.setenv("ROLLSIGHT_READER", reader)
    roll = whole_roll(tmp_path / "coil-1.zarr", noise(1, 9000, 20))
    (roll.path / "0" / "c" / "0" / "1" / "0").unlink()
    assert "damaged" in str(refusal(lambda: roll.read(5000, 5010)))


def test_an_unknown_reader_is_refused(tmp_path, monkeypatch):
    roll = whole_roll(tmp_path / "coil-1.zarr", noise(1, 10, 20))
    monkeypatch.setenv("ROLLSIGHT_READER", "numpy")
    assert refusal(lambda: roll.read(0, 1)).exit_code == CONFIG


def test_the_reader_of_napari_shows_the_roll_and_its_mask(tmp_path):
    """ome-zarr is the library that napari-ome-zarr reads by."""
    pixels = noise(2, 500, 300, dtype=np.uint16)
    roll = whole_roll(tmp_path / "coil-1.zarr", pixels, TWO_MODES)
    label = LabelWriter.create(roll.path, "truth", ("pit",), lines=500, width=300, shard_lines=512)
    label.write(0, np.ones((500, 300), np.uint8))
    label.close()
    image, *others = Reader(parse_url(str(roll.path)))()
    assert [level.shape for level in image.data] == [(2, 500, 300), (2, 125, 75), (2, 32, 19)]
    assert np.array_equal(image.data[0][:, 100:200].compute(), pixels[:, 100:200])
    assert image.metadata["coordinateTransformations"][0] == [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    [mask] = [node for node in others if any(isinstance(spec, Label) for spec in node.specs)]
    assert mask.metadata["properties"][1] == {"class": "pit"}
    assert np.all(mask.data[0].compute() == 1)


def test_a_growing_roll_is_valid_zarr(tmp_path):
    path, pixels = tmp_path / "coil-1.zarr", noise(1, 5000, 70)
    interrupted(path, pixels, 5000, live=True)
    array = zarr.open_array(path, path="0", mode="r")
    assert np.array_equal(array[:, :SHARD_LINES], pixels[:, :SHARD_LINES])
