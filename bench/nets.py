"""Claim: which net is worth its time: all of them trained for as long, on real steel and on magnetic tiles.

    python bench/trainings.py      first: it trains what this reads
    python bench/nets.py

The figures of the nets that bench/trainings.py trained (test split; thresholds from val at one budget of
false alarms), with the speed of their graphs in ONNX Runtime on two threads, one window each, as a scan
runs them. Writes nets.json (one row a training), nets_intervals.json (intervals, differences to the plain
Lite0 U-Net, the shipped models among them, which had longer trainings) and docs/nets.png, accuracy against
speed.
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from _counts import counts_of, difference, figures_of, interval, mean_figure
from report import ROOT, write_result, write_rows
from rollsight.inspect.compress import judge
from rollsight.inspect.engines import open_engine
from rollsight.inspect.export import export_onnx
from rollsight.inspect.graph import for_one_mode
from rollsight.inspect.labels import open_labels
from rollsight.inspect.metrics import Counts, hit_f1, mean_iou, tiny_small_recall
from rollsight.inspect.models import SHIPPED, open_model
from rollsight.inspect.nets import NETS
from rollsight.inspect.nets.reach import halo_px, radius_px
from trainings import BUDGETS

WINDOW = (1, 1, 1024, 1280)  # a full-width window of a strip of 1.25 m
SLOTS, ROUNDS = 2, 9
PROVIDERS = ["CPUExecutionProvider"]
COLUMNS = ("net", "attention", "loss", "seed", "data", "miou", "f1_h", "recall_tiny_small", "fa_per_mpx")
FIGURES = {"miou": mean_iou, "f1_h": hit_f1, "recall_tiny_small": tiny_small_recall}
TICKS = (1, 2, 5, 10, 20, 50)  # MPix/s
PICTURE = ROOT / "docs" / "nets.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    asked = parser.parse_args()
    trained = [row for row in figures_of() if row["arm"] == "net"]
    if not trained:
        raise SystemExit("no net has been trained: python bench/trainings.py does so")
    builds = sorted({(row["net"], row["attention"]) for row in trained})
    built = {build: NETS[build[0]](3, attention=build[1]).eval() for build in builds}
    speeds = mpix_s(built)
    rows = [
        {
            **{key: row[key] for key in COLUMNS},
            "val_miou": row["val_miou"],
            "f1_tiny_small": row["f1_tiny_small"],
            "steps": row["steps"],
            "mpix_s": speeds[row["net"], row["attention"]],
            "params": row["params"],
            "radius_px": radius_px(built[row["net"], row["attention"]]),
            "halo_px": halo_px(built[row["net"], row["attention"]]),
        }
        for row in trained
    ]
    write_rows("nets", rows, seed=0)
    summary = [told for data in sorted({row["data"] for row in trained}) for told in of_data(data, trained)]
    for told in summary:
        told["mpix_s"] = speeds[told["net"], told["attention"]]
    shipped = of_shipped(Path(asked.data), trained)
    write_result("nets_intervals", {"rows": [*summary, *shipped]}, seed=0)
    draw(summary, PICTURE)
    for told in [*summary, *shipped]:
        print(told)


def of_data(data: str, trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each net on one set of data: the mean over its seeds, intervals, the difference to the baseline."""
    arms: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in trained:
        if row["data"] == data:
            arms.setdefault((row["net"], row["attention"]), []).append(row)
    counts = {build: [counts_of(row["name"]) for row in rows] for build, rows in arms.items()}
    baseline = counts["unet_lite", "none"]
    return [
        {"data": data, "net": net, "attention": attention, "seeds": len(runs)}
        | (against(baseline, runs) if runs is not baseline else figures(runs))
        for (net, attention), runs in counts.items()
    ]


def figures(runs: list[Counts]) -> dict[str, Any]:
    """The mean of each figure over the seeds, with its interval."""
    row: dict[str, Any] = {}
    for name, figure in FIGURES.items():
        low, high = interval(runs, figure)
        row |= {name: mean_figure(runs, figure), f"{name}_95": [low, high]}
    return row


def against(baseline: list[Counts], runs: list[Counts]) -> dict[str, Any]:
    """The same, and the difference of mIoU to the baseline."""
    apart, low, high = difference(baseline, runs, mean_iou)
    gain = {"miou_gain": apart, "miou_gain_95": [low, high], "shown": low > 0 or high < 0}
    return figures(runs) | gain


