"""What editor and discriminator, and those of outlines, are fitted by."""

import torch
import torch.nn.functional as F
from rollsight.synth.gan import contrast
from torch import Tensor


def relativistic(mine: Tensor, other: Tensor) -> Tensor:
    """Mean of softplus(-(mine - other)), logits (N,) paired by class: mine shall look more real.

    Jolicoeur-Martineau 2018, arXiv:1807.00734; as RpGAN in Huang et al. 2024, arXiv:2501.05441, eq. 2.
    """
    return F.softplus(other - mine).mean()


def penalty(logits: Tensor, image: Tensor) -> Tensor:
    """Mean squared gradient of the logits (N,) by the image (N, 1, H, W): R1 on real, R2 on made ones.

    Mescheder et al. 2018, arXiv:1801.04406, eq. 9.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def contrast_loss(start: Tensor, made: Tensor, mask: Tensor, keep: float) -> Tensor:
    """How much contrast is lost below `keep` of the paste's, relative to it: mean over (N,), 0 to about 2.

    Without it 46 % of the defects under 60 px lost more than half of theirs (measured on mt).
    """
    before, after = contrast(start, mask), contrast(made, mask)
    kept = after * torch.where(before < 0, -1.0, 1.0)
    return (F.relu(keep * before.abs() - kept) / (before.abs() + 0.02)).mean()
