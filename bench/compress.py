"""Claim: INT8 and pruning make a model faster and smaller at the cost of at most one tiny or small defect.

MODEL, and PRUNED where one was made of it (`inspect compress MODEL PRUNED --prune SHARE`), in fp32 and in
INT8, on every engine: size of the graph, MPix/s of the net alone on data in memory (one thread, rounds of all
engines in turn, the median), and the tiny and small defects of the test split that are found at the same
budget of false alarms. Speeds are told against MODEL in torch, channels-last, fp32, in the same run.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import write_result
from rollsight.inspect.compress import Judged, judge
from rollsight.inspect.engines import Engine, engine_version, open_engine
from rollsight.inspect.labels import open_labels
from rollsight.inspect.models import Model
from rollsight.inspect.plant import open_plant
from rollsight.jobs.compress_job import int8_model

ROUNDS = 7
WINDOW = (1, 1024, 1280)  # a full-width window of a strip of 1.25 m


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", nargs="?", default="fast")
    arguments.add_argument("pruned", nargs="?")
    arguments.add_argument("--home", type=Path)
    arguments.add_argument(
        "--data", type=Path, default=Path(os.environ.get("ROLLSIGHT_DATA", ".")) / "neu_clean"
    )
    arguments.add_argument("--budget", type=float, default=60.0, help="false alarms per Mpx")
    asked = arguments.parse_args()
    plant, labels = open_plant(asked.home), open_labels(asked.data)
    learned, val, test = (labels.of_split(split) for split in ("train", "val", "test"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        forms: dict[str, Model] = {}
        for name in filter(None, (asked.model, asked.pruned)):
            form = "whole" if name == asked.model else "pruned"
            forms[form] = plant.model(name)
            folder = Path(temporary) / f"{form}-int8"
            forms[f"{form} int8"] = int8_model(forms[form], folder, [learned], lambda what, done, total: None)
        runs: dict[tuple[str, str], Engine] = {}
        for form, model in forms.items():
            for engine in ("onnx", "openvino") if "int8" in form else ("torch", "onnx", "openvino"):
                runs[form, engine] = open_engine(model, engine)[1]
        speeds = mpix_s(runs)
        judged = {key: judge(forms[key[0]], run, val, test, asked.budget) for key, run in runs.items()}
        rows = [row(key, forms[key[0]], speeds, judged) for key in runs]
    for line in rows:
        print(line)
    figures = {
        "model": asked.model,
        "data": asked.data.name,
        "budget_per_mpx": asked.budget,
        "n_tiny_small": judged["whole", "torch"].n,
        "engines": ", ".join(engine_version(name) for name in ("torch", "onnx", "openvino")),
        "forms": rows,
    }
    write_result("compress", figures, seed=0)


def mpix_s(runs: dict[tuple[str, str], Engine]) -> dict[tuple[str, str], float]:
    """Median speed of each engine on one window; in turn, so that a busy moment hits all alike."""
    window = np.random.default_rng(0).uniform(0.3, 0.7, WINDOW).astype(np.float32)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for number in range(ROUNDS + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run(window)
            if number:  # the first is the warm-up
                seconds[key].append(time.perf_counter() - start)
    return {key: window.size / 1e6 / statistics.median(taken) for key, taken in seconds.items()}


def row(
    key: tuple[str, str],
    model: Model,
    speeds: dict[tuple[str, str], float],
    judged: dict[tuple[str, str], Judged],
) -> dict[str, Any]:
    """What is told of one form of the model on one engine; lost against the whole in fp32 on ONNX Runtime."""
    figures = judged[key].figures()
    return {
        "form": key[0],
        "engine": key[1],
        "mb": round(model.graph.stat().st_size / 1e6, 3),
        "mpix_s": speeds[key],
        "times_torch": speeds[key] / speeds["whole", "torch"],
        "found_tiny_small": figures["found_tiny_small"],
        "lost_tiny_small": judged["whole", "onnx"].found - judged[key].found,
        "alarms_per_mpx": figures["alarms_per_mpx"],
        "miou": figures["miou"],
    }


if __name__ == "__main__":
    main()
