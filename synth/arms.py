"""One arm of a proof: what it adds to the real scenes, how it is trained, what it finds on real images.

Every arm begins from one base net that never saw the rare class, takes equal optimiser steps, and has all the
real crops that *real only* has in each batch: synthetic crops are added, none of them in the last tenth. In
it the learning rate has all but ended, so the average forgets quickly what was before it, and the norms take
their statistics from real crops in the end: what is judged is a net of real images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.evaluate import padded_logits
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.metrics import BUCKETS, MIN_N, Tally
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.sampling import Sampler
from rollsight.inspect.scan import A_MIN_PX, decide
from rollsight.inspect.train import train
from rollsight.inspect.training_data import read_sources
from rollsight.synth.backgrounds import Backgrounds
from rollsight.synth.compose import Made, Order, make_data
from rollsight.synth.fit_recipe import FREE
from rollsight.synth.generator import Generator
from rollsight.synth.patches import class_value, read_scenes
from torch import nn

BASE_CROPS, RARE_CROPS = 6, 4  # of a batch: scenes without the class, and with it
UNTIL = 0.9  # share of the steps in which synthetic crops are drawn
SETTLING = 30  # batches of real crops that the norms take their statistics from in the end
SAMPLES = 480  # of a synthetic set: with 120 a crop of one came back 20 times in a run
OWN_STEEL = 0.4  # of them that lie on the draw's own scenes of the class: its marks belong on such steel
EVEN = 0.5  # threshold of the other classes, and of the rare one where val does not show it
CHOICES = (  # of the rare class; nets that learned from ten scenes again and again are sure of all they see
    *(0.1, 0.3, EVEN, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998),
    *(0.999, 0.9995, 0.9998, 0.9999, 0.99995, 0.99999),
)
RATIOS = (0.2, 0.5, 1.0)  # synthetic crops per real one
RATIO = 0.5

# Arm -> the methods whose samples it adds; those in GENERATORS are generators of their own. "degraded" has
# the starts of "free" without its editor: what that adds to them is the GAN's.
ARMS: dict[str, tuple[str, ...]] = {
    "real": (),
    "paste": ("paste",),
    "poisson": ("poisson",),
    "gan": ("gan",),
    "both": ("paste", "gan"),
    "whole": ("whole",),
    "no_contrast": ("no_contrast",),
    "free": ("free",),
    "degraded": ("degraded",),
    "paste_hard": ("paste_hard",),
    "free_hard": ("free_hard",),
    "pixel": ("pixel",),
    "paste_varied": ("paste_varied",),
    "gan_varied": ("gan_varied",),
}
WITHOUT_GAN = ("real", "paste", "poisson", "degraded", "paste_hard", "paste_varied")
HARD = "_hard"  # of a method: the samples that the draw's net of *real* finds hardest
VARIED = "_varied"  # of a method: its marks are varied VARIETY times as far
VARIETY = 2.0
GENERATORS: dict[str, dict[str, Any]] = {
    "gan": {},
    "whole": {"whole": True},
    "no_contrast": {"contrast_weight": 0.0},
    "free": {**FREE},
    "pixel": {**FREE, "per_pixel": True},
}

Choose = Callable[[Generator, Backgrounds, Order], Callable[[int], Made]]  # what makes sample i of an order

# Chosen on val by *real* of scratches, two draws of ten scenes: IoU 0.47 with a base of 1100 steps and 400 of
# an arm at 1e-3, 0.54 with a base of 4000, 0.61 with 800 steps on it, 0.62 with 400 at 3e-3, 0.64 with these.
# The shipped `fast`, which learned from all scenes, has 0.73.
FINE_TUNING = Recipe(
    net="fast",
    attention="none",
    steps=600,
    mosaic=1,
    focal_gamma=0.0,
    small_weight=0.0,
    learning_rate=3e-3,
    evaluate_every=200,
    ema_half_life=30,  # steps; the last tenth has 60
)
BASE = replace(FINE_TUNING, steps=4000, batch=12, learning_rate=2e-3, fewest=0, ema_half_life=100)


@dataclass(frozen=True, slots=True)
class Trained:
    """A net and the names of its classes."""

    net: nn.Module
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Those of the rare class, one for each figure."""

    px: float = EVEN  # IoU
    components: float = EVEN  # F1_H and alarms


