"""Labelled data in, a model in the plant out: training, then the figures on its card."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rollsight.inspect.checkpoints import CONFIG, CURVE
from rollsight.inspect.engines import open_engine
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.evaluate import card_metric, evaluate
from rollsight.inspect.golden import golden_windows
from rollsight.inspect.labels import LabelledData, describe, is_rolls
from rollsight.inspect.metrics import Tally
from rollsight.inspect.models import Card, Model, save_model, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.train import Recipe, model_classes, train
from rollsight.inspect.training_pictures import draw_curves, draw_worst, worst_images

TRAINING = "training"  # folder of a model with what its training was
CURVES_PICTURE = "curve.png"
THRESHOLD = 0.5  # per class, until a false-alarm budget on clean strip has been fitted
THRESHOLD_BASIS = (
    "0.5 for every class: the plain majority, not fitted. "
    "No false-alarm budget on clean strip stands behind it."
)


def train_model(
    plant: Plant,
    name: str,
    data: Sequence[LabelledData],
    recipe: Recipe,
    *,
    shares: Sequence[float] = (),
    exhaustive: Sequence[bool] = (),
    until: Sequence[float] = (),
    notes: Sequence[str] = (),
    init: Model | None = None,
    teacher: Model | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Model:
    """Train on the train split of each source and put the model into the plant as `models/<name>`.

    The figures on the val splits, where sources have one, go on the card; `patience` judges by these splits.
    With `init` what that model learned from stands on the card too.
    The folder `training` in the model has what the training was: configuration, curve, curves and worst val
    images as PNG. Raises UserError for a name that is taken or data that cannot be trained on. Interrupted,
    the same call goes on.
    """
    plant.check_new_model(name)
    learned = [source.of_split("train") for source in data]
    held = [source.of_split("val") for source in data if any(s.split == "val" for s in source.samples)]
    classes = model_classes(learned)
    begin = None
    if init is not None:
        if (init.card.net, init.card.net_options) != (recipe.net, {"attention": recipe.attention}):
            raise UserError(
                f"model {init.card.name} is {init.card.net} {init.card.net_options}, the training makes "
                f"{recipe.net} with attention {recipe.attention}: begin from a model of the same net",
                USAGE,
            )
        begin, recipe = (init.net(), init.card.classes), replace(recipe, init=init.hash)
    taught = None
    if teacher is not None:
        taught, recipe = (teacher.net(), teacher.card.classes), replace(recipe, teacher=teacher.hash)
    for source in held:  # what is wrong with them is known before the hours of a training, not after
        for sample in source.samples:
            source.read(sample)
    run = plant.models / f".{name}.training"
    net = train(
        learned,
        run,
        recipe,
        shares=shares,
        exhaustive=exhaustive,
        until=until,
        val=held,
        on_step=on_step,
        init=begin,
        teacher=taught,
    )
    card: dict[str, Any] = {
        "name": name,
        "net": recipe.net,
        "net_options": {"attention": recipe.attention},
        "classes": classes,
        "thresholds": dict.fromkeys(classes, THRESHOLD),
        "thresholds_basis": THRESHOLD_BASIS,
        "trained_on": learned_from(describe_apart(learned, "train"), init),
        "recipe": {
            **asdict(recipe),
            "shares": list(shares),
            "exhaustive": list(exhaustive),
            **({"until": list(until)} if until else {}),
        },
        "code_version": version("rollsight"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": list(notes),
    }
    # Under another name until all is there: killed here, the same call makes it again.
    model = save_model(run / name, net, card, golden_windows(learned, recipe.seed))
    for source in held:
        model = add_to_card(model, source, "val")
    keep_training(run, model, held)
    model.folder.rename(plant.models / name)
    shutil.rmtree(run)
    return plant.model(name)


def describe_apart(sources: Sequence[LabelledData], split: str) -> list[dict[str, Any]]:
    """`describe` of each source; other data of the same name is told apart by the folders that it lies in."""
    told = [describe(source, split) for source in sources]
    names = [_longer_names(source, entry["source"]) for source, entry in zip(sources, told, strict=True)]
    apart = []
    for own, entry in zip(names, told, strict=True):
        others = {
            name
            for theirs, other in zip(names, told, strict=True)
            if other["digest"] != entry["digest"]
            for name in theirs
        }
        apart.append(entry | {"source": next((name for name in own if name not in others), own[-1])})
    return apart


def describe_on_card(card: Card, data: LabelledData, split: str) -> dict[str, Any]:
    """`describe` of a source, by the longer name that it has on the card of a model that learned from two."""
    told = describe(data, split)
    known = [entry.get("source") for entry in card.trained_on]
    longest = reversed(_longer_names(data, told["source"]))
    return told | {"source": next((name for name in longest if name in known), told["source"])}


def _longer_names(data: LabelledData, name: str) -> list[str]:
    """The name, and the same with more and more of the folders that the source lies in."""
    root = data.root.resolve()
    folders = (root.parent if root.suffix == ".zarr" else root).parts[1:]
    tails = ["/".join(folders[-n:]) for n in range(1, len(folders) + 1)]
    return [name, *(f"{name} in {tail}" if is_rolls(data) else tail for tail in tails)]


def learned_from(described: Sequence[dict[str, Any]], init: Model | None) -> list[dict[str, Any]]:
    """`trained_on` of a card: the sources of a training, as described, then those of the model it began from.

    What `init` saw the new model has seen: figures on those groups say nothing of it either. A source of the
    same digest stands once.
    """
    told = {entry["digest"]: entry for entry in described}
    for entry in init.card.trained_on if init is not None else ():
        inherited = dict(entry)
        if "group_names" in inherited:  # once each: labels grow from retraining to retraining, cards may not
            named = {name for earlier in told.values() for name in earlier.get("group_names", ())}
            inherited["group_names"] = [name for name in inherited["group_names"] if name not in named]
        told.setdefault(str(inherited.get("digest", inherited)), inherited)
    return list(told.values())


def keep_training(run: Path, model: Model, held: Sequence[LabelledData]) -> None:
    """Put what the training was into the model's folder: `training` with its files and pictures."""
    kept = model.folder / TRAINING
    kept.mkdir(exist_ok=True)
    for file in (CONFIG, CURVE):
        shutil.copyfile(run / file, kept / file)
    draw_curves(run / CURVE, kept / CURVES_PICTURE)
    engine = open_engine(model)[1]
    for number, source in enumerate(held, start=1):
        judged = worst_images(model, engine, source)
        draw_worst(judged, source.classes, kept / f"worst_{number}.png")


def add_to_card(model: Model, data: LabelledData, split: str, tally: Tally | None = None) -> Model:
    """Write the figures of a split with intervals on the model's card; without `tally` evaluated here."""
    chosen = data.of_split(split)
    tally = tally or evaluate(model, open_engine(model)[1], chosen)
    name = describe_on_card(model.card, chosen, split)["source"]
    kept = [m for m in model.card.metrics if (m["data"], m["split"]) != (name, split)]
    return update_card(model, metrics=[*kept, card_metric(name, split, tally)])
