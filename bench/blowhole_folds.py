"""Claim: how many of the 28 blowholes on the test tiles a net finds whose threshold comes from pieces that
were left out of train and val in turn.

    python bench/blowhole_folds.py --data DIR

Val has two pieces with blowholes, and its thresholds do not hold on others (bench/blowhole.py). Here the nine
pieces of train and val, and their clean ones, are left out in three parts: a net learns from the other parts
and is judged on the one it never saw. All parts together give the threshold, the lowest with no more alarms
than the budget's rate (three on the clean test tiles), and tell what is to be expected of it. A net that all
nine pieces teach is then judged on test. What each net gave is kept in results/blowhole_folds.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blowhole import ALARMS, BLOWHOLE
from report import RESULTS, write_result
from rollsight.inspect.engines import open_engine
from rollsight.inspect.evaluate import examine
from rollsight.inspect.labels import LabelledData, Sample, open_labels
from rollsight.inspect.metrics import garwood, wilson
from rollsight.inspect.models import CARD
from rollsight.inspect.plant import Plant
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.roll_places import write_durably
from rollsight.jobs.train_job import train_model
from trainings import NET_CROPS, PLAIN

HOME = Path(__file__).parent.parent / "build" / "blowhole_folds"
KEPT = RESULTS / "blowhole_folds"
PARTS = 3
# `fast` ranks blowholes best of all nets (bench/blowhole.py); few pieces teach, so half of the crops show one
# on another tile.
RECIPE = replace(
    PLAIN,
    net="fast",
    attention="cbam",
    small_weight=0.1,
    steps=1500,
    learning_rate=Recipe().learning_rate,
    fresh_rate=Recipe().fresh_rate,
    mosaic=1,
    copy_paste=0.5,
    **NET_CROPS["mt"],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = open_labels(Path(asked.data) / "mt")
    parts = [swept(f"left-out-{part}", data, part) for part in range(PARTS)]
    of_all = swept("all", data, None)
    left_out = judged_together(parts, ALARMS / of_all["clean_mpx"])
    print(left_out, flush=True)
    on_test = judged(of_all, left_out["threshold"])
    print(on_test, flush=True)
    write_result("blowhole_folds", {"recipe": asdict(RECIPE), "left_out": left_out, "test": on_test}, seed=0)


def parted(data: LabelledData, part: int | None) -> tuple[LabelledData, LabelledData]:
    """What teaches, all of it "train", and what is judged: pieces with blowholes, and clean ones.

    part: of PARTS that the pieces of train and val make; None teaches all of these and judges test.
    """
    known = [sample for sample in data.samples if sample.split in ("train", "val")]
    value = data.classes.index(BLOWHOLE) + 1
    holding: set[str] = set()
    marked: set[str] = set()
    for sample in known:
        mask = sample.read()[1]
        if (mask > 0).any():
            marked.add(sample.group)
        if (mask == value).any():
            holding.add(sample.group)
    clean = {sample.group for sample in known} - marked
    out = set() if part is None else {*sorted(holding)[part::PARTS], *sorted(clean)[part::PARTS]}

    def those(chosen: Sequence[Sample]) -> LabelledData:
        return LabelledData(data.root, data.classes, tuple(replace(s, split="train") for s in chosen))

    taught = those([sample for sample in known if sample.group not in out])
    if part is None:
        return taught, data.of_split("test")
    return taught, those([sample for sample in known if sample.group in out])


def swept(name: str, data: LabelledData, part: int | None) -> dict[str, Any]:
    """Blowholes found and alarms on clean tiles, at each threshold: of a part left out, or of test."""
    path = KEPT / f"{name}.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    plant, (taught, held) = Plant(HOME), parted(data, part)
    trained = (plant.models / name / CARD).is_file()
    model = plant.model(name) if trained else train_model(plant, name, [taught], RECIPE)
    sweep = examine(model, open_engine(model)[1], held).sweep
    c = held.classes.index(BLOWHOLE)
    told = {
        "n": int(sweep.truth[c].sum()),
        "clean_mpx": sweep.clean_area / 1e6,
        "thresholds": sweep.thresholds.tolist(),
        "found": sweep.found[:, c].sum(axis=1).tolist(),
        "clean_alarms": sweep.clean_alarms[:, c].tolist(),
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(told) + "\n").encode())
    return told


def judged_together(parts: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    """The threshold that all parts give at so many alarms per Mpx, and what each of them finds with it."""
    found, alarms = (np.array([one[key] for one in parts]) for key in ("found", "clean_alarms"))
    mpx = sum(one["clean_mpx"] for one in parts)
    within = np.flatnonzero(alarms.sum(axis=0) <= rate * mpx)
    at = min(within, key=lambda i: (-found.sum(axis=0)[i], i))
    return {
        "threshold": parts[0]["thresholds"][at],
        "n": sum(one["n"] for one in parts),
        "found": int(found[:, at].sum()),
        "found_by_part": found[:, at].tolist(),
        "clean_mpx": mpx,
        "clean_alarms": int(alarms[:, at].sum()),
    }


def judged(told: dict[str, Any], threshold: float) -> dict[str, Any]:
    """What that threshold finds on test, and what any could."""
    found, alarms = np.array(told["found"]), np.array(told["clean_alarms"])
    at = told["thresholds"].index(threshold)
    return {
        "n": told["n"],
        "found": int(found[at]),
        "found_95": wilson(int(found[at]), told["n"]),
        "clean_alarms": int(alarms[at]),
        "clean_alarms_95": garwood(int(alarms[at])),
        f"most_found_at_{ALARMS}_alarms": int(found[alarms <= ALARMS].max(initial=0)),
    }


if __name__ == "__main__":
    main()
