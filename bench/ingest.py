"""Claim: 10 GB of raw BIL become a roll in constant memory, and an ingest that is killed goes on.

Two lighting modes of 8192 px, 8 bits, made in a temporary folder by repeating one block of strip. The ingest
runs in a process of its own, is killed (SIGKILL) at half of the lines and started again; then every px of the
roll is held against the source. Half of the file, ingested first, shows what memory does not depend on: a
shorter one would not reach the first whole shard of the upper pyramid (262,144 lines).

    python bench/ingest.py --gb 10 --folder DIR     needs 3.2 times the size free in DIR
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from report import write_result
from rollsight.inspect.rolls import open_roll

WIDTH, MODES = 8192, ("bright", "dark")
BLOCK_LINES = 5000  # no divisor of the shard's 4096, so shards differ
LINE_BYTES = WIDTH * len(MODES)
SEED = 7

CHILD = """
import sys
from pathlib import Path
from rollsight.inspect.ingest import ingest
from rollsight.inspect.strips import Strip

tell = lambda done, total: print(done, total, flush=True)
ingest(Path(sys.argv[1]), Path(sys.argv[2]), Strip(sys.argv[3], None, (), None, None), on_lines=tell)
status = Path('/proc/self/status').read_text()  # of this program alone: ru_maxrss also counts who started it
print('peak', status.split('VmHWM:')[1].split()[0], flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=10.0, help="size of the raw file, 10^9 bytes")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        free, needed = shutil.disk_usage(folder).free, 3.2e9 * asked.gb
        if free < needed:
            raise SystemExit(
                f"{folder} has {free / 1e9:.1f} GB free: needed {needed / 1e9:.1f}, see --folder"
            )
        block = strip_block()
        small = make_source(folder, "small", asked.gb / 2, block)
        small_mb, _, _ = ingest(small, folder / "small.zarr")
        source = make_source(folder, "large", asked.gb, block)
        destination = folder / "large.zarr"
        start, cpu_start = time.perf_counter(), children_cpu_s()
        kill_at_half(source, destination)
        peak_mb, first, lines = ingest(source, destination)
        seconds, cpu_seconds = time.perf_counter() - start, children_cpu_s() - cpu_start
        size = source.stat().st_size
        identical = same(destination, block)
        on_disk = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
        figures = {
            "gb": round(size / 1e9, 3),
            "lines": lines,
            "width_px": WIDTH,
            "modes": len(MODES),
            "ingest_seconds": round(seconds, 1),  # both processes, with the start of each
            "mb_s": round(size / 1e6 / seconds, 1),
            "mb_per_cpu_second": round(size / 1e6 / cpu_seconds, 1),  # the same on a busy machine
            "peak_rss_mb": peak_mb,
            "peak_rss_mb_at_half": small_mb,
            "resumed": first > 0,
            "resumed_at_lines": first,
            "identical": identical,
            "size_on_disk": round(on_disk / size, 3),
        }
    write_result("ingest", figures, seed=SEED)
    print(json.dumps(figures))
    if not (figures["resumed"] and identical and peak_mb < 1.1 * small_mb):
        raise SystemExit("not shown: it did not go on, or the px differ, or memory grew")


def children_cpu_s() -> float:
    """CPU seconds, user and system, of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def strip_block() -> NDArray[np.uint8]:
    """BLOCK_LINES of strip: a profile across, streaks along, grain and noise; (lines, modes, width)."""
    rng = np.random.default_rng(SEED)
    across = np.sin(np.linspace(0, np.pi, WIDTH)) * 25 + rng.normal(0, 4, WIDTH)
    grain = rng.normal(0, 6, (len(MODES), BLOCK_LINES // 4, WIDTH // 4)).astype(np.float32)
    gray = grain.repeat(4, axis=1).repeat(4, axis=2)
    gray += across.astype(np.float32) + rng.normal(0, 3, gray.shape).astype(np.float32)
    gray += np.array([120, 50], np.float32)[:, None, None]
    return np.ascontiguousarray(gray.clip(0, 255).astype(np.uint8).swapaxes(0, 1))


def make_source(folder: Path, name: str, gb: float, block: NDArray[np.uint8]) -> Path:
    lines = max(3 * 4096, round(gb * 1e9 / LINE_BYTES))
    path = folder / f"{name}.bil"
    with path.open("wb") as file:
        for y in range(0, lines, BLOCK_LINES):
            file.write(block[: min(BLOCK_LINES, lines - y)])
        file.flush()
        os.fsync(file.fileno())
    strip = {"side": "top", "mm_per_px_x": 0.2, "mm_per_line": 0.2, "lighting": MODES}
    path.with_suffix(".json").write_text(
        json.dumps({"lines": lines, "width_px": WIDTH, "bits": 8, **strip}), encoding="utf-8"
    )
    return path


def start_child(source: Path, destination: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(source), str(destination), destination.stem]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_at_half(source: Path, destination: Path) -> None:
    with start_child(source, destination) as process:
        assert process.stdout is not None
        for told in process.stdout:
            done, total = map(int, told.split())
            if done >= total / 2:
                process.send_signal(signal.SIGKILL)
                break


def ingest(source: Path, destination: Path) -> tuple[float, int, int]:
    """Peak memory in MB, the lines that were there before the first block, all lines."""
    first = lines = 0
    with start_child(source, destination) as process:
        assert process.stdout is not None
        for number, told in enumerate(process.stdout):
            if told.startswith("peak"):
                peak_mb = int(told.split()[1]) / 1024
                continue
            done, lines = map(int, told.split())
            if number == 0 and done > 4096:  # more than a block: a killed ingest left them
                first = done
    if process.returncode:
        raise SystemExit("the ingest failed")
    return round(peak_mb, 1), first, lines


def same(destination: Path, block: NDArray[np.uint8]) -> bool:
    """Whether every px of the roll is that of the source."""
    roll = open_roll(destination)
    for y in range(0, roll.lines, BLOCK_LINES):
        found = roll.read(y, min(y + BLOCK_LINES, roll.lines))
        if not np.array_equal(found, block[: found.shape[1]].swapaxes(0, 1)):
            return False
    return True


if __name__ == "__main__":
    main()
