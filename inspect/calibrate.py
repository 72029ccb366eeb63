"""Thresholds from a false-alarm budget, and a temperature that makes probabilities mean what they say.

The budget is the model's, all classes together: what a line has to look at in vain. The net runs once over
each image; every pixel that a threshold could ask for goes into a temporary file, and the rest is counting.
"""

import bisect
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.engines import Engine
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.evaluate import data_logits, decided, look, m2_per_mpx, probabilities
from rollsight.inspect.froc import THRESHOLDS, Sweep
from rollsight.inspect.labels import LabelledData
from rollsight.inspect.metrics import MIN_N, Tally
from rollsight.inspect.models import Model
from rollsight.inspect.reliability import TEMPERATURES, Reliability, evenly, near
from scipy import special

CERTAIN = 0.95  # confidence of the upper limit of false alarms, one-sided: 3.0 after counting none
NONE_SEEN = 3.0  # -log(1 - CERTAIN), rounded up: fewer alarms on the area than this cannot be shown
QUIET = 0.99  # of clean images stay below the threshold of a class that has no defect to fit it on
ROUNDS = 4  # of counting the map again
ONE = len(TEMPERATURES) // 2  # where the temperature is 1
# A px whose logits are all this far under the background's passes no threshold at any temperature.
FLOOR = float(TEMPERATURES[-1] * special.logit(THRESHOLDS[0]))
ABSENT = np.float32(-1e4)  # its logits
NEAR_0 = 1e-9  # a threshold moved to another temperature keeps this far from 0 and 1


