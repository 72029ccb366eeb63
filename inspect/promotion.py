"""Promotion: a model becomes the plant's default where it passes the plant's gates; the way back is a step.

    gates:
      - data: labels/line-3
        split: test
        at_least: {recall_tiny_small: 0.8}
        at_most: {fa_per_mpx: 30}
        no_worse: {recall_tiny_small: 0.02, fa_per_mpx: 5}

`no_worse` is a test of non-inferiority against the present default, on the same images, paired by group: the
95 % interval of the difference must not reach beyond the margin. That no difference is shown is not enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rollsight.inspect.calibrate import NONE_SEEN
from rollsight.inspect.compare import LESS_IS_BETTER, compare
from rollsight.inspect.engines import open_engine
from rollsight.inspect.errors import CONFIG, FAILED, USAGE, UserError
from rollsight.inspect.evaluate import evaluate
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.models import Model, decides, open_model
from rollsight.inspect.plant import Plant, read_yaml
from rollsight.inspect.promoted import POINTER, SHIPPED, Step, add_step, read_pointer

GATES_FILE = "gates.yaml"
Figure = Literal["miou", "f1_h", "recall_tiny_small", "fa_per_mpx"]
OnImage = Callable[[int, int], None]


class GateSet(BaseModel):
    """What a model must reach on one set of labelled data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str  # labelled data, relative to the plant folder
    split: Literal["test", "val"] = "test"
    at_least: dict[Figure, float] = {}
    at_most: dict[Figure, float] = {}
    no_worse: dict[Figure, float] = {}  # margin of the difference to the present default

    @model_validator(mode="after")
    def _asks_something(self) -> "GateSet":
        if not (self.at_least or self.at_most or self.no_worse):
            raise ValueError("it asks for nothing: give at_least, at_most or no_worse")
        if any(margin < 0 for margin in self.no_worse.values()):
            raise ValueError("no_worse: a margin is 0 or more")
        return self


class Gates(BaseModel):
    """gates.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gates: tuple[GateSet, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One gate, and what was found."""

    data: str
    gate: str  # "recall_tiny_small >= 0.8"
    found: str
    passed: bool


def read_gates(plant: Plant) -> Gates:
    """gates.yaml of the plant; UserError 78 where it is not there or not as it must be."""
    path = plant.home / GATES_FILE
    try:
        told = read_yaml(path)
    except FileNotFoundError:
        raise UserError(
            f"no {path}: a model is promoted only through gates; write what it must reach there", CONFIG
        ) from None
    try:
        return Gates.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}", CONFIG) from None


def judge(
    plant: Plant, name: str, *, engine: str = "auto", on_image: OnImage | None = None
) -> tuple[Model, list[Verdict]]:
    """Hold the model against every gate; where one compares, the default's figures are of the same images.

    Returns the model that was judged as well. UserError 2 where it is the default already, 78 for gates that
    cannot be asked.
    """
    gates, candidate = read_gates(plant), _own(plant, name)
    read_pointer(plant.models)  # a damaged list of promotions is told before anything is judged
    if is_present_default(plant, candidate):
        raise UserError(f"model {name!r} is the default already", USAGE)
    # Elsewhere the default has no say: it may know other classes, or have been changed since its promotion.
    present = plant.model("default") if any(gate.no_worse for gate in gates.gates) else None
    found: list[Verdict] = []
    for gate in gates.gates:
        data = _data(plant, gate)
        found += _judged(gate, candidate, present if gate.no_worse else None, data, engine, on_image)
    return candidate, found


def promote(plant: Plant, judged: Model, verdicts: Sequence[Verdict], *, by: str, at: datetime) -> Step:
    """Make the model the default; UserError 1 where it did not pass every gate, or was changed since."""
    name = judged.folder.name
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed or not verdicts:
        first = failed[0] if failed else None
        why = f"{first.gate} on {first.data}: {first.found}" if first else "no gate was asked"
        raise UserError(
            f"model {name!r} is not promoted, {len(failed)} of {len(verdicts)} gates are shut ({why}): "
            "the default stays",
            FAILED,
        )
    model = _own(plant, name)
    if (model.hash, decides(model.card)) != (judged.hash, decides(judged.card)):
        raise UserError(f"model {name!r} was changed while it was judged: promote it again", FAILED)
    step = Step(
        model=name,
        model_hash=model.hash,
        decides=decides(model.card),
        at=at.isoformat(),
        by=by,
        why="promoted",
        gates=tuple(asdict(verdict) for verdict in verdicts),
    )
    add_step(plant.models, step)
    return step


