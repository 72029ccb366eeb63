"""Copy-paste: a component of one training image onto the clean steel of another crop of the same source."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.augment import RING
from rollsight.inspect.labels import IGNORE
from rollsight.inspect.training_data import Component, TrainingImage
from scipy import ndimage

TRIES = 10  # places looked at before a crop is left as it is


@dataclass(frozen=True, slots=True)
class Crop:
    """A square of a training image with its planes, as `TrainingImage`."""

    image: NDArray[np.float32]
    mask: NDArray[np.uint8]
    weight: NDArray[np.float32]
    regions: NDArray[np.int32] | None  # where the losses ask for it
    areas: NDArray[np.int64]


def fits(component: Component, origin: TrainingImage, crop_px: int) -> bool:
    """Whether a component, any way round, leaves half of a crop free, and no border cut it off."""
    longest: int = max(side.stop - side.start for side in component.box)
    sides = zip(component.box, origin.mask.shape, strict=True)
    whole = component.is_whole and all(side.start > 0 and side.stop < size for side, size in sides)
    return whole and longest + 2 * RING <= crop_px // 2


def paste(crop: Crop, component: Component, origin: TrainingImage, rng: np.random.Generator) -> Crop:
    """The crop with the component on it, turned and mirrored at random, where it covers clean steel only.

    Ghiasi et al. 2021, arXiv:2012.07177, for marks on steel: a 5 px ring of the component's surroundings
    fades into the crop, and its gray is shifted to what the crop has there, or the net would learn the
    seam. No defect and no ignored pixel is covered or touched; without such a place in 10 tries the crop
    stays as it is.
    """
    box = tuple(
        slice(max(0, side.start - RING), min(size, side.stop + RING))
        for side, size in zip(component.box, origin.mask.shape, strict=True)
    )
    assert origin.regions is not None
    inside = (origin.regions[box] == component.id) & (origin.mask[box] == component.defect_class)
    weight = origin.weight[box][inside].max()
    turns, step = int(rng.integers(4)), (1, -1)[rng.integers(2)]

    def turned(plane: NDArray[Any]) -> NDArray[Any]:
        return np.rot90(plane, turns, axes=(-2, -1))[..., ::step]

    image = turned(origin.image[:, *box].astype(np.float32))
    own, inside = turned(inside | (origin.mask[box] == 0)), turned(inside)
    near = ndimage.distance_transform_edt(~inside) <= RING
    height, width = inside.shape
    for _ in range(TRIES):
        y, x = rng.integers(np.subtract(crop.mask.shape, inside.shape) + 1).tolist()
        window = (slice(y, y + height), slice(x, x + width))
        if not crop.mask[window][near].any():
            break
    else:
        return crop
    drawn, ring = blended(crop.image[:, *window], image, own, inside)
    image, mask, weights = crop.image.copy(), crop.mask.copy(), crop.weight.copy()
    image[:, *window], mask[window][inside], weights[window][ring | inside] = (
        drawn.clip(0, 1),
        component.defect_class,
        weight,
    )
    regions = crop.regions
    if regions is not None:
        regions = np.where(_nearer(crop.mask, window, inside), len(crop.areas), regions)
    return Crop(image, mask, weights, regions, np.append(crop.areas, inside.sum()))


def blended(
    under: NDArray[np.float32],
    image: NDArray[np.float32],
    own: NDArray[np.bool_],
    inside: NDArray[np.bool_],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A component on other steel: (M, h, w), and the ring around it that fades into that steel, (h, w).

    under (M, h, w) is the steel, image (M, h, w) where the component comes from, inside (h, w) the component,
    own (h, w) it and its background: other defects there are not taken along, since no label would tell.
    """
    distance = ndimage.distance_transform_edt(~inside)
    ring = own & ~inside & (distance <= RING)
    shift = (under[:, ring] - image[:, ring]).mean(axis=1) if ring.any() else np.zeros(len(image))
    blend = np.where(own, (1 - distance / RING).clip(0, 1), 0).astype(np.float32)
    drawn = under + blend * (image + shift[:, None, None].astype(np.float32) - under)
    return drawn.astype(np.float32, copy=False), ring


def _nearer(
    mask: NDArray[np.uint8], window: tuple[slice, slice], inside: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where the pasted component is nearer than any defect the crop had: (H, W)."""
    pasted = np.zeros(mask.shape, dtype=np.bool_)
    pasted[window] = inside
    distance = ndimage.distance_transform_edt(~pasted)
    defect = (mask > 0) & (mask != IGNORE)
    if not defect.any():
        return np.ones_like(pasted)
    return distance < ndimage.distance_transform_edt(~defect)  # type: ignore[no-any-return]
