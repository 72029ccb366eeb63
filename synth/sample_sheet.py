"""A sheet of samples of an editor that is being fitted: what to look at before anything is made with it."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rollsight.synth.adversarial import Adversary
from rollsight.synth.gan import LATENT
from rollsight.synth.patch_batches import PatchSampler
from torch import Tensor

SHEET = "samples-{step:06d}.png"
SHEET_PATCHES = 10
SHEET_BATCH = 1_000_003  # its number: no step of a fit comes so far


def draw_sheet(adversary: Adversary, sampler: PatchSampler, path: Path) -> None:
    """A PNG of rows: pastes, two edits of each, their masks, real patches of the same classes."""
    batches = [sampler.batch(SHEET_BATCH + i) for i in range(-(-SHEET_PATCHES // sampler.n))]
    planes: list[Tensor] = [
        torch.cat([getattr(batch, name) for batch in batches])[:SHEET_PATCHES]
        for name in ("start", "mask", "real")
    ]
    start, mask, real = planes
    classes = torch.cat([batch.classes for batch in batches])[:SHEET_PATCHES]
    draws = torch.Generator().manual_seed(SHEET_BATCH)
    edits = []
    with torch.no_grad():
        for _ in range(2):
            noise = torch.randn(start.shape, generator=draws)
            latent = torch.randn(len(start), LATENT, generator=draws)
            inputs = (t.to(adversary.device) for t in (start, mask, noise, latent, classes))
            edits.append(adversary.average(*inputs).cpu())
    rows: list[NDArray[np.float32]] = [
        np.hstack([np.pad(patch[0], 1) for patch in row.numpy()]) for row in (start, *edits, mask, real)
    ]
    sheet = np.round(np.vstack(rows) * 255).astype(np.uint8)
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(
        path
    )
