"""Claim: with modality dropout in training, a missing lighting mode costs less.

Nets `fast` by one recipe on simulated strip with two lighting modes, with and without modality dropout, all
from an arm of bench/trainings.py that knows steel in one mode (from scratch they learn nothing in as many
steps); judged on other rolls with both modes, and with each of them missing. `loss_of_miou` is what a missing
mode costs, `gain` what dropout changes, with its interval over seeds and rolls. Counts stay in
results/modality: interrupted, on whatever machine, it goes on.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _counts import difference, mean_figure, save_counts
from numpy.typing import NDArray
from report import RESULTS, write_result
from rollsight.inspect.evaluate import padded_logits
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.metrics import Counts, Tally, hit_f1, mean_iou
from rollsight.inspect.train import Recipe, train
from rollsight.synth.strip import LIGHTINGS, SimulatedStrip, simulate_roll
from torch import nn
from trainings import awaited

KEPT = RESULTS / "modality"
DROPOUT = 0.3
SEEN = {"both": slice(0, 2), "bright_alone": slice(0, 1), "dark_alone": slice(1, 2)}
RECIPE = Recipe(
    net="fast",
    attention="none",
    learning_rate=3e-3,
    fresh_rate=1.0,
    ema_half_life=30,
    small_weight=0.5,
    balanced=0.5,
    fewest=0,
)
BEGIN = "neu_clean-arm-plain-0"


def rolls(folder: Path, seeds: range, length_m: float, surface: str) -> LabelledData:
    for seed in seeds:
        path = folder / f"two-modes-{seed}.zarr"
        if not path.exists():
            strip = SimulatedStrip(
                length_m, seed, density=3, blackouts=(), surface=surface, lighting=LIGHTINGS
            )
            simulate_roll(path, strip)
    return open_labels(folder)


def judge(net: nn.Module, data: LabelledData, modes: slice) -> Counts:
    def engine(window: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return net(torch.from_numpy(np.ascontiguousarray(window))[None])[0].numpy()  # type: ignore[no-any-return]

    tally = Tally(data.classes)
    for sample in data.samples:
        image, truth = sample.read()
        argmax = padded_logits(engine, image[modes]).argmax(axis=0).astype(np.uint8)
        tally.add(truth, argmax, argmax, sample.group)
    return tally.statistics()


def keep(name: str, of_modes: dict[str, Counts]) -> None:
    """Put the counts of a net, judged by each choice of modes, where `kept` finds them."""
    KEPT.mkdir(parents=True, exist_ok=True)
    tables = {f"{modes}.{key}": table for modes, found in of_modes.items() for key, table in found.items()}
    save_counts(KEPT / f"{name}.npz", tables)


def kept(name: str, modes: str) -> Counts:
    with np.load(KEPT / f"{name}.npz", allow_pickle=False) as file:
        return {key.removeprefix(f"{modes}."): file[key] for key in file.files if key.startswith(f"{modes}.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/modality"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rolls", type=int, default=8, help="for training, and as many to judge by")
    parser.add_argument("--length-m", type=float, default=6.0)
    parser.add_argument("--surface", default="hot-rolled")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root: Path = options.work / f"{options.surface}-{options.rolls}x{options.length_m:g}m"
    made = {}
    for part, first in (("train", 400), ("test", 500)):
        (root / part).mkdir(parents=True, exist_ok=True)
        seeds = range(first, first + options.rolls)
        made[part] = rolls(root / part, seeds, options.length_m, options.surface)
    runs: dict[tuple[str, str], list[Counts]] = {}
    for seed in range(options.seeds):
        plain = replace(RECIPE, steps=options.steps, seed=seed)
        for arm, recipe in (("plain", plain), ("dropout", replace(plain, modality_dropout=DROPOUT))):
            name = f"{root.name}-{arm}-{options.steps}-{seed}"
            if not (KEPT / f"{name}.npz").is_file():
                begin, run = awaited(BEGIN, options.data), root / f"{arm}-{options.steps}-{seed}"
                net = train([made["train"]], run, recipe, init=(begin.net(), begin.card.classes))
                keep(name, {modes: judge(net, made["test"], chosen) for modes, chosen in SEEN.items()})
            for modes in SEEN:
                runs.setdefault((arm, modes), []).append(kept(name, modes))
                print(seed, arm, modes, mean_figure(runs[arm, modes][-1:], mean_iou), flush=True)
    result: dict[str, object] = {
        **{"steps": options.steps, "dropout": DROPOUT, "rolls": options.rolls, "seeds": options.seeds},
        "surface": options.surface,
    }
    for (arm, modes), counts in runs.items():
        miou = mean_figure(counts, mean_iou)
        result[f"{arm}.{modes}"] = {
            "miou": miou,
            "f1_h": mean_figure(counts, hit_f1),
            "loss_of_miou": mean_figure(runs[arm, "both"], mean_iou) - miou,
        }
    for modes in SEEN:
        gain, low, high = difference(runs["plain", modes], runs["dropout", modes], mean_iou)
        result[f"gain.{modes}"] = {"miou": gain, "low": low, "high": high, "shown": low > 0}
    write_result("modality", result, seed=0)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
