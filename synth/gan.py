"""The editor that turns a pasted defect into one that belongs there, and the discriminator that judges it.

They mirror each other: unshuffle to half resolution, residual blocks without any norm over the batch, average
pooling between. The editor is convolutional throughout, so it is trained on patches and runs on any size.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_DILATE_PX = 2
GATE_SIGMA_PX = 1.2
GATE_REACH_PX = 3  # where the Gaussian is cut off: beyond DILATE + REACH px of the mask the gate is exactly 0
RING_PX = (2, 6)  # the surroundings that a contrast is measured against lie that far from the mask
MIDDLE = 0.5  # of the gray range
CELL = 2  # the nets begin with an unshuffle by 2
MOST_ADDED = 0.25  # gray that an edit changes at most, of [0, 1]
SEEN_PX = 8  # around the mask that the discriminator sees
MOST_GRAIN = 0.05  # standard deviation of the grain that it adds, at most
STYLE = 96
LATENT = 64


@dataclass(frozen=True, slots=True)
class Widths:
    """Channels at strides 2, 4, 8, ...; the discriminator has one level more."""

    editor: tuple[int, ...]
    judge: tuple[int, ...]

    @property
    def stride(self) -> int:
        """What both sides of an image must be a multiple of."""
        return CELL << (len(self.editor) - 1)


def spread(mask: Tensor, px: int) -> Tensor:
    """The largest value within `px` along either axis: (N, 1, H, W) as it came.

    Along one axis, then the other: the same maximum for 2 of (2 px + 1) of the work.
    """
    across = F.max_pool2d(mask, (1, 2 * px + 1), stride=1, padding=(0, px))
    return F.max_pool2d(across, (2 * px + 1, 1), stride=1, padding=(px, 0))


def unshuffled(planes: Tensor) -> Tensor:
    """Half the resolution, four times the channels, channels-last, as convolutions on a CPU are fastest."""
    return F.pixel_unshuffle(planes, CELL).contiguous(memory_format=torch.channels_last)


def gate(mask: Tensor, dilate_px: int = GATE_DILATE_PX) -> Tensor:
    """Where the editor may write, 0 to 1: (N, 1, H, W) of a mask in {0, 1}.

    By default exactly 0 from 6 px away on, in general beyond dilate_px + GATE_REACH_PX.
    """
    grown = spread(mask, dilate_px)
    x = torch.arange(-GATE_REACH_PX, GATE_REACH_PX + 1, dtype=mask.dtype, device=mask.device)
    kernel = torch.exp(-0.5 * (x / GATE_SIGMA_PX) ** 2)
    kernel = kernel / kernel.sum()
    grown = F.pad(grown, (GATE_REACH_PX,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(grown, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def binomial(x: Tensor) -> Tensor:
    """[1, 2, 1] / 4 along both axes of (N, C, H, W): nothing is left at the highest frequency."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4


def ring(mask: Tensor) -> Tensor:
    """The surroundings of a mask (N, 1, H, W) in {0, 1}, RING_PX away from it."""
    near, far = (spread(mask, px) for px in RING_PX)
    return far - near


def contrast(image: Tensor, mask: Tensor) -> Tensor:
    """Mean gray of the mask less that of its ring: (N, 1, H, W) twice -> (N,); 0 where either is empty."""
    around = ring(mask)
    sums = [(image * part).sum(dim=(1, 2, 3)) for part in (mask, around)]
    counts = [part.sum(dim=(1, 2, 3)) for part in (mask, around)]
    difference = sums[0] / counts[0].clamp(min=1) - sums[1] / counts[1].clamp(min=1)
    return torch.where((counts[0] > 0) & (counts[1] > 0), difference, torch.zeros_like(difference))


def descended(x: Tensor, blocks: nn.ModuleList, narrow: nn.ModuleList) -> tuple[Tensor, list[Tensor]]:
    """Features (N, C, H, W) after the block of the last level, and those after each level before it."""
    skips = []
    for depth, block in enumerate(blocks):
        x = block(x)
        if depth < len(narrow):
            skips.append(x)
            x = narrow[depth](F.avg_pool2d(x, 2))
    return x, skips


