"""The trainings behind bench/nets.py and bench/small_object.py: a queue that goes on where it stopped.

    python bench/trainings.py --data DIR [--only PATTERN] [--threads 1] [--list]

Each training is a model in the plant build/trainings and, when it is judged, NAME.json (figures) and
NAME.npz (counts by group, for paired intervals) in bench/results/trainings, which is kept: what is there is
not repeated, on whatever machine. What was killed goes on at its last checkpoint, and several of these may
run at once: each takes what no other holds. Thresholds come from val at one false-alarm budget for all;
the test split is looked at once, at the end.
"""

import argparse
import fcntl
import fnmatch
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _counts import KEPT, save_counts
from rollsight.inspect.calibrate import fit_thresholds
from rollsight.inspect.engines import open_engine
from rollsight.inspect.evaluate import evaluate
from rollsight.inspect.labels import describe, open_labels
from rollsight.inspect.metrics import Tally, tiny_small_f1
from rollsight.inspect.models import CARD, SHIPPED, Model, open_model, update_card
from rollsight.inspect.nets import NETS
from rollsight.inspect.nets.attention import CBAM, Attention
from rollsight.inspect.nets.fast import WIDTHS, Fast
from rollsight.inspect.plant import Plant
from rollsight.inspect.roll_places import write_durably
from rollsight.inspect.tiles import CELL
from rollsight.inspect.train import Recipe
from rollsight.jobs.train_job import train_model
from torch import nn

HOME = Path(__file__).parent.parent / "build" / "trainings"
MINUTES = 20.0  # of one core, for each net: 1379 steps of the baseline, 36 epochs
# False alarms per Mpx, all classes together, 95 % upper limit on val. neu_clean has no clean image, and its
# alarms lie beside defects: of 15, 30, 60 and 120 the one with the highest F1 of tiny and small on val, of
# the plain `fast` net (0.58, 0.76, 0.86, 0.77; at 15 large defects fall to pieces). mt has 4.4 Mpx of clean
# val tiles, which can show 0.68 at best.
BUDGETS = {"neu_clean": 60.0, "mt": 1.5}
# Seconds of a step of 16 crops of 192 px, one thread, channels-last, bf16, with the making of the batch
# (measured 2026-11-24 on a core with AVX-512 bf16).
STEP_S = {"fcn": 0.71, "unet": 2.0, "unet_lite": 0.87, "deeplabv3plus": 0.8, "mobile": 0.32, "fast": 0.28}
# Of the arms: `fast` had val mIoU 0.63, 0.62, 0.63 after 600 steps of neu_clean at 0.002, 0.005 and 0.01.
LEARNING_RATE = 3e-3
# `fewest`: mt has rare classes, and all nets get the same.
PLAIN = Recipe(
    attention="none",
    crop_px=192,
    mosaic=2,  # the images are judged padded to 256 px: see DECISIONS.md
    learning_rate=LEARNING_RATE,
    fresh_rate=1.0,
    ema_half_life=30,
    focal_gamma=0.0,
    small_weight=0.0,
    fewest=0,
)
# Where the crops of a set are drawn. Most of a magnetic tile is clean: of crops drawn anywhere `fast` learned
# nothing (val mIoU below 0.01), nor did it from scratch of those of ARM_CROPS (0.01 after 600 steps). So its
# arms on mt begin from the arms of neu_clean. The nets have the crops that val liked best of five ways
# (unet_lite: val mIoU 0.402; see DECISIONS.md); the arms were run before that was known.
NET_CROPS: dict[str, dict[str, Any]] = {"neu_clean": {}, "mt": {"balanced": 0.2, "padded": True}}
ARM_CROPS: dict[str, dict[str, Any]] = {"neu_clean": {}, "mt": {"balanced": 0.4, "small_crops": 0.3}}
SMALL = {"small_weight": 0.5}
ARM_STEPS = 900  # of each arm of the claim: 23 epochs of neu_clean
SEEDS = range(5)
# What might make the claim true: crops around small defects, smaller crops (as many px), a weaker term, CBAM
# where a small defect is a few features wide; and, since blob loss came nearest (three seeds: +6.6 %, -1.8
# to +15.4), more of it, or with CBAM.
TRIES: dict[str, dict[str, Any]] = {
    "blob*2": {"instance": "blob", "instance_weight": 2 * PLAIN.instance_weight},
    "blob*4": {"instance": "blob", "instance_weight": 4 * PLAIN.instance_weight},
    "cbam+small+crops": {"attention": "cbam", **SMALL, "small_crops": 0.3},
    "cbam+small+128px": {"attention": "cbam", **SMALL, "crop_px": 128, "batch": 36},
    "cbam+small/5": {"attention": "cbam", "small_weight": SMALL["small_weight"] / 5},
    "cbam-at-4": {"net": "fast-cbam-at-4", "attention": "none"},
    "cbam+blob": {"attention": "cbam", "instance": "blob"},
}
# The two nets with the highest mIoU on val, once all of a set's are there: further seeds of these.
FINALISTS: dict[str, tuple[str, ...]] = {
    "neu_clean": ("deeplabv3plus", "unet_lite"),
    "mt": ("fcn", "unet_lite"),
}


