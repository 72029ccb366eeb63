"""A killed ingest goes on where it stopped, and the roll has the bytes of one that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.ingest import ingest
from rollsight.inspect.strips import Strip

LINES, WIDTH = 14_000, 40
UNSAID = Strip("coil-1", None, (), None, None)
FIELDS = {"side": "top", "mm_per_px_x": 1.0, "mm_per_line": 1.0}

KILLED = """
import sys, time
from pathlib import Path
from rollsight.inspect.ingest import ingest
from rollsight.inspect.strips import Strip

def halt(done, total):
    if done >= 9000:
        print(done, flush=True)
        time.sleep(60)

ingest(Path(sys.argv[1]), Path(sys.argv[2]), Strip('coil-1', None, (), None, None), on_lines=halt)
"""


def noise(lines: int, seed: int):
    return np.random.default_rng(seed).integers(0, 256, (lines, WIDTH), np.uint8, endpoint=False)


def strips(folder: Path) -> Path:
    for mode in ("bright", "dark"):
        (folder / mode).mkdir()
        for i in range(7):
            Image.fromarray(noise(LINES // 7, i + 7 * (mode == "dark"))).save(folder / mode / f"{i}.png")
    (folder / "strip.json").write_text(json.dumps(FIELDS))
    return folder


def raw(folder: Path) -> Path:
    (folder / "coil.bil").write_bytes(np.hstack([noise(LINES, 1), noise(LINES, 2)]).tobytes())
    rows = "".join(f"{3 * y},{y % 7 > 0:d}\n" for y in range(LINES))
    (folder / "lines.csv").write_text("encoder,valid\n" + rows)
    said = {"lines": LINES, "width_px": WIDTH, "bits": 8, "line_table": "lines.csv", **FIELDS}
    (folder / "coil.json").write_text(json.dumps({**said, "lighting": ["bright", "dark"]}))
    return folder / "coil.bil"


def patches(folder: Path) -> Path:
    rows = ["class,x,y,image"]
    for i, y in enumerate(range(50, LINES, 1500)):
        Image.fromarray(noise(100, i)).save(folder / f"{i}.png")
        rows.append(f"pit,20,{y},{i}.png")
    (folder / "events.csv").write_text("\n".join(rows))
    said = {"width_mm": WIDTH, "length_m": LINES / 1000, **FIELDS}
    (folder / "strip.json").write_text(json.dumps(said))
    return folder


def files(roll: Path) -> dict[str, bytes]:
    return {str(path.relative_to(roll)): path.read_bytes() for path in roll.rglob("*") if path.is_file()}


@pytest.fixture
def destination(tmp_path):
    (tmp_path / "rolls").mkdir()
    return tmp_path / "rolls/coil-1.zarr"


def kill(source: Path, destination: Path) -> int:
    """Ingest in another process, and SIGKILL that; the lines that then stand in whole shards of 4096."""
    command = [sys.executable, "-c", KILLED, source, destination]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        done = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in destination.parent.iterdir()] == [".coil-1.partial.zarr"]
    return done - done % 4096


def told(source: Path, destination: Path, **options) -> list[int]:
    """The lines done at each call, of a whole ingest."""
    done: list[int] = []
    ingest(source, destination, UNSAID, on_lines=lambda lines, total: done.append(lines), **options)
    return done


@pytest.mark.parametrize("make", [strips, raw, patches])
def test_a_killed_ingest_goes_on_and_ends_with_the_same_bytes(tmp_path, destination, make):
    (tmp_path / "source").mkdir()
    (tmp_path / "undisturbed").mkdir()
    source = make(tmp_path / "source")
    there = kill(source, destination)
    assert told(source, destination)[0] == there >= 8192
    undisturbed = tmp_path / "undisturbed/coil-1.zarr"
    assert told(source, undisturbed)[0] < 8192
    assert files(destination) == files(undisturbed)
    names = {path.name for path in destination.parent.iterdir()}
    assert names == {path.name for path in undisturbed.parent.iterdir()}


def test_a_source_that_changed_since_the_kill_is_read_from_the_start(tmp_path, destination):
    (tmp_path / "source").mkdir()
    source = raw(tmp_path / "source")
    kill(source, destination)
    with source.open("r+b") as file:
        file.write(b"\0")
    assert told(source, destination)[0] < 8192


def test_another_scale_than_before_the_kill_is_read_from_the_start(tmp_path, destination):
    (tmp_path / "source").mkdir()
    source = strips(tmp_path / "source")
    kill(source, destination)
    strip = Strip("coil-1", None, (), 0.5, None)
    done: list[int] = []
    roll = ingest(source, destination, strip, on_lines=lambda lines, total: done.append(lines)).roll
    assert done[0] < 8192 and roll.strip.mm_per_px_x == 0.5


def test_ctrl_c_is_a_pause(tmp_path, destination):
    (tmp_path / "source").mkdir()
    source = strips(tmp_path / "source")

    def interrupt(done, total):
        if done >= 9000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, destination, UNSAID, on_lines=interrupt)
    assert told(source, destination)[0] == 8192
