"""Claim: whatever kills a scan, the same command again ends with the same mask and the same defect table.

Each scenario scans the same roll in a plant of its own, on threads and on Dask processes, and is held against
an undisturbed run: every band committed once, executions witnessed in a file that outlives the processes.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from report import write_result
from rollsight.inspect.plant import Plant
from rollsight.synth.strip import SimulatedStrip, simulate_roll

SCAN = Path(__file__).with_name("_faulty.py")
ROLL, SEED = "R", 5
BANDS, BAND_LINES, WIDTH = 12, 256, 320
EXECUTORS: dict[str, tuple[str, ...]] = {"threads": ("--threads", "2"), "dask": ("--workers", "2")}
P, KILL_SEED = 0.35, 3
POISON = 4 * BAND_LINES
KILLED = -9
MOST_RUNS = 40  # of one command, until it ends by itself


class Site:
    """A plant with one roll, and the witness of what was executed there."""

    def __init__(self, home: Path) -> None:
        self.plant = Plant(home)
        self.witness = home / "witness"
        self.ends: list[int] = []  # exit codes in their order
        self.told = ""  # the last line on stderr
        self.calm: Site | None = None  # the undisturbed run that it is held against

    @classmethod
    def make(cls, home: Path) -> "Site":
        """A roll of twelve bands of simulated strip, full of defects."""
        site = cls(home)
        metres = BANDS * BAND_LINES / 1000 - 0.1  # the last band is short
        strip = SimulatedStrip(metres, SEED, width_px=WIDTH, density=4, blackouts=())
        simulate_roll(site.plant.roll_path(ROLL), strip)
        return site

    def copy(self, home: Path) -> "Site":
        """The same roll in another plant."""
        shutil.copytree(self.plant.home, home, ignore=shutil.ignore_patterns("small"))
        site = Site(home)
        site.calm = self.calm
        return site

    def start(self, *options: str, limit_bytes: int | None = None, **faults: Any) -> subprocess.Popen[str]:
        """The scan as a process; limit_bytes: the system refuses longer files (EFBIG)."""
        env = os.environ | {
            "FAULTS": json.dumps({"witness": str(self.witness), **faults}),
            "OMP_NUM_THREADS": "1",
        }

        def limit() -> None:
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        return subprocess.Popen(
            [sys.executable, str(SCAN), str(self.plant.home), ROLL, *options],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def end(self, process: subprocess.Popen[str]) -> int:
        """Wait for the end of a scan; its exit code."""
        _, errors = process.communicate(timeout=300)
        self.told = errors.strip().rpartition("\n")[2]
        self.ends.append(process.returncode)
        return process.returncode

    def scan(self, *options: str, **faults: Any) -> int:
        """Scan until the process ends by itself, however often it is killed; its exit code."""
        for _ in range(MOST_RUNS):
            if (code := self.end(self.start(*options, **faults))) != KILLED:
                return code
        raise RuntimeError(f"killed {MOST_RUNS} times")

    def receipts(self) -> list[Path]:
        return sorted((self.plant.home / "runs").glob(f"{ROLL}/*/bands/*.json"))

    def wait_for(self, bands: int) -> None:
        """Until so many bands are committed."""
        limit = time.monotonic() + 120
        while len(self.receipts()) < bands and time.monotonic() < limit:
            time.sleep(0.01)

    def executions(self) -> int:
        return sum(line.startswith("begun") for line in self.witness.read_text().split("\n"))

    def result(self) -> tuple[Any, Any]:
        """Mask and defect table."""
        [folder] = (self.plant.home / "runs" / ROLL).iterdir()
        roll = self.plant.roll(ROLL)
        return roll.read_label(folder.name, 0, roll.lines), pq.read_table(folder / "defects.parquet")


def figures(site: Site, calm: Site) -> dict[str, Any]:
    """What a scenario came to, beside the undisturbed run."""
    planned = [f"{y0:010d}.json" for y0 in range(0, BANDS * BAND_LINES, BAND_LINES)]
    found = [path.name for path in site.receipts()]
    [mask, table], [calm_mask, calm_table] = site.result(), calm.result()
    ids = table["defect_id"].to_pylist()
    return {
        "exit_codes": site.ends,
        "executions": site.executions(),
        "committed": len(found),
        "lost": len(set(planned) - set(found)),
        "doubled": len(found) - len(set(planned) & set(found)) + len(ids) - len(set(ids)),
        "identical": bool(np.array_equal(mask, calm_mask)) and table.equals(calm_table),
    }


def workers_killed(site: Site, *options: str) -> None:
    """SIGKILL with p = 0.35 per band, before its work or between shard and receipt."""
    assert site.scan(*options, p=P, seed=KILL_SEED) == 0


def client_killed_twice(site: Site, *options: str) -> None:
    """`kill -9` of the command after two and after six bands, while bands kill their workers too."""
    for bands in (2, 6):
        while len(site.receipts()) < bands:
            process = site.start(*options, p=0.25, seed=KILL_SEED)
            while process.poll() is None and len(site.receipts()) < bands:
                time.sleep(0.01)
            process.kill()
            site.end(process)
    assert site.scan(*options, p=0.25, seed=KILL_SEED) == 0


def truncated_shard(site: Site, *options: str) -> None:
    """A committed shard of the mask loses its last bytes."""
    assert site.scan(*options) == 0
    labels = site.plant.roll_path(ROLL) / "labels"
    [shard] = labels.glob("*/0/c/3/0")
    shard.write_bytes(shard.read_bytes()[:-20])
    assert site.scan(*options) == 0


def killed_between_shard_and_receipt(site: Site, *options: str) -> None:
    assert site.scan(*options, between=2 * BAND_LINES) == 0


def disk_full(site: Site, *options: str) -> None:
    """ENOSPC in mid-scan, on a disk of 4 MB; then there is room again. Needs the right to mount one."""
    small, home = site.plant.home / "small", site.plant.home / "after"
    small.mkdir()
    _run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small))
    try:
        site.plant = site.copy(small / "plant").plant
        ballast = small / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(ballast, ballast.stat().st_size - 20 * 4096)
        assert site.end(site.start(*options)) == 3, site.told
        assert "No space left" in site.told and 0 < len(site.receipts()) < BANDS, site.told
        ballast.unlink()
        assert site.scan(*options) == 0
        shutil.copytree(site.plant.home, home)
    finally:
        _run("umount", str(small))
    site.plant = Plant(home)


def write_refused(site: Site, *options: str) -> None:
    """The system refuses files of a size (EFBIG) that only the longest receipt has; then it does not.

    100 bytes below it: a receipt holds seconds too, and these have more digits or fewer.
    """
    assert site.calm is not None
    longest = max(path.stat().st_size for path in site.calm.receipts())
    assert site.end(site.start(*options, limit_bytes=longest - 100)) == 3, site.told
    assert "File too large" in site.told and 0 < len(site.receipts()) < BANDS, site.told
    assert site.scan(*options) == 0


def two_clients(site: Site, *options: str) -> None:
    """A second scan of the roll while the first one runs."""
    first = site.start(*options)
    site.wait_for(1)
    first.send_signal(signal.SIGSTOP)  # so that it cannot end first
    assert site.end(site.start(*options)) == 75, site.told
    first.send_signal(signal.SIGCONT)
    assert site.end(first) == 0


def poison_band(site: Site, *options: str) -> None:
    """One band always kills its process: it alone is left, and named; later the cause is gone."""
    assert site.scan(*options, poison=POISON) == 3, site.told
    assert len(site.receipts()) == BANDS - 1, site.told
    assert f"{POISON / 1000:.2f} to {(POISON + BAND_LINES) / 1000:.2f} m" in site.told, site.told
    assert site.scan("--workers", "1") == 0


def hung_worker(site: Site, *options: str) -> None:
    """A worker is stopped and neither dies nor answers: the cluster is started afresh after some patience."""
    assert site.scan(*options, "--patience", "15", hang=2 * BAND_LINES) == 0


SCENARIOS: dict[str, Callable[..., None]] = {
    "worker SIGKILL, p = 0.35": workers_killed,
    "client kill -9 twice, workers too": client_killed_twice,
    "truncated shard": truncated_shard,
    "kill between shard and receipt": killed_between_shard_and_receipt,
    "disk full": disk_full,
    "write refused": write_refused,
    "two clients": two_clients,
    "poison band": poison_band,
    "hung worker": hung_worker,
}
DASK_ONLY = (hung_worker,)  # a thread that hangs in native code cannot be ended


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    scenarios = []
    with tempfile.TemporaryDirectory() as folder:
        calm = Site.make(Path(folder) / "calm")
        fresh = calm.copy(Path(folder) / "fresh")
        assert calm.scan("--threads", "1") == 0
        fresh.calm = calm
        for name, scenario in SCENARIOS.items():
            for executor, options in EXECUTORS.items():
                if scenario in DASK_ONLY and executor != "dask":
                    continue
                site = fresh.copy(Path(folder) / f"{scenario.__name__}-{executor}")
                start = time.monotonic()
                told: dict[str, Any] = {"scenario": name, "executor": executor}
                try:
                    scenario(site, *options)
                    told |= figures(site, calm)
                except subprocess.CalledProcessError:
                    told["not run"] = "no right to mount a small disk here"
                print(told, f"{time.monotonic() - start:.1f} s", flush=True)
                scenarios.append(told)
    ran = [told for told in scenarios if "lost" in told]
    lost, doubled = (sum(told[key] for told in ran) for key in ("lost", "doubled"))
    identical = all(told["identical"] and told["executions"] >= BANDS for told in ran)
    write_result(
        "faults",
        {"scenarios": scenarios, "bands": BANDS, "lost": lost, "doubled": doubled, "identical": identical},
        seed=SEED,
    )
    if lost or doubled or not identical:
        raise SystemExit("not shown: see bench/results/faults.json")


if __name__ == "__main__":
    main()
