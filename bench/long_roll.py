"""Claim: a roll of a million lines is scanned in the memory of one of a tenth of its length.

Simulated hot-rolled strip of 640 px, each roll scanned by the command in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write_result

LINES, WIDTH_PX, SEED, NEEDED = 1_000_000, 640, 5, 0.10
COMMAND = (sys.executable, "-m", "rollsight.jobs")


def scanned(home: str, roll: str, lines: int) -> dict[str, float | str]:
    """What `inspect scan --json` tells of a new roll of `lines` lines, 1 mm each."""
    make = (
        "simulate",
        roll,
        "--length-m",
        str(lines / 1000),
        "--width-px",
        str(WIDTH_PX),
        "--seed",
        str(SEED),
    )
    subprocess.run([*COMMAND, *make, "--home", home], stdout=subprocess.DEVNULL, check=True)
    done = subprocess.run(
        [*COMMAND, "scan", roll, "--json", "--home", home], stdout=subprocess.PIPE, check=True
    )
    told: dict[str, float | str] = json.loads(done.stdout)
    return told


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        tenth = scanned(home, "tenth", LINES // 10)
        whole = scanned(home, "whole", LINES)
        page_mb = Path(str(whole["page"])).stat().st_size / 1e6
    growth = float(whole["peak_rss_mb"]) / float(tenth["peak_rss_mb"]) - 1
    seconds = float(whole["seconds"])
    figures = {
        "lines": LINES,
        "width_px": WIDTH_PX,
        "scan_seconds": seconds,
        "mb_s": round(LINES * WIDTH_PX / 1e6 / seconds, 2),
        "peak_rss_mb": whole["peak_rss_mb"],
        "peak_rss_mb_at_a_tenth": tenth["peak_rss_mb"],
        "growth": round(growth, 4),
        "defects": whole["defects"],
        "coverage": whole["coverage"],
        "page_mb": round(page_mb, 2),
        "shown": growth <= NEEDED,
    }
    write_result("long_roll", figures, seed=SEED)
    print(json.dumps(figures))
    if growth > NEEDED:
        raise SystemExit(f"not shown: the peak grew by {growth:.0%}")


if __name__ == "__main__":
    main()
