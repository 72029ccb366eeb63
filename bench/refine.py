"""Claim: edge refinement brings outlines nearer to those drawn by hand, and leaves tiny defects alone.

The shipped model on `neu_clean`, plain argmax. Parameters are compared on val (--choose, the grid below);
the figures are those of the test scenes with the values in inspect/refine.py.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import write_result
from rollsight.inspect import refine as refinement
from rollsight.inspect.engines import open_engine
from rollsight.inspect.evaluate import FOREIGN, padded_logits, probabilities
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.metrics import Tally, bootstrap, bootstrap_difference
from rollsight.inspect.models import Model, open_model
from rollsight.inspect.refine import crf, guided, refine
from scipy import ndimage

REACH_PX = 2
GRID: dict[str, Mapping[str, tuple[float, ...]]] = {
    "guided": {"radius_px": (2, 4, 8), "eps": (1e-4, 1e-3, 1e-2)},
    "crf": {"strength": (1.0, 2.0, 4.0), "near_px": (3.0,), "gray": (0.02, 0.05, 0.1), "smooth": (0.2, 1.0)},
}
FUNCTIONS: dict[str, Any] = {"guided": guided, "crf": crf}


class Outlines:
    """Boundary F1 at 2 px: counts of outline px per group, with how many lie near the other's outline."""

    def __init__(self) -> None:
        self.groups: dict[str, np.ndarray] = {}  # group -> (classes, 4)

    def add(self, truth: np.ndarray, found: np.ndarray, classes: int, group: str) -> None:
        counts = np.zeros((classes, 4), dtype=np.int64)
        for c in range(classes):
            sides = [outline(labels == c + 1) & (truth != 255) for labels in (truth, found)]
            away = [ndimage.distance_transform_edt(~side) if side.any() else None for side in sides]
            for i, (side, other) in enumerate(((sides[0], away[1]), (sides[1], away[0]))):
                counts[c, 2 * i] = side.sum()
                counts[c, 2 * i + 1] = 0 if other is None else (other[side] <= REACH_PX).sum()
        self.groups[group] = self.groups.get(group, 0) + counts

    def statistics(self) -> dict[str, np.ndarray]:
        return {"outlines": np.stack([self.groups[group] for group in sorted(self.groups)])}


def outline(mask: np.ndarray) -> np.ndarray:
    """The px of a mask with a 4-neighbour outside it; the image's border is no outline."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)


def boundary_f1(counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean over classes of the harmonic mean of recall and precision of outline px: (...)."""
    n_truth, near_truth, n_found, near_found = np.moveaxis(counts["outlines"].astype(float), -1, 0)
    recall, precision = near_truth / np.maximum(n_truth, 1), near_found / np.maximum(n_found, 1)
    f1: np.ndarray = np.mean(2 * recall * precision / np.maximum(recall + precision, 1e-9), axis=-1)
    return f1


Seen = list[tuple[np.ndarray, np.ndarray, np.ndarray, str]]  # image, truth, probabilities, group


def look(model: Model, data: LabelledData) -> Seen:
    engine = open_engine(model, "onnx")[1]
    seen = []
    for sample in data.samples:
        image, truth = sample.read()
        seen.append((image, truth, probabilities(padded_logits(engine, image)), sample.group))
    return seen


def judge(seen: Seen, model: Model, data: LabelledData, method: str) -> tuple[Tally, Outlines]:
    to_data = np.full(256, FOREIGN, dtype=np.uint8)
    to_data[0] = 0
    for index, name in enumerate(model.card.classes, start=1):
        if name in data.classes:
            to_data[index] = data.classes.index(name) + 1
    tally, outlines = Tally(data.classes), Outlines()
    for image, truth, p, group in seen:
        refined = p if method == "none" else refine(image, p, method)
        found = to_data[refined.argmax(axis=0)]
        tally.add(truth, found, found, group)
        outlines.add(truth, found, len(data.classes), group)
    return tally, outlines


def told(tally: Tally, outlines: Outlines) -> dict[str, Any]:
    report, statistics = tally.report(), outlines.statistics()
    low, high = bootstrap(statistics, boundary_f1)
    total = {name: table.sum(axis=0) for name, table in statistics.items()}
    return {
        "boundary_f1": float(boundary_f1(total)),
        "boundary_f1_95": [float(low), float(high)],
        "miou": report["pixel"]["miou"],
        "miou_95": list(tally.intervals()["pixel"]["miou"].values()),
        "recall_tiny_small": report["instance"]["recall_by_size"]["tiny_small"]["recall"],
        "f1_h": report["instance"]["f1_h"],
    }


def choose(seen: Seen, model: Model, data: LabelledData) -> dict[str, list[dict[str, Any]]]:
    """Boundary F1 and mIoU on val of every point of the grid, best first."""
    tally, outlines = judge(seen, model, data, "none")
    total = {name: table.sum(axis=0) for name, table in outlines.statistics().items()}
    miou = tally.report()["pixel"]["miou"]
    chosen: dict[str, list[dict[str, Any]]] = {
        "none": [{"boundary_f1": float(boundary_f1(total)), "miou": miou}]
    }
    for method, grid in GRID.items():
        rows = []
        default: Callable[..., Any] = refinement.REFINERS[method]
        for values in product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            refinement.REFINERS[method] = partial(FUNCTIONS[method], **point)
            tally, outlines = judge(seen, model, data, method)
            total = {name: table.sum(axis=0) for name, table in outlines.statistics().items()}
            miou = tally.report()["pixel"]["miou"]
            rows.append({**point, "boundary_f1": float(boundary_f1(total)), "miou": miou})
            print(method, rows[-1], flush=True)
        refinement.REFINERS[method] = default
        chosen[method] = sorted(rows, key=lambda row: -row["boundary_f1"])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data_root = Path(os.environ.get("ROLLSIGHT_DATA", "../shared/data")) / "neu_clean"
    parser.add_argument("--data", type=Path, default=data_root)
    parser.add_argument("--model", default="default")
    parser.add_argument("--choose", action="store_true", help="go through the grid on val first")
    parser.add_argument("--images", type=int, default=0, help="of each split, to try it quickly; 0: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = open_model(options.model, Path("plant/models"))
    parts = {}
    for split in ("val", "test"):
        data = open_labels(options.data).of_split(split)
        step = -(-len(data.samples) // options.images) if options.images else 1
        parts[split] = LabelledData(data.root, data.classes, data.samples[::step])
    result: dict[str, Any] = {"model": model.card.name, "images": len(parts["test"].samples)}
    if options.choose:
        result["val"] = choose(look(model, parts["val"]), model, parts["val"])
    seen = look(model, parts["test"])
    before = judge(seen, model, parts["test"], "none")
    result["before"] = told(*before)
    for method in refinement.REFINERS:
        after = judge(seen, model, parts["test"], method)
        low, high = bootstrap_difference(before[1].statistics(), after[1].statistics(), boundary_f1)
        difference = after[0].difference(before[0])["pixel"]["miou"]
        result[method] = {
            **told(*after),
            "boundary_f1_gain_95": [float(low), float(high)],
            "miou_gain_95": [difference["low"], difference["high"]],
            "shown": bool(low > 0),
        }
    write_result("refine" if not options.images else "refine_trial", result, seed=0)
    print(json.dumps({key: value for key, value in result.items() if key != "val"}, indent=1))


if __name__ == "__main__":
    main()
