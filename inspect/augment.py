"""Augmentation of (image, mask, weight) together, by kornia; and the weight of small components."""

from collections.abc import Iterable

import kornia.augmentation as K
import numpy as np
import torch
from kornia.constants import DataKey, Resample
from numpy.typing import NDArray
from rollsight.inspect.defects import label_mask
from scipy import ndimage
from torch import Tensor

AREA_FLOOR = 16  # px: below it a component weighs no more, annotation noise would
WEIGHT_RANGE = (1.0, 8.0)
RING = 5  # px of background around a component that share its weight


def augmentations() -> K.AugmentationSequential:
    """Flips, quarter turns, small affine and elastic deformation, light: on (image, mask, weight).

    Image (N, M, H, W) in [0, 1]; mask and weight (N, 1, H, W) float, resampled by nearest neighbour, so
    that no class and no weight is invented. Reflection at the border: kornia's zeros would be a dark
    frame that no strip has. The light comes last, and on the image only.
    kornia's brightness is added, not multiplied: 0.75 would take dark strip (gray 50 of 255) to black.
    """
    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomVerticalFlip(p=0.5),
        K.RandomRotation90(times=(1, 1), p=0.5),
        K.RandomAffine(
            degrees=8.0, translate=(0.1, 0.1), scale=(0.8, 1.25), padding_mode="reflection", p=0.5
        ),
        K.RandomElasticTransform(
            kernel_size=(33, 33), sigma=(8.0, 8.0), alpha=(1.5, 1.5), padding_mode="reflection", p=0.25
        ),
        K.RandomGamma(gamma=(0.75, 1.35), p=0.5),
        K.RandomContrast(contrast=(0.8, 1.15), p=0.5),
        K.RandomBrightness(brightness=(0.95, 1.05), p=0.5),
        data_keys=["input", "mask", "mask"],
        extra_args={DataKey.MASK: {"resample": Resample.NEAREST}},
    )


def augment(
    pipeline: K.AugmentationSequential, image: Tensor, labels: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One random draw for each sample: (N, M, H, W), int64 (N, H, W), float (N, H, W) -> the same."""
    image, mask, plane = pipeline(image, labels[:, None].float(), weight[:, None])
    return image, mask[:, 0].round().long(), plane[:, 0]


def component_areas(mask: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Components of a whole mask, 8-connected, class by class: ids (H, W) from 1, areas in px by id."""
    ids, count = label_mask(mask)
    return ids, np.bincount(ids.ravel(), minlength=count + 1)


def reference_area(masks: Iterable[NDArray[np.uint8]]) -> float:
    """A_ref: the median component area of the training masks, in px; 1 where they hold none."""
    areas = np.concatenate([component_areas(mask)[1][1:] for mask in masks] or [np.zeros(0, dtype=np.int64)])
    return float(np.median(areas)) if areas.size else 1.0


def component_weight(mask: NDArray[np.uint8], area_ref: float) -> NDArray[np.float16]:
    """sqrt(A_ref / A) clipped to [1, 8] on each component and a 5 px ring around it, 0 elsewhere: (H, W).

    From the whole mask, before any crop or warp: half of the components under 256 px in a random
    128 px crop are slivers that the crop cut off a larger one (measured). Where rings meet, the nearest
    component's weight holds; a component keeps its own.
    """
    ids, areas = component_areas(mask)
    weight = np.clip(np.sqrt(area_ref / np.maximum(areas, AREA_FLOOR)), *WEIGHT_RANGE)
    weight[0] = 0.0
    distance, nearest = ndimage.distance_transform_edt(ids == 0, return_indices=True)
    near = np.where(distance <= RING, ids[tuple(nearest)], 0)
    return weight[near].astype(np.float16)


def to_batch(images: list[NDArray[np.float32]], masks: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    """Stack samples of one size: float (N, M, H, W) and int64 (N, H, W)."""
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)).long()
