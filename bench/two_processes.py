"""Claim: two scans at once, each a process with one thread, do at least 1.7 times the work of one.

An engine that pins its threads puts both on the same core and gives 0.97 (OpenVINO's default, measured).
Two cores that nothing else uses are needed; alone and together take turns, and medians count.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from report import write_result

SEED, METRES, NEEDED = 3, 6.144, 1.7  # three bands of 2048 lines, 1250 px across
ENGINES = ("onnx", "torch")
COMMAND = (sys.executable, "-m", "rollsight.jobs")


def seconds(home: Path, engine: str, count: int) -> float:
    """Seconds from the first to the last of `count` scans that start at once, imports and page left out."""
    homes = [home.with_name(f"{engine}-{n}") for n in range(count)]
    for copy in homes:
        shutil.copytree(home, copy)
    options = ("--engine", engine, "--device", "cpu", "--threads", "1", "--json")
    scans = [
        subprocess.Popen([*COMMAND, "scan", "R", *options, "--home", str(copy)], stdout=subprocess.PIPE)
        for copy in homes
    ]
    told = [json.loads(scan.communicate()[0]) for scan in scans]
    for copy in homes:
        shutil.rmtree(copy)
    return max(float(result["seconds"]) for result in told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metres", type=float, default=METRES)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "plant"
        make = ("simulate", "R", "--length-m", str(asked.metres), "--seed", str(SEED), "--home", str(home))
        subprocess.run([*COMMAND, *make], stdout=subprocess.DEVNULL, check=True)
        for engine in ENGINES:
            alone, together = [], []
            for _ in range(asked.turns):
                alone.append(seconds(home, engine, 1))
                together.append(seconds(home, engine, 2))
            speedup = 2 * median(alone) / median(together)
            figures[engine] = {
                "alone_s": median(alone),
                "together_s": median(together),
                "speedup": round(speedup, 3),
            }
            print(engine, figures[engine], flush=True)
    shown = all(figure["speedup"] >= NEEDED for figure in figures.values())
    write_result("two_processes", {**figures, "needed": NEEDED, "shown": shown}, seed=SEED)
    if not shown:
        raise SystemExit("not shown: see bench/results/two_processes.json")


if __name__ == "__main__":
    main()
