"""The picture of synthetic defects in the README: docs/synthetic.png, good and bad samples as they come.

Inclusions of simulated strip, twelve metres with the usual number of defects, begun from the shipped generic
generator; 120 samples on clean strip of other rolls, checked as `inspect synth check` does. The first row is
real, that is, simulated; then the first samples that the check keeps, drawn at random; then those that it
drops, with the reason. Images of others may not be copied, so none of NEU-Seg is shown.
"""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from report import ROOT, write_result
from rollsight.inspect.labels import ImageFile, LabelledData, open_labels
from rollsight.synth.backgrounds import open_backgrounds
from rollsight.synth.compose import Order, make_data
from rollsight.synth.features import Crop, crop_of
from rollsight.synth.fit_recipe import FINE_TUNING_STEPS, PRESETS
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.generator import open_generator
from rollsight.synth.generic import SHIPPED, open_generic
from rollsight.synth.realism import Judged, check_set
from rollsight.synth.strip import SimulatedStrip, simulate_roll
from scipy import ndimage

Shown = tuple[Crop, Crop, str]  # crop, its label, why it is dropped

RARE = "inclusion"
COLUMNS = 10
PICTURE = ROOT / "docs" / "synthetic.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/synth_picture"))
    parser.add_argument("--length-m", type=float, default=12.0)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--check-steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    labelled = strips(options.work / "labelled", range(700, 702), options.length_m, density=1.0)
    clean = strips(options.work / "clean", range(710, 712), options.length_m, density=0.0)
    labels = open_labels(labelled)
    folder = options.work / "generator"
    if not folder.is_dir():
        recipe = replace(PRESETS["cpu-64"], steps=FINE_TUNING_STEPS)
        steel = open_backgrounds([clean], labels.classes, []).clean_scenes()
        fit_generator(
            fit_data(labels, RARE, begun=True), folder, recipe, backgrounds=steel, init=open_generic(SHIPPED)
        )
    made = options.work / "made"
    if not made.is_dir():
        steel = open_backgrounds([clean], labels.classes, [])
        make_data(open_generator(folder), steel, Order(seed=1), options.samples, made)
    found = check_set(made, labels, options.work / "check", steps=options.check_steps)
    good = [one for one in found.samples if not one.dropped]
    bad = [one for one in found.samples if one.dropped]
    rows = {
        "simulated strip, as labelled": real(labels),
        f"made, kept: {len(good)} of {len(found.samples)}": shown(made, good),
        f"made, dropped by the check: {len(bad)}": shown(made, bad),
    }
    draw(rows, PICTURE)
    figures = {key: found.figures[key] for key in ("samples", "kept", "dropped", "least_contrast_kept")}
    write_result("synth_picture", {"rare_class": RARE, "surface": "hot-rolled", **figures}, seed=1)
    print(found.figures)


def strips(folder: Path, seeds: range, length_m: float, density: float) -> Path:
    """A folder of simulated rolls, one for each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = folder / f"strip-{seed}.zarr"
        if not path.exists():
            simulate_roll(path, SimulatedStrip(length_m, seed, density=density, blackouts=()))
    return folder


def real(labels: LabelledData) -> list[Shown]:
    """Labelled defects, drawn at random."""
    value = labels.classes.index(RARE) + 1
    found: list[Shown] = []
    for sample in labels.samples:
        image, mask = sample.read()
        for y, x in ndimage.find_objects(ndimage.label(mask == value, np.ones((3, 3)))[0]):
            box = (x.start, y.start, x.stop, y.stop)
            found.append((crop_of(image[0], box), crop_of((mask == value).astype(np.float32), box), ""))
    return some(found)


def shown(made: Path, judged: list[Judged]) -> list[Shown]:
    """Synthetic defects, drawn at random, and why they are dropped."""
    data = open_labels(made)
    value = data.classes.index(RARE) + 1
    by_name = {sample.image.name: sample for sample in data.samples if isinstance(sample, ImageFile)}
    found: list[Shown] = []
    for one in judged:
        image, mask = by_name[Path(one.image).name].read()
        label = crop_of((mask == value).astype(np.float32), one.box)
        found.append((crop_of(image[0], one.box), label, one.dropped))
    return some(found)


def some(found: list[Shown]) -> list[Shown]:
    return [found[int(i)] for i in np.random.default_rng(0).permutation(len(found))[:COLUMNS]]


def draw(rows: dict[str, list[Shown]], path: Path) -> None:
    """Two lines of pictures for each row: the crops, and the same with the outline of the label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMNS * 1.1, len(rows) * 2.6), layout="constrained", dpi=100)
    parts = figure.subfigures(len(rows), 1)
    for part, (title, crops) in zip(parts, rows.items(), strict=True):
        part.suptitle(title, fontsize=10, x=0.01, horizontalalignment="left")
        for line in part.subplots(2, COLUMNS):
            for panel in line:
                panel.axis("off")
        for i, (crop, label, why) in enumerate(crops):
            for line in (0, 1):
                panel = part.axes[line * COLUMNS + i]
                panel.imshow(crop, cmap="gray", vmin=0, vmax=1)
            panel.contour(label, levels=[0.5], colors=["#E69F00"], linewidths=0.8)
            panel.set_title(textwrap.fill(why, 14), fontsize=6, y=-0.42)
    figure.savefig(path)


if __name__ == "__main__":
    main()
