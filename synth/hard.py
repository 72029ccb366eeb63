"""Samples that a net finds hard: of some candidates the one on which it agrees least with the label.

All candidates have the same marks on the same steel: an editor makes them of other latents, plain pastes lie
at other places. Where the net sees next to nothing, the label is more likely wrong than the sample hard.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from rollsight.synth.backgrounds import Backgrounds
from rollsight.synth.compose import Made, Order, make_sample
from rollsight.synth.generator import Generator
from rollsight.synth.mask_bank import Bools, Plane
from rollsight.synth.realism import AREA, DISAGREES, KEPT, area_ratio, iou_nearby

CANDIDATES = 4

Sees = Callable[[Plane], Bools]  # where a net sees the class on an image (H, W)


def hard_samples(
    generator: Generator, backgrounds: Backgrounds, order: Order, *, sees: Sees
) -> Callable[[int], Made]:
    """What makes sample `index` of an order, the hardest of its candidates, for `make_data`."""
    return partial(_hardest, generator, backgrounds, order, sees)


def _hardest(generator: Generator, backgrounds: Backgrounds, order: Order, sees: Sees, index: int) -> Made:
    """The candidate with the least agreement of DISAGREES or more; with the most where none has so much.

    Among those whose contrast and area hold, if there is any. Its provenance has its number, with which
    `make_sample` makes it again, and the agreement.
    """
    made = [make_sample(generator, backgrounds, order, index, number) for number in range(CANDIDATES)]
    agreed = [agreement(one, sees) for one in made]
    holding = [number for number, one in enumerate(made) if _holds(one)] or range(CANDIDATES)
    seen = [number for number in holding if agreed[number] >= DISAGREES]
    chosen = min(seen, key=lambda i: agreed[i]) if seen else max(holding, key=lambda i: agreed[i])
    made[chosen].provenance.update(candidate=chosen, agreement=round(agreed[chosen], 4))
    return made[chosen]


def agreement(made: Made, sees: Sees) -> float:
    """IoU of the new marks with what a net sees on and near them."""
    new: Bools = np.logical_or.reduce(made.marks)
    found = sees(made.image.astype(np.float32) / np.float32(255))
    return iou_nearby(found & ((made.mask == 0) | new), new)


def _holds(made: Made) -> bool:
    """Whether `inspect synth check` would keep it, as far as contrast and area go."""
    image, new = made.image.astype(np.float32) / np.float32(255), np.logical_or.reduce(made.marks)
    ratios = [area_ratio(image, inside, new & ~inside) for inside in made.marks]
    kept = min(mark["contrast_kept"] for mark in made.provenance["marks"])
    return kept >= KEPT and all(AREA[0] <= ratio <= AREA[1] for ratio in ratios)
