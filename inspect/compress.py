"""Whether a compressed model still sees the small defects: the gate that it must pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rollsight.inspect.calibrate import Fitted, fit_thresholds
from rollsight.inspect.engines import Engine
from rollsight.inspect.errors import UserError
from rollsight.inspect.evaluate import evaluate
from rollsight.inspect.labels import LabelledData, describe
from rollsight.inspect.metrics import MIN_N, Tally
from rollsight.inspect.models import Card, Model

ALLOWED_LOSS = 1  # tiny + small components of the test split (metrics.md, parity gates)


@dataclass(frozen=True, slots=True)
class Judged:
    """A model with thresholds fitted on val to a budget, and what it finds on test with them."""

    fitted: Fitted
    tally: Tally

    @property
    def found(self) -> int:
        """Tiny and small defects found."""
        return int(self.tally.statistics()["found"][..., :2].sum())

    @property
    def n(self) -> int:
        """Tiny and small defects that there are."""
        return int(self.tally.statistics()["truth"][..., :2].sum())

    def figures(self) -> dict[str, Any]:
        """A row of the gate's table."""
        told = self.tally.report()
        return {
            "found_tiny_small": self.found,
            "n_tiny_small": self.n,
            "recall_h": told["instance"]["recall_h"],
            "alarms_per_mpx": told["false_alarms"]["per_mpx"],
            "miou": told["pixel"]["miou"],
        }


@dataclass(frozen=True, slots=True)
class Gate:
    """The original and the compressed model on the same data at the same budget of false alarms."""

    original: Judged
    compressed: Judged

    @property
    def lost(self) -> int:
        """Tiny and small defects that the compressed model finds fewer; negative where it finds more."""
        return self.original.found - self.compressed.found

    @property
    def passed(self) -> bool:
        return self.lost <= ALLOWED_LOSS

    def figures(self) -> dict[str, Any]:
        """For the card and for JSON; `recall_difference` has the 95 % interval, paired by group."""
        difference = self.compressed.tally.difference(self.original.tally)
        return {
            "original": self.original.figures(),
            "compressed": self.compressed.figures(),
            "lost_tiny_small": self.lost,
            "recall_difference": difference["instance"]["recall_by_size"]["tiny_small"]["recall"],
            "budget_per_mpx": self.compressed.fitted.budget,
        }


def judge(
    model: Model,
    engine: Engine,
    val: LabelledData,
    test: LabelledData,
    budget_per_mpx: float,
    on_image: Callable[[int, int], None] | None = None,
) -> Judged:
    """Fit the model's thresholds on `val` to the budget and count what it finds on `test` with them.

    Raises UserError where `test` has too few tiny and small defects to judge by.
    """
    fitted = fit_thresholds(model, engine, val, budget_per_mpx=budget_per_mpx, on_image=on_image)
    card = Card(**{**model.card.model_dump(), **fitted.card(describe(val, "val"))})
    judged = Judged(fitted, evaluate(Model(model.folder, card), engine, test, on_image=on_image))
    if judged.n < MIN_N:
        raise UserError(
            f"{test.root}: the test split has {judged.n} tiny and small defects, under 256 px: "
            f"to judge a compressed model it needs {MIN_N} or more"
        )
    return judged
