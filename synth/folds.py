"""A class of few pieces, each left out once: what all the nets find on the piece that they never saw."""

from collections.abc import Mapping, Sequence
from typing import Any

from rollsight.synth.arms import CHOICES, EVEN, figures
from rollsight.synth.proof import ROW

Rung = Mapping[str, Any]  # of `arms.ladder`
OF_PX = ("both", "either")  # of a class's counts those that IoU is of


def folds(
    told: Sequence[Mapping[str, Any]], pieces: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of one class's runs, one fit a piece: each run at its thresholds, and of each arm all pieces together.

    The thresholds of a piece are those with the highest IoU and F1_H over the other pieces, each seen by the
    net that it was left out of: the piece itself is not among the images that choose. Pieces together are
    those that all arms have, of so many `pieces`: `complete` where that is all of them. A piece alone is
    judged at EVEN. IoU and F1_H are of the pieces left out alone; alarms are on the groups without the
    class, which all nets have: their mean.
    """
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for one in told:
        by_arm.setdefault(one["arm"], {})[one["draw"]] = one
    shared = sorted(set.intersection(*(set(of) for of in by_arm.values()))) if by_arm else []
    rows, together = [], []
    for of in by_arm.values():
        at = {}
        for draw, one in of.items():
            others = [of[other]["ladder"] for other in shared if other != draw]
            rare = one["rare_class"]
            px, components = (_best(others, figure, rare) for figure in ("iou", "f1_h"))
            at[draw] = _joined(one["ladder"][px], one["ladder"][components])
            rows.append({**{key: one[key] for key in ROW}, **figures(at[draw], rare)})
        if shared:
            first = of[shared[0]]
            pooled = figures(_summed([at[draw] for draw in shared]), first["rare_class"])
            about = {key: first[key] for key in ("data", "rare_class", "arm")}
            together.append({**about, "complete": len(shared) == pieces, "pieces": len(shared), **pooled})
    return rows, together


def _best(ladders: Sequence[Sequence[Rung]], figure: str, rare: str) -> int:
    """The lowest rung with the highest figure over some pieces; that of EVEN where there is none."""
    rungs = [figures(_summed(rungs), rare)[figure] or 0.0 for rungs in zip(*ladders, strict=True)]
    return max(range(len(rungs)), key=rungs.__getitem__) if rungs else CHOICES.index(EVEN)


def _joined(px: Rung, components: Rung) -> dict[str, Any]:
    """What is found at one threshold of px and another of components."""
    classes = {
        name: {key: (px if key in OF_PX else components)["classes"][name][key] for key in of}
        for name, of in px["classes"].items()
    }
    return {"classes": classes, "by_size": components["by_size"], "clean": components["clean"]}


def _summed(rungs: Sequence[Rung]) -> dict[str, Any]:
    """The counts of several pieces."""

    def added(found: Sequence[Any]) -> Any:
        if isinstance(found[0], Mapping):
            return {key: added([one[key] for one in found]) for key in found[0]}
        return sum(found)

    return {key: added([rung[key] for rung in rungs]) for key in ("classes", "by_size", "clean")}
