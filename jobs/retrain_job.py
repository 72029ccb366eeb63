"""Retraining by night: a model trained on from the present one with what was labelled since, and compared.

Nothing is promoted: the gates are asked and told, and a person says `inspect models promote`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from rollsight.inspect.calibrate import fit_thresholds
from rollsight.inspect.engines import open_engine
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.evaluate import card_metric
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.models import Model, decides, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.promotion import GATES_FILE, Verdict, is_present_default, judge
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.rolls import write_durably
from rollsight.inspect.train import model_classes
from rollsight.jobs.train_job import describe_on_card, train_model

LEARNING_RATE = 3e-4  # a third of that of a training from scratch: the net knows the strip already
FOLDER = "retrain"  # among the runs


@dataclass(frozen=True, slots=True)
class Retrained:
    """What a retraining came to."""

    name: str
    is_new: bool  # False: it was trained before, on the same labels from the same model
    is_default: bool  # it was promoted since: nothing is fitted or judged
    thresholds: str  # on what they were fitted, or why not
    verdicts: tuple[Verdict, ...] | None  # of the gates; None where the plant has none, or it is the default
    report: Path

    @property
    def passed(self) -> bool:
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts or ())


def retrain(
    plant: Plant,
    paths: Sequence[Path],
    recipe: Recipe,
    *,
    at: datetime,
    start: str = "default",
    on_step: Callable[[int, int], None] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Retrained:
    """Train `start` on with labelled data, fit its thresholds on val, ask the gates, write a report.

    Net and attention of the recipe are those of `start`. The model is called by a hash of labels, recipe and
    `start`: where nothing of it changed nothing is trained, and a training that was killed goes on. UserError
    for data that cannot be trained on, 2 where it does not list every class that `start` knows.
    """
    begin = plant.model(start)
    sources = [open_labels(path) for path in paths]
    _check_classes(begin, sources)
    recipe = replace(
        recipe, net=begin.card.net, attention=begin.card.net_options.get("attention", recipe.attention)
    )
    name = f"retrain-{_key(begin, sources, recipe)}"
    is_new = not (plant.models / name).exists()
    if is_new:
        train_model(
            plant,
            name,
            sources,
            recipe,
            notes=[
                f"Retrained from {begin.card.name}, {begin.hash[:12]}; promoted by a person or not at all."
            ],
            init=begin,
            on_step=None if on_step is None else lambda step, _: on_step(step, recipe.steps),
        )
    model = plant.model(name)
    fitted, verdicts, is_default = model.card.thresholds_basis, None, is_present_default(plant, model)
    if not is_default:
        model, fitted = _fit(model, begin, sources, on_image)
    if not is_default and (plant.home / GATES_FILE).is_file():
        verdicts = tuple(judge(plant, name, on_image=on_image)[1])
    report = plant.home / "runs" / FOLDER / f"{name}.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "model": name,
        "hash": model.hash,
        "from": {"model": begin.card.name, "hash": begin.hash},
        "at": at.isoformat(),
        "is_new": is_new,
        "is_default": is_default,
        "thresholds": fitted,
        "gates": None if verdicts is None else [asdict(verdict) for verdict in verdicts],
        "promoted": False,
    }
    write_durably(report, json.dumps(told, indent=1).encode())
    return Retrained(name, is_new, is_default, fitted, verdicts, report)


def _check_classes(begin: Model, sources: Sequence[LabelledData]) -> None:
    """UserError 2 for data by which the model would lose a class that it knows."""
    found = model_classes(sources)
    if lost := [name for name in begin.card.classes if name not in found]:
        raise UserError(
            f"the data labels {', '.join(found)}; model {begin.card.name} knows {', '.join(lost)} as well, "
            "which the retrained one would lose: give --data for each of its classes",
            USAGE,
        )


def _key(begin: Model, sources: Sequence[LabelledData], recipe: Recipe) -> str:
    told = [begin.hash, decides(begin.card), asdict(recipe), [source.digest() for source in sources]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _fit(
    model: Model,
    begin: Model,
    sources: Sequence[LabelledData],
    on_image: Callable[[int, int], None] | None,
) -> tuple[Model, str]:
    """The model with thresholds fitted on val to the budget of the one before; and on what, or why not."""
    if model.card.calibrated_on:
        return model, model.card.thresholds_basis
    held = [source for source in sources if any(s.split == "val" for s in source.samples)]
    if not held:
        return model, f"not fitted, the data has no val split: {model.card.thresholds_basis}"
    val = held[0].of_split("val")
    try:
        engine = open_engine(model)[1]
        fitted = fit_thresholds(model, engine, val, budget_per_mpx=begin.card.budget, on_image=on_image)
    except UserError as fault:
        return model, f"not fitted, {fault}"
    about = describe_on_card(model.card, val, "val")
    fields = fitted.card(about)
    fields["metrics"] = [card_metric(about["source"], "val", fitted.tally)]
    return update_card(model, **fields), fitted.basis