class Residual(nn.Module):
    """Two 3x3 convolutions whose last begins at zero: (N, C, H, W) as it came.

    Fix-up without norms (Zhang et al. 2019, arXiv:1901.09321), as R3GAN has it (arXiv:2501.05441).
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        scaled(self.first, blocks**-0.25)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.leaky_relu(self.first(F.leaky_relu(x, 0.2)), 0.2))  # type: ignore[no-any-return]


class Modulated(nn.Module):
    """A residual block steered at each pixel by mask and style: (N, C, H, W) as it came.

    SPADE on the mask (Park et al. 2019, arXiv:1903.07291) plus FiLM on the style, over features divided by
    their root mean square over the channels: no statistic of a batch or an image, so a sample does not depend
    on what stands beside it.
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.of_style = nn.Linear(STYLE, 2 * channels)
        self.of_mask = nn.Conv2d(1, 2 * channels, 3, padding=1)
        self.grain = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.block = Residual(channels, blocks)

    def forward(self, x: Tensor, style: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
        gain, shift = (self.of_style(style)[..., None, None] + self.of_mask(mask)).chunk(2, dim=1)
        return self.block(x * (1 + gain) + shift + self.grain * noise)  # type: ignore[no-any-return]


class Editor(nn.Module):
    """Adds a gated residual to a pasted defect, or with `whole` makes all that the discriminator sees anew.

    The latter fades into the steel SEEN_PX from the mask: on a whole canvas it would paint over the defects
    that other labels name.

    start (N, 1, H, W) in [0, 1], mask (N, 1, H, W) in {0, 1}, noise (N, 1, H, W) and latent (N, 64) standard
    normal, classes (N,) int64 -> image (N, 1, H, W) in [0, 1]. H and W are multiples of `widths.stride`.
    """

    def __init__(self, classes: int, widths: Widths, whole: bool = False) -> None:
        super().__init__()
        self.whole, self.stride = whole, widths.stride
        levels = widths.editor
        self.stem = nn.Conv2d(3 * CELL**2, levels[0], 3, padding=1)
        self.down = nn.ModuleList(Residual(c, 2 * len(levels)) for c in levels)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(levels))
        self.style = nn.Sequential(
            nn.Linear(LATENT + classes, STYLE), nn.LeakyReLU(0.2), nn.Linear(STYLE, STYLE), nn.LeakyReLU(0.2)
        )
        self.up = nn.ModuleList(Modulated(c, 2 * len(levels)) for c in levels)
        self.widen = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(levels))
        # Bilinear and a convolution: pixel-shuffle left checkerboards on every sample (measured).
        self.fine = nn.Conv2d(levels[0] + 3, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 2, 3, padding=1)
        for conv in (*self.narrow, *self.widen, self.stem, self.fine):
            scaled(conv, 1.0)
        scaled(self.last, 0.1)
        self.classes = classes

    def residual(self, start: Tensor, mask: Tensor, noise: Tensor, latent: Tensor, classes: Tensor) -> Tensor:
        """What is added where the gate is open: (N, 1, H, W)."""
        height, width = start.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"{height} x {width} px: both sides must be multiples of {self.stride}")
        latent = latent * torch.rsqrt(latent.square().mean(dim=1, keepdim=True) + 1e-6)
        style = self.style(torch.cat([latent, F.one_hot(classes, self.classes).to(latent)], dim=1))
        seen = torch.cat([torch.full_like(start, 0) if self.whole else start - MIDDLE, mask, noise], dim=1)
        x = self.stem(unshuffled(seen))
        x, skips = descended(x, self.down, self.narrow)
        for depth in reversed(range(len(self.up))):
            size = CELL * 2**depth
            x = self.up[depth](x, style, F.avg_pool2d(mask, size), F.avg_pool2d(noise, size) * size)
            if depth:
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
                x = self.widen[depth - 1](x) + skips[depth - 1]
        x = F.interpolate(x, scale_factor=float(CELL), mode="bilinear", align_corners=False)
        fine = F.leaky_relu(self.fine(torch.cat([x, seen], dim=1)), 0.2)
        smooth, grain = self.last(fine).chunk(2, dim=1)
        # Free at every px, it wove a pattern of 2 px over all samples (looked at): so it is smooth, and grain
        # is white noise of a strength that the net chooses.
        changed = MOST_ADDED * torch.tanh(binomial(smooth) / MOST_ADDED)
        return changed + MOST_GRAIN * torch.sigmoid(binomial(grain) * 10 - 3) * noise

    def forward(self, start: Tensor, mask: Tensor, noise: Tensor, latent: Tensor, classes: Tensor) -> Tensor:
        added = self.residual(start, mask, noise, latent, classes)
        if self.whole:
            anew = torch.sigmoid(16 * added)  # +-0.25 spans the range
            return start + gate(mask, SEEN_PX - GATE_REACH_PX) * (anew - start)
        return (start + gate(mask) * added).clamp(0, 1)


