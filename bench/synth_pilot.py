"""Which arm is worth the big proof? Short runs, judged on val alone: a queue that goes on where it stopped.

    python bench/synth_pilot.py --data DIR [--only CLASS] [--arms A,B] [--draws N] [--threads 1]
        [--minutes N] [--list]

Ten scenes a class, three draws that the proof does not have, as many synthetic crops as real ones; nothing is
judged on test. A run leaves one JSON in results/synth_pilot/, nets and sets lie where those of synth_lift.py
do. Several of these may run at once, best one for each class. Each ends with results/synth_pilot.json of all
runs there are.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write_result
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels
from rollsight.synth.draws import rarity
from rollsight.synth.lift import FIGURES, as_runs, lift, mean_of
from rollsight.synth.proof import ROW, TUNING_DRAW, Plan, Proof, of_plan
from synth_lift import WORK, say

OUT = RESULTS / "synth_pilot"
RARE = ("scratches", "inclusion")
PLAN = Plan(
    k=10,
    draws=tuple(TUNING_DRAW + i for i in range(3)),
    arms=(
        *("real", "paste", "gan", "paste_varied", "gan_varied", "free", "degraded", "pixel", "both"),
        *("poisson", "paste_hard", "free_hard"),
    ),
    ratio=1.0,
)
HELD_AGAINST = "paste"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    parser.add_argument("--only", choices=RARE, help="one of the classes")
    parser.add_argument("--arms", help="other arms than these, with commas")
    parser.add_argument("--draws", type=int, default=len(PLAN.draws), help="the first so many of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument("--list", action="store_true", help="tell what there is, and make nothing")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    until = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    plan = replace(PLAN, draws=PLAN.draws[: asked.draws])
    if asked.arms:
        plan = replace(plan, arms=tuple(asked.arms.split(",")))
    data = open_labels(Path(asked.data) / "neu_clean")
    proofs = {rare: Proof(rarity(data, rare), plan, WORK, OUT) for rare in RARE}
    if not asked.list:
        for rare in [asked.only] if asked.only else RARE:
            work(proofs[rare], until)
    every = finished()
    told = [one for proof in proofs.values() for one in of_plan(every, replace(proof, plan=PLAN))]
    rows = [row for rare in RARE for row in compared([one for one in told if one["rare_class"] == rare])]
    for row in rows:
        print(shown(row))
    if not asked.list:
        runs = [{key: one[key] for key in (*ROW, "seconds")} for one in told]
        write_result("synth_pilot", {"split": "val", "rows": runs, "summary": rows}, seed=0)


def work(proof: Proof, until: float | None) -> None:
    """The runs that are not there yet, *real* first; one that cannot be made says why, and others follow."""
    proof.check("val")
    for arm, draw, seed in sorted(proof.plan.runs(), key=lambda run: run[0] != "real"):
        if until is not None and time.monotonic() > until:
            return
        try:
            one = proof.result(arm, draw, seed, say, split="val")
        except UserError as error:
            print(proof.title, arm, draw, error, flush=True)
            continue
        if one is not None:
            print(proof.title, arm, draw, f"IoU {one['iou']:.3f}, {one['seconds']:.0f} s", flush=True)


def finished() -> list[dict[str, Any]]:
    """All runs there are."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(OUT.glob("*.json"))]


def compared(told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each arm of a class the mean figures over its draws, and paired differences to plain pastes."""
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in told:
        by_arm[one["arm"]].append(one)
    runs = {arm: as_runs(of) for arm, of in by_arm.items()}
    rows = []
    for arm, of in runs.items():
        means = {figure: mean_of(of, sorted(of), figure) for figure in FIGURES}
        row: dict[str, Any] = {"rare_class": told[0]["rare_class"], "arm": arm, "draws": len(of), **means}
        if arm != HELD_AGAINST and set(of) & set(runs.get(HELD_AGAINST, ())):
            row["over_paste"] = {figure: lift(runs[HELD_AGAINST], of, figure) for figure in FIGURES}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["iou"])


def shown(row: dict[str, Any]) -> str:
    """A row as a line."""
    line = f"{row['rare_class']:<10} {row['arm']:<12} {row['draws']} draws" + "".join(
        f", {figure} {row[figure]:.3f}" for figure in FIGURES
    )
    for figure, told in row.get("over_paste", {}).items():
        span = "" if told["low"] is None else f" ({told['low']:+.3f} to {told['high']:+.3f})"
        line += f"; {figure} {told['difference']:+.3f}{span}"
    return line


if __name__ == "__main__":
    main()
