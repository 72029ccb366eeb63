"""Whether an arm finds more of a rare class than another: paired over draws, fits and groups."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.metrics import MIN_N
from rollsight.synth.arms import WITHOUT_GAN
from rollsight.synth.proof import Plan
from scipy import stats

DRAWS = 1000  # of the bootstrap
ENOUGH = 3  # paired draws of scenes without which no interval is given
GOAL = 0.03  # of IoU or F1: a gain that is worth a generator

Runs = Mapping[int, Sequence[NDArray[np.float64]]]  # draw -> counts (G, 8) of each of its fits
OF_CLASS = ("both", "either", "truth", "found", "true", "predicted")
COUNTS = (*OF_CLASS, "alarms", "area")


def iou(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pooled IoU of summed counts (..., 8)."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1)


def f1_h(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1 by match H of summed counts (..., 8)."""
    recall = counts[..., 3] / np.maximum(counts[..., 2], 1)
    precision = counts[..., 4] / np.maximum(counts[..., 5], 1)
    return 2 * recall * precision / np.maximum(recall + precision, 1e-12)


def fa_per_mpx(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """False alarms per Mpx of images without the class, of summed counts (..., 8)."""
    return counts[..., 6] / np.maximum(counts[..., 7], 1) * 1e6


FIGURES = {"iou": iou, "f1_h": f1_h, "fa_per_mpx": fa_per_mpx}


def lift(first: Runs, second: Runs, figure: str, seed: int = 0) -> dict[str, Any]:
    """Figure of `second` minus that of `first`, mean over the draws that both have, with its 95 % interval.

    A hierarchical bootstrap (Davison & Hinkley 1997, sec. 3.8): draws of the scenes with replacement, in each
    one fit of each arm at random, and the test groups once for all of them, since every draw is judged on
    the same images. Its percentiles are stretched away from the difference by `stretch`: of so few draws
    they alone are too near. What the groups add is stretched with them, so an interval is too wide rather
    than too narrow where these count. low and high are None with fewer than 3 draws.
    """
    of = FIGURES[figure]
    draws = sorted(set(first) & set(second))
    if not draws:
        return {"difference": None, "low": None, "high": None, "draws": 0}
    difference = mean_of(second, draws, figure) - mean_of(first, draws, figure)
    told: dict[str, Any] = {"difference": difference, "low": None, "high": None, "draws": len(draws)}
    if len(draws) < ENOUGH:
        return told
    rng = np.random.default_rng(seed)
    groups = len(first[draws[0]][0])
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=DRAWS).astype(np.float64)
    chosen = rng.integers(len(draws), size=(DRAWS, len(draws)))
    values = []
    for arm in (first, second):
        fits = np.array([len(arm[d]) for d in draws])
        figures = np.full((len(draws), fits.max(), DRAWS), np.nan)
        for i, d in enumerate(draws):
            figures[i, : fits[i]] = [of(weights @ run) for run in arm[d]]
        one = np.floor(rng.random(chosen.shape) * fits[chosen]).astype(int)
        values.append(figures[chosen, one, np.arange(DRAWS)[:, None]])
    low, high = np.percentile((values[1] - values[0]).mean(axis=1), (2.5, 97.5))
    wider = stretch(len(draws))
    told["low"] = float(difference - wider * (difference - low))
    told["high"] = float(difference + wider * (high - difference))
    return told


def stretch(n: int) -> float:
    """How much farther from their mean the ends of a 95 % interval of n draws are than their bootstrap's.

    A bootstrap of n values has (n - 1) / n of their variance and knows no t: with no true effect it left 0
    out in 15 % of cases at 8 draws, 21 % at 4 and 27 % at 3 (simulated). Hesterberg 2015,
    doi:10.1080/00031305.2015.1089789, on the percentile interval's narrowness.
    """
    return float((n / (n - 1)) ** 0.5 * stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975))