def of_shipped(data: Path, trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shipped models on real steel, judged as the nets are: thresholds from val at the same budget."""
    source = open_labels(data / "neu_clean")
    val, test = source.of_split("val"), source.of_split("test")
    baseline = [counts_of(row["name"]) for row in trained if row["name"].startswith("neu_clean-baseline-")]
    rows = []
    for name in SHIPPED:
        model = open_model(name, data)
        judged = judge(model, open_engine(model)[1], val, test, BUDGETS["neu_clean"])
        told: dict[str, Any] = {"data": "neu_clean", "net": f"{model.card.net}, shipped as {name}"}
        told |= {"attention": model.card.net_options["attention"], "seeds": 1}
        rows.append(told | against(baseline, [judged.tally.statistics()]))
    return rows


def mpix_s(nets: dict[tuple[str, str], torch.nn.Module]) -> dict[tuple[str, str], float]:
    """Speed of each graph, SLOTS windows at once on a thread each; in turn, to share busy moments."""
    window = np.random.default_rng(0).uniform(0.3, 0.7, WINDOW).astype(np.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(SLOTS) as pool:
        runs = {}
        for build, net in nets.items():
            path = Path(folder) / f"{'-'.join(build)}.onnx"
            export_onnx(net, path)
            runs[build] = ort.InferenceSession(for_one_mode(path), options, providers=PROVIDERS)
        seconds: dict[tuple[str, str], list[float]] = {build: [] for build in runs}
        for number in range(ROUNDS + 1):
            for build, session in runs.items():
                start = time.perf_counter()
                list(pool.map(lambda _, s=session: s.run(None, {"planes": window}), range(SLOTS)))
                if number:  # the first is the warm-up
                    seconds[build].append(time.perf_counter() - start)
    return {build: SLOTS * window.size / 1e6 / statistics.median(taken) for build, taken in seconds.items()}


def draw(summary: list[dict[str, Any]], path: Path) -> None:
    """mIoU and the recall of small defects against speed; a line joins what nothing beats in both."""
    from matplotlib.figure import Figure

    data = sorted({row["data"] for row in summary})
    names = {"miou": "mIoU", "recall_tiny_small": "recall of tiny and small"}
    figure = Figure(figsize=(11, 4.2 * len(data)), layout="constrained", dpi=110)
    panels = figure.subplots(len(data), len(names), squeeze=False)
    for line, name in zip(panels, data, strict=True):
        for panel, (key, title) in zip(line, names.items(), strict=True):
            rows = sorted((row for row in summary if row["data"] == name), key=lambda row: -row["mpix_s"])
            best = [row for i, row in enumerate(rows) if all(row[key] > other[key] for other in rows[:i])]
            panel.plot([row["mpix_s"] for row in best], [row[key] for row in best], color="#999999", lw=1)
            for row in rows:
                low, high = row[f"{key}_95"]
                colour = "#0072B2" if row in best else "#555555"
                panel.plot([row["mpix_s"]] * 2, [low, high], color=colour, lw=1.2, alpha=0.5)
                panel.plot(row["mpix_s"], row[key], "o", color=colour)
                label = row["net"] if row["attention"] != "none" else f"{row['net']} plain"
                # Neighbours in speed do not write over each other.
                left = not_fastest(row, rows)
                up = not left or all(
                    row[key] >= other[key] for other in near(row, rows) if not_fastest(other, rows)
                )
                panel.annotate(
                    label,
                    (row["mpix_s"], row[key]),
                    (-6 if left else 6, 4 if up else -11),
                    textcoords="offset points",
                    horizontalalignment="right" if left else "left",
                    size=8,
                )
            panel.set_xscale("log")
            panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            panel.minorticks_off()
            panel.set_title(f"{name}: {title}", fontsize=10)
            panel.set_xlabel("MPix/s, ONNX Runtime, 2 cores", fontsize=8)
            panel.grid(alpha=0.3)
            panel.margins(x=0.15)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def near(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nets of about its speed, itself among them."""
    return [other for other in rows if 0.8 < other["mpix_s"] / row["mpix_s"] < 1.25]


def not_fastest(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    return row is not max(near(row, rows), key=lambda other: other["mpix_s"])


if __name__ == "__main__":
    main()
