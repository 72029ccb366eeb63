"""Claim: how many of the 28 blowholes on the test tiles the nets of bench/trainings.py find, at what cost.

    python bench/trainings.py --only 'mt-*'      first: it trains what this reads
    python bench/blowhole.py

The class has a budget of its own here, unlike in the table of the nets: three alarms on the clean test tiles.
Its threshold comes from val by two rules, both with the highest recall there. `limit`: few enough alarms on
the clean val tiles to show that rate at 95 % confidence; of these thresholds the one with the fewest. `rate`:
the lowest threshold with no more alarms than the rate gives there. The second was added after the first had
been seen to find almost nothing on test. Each net leaves one JSON in results/blowhole.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import RESULTS, write_result
from rollsight.inspect.calibrate import allowed_alarms
from rollsight.inspect.engines import open_engine
from rollsight.inspect.evaluate import examine
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.metrics import garwood, wilson
from rollsight.inspect.models import Model
from rollsight.inspect.roll_places import write_durably
from trainings import done, kept_model, queue

KEPT = RESULTS / "blowhole"
ARMS = ("net", "from_steel")
BLOWHOLE = "blowhole"
ALARMS, ENOUGH = 3, 26  # the target: so many on the clean test tiles, so many found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = open_labels(Path(asked.data) / "mt")
    KEPT.mkdir(parents=True, exist_ok=True)
    rows = []
    for training in queue():
        if training.data != "mt" or training.arm not in ARMS or done(training) is None:
            continue
        path = KEPT / f"{training.name}.json"
        if not path.is_file():
            if (model := kept_model(training)) is None:
                print(f"{training.name}: its model is no longer there: left out")
                continue
            told = figures(model, data)
            write_durably(path, (json.dumps({"name": training.name} | told) + "\n").encode())
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        print(rows[-1], flush=True)
    if not rows:
        raise SystemExit("no net on magnetic tiles: python bench/trainings.py --only 'mt-*' trains them")
    write_result("blowhole", {"of": data.root.name, "rows": rows}, seed=None)


def figures(model: Model, data: LabelledData) -> dict[str, Any]:
    """By each rule the threshold that val gives and what it finds on test; what any threshold could find."""
    engine = open_engine(model)[1]
    val, test = (examine(model, engine, data.of_split(split)).sweep for split in ("val", "test"))
    c = data.classes.index(BLOWHOLE)
    rate = ALARMS / test.alarm_mpx
    alarms, found = val.alarms()[:, c], val.found[:, c].sum(axis=1)
    of_test, on_clean = test.found[:, c].sum(axis=1), test.clean_alarms[:, c]
    enough = np.flatnonzero(of_test >= ENOUGH)
    told: dict[str, Any] = {
        "n": int(test.truth[c].sum()),
        "val_n": int(val.truth[c].sum()),
        "clean_mpx": test.alarm_mpx,
        "val_alarms_at_most_found": int(alarms[found == found.max()].min()),
        f"fewest_alarms_at_{ENOUGH}_found": int(on_clean[enough].min()) if len(enough) else None,
        f"most_found_at_{ALARMS}_alarms": int(of_test[on_clean <= ALARMS].max(initial=0)),
    }
    for rule, allowed in (("limit", allowed_alarms(rate, val, data)), ("rate", int(rate * val.alarm_mpx))):
        within = np.flatnonzero(alarms <= allowed)
        at = min(within, key=lambda i: (-found[i], alarms[i] if rule == "limit" else 0, i))
        told[rule] = {
            "threshold": float(val.thresholds[at]),
            "val_found": int(found[at]),
            "val_alarms": int(alarms[at]),
            "found": int(of_test[at]),
            "found_95": wilson(int(of_test[at]), told["n"]),
            "clean_alarms": int(on_clean[at]),
            "clean_alarms_95": garwood(int(on_clean[at])),
        }
    return told


if __name__ == "__main__":
    main()
