"""Losses of a segmenter, in fp32: half-precision sums overflow (segmentation_models.pytorch issue 463).

Everywhere: logits (N, K, H, W), unnormalised, K counts the background (channel 0); labels (N, H, W),
int64 in [0, K), 255 = ignored. A loss of a batch without a pixel that counts is 0. The losses that count
by component are in `instance_losses`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from kornia.losses import lovasz_softmax_loss
from numpy.typing import NDArray
from rollsight.inspect.labels import IGNORE
from scipy import ndimage
from torch import Tensor

FOCAL_GAMMA = 1.0  # 2 in the paper; the masks of public steel data are noisy, and focal at 2 did worst there
FALSE_ALARM, MISS = 0.3, 0.7  # of Tversky: what a false pixel costs, and a missed one (its paper's best)
BOUNDARY_REACH = 16.0  # px: an error further from the boundary costs no more
TEMPERATURE = 2.0  # of distillation: 1 is the plain softmax, more tells more of the unlikely classes


def merge_unlabelled(logits: Tensor, labelled: Tensor) -> Tensor:
    """Count classes that a source does not label as its background: (N, K, H, W) -> the same.

    labelled (N, K) bool, True where the sample's source labels the class (channel 0 always True). A
    background pixel of such a source may hold an unlabelled class, a labelled defect may not. Shi et al.
    2021, arXiv:2007.03868, eq. 3 (marginal loss), on logits: the background's becomes the log of the sum
    of the exponents of all that it holds, the channels merged away get -1e9.
    """
    if labelled.all():
        return logits.float()
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
    if gamma == 0:
        return nats
    # Not 0: below gamma 1 the slope there is infinite.
    return (1 - (-nats).exp()).clamp(min=1e-6) ** gamma * nats


def focal(logits: Tensor, labels: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """The mean of `focal_map` over the pixels that count; 0 where none does.

    kornia's divides by the ignored pixels and by the classes too, so its scale moves with both.
    """
    return counted_mean(focal_map(logits, labels, gamma), labels)


def counted_mean(found: Tensor, labels: Tensor) -> Tensor:
    """The mean of a map (N, H, W), 0 on ignored pixels, over the others; 0 where there is none."""
    return found.sum() / (labels != IGNORE).sum().clamp(min=1)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - soft Dice of the defect classes that occur, pooled over the batch; 0 where none occurs.

    Milletari et al. 2016, arXiv:1606.04797, eq. 8, with p and g not squared in the denominator. Pooling
    over the batch keeps an image with a few defect pixels from weighing like one full of them (kornia's
    Dice does not pool); a class that does not occur has no Dice (its false alarms are the focal term's
    business).
    """
    overlap, mass, area = _overlaps(logits, labels)
    occurs = area > 0
    if not occurs.any():
        return mass.sum() * 0.0
    return (1 - (2 * overlap + 1) / (mass + area + 1))[occurs].mean()


