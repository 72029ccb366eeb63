"""Losses in which each component counts alike, however small; no library has them.

logits (N, K, H, W), unnormalised; labels (N, H, W), int64 in [0, K), 255 = ignored. regions (N, H, W)
int64: the component nearest to each pixel, 1 to C, different in each sample, 0 where there is none;
areas (C + 1,) float: the px of the whole component. Both come from the whole mask, before any crop or warp
(`augment.component_planes`): half of the small components in a crop are slivers of larger ones, so a
component weighs by the share of it that is seen. Every loss is fp32, and 0 where no component is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rollsight.inspect.labels import IGNORE
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Components:
    """The components that are seen in a batch, by id: all (C + 1,)."""

    defect_class: Tensor  # int64
    sample: Tensor  # int64
    seen: Tensor  # px
    weight: Tensor  # share of the component that is seen, 0 to 1; 0 of no component


def cc_dice_ce(logits: Tensor, labels: Tensor, regions: Tensor, areas: Tensor) -> Tensor:
    """Dice and cross-entropy of each component in its own region, the mean over components.

    Bouteille et al. 2025, arXiv:2511.17146 (CC-DiceCE): the region is what lies nearer to the component
    than to any other, its Voronoi cell. Class against rest, as arXiv:2604.24276 has it for several classes.
    """
    found, defect = _components(labels, regions, areas)
    flat, counted = regions.flatten(), labels != IGNORE
    p = logits.float().softmax(dim=1)
    own = p.gather(1, found.defect_class[regions][:, None])[:, 0]  # probability of the region's class
    inside = _sums(own * defect, flat, found)
    mass = _sums(own * counted, flat, found)
    nats = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE)
    size = torch.bincount(flat[counted.flatten()], minlength=len(areas))
    entropy = _sums(nats, flat, found) / size.clamp(min=1)
    return _mean(1 - (2 * inside + 1) / (mass + found.seen + 1) + entropy, found)


def blob(logits: Tensor, labels: Tensor, regions: Tensor, areas: Tensor) -> Tensor:
    """Dice of each component against its sample's background, the other components left out; the mean.

    Kofler et al. 2022, arXiv:2205.08209, with Dice as in its experiments, class against rest.
    """
    found, defect = _components(labels, regions, areas)
    p = logits.float().softmax(dim=1)
    own = p.gather(1, found.defect_class[regions][:, None])[:, 0]
    inside = _sums(own * defect, regions.flatten(), found)
    outside = (p * (labels == 0)[:, None]).sum(dim=(2, 3))  # (N, K), of the background alone
    mass = inside + outside[found.sample, found.defect_class]
    return _mean(1 - (2 * inside + 1) / (mass + found.seen + 1), found)


def _components(labels: Tensor, regions: Tensor, areas: Tensor) -> tuple[_Components, Tensor]:
    """The components seen, and where (N, H, W)."""
    defect = (labels != IGNORE) & (labels > 0) & (regions > 0)
    ids, samples = regions[defect], defect.nonzero()[:, 0]
    seen = torch.bincount(ids, minlength=len(areas))
    defect_class, sample = (torch.zeros_like(seen).index_put((ids,), x) for x in (labels[defect], samples))
    weight = (seen / areas.clamp(min=1)).clamp(max=1)
    return _Components(defect_class, sample, seen, weight), defect


def _sums(values: Tensor, flat: Tensor, found: _Components) -> Tensor:
    """The sum of `values` (N, H, W) over each region: (C + 1,)."""
    return values.new_zeros(len(found.seen)).index_add(0, flat, values.flatten())


def _mean(losses: Tensor, found: _Components) -> Tensor:
    return (losses * found.weight).sum() / found.weight.sum().clamp(min=1)


INSTANCE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "blob": blob,
    "cc_dice": cc_dice_ce,
}
