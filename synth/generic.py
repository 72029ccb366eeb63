"""A generator of many classes that a fit of a rare one begins from; one is shipped with the package.

It has no marks, so no image that it learned from is in it: it makes nothing before a class is fitted from it.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from rollsight.inspect.checkpoints import save_tensors
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labelled_folder import whole_folder
from rollsight.inspect.labels import IGNORE, LabelledData, describe, is_rolls
from rollsight.synth.adversarial import STATE, Adversary, fit, read_state
from rollsight.synth.backgrounds import Backgrounds
from rollsight.synth.compose import Order, make_data
from rollsight.synth.features import COPY_RATIO, Features, kid
from rollsight.synth.fit_recipe import FitRecipe
from rollsight.synth.gan import Editor
from rollsight.synth.generator import (
    CARD,
    WEIGHTS,
    Generator,
    GeneratorCard,
    keep_fitting,
    open_generator,
    read_editor,
    recipe_json,
    recipe_of,
    sha,
)
from rollsight.synth.mask_bank import MaskBank, marks_of
from rollsight.synth.patch_batches import PatchSampler
from rollsight.synth.patches import Scene, read_scenes
from rollsight.synth.realism import check_set, held_scenes, made_crops
from rollsight.synth.sample_sheet import SHEET, draw_sheet

SHIPPED = Path(__file__).parent / "default_generator"
README = "README.md"
SAMPLES = 60  # of each class that its figures are of
FEWEST_HELD = 10  # components of a class in val without which nothing is said of it


class GenericCard(BaseModel):
    """What a generic generator is, what it learned from and how near its defects come to held-out ones."""

    model_config = ConfigDict(extra="forbid")

    name: str
    classes: tuple[str, ...]  # learned, in the order of the nets
    left_out: dict[str, str]  # classes of the data that are not, and why
    recipe: dict[str, Any]
    weights: str  # SHA-256
    trained_on: tuple[dict[str, Any], ...]  # `labels.describe` of each source
    components: dict[str, int]  # of each class
    fit: dict[str, float]  # the last figures of the controller
    checks: tuple[dict[str, Any], ...]  # of each class, what `inspect synth check` finds
    unchecked: dict[str, str] = {}  # classes of which it finds nothing although val has them, and why
    notes: tuple[str, ...]
    code_version: str
    created_at: str


@dataclass(frozen=True, slots=True)
class Generic:
    """A generic generator as a fit begins from it."""

    folder: Path
    card: GenericCard

    @property
    def hash(self) -> str:
        return self.card.weights


@dataclass(frozen=True, slots=True)
class GenericData:
    """What a generic generator learns from: the train splits of several data sets, classes joined by name."""

    sources: tuple[LabelledData, ...]  # whole, with val and test
    learned: tuple[LabelledData, ...]  # their train splits
    scenes: list[Scene]  # masks in `classes`
    classes: tuple[str, ...]  # of all sources
    taken: tuple[str, ...]  # of these, those that are learned
    counts: dict[str, int]  # components, 2 px or wider
    left_out: dict[str, str]  # class and why


def generic_data(sources: Sequence[LabelledData], size_px: int) -> GenericData:
    """The scenes of the sources' train splits, and the classes that patches of `size_px` can teach.

    A class whose usual component is larger than a patch is left out: the discriminator would see its inside
    alone. UserError where no class is left.
    """
    classes = tuple(dict.fromkeys(name for data in sources for name in data.classes))
    learned = tuple(data if is_rolls(data) else data.of_split("train") for data in sources)
    for data in sources:
        held_scenes(data)  # which the checks read after the fit: a broken one is told before it
    scenes = []
    for number, data in enumerate(learned):
        values = np.zeros(256, dtype=np.uint8)
        values[IGNORE] = IGNORE
        values[1 : len(data.classes) + 1] = [classes.index(name) + 1 for name in data.classes]
        scenes += [
            Scene(
                scene.image,
                values[scene.mask],
                f"{number}/{scene.name}",
                f"{number}/{scene.group}",
                seen=scene.seen,
            )
            for scene in read_scenes(data)
        ]
    marks = marks_of(scenes, classes)
    sides = {name: [m.inside.sum() ** 0.5 for m in marks if m.defect_class == name] for name in classes}
    left_out = {name: "no component is 2 px or wider" for name, of in sides.items() if not of}
    for name, of in sides.items():
        if of and np.median(of) >= size_px:
            left_out[name] = f"half of its components cover more than a patch of {size_px} px"
    taken = tuple(name for name in classes if name not in left_out)
    if not taken:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"no class to learn from ({why}): give other --labels", USAGE)
    return GenericData(
        tuple(sources), learned, scenes, classes, taken, {n: len(of) for n, of in sides.items()}, left_out
    )


def fit_generic(
    found: GenericData,
    run: Path,
    recipe: FitRecipe,
    *,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop_after: int | None = None,
) -> Adversary:
    """Fit in the folder `run`, all classes alike; gone on with, bit by bit, where it was interrupted."""
    recipe = replace(recipe, rare_share=1 / len(found.taken), elsewhere=0.0)
    sampler = PatchSampler(
        found.scenes,
        found.classes,
        found.taken,
        rare=found.taken[0],
        rare_share=recipe.rare_share,
        degraded=recipe.degraded,
        size_px=recipe.size_px,
        batch=recipe.batch,
        seed=recipe.seed,
    )
    adversary = Adversary(recipe, found.taken)
    identity = {
        "recipe": recipe_json(recipe),
        "generic": list(found.taken),
        "data": [data.digest() for data in found.learned],
    }

    def stage(step: int) -> None:
        draw_sheet(adversary, sampler, run / SHEET.format(step=step))

    fit(adversary, sampler, run, identity, on_step=on_step, on_stage=stage, stop_after=stop_after)
    return adversary


def save_generic(
    folder: Path,
    found: GenericData,
    adversary: Adversary,
    run: Path,
    notes: Sequence[str] = (),
    *,
    samples: int = SAMPLES,
    on_class: Callable[[str], None] | None = None,
) -> Generic:
    """Check `samples` of each class and write the generic generator `folder`: all of it or nothing.

    The sheets of samples and the curve of the fit's folder `run`, which is then removed, go to `fitting/`:
    they show images of the data, so they are no part of what is shipped.
    """
    parts, _ = read_state(run / STATE)
    control = adversary.control
    with whole_folder(folder) as staging:
        weights = {f"{part}/{key}": t for part in ("average", "judge") for key, t in parts[part].items()}
        save_tensors(staging / WEIGHTS, weights, {})
        told: dict[str, Any] = {
            "name": folder.name,
            "classes": found.taken,
            "left_out": found.left_out,
            "recipe": recipe_json(adversary.recipe),
            "weights": sha(staging / WEIGHTS),
            "trained_on": [describe(data, "train") for data in found.learned],
            "components": found.counts,
            "fit": {name: getattr(control, name) for name in ("gamma", "chance", "gap", "overfit")},
            "notes": tuple(notes),
            "code_version": version("rollsight"),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        for source in told["trained_on"]:
            del source["group_names"]  # hundreds; the digest names the data
        editor = adversary.average.cpu().eval()
        told["checks"], told["unchecked"] = _checks(found, editor, told, samples, on_class)
        card = GenericCard(**told)
        (staging / CARD).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (staging / README).write_text(_readme(card), encoding="utf-8")
        keep_fitting(run, staging)
    shutil.rmtree(run)
    return open_generic(folder)


def open_generic(folder: Path) -> Generic:
    """The generic generator in a folder; UserError where it is none, damaged, or its files do not belong."""
    if not (folder / CARD).is_file():
        raise UserError(f"{folder}: no generic generator: make one with `inspect synth generic`")
    try:
        card = GenericCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
        recipe = recipe_of(card.recipe)
    except (ValidationError, ValueError, TypeError, KeyError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{folder / CARD}: not the card of a generic generator: {line}") from None
    if not (folder / WEIGHTS).is_file() or sha(folder / WEIGHTS) != card.weights:
        raise UserError(
            f"{folder / WEIGHTS}: missing or not the file its card names: make it or install again"
        )
    read_editor(folder / WEIGHTS, len(card.classes), recipe)  # which says what is wrong
    return Generic(folder, card)


def shipped() -> Generic | None:
    """The generic generator that comes with the package; None where it was built without one."""
    return open_generic(SHIPPED) if SHIPPED.is_dir() else None


def open_start(folder: Path) -> Generator | Generic:
    """What a fit may begin from: another class's generator, or a generic one."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return open_generator(folder)  # which says what is wrong
    return open_generic(folder) if "trained_on" in card else open_generator(folder)


