"""What a training minimises: the terms that its recipe names, added up."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from rollsight.inspect import losses
from rollsight.inspect.instance_losses import INSTANCE_LOSSES
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.sampling import Batch
from torch import Tensor


def objective(
    outputs: Sequence[Tensor],
    batch: Batch,
    recipe: Recipe,
    step: int,
    bounds: Sequence[int],
    taught: tuple[Tensor, Sequence[int]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and its terms before they are weighed.

    outputs: logits (N, K + 1, H, W) of the net, then of its coarser depths; each of these counts half of
    the one before, all together 1 (nnU-Net's way: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z).
    bounds: the first canvas after those of each source. taught: the teacher's logits for the channels
    of the net that both know, and these channels.
    """
    ramp = min(1.0, step / max(1.0, recipe.small_ramp * recipe.steps))
    weights = {"small": recipe.small_weight * ramp, "instance": recipe.instance_weight}
    shares = [0.5**depth for depth in range(len(outputs))]
    terms: dict[str, Tensor] = {}
    for raw, share in zip(outputs, shares, strict=True):
        for name, term in _terms(raw, batch, recipe, bounds).items():
            terms[name] = terms.get(name, 0.0) + share / sum(shares) * term
    if taught is not None:
        logits, channels = taught
        terms["teacher"] = losses.distillation(outputs[0][:, list(channels)], logits, batch.labels)
    loss = sum((weights.get(name, 1.0) * term for name, term in terms.items()), torch.zeros(()))
    return loss, terms


def _terms(raw: Tensor, batch: Batch, recipe: Recipe, bounds: Sequence[int]) -> dict[str, Tensor]:
    logits, labels = losses.merge_unlabelled(raw, batch.labelled), batch.labels
    names = losses.LOSSES[recipe.loss]
    terms = {}
    for name in names:
        if name in losses.REGIONAL:
            terms[name] = _by_source(losses.REGIONAL[name], logits, labels, bounds)
    if "focal" in names or recipe.small_weight:  # a quarter of all losses' time, so once for both
        fading = losses.focal_map(logits, labels, recipe.focal_gamma)
        if "focal" in names:
            terms["focal"] = losses.counted_mean(fading, labels)
        if recipe.small_weight:
            terms["small"] = losses.weighted_mean(fading, labels, batch.weights)
    if batch.regions is not None:
        by_component = INSTANCE_LOSSES[recipe.instance]
        terms["instance"] = by_component(logits, labels, batch.regions, batch.areas)
    return terms


def _by_source(
    compare: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, bounds: Sequence[int]
) -> Tensor:
    """The loss of each source's canvases, weighed by how many they are."""
    if len(bounds) == 1:  # the gradient of a slice is a copy
        return compare(logits, labels)
    shares = [(b - a) / bounds[-1] for a, b in pairwise([0, *bounds])]
    parts = [compare(logits[a:b], labels[a:b]) for a, b in pairwise([0, *bounds])]
    return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum()