class CbamAt4(Fast):
    """`fast` with CBAM at stride 4, before its head, in place of its decoder's entry at stride 16."""

    def __init__(self, classes: int, attention: Attention = "none") -> None:
        super().__init__(classes, attention)
        self.fuse_4 = nn.Sequential(self.fuse_4, CBAM(WIDTHS[1], CELL // 4))


def cbam_at_4(classes: int, attention: Attention = "none", pretrained: bool = False) -> CbamAt4:
    return CbamAt4(classes, attention)


NETS["fast-cbam-at-4"] = cbam_at_4


@dataclass(frozen=True, slots=True)
class Training:
    """One training of the queue."""

    name: str
    data: str  # folder of labelled data
    arm: str  # "net", or the arm of the claim
    recipe: Recipe
    begin: str = ""  # the training, or the shipped model, that it begins from


def queue() -> list[Training]:
    """All trainings, in the order in which they are wanted."""
    nets = {data: [_net(name, data, 0) for name in ("baseline", *STEP_S)] for data in BUDGETS}
    corners = [_arm(arm, "neu_clean", seed) for seed in SEEDS for arm in ("plain", "cbam+small")]
    sides = [_arm(arm, "neu_clean", seed) for seed in SEEDS for arm in ("cbam", "small")]
    on_mt = [_arm(arm, "mt", seed) for seed in range(3) for arm in ("plain", "cbam+small")]
    rivals = [_arm(arm, "neu_clean", seed) for seed in range(3) for arm in ("se", "eca", "blob", "cc_dice")]
    seeds = [
        _net(name, data, seed)
        for data in BUDGETS
        for name in ("baseline", *FINALISTS[data])
        for seed in (1, 2)
    ]
    tries = [_arm("blob", "neu_clean", seed) for seed in SEEDS[3:]]
    tries += [_arm(arm, "neu_clean", seed) for seed in range(3) for arm in TRIES]
    tries += [_arm("blob*2", "neu_clean", seed) for seed in SEEDS[3:]]
    tries += [_from_steel(0)]
    return [*nets["neu_clean"], *corners, *sides, *on_mt, *nets["mt"], *rivals, *seeds, *tries]


def _net(name: str, data: str, seed: int) -> Training:
    """A net for MINUTES, with CBAM and the small-object term; `baseline`: plain Lite0 U-Net, CE + Dice."""
    net = "unet_lite" if name == "baseline" else name
    recipe = replace(
        PLAIN,
        net=net,
        steps=round(MINUTES * 60 / STEP_S[net]),
        learning_rate=Recipe().learning_rate,
        fresh_rate=Recipe().fresh_rate,
        seed=seed,
        **NET_CROPS[data],
    )
    if name != "baseline":
        recipe = replace(recipe, attention="cbam", small_weight=0.1)
    return Training(f"{data}-{name}-{seed}", data, "net", recipe)


def _arm(arm: str, data: str, seed: int) -> Training:
    """An arm of the claim on the net `fast`."""
    recipe = replace(PLAIN, net="fast", steps=ARM_STEPS, seed=seed, mosaic=1, **ARM_CROPS[data])
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "cbam": {"attention": "cbam"},
        "small": SMALL,
        "cbam+small": {"attention": "cbam", **SMALL},
        "se": {"attention": "se"},
        "eca": {"attention": "eca"},
        "blob": {"instance": "blob"},
        "cc_dice": {"instance": "cc_dice"},
        **TRIES,
    }
    recipe = replace(recipe, **changes[arm])
    begin = "" if data == "neu_clean" else _arm_name(arm, "neu_clean", 0)
    return Training(_arm_name(arm, data, seed), data, arm, recipe, begin)


def _from_steel(seed: int) -> Training:
    """The shipped default taught on tiles: seven pieces show blowholes, and steel has dark spots too."""
    recipe = replace(PLAIN, net="unet_lite", attention="cbam", steps=500, seed=seed, mosaic=1)
    recipe = replace(recipe, **NET_CROPS["mt"])
    return Training(f"mt-unet_lite-from-steel-{seed}", "mt", "from_steel", recipe, "default")


def _arm_name(arm: str, data: str, seed: int) -> str:
    return f"{data}-arm-{arm.replace('+', '-').replace('/', '-by-').replace('*', '-times-')}-{seed}"


@contextmanager
def held(training: Training, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may work on the training: no other does, until the block ends."""
    HOME.mkdir(parents=True, exist_ok=True)
    path = HOME / f"{training.name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def named(name: str) -> Training:
    """The training of the queue with that name."""
    [found] = [training for training in queue() if training.name == name]
    return found


def kept_model(training: Training) -> Model | None:
    """The model of a training, if it is in the plant."""
    plant = Plant(HOME)
    return plant.model(training.name) if (plant.models / training.name / CARD).is_file() else None


def awaited(name: str, data: Path) -> Model:
    """The model of the training with that name, made where it is not there, or waited for."""
    training = named(name)
    with held(training, wait=True):
        return trained(training, data)


def trained(training: Training, data: Path) -> Model:
    """The model of a training, made where it is not in the plant."""
    if (model := kept_model(training)) is not None:
        return model
    plant, init = Plant(HOME), None
    if training.begin in SHIPPED:
        init = open_model(training.begin, HOME)
    elif training.begin:
        init = awaited(training.begin, data)
    told = [time.monotonic(), 0.0]

    def tell(step: int, terms: dict[str, float]) -> None:
        told[1] += 1
        if step % 50 == 0:
            seconds = (time.monotonic() - told[0]) / told[1]
            print(
                f"{training.name} {step}/{training.recipe.steps} {terms['loss']:.3f} {seconds:.2f} s",
                flush=True,
            )

    source = open_labels(data / training.data)
    return train_model(plant, training.name, [source], training.recipe, init=init, on_step=tell)


def work(training: Training, data: Path) -> dict[str, Any]:
    """Train, fit thresholds on val, judge on test; the figures, which are also written."""
    source = open_labels(data / training.data)
    model = trained(training, data)
    engine = open_engine(model)[1]
    val, test = source.of_split("val"), source.of_split("test")
    fitted = fit_thresholds(model, engine, val, budget_per_mpx=BUDGETS[training.data])
    model = update_card(model, **fitted.card(describe(val, "val")))
    tally = evaluate(model, engine, test)
    report, statistics = tally.report(), tally.statistics()
    save_counts(KEPT / f"{training.name}.npz", statistics)
    figures = {
        "name": training.name,
        "data": training.data,
        "arm": training.arm,
        "net": training.recipe.net,
        "attention": training.recipe.attention,
        "loss": training.recipe.loss,
        "seed": training.recipe.seed,
        "steps": training.recipe.steps,
        "params": sum(parameter.numel() for parameter in model.net().parameters()),
        "val_miou": fitted.tally.report()["pixel"]["miou"],
        "val_f1_tiny_small": _f1_tiny_small(fitted.tally),
        "miou": report["pixel"]["miou"],
        "f1_h": report["instance"]["f1_h"],
        "f1_tiny_small": _f1_tiny_small(tally),
        "recall_tiny_small": report["instance"]["recall_by_size"]["tiny_small"]["recall"],
        "fa_per_mpx": report["false_alarms"]["per_mpx"],
        "clean_alarms": report["false_alarms"]["clean_images"]["alarms"],
        "by_class": report["instance"]["by_class"],
        "begin": training.begin,
        "recipe": asdict(training.recipe),
    }
    write_durably(KEPT / f"{training.name}.json", json.dumps(figures, indent=1).encode())
    return figures


def _f1_tiny_small(tally: Tally) -> float:
    return float(tiny_small_f1({key: table.sum(axis=0) for key, table in tally.statistics().items()}))


def done(training: Training) -> dict[str, Any] | None:
    """The figures of a training that is judged, of this recipe; None where there are none yet."""
    path = KEPT / f"{training.name}.json"
    if not path.is_file():
        return None
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {**asdict(Recipe()), **figures["recipe"]}  # what came since was as it is by default
    if kept != asdict(training.recipe):
        raise SystemExit(f"{path}: made with another recipe: remove it and its model, or keep the recipe")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ROLLSIGHT_DATA", "../shared/data"))
    parser.add_argument("--only", default="*", help="names to take, with * and ?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="tell what is done and what is not")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    KEPT.mkdir(parents=True, exist_ok=True)
    chosen = [training for training in queue() if fnmatch.fnmatch(training.name, asked.only)]
    if asked.list:
        for training in chosen:
            figures = done(training)
            print(
                training.name,
                "-" if figures is None else f"val {figures['val_miou']:.3f} test {figures['miou']:.3f}",
            )
        return
    for training in chosen:
        with held(training) as mine:
            if mine and done(training) is None:
                figures = work(training, asked.data)
                print(training.name, {key: figures[key] for key in ("val_miou", "miou", "f1_h")}, flush=True)


if __name__ == "__main__":
    main()