def plain_method(method: str) -> str:
    """A method without what its samples are chosen or varied by."""
    return method.removesuffix(HARD).removesuffix(VARIED)


def generator_of(method: str) -> str:
    """The generator whose marks a method draws: plain pastes draw those of *gan*."""
    plain = plain_method(method)
    if plain in GENERATORS:
        return plain
    return "free" if plain == "degraded" else "gan"


def is_edited(method: str) -> bool:
    """Whether a method's samples are an editor's: then they depend on its fit."""
    return plain_method(method) in GENERATORS


def needs_generator(arm: str) -> set[str]:
    """Which fits an arm needs: names in GENERATORS. All arms but *real* need the marks, which *gan* holds."""
    if arm not in ARMS:
        raise UserError(f"arm {arm!r}: it must be one of {', '.join(ARMS)}", USAGE)
    return {generator_of(method) for method in ARMS[arm] if is_edited(method)}


def crops_of(sets: int, ratio: float) -> list[int]:
    """How many crops of each of so many synthetic sets a batch gets; UserError where one gets none."""
    if not 0 < ratio <= 2:
        raise UserError(f"ratio {ratio:g}: synthetic crops per real one, above 0 and up to 2", USAGE)
    real = BASE_CROPS + RARE_CROPS
    crops = round(ratio * real)
    if crops < sets:
        raise UserError(
            f"ratio {ratio:g}: {crops} synthetic crops beside {real} real ones, from {sets} sets: "
            f"give {sets / real:g} or more",
            USAGE,
        )
    return [crops // sets + (i < crops % sets) for i in range(sets)]


def base_net(
    base: LabelledData,
    rare: str,
    run: Path,
    recipe: Recipe = BASE,
    begin: Trained | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """The net that all arms begin from; its head for the rare class is not taken over by them."""
    init = None if begin is None else (begin.net, begin.classes)
    net = train([base], run, recipe, init=init, on_step=on_step)
    return Trained(net, tuple("(never seen)" if name == rare else name for name in base.classes))


def synthetic(
    method: str,
    generator: Generator,
    base: LabelledData,
    rare: LabelledData,
    folder: Path,
    *,
    seed: int,
    samples: int = SAMPLES,
    choose: Choose | None = None,
) -> LabelledData:
    """The labelled data of a method for a draw, made where it is not there yet.

    choose: what makes each sample, by default `make_sample`.
    All methods have the same steel: scenes of the base data, and for OWN_STEEL of the samples the draw's own
    scenes of the class, whose labelled px stay free.
    """
    if not folder.is_dir():
        drawn_by = "gan" if is_edited(method) else plain_method(method)
        steel = Backgrounds(read_scenes(base), [], base.classes, read_scenes(rare), OWN_STEEL)
        variety = VARIETY if VARIED in method else 1.0
        order = Order(seed=seed, method=drawn_by, variety=variety)
        make = choose(generator, steel, order) if choose else None
        make_data(generator, steel, order, samples, folder, make=make)
    return open_labels(folder)


def run_arm(
    base: LabelledData,
    rare: LabelledData,
    added: Sequence[LabelledData],
    init: Trained,
    run: Path,
    *,
    ratio: float = RATIO,
    recipe: Recipe = FINE_TUNING,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> nn.Module:
    """Fine-tune the base net on real scenes and what an arm adds, `ratio` synthetic crops per real one."""
    each = crops_of(len(added), ratio)
    net = train(
        [base, rare, *added],
        run,
        replace(recipe, batch=BASE_CROPS + RARE_CROPS + sum(each)),
        shares=[BASE_CROPS, RARE_CROPS, *each],
        until=[1.0, 1.0, *(UNTIL for _ in added)] if added else (),
        init=(init.net, init.classes),
        on_step=on_step,
    )
    return settled(net, base, rare, recipe)


def settled(net: nn.Module, base: LabelledData, rare: LabelledData, recipe: Recipe) -> nn.Module:
    """The net with the statistics of its norms taken anew: the mean over SETTLING batches of real crops.

    Their running mean would keep some of the synthetic crops, of which other arms have none. The crops are
    those after the last step's.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if recipe.frozen_norms or not norms:
        return net.eval()
    first = recipe.steps
    recipe = replace(recipe, batch=BASE_CROPS + RARE_CROPS, steps=first + SETTLING)
    sources = read_sources([base, rare], base.classes, recipe, [BASE_CROPS, RARE_CROPS], [])
    sampler = Sampler(sources, recipe)
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all, each the same
        norm.train()
    with torch.no_grad():
        for step in range(first, recipe.steps):
            net(sampler.batch(step).images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


def best_thresholds(net: nn.Module, data: LabelledData, rare: str) -> Thresholds:
    """The thresholds of the rare class with the highest IoU and F1_H on real images; the lowest of equals.

    Synthetic crops make the class more frequent, so nets of other arms are sure of it at other thresholds:
    one for all, or the plain argmax, would tell the arms' shares of the class apart, not what they learned.
    """
    tallies = _at_choices(net, data, rare)
    told = {choice: figures(counts(tally, tally, rare), rare) for choice, tally in tallies.items()}
    px, components = (max(CHOICES, key=lambda choice: told[choice][key] or 0.0) for key in ("iou", "f1_h"))
    return Thresholds(px, components)


def ladder(net: nn.Module, data: LabelledData, rare: str) -> list[dict[str, Any]]:
    """What a net finds at each of CHOICES where the images that hold the class cannot choose among them.

    data: one group that holds the class, or more, and groups without it. Each rung: `threshold`, and sums as
    `counts` has them by group: of the class and its sizes those of the groups that hold it, of the other
    classes those of all, alarms of the groups without it.
    """
    value = class_value(data.classes, rare, data.root)
    holding = {sample.group for sample in data.samples if (sample.read()[1] == value).any()}
    parts = (
        replace(data, samples=tuple(s for s in data.samples if (s.group in holding) is holds))
        for holds in (True, False)
    )
    pieces, others = (_at_choices(net, part, rare) for part in parts)
    rungs = []
    for choice in CHOICES:
        of, beside = (counts(tallies[choice], tallies[choice], rare) for tallies in (pieces, others))
        classes = {
            name: {
                key: sum(told) + (sum(beside["classes"][name][key]) if name != rare else 0)
                for key, told in sums.items()
            }
            for name, sums in of["classes"].items()
        }
        by_size = {
            size: {key: sum(told) for key, told in found.items()} for size, found in of["by_size"].items()
        }
        clean = {key: sum(told) for key, told in beside["clean"].items()}
        rungs.append({"threshold": choice, "classes": classes, "by_size": by_size, "clean": clean})
    return rungs


def _at_choices(net: nn.Module, data: LabelledData, rare: str) -> dict[float, Tally]:
    tallies = {choice: Tally(data.classes, A_MIN_PX) for choice in CHOICES}
    net.eval()
    for sample in data.samples:
        image, truth = sample.read()
        logits = net_logits(net, image)
        for choice, tally in tallies.items():
            found = _decided(logits, data, rare, choice)
            tally.add(truth, found, found, sample.group)
    return tallies


def _decided(
    logits: NDArray[np.float32], data: LabelledData, rare: str, threshold: float
) -> NDArray[np.uint8]:
    return decide(logits, tuple(threshold if name == rare else EVEN for name in data.classes))[0]


def judged(
    net: nn.Module, data: LabelledData, rare: str, thresholds: Thresholds | None = None
) -> dict[str, Any]:
    """What a net finds on real images: figures, and for paired intervals the `counts` by group.

    IoU is of the mask at one threshold, F1_H and alarms are of that at another, without components under
    A_MIN_PX, as in the table of a scan. Alarms of the class are counted on images without it.
    """
    thresholds = thresholds or Thresholds()
    whole, clean = (Tally(data.classes, A_MIN_PX) for _ in range(2))
    value = data.classes.index(rare) + 1
    net.eval()
    for sample in data.samples:
        image, truth = sample.read()
        logits = net_logits(net, image)
        pixels = _decided(logits, data, rare, thresholds.px)
        found = _decided(logits, data, rare, thresholds.components)
        whole.add(truth, pixels, found, sample.group)
        if not (truth == value).any():
            clean.add(truth, pixels, found, sample.group)
    told = counts(whole, clean, rare)
    return {"figures": figures(told, rare), "groups": list(whole.groups), "counts": told}


def figures(told: Mapping[str, Any], rare: str) -> dict[str, Any]:
    """Figures of what `counts` tells, of all classes and of the rare one by size; None where undefined."""
    total = {name: {key: int(np.sum(n)) for key, n in of.items()} for name, of in told["classes"].items()}
    iou = {name: of["both"] / of["either"] if of["either"] else None for name, of in total.items()}
    f1 = {name: _f1(of["found"], of["truth"], of["true"], of["predicted"]) for name, of in total.items()}
    alarms, area = (int(np.sum(told["clean"][key])) for key in ("alarms", "area"))
    by_size = {
        name: (int(np.sum(of["found"])), int(np.sum(of["truth"]))) for name, of in told["by_size"].items()
    }
    small = [by_size[name] for name in BUCKETS[:2]]
    by_size["tiny_small"] = (sum(found for found, _ in small), sum(n for _, n in small))
    return {
        "iou": iou[rare],
        "f1_h": f1[rare],
        "recall_by_size": {
            name: {"recall": found / n if n >= MIN_N else None, "n": n}
            for name, (found, n) in by_size.items()
        },
        "fa_per_mpx": alarms / (area / 1e6) if area else None,
        "iou_by_class": iou,
        "f1_h_by_class": f1,
    }


def counts(whole: Tally, clean: Tally, rare: str) -> dict[str, dict[str, Any]]:
    """Counts by group, lists of (G,): all that a result is judged on again, without its images.

    `classes`: of every class px in both and in either, components of the truth and those found, predicted
    ones and those that are true. `by_size`: of the rare class, truth and found of each size. `clean`: of
    images without the rare class, its false alarms and their px.
    """
    told, apart = whole.statistics(), clean.statistics()
    pixels, c = told["pixels"], whole.classes.index(rare)
    classes = {}
    for i, name in enumerate(whole.classes):
        both = pixels[:, i + 1, i + 1]
        either = pixels[:, i + 1, :].sum(axis=1) + pixels[:, :, i + 1].sum(axis=1) - both
        sums = {key: told[key][:, i].sum(axis=1).tolist() for key in ("truth", "found", "true", "predicted")}
        classes[name] = {"both": both.tolist(), "either": either.tolist(), **sums}
    rows = {group: row for row, group in enumerate(clean.groups)}
    alarms = [
        int((apart["predicted"][rows[g], c] - apart["true"][rows[g], c]).sum()) if g in rows else 0
        for g in whole.groups
    ]
    return {
        "classes": classes,
        "by_size": {
            size: {key: told[key][:, c, i].tolist() for key in ("truth", "found")}
            for i, size in enumerate(BUCKETS)
        },
        "clean": {
            "alarms": alarms,
            "area": [int(apart["area"][rows[g]]) if g in rows else 0 for g in whole.groups],
        },
    }


def _f1(found: int, truth: int, true: int, predicted: int) -> float | None:
    """Harmonic mean of recall and precision by match H; None where the truth holds nothing."""
    if not truth:
        return None
    recall, precision = found / truth, true / predicted if predicted else 0.0
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def net_logits(net: nn.Module, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """(K + 1, H, W) of an image (M, H, W), padded as `evaluate` pads it."""

    def engine(window: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = net(torch.from_numpy(window)[None])[0].numpy()
        return logits

    return padded_logits(engine, image)
