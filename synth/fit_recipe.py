"""How an editor is fitted: every choice with its default, and presets of them."""

import math
from dataclasses import dataclass

from rollsight.inspect.errors import USAGE, UserError
from rollsight.synth.gan import Widths


@dataclass(frozen=True, slots=True)
class FitRecipe:
    """How an editor is fitted; all of it is on its card."""

    preset: str = "cpu-64"
    steps: int = 2000
    size_px: int = 64  # of a patch
    editor: tuple[int, ...] = (24, 48, 64)  # channels by level
    judge: tuple[int, ...] = (24, 48, 64, 96)
    batch: int = 8
    learning_rate: tuple[float, float] = (1e-3, 3e-4)  # first and last, cosine
    editor_rate: float = 0.5  # its learning rate, of the discriminator's
    second_moment: tuple[float, float] = (0.9, 0.99)  # Adam's beta 2, first and last
    gamma: float = 0.5  # of R1 + R2 at the start, at 64 px; the controller moves it
    penalty_every: int = 3  # steps, times which the penalty counts (lazy: arXiv:1912.04958, sec. 3.1)
    ema_half_life: int = 70  # steps
    rare_share: float = 0.6  # of a batch that is of the class asked for, where others help
    elsewhere: float = 0.0  # of that class's pastes, how many lie on steel of scenes without it, as at `make`
    contrast_weight: float = 5.0
    contrast_keep: float = 0.8  # of the paste's contrast the loss asks for
    residual_weight: float = 0.5
    variety_weight: float = 5.0
    variety: float = 0.015  # mean difference inside the gate that two latents shall make
    variety_every: int = 4
    degraded: float = 0.0  # of the pastes, how many keep outline and mean gray only (`synth/degraded.py`)
    whole: bool = False  # make whole patches instead of editing: the rival
    per_pixel: bool = False  # the discriminator judges each px (`gan.PixelJudge`), not a patch as a whole
    checkpoint_every: int = 100
    seed: int = 0


FINE_TUNING_STEPS = 500  # from the generic generator; `inspect synth prove` fine-tunes as long

# An editor that makes the defect: half of its starts have nothing to keep, and what it changes costs little.
FREE: dict[str, float] = {"degraded": 0.5, "residual_weight": 0.05}
ELSEWHERE = 0.3  # the discriminator must not tell pastes by steel that real patches never lie on: not all

PRESETS = {
    "cpu-64": FitRecipe(elsewhere=ELSEWHERE),
    # Sizes and rates as R3GAN's, by its rules; no GPU was at hand to run them on.
    "gpu-128": FitRecipe(
        preset="gpu-128",
        steps=50_000,
        size_px=128,
        editor=(64, 96, 128, 192),
        judge=(64, 96, 128, 192, 256),
        batch=64,
        learning_rate=(2e-4, 5e-5),
        ema_half_life=1000,
        elsewhere=ELSEWHERE,
        checkpoint_every=1000,
    ),
    "gpu-256": FitRecipe(
        preset="gpu-256",
        steps=100_000,
        size_px=256,
        editor=(48, 64, 96, 128, 192),
        judge=(48, 64, 96, 128, 192, 256),
        batch=32,
        learning_rate=(2e-4, 5e-5),
        ema_half_life=1000,
        elsewhere=ELSEWHERE,
        checkpoint_every=1000,
    ),
}


def check_fit_recipe(recipe: FitRecipe) -> None:
    """Refuse, as UserError, what cannot be followed."""
    widths = Widths(recipe.editor, recipe.judge)
    if recipe.size_px < 32 or recipe.size_px % max(widths.stride, 2 ** len(recipe.judge)):
        raise UserError(
            f"patches of {recipe.size_px} px: a multiple of {2 ** len(recipe.judge)} is needed", USAGE
        )
    for name in ("contrast_weight", "residual_weight", "variety_weight"):
        if not 0 <= (weight := getattr(recipe, name)) < math.inf:
            raise UserError(f"{name} is {weight:g}: a weight is a number from 0 on", USAGE)
    for name in ("elsewhere", "degraded"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise UserError(f"{name} is {getattr(recipe, name):g}: a share of the pastes, 0 to 1", USAGE)
    if recipe.whole and recipe.degraded:
        raise UserError("whole patches have no start that could be degraded: choose one of both", USAGE)
    if recipe.whole and recipe.per_pixel:
        raise UserError(
            "whole patches are made farther from the mark than a discriminator by the px is asked: "
            "choose one of both",
            USAGE,
        )
    if recipe.steps < 1 or recipe.batch < 2:
        raise UserError(f"{recipe.steps} steps of {recipe.batch}: at least 1 step of 2 patches", USAGE)
