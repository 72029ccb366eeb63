"""Claim: the peak memory of a scan does not grow with the length of the roll.

Three simulated rolls of 1x, 4x and 16x the length, each scanned by the command in a process of its own.
"""

import json
import subprocess
import sys
import tempfile

from report import write_result

METRES = 8.192  # at 1x: four bands of 2048 lines, 1250 px across
FACTORS = (1, 4, 16)


def main() -> None:
    rss, seconds = {}, {}
    with tempfile.TemporaryDirectory() as home:
        for factor in FACTORS:
            base = [sys.executable, "-m", "rollsight.jobs"]
            roll = f"length-{factor}x"
            make = ["simulate", roll, "--length-m", str(METRES * factor), "--seed", "3", "--home", home]
            subprocess.run([*base, *make], stdout=subprocess.DEVNULL, check=True)
            done = subprocess.run(
                [*base, "scan", roll, "--json", "--home", home], stdout=subprocess.PIPE, check=True
            )
            result = json.loads(done.stdout)
            rss[f"{factor}x"], seconds[f"{factor}x"] = result["peak_rss_mb"], result["seconds"]
            print(factor, result["peak_rss_mb"], "MB", result["seconds"], "s", flush=True)
    spread = max(rss.values()) / min(rss.values()) - 1
    lines = {f"{factor}x": round(METRES * factor * 1000) for factor in FACTORS}
    figures = {
        "rss_mb": rss,
        "spread": spread,
        "within_10_percent": spread <= 0.10,
        "lines": lines,
        "scan_seconds": seconds,
    }
    write_result("memory", figures, seed=3)
    if spread > 0.10:
        raise SystemExit(f"not shown: the peaks differ by {spread:.0%}")


if __name__ == "__main__":
    main()
