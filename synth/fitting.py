"""Labelled data and clean steel in, a generator of one rare class out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import LabelledData, describe, is_rolls
from rollsight.synth.adversarial import STATE, Adversary, fit, read_state
from rollsight.synth.fit_recipe import FitRecipe
from rollsight.synth.gan import LATENT
from rollsight.synth.generator import WEIGHTS, Generator, recipe_json, save_generator
from rollsight.synth.mask_bank import marks_of
from rollsight.synth.patch_batches import PatchSampler
from rollsight.synth.patches import PixelMm, Scene, class_value, held_groups, read_scenes
from torch import Tensor

FEWEST = 30  # components of a class without which nothing is learned from scratch on it alone
SHEET = "samples-{step:06d}.png"
SHEET_PATCHES = 10
SHEET_BATCH = 1_000_003  # its number: no step of a fit comes so far


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


def fit_data(
    labels: LabelledData,
    defect_class: str,
    *,
    alone: bool = False,
    begun: bool = False,
    fewest: int = FEWEST,
    mm: PixelMm | None = None,
) -> FitData:
    """What a class is learned from: the train split of `labels`, with the other classes unless `alone`.

    begun: the fit goes on from another generator. mm: of a px of image files, if known. UserError for an
    unknown class, one without any component of 2 px, or one with fewer than `fewest` to learn it alone and
    from scratch.
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
        if len(classes) == 1 and not begun:
            raise UserError(f"{few}: leave --alone out, so that other classes help, or give --init", USAGE)
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
    )


def fit_generator(
    found: FitData,
    folder: Path,
    recipe: FitRecipe,
    *,
    backgrounds: Sequence[Scene] = (),
    init: Generator | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop_after: int | None = None,
) -> Generator | None:
    """Fit a generator and put it into `folder`; None where `stop_after` ended it before its last step.

    The run lies in a hidden folder beside it until it is complete: checkpoint, curve, one sheet of samples
    per checkpoint. Interrupted, the same call goes on bit by bit. UserError where `folder` exists.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --name", USAGE)
    run = folder.with_name(f".{folder.name}.fit")
    sampler = PatchSampler(
        found.scenes,
        found.data.classes,
        found.classes,
        rare=found.defect_class,
        rare_share=recipe.rare_share,
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
        "backgrounds": [scene.name for scene in backgrounds],
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
    return save_generator(folder, run / STATE, rare, card, run)


def draw_sheet(adversary: Adversary, sampler: PatchSampler, path: Path) -> None:
    """A PNG of rows: pastes, two edits of each, their masks, real patches of the same classes."""
    batches = [sampler.batch(SHEET_BATCH + i) for i in range(-(-SHEET_PATCHES // sampler.n))]
    planes: list[Tensor] = [
        torch.cat([getattr(batch, name) for batch in batches])[:SHEET_PATCHES]
        for name in ("start", "mask", "real")
    ]
    start, mask, real = planes
    classes = torch.cat([batch.classes for batch in batches])[:SHEET_PATCHES]
    draws = torch.Generator().manual_seed(SHEET_BATCH)
    edits = []
    with torch.no_grad():
        for _ in range(2):
            noise = torch.randn(start.shape, generator=draws)
            latent = torch.randn(len(start), LATENT, generator=draws)
            inputs = (t.to(adversary.device) for t in (start, mask, noise, latent, classes))
            edits.append(adversary.average(*inputs).cpu())
    rows: list[NDArray[np.float32]] = [
        np.hstack([np.pad(patch[0], 1) for patch in row.numpy()]) for row in (start, *edits, mask, real)
    ]
    sheet = np.round(np.vstack(rows) * 255).astype(np.uint8)
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(
        path
    )
