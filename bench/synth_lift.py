"""Do synthetic defects of a GAN help? The runs behind results/synth_lift.json: a queue that goes on.

    python bench/synth_lift.py --data DIR [--only CASE] [--threads 1] [--list] [--minutes N]

A run is some minutes of one core and leaves one small JSON in results/synth_lift/; base nets, generators and
synthetic sets lie in build/synth_lift/. What is there is not repeated, and several of these may run at once.
results/synth_lift.json is made of all runs there are, and says how many are missing.
"""

import argparse
import fnmatch
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write_result
from rollsight.inspect.labels import open_labels
from rollsight.synth.draws import rarity
from rollsight.synth.lift import summary
from rollsight.synth.proof import ROW, Plan, Proof

WORK = Path(__file__).parent.parent / "build" / "synth_lift"
OUT = RESULTS / "synth_lift"
ALL = ("real", "paste", "poisson", "gan", "both", "whole", "no_contrast")
FEW = ("real", "paste", "poisson", "gan")

# In the order in which they are wanted. At k = 10 the draw of the scenes moves IoU more than any method.
CASES: dict[str, tuple[str, Plan]] = {
    "scratches-10": ("scratches", Plan(k=10, draws=tuple(range(8)), arms=ALL, gan_seeds={0: 2, 1: 2, 2: 2})),
    "inclusion-10": ("inclusion", Plan(k=10, draws=tuple(range(8)), arms=ALL, gan_seeds={0: 2, 1: 2, 2: 2})),
    "scratches-5": ("scratches", Plan(k=5, arms=FEW)),
    "scratches-20": ("scratches", Plan(k=20, arms=FEW)),
    "inclusion-5": ("inclusion", Plan(k=5, arms=FEW)),
    "inclusion-20": ("inclusion", Plan(k=20, arms=FEW)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    parser.add_argument("--only", default="*", help="cases to take, with * and ?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument("--list", action="store_true", help="tell what is done and what is not")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    until = time.monotonic() + 60 * asked.minutes if asked.minutes else None
    if asked.list:
        for name, (rare, plan) in CASES.items():
            print(name, f"{len(of_case(finished(), rare, plan))} of {sum(1 for _ in plan.runs())} runs")
        return
    data = open_labels(Path(asked.data) / "neu_clean")
    for name, (rare, plan) in CASES.items():
        if fnmatch.fnmatch(name, asked.only):
            work(data, rare, plan, until)
    told = finished()
    missing = {
        name: sum(1 for _ in plan.runs()) - len(of_case(told, rare, plan))
        for name, (rare, plan) in CASES.items()
    }
    rows = [{key: one[key] for key in ROW} for one in told]
    write_result("synth_lift", {"rows": rows, "summary": summary(told), "missing_runs": missing}, seed=0)


def work(data: Any, rare: str, plan: Plan, until: float | None) -> None:
    """The runs of a case that are not there yet; the mixing ratio is chosen once for a class, at k = 10."""
    proof = Proof(rarity(data, rare), replace(plan, k=10), WORK, OUT)
    chosen = OUT / f"ratio-{rare}.json"
    if not chosen.is_file():
        told = proof.choose_ratio(say)
        chosen.write_text(json.dumps(told) + "\n", encoding="utf-8")
    ratio = json.loads(chosen.read_text(encoding="utf-8"))["ratio"]
    proof = replace(proof, plan=replace(plan, ratio=ratio))
    for arm, draw, seed in plan.runs():
        if until is not None and time.monotonic() > until:
            return
        one = proof.result(arm, draw, seed, say)
        if one is not None:
            print(rare, plan.k, arm, draw, seed, f"IoU {one['iou']:.3f}", flush=True)


def say(what: str, step: int, of: int) -> None:
    if step % 50 == 0 or step == of:
        print(what, f"{step}/{of}", flush=True)


def finished() -> list[dict[str, Any]]:
    """All runs there are, of the test split."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(OUT.glob("*-d*-s*.json"))]
    return [one for one in found if one["split"] == "test"]


def of_case(results: list[dict[str, Any]], rare: str, plan: Plan) -> list[dict[str, Any]]:
    return [one for one in results if (one["rare_class"], one["k"]) == (rare, plan.k)]


if __name__ == "__main__":
    main()
