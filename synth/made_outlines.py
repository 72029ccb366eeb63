"""A mask GAN fitted to the marks of one class, and how its outlines stand beside labelled ones."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.synth.mask_bank import Bools, Mark, narrow
from rollsight.synth.mask_gan import FEWEST, GRID, OutlineRecipe, Outlines, fit_outlines, in_box, on_grid

HELD_SHARE = 0.2  # of the groups whose outlines are not learned, to compare with
LOOKED_AT = 200  # outlines made for the figures
PERCENTILES = (10, 50, 90)


def learn_outlines(
    marks: Sequence[Mark],
    recipe: OutlineRecipe,
    *,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Outlines | None, dict[str, Any]]:
    """The mask GAN of a class's marks, and what the card says of it; None, and why, where there is none.

    A fifth of the groups is held back, as far as FEWEST marks are left to learn from. Figures, of LOOKED_AT
    outlines made for boxes of held-back marks: `refused`, the share that is empty, in pieces or under 2 px
    wide; percentiles of `side_px` (of a square of the same area) and of `fill` (of its box), made and held;
    `nearest`, the median IoU in their boxes with the learned outline that is most like them, of made and of
    held-back ones. Made outlines far nearer to learned ones than held-back ones are would be copies.
    """
    told: dict[str, Any] = {"marks": len(marks)}
    if recipe.steps == 0:
        return None, told | {"why": "not asked for"}
    if len(marks) < FEWEST:
        return None, told | {"why": f"{len(marks)} marks, outlines are learned from {FEWEST} on"}
    groups = sorted({mark.group for mark in marks})
    order = np.random.default_rng([recipe.seed, 3]).permutation(len(groups))
    of_group = Counter(mark.group for mark in marks)
    back: set[str] = set()
    for i in order[: round(HELD_SHARE * len(groups))]:
        if len(marks) - sum(of_group[group] for group in (*back, groups[i])) >= FEWEST:
            back.add(groups[i])
    learned = [mark for mark in marks if mark.group not in back]
    held = [mark for mark in marks if mark.group in back]
    insides = [mark.inside[mark.box] for mark in learned]
    outlines = fit_outlines(insides, [mark.cut for mark in learned], recipe, on_step=on_step)
    told |= {"recipe": asdict(recipe), "held_marks": len(held)}
    return outlines, told | (_figures(outlines, insides, held, recipe.seed) if held else {})


def _figures(outlines: Outlines, learned: Sequence[Bools], held: Sequence[Mark], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 4])
    made = []
    for _ in range(LOOKED_AT):
        mark = held[int(rng.integers(len(held)))]
        height, width = mark.inside[mark.box].shape
        shape = in_box(outlines(int(rng.integers(2**31)), (height, width), mark.cut), (height, width))
        if shape is not None and not narrow(shape):
            made.append(shape)
    told: dict[str, Any] = {"refused": round(1 - len(made) / LOOKED_AT, 3)}
    if not made:
        return told
    sets = {"made": made, "held": [mark.inside[mark.box] for mark in held]}
    cells = _cells(learned)
    for name, of in sets.items():
        told[name] = {
            "side_px": [round(float(v), 1) for v in np.percentile([s.sum() ** 0.5 for s in of], PERCENTILES)],
            "fill": [round(float(v), 3) for v in np.percentile([s.mean() for s in of], PERCENTILES)],
            "nearest": round(float(np.median(_nearest(_cells(of), cells))), 3),
        }
    return told


def _cells(insides: Sequence[Bools]) -> Bools:
    """Outlines on the grid: (n, 32, 32)."""
    return np.stack([on_grid(inside) >= 0.5 for inside in insides])


def _nearest(of: Bools, among: Bools) -> NDArray[np.float64]:
    """The largest IoU of each outline (n, 32, 32) with one of others (m, 32, 32) or a mirror of it: (n,)."""
    flat = among.reshape(len(among), GRID * GRID).astype(np.float64)
    best = np.zeros(len(of))
    for mirrored in (of, of[:, ::-1], of[:, :, ::-1], of[:, ::-1, ::-1]):
        own = mirrored.reshape(len(of), GRID * GRID).astype(np.float64)
        both = own @ flat.T
        either = own.sum(axis=1)[:, None] + flat.sum(axis=1)[None] - both
        best = np.maximum(best, (both / either.clip(1)).max(axis=1))
    return best