@dataclass(frozen=True, slots=True)
class Fitted:
    """Thresholds and temperature that were fitted, and what they gave on the data of the fit."""

    thresholds: dict[str, float]  # calibrated probability per class of the model
    temperature: float
    budget: float | None  # false alarms per Mpx, all classes together
    basis: str  # for the card: on what it was fitted, and what was not
    alarms: int
    mpx: float  # on which they were counted
    upper: float  # 95 % upper limit of them per Mpx
    ece: tuple[float, float]  # calibration error at temperature 1 and at the fitted one
    tally: Tally  # of the data at the fitted thresholds, as `evaluate` counts it

    def card(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a model's card that the fit decides; `data`: what it was fitted on (`describe`)."""
        figures = ("alarms", "mpx", "upper", "ece")
        return {
            "thresholds": self.thresholds,
            "thresholds_basis": self.basis,
            "temperature": self.temperature,
            "budget": self.budget,
            "calibrated_on": {**{name: getattr(self, name) for name in figures}, **data},
        }


def fit_thresholds(
    model: Model,
    engine: Engine,
    data: LabelledData,
    *,
    budget_per_mpx: float | None,
    on_image: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fit the temperature and the thresholds of a model on a val split.

    Of the combinations of thresholds whose false alarms, all classes together, keep their 95 % upper limit
    (Garwood 1936) within the budget: the one with the highest recall of tiny and small defects, as a mean
    over the classes, so that none is given up for another (of all defects, in a class with fewer than 10 tiny
    and small ones); then with the highest recall of all; then with the fewest alarms. Alarms are counted on
    the clean images, or on all where none is clean. Without a budget that on the card is kept; where there
    is none either, no more alarms are allowed than the present thresholds give, and no limit is promised. A
    class that the data does not label keeps its threshold; one that it labels but never shows takes none of
    the budget: it gets the lowest threshold that gives no alarm, and at least a quantile of the largest
    probability per image, which is its threshold where there is no budget.

    Raises UserError for a budget that is no finite number above 0, that the area is too small to show, or
    that no threshold keeps.
    """
    budget = model.card.budget if budget_per_mpx is None else budget_per_mpx
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"a budget of {budget:g} false alarms per Mpx: needed a finite number above 0", USAGE)
    with _Kept() as kept:
        trials = [Reliability() for _ in TEMPERATURES]
        for seen in look(model, engine, data, on_image):
            kept.add(seen.truth, seen.logits, seen.sample.group)
            plain = data_logits(seen.logits, model.card.classes, data.classes, 1.0)
            px = evenly(near(seen.truth, plain.argmax(axis=0).astype(np.uint8)))
            z, truth = seen.logits.reshape(len(seen.logits), -1)[:, px], seen.truth.ravel()[px]
            for trial, t in zip(trials, TEMPERATURES, strict=True):
                trial.add(data_logits(z, model.card.classes, data.classes, float(t)), truth)
        best = int(np.argmin([trial.nats for trial in trials]))  # Guo et al. 2017, arXiv:1706.04599, sec. 4.2
        # No px near a defect, true or found, says nothing of it: clean steel on which nothing is found.
        temperature = float(TEMPERATURES[best]) if trials[ONE].n.any() else model.card.temperature

        present = _same_margins(model, temperature)
        sweep = Sweep(data.classes)
        for truth, logits, _ in kept:
            sweep.add(truth, _probability(logits, model, data, present, temperature))
        if not sweep.alarm_mpx:
            raise UserError(f"{data.root}: every px is marked as ignored: nothing can be fitted on it")
        given = _never_shown(sweep, model.card.classes, budget is not None)
        present |= {name: THRESHOLDS[i] for name, i in given.items()}
        tally = _counted(kept, model, data, present, temperature)
        allowed = _alarms(tally) if budget is None else allowed_alarms(budget, sweep, data)
        thresholds, tally = _search(kept, model, data, sweep, given, (present, tally), allowed, temperature)
    upper = float(special.gammaincinv(_alarms(tally) + 1, CERTAIN)) / sweep.alarm_mpx
    return Fitted(
        thresholds,
        temperature,
        budget,
        _basis(model, data, sweep, given, budget, tally, upper),
        _alarms(tally),
        sweep.alarm_mpx,
        upper,
        (trials[ONE].error() or 0.0, trials[best].error() or 0.0),
        tally,
    )


class _Kept:
    """Truth, logits and group of each image on disk, without the px that no threshold asks for."""

    def __enter__(self) -> "_Kept":
        self._file = tempfile.TemporaryFile()
        self._groups: list[str] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, truth: NDArray[np.uint8], logits: NDArray[np.float32], group: str) -> None:
        asked = logits[1:].max(axis=0) - logits[0] >= FLOOR
        self._groups.append(group)
        for part in (truth, np.packbits(asked), logits[:, asked]):
            np.save(self._file, part)

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32], str]]:
        self._file.seek(0)
        for group in self._groups:
            truth, bits, values = (np.load(self._file) for _ in range(3))
            asked = np.unpackbits(bits, count=truth.size).astype(np.bool_).reshape(truth.shape)
            logits = np.full((len(values), *truth.shape), ABSENT)
            logits[0] = 0
            logits[:, asked] = values
            yield truth, logits, group


def _counted(
    kept: _Kept, model: Model, data: LabelledData, thresholds: dict[str, float], temperature: float
) -> Tally:
    """`evaluate` on what was kept, with other thresholds and temperature."""
    tally, values = Tally(data.classes), tuple(thresholds.values())
    for truth, logits, group in kept:
        tally.add(truth, *decided(logits, model, data.classes, values, temperature), group)
    return tally


def _probability(
    logits: NDArray[np.float32],
    model: Model,
    data: LabelledData,
    present: dict[str, float],
    temperature: float,
) -> NDArray[np.float32]:
    """(D, H, W) probability of the data's classes, less where a class that it does not label takes the px.

    Class c at t beats class f, which stays at its threshold and passes it, where odds p_c / odds t is at
    least odds p_f / odds t_f: the odds of p_c are divided by the latter, so that p_c >= t says so.
    """
    p = probabilities(data_logits(logits, model.card.classes, data.classes, temperature))[1:]
    all_p = probabilities(logits / np.float32(temperature))[1:]
    lead = np.ones(p.shape[1:], dtype=np.float32)
    for p_f, (name, t) in zip(all_p, present.items(), strict=True):
        if name not in data.classes:
            np.maximum(lead, p_f / np.maximum(1 - p_f, 1e-12) * np.float32((1 - t) / t), out=lead)
    return (p / (p + (1 - p) * lead)).astype(np.float32, copy=False)


def _search(
    kept: _Kept,
    model: Model,
    data: LabelledData,
    sweep: Sweep,
    given: dict[str, int],
    present: tuple[dict[str, float], Tally],
    allowed: int,
    temperature: float,
) -> tuple[dict[str, float], Tally]:
    """The best thresholds with at most `allowed` alarms on the map as it is decided, and what they give.

    `choose` takes each class by itself; where classes compete for a px the map has more or fewer alarms than
    it thinks, and it is asked again for so many fewer or more.
    """
    best = present if _alarms(present[1]) <= allowed else None
    limit, left, tried = allowed, ROUNDS, set()
    while left and (index := choose(sweep, limit, model.card.classes, given)) is not None:
        thresholds = {name: THRESHOLDS[index[name]] if name in index else t for name, t in present[0].items()}
        tally = _counted(kept, model, data, thresholds, temperature)
        used = _alarms(tally)
        if used <= allowed and (best is None or _worth(tally) > _worth(best[1])):
            best = thresholds, tally
        left -= best is not None  # without any so far the limit sinks until there is one, or none can be
        if used == allowed or (best is not None and tuple(thresholds.values()) in tried):
            break
        tried.add(tuple(thresholds.values()))
        limit += allowed - used
    if best is None:
        raise UserError(
            f"{data.root}: {int(sweep.alarms()[-1].sum())} false alarms are left on {sweep.alarm_mpx:.2f} "
            f"Mpx with every threshold at {THRESHOLDS[-1]}, and {allowed} are allowed: give a larger budget "
            "or a better model"
        )
    return best


def _recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """What a class is judged by, (...): recall of tiny and small, then of all; of (..., 4) counts by size."""
    n, small = truth.sum(axis=-1), truth[..., :2].sum(axis=-1)
    of_all = found.sum(axis=-1) / np.maximum(n, 1)
    of_small = found[..., :2].sum(axis=-1) / np.maximum(small, 1)
    # The first weighs more than all of the second, up to 10,000 defects.
    return np.asarray(np.where(small >= MIN_N, of_small, of_all) + 1e-5 * of_all)


def _worth(tally: Tally) -> tuple[float, int]:
    """What the search makes as large as it can."""
    counts = {name: tally.statistics()[name].sum(axis=0) for name in ("found", "truth")}
    return float(_recall(counts["found"], counts["truth"]).sum()), -_alarms(tally)


def _alarms(tally: Tally) -> int:
    """The false alarms that a budget counts, as `Sweep.alarms`."""
    told = tally.report()["false_alarms"]
    clean: dict[str, int] = told["clean_images"]
    return clean["alarms"] if clean["n"] else int(told["alarms"])


def allowed_alarms(budget: float, sweep: Sweep, data: LabelledData) -> int:
    """The most alarms whose 95 % upper limit is within the budget on the sweep's area."""
    mpx = sweep.alarm_mpx
    if budget * mpx < NONE_SEEN:
        scale, unit = _unit(data)
        raise UserError(
            f"{data.root}: a budget of {budget / scale:g} false alarms per {unit} cannot be shown on "
            f"{mpx * scale:.3g} {unit} of {'clean images' if sweep.clean else 'images'}: it needs "
            f"{NONE_SEEN / budget * scale:.3g} {unit}, or a budget of {NONE_SEEN / mpx / scale:.3g} or more"
        )
    counts = range(int(min(budget * mpx, mpx * 1e6)) + 1)  # an alarm has at least a px of its own
    return bisect.bisect(counts, budget * mpx, key=lambda n: special.gammaincinv(n + 1, CERTAIN)) - 1


def _unit(data: LabelledData) -> tuple[float, str]:
    """In what a budget is told: so many of it are a Mpx, and its name."""
    scale = m2_per_mpx(data)
    return (1.0, "Mpx") if scale is None else (scale, "m2")


def choose(
    sweep: Sweep, allowed: int, known: Sequence[str], given: Mapping[str, int]
) -> dict[str, int] | None:
    """The best threshold of each class, as an index into THRESHOLDS, with at most `allowed` alarms in all.

    Exact: each class takes one of its T thresholds, a multiple-choice knapsack over the alarms; those of
    `given` keep theirs. None where no combination keeps to `allowed`.
    """
    if allowed < 0:
        return None
    alarms = sweep.alarms()
    allowed = min(allowed, int(alarms.max(axis=0).sum()))  # more than all can be given and make no difference
    value = _recall(sweep.found, sweep.truth) - 1e-10 * alarms / (1 + alarms.max())
    names = [name for name in sweep.classes if name in known]
    best = np.zeros(allowed + 1)  # sum of value, by alarms spent at most
    taken = []
    for name in names:
        c = sweep.classes.index(name)
        options = [given[name]] if name in given else range(len(THRESHOLDS))
        table = np.full((len(THRESHOLDS), allowed + 1), -np.inf)
        for i in options:
            if (spent := int(alarms[i, c])) <= allowed:
                table[i, spent:] = best[: allowed + 1 - spent] + value[i, c]
        taken.append(table.argmax(axis=0))
        best = table.max(axis=0)
        if best[-1] == -np.inf:
            return None
    chosen, left = {}, allowed
    for name, choice in zip(reversed(names), reversed(taken), strict=True):
        c, i = sweep.classes.index(name), int(choice[left])
        left -= int(alarms[i, c])
        # of thresholds that do the same the middle one, which is furthest from doing something else
        same = np.flatnonzero((value[:, c] == value[i, c]) & (alarms[:, c] == alarms[i, c]))
        chosen[name] = i if name in given else int(same[len(same) // 2])
    return chosen


def _never_shown(sweep: Sweep, known: Sequence[str], budgeted: bool) -> dict[str, int]:
    """Index of the threshold of each class that the data labels but never shows."""
    quiet, alarms = sweep.quiet(QUIET), sweep.alarms()
    given = {}
    for c, name in enumerate(sweep.classes):
        if name in known and not sweep.truth[c].any():
            index = int(np.searchsorted(THRESHOLDS[:-1], quiet[c]))
            # An alarm spent on it finds nothing that could be counted, and is one less for the others.
            given[name] = index + int(np.argmin(alarms[index:, c])) if budgeted else index
    return given


def _same_margins(model: Model, temperature: float) -> dict[str, float]:
    """The model's thresholds at another temperature: the same margins in logits, so about the same map.

    At the same temperature they stay as they are; else they lie within [NEAR_0, 1 - NEAR_0].
    """
    before = {name: model.card.thresholds[name] for name in model.card.classes}
    ratio = model.card.temperature / temperature
    if ratio == 1:
        return before
    moved = {name: float(special.expit(special.logit(t) * ratio)) for name, t in before.items()}
    return {name: min(max(t, NEAR_0), 1 - NEAR_0) for name, t in moved.items()}


def _basis(
    model: Model,
    data: LabelledData,
    sweep: Sweep,
    given: Mapping[str, int],
    budget: float | None,
    tally: Tally,
    upper: float,
) -> str:
    """What the card says of its thresholds."""
    splits = " and ".join(sorted({sample.split for sample in data.samples}))
    small = tally.statistics()
    found, n = (int(small[name][..., :2].sum()) for name in ("found", "truth"))
    scale, unit = _unit(data)
    rate = _alarms(tally) / sweep.alarm_mpx / scale
    lines = [
        f"Fitted on {data.root.name} {splits}, {len(data.samples)} images:",
        "the highest recall of tiny and small defects with",
        "no more false alarms than before; no budget stands behind them."
        if budget is None
        else f"at most {budget / scale:g} false alarms per {unit}, all classes together, at 95 % confidence.",
        f"Found {found} of {n} tiny and small defects;",
        f"{_alarms(tally)} false alarms on {sweep.alarm_mpx * scale:.3g} {unit}, {rate:.3g} per {unit},",
        f"upper limit {upper / scale:.3g}.",
        f"They were counted on its {sweep.clean} clean images."
        if sweep.clean
        else "None of the images is clean, so they were counted beside the defects: clean strip may differ.",
    ]
    if given:
        below = f"{QUIET:.0%} of the" if budget is None else "all"
        lines.append(
            f"No defect of {', '.join(given)} is in it: there the threshold is what {below} "
            f"{'clean images' if sweep.clean else 'images'} stay below, and nothing says what it finds."
        )
    if unlabelled := [name for name in model.card.classes if name not in data.classes]:
        lines.append(f"Not labelled there, so not fitted: {', '.join(unlabelled)}.")
    return " ".join(lines)
