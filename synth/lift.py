"""Whether an arm finds more of a rare class than another: paired over draws, fits and groups."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.synth.arms import WITHOUT_GAN

DRAWS = 1000  # of the bootstrap
ENOUGH = 3  # paired draws of scenes without which no interval is given

Runs = Mapping[int, Sequence[NDArray[np.float64]]]  # draw -> counts (G, 6) of each of its fits
COUNTS = ("both", "either", "truth", "found", "true", "predicted")


def iou(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pooled IoU of summed counts (..., 6)."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1)


def f1_h(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1 by match H of summed counts (..., 6)."""
    recall = counts[..., 3] / np.maximum(counts[..., 2], 1)
    precision = counts[..., 4] / np.maximum(counts[..., 5], 1)
    return 2 * recall * precision / np.maximum(recall + precision, 1e-12)


FIGURES = {"iou": iou, "f1_h": f1_h}


def lift(first: Runs, second: Runs, figure: str, seed: int = 0) -> dict[str, Any]:
    """Figure of `second` minus that of `first`, mean over the draws that both have, with its 95 % interval.

    A hierarchical bootstrap (Davison & Hinkley 1997, sec. 3.8): draws of the scenes with replacement, in each
    one fit of each arm at random, and the test groups once for all of them, since every draw is judged on
    the same images. low and high are None with fewer than 3 draws.
    """
    of = FIGURES[figure]
    draws = sorted(set(first) & set(second))
    if not draws:
        return {"difference": None, "low": None, "high": None, "draws": 0}
    means = [
        [_mean([float(of(run.sum(axis=0))) for run in arm[d]]) for d in draws] for arm in (first, second)
    ]
    told: dict[str, Any] = {
        "difference": float(np.mean(np.subtract(means[1], means[0]))),
        "low": None,
        "high": None,
        "draws": len(draws),
    }
    if len(draws) < ENOUGH:
        return told
    rng = np.random.default_rng(seed)
    groups = len(first[draws[0]][0])
    values = np.empty(DRAWS)
    for i in range(DRAWS):
        weights = rng.multinomial(groups, np.full(groups, 1 / groups)).astype(np.float64)
        chosen = [draws[int(j)] for j in rng.integers(len(draws), size=len(draws))]
        pairs = [[arm[d][int(rng.integers(len(arm[d])))] for arm in (first, second)] for d in chosen]
        sums = np.array([[weights @ run for run in pair] for pair in pairs])  # (draws, 2, 6)
        values[i] = (of(sums[:, 1]) - of(sums[:, 0])).mean()
    told["low"], told["high"] = (float(x) for x in np.percentile(values, (2.5, 97.5)))
    return told


def summary(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each data, rare class and k: the best arm without a GAN, those with one, and their differences.

    results: what `Proof.result` tells. The best arm is the one with the highest mean IoU on these very draws,
    which favours it. `shown` is true where the interval lies above 0 and false alarms are not more.
    """
    by_case: dict[tuple[str, str, int | None], dict[str, list[Mapping[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for one in results:
        by_case[one["data"], one["rare_class"], one["k"]][one["arm"]].append(one)
    rows = []
    for (data, rare, k), arms in sorted(by_case.items(), key=str):
        means = {arm: _mean([one["iou"] for one in found]) for arm, found in arms.items()}
        plain = {arm: means[arm] for arm in WITHOUT_GAN if arm in means}
        if not plain:
            continue
        best = max(plain, key=lambda arm: plain[arm])
        for arm in [name for name in means if name not in WITHOUT_GAN]:
            before, after = as_runs(arms[best]), as_runs(arms[arm])
            told = {figure: lift(before, after, figure) for figure in FIGURES}
            alarms = [_mean([one["fa_per_mpx"] or 0.0 for one in arms[name]]) for name in (best, arm)]
            rows.append(
                {
                    "data": data,
                    "rare_class": rare,
                    "k": k,
                    "arm": arm,
                    "best_without_gan": best,
                    "best": means[best],
                    "gan": means[arm],
                    **told["iou"],
                    "f1_h": told["f1_h"],
                    "fa_per_mpx": {"best": alarms[0], "gan": alarms[1]},
                    "shown": bool((told["iou"]["low"] or -1) > 0 and alarms[1] <= alarms[0]),
                }
            )
    return rows


def as_runs(results: Sequence[Mapping[str, Any]]) -> Runs:
    """The results of one arm by draw, as `lift` takes them."""
    runs: dict[int, list[NDArray[np.float64]]] = defaultdict(list)
    for one in results:
        runs[one["draw"]].append(np.array([one["counts"][name] for name in COUNTS], dtype=np.float64).T)
    return runs


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
