"""Do synthetic defects of a GAN help? The runs behind results/synth_lift.json: a queue that goes on.

    python bench/synth_lift.py --data DIR [--only CASE] [--threads 1] [--list] [--minutes N]

A run is some minutes of one core and leaves one small JSON in results/synth_lift/; base nets, generators and
synthetic sets lie in build/synth_lift/. What is there is not repeated, and several of these may run at once.
results/synth_lift.json is made of all runs there are, and says how many are missing. On magnetic tiles each
run leaves one piece out, at thresholds that the other pieces choose (synth/folds.py); `folds` pools these,
without an interval: they are too few for one. F1 there is of the pieces left out alone; the alarms on others
stand beside it.
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
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels
from rollsight.inspect.rolls import write_durably
from rollsight.synth.arms import BASE, FINE_TUNING
from rollsight.synth.draws import Draws, piece_out, rarity
from rollsight.synth.folds import folds
from rollsight.synth.lift import means, over_real, summary
from rollsight.synth.proof import ROW, Plan, Proof, of_plan

WORK = Path(__file__).parent.parent / "build" / "synth_lift"
OUT = RESULTS / "synth_lift"
ALL = ("real", "paste", "poisson", "gan", "both", "whole", "no_contrast")
FEW = ("real", "paste", "gan")  # k = 5 and 20: at k = 10 `poisson` is the best rival in neither IoU nor F1
PRIMARY = "gan"  # the arm whose gain is the claim, named before any run on test; the others are rivals

# On steel, in the order in which they are wanted. The draw of the scenes moves IoU more than any method.
STEEL: dict[str, tuple[str, Plan]] = {
    "scratches-10": ("scratches", Plan(k=10, draws=tuple(range(8)), arms=ALL, gan_seeds={0: 2, 1: 2, 2: 2})),
    "inclusion-10": ("inclusion", Plan(k=10, draws=tuple(range(8)), arms=ALL, gan_seeds={0: 2, 1: 2, 2: 2})),
    "scratches-5": ("scratches", Plan(k=5, arms=FEW)),
    "scratches-20": ("scratches", Plan(k=20, arms=FEW)),
    "inclusion-5": ("inclusion", Plan(k=5, arms=FEW)),
    "inclusion-20": ("inclusion", Plan(k=20, arms=FEW)),
}
# On tiles, most of which is clean, `fast` learns nothing from crops drawn anywhere, nor from scratch. The
# shipped one never saw a tile.
TILES: dict[str, Any] = {"net": "fast", "attention": "cbam", "balanced": 0.4, "small_crops": 0.3}
OF_TILES = Plan(
    k=None,
    arms=("real", "paste", "gan"),
    arm=replace(FINE_TUNING, **TILES),
    base=replace(BASE, **TILES),
    base_steps=1100,
    begin="fast",
)
PIECES = ("crack", "fray")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    parser.add_argument("--only", default="*", help="cases to take, with * and ?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument("--list", action="store_true", help="tell what is done and what is not")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    until = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    cases = all_cases(Path(asked.data))
    if not asked.list:
        for name, (found, plan) in cases.items():
            if fnmatch.fnmatch(name, asked.only):
                work(found, plan, until)
    told = finished()
    missing: dict[str, int] = {}
    seconds = 0.0
    rows: list[dict[str, Any]] = []
    lifts: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    by_arm: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = []
    for name, (found, plan) in cases.items():
        wanted = sum(1 for _ in plan.runs())
        done = of_plan(told, Proof(found, with_ratio(found, plan), WORK, OUT))
        missing[name] = wanted - len(done)
        seconds += sum(one["seconds"] for one in done)
        print(name, f"{len(done)} of {wanted} runs")
        if plan.k is None:
            apart, together = folds(done, len(plan.draws))
            rows += apart
            pieces += together
        else:
            rows += [{key: one[key] for key in ROW} for one in done]
            lifts += [row | {"primary": row["arm"] == PRIMARY} for row in summary(done, plan)]
            gains += over_real(done, plan)
            by_arm += means(done, plan)
    if not asked.list:
        counts = {"missing_runs": missing, "hours_of_runs": seconds / 3600}
        figures = {"summary": lifts, "over_real": gains, "means": by_arm, "folds": pieces, "rows": rows}
        write_result("synth_lift", counts | figures, seed=0)


def all_cases(folder: Path) -> dict[str, tuple[Draws, Plan]]:
    """Each case by name: what it draws from, and its plan."""
    steel = open_labels(folder / "neu_clean")
    rare = {name: rarity(steel, name) for name in {rare for rare, _ in STEEL.values()}}
    cases: dict[str, tuple[Draws, Plan]] = {name: (rare[of], plan) for name, (of, plan) in STEEL.items()}
    tiles = open_labels(folder / "mt")
    for name in PIECES:
        found = piece_out(tiles, name)
        cases[f"mt-{name}"] = (found, replace(OF_TILES, draws=tuple(range(len(found.pieces)))))
    return cases


def work(found: Draws, plan: Plan, until: float | None) -> None:
    """The runs of a case that are not there yet; one that cannot be made says why, and the next one follows.

    The mixing ratio is chosen once for a class, at k = 10, for 5 and 20 too; tiles have no val to choose by:
    the default.
    """
    proof = Proof(found, plan, WORK, OUT)
    try:
        proof.check("test")
        if plan.k is not None:
            told = replace(proof, plan=replace(plan, k=10)).choose_ratio(say)
            write_durably(OUT / f"ratio-{found.defect_class}.json", (json.dumps(told) + "\n").encode())
            proof = replace(proof, plan=replace(plan, ratio=told["ratio"]))
    except UserError as error:
        print(proof.title, plan.k, error, flush=True)
        return
    for arm, draw, seed in plan.runs():
        if until is not None and time.monotonic() > until:
            return
        try:
            one = proof.result(arm, draw, seed, say)
        except UserError as error:
            print(proof.title, plan.k, arm, draw, seed, error, flush=True)
            continue
        if one is not None:
            print(proof.title, plan.k, arm, draw, seed, f"IoU {one['iou']:.3f}", flush=True)


def say(what: str, step: int, of: int) -> None:
    if step % 50 == 0 or step == of:
        print(what, f"{step}/{of}", flush=True)


def finished() -> list[dict[str, Any]]:
    """All runs there are, of the test split."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(OUT.glob("*-d*-s*.json"))]
    return [one for one in found if one["split"] == "test"]


def with_ratio(found: Draws, plan: Plan) -> Plan:
    """The plan with the ratio that was chosen for its class, if it was."""
    path = OUT / f"ratio-{found.defect_class}.json"
    if plan.k is None or not path.is_file():
        return plan
    return replace(plan, ratio=json.loads(path.read_text(encoding="utf-8"))["ratio"])


if __name__ == "__main__":
    main()