def mean_of(runs: Runs, draws: Sequence[int], figure: str) -> float:
    """The mean of a figure over draws, each the mean of its fits: a draw with two counts no more."""
    of = FIGURES[figure]
    return _mean([_mean([float(of(run.sum(axis=0))) for run in runs[d]]) for d in draws])


def summary(results: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Of one plan's runs: for each arm with a GAN its difference to the best arm without one.

    results: what `Proof.result` tells, of one data, rare class and k. The figures of a row are those of IoU,
    `f1_h` has the same for F1: each is held against the arm over which it gains least, on the draws that
    both arms have; where all have the same draws that is the arm with the highest mean on these very draws,
    which favours it. `complete`: every run of the arm, and of all arms without a GAN, is there. `shown` is
    true where it is, the interval lies above 0, and the mean of false alarms is not above that of the best
    arm, as far as an image is free of the class. `goal`: IoU or F1 is shown, and
    gains GOAL or more. `other_classes`: what the others gain or lose, beside the arm best in IoU;
    `recall_by_size`, beside the one best in F1, since both are of components.
    """
    arms, runs, missing = _by_arm(results, plan)
    plain = [name for name in WITHOUT_GAN if name in plan.arms]
    rows = []
    for arm in [name for name in plan.arms if name not in WITHOUT_GAN]:
        if not any(set(runs.get(name, ())) & set(runs.get(arm, ())) for name in plain):
            continue
        complete = not missing & {arm, *plain}
        iou_told, f1_told = (_held_against(arm, plain, runs, figure, complete) for figure in ("iou", "f1_h"))
        best, best_f1 = (told["best_without_gan"] for told in (iou_told, f1_told))
        first = arms[arm][0]
        rows.append(
            {
                **{key: first[key] for key in ("data", "rare_class", "k", "arm")},
                "complete": complete,
                **iou_told,
                "f1_h": f1_told | {"recall_by_size": _by_size(arms[best_f1], arms[arm])},
                "goal": any(told["shown"] and told["difference"] >= GOAL for told in (iou_told, f1_told)),
                "other_classes": _other_classes(arms[best], arms[arm]),
            }
        )
    return rows


def _by_arm(
    results: Sequence[Mapping[str, Any]], plan: Plan
) -> tuple[dict[str, list[Mapping[str, Any]]], dict[str, Runs], set[str]]:
    """Results and runs by arm, and the arms of the plan of which runs are missing."""
    arms: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in results:
        arms[one["arm"]].append(one)
    runs = {arm: as_runs(found) for arm, found in arms.items()}
    missing = {arm for arm, draw, seed in plan.runs() if len(runs.get(arm, {}).get(draw, ())) <= seed}
    return arms, runs, missing


def over_real(results: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Of one plan's runs: what each arm gains over *real*, whether it has a GAN or not.

    As a row of `summary` tells it of the best arm: `real` and `added` are the means of a figure.
    """
    arms, runs, missing = _by_arm(results, plan)
    rows = []
    for arm in plan.arms:
        if arm == "real" or not set(runs.get("real", ())) & set(runs.get(arm, ())):
            continue
        complete = not missing & {arm, "real"}
        told = {figure: _held_against(arm, ["real"], runs, figure, complete) for figure in ("iou", "f1_h")}
        told["f1_h"]["recall_by_size"] = _by_size(arms["real"], arms[arm])
        first = arms[arm][0]
        row = {
            **{key: first[key] for key in ("data", "rare_class", "k", "arm")},
            "complete": complete,
            **told,
            "other_classes": _other_classes(arms["real"], arms[arm]),
        }
        rows.append(_renamed(row, {"best": "real", "gan": "added"}))
    return rows


def means(results: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Of one plan's runs: the mean figures of each arm over the draws that all of its arms have.

    `complete`: no run of the plan is missing.
    """
    arms, runs, missing = _by_arm(results, plan)
    draws = sorted(set.intersection(*(set(of) for of in runs.values()))) if runs else []
    rows = []
    for arm in plan.arms if draws else ():
        if arm in runs:
            of = {figure: mean_of(runs[arm], draws, figure) for figure in FIGURES}
            about = {key: arms[arm][0][key] for key in ("data", "rare_class", "k", "arm")}
            rows.append({**about, "complete": not missing, "draws": len(draws), **of})
    return rows


def _renamed(told: Any, names: Mapping[str, str]) -> Any:
    """The same with other names for some keys, at any depth; without the name of the arm held against."""
    if not isinstance(told, Mapping):
        return told
    kept = ((key, value) for key, value in told.items() if key != "best_without_gan")
    return {names.get(key, key): _renamed(value, names) for key, value in kept}


def _other_classes(
    best: Sequence[Mapping[str, Any]], gan: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Of each other class IoU and F1 of both arms and their lift."""
    first = best[0]
    names = [name for name in first["counts"]["classes"] if name != first["rare_class"]]
    return {
        name: {figure: _told(as_runs(best, name), as_runs(gan, name), figure) for figure in ("iou", "f1_h")}
        for name in names
    }


def _held_against(
    arm: str, plain: Sequence[str], runs: Mapping[str, Runs], figure: str, complete: bool
) -> dict[str, Any]:
    """A figure of an arm beside that of the arm without a GAN over which it gains least, and their alarms."""
    gains = {
        name: told["difference"]
        for name in plain
        if (told := lift(runs.get(name, {}), runs[arm], figure))["draws"]
    }
    best = min(gains, key=lambda name: gains[name])
    told = _told(runs[best], runs[arm], figure)
    alarms = _told(runs[best], runs[arm], "fa_per_mpx") if _has_alarms(runs[best], runs[arm]) else None
    more = alarms is not None and alarms["difference"] > 0
    above = told["low"] is not None and told["low"] > 0
    return {
        "best_without_gan": best,
        **told,
        "fa_per_mpx": alarms,
        "shown": bool(complete and above and not more),
    }


def _by_size(best: Sequence[Mapping[str, Any]], gan: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recall of the rare class by size: means as `mean_of` takes them, over the draws that both arms have.

    n: defects of that size among the test images. Under MIN_N of them there is no recall.
    """
    shared = {one["draw"] for one in best} & {one["draw"] for one in gan}

    def found(arm: Sequence[Mapping[str, Any]], size: str) -> float:
        by_draw = defaultdict(list)
        for one in arm:
            by_draw[one["draw"]].append(sum(one["counts"]["by_size"][size]["found"]))
        return _mean([_mean(by_draw[draw]) for draw in shared])

    told: dict[str, Any] = {}
    for size, of in best[0]["counts"]["by_size"].items():
        n = sum(of["truth"])
        shares = {
            name: found(arm, size) / n if n >= MIN_N else None for name, arm in (("best", best), ("gan", gan))
        }
        told[size] = {**shares, "n": n}
    return told


def _told(best: Runs, gan: Runs, figure: str) -> dict[str, Any]:
    """A figure of both arms and their lift."""
    shared = sorted(set(best) & set(gan))
    means = {"best": mean_of(best, shared, figure), "gan": mean_of(gan, shared, figure)}
    return means | lift(best, gan, figure)


def _has_alarms(*arms: Runs) -> bool:
    """Whether any image is free of the class: the area of such images is among the counts."""
    return all(run[:, COUNTS.index("area")].any() for arm in arms for fits in arm.values() for run in fits)


def as_runs(results: Sequence[Mapping[str, Any]], name: str | None = None) -> Runs:
    """The results of one arm by draw, as `lift` takes them, of a class: the rare one by default.

    Alarms are those of the rare class whatever the name.
    """
    runs: dict[int, list[NDArray[np.float64]]] = defaultdict(list)
    for one in results:
        told = one["counts"]["classes"][name or one["rare_class"]] | one["counts"]["clean"]
        runs[one["draw"]].append(np.array([told[key] for key in COUNTS], dtype=np.float64).T)
    return runs


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
