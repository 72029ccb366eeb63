"""What the trainings of bench/trainings.py left, and paired intervals over their seeds and groups."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.metrics import Counts

KEPT = Path(__file__).parent / "results" / "trainings"
DRAWS = 2000

Figure = Callable[[Counts], NDArray[np.float64]]
Seeds = Sequence[Counts]  # of each seed: counter name -> (G, ...)


def figures_of(pattern: str = "*") -> list[dict[str, Any]]:
    """The figures of the trainings that are judged, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob(f"{pattern}.json"))]


def counts_of(name: str) -> dict[str, NDArray[np.int64]]:
    """Counts by group of a training: counter name -> (G, ...)."""
    with np.load(KEPT / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def save_counts(path: Path, tables: Counts) -> None:
    """Counts by group, put in place by rename: counter name -> (G, ...)."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **tables)
    temporary.replace(path)


def mean_figure(runs: Seeds, figure: Figure) -> float:
    """The mean over seeds of a figure of all groups."""
    return float(np.mean([figure({key: table.sum(axis=0) for key, table in run.items()}) for run in runs]))


def interval(runs: Seeds, figure: Figure, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over seeds; seeds and groups are drawn (Efron 1979), groups alike for all."""
    return _percentiles(_drawn([runs], figure, seed)[0])


def difference(
    base: Seeds, other: Seeds, figure: Figure, *, relative: bool = False, seed: int = 0
) -> tuple[float, float, float]:
    """figure(other) - figure(base), and its 95 % interval; relative: as a share of figure(base) as it is.

    The mean over seeds on each side. A draw takes the same groups for both sides, and seeds of each side
    for itself: a seed of one arm has nothing in common with that of another but its number. Not as a share of
    the draw's own figure: of few groups, some draws have none (4 % of those of mt).
    """
    values = [mean_figure(runs, figure) for runs in (base, other)]
    first, second = _drawn([base, other], figure, seed)
    scale = values[0] if relative else 1.0
    return ((values[1] - values[0]) / scale, *_percentiles((second - first) / scale))


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def _drawn(sides: Sequence[Seeds], figure: Figure, seed: int) -> list[NDArray[np.float64]]:
    """The figure of each draw, (DRAWS,), for each side."""
    rng = np.random.default_rng(seed)
    groups = len(next(iter(sides[0][0].values())))
    times = rng.multinomial(groups, np.full(groups, 1 / groups), size=DRAWS)  # (DRAWS, G)
    found = []
    for runs in sides:
        by_seed = np.stack(
            [figure({key: np.tensordot(times, table, axes=1) for key, table in run.items()}) for run in runs]
        )  # (S, DRAWS)
        picked = rng.integers(len(runs), size=(len(runs), DRAWS))
        found.append(np.take_along_axis(by_seed, picked, axis=0).mean(axis=0))
    return found