def roll_back(plant: Plant, *, by: str, at: datetime) -> Step:
    """Return to the model that was the default before this one; no gate asks, since it was the default.

    UserError 1 where nothing was promoted, or the model before is gone or was changed.
    """
    history = read_pointer(plant.models).history
    before = _before(history)
    if before is not None and before.model is not None:
        try:
            model = open_model(before.model, plant.models)
        except UserError as fault:
            raise UserError(
                f"{fault}: it was the default before; take {plant.models / POINTER} away to return to the "
                "shipped model"
            ) from None
        if (model.hash, decides(model.card)) != (before.model_hash, before.decides):
            raise UserError(
                f"model {before.model!r} was changed since it was the default: promote it anew, or take "
                f"{plant.models / POINTER} away to return to the shipped model"
            )
    step = Step(
        model=None if before is None else before.model,
        model_hash="" if before is None else before.model_hash,
        decides="" if before is None else before.decides,
        at=at.isoformat(),
        by=by,
        why="rolled back",
    )
    add_step(plant.models, step)
    return step


def called(step: Step | None) -> str:
    """The model of a step by its name."""
    return SHIPPED if step is None or step.model is None else step.model


def _before(history: Sequence[Step]) -> Step | None:
    """The step before the one that holds; None is the shipped model. Each way back undoes one promotion."""
    stack: list[Step] = []
    for step in history:
        if step.why == "promoted":
            stack.append(step)
        elif stack:
            stack.pop()
    if not stack:
        raise UserError("the default is the shipped model: there is nothing to roll back to")
    return stack[-2] if len(stack) > 1 else None


def _own(plant: Plant, name: str) -> Model:
    """A model of the plant by its name, whole: what is promoted must stay where it is."""
    model = plant.model(name)
    if name == "default" or model.folder.resolve().parent != plant.models.resolve():
        raise UserError(
            f"model {name!r} is not in {plant.models}: only a model of the plant is promoted", USAGE
        )
    return model


def is_present_default(plant: Plant, model: Model) -> bool:
    """Whether the model is what `default` means now; a default that was changed or is gone is no model."""
    try:
        present = plant.model("default")
    except UserError:
        return False
    return (model.hash, decides(model.card)) == (present.hash, decides(present.card))


def _data(plant: Plant, gate: GateSet) -> LabelledData:
    try:
        return open_labels(plant.home / Path(gate.data)).of_split(gate.split)
    except UserError as fault:
        raise UserError(f"{plant.home / GATES_FILE}: data {gate.data}: {fault}", CONFIG) from None


def _judged(
    gate: GateSet,
    candidate: Model,
    present: Model | None,  # the default; None where the gate does not compare
    data: LabelledData,
    engine: str,
    on_image: OnImage | None,
) -> list[Verdict]:
    where = f"{gate.data} {gate.split}"
    models = {"candidate": candidate} if present is None else {"default": present, "candidate": candidate}
    tallies = {
        who: evaluate(model, open_engine(model, engine)[1], data, on_image=on_image)
        for who, model in models.items()
    }
    told = compare(tallies)
    figures, differences = told["models"][-1], told["differences"]
    seen = sorted(candidate.card.groups() & {sample.group for sample in data.samples})
    names = f"{len(seen)}: {', '.join(seen[:3])}" if seen else "none"
    rows = [Verdict(where, "groups that it was trained on: none", names, not seen)]
    for figure, bound in gate.at_least.items():
        value = figures[figure]["value"]
        passed = value is not None and value >= bound
        rows.append(Verdict(where, f"{figure} >= {bound:g}", _span(figures[figure]), passed))
    for figure, bound in gate.at_most.items():
        value, said = figures[figure]["value"], _span(figures[figure])
        passed = value is not None and value <= bound
        if figure in LESS_IS_BETTER:
            mpx = tallies["candidate"].report()["false_alarms"]["mpx"]
            if bound * mpx < NONE_SEEN:  # no alarm at all would show no less
                passed, said = False, f"{said}; {mpx:.3g} Mpx are too few to show it"
        rows.append(Verdict(where, f"{figure} <= {bound:g}", said, passed))
    for figure, margin in gate.no_worse.items():
        difference = differences[0][figure]
        low, high = difference["low"], difference["high"]
        if low is None or high is None:
            passed = False
        else:
            passed = high <= margin if figure in LESS_IS_BETTER else low >= -margin
        said = f"{figure} no worse than the default's by more than {margin:g}"
        rows.append(Verdict(where, said, f"difference {_span(difference)}", passed))
    return rows


def _span(figure: dict[str, Any]) -> str:
    """A figure with its interval, in words."""
    if figure["value"] is None:
        return "too few defects or groups to tell"
    span = "" if figure["low"] is None else f" ({figure['low']:.3f} to {figure['high']:.3f})"
    return f"{figure['value']:.3f}{span}"