class Judge(nn.Module):
    """How real a patch with its mask looks for its class: (N, 1, H, W) twice, (N,) int64 -> logits (N,).

    Projection of the class onto the features (Miyato & Koyama 2018, arXiv:1802.05637).
    """

    def __init__(self, classes: int, widths: Widths, size: int) -> None:
        super().__init__()
        levels = widths.judge
        self.stem = nn.Conv2d(2 * CELL**2, levels[0], 3, padding=1)
        self.blocks = nn.ModuleList(Residual(c, len(levels)) for c in levels)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(levels))
        left = size // (CELL * 2 ** (len(levels) - 1))
        self.basis = nn.Conv2d(levels[-1], levels[-1], left, groups=levels[-1])
        self.embed = nn.Linear(levels[-1], LATENT)
        self.plain = nn.Linear(LATENT, 1)
        self.by_class = nn.Embedding(classes, LATENT)
        for conv in (self.stem, *self.narrow, self.basis):
            scaled(conv, 1.0)
        nn.init.normal_(self.by_class.weight, std=0.1)

    def forward(self, image: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        x = self.stem(unshuffled(torch.cat([visible(image, mask), mask], dim=1)))
        x, _ = descended(x, self.blocks, self.narrow)
        x = self.embed(F.leaky_relu(self.basis(x), 0.2).flatten(1))
        logits = self.plain(x)[:, 0] + (x * self.by_class(classes)).sum(dim=1) / LATENT**0.5
        return logits  # type: ignore[no-any-return]


class PixelJudge(nn.Module):
    """What each px near a mask shows: steel, something made, or one of the classes.

    A U-Net that gets the image alone, as OASIS has it (Sushko et al. 2021, arXiv:2012.04781); its LabelMix
    needs a real and a made image of one mask, which pastes elsewhere are not. `forward` is how real a patch
    looks, as `Judge`'s: (N, 1, H, W) twice, (N,) int64 -> (N,), the mean over `judged_px` of the log odds
    of all that is real against what is made.
    """

    STEEL, MADE, FIRST_CLASS = 0, 1, 2  # channels

    def __init__(self, classes: int, widths: Widths) -> None:
        super().__init__()
        levels = widths.judge
        self.stem = nn.Conv2d(CELL**2, levels[0], 3, padding=1)
        self.down = nn.ModuleList(Residual(c, 2 * len(levels)) for c in levels)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(levels))
        self.up = nn.ModuleList(Residual(c, 2 * len(levels)) for c in levels[:-1])
        self.widen = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(levels))
        self.head = nn.Conv2d(levels[0], self.FIRST_CLASS + classes, 3, padding=1, bias=False)
        for conv in (self.stem, *self.narrow, *self.widen):
            scaled(conv, 1.0)
        nn.init.normal_(self.head.weight, std=0.01)

    def pixels(self, image: Tensor, mask: Tensor) -> Tensor:
        """Logits of a patch (N, 1, H, W) as far as it is near the mask: (N, K + 2, H, W)."""
        x = self.stem(unshuffled(visible(image, mask)))
        x, skips = descended(x, self.down, self.narrow)
        for depth in reversed(range(len(self.up))):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = self.up[depth](self.widen[depth](x) + skips[depth])
        x = F.interpolate(
            F.leaky_relu(x, 0.2), scale_factor=float(CELL), mode="bilinear", align_corners=False
        )
        return self.head(x)  # type: ignore[no-any-return]

    def forward(self, image: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        return score(self.pixels(image, mask), mask)


def visible(image: Tensor, mask: Tensor) -> Tensor:
    """What a discriminator sees of a patch: (N, 1, H, W) twice -> (N, 1, H, W), 0 beyond SEEN_PX of the mask.

    What lies further away the editor cannot change, and other exposure is no fault of its: with either the
    discriminator wins and has nothing to teach.
    """
    near = spread(mask, SEEN_PX)
    level = (image * near).sum(dim=(2, 3), keepdim=True) / near.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return (image - level) * near


def judged_px(mask: Tensor) -> Tensor:
    """Where a discriminator by the px is asked: bool (N, 1, H, W), the gate where it is wide open."""
    return spread(mask, GATE_DILATE_PX) > 0.5


def score(logits: Tensor, mask: Tensor) -> Tensor:
    """How real a patch looks to a `PixelJudge`: (N, K + 2, H, W), (N, 1, H, W) -> (N,)."""
    made = logits[:, PixelJudge.MADE]
    real = torch.logsumexp(
        torch.cat([logits[:, : PixelJudge.MADE], logits[:, PixelJudge.FIRST_CLASS :]], dim=1), dim=1
    )
    asked = judged_px(mask)[:, 0]
    return ((real - made) * asked).sum(dim=(1, 2)) / asked.sum(dim=(1, 2)).clamp(min=1)


def scaled(conv: nn.Conv2d, gain: float) -> None:
    """He initialisation for leaky ReLU, times a gain; biases at zero."""
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    with torch.no_grad():
        conv.weight.mul_(gain)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one


def limited(start: Tensor, edited: Tensor, mask: Tensor, keep: float) -> Tensor:
    """The edited image, drawn back towards its start as far as the contrast law asks.

    All (N, 1, H, W). Contrast is linear in the edit, so the largest share of it that keeps `keep` of the
    start's contrast, in sign too, is known exactly; the edit is clamped already, so no px leaves [0, 1].
    """
    before, after = contrast(start, mask), contrast(edited, mask)
    sign = torch.where(before < 0, -1.0, 1.0)
    lost = (before - after) * sign
    allowed = (1 - keep) * before.abs()
    share = torch.where(lost > allowed, allowed / lost.clamp(min=1e-12), torch.ones_like(lost))
    return start + share[:, None, None, None] * (edited - start)


class one_thread:  # noqa: N801 (used like a function)
    """One thread for torch within the block: sums in another order are other bits."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