def suits(generic: Generic, recipe: FitRecipe) -> bool:
    """Whether a fit with that recipe can begin from the generic generator: it has the same nets."""
    own = recipe_of(generic.card.recipe)
    names = ("size_px", "editor", "judge", "whole")
    return all(getattr(own, name) == getattr(recipe, name) for name in names)


def _checks(
    found: GenericData,
    editor: Editor,
    told: dict[str, Any],
    samples: int,
    on_class: Callable[[str], None] | None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What `inspect synth check` finds of each class that val has enough of, in each source that has it.

    And of which class nothing could be made, and why: no reason to lose the fit.
    """
    checks, unchecked = [], {}
    for source, learned in zip(found.sources, found.learned, strict=True):
        if is_rolls(source):
            continue  # no val
        scenes = read_scenes(learned)
        marks = marks_of(scenes, source.classes)
        held = [mark.defect_class for mark in marks_of(held_scenes(source), source.classes)]
        for name in source.classes:
            if name not in found.taken or held.count(name) < FEWEST_HELD:
                continue
            card = GeneratorCard(
                name=told["name"],
                defect_class=name,
                classes=found.taken,
                data_classes=source.classes,
                recipe=told["recipe"],
                weights=told["weights"],
                marks="",
                fitted_on={"source": source.root.name},
                held_groups=(),
                scenes=len(scenes),
                components=found.counts[name],
                fit=told["fit"],
                code_version=told["code_version"],
                created_at=told["created_at"],
            )
            made_by = Generator(Path(told["name"]), card, editor, MaskBank(marks, name))
            with tempfile.TemporaryDirectory() as run:
                steel = Backgrounds(scenes, [], source.classes)
                try:
                    checks.append(_check(made_by, steel, source, samples, Path(run)))
                except UserError as fault:
                    unchecked[name] = str(fault)
            if on_class is not None:
                on_class(name)
    return checks, unchecked


def _check(
    made_by: Generator, steel: Backgrounds, source: LabelledData, samples: int, run: Path
) -> dict[str, Any]:
    """Figures of samples of one class, beside those of plain pastes of the same marks at the same places."""
    for method in ("gan", "paste"):
        make_data(made_by, steel, Order(0, method), samples, run / method)
    check = check_set(run / "gan", source, run, steps=0)
    features, figures = Features(), check.figures
    pasted = kid(features(made_crops(run / "paste")), features(check.real))
    nothing = {"mean": None, "spread": None}  # where a source has no clean window, or all is dropped
    return {
        "source": source.root.name,
        "class": made_by.card.defect_class,
        "split": "val",
        "samples": samples,
        "kept": figures["kept"],
        "held": len(check.real),
        "made": figures["kid"].get("made", nothing),
        "paste": {"mean": pasted[0], "spread": pasted[1]},
        "floor": figures["kid"].get("real, the floor", nothing),
        "ceiling": figures["kid"].get("clean, the ceiling", nothing),
        "nearest_ratio": figures["nearest_ratio"],
        "nearest_alarm": figures["nearest_alarm"],
    }


def _readme(card: GenericCard) -> str:
    """The card for people."""
    lines = [f"# Generic generator {card.name}", ""]
    lines += [f"What a fit of a rare class begins from. Classes: {', '.join(card.classes)}.", ""]
    lines += [f"- {note}" for note in card.notes]
    lines += [f"- Not learned: {name}, {why}." for name, why in card.left_out.items()]
    lines += ["- It has no marks: none of the images that it learned from is in it.", "", "## Trained on", ""]
    for source in card.trained_on:
        lines.append(
            f"- {source['source']} ({source['split']}): {source['images']} images, {source['groups']} groups"
        )
    lines += ["", "| class | components |", "|---|---|"]
    lines += [f"| {name} | {card.components[name]} |" for name in card.classes]
    samples = max((check["samples"] for check in card.checks), default=0)
    lines += ["", "## How near its defects come to held-out ones", ""]
    lines += [
        "KID on features of EfficientNet-Lite0 over crops of val, as `inspect synth check` gives it, "
        f"of {samples} samples of each class: mean ± spread over subsets, smaller is nearer. It is an alarm, "
        "no proof that they help. Floor: real ones of train; ceiling: clean steel; paste: the same marks "
        "without the net. Nearest: distance of made ones to the nearest training defect over that of "
        f"held-out ones, alarm below {COPY_RATIO}.",
        "",
        "| data | class | made | paste | floor | ceiling | nearest | held crops |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for check in card.checks:
        kids = " | ".join(_told(check[name]) for name in ("made", "paste", "floor", "ceiling"))
        ratio = check["nearest_ratio"]
        nearest = "-" if ratio is None else f"{ratio:.2f}" + (" (alarm)" if ratio < COPY_RATIO else "")
        lines.append(f"| {check['source']} | {check['class']} | {kids} | {nearest} | {check['held']} |")
    lines += [""] if card.unchecked else []
    lines += [f"No figures of {name}: {why}." for name, why in card.unchecked.items()]
    told = {check["class"] for check in card.checks} | card.unchecked.keys()
    unsaid = [n for n in card.classes if n not in told]
    if unsaid:
        lines += ["", f"Too few in val for figures: {', '.join(unsaid)}."]
    lines += ["", "## Recipe", "", "```json", json.dumps(card.recipe, indent=1), "```", ""]
    lines.append(f"Made {card.created_at}, code {card.code_version}, weights {card.weights[:16]}.")
    return "\n".join(lines) + "\n"


def _told(kid: dict[str, float | None]) -> str:
    mean, spread = kid["mean"], kid["spread"]
    return "-" if mean is None or spread is None else f"{mean:.1f} ± {spread:.1f}"
