"""Is last night like the nights before? Control bands for counts, distances for scores."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

SIGMAS = 3.0
LEAST_NIGHTS = 8  # with an area, before the last: fewer make no band
RUN = 9  # nights in a row on one side of the mean are a shift (Nelson 1984, rule 2)
SCORE_BINS = 20  # of equal width over 0 to 1
LEAST_SCORES = 50  # on either side, for a distance
SHARE = 0.1  # of the reference that each class of the distance holds at least
WATCH, DRIFT = 0.1, 0.25  # the usual bounds of the index (Siddiqi 2006, Credit Risk Scorecards, ch. 10)
CHANCE = 3.0  # standard deviations above its mean by chance that an index must have to be told

Says = Literal["in band", "above", "below", "risen", "fallen", "too few nights"]


@dataclass(frozen=True, slots=True)
class Control:
    """Counts per area, night by night, with the band that the nights before the last make."""

    rate: NDArray[np.float64]  # (N,) counts per unit of area; nan where nothing was inspected
    mean: float | None  # None where there are too few nights
    low: NDArray[np.float64]  # (N,) the band of each night: it is wider where less was inspected
    high: NDArray[np.float64]
    spread: float  # how much wider than by chance the band is, 1 or more
    says: Says  # of the last night


def u_chart(counts: ArrayLike, areas: ArrayLike) -> Control:
    """The u chart of counts (N,) on areas (N,), oldest first; the last night is judged by those before it.

    Shewhart's u chart (ISO 7870-2:2023): mean +- 3 sqrt(mean / area), Poisson counts. Defects come in
    clusters, so the band is widened by how much the nights really scatter, as Laney does (2002, Quality
    Engineering 14(4), 531-537): the mean moving range of their z values over 1.128, never below 1.
    """
    count, area = np.asarray(counts, dtype=float), np.asarray(areas, dtype=float)
    seen = area > 0
    rate = np.full(len(count), np.nan)
    rate[seen] = count[seen] / area[seen]
    blank = np.full(len(count), np.nan)
    before = seen.copy()
    before[-1:] = False
    if before.sum() < LEAST_NIGHTS:
        return Control(rate, None, blank, blank, 1.0, "too few nights")
    mean = float(count[before].sum() / area[before].sum())
    sigma = np.sqrt(mean / np.where(seen, area, np.nan))
    spread = 1.0
    if mean > 0:
        z = (rate[before] - mean) / sigma[before]
        spread = max(1.0, float(np.abs(np.diff(z)).mean() / 1.128))
    low, high = np.maximum(mean - SIGMAS * spread * sigma, 0), mean + SIGMAS * spread * sigma
    return Control(rate, mean, low, high, spread, _says(rate[seen], low[seen], high[seen], mean, seen[-1]))


def _says(
    rate: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], mean: float, last: bool
) -> Says:
    if last and rate[-1] > high[-1]:
        return "above"
    if last and rate[-1] < low[-1]:
        return "below"
    if len(rate) >= RUN and (rate[-RUN:] > mean).all():
        return "risen"
    if len(rate) >= RUN and (rate[-RUN:] < mean).all():
        return "fallen"
    return "in band"


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the scores of one night lie from those of the reference."""

    index: float | None  # population stability index; None where there are too few scores
    by_chance: float | None  # what it may be without any change
    n: int
    n_reference: int
    says: Literal["alike", "watch", "drift", "too few scores"]


def score_drift(reference: ArrayLike, now: ArrayLike) -> Drift:
    """The population stability index of two histograms of scores, (SCORE_BINS,) counts each.

    Bins are joined until each holds a tenth of the reference. Without any change the index is about
    (B - 1) chi-squared over the two sizes (Yurdakul & Naranjo 2020, J. Risk Model Validation 14(4)): one that
    is not 3 standard deviations above that is told as alike, whatever the usual bounds 0.1 and 0.25 say.
    """
    old, new = np.asarray(reference, dtype=float), np.asarray(now, dtype=float)
    n_old, n_new = int(old.sum()), int(new.sum())
    if min(n_old, n_new) < LEAST_SCORES:
        return Drift(None, None, n_new, n_old, "too few scores")
    group = np.minimum((np.cumsum(old) - old) / n_old // SHARE, 1 / SHARE - 1).astype(int)
    group = np.unique(group, return_inverse=True)[1]
    size = int(group.max()) + 1
    p = np.bincount(group, old, size) + 0.5  # half a score each: no bin is empty
    q = np.bincount(group, new, size) + 0.5
    p, q = p / p.sum(), q / q.sum()
    index = float(((q - p) * np.log(q / p)).sum())
    noise = 1 / n_old + 1 / n_new
    chance = noise * ((size - 1) + CHANCE * np.sqrt(2 * (size - 1)))
    if index <= max(WATCH, chance):
        return Drift(index, float(chance), n_new, n_old, "alike")
    return Drift(index, float(chance), n_new, n_old, "drift" if index > DRIFT else "watch")
