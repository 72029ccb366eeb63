"""Claim: how many of the 28 blowholes on the test tiles the nets of bench/trainings.py find, at what cost.

    python bench/trainings.py --only 'mt-*'      first: it trains what this reads
    python bench/blowhole.py

The class has a budget of its own here, unlike in the table of the nets: three alarms on the clean test
tiles. Its threshold comes from val: the highest recall with no more alarms on the clean val tiles than that
rate allows at 95 % confidence; of these the fewest alarms, then the lowest threshold. The nets are ordered by
val. Test is looked at once for each, and that leaves one JSON in results/blowhole, which is kept.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import RESULTS, write_result
from rollsight.inspect.engines import open_engine
from rollsight.inspect.evaluate import data_logits, look, probabilities
from rollsight.inspect.froc import Sweep
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.metrics import garwood, wilson
from rollsight.inspect.models import Model
from rollsight.inspect.plant import Plant
from rollsight.inspect.roll_places import write_durably
from scipy import special
from trainings import HOME, done, queue

KEPT = RESULTS / "blowhole"
BLOWHOLE = "blowhole"
ALARMS = 3  # on the clean test tiles
CERTAIN = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = open_labels(Path(asked.data) / "mt")
    KEPT.mkdir(parents=True, exist_ok=True)
    rows = []
    for training in queue():
        if training.data != "mt" or done(training) is None:
            continue
        path = KEPT / f"{training.name}.json"
        if not path.is_file():
            plant = Plant(HOME)
            if not (plant.models / training.name / "card.json").is_file():
                print(f"{training.name}: its model is no longer there: left out")
                continue
            told = figures(plant.model(training.name), data)
            write_durably(path, (json.dumps({"name": training.name} | told) + "\n").encode())
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        print(rows[-1], flush=True)
    rows.sort(key=lambda row: (-row["val_found"], row["val_alarms"], -row["val_margin"]))
    write_result("blowhole", {"of": data.root.name, "first_on_val": rows[0], "rows": rows}, seed=None)


def figures(model: Model, data: LabelledData) -> dict[str, Any]:
    """The threshold that val gives, what it finds on test, and what any threshold could find there."""
    val, test = (swept(model, data.of_split(split)) for split in ("val", "test"))
    c = data.classes.index(BLOWHOLE)
    rate = ALARMS / test.alarm_mpx
    upper = special.gammaincinv(np.arange(1, ALARMS + 2), CERTAIN) / val.alarm_mpx
    allowed = int((upper <= rate).sum()) - 1
    alarms, found = val.alarms()[:, c], val.found[:, c].sum(axis=1)
    within = np.flatnonzero(alarms <= max(allowed, 0))
    at = min(within, key=lambda i: (-found[i], alarms[i], i))
    loudest = int(np.flatnonzero(alarms > max(allowed, 0)).max(initial=-1))
    of_test, n = test.found[:, c].sum(axis=1), int(test.truth[c].sum())
    low, high = garwood(int(test.clean_alarms[at, c]))
    enough = np.flatnonzero(of_test >= 26)
    return {
        "threshold": float(val.thresholds[at]),
        "val_found": int(found[at]),
        "val_n": int(val.truth[c].sum()),
        "val_alarms": int(alarms[at]),
        # thresholds between the last that is too loud and the first that misses a defect it found
        "val_margin": int(np.flatnonzero(found == found[at]).max()) - loudest,
        "found": int(of_test[at]),
        "n": n,
        "found_95": wilson(int(of_test[at]), n),
        "clean_alarms": int(test.clean_alarms[at, c]),
        "clean_alarms_95": [low, high],
        "clean_mpx": test.alarm_mpx,
        "fewest_alarms_at_26_found": int(test.clean_alarms[enough, c].min()) if len(enough) else None,
        "found_at_3_alarms": int(of_test[test.clean_alarms[:, c] <= ALARMS].max(initial=0)),
    }


def swept(model: Model, data: LabelledData) -> Sweep:
    """Found and alarms of each class at every threshold, with the temperature of the card."""
    engine, counted = open_engine(model)[1], Sweep(data.classes)
    for seen in look(model, engine, data):
        logits = data_logits(seen.logits, model.card.classes, data.classes, model.card.temperature)
        counted.add(seen.truth, probabilities(logits)[1:])
    return counted


if __name__ == "__main__":
    main()