def tversky(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice that forgives false pixels more than missed ones: 0.3 to 0.7; pooled as `dice`.

    Salehi et al. 2017, arXiv:1706.05721. At 0.5 to 0.5 it is `dice`, its smoothing included.
    """
    overlap, mass, area = _overlaps(logits, labels)
    occurs = area > 0
    if not occurs.any():
        return mass.sum() * 0.0
    wrong = FALSE_ALARM * (mass - overlap) + MISS * (area - overlap)
    return (1 - (overlap + 0.5) / (overlap + wrong + 0.5))[occurs].mean()


def _overlaps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each defect class: its probability inside the truth, all of it, the area in px; (K - 1,) each."""
    classes = logits.shape[1]
    counted = labels != IGNORE
    truth = torch.where(counted, labels, 0)
    p = logits.float().softmax(dim=1) * counted[:, None]
    # Gathered at the label: a one-hot truth made a training step 20 % longer (measured 2026-11-22).
    right = p.gather(1, truth[:, None])[:, 0]
    overlap = p.new_zeros(classes).index_add(0, truth.flatten(), right.flatten())[1:]
    area = torch.bincount(labels[counted], minlength=classes)[1:]
    return overlap, p.sum(dim=(0, 2, 3))[1:], area


def lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """The convex extension of 1 - IoU, mean over background and classes that occur, pooled over the batch.

    Berman et al. 2018, arXiv:1705.08790. kornia's knows no ignored pixels, pools no batch and
    averages over absent classes too: it is handed the pixels that count as one image, and weights that
    leave the absent ones out.
    """
    counted = labels != IGNORE
    truth = labels[counted]
    pixels = logits.float().movedim(1, 0)[:, counted]  # (K, counted)
    if not truth.numel():
        return logits.float().sum() * 0.0
    occurs = torch.bincount(truth, minlength=len(pixels)) > 0
    weight = occurs * len(pixels) / occurs.sum()
    return lovasz_softmax_loss(pixels[None, :, None], truth[None, None], weight)  # type: ignore[no-any-return]


def boundary(logits: Tensor, labels: Tensor) -> Tensor:
    """Errors |p - g| of the classes weighed by the distance to their boundary, mean over pixels: 0 to 2.

    Kervadec et al. 2019, arXiv:1812.07032, with the constant it drops, so that the truth costs 0: inside the
    signed distance (px, 0 on the outermost pixels of the truth) is negative, and so is p - g. Distances
    end at 16 px and are divided by that: the crops of a mosaic are strangers, and at 200 px a far false
    alarm would be all that counts. Alone it also likes an empty mask; with a region loss it draws edges.
    """
    counted = labels != IGNORE
    p = logits.float().softmax(dim=1)
    truth = F.one_hot(torch.where(counted, labels, 0), p.shape[1]).movedim(-1, 1)
    distance = torch.from_numpy(_boundary_distance(labels.cpu().numpy(), p.shape[1])).to(p)
    cost = (distance * (p[:, 1:] - truth[:, 1:]).abs()).sum(dim=1) * counted
    return cost.sum() / (counted.sum().clamp(min=1) * BOUNDARY_REACH)


def _boundary_distance(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Distance of each pixel to the boundary of each defect class, up to 16 px: (N, K - 1, H, W) float32.

    0 where the sample has none of the class, or nothing else.
    """
    found = np.zeros((len(labels), classes - 1, *labels.shape[1:]), dtype=np.float32)
    for plane, mask in zip(found, labels, strict=True):
        for value in range(1, classes):
            inside = mask == value
            if inside.any() and not inside.all():
                outer = ndimage.distance_transform_edt(~inside)
                inner = ndimage.distance_transform_edt(inside)
                plane[value - 1] = np.where(inside, inner - 1, outer)
    return found.clip(max=BOUNDARY_REACH)


def small_object(logits: Tensor, labels: Tensor, weight: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """Focal on the components and their rings, each pixel weighted by how small its component is.

    weight (N, H, W) float: sqrt(A_ref / A) clipped to [1, 8] on components and rings, 0 elsewhere
    (`augment.component_planes`). Normalised by its own sum, so that weights move the loss within defect
    regions and never its scale: global inverse-size weights destabilise training (arXiv:2604.24276).
    0 where there is none.
    Little of it goes far: it leaves clean strip out, and at 0.5 inclusions were drawn at 1.4x their area;
    divided by all pixels instead, defects of 13 px were not learned at all (both measured 2026-11-22).
    """
    return weighted_mean(focal_map(logits, labels, gamma), labels, weight)


def weighted_mean(found: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The mean of a map (N, H, W) by weights (N, H, W), ignored pixels left out; 0 where none weighs."""
    weight = weight.float() * (labels != IGNORE)
    return (weight * found).sum() / weight.sum().clamp(min=1)


def distillation(logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """How far the net is from its teacher: T^2 KL(teacher || net) of softened logits, mean over pixels, nats.

    taught (N, K, H, W): the teacher's logits, channel by channel of the same classes. Hinton et al. 2015,
    arXiv:1503.02531, section 2; T^2 keeps the gradient's scale whatever T is.
    """
    ours, theirs = (F.log_softmax(x.float() / TEMPERATURE, dim=1) for x in (logits, taught))
    apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
    counted = labels != IGNORE
    return TEMPERATURE**2 * (apart * counted).sum() / counted.sum().clamp(min=1)


# What a training's loss is made of. Those that compare regions are taken source by source: they are means
# over classes, and a source with many would drown the others.
REGIONAL = {"dice": dice, "tversky": tversky, "lovasz": lovasz, "boundary": boundary}
LOSSES: dict[str, tuple[str, ...]] = {
    "dice_focal": ("dice", "focal"),
    "dice": ("dice",),
    "focal": ("focal",),
    "tversky": ("tversky",),
    "lovasz": ("lovasz",),
    "boundary": ("dice", "focal", "boundary"),
}
