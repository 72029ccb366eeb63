"""What editor and discriminator, and those of outlines, are fitted by."""

import torch
import torch.nn.functional as F
from rollsight.synth.gan import Judge, PixelJudge, contrast, judged_px, score
from torch import Tensor

MARKED = 0.5  # a mask that was resampled is between 0 and 1
Patch = tuple[Tensor, Tensor]  # image and mask, (N, 1, H, W) each


def judge_loss(
    judge: Judge | PixelJudge, real: Patch, made: Patch, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a discriminator learns by, and how real either looks to it (N,)."""
    if isinstance(judge, Judge):
        d_real, d_made = judge(*real, classes), judge(*made, classes)
        return relativistic(d_real, d_made), d_real, d_made
    of_real, of_made = judge.pixels(*real), judge.pixels(*made)
    faked = torch.full_like(made[1][:, 0], PixelJudge.MADE, dtype=torch.int64)
    loss = by_pixel(of_real, real[1], _shown(real[1], classes)) + by_pixel(of_made, made[1], faked)
    return loss, score(of_real, real[1]), score(of_made, made[1])


def editor_loss(judge: Judge | PixelJudge, real: Patch, made: Patch, classes: Tensor) -> Tensor:
    """What an editor learns from a discriminator."""
    if isinstance(judge, Judge):
        with torch.no_grad():
            d_real = judge(*real, classes)
        return relativistic(judge(*made, classes), d_real)
    return by_pixel(judge.pixels(*made), made[1], _shown(made[1], classes))


def by_pixel(logits: Tensor, mask: Tensor, shown: Tensor) -> Tensor:
    """Cross-entropy over `judged_px`, the mark and what is around it as heavy as each other.

    logits (N, K + 2, H, W), mask (N, 1, H, W), shown (N, H, W) int64. Balanced as Sushko et al. 2021,
    eq. 1, with the two sides of a mark's outline in place of the classes of a scene.
    """
    lost = F.cross_entropy(logits, shown, reduction="none")
    marked = mask[:, 0] > MARKED
    sides = (marked, judged_px(mask)[:, 0] & ~marked)
    return torch.stack([(lost * side).sum() / side.sum().clamp(min=1) for side in sides]).mean()


def _shown(mask: Tensor, classes: Tensor) -> Tensor:
    """What a patch that is real shows, as channels of a `PixelJudge`: (N, 1, H, W), (N,) -> (N, H, W)."""
    of_class = (PixelJudge.FIRST_CLASS + classes)[:, None, None]
    return torch.where(mask[:, 0] > MARKED, of_class, PixelJudge.STEEL)


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
