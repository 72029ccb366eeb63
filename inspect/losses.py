"""Losses of a segmenter, in fp32: half-precision sums overflow (segmentation_models.pytorch issue 463).

Everywhere: logits (N, K, H, W), unnormalised, K counts the background (channel 0); labels (N, H, W),
int64 in [0, K), 255 = ignored.
"""

import torch
import torch.nn.functional as F
from rollsight.inspect.labels import IGNORE
from torch import Tensor

FOCAL_GAMMA = 1.0  # 2 in the paper; the masks of public steel data are noisy, and focal at 2 did worst there


def merge_unlabelled(logits: Tensor, labelled: Tensor) -> Tensor:
    """Count classes that a source does not label as its background: (N, K, H, W) -> the same.

    labelled (N, K) bool, True where the sample's source labels the class (channel 0 always True). A
    background pixel of such a source may hold an unlabelled class, a labelled defect may not. Shi et al.
    2021, arXiv:2007.03868, eq. 3 (marginal loss), on logits: the background's becomes the log of the sum
    of the exponents of all that it holds, the channels merged away get -1e9.
    """
    return torch.stack([_merged(one, known) for one, known in zip(logits.float(), labelled, strict=True)])


def _merged(logits: Tensor, labelled: Tensor) -> Tensor:
    """One sample of `merge_unlabelled`: (K, H, W), (K,) -> (K, H, W)."""
    defect = labelled.clone()
    defect[0] = False
    background = logits[~defect].logsumexp(dim=0, keepdim=True)
    return torch.cat([background, torch.where(defect[:, None, None], logits, -1e9)[1:]])


def focal_map(logits: Tensor, labels: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """Cross-entropy that fades on easy pixels, so a scratch outweighs clean steel: (N, H, W), in nats.

    Lin et al. 2017, arXiv:1708.02002, eq. 4. Ignored pixels are 0.
    """
    nats = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE)
    # Not 0: below gamma 1 the slope there is infinite.
    return (1 - (-nats).exp()).clamp(min=1e-6) ** gamma * nats


def focal(logits: Tensor, labels: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """The mean of `focal_map` over the pixels that count; 0 where none does."""
    return focal_map(logits, labels, gamma).sum() / (labels != IGNORE).sum().clamp(min=1)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - soft Dice of the defect classes that occur, pooled over the batch; 0 where none occurs.

    Milletari et al. 2016, arXiv:1606.04797, eq. 8, with p and g not squared in the denominator. Pooling
    over the batch keeps an image with a few defect pixels from weighing like one full of them; a class
    that does not occur has no Dice (its false alarms are the focal term's business).
    """
    classes = logits.shape[1]
    counted = labels != IGNORE
    truth = torch.where(counted, labels, 0)
    p = logits.float().softmax(dim=1) * counted[:, None]
    # Gathered at the label: a one-hot truth made a training step 20 % longer (measured 2026-11-22).
    right = p.gather(1, truth[:, None])[:, 0]
    overlap = p.new_zeros(classes).index_add(0, truth.flatten(), right.flatten())[1:]
    area = torch.bincount(labels[counted], minlength=classes)[1:]
    occurs = area > 0
    if not occurs.any():
        return p.sum() * 0.0  # of p, not of logits: a sum in half precision may be inf, and inf * 0 is nan
    total = p.sum(dim=(0, 2, 3))[1:] + area
    return (1 - (2 * overlap + 1) / (total + 1))[occurs].mean()


def small_object(logits: Tensor, labels: Tensor, weight: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """Focal on the components and their rings, each pixel weighted by how small its component is.

    weight (N, H, W) float: sqrt(A_ref / A) clipped to [1, 8] on components and rings (`component_weight`),
    0 elsewhere. Normalised by its own sum, so that weights move the loss within defect regions and never
    its scale: global inverse-size weights destabilise training (arXiv:2604.24276). 0 where there is none.
    Little of it goes far: it leaves clean strip out, and at 0.5 inclusions were drawn at 1.4x their area;
    divided by all pixels instead, defects of 13 px were not learned at all (both measured 2026-11-22).
    """
    weight = weight.float() * (labels != IGNORE)
    return (weight * focal_map(logits, labels, gamma)).sum() / weight.sum().clamp(min=1)
