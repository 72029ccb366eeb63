"""Claim: each mistake of a user ends in one line that names it, and in its exit code; nothing is written.

Every command here runs as a process of its own against a plant with one small roll, `R1`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from report import write_result

COMMAND = (sys.executable, "-m", "rollsight.jobs")
NEEDED = 25  # mistakes in the table


def strips(folder: Path, *shapes: tuple[int, int]) -> Path:
    folder.mkdir()
    for number, shape in enumerate(shapes):
        Image.fromarray(np.full(shape, 100, dtype=np.uint8)).save(folder / f"s{number}.png")
    return folder


def mistakes(home: Path, folder: Path) -> dict[str, tuple[list[str], int, str]]:
    """Name -> (arguments, exit code, what the line must name)."""
    mixed = strips(folder / "mixed", (50, 80), (50, 90))
    good = strips(folder / "good", (50, 80), (50, 80))
    data = folder / "data"
    for part in ("images", "masks"):
        (data / "train" / part).mkdir(parents=True)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(data / "train" / "images" / "a.png")
    Image.fromarray(np.zeros((40, 41), np.uint8)).save(data / "train" / "masks" / "a.png")
    (data / "classes.json").write_text('["pit"]')
    mm = ["--mm-per-px-x", "0.5", "--mm-per-line", "0.5", "--side", "top"]
    sidecar = {"lines": 4, "width_px": 8, "bits": 8}
    raws = {
        "bare": None,
        "short": sidecar | {"lines": 5},
        "odd": sidecar | {"gain": 2},
        "deep": sidecar | {"bits": 9},
    }
    for name, said in raws.items():
        (folder / f"{name}.bil").write_bytes(bytes(32))
        if said is not None:
            (folder / f"{name}.json").write_text(json.dumps(said))
    (folder / "events.csv").write_text("defect;class\n1;scratch\n")
    return {
        "unknown roll": (["scan", "nope"], 1, "nope"),
        "path as roll id": (["scan", "../x"], 2, "../x"),
        "missing model": (["scan", "R1", "--model", "nope"], 1, "nope"),
        "unknown engine": (["scan", "R1", "--engine", "gpu"], 78, "gpu"),
        "band off the grid": (["scan", "R1", "--band-lines", "1000"], 2, "1024"),
        "missing units": (["ingest", str(good), "X"], 2, "mm_per_px_x"),
        "mixed widths": (["ingest", str(mixed), "X", *mm], 1, "s1.png"),
        "roll id taken": (["ingest", str(good), "R1", *mm], 2, "R1"),
        "no strips folder": (["ingest", str(folder / "none"), "X", *mm], 2, "none"),
        "mask of another size": (["train", "m", "--data", str(data), "--steps", "1"], 1, "a.png"),
        "no labelled data": (["evaluate", "default", "--data", str(folder / "none")], 1, "none"),
        "unknown split": (["evaluate", "default", "--data", str(data), "--split", "val"], 2, "val"),
        "unknown option": (["scan", "R1", "--fast"], 2, "--fast"),
        "no argument": (["scan"], 2, "ROLL"),
        "length of nothing": (["simulate", "Y", "--length-m", "0"], 2, "length_m"),
        "unknown surface": (["simulate", "Y", "--surface", "painted"], 2, "painted"),
        "unknown lighting": (["simulate", "Y", "--lighting", "red"], 2, "red"),
        "unknown effect": (["simulate", "Y", "--effect", "rain"], 2, "rain"),
        "two executors": (["scan", "R1", "--workers", "2", "--threads", "2"], 2, "--workers"),
        "scheduler without scheme": (["scan", "R1", "--scheduler", "localhost:8786"], 2, "tcp://"),
        "TLS without key": (["scan", "R1", "--tls-ca", "ca.pem"], 2, "--tls-key"),
        "unknown device": (["scan", "R1", "--device", "tpu"], 2, "tpu"),
        "live and dry run": (["scan", "R1", "--live", "--dry-run"], 2, "--dry-run"),
        "live in an object store": (["scan", "memory://R1.zarr", "--live"], 2, "object store"),
        "no roll at the URL": (["scan", "memory://R1.zarr"], 1, "memory://"),
        "raw without sidecar": (["ingest", str(folder / "bare.bil"), "X", *mm], 2, "bare.json"),
        "raw of another size": (["ingest", str(folder / "short.bil"), "X", *mm], 1, "short"),
        "unknown field in a sidecar": (["ingest", str(folder / "odd.bil"), "X", *mm], 2, "gain"),
        "depth that no camera has": (["ingest", str(folder / "deep.bil"), "X", *mm], 2, "9"),
        "patches of no strip": (["ingest", str(folder / "events.csv"), "X", *mm], 2, "--width-mm"),
        "patches without places": (
            ["ingest", str(folder / "events.csv"), "X", *mm, "--width-mm", "9", "--length-m", "1"],
            2,
            "events.csv",
        ),
        "frozen norms of nothing": (["train", "m", "--data", str(data), "--frozen-norms"], 2, "--init"),
        "crop off the grid": (["train", "m", "--data", str(data), "--crop-px", "100"], 2, "100"),
    }


def plant(home: Path) -> None:
    """Make a plant with the roll `R1`: 1.5 m, 400 px."""
    simulate = ("simulate", "R1", "--length-m", "1.5", "--seed", "4", "--width-px", "400")
    subprocess.run([*COMMAND, *simulate, "--home", str(home)], stdout=subprocess.DEVNULL, check=True)


def told(home: Path, arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and the lines that the command wrote to stderr."""
    command = [*COMMAND, *arguments, "--home", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stderr.splitlines()


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        home, folder = Path(name) / "plant", Path(name) / "files"
        folder.mkdir()
        plant(home)
        before = {path.name for path in (home / "rolls").iterdir()}
        for mistake, (arguments, needed, named) in mistakes(home, folder).items():
            code, lines = told(home, arguments)
            good = code == needed and len(lines) == 1 and named in lines[0]
            # No path of this machine belongs into a result.
            line = re.sub(rf"{re.escape(name)}/(files|plant)/?", "", " / ".join(lines))
            rows.append({"mistake": mistake, "exit_code": code, "line": line, "as_needed": good})
        left = {path.name for path in (home / "rolls").iterdir()} - before
    bad = [str(row["mistake"]) for row in rows if not row["as_needed"]]
    figures = {"mistakes": rows, "count": len(rows), "bad": len(bad), "rolls_left_behind": len(left)}
    write_result("bad_input", figures, seed=4)
    print(f"{len(rows)} mistakes, {len(bad)} not as needed, {len(left)} rolls left behind")
    if bad or left or len(rows) < NEEDED:
        raise SystemExit(f"not shown: {', '.join(bad) or 'rolls left behind or too few mistakes'}")


if __name__ == "__main__":
    main()
