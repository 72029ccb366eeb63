"""A small GAN of outlines: the shape of a mark in its box, for a box of given sides and ends.

An outline is learned on a grid of GRID x GRID cells over the box of its mark, never turned, so that along the
strip stays along the strip. The box itself is not learned: its sides and ends are those of a labelled mark,
and the bank brings it to a size of the class's own distribution.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rollsight.inspect.errors import UserError
from rollsight.synth.gan import CELL, LATENT, Residual, binomial, one_thread, scaled
from rollsight.synth.gan_losses import penalty, relativistic
from scipy import ndimage
from torch import Tensor, nn

Bools = NDArray[np.bool_]
Plane = NDArray[np.float32]
Ends = tuple[bool, bool, bool, bool]  # whether the scene's top, bottom, left, right border cut a mark off

FEWEST = 50  # marks of a class; with fewer, outlines come from the bank alone
GRID = 32  # cells over each side of a box
REACHED = 0.75  # of its box's sides that an outline reaches at least
BOX = 6  # what is told of a box: logarithms of its sides, and which of its four ends were cut off
SHARP = 10.0  # of the last sigmoid: an outline that is gray over many cells is none
WIDTHS = (16, 24, 32)  # channels at strides 1, 2, 4 of the generator
JUDGE_WIDTHS = (24, 32, 48)  # at strides 2, 4, 8 of the discriminator


@dataclass(frozen=True, slots=True)
class OutlineRecipe:
    """How outlines are learned; it is on the card of their generator."""

    steps: int = 600  # 0: none are learned
    batch: int = 16
    learning_rate: float = 2e-3  # falls to nothing
    gamma: float = 0.2  # of R1 + R2
    penalty_every: int = 3
    ema_half_life: int = 50  # steps
    seed: int = 0


class OutlineNet(nn.Module):
    """Latents (N, 64) and boxes (N, 6) -> outlines (N, 1, 32, 32) in [0, 1], the share of a cell inside."""

    def __init__(self) -> None:
        super().__init__()
        first, blocks = WIDTHS[-1], 2 * len(WIDTHS)
        self.start = nn.Linear(LATENT + BOX, first * 16)
        self.blocks = nn.ModuleList(Residual(c, blocks) for c in (first, *reversed(WIDTHS)))
        pairs = zip((first, *reversed(WIDTHS)), reversed(WIDTHS), strict=False)
        narrow = [nn.Conv2d(a, b, 1) for a, b in pairs]
        for conv in narrow:
            scaled(conv, 1.0)
        self.narrow = nn.ModuleList(narrow)
        self.last = nn.Conv2d(WIDTHS[0], 1, 3, padding=1)
        scaled(self.last, 0.3)

    def forward(self, latent: Tensor, box: Tensor) -> Tensor:
        latent = latent * torch.rsqrt(latent.square().mean(dim=1, keepdim=True) + 1e-6)
        x = self.start(torch.cat([latent, box], dim=1)).unflatten(1, (WIDTHS[-1], 4, 4))
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth < len(self.narrow):
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
                x = self.narrow[depth](x)
        return torch.sigmoid(SHARP * binomial(self.last(F.leaky_relu(x, 0.2))))


class OutlineJudge(nn.Module):
    """How real outlines (N, 1, 32, 32) look in their boxes (N, 6): logits (N,); the box by projection."""

    def __init__(self) -> None:
        super().__init__()
        levels = JUDGE_WIDTHS
        self.stem = nn.Conv2d(CELL**2, levels[0], 3, padding=1)
        self.blocks = nn.ModuleList(Residual(c, len(levels)) for c in levels)
        widen = [nn.Conv2d(a, b, 1) for a, b in pairwise(levels)]
        self.widen = nn.ModuleList(widen)
        self.embed = nn.Linear(levels[-1] * 16, LATENT)
        self.plain = nn.Linear(LATENT, 1)
        self.of_box = nn.Sequential(nn.Linear(BOX, LATENT), nn.LeakyReLU(0.2), nn.Linear(LATENT, LATENT))
        for conv in (self.stem, *widen):
            scaled(conv, 1.0)

    def forward(self, outline: Tensor, box: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(outline - 0.5, CELL))
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth < len(self.widen):
                x = self.widen[depth](F.avg_pool2d(x, 2))
        x = self.embed(F.leaky_relu(x, 0.2).flatten(1))
        return self.plain(x)[:, 0] + (x * self.of_box(box)).sum(dim=1) / LATENT**0.5  # type: ignore[no-any-return]


class Outlines:
    """Outlines as they are used: each of a box and a seed, the same bits on the same build."""

    def __init__(self, net: OutlineNet, sides: tuple[tuple[float, float], tuple[float, float]]) -> None:
        """sides: mean and spread of the logarithms of a box's height, and of its width, px."""
        self.net, self.sides = net.eval(), sides

    def __call__(self, seed: int, size: tuple[int, int], ends: Ends) -> Plane:
        """The outline of a seed on the grid, (32, 32) in [0, 1], for a box of height and width in px."""
        latent = torch.randn(1, LATENT, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode(), one_thread():
            drawn = self.net(latent, torch.from_numpy(box_of(size, ends, self.sides))[None])
        out: Plane = drawn[0, 0].numpy()
        return out


def box_of(
    size: tuple[int, int], ends: Ends, sides: tuple[tuple[float, float], tuple[float, float]]
) -> Plane:
    """What the nets are told of a box: (6,)."""
    told = [(math.log(side) - mean) / spread for side, (mean, spread) in zip(size, sides, strict=True)]
    return np.array([*told, *ends], dtype=np.float32)


def on_grid(inside: Bools) -> Plane:
    """A mark's px (h, w), which touch all four sides, on the grid: the share of each cell that is inside."""
    whole = torch.from_numpy(inside.astype(np.float32))[None, None]
    # Bilinear first where a cell is finer than a px, then the mean: no px shows as a block.
    fine = [-(-GRID // side) * side if side < GRID else side for side in inside.shape]
    smooth = F.interpolate(whole, size=fine, mode="bilinear", align_corners=False)
    out: Plane = F.adaptive_avg_pool2d(smooth, GRID)[0, 0].numpy()
    return out


def in_box(outline: Plane, size: tuple[int, int]) -> Bools | None:
    """An outline of the grid as px of a box (h, w).

    None where it is empty, in pieces (crumbs of a twentieth of it are left away, no more), or shorter than
    REACHED of the box's height or width.
    """
    pieces, count = ndimage.label(outline >= 0.5, np.ones((3, 3)))
    if not count:
        return None
    sizes = np.bincount(pieces.ravel())[1:]
    if sizes.max() < 0.95 * sizes.sum():
        return None
    alone = pieces == sizes.argmax() + 1
    if min(np.ptp(at) + 1 for at in np.nonzero(alone)) < REACHED * GRID:
        return None
    kept = np.where(alone | (outline < 0.5), outline, 0)
    spans = [((np.arange(side) + 0.5) * (GRID / side) - 0.5).clip(0, GRID - 1) for side in size]
    at = np.meshgrid(*spans, indexing="ij")
    inside: Bools = ndimage.map_coordinates(kept, at, order=1, mode="nearest") >= 0.5
    return inside


def fit_outlines(
    insides: Sequence[Bools],
    ends: Sequence[Ends],
    recipe: OutlineRecipe | None = None,
    *,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Outlines:
    """Fit a generator to the px of marks, each (h, w) and touching all four sides of its box.

    It takes a minute, so it begins anew where it was interrupted, and ends with the same bits on the same
    build and number of threads. UserError where a loss is not finite.
    """
    recipe = recipe or OutlineRecipe()
    logs = np.log([inside.shape for inside in insides])
    spread = logs.std(axis=0).clip(0.1)
    sides = tuple((float(m), float(s)) for m, s in zip(logs.mean(axis=0), spread, strict=True))
    assert len(sides) == 2
    real = torch.from_numpy(np.stack([on_grid(inside) for inside in insides]))[:, None]
    boxes = torch.from_numpy(
        np.stack([box_of(inside.shape, end, sides) for inside, end in zip(insides, ends, strict=True)])
    )
    torch.manual_seed(recipe.seed)
    net, judge = OutlineNet(), OutlineJudge()
    average = copy.deepcopy(net)
    optimisers = [
        torch.optim.Adam(n.parameters(), lr=recipe.learning_rate, betas=(0.0, 0.99)) for n in (net, judge)
    ]
    draws = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        chosen = torch.randint(len(real), (recipe.batch,), generator=draws)
        outline, box = _flipped(real[chosen], boxes[chosen], draws)
        figures = _step(net, judge, optimisers, outline, box, recipe, step, draws)
        decay = 0.5 ** (1 / min(recipe.ema_half_life, max(1, step // 4)))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        if on_step is not None:
            on_step(step + 1, figures)
    return Outlines(average, sides)


def _flipped(outline: Tensor, box: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each sample flipped along and across by chance, its ends with it: this keeps the direction."""
    flips = torch.rand(len(outline), 2, generator=draws) < 0.5
    for axis, first in ((2, 2), (3, 4)):
        turned = flips[:, axis - 2]
        outline = torch.where(turned[:, None, None, None], outline.flip(axis), outline)
        swapped = box.clone()
        swapped[:, first], swapped[:, first + 1] = box[:, first + 1], box[:, first]
        box = torch.where(turned[:, None], swapped, box)
    return outline, box


def _step(
    net: OutlineNet,
    judge: OutlineJudge,
    optimisers: Sequence[torch.optim.Optimizer],
    outline: Tensor,
    box: Tensor,
    recipe: OutlineRecipe,
    step: int,
    draws: torch.Generator,
) -> dict[str, float]:
    """One step of both nets: real and made outlines are paired by their box."""
    penalised = step % recipe.penalty_every == 0
    latent = torch.randn(len(box), LATENT, generator=draws)
    with torch.no_grad():
        made = net(latent, box)
    real, fake = (t.detach().requires_grad_(penalised) for t in (outline, made))
    d_real, d_fake = judge(real, box), judge(fake, box)
    d_loss = relativistic(d_real, d_fake)
    figures = {"d_loss": d_loss.item(), "gap": (d_real - d_fake).mean().item()}
    if penalised:
        both = penalty(d_real, real) + penalty(d_fake, fake)
        d_loss = d_loss + recipe.gamma / 2 * both * recipe.penalty_every
    _descend(d_loss, optimisers[1], step)
    with torch.no_grad():
        d_real = judge(outline, box)
    g_loss = relativistic(judge(net(latent, box), box), d_real)
    figures["g_loss"] = g_loss.item()
    _descend(g_loss, optimisers[0], step)
    return figures


def _descend(loss: Tensor, optimiser: torch.optim.Optimizer, step: int) -> None:
    if not loss.isfinite():
        raise UserError(
            f"outlines, step {step + 1}: a loss is {loss.item()}: fit again with another --seed, or with "
            "--outline-steps 0"
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
