"""Models against each other on the same data: differences paired by group, and whether they are shown.

"Better" is said only where the 95 % interval of the difference holds no 0; else nothing is shown.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.metrics import (
    MIN_N,
    Counts,
    Tally,
    alarms_per_mpx,
    bootstrap,
    bootstrap_difference,
    hit_f1,
    mean_iou,
    tiny_small_recall,
)
from rollsight.inspect.roll_places import write_durably

FIGURES: dict[str, Callable[[Counts], NDArray[np.float64]]] = {
    "miou": mean_iou,
    "f1_h": hit_f1,
    "recall_tiny_small": tiny_small_recall,
    "fa_per_mpx": alarms_per_mpx,
}
LESS_IS_BETTER = ("fa_per_mpx",)
STANDS_ON = {"miou": 4, "f1_h": 4, "recall_tiny_small": 2}  # defects of so many sizes, from tiny up
TITLES = {
    "miou": "mIoU",
    "f1_h": "F1 (hit)",
    "recall_tiny_small": "recall tiny + small",
    "fa_per_mpx": "false alarms per Mpx",
}
NOT_SHOWN = "not shown"
# Okabe & Ito 2008: told apart with any colour vision
COLOURS = {"better": "#009E73", "worse": "#D55E00", NOT_SHOWN: "#777777"}


def compare(tallies: Mapping[str, Tally], draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Figures of each model, and the differences of all but the first to it, with 95 % intervals over groups.

    The same draws of groups serve every model. A figure is {value, low, high}, a difference has `says` as
    well: "better", "worse" or "not shown". None where a figure is undefined, or, but for false
    alarms, stands on fewer than 10 defects. Raises ValueError where the tallies did not count the same groups
    and classes.
    """
    names = list(tallies)
    first = tallies[names[0]]
    for tally in tallies.values():
        if tally.groups != first.groups or tally.classes != first.classes or not first.groups:
            raise ValueError("a paired difference needs the same groups and classes on both sides")
    counts = {name: tally.statistics() for name, tally in tallies.items()}
    by_size = counts[names[0]]["truth"].sum(axis=(0, 1))  # (4,) defects, tiny first
    enough = dict.fromkeys(FIGURES, True)
    enough |= {figure: int(by_size[:sizes].sum()) >= MIN_N for figure, sizes in STANDS_ON.items()}
    values = {
        name: _all_figures({key: table.sum(axis=0) for key, table in c.items()}) for name, c in counts.items()
    }
    models = []
    for name in names:
        spans = np.stack(bootstrap(counts[name], _all_figures, draws, seed), axis=-1)
        rows = zip(FIGURES, values[name], spans, strict=True)
        models.append({"name": name, **{key: _figure(value, span, enough[key]) for key, value, span in rows}})
    differences = []
    for name in names[1:]:
        pair = bootstrap_difference(counts[names[0]], counts[name], _all_figures, draws, seed)
        rows = zip(FIGURES, values[name] - values[names[0]], np.stack(pair, axis=-1), strict=True)
        told = {key: _figure(value, span, enough[key]) for key, value, span in rows}
        differences.append(
            {
                "name": name,
                "against": names[0],
                **{key: figure | {"says": _says(key, figure)} for key, figure in told.items()},
            }
        )
    return {"n_groups": len(first.groups), "models": models, "differences": differences}


def _all_figures(counts: Counts) -> NDArray[np.float64]:
    return np.stack([figure(counts) for figure in FIGURES.values()], axis=-1)


def _figure(value: float, span: NDArray[np.float64], enough: bool) -> dict[str, float | None]:
    numbers = (value, *span) if enough else (np.nan,) * 3
    return {
        key: float(x) if np.isfinite(x) else None
        for key, x in zip(("value", "low", "high"), numbers, strict=True)
    }


def _says(figure: str, difference: Mapping[str, float | None]) -> str:
    """What a difference says: better or worse only where its interval holds no 0."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return NOT_SHOWN
    return "better" if (low > 0) != (figure in LESS_IS_BETTER) else "worse"


def in_words(difference: Mapping[str, Any]) -> str:
    """One model against the first, as a sentence."""
    told: dict[str, list[str]] = {"better": [], "worse": [], NOT_SHOWN: [], "": []}
    for key, title in TITLES.items():
        told[difference[key]["says"] if difference[key]["low"] is not None else ""].append(title)
    parts = [f"{says} in {', '.join(told[says])}" for says in ("better", "worse") if told[says]]
    if told[NOT_SHOWN]:
        parts.append(f"a difference in {', '.join(told[NOT_SHOWN])} is not shown: its interval holds 0")
    if told[""]:
        parts.append(f"nothing can be said of {', '.join(told[''])}: too few defects or groups")
    return f"{difference['name']} against {difference['against']}: {'; '.join(parts)}"


def draw(comparison: Mapping[str, Any], title: str, path: Path) -> None:
    """The differences with their intervals as a PNG, whole or not at all."""
    from matplotlib.figure import Figure

    differences = comparison["differences"]
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(differences)), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(TITLES), sharey=True, squeeze=False)[0]
    for panel, (key, name) in zip(panels, TITLES.items(), strict=True):
        panel.axvline(0, color="#1b1f24", linewidth=1)
        for row, difference in enumerate(differences):
            told = difference[key]
            if told["value"] is None:
                panel.annotate("too few", (0, row), ha="center", va="center", fontsize=8, backgroundcolor="w")
                continue
            colour = COLOURS[told["says"]]
            if told["low"] is not None:
                panel.plot((told["low"], told["high"]), (row, row), color=colour, linewidth=2.5)
            panel.plot(told["value"], row, "o", color=colour, markersize=7)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("less is better" if key in LESS_IS_BETTER else "more is better", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.3)
        panel.margins(x=0.15)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(differences)), [d["name"] for d in differences])
    panels[0].set_ylim(len(differences) - 0.5, -0.5)
    for says, colour in COLOURS.items():
        panels[0].plot([], [], "o-", color=colour, label=says)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, out.getvalue())
