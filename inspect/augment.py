"""Augmentation of an image and its planes together, by kornia; and the planes that components give."""

from collections.abc import Iterable, Sequence
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
from kornia.constants import DataKey, Resample
from numpy.typing import NDArray
from rollsight.inspect.defects import label_mask
from scipy import ndimage
from torch import Tensor

AREA_FLOOR = 16  # px: below it a component weighs no more, annotation noise would
WEIGHT_RANGE = (1.0, 8.0)
RING = 5  # px of background around a component that share its weight
LIGHT_GRADIENT = (0.02, 0.1)  # of white, from one side of a crop to the other; dark strip is at 0.2
ELASTIC_STEP, ELASTIC_PX = 16, 3.0  # px between the nodes of a deformation, and how far one moves (std)


class ElasticTransform(K.RandomElasticTransform):  # type: ignore[misc]
    """kornia's elastic transform (Simard et al. 2003) by displacements that are smooth as they are drawn.

    Normal at nodes 16 px apart, bicubic between them. kornia draws one for each pixel and smooths them,
    for the image and for the mask: four fifths of the time that a batch took (measured 2026-11-24).
    """

    def __init__(self) -> None:
        super().__init__(padding_mode="reflection", p=1.0)

    def generate_parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        count, _, height, width = shape
        nodes = torch.randn(count, 2, height // ELASTIC_STEP + 2, width // ELASTIC_STEP + 2)
        smooth = F.interpolate(nodes, size=(height, width), mode="bicubic", align_corners=True)
        half = torch.tensor([width, height]).reshape(2, 1, 1) / 2  # a displacement of 1 is half a side
        return {"noise": smooth * ELASTIC_PX / half}

    def apply_transform(
        self,
        input: Tensor,
        params: dict[str, Tensor],
        flags: dict[str, Any],
        transform: Tensor | None = None,
    ) -> Tensor:
        displacement = params["noise"].to(input).movedim(1, -1)  # (N, H, W, 2), x and y
        still = F.affine_grid(
            torch.eye(2, 3).expand(len(input), 2, 3).to(input), list(input.shape), align_corners=False
        )
        mode = flags["resample"].name.lower()
        return F.grid_sample(input, still + displacement, mode, flags["padding_mode"], align_corners=False)


Step = tuple[float, K.AugmentationBase2D]  # share of the samples, what is done to them


class Augmentations:
    """kornia's transforms one after the other, each on the samples that it is drawn for, and on no other.

    Given a probability, kornia transforms the whole batch and then takes what was drawn: 0.10 s for 16 crops
    of 192 px with two planes, 0.05 s here (measured 2026-11-29).
    """

    def __init__(self, moves: Sequence[Step], lights: Sequence[Step]) -> None:
        """moves: of image and planes; lights: then, of the image. Each transform has p=1."""
        nearest = {DataKey.MASK: {"resample": Resample.NEAREST}}
        keys = ["input", "mask"]
        self._moves = [
            (share, K.AugmentationSequential(move, data_keys=keys, extra_args=nearest))
            for share, move in moves
        ]
        self.lights = lights

    def __call__(self, image: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
        """(N, M, H, W) in [0, 1], (N, P, H, W) float -> the same."""
        image, planes = image.clone(), planes.clone()
        for share, move in self._moves:
            if len(chosen := _chosen(len(image), share)):
                image[chosen], planes[chosen] = move(image[chosen], planes[chosen])
        for share, light in self.lights:
            if len(chosen := _chosen(len(image), share)):
                image[chosen] = light(image[chosen])
        return image, planes


def _chosen(count: int, share: float) -> Tensor:
    """Which of the samples a transform is drawn for: indices."""
    return (torch.rand(count) < share).nonzero()[:, 0]


def augmentations(light_gradient: float = 0.0, warped: float = 0.5) -> Augmentations:
    """Flips, quarter turns, small affine and elastic deformation, light: on (image, planes).

    Image (N, M, H, W) in [0, 1]; planes (N, P, H, W) float, resampled by nearest neighbour, so that no
    class, weight or component is invented. Reflection at the border: kornia's zeros would be a dark
    frame that no strip has. `warped` is the share of samples that are turned, scaled and shifted a little,
    half as many are bent. The light comes last, and on the image only; `light_gradient` is the share of
    samples in which it also rises or falls from one side to the other.
    kornia's brightness is added, not multiplied: 0.75 would take dark strip (gray 50 of 255) to black.
    """
    affine = K.RandomAffine(
        degrees=8.0, translate=(0.1, 0.1), scale=(0.8, 1.25), padding_mode="reflection", p=1.0
    )
    return Augmentations(
        moves=[
            (0.5, K.RandomHorizontalFlip(p=1.0)),
            (0.5, K.RandomVerticalFlip(p=1.0)),
            (0.5, K.RandomRotation90(times=(1, 1), p=1.0)),
            (warped, affine),
            (warped / 2, ElasticTransform()),
        ],
        lights=[
            (0.5, K.RandomGamma(gamma=(0.75, 1.35), p=1.0)),
            (0.5, K.RandomContrast(contrast=(0.8, 1.15), p=1.0)),
            (0.5, K.RandomBrightness(brightness=(0.95, 1.05), p=1.0)),
            (light_gradient, K.RandomLinearIllumination(gain=LIGHT_GRADIENT, p=1.0)),
        ],
    )


def augment(
    pipeline: Augmentations, image: Tensor, labels: Tensor, *planes: Tensor
) -> tuple[Tensor, Tensor, *tuple[Tensor, ...]]:
    """One random draw for each sample: (N, M, H, W), int64 (N, H, W), float planes (N, H, W) -> the same."""
    image, warped = pipeline(image, torch.stack([labels.float(), *planes], dim=1))
    first, *others = warped.unbind(dim=1)
    return image, first.round().long(), *others


def component_areas(mask: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Components of a whole mask, 8-connected, class by class: ids (H, W) from 1, areas in px by id."""
    ids, count = label_mask(mask)
    return ids, np.bincount(ids.ravel(), minlength=count + 1)


def reference_area(areas: Iterable[NDArray[np.int64]]) -> float:
    """A_ref: the median component area in px; 1 where there is none. areas as `component_areas` has them."""
    every = np.concatenate([np.zeros(0, dtype=np.int64), *(found[1:] for found in areas)])
    return float(np.median(every)) if every.size else 1.0


def component_planes(
    ids: NDArray[np.int32], areas: NDArray[np.int64], area_ref: float
) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """What each pixel has of the components around it, both (H, W); ids and areas as `component_areas`.

    Its weight: `weight_of` each component on it and on a 5 px ring around it, 0 elsewhere; where rings
    meet, the nearest component's holds. Its region: the nearest component, 0 where there is none.
    From the whole mask, before any crop or warp: half of the components under 256 px in a random
    128 px crop are slivers that the crop cut off a larger one (measured).
    """
    distance, nearest = ndimage.distance_transform_edt(ids == 0, return_indices=True)
    regions = ids[tuple(nearest)]
    weight = np.append(0.0, weight_of(areas[1:], area_ref))
    return weight[np.where(distance <= RING, regions, 0)].astype(np.float16), regions


def weight_of(areas: NDArray[np.int64], area_ref: float) -> NDArray[np.float64]:
    """What components of these areas, in px, weigh: sqrt(A_ref / A) clipped to [1, 8]."""
    return np.clip(np.sqrt(area_ref / np.maximum(areas, AREA_FLOOR)), *WEIGHT_RANGE)


def to_batch(images: list[NDArray[np.float32]], masks: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    """Stack samples of one size: float (N, M, H, W) and int64 (N, H, W)."""
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)).long()
