"""How what the discriminator sees is augmented: image and mask alike, in one resampling."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Shake:
    """One random affine and light for each sample of a batch, on image and mask alike."""

    def __init__(self, theta: Tensor, gain: Tensor, shift: Tensor) -> None:
        self._theta, self._gain, self._shift = theta, gain, shift

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        grid = F.affine_grid(self._theta, list(image.shape), align_corners=False)
        image, mask = (
            F.grid_sample(t, grid, padding_mode="reflection", align_corners=False) for t in (image, mask)
        )
        middle = image.mean(dim=(2, 3), keepdim=True)
        return (image - middle) * self._gain + middle + self._shift, mask


def shake(n: int, chance: float, draws: torch.Generator, device: torch.device) -> Shake:
    """Flips, shifts by up to an eighth, gray and contrast, each with that chance: DiffAugment's.

    Zhao et al. 2020, arXiv:2006.10738; without its cutout of a half, which would cut the defect out. Flips
    always: they are exact and keep the rolling direction.
    """
    u = torch.rand(n, 8, generator=draws)
    flips = torch.where(u[:, :2] < 0.5, -1.0, 1.0)
    moved = torch.where(u[:, 2:3] < chance, (u[:, 3:5] - 0.5) / 2, torch.zeros(()))  # of half a side
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flips[:, 0], flips[:, 1], moved
    light = u[:, 5] < chance
    gain = torch.where(light, 0.75 + 0.5 * u[:, 6], torch.ones(()))[:, None, None, None]
    shift = torch.where(light, 0.3 * (u[:, 7] - 0.5), torch.zeros(()))[:, None, None, None]
    return Shake(theta.to(device), gain.to(device), shift.to(device))
