"""Labelled data and clean steel in, a generator of one rare class out."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import LabelledData, describe, is_rolls
from rollsight.synth.adversarial import STATE, Adversary, fit, read_state
from rollsight.synth.fit_recipe import FitRecipe
from rollsight.synth.generator import WEIGHTS, Generator, recipe_json, save_generator, unfinished
from rollsight.synth.generic import Generic
from rollsight.synth.made_outlines import learn_outlines
from rollsight.synth.mask_bank import marks_of
from rollsight.synth.mask_gan import OutlineRecipe
from rollsight.synth.patch_batches import PatchSampler
from rollsight.synth.patches import PixelMm, Scene, class_value, held_groups, read_scenes
from rollsight.synth.sample_sheet import SHEET, draw_sheet

FEWEST = 30  # components of a class, as in `inspect train`; with fewer it is not learned from scratch alone


@dataclass(frozen=True, slots=True)
class FitData:
    """What a fit learns from."""

    data: LabelledData  # the train split
    scenes: list[Scene]
    defect_class: str
    classes: tuple[str, ...]  # learned: the rare one, and others that help
    held: tuple[str, ...]  # groups of val and test
    components: int  # of the rare class, 2 px or wider
    note: str  # what was decided for want of samples, "" where nothing was
    from_generic: bool = False  # too few, so that it shall begin from the generic generator


def fit_data(
    labels: LabelledData,
    defect_class: str,
    *,
    alone: bool = False,
    begun: bool = False,
    generic: bool = False,
    fewest: int = FEWEST,
    mm: PixelMm | None = None,
) -> FitData:
    """What a class is learned from: the train split of `labels`, with the other classes unless `alone`.

    begun: the fit goes on from another generator. generic: it may begin from the generic one, which it shall
    with fewer than `fewest` components. mm: of a px of image files, if known. UserError for an unknown class,
    one without any component of 2 px, or one with fewer than `fewest` to learn it alone and from scratch.
    """
    value = class_value(labels.classes, defect_class, labels.root)
    data = labels if is_rolls(labels) else labels.of_split("train")
    scenes = read_scenes(data, mm)
    marks = marks_of(scenes, labels.classes)
    counts = {name: sum(mark.defect_class == name for mark in marks) for name in labels.classes}
    if not counts[defect_class]:
        holding = sum(bool((scene.mask == value).any()) for scene in scenes)
        raise UserError(
            f"class {defect_class!r}: {holding} train images hold it and no component is 2 px or wider: "
            "label some"
        )
    classes = tuple(n for n in labels.classes if n == defect_class or (counts[n] and not alone))
    note = ""
    if counts[defect_class] < fewest:
        few = f"class {defect_class!r}: {counts[defect_class]} components, {fewest} are needed from scratch"
        if len(classes) == 1 and not begun and not generic:
            leave = "leave --alone out, so that other classes help" if alone else "label other classes too"
            raise UserError(
                f"{few}: {leave}, or begin from a generator: --init NAME, or for cpu-64 without "
                "--from-scratch the one that comes with the package",
                USAGE,
            )
        if generic and not begun:
            note = f"{few}: begins from the generic generator that comes with the package"
        else:
            help_from = "the generator given" if begun else f"{len(classes) - 1} other classes"
            note = f"{few}: learned with the help of {help_from}"
    return FitData(
        data,
        scenes,
        defect_class,
        classes,
        tuple(held_groups(labels)),
        counts[defect_class],
        note,
        generic and not begun and counts[defect_class] < fewest,
    )


def fit_generator(
    found: FitData,
    folder: Path,
    recipe: FitRecipe,
    *,
    backgrounds: Sequence[Scene] = (),
    init: Generator | Generic | None = None,
    outlines: OutlineRecipe | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_outline: Callable[[int, dict[str, float]], None] | None = None,
    stop_after: int | None = None,
) -> Generator | None:
    """Fit a generator and put it into `folder`; None where `stop_after` ended it before its last step.

    outlines: fit a mask GAN too, where the class has marks enough for one; None: the bank alone.
    The run lies in a hidden folder beside it until it is complete: checkpoint, curve, one sheet of samples
    per checkpoint. Interrupted, the same call goes on bit by bit. UserError where `folder` exists.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --name", USAGE)
    run = unfinished(folder)
    sampler = PatchSampler(
        found.scenes,
        found.data.classes,
        found.classes,
        rare=found.defect_class,
        rare_share=recipe.rare_share,
        elsewhere=recipe.elsewhere,
        degraded=recipe.degraded,
        size_px=recipe.size_px,
        batch=recipe.batch,
        seed=recipe.seed,
        backgrounds=backgrounds,
    )
    adversary = Adversary(recipe, found.classes)
    if init is not None:
        parts, _ = read_state(init.folder / WEIGHTS)
        adversary.begin_from(parts, init.card.classes)
    identity = {
        "recipe": recipe_json(recipe),
        "class": found.defect_class,
        "classes": list(found.classes),
        "data": found.data.digest(),
        "backgrounds": [
            [scene.name, hashlib.sha256(scene.image.tobytes() + scene.mask.tobytes()).hexdigest()]
            for scene in backgrounds
        ],
        "init": init.hash if init is not None else "",
    }

    def stage(step: int) -> None:
        draw_sheet(adversary, sampler, run / SHEET.format(step=step))

    fit(adversary, sampler, run, identity, on_step=on_step, on_stage=stage, stop_after=stop_after)
    if adversary.control.step < recipe.steps:
        return None
    value = found.data.classes.index(found.defect_class) + 1
    control = adversary.control
    described = describe(found.data, "train")
    del described["group_names"]  # hundreds; the digest names the data, the marks name their groups
    card: dict[str, Any] = {
        "name": folder.name,
        "defect_class": found.defect_class,
        "classes": found.classes,
        "data_classes": found.data.classes,
        "recipe": recipe_json(recipe),
        "fitted_on": described,
        "held_groups": found.held,
        "scenes": sum(bool((scene.mask == value).any()) for scene in found.scenes),
        "components": found.components,
        "fit": {
            "gamma": control.gamma,
            "chance": control.chance,
            "gap": control.gap,
            "overfit": control.overfit,
        },
        "begun_from": init.hash if init is not None else "",
        "code_version": version("rollsight"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rare = [
        mark for mark in marks_of(found.scenes, found.data.classes) if mark.defect_class == found.defect_class
    ]
    made, card["outlines"] = learn_outlines(rare, outlines or OutlineRecipe(steps=0), on_step=on_outline)
    return save_generator(folder, run / STATE, rare, card, run, made)
