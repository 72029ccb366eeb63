"""Claim: a fit takes minutes, what the check keeps holds its label, any sample can be made again alone.

Scratches of `neu_clean`, ten scenes of them (draw 0 of bench/synth_lift.py): fitted from scratch by preset
cpu-64, with the other classes to help; 500 samples made and checked by cross-fitted segmenters; 100 of them
made again one by one. A fit that was interrupted goes on, and its seconds are then those since; the figures
are of one core unless --threads says otherwise.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import write_result
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.synth.backgrounds import Backgrounds
from rollsight.synth.compose import Order, digest_of, make_data, make_sample
from rollsight.synth.data_card import open_provenance
from rollsight.synth.draws import rarity
from rollsight.synth.fit_recipe import PRESETS
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.generator import open_generator
from rollsight.synth.patches import read_scenes
from rollsight.synth.realism import check_set

RARE, SCENES, DRAW = "scratches", 10, 0
AGAIN = 100  # samples that are made again


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data = Path(os.environ.get("ROLLSIGHT_DATA", "../shared/data")) / "neu_clean"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--work", type=Path, default=Path("build/synth_data"))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--check-steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_labels(options.data)
    base, rare = rarity(source, RARE).drawn(SCENES, DRAW)
    held = tuple(sample for sample in source.samples if sample.split in ("val", "test"))
    labels = LabelledData(source.root, source.classes, (*base.samples, *rare.samples, *held))
    steel = Backgrounds(read_scenes(base), [], base.classes)

    folder: Path = options.work / "generator"
    options.work.mkdir(parents=True, exist_ok=True)
    told = options.work / "fit.json"
    if not told.is_file():
        told.write_text(json.dumps(fitted(labels, folder)))
    generator = open_generator(folder)

    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        made, order = Path(scratch) / "made", Order(seed=DRAW)
        begun = time.monotonic()
        make_data(generator, steel, order, options.samples, made)
        seconds = time.monotonic() - begun
        lines = open_provenance(made)
        again = np.random.default_rng(0).permutation(len(lines))[:AGAIN].tolist()
        same = 0
        for index in again:
            sample = make_sample(generator, steel, order, index)
            same += digest_of(sample.image, sample.mask) == lines[index]["sha256"]
        found = check_set(made, labels, Path(scratch) / "check", steps=options.check_steps)
        attempts: dict[str, int] = {}
        for line in lines:
            for why, count in line["rejected"].items():
                attempts[why] = attempts.get(why, 0) + count
    kept = found.figures["kept"]
    write_result(
        "synth_data",
        {
            **{"data": source.root.name, "rare_class": RARE, "scenes": SCENES, "threads": options.threads},
            "fit": json.loads(told.read_text()),
            "samples": len(lines),
            "samples_per_s": len(lines) / seconds,
            "attempts_rejected": attempts,
            "peak_rss_mb": peak_mb(),
            "remade": len(again),
            "remade_identical": same,
            "kept": kept,
            "dropped_share": 1 - kept / len(lines),
            "dropped": found.figures["dropped"],
            "segmenters": found.figures["segmenters"],
            "least_contrast_kept": found.figures["least_contrast_kept"],
            "nearest_ratio": found.figures["nearest_ratio"],
            "nearest_alarm": found.figures["nearest_alarm"],
            "copies": found.figures["copies"],
            "diversity": found.figures["diversity"],
            "kid": {name: of["mean"] for name, of in found.figures["kid"].items()},
        },
        seed=DRAW,
    )
    print(json.dumps(found.figures, indent=1), same, len(again))


def fitted(labels: LabelledData, folder: Path) -> dict[str, Any]:
    """Fit the generator; what it took."""
    recipe = replace(PRESETS["cpu-64"], seed=DRAW)
    begun = time.monotonic()

    def tell(step: int, figures: dict[str, float]) -> None:
        if step % 100 == 0:
            print(step, {name: round(value, 3) for name, value in figures.items()}, flush=True)

    fit_generator(fit_data(labels, RARE), folder, recipe, on_step=tell)
    seconds = time.monotonic() - begun
    return {
        "preset": recipe.preset,
        "steps": recipe.steps,
        "minutes": seconds / 60,
        "peak_rss_mb": peak_mb(),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
