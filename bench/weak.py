"""Claim: how much of the fully supervised mIoU image labels give, and image labels with a tenth of the masks.

Four trainings of the net `fast` by the recipe of the claim's arms (bench/trainings.py) on the train scenes of
`neu_clean`: all masks, which is their arm `plain`; image labels alone; image labels and a tenth of the masks;
that tenth alone. The pooling's sharpness is chosen on val, by the pseudo-masks it gives there; test is looked
at once for each net. Nets lie in --work and their figures in results/weak: the same command goes on where it
stopped.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import RESULTS, write_result
from rollsight.inspect.evaluate import padded_logits
from rollsight.inspect.labels import IGNORE, LabelledData, open_labels
from rollsight.inspect.metrics import Tally
from rollsight.inspect.train import train
from rollsight.inspect.weak import WeakData, learn, open_weak, pseudo_mask, write_pseudo
from torch import nn
from trainings import ARM_STEPS, Training, done, named

ARMS = ("all_masks", "image_labels", "labels_and_tenth", "tenth_alone")
SHARPNESS = (1.0, 4.0)
TENTH = 10
KEPT = RESULTS / "weak"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data = Path(os.environ.get("ROLLSIGHT_DATA", "../shared/data")) / "neu_clean"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--work", type=Path, default=Path("build/weak"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weak-steps", type=int, default=600, help="of the net that makes the pseudo-masks")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root: Path = options.work / str(options.weak_steps)
    root.mkdir(parents=True, exist_ok=True)
    whole = open_weak(options.data)
    held = {split: open_labels(options.data).of_split(split) for split in ("train", "val", "test")}

    KEPT.mkdir(parents=True, exist_ok=True)

    def judge_sharpness(r: float) -> dict[str, float]:
        net = taught(with_masks(whole, 0, seed=0), root, "image_labels", 0, r, options.weak_steps)
        return {"miou": of_pseudo(net, whole.of_split("val"))}

    def judge(arm: str, seed: int) -> dict[str, float]:
        if arm == "all_masks":
            return with_all_masks(seed)
        net = segmenter(arm, seed, whole, held["train"], root, options, sharpness)
        return {"val": of_net(net, held["val"]), "test": of_net(net, held["test"])}

    of_val = {
        r: kept(f"{options.weak_steps}-sharpness-{r:g}", partial(judge_sharpness, r))["miou"]
        for r in SHARPNESS
    }
    sharpness = max(SHARPNESS, key=lambda r: of_val[r])
    figures: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm in ARMS:
            figures[arm].append(kept(f"{options.weak_steps}-{arm}-{seed}", partial(judge, arm, seed)))
            print(seed, arm, figures[arm][-1], flush=True)
    full = np.array([found["test"] for found in figures["all_masks"]])
    result = {}
    for arm in ARMS:
        test = np.array([found["test"] for found in figures[arm]])
        result[arm] = {
            "test_miou": test.tolist(),
            "val_miou": [found["val"] for found in figures[arm]],
            "mean": float(test.mean()),
            "share_of_all_masks": float(test.mean() / full.mean()),
            "share_by_seed": (test / full).tolist(),
        }
    write_result(
        "weak",
        {
            "data": "neu_clean",
            "images": {split: len(source.samples) for split, source in held.items()},
            "masks_of_a_tenth": -(-len(held["train"].samples) // TENTH),
            "steps": ARM_STEPS,
            "weak_steps": options.weak_steps,
            "seeds": options.seeds,
            "sharpness": {"val_miou_of_pseudo_masks": {str(r): v for r, v in of_val.items()}},
            "sharpness_chosen": sharpness,
            **result,
        },
        seed=0,
    )
    print(json.dumps(result, indent=1))


def kept(name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures of that name, or what is made and put there."""
    path = KEPT / f"{name}.json"
    if not path.is_file():
        made = make()
        path.with_suffix(".tmp").write_text(json.dumps(made) + "\n")
        path.with_suffix(".tmp").replace(path)
    found: dict[str, float] = json.loads(path.read_text())
    return found


