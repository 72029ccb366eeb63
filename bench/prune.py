"""Claim: `fast` can lose a share of its channels at the cost of at most one tiny or small defect.

`inspect compress fast NAME --prune SHARE --steps N` as a user runs it, for each run: channels off, fine-tuned
by the model's own recipe on scenes and simulated strip and taught by it, thresholds of both fitted on val to
one budget, judged on the test scenes of `neu_clean`. `kept` is what the gate said. The rolls are those of
`make fast`. What the command said is kept in results/prune: interrupted, it goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from report import RESULTS, ROOT, write_rows
from rollsight.inspect.roll_places import write_durably
from trainings import BUDGETS

MODEL = "fast"
RUNS = ((0.15, 600), (0.15, 2400))  # share of the channels of each layer, steps of fine-tuning
KEPT = RESULTS / "prune"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    parser.add_argument("--rolls", type=Path, default=ROOT / "build" / "model" / "plant" / "rolls")
    parser.add_argument("--home", type=Path, default=ROOT / "build" / "prune")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if not list(asked.rolls.glob("*.zarr")):
        raise SystemExit(f"{asked.rolls}: no simulated rolls: make fast makes them")
    KEPT.mkdir(parents=True, exist_ok=True)
    rows = []
    for share, steps in RUNS:
        path = KEPT / f"{MODEL}-{share:g}-{steps}.json"
        if not path.is_file():
            write_durably(path, (json.dumps(compressed(asked, share, steps), indent=1) + "\n").encode())
        told = json.loads(path.read_text(encoding="utf-8"))
        row = {"model": MODEL, "share": share, "steps": steps, "kept": told["path"] is not None}
        for form, (mb, parameters, multiplications) in zip(
            ("original", "compressed"),
            zip(told["graph_bytes"], told["parameters"], told["multiplications_per_px"], strict=True),
            strict=True,
        ):
            row |= {f"{form}.mb": mb / 1e6, f"{form}.parameters": parameters}
            row |= {f"{form}.multiplications_per_px": multiplications}
            row |= {
                f"{form}.{key}": told[form][key] for key in ("found_tiny_small", "alarms_per_mpx", "miou")
            }
        row |= {"lost_tiny_small": told["lost_tiny_small"], "recall_difference": told["recall_difference"]}
        rows.append(row)
        print(row)
    write_rows("prune", rows, seed=0)


def compressed(asked: argparse.Namespace, share: float, steps: int) -> dict[str, object]:
    """What the command says of that run, its model kept or not."""
    name = f"{MODEL}-without-{share * 100:g}-{steps}"
    command = [sys.executable, "-m", "rollsight.jobs", "compress", MODEL, name, "--prune", f"{share:g}"]
    command += ["--data", str(asked.data / "neu_clean"), "--data", str(asked.rolls)]
    command += [
        "--budget",
        f"{BUDGETS['neu_clean']:g}",
        "--steps",
        str(steps),
        "--threads",
        str(asked.threads),
        "--home",
        str(asked.home),
    ]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:  # a refusal by the gate tells its figures first
        raise SystemExit(done.returncode)
    told: dict[str, object] = json.loads(done.stdout)
    return told


if __name__ == "__main__":
    main()
