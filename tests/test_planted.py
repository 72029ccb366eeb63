"""A scan held against the planted truth."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rollsight.inspect.defects import band_components, join, table
from rollsight.inspect.plant import Plant
from rollsight.inspect.planted import Found, against_truth
from rollsight.inspect.rolls import LabelWriter, RollWriter, Strip

CLASSES = ("pit", "scale")


def box(mask: NDArray[np.uint8], y: int, x: int, value: int) -> None:
    mask[y : y + 4, x : x + 4] = value


def test_hits_misses_confusions_and_false_alarms_are_told_apart(tmp_path: Path) -> None:
    """Planted: a pit found, a pit missed, a pit found as scale, a scale found; found as well: one alarm."""
    truth, found = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    box(truth, 5, 5, 1), box(found, 6, 6, 1)
    box(truth, 5, 25, 1)
    box(truth, 25, 5, 1), box(found, 25, 5, 2)
    box(truth, 25, 25, 2), box(found, 25, 23, 2)
    box(found, 50, 50, 1)
    strip = Strip("R", "top", ("bright",), 1.0, 1.0)
    path = Plant(tmp_path).roll_path("R")
    with RollWriter(path, strip, 64, np.uint8) as writer:
        writer.append(np.full((1, 64, 64), 100, np.uint8))
        roll = writer.close()
    tables: list[pa.Table] = []
    for name, mask in (("truth", truth), ("run", found)):
        label = LabelWriter.create(path, name, CLASSES, lines=64, width=64, shard_lines=64)
        label.write(0, mask)
        label.close()
        components = band_components(mask, np.ones((64, 64), np.float32), np.zeros(64, np.int64), 0)
        tables.append(table(join([components]), CLASSES, strip, roll_id="R", run_id=name))

    counts = against_truth(roll, tables[1], "run", tables[0])
    assert counts == {
        "pit": Found(planted=3, hit=1, hit_as_other=1, alarms=1),
        "scale": Found(planted=1, hit=1, hit_as_other=0, alarms=0),
    }