def with_masks(data: WeakData, every: int, seed: int) -> WeakData:
    """The same data with the masks of one training image in `every` left, by chance; 0: of none."""
    train_at = [i for i, sample in enumerate(data.samples) if sample.split == "train"]
    count = -(-len(train_at) // every) if every else 0
    left = set(np.random.default_rng(seed).permutation(train_at)[:count].tolist())
    samples = (
        replace(sample, mask=None) if sample.split == "train" and i not in left else sample
        for i, sample in enumerate(data.samples)
    )
    return WeakData(data.root, data.classes, tuple(samples))


def taught(data: WeakData, root: Path, arm: str, seed: int, sharpness: float, steps: int) -> nn.Module:
    """The net of the first stage; its checkpoint is its result, so asked again it is read."""
    run = root / f"learned-{arm}-{sharpness:g}-{seed}"
    return learn(data.of_split("train"), run, steps=steps, seed=seed, sharpness=sharpness)


def of_pseudo(net: nn.Module, data: WeakData) -> float:
    """mIoU of pseudo-masks from image labels against the masks there are; what they ignore is missed."""
    tally = Tally(data.classes)
    for sample in data.samples:
        image, truth = sample.read()
        assert truth is not None  # of val all have one
        found = pseudo_mask(net, image, sample.present, calibrated=False)
        found[found == IGNORE] = 0
        tally.add(truth, found, found, sample.group)
    return float(tally.report()["pixel"]["miou"])


def segmenter(
    arm: str,
    seed: int,
    whole: WeakData,
    masks: LabelledData,
    root: Path,
    options: argparse.Namespace,
    sharpness: float,
) -> nn.Module:
    """The net of an arm, trained by the recipe of `all_masks` on what the arm may see."""
    data = with_masks(whole, 0 if arm == "image_labels" else TENTH, seed)
    left = {sample.image for sample in data.of_split("train").samples if sample.mask is not None}
    sources: Sequence[LabelledData]
    if arm == "tenth_alone":
        sources = [only(masks, left)]
    else:
        net = taught(data, root, arm, seed, sharpness, options.weak_steps)
        out = root / f"masks-{arm}-{seed}"
        if not out.is_dir():
            write_pseudo(net, data, out, f"{options.weak_steps} steps, seed {seed}")
        sources = [open_labels(out).of_split("train")]
        if left:  # real masks are a tenth of the images and half of each batch
            sources = [*sources, only(masks, left)]
    net = train(sources, root / f"trained-{arm}-{seed}", plain(seed).recipe)
    if arm != "tenth_alone":
        shutil.rmtree(root / f"masks-{arm}-{seed}")
    return net


def plain(seed: int) -> Training:
    """The training of the claim's arm `plain`."""
    return named(f"neu_clean-arm-plain-{seed}")


def with_all_masks(seed: int) -> dict[str, float]:
    """mIoU with all masks: the arm `plain`."""
    figures = done(plain(seed))
    if figures is None:
        raise SystemExit(f"{plain(seed).name} has not been trained: python bench/trainings.py does so")
    return {"val": figures["val_miou"], "test": figures["miou"]}


def only(data: LabelledData, images: set[Path]) -> LabelledData:
    return LabelledData(data.root, data.classes, tuple(s for s in data.samples if s.image in images))


def of_net(net: nn.Module, data: LabelledData) -> float:
    """mIoU of the plain argmax, pooled over the images."""

    def engine(window: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(np.ascontiguousarray(window))[None])[0].numpy()  # type: ignore[no-any-return]

    tally = Tally(data.classes)
    for sample in data.samples:
        image, truth = sample.read()
        argmax = padded_logits(engine, image).argmax(axis=0).astype(np.uint8)
        tally.add(truth, argmax, argmax, sample.group)
    return float(tally.report()["pixel"]["miou"])


if __name__ == "__main__":
    main()
