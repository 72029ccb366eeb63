"""Claim: with modality dropout in training, a missing lighting mode costs less.

Two nets by the same recipe on simulated strip with two lighting modes, with and without modality dropout;
judged on other rolls with both modes, and with each of them missing. Interrupted, it goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from report import write_result
from rollsight.inspect.evaluate import padded_logits
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.metrics import Tally
from rollsight.inspect.train import Recipe, train
from rollsight.synth.strip import LIGHTINGS, SimulatedStrip, simulate_roll
from torch import nn

DROPOUT = 0.3
SEEN = {"both": slice(0, 2), "bright_alone": slice(0, 1), "dark_alone": slice(1, 2)}


def rolls(folder: Path, seeds: range, length_m: float, surface: str) -> LabelledData:
    for seed in seeds:
        path = folder / f"two-modes-{seed}.zarr"
        if not path.exists():
            strip = SimulatedStrip(
                length_m, seed, density=3, blackouts=(), surface=surface, lighting=LIGHTINGS
            )
            simulate_roll(path, strip)
    return open_labels(folder)


def judge(net: nn.Module, data: LabelledData, modes: slice) -> Tally:
    def engine(window: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return net(torch.from_numpy(np.ascontiguousarray(window))[None])[0].numpy()  # type: ignore[no-any-return]

    tally = Tally(data.classes)
    for sample in data.samples:
        image, truth = sample.read()
        argmax = padded_logits(engine, image[modes]).argmax(axis=0).astype(np.uint8)
        tally.add(truth, argmax, argmax, sample.group)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/modality"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rolls", type=int, default=8, help="for training; half as many to judge by")
    parser.add_argument("--length-m", type=float, default=6.0)
    parser.add_argument("--surface", default="hot-rolled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root: Path = options.work / f"{options.surface}-{options.rolls}x{options.length_m:g}m"
    made = {}
    for part, seeds in (
        ("train", range(400, 400 + options.rolls)),
        ("test", range(500, 500 + options.rolls // 2)),
    ):
        (root / part).mkdir(parents=True, exist_ok=True)
        made[part] = rolls(root / part, seeds, options.length_m, options.surface)
    plain = Recipe(steps=options.steps, seed=options.seed, fewest=0)
    tallies = {}
    for name, recipe in (("plain", plain), ("dropout", replace(plain, modality_dropout=DROPOUT))):
        run = root / f"{name}-{options.steps}-{options.seed}"
        net = train([made["train"]], run, recipe)
        tallies[name] = {modes: judge(net, made["test"], chosen) for modes, chosen in SEEN.items()}
        print(
            name,
            {modes: tally.report()["pixel"]["miou"] for modes, tally in tallies[name].items()},
            flush=True,
        )
    result: dict[str, object] = {"steps": options.steps, "dropout": DROPOUT, "rolls": options.rolls}
    for name, of_modes in tallies.items():
        whole = of_modes["both"].report()["pixel"]["miou"]
        for modes, tally in of_modes.items():
            report = tally.report()
            result[f"{name}.{modes}"] = {
                "miou": report["pixel"]["miou"],
                "f1_h": report["instance"]["f1_h"],
                "loss_of_miou": whole - report["pixel"]["miou"],
            }
    for modes in SEEN:
        gain = tallies["dropout"][modes].difference(tallies["plain"][modes])["pixel"]["miou"]
        result[f"gain.{modes}"] = {**gain, "shown": gain["low"] is not None and gain["low"] > 0}
    write_result("modality", result, seed=options.seed)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
