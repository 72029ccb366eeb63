"""Batches drawn from labelled data: which crops, what is pasted onto them, how they become canvases.

Every random choice of step n is drawn from (seed, n), so that a batch is the same whenever it is drawn. An
option that is off draws no number: a recipe without it has the batches it had before there was one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rollsight.inspect import augment
from rollsight.inspect.copy_paste import Crop, fits, paste
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE
from rollsight.inspect.metrics import BUCKET_EDGES_PX
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.training_data import Component, Source
from torch import Tensor

SMALL_PX = BUCKET_EDGES_PX[1]  # a component below it is tiny or small


@dataclass(frozen=True, slots=True)
class Batch:
    """The canvases of one step, N mosaics that each hold crops of one source."""

    images: Tensor  # (N, M, H, W) float in [0, 1]
    labels: Tensor  # (N, H, W) int64, 255 ignored
    weights: Tensor  # (N, H, W) float, of small components
    labelled: Tensor  # (N, K + 1) bool, the classes that the source labels
    regions: Tensor | None  # (N, H, W) int64, the nearest component, from 1; None where no loss asks for it
    areas: Tensor  # (C + 1,) float, px of each whole component

    def to(self, device: torch.device) -> "Batch":
        """The same on a device, the images channels-last."""
        return Batch(
            self.images.to(device, memory_format=torch.channels_last),
            self.labels.to(device),
            self.weights.to(device),
            self.labelled.to(device),
            None if self.regions is None else self.regions.to(device),
            self.areas.to(device),
        )


@dataclass(frozen=True, slots=True)
class _Pools:
    """What the options of a recipe draw from, of one source; empty where the option is off."""

    clean_share: list[int]  # images with a window without a defect
    small_crops: list[Component]
    balanced: list[list[Component]]  # one list for each class that occurs
    copy_paste: list[list[Component]]  # the same, of those that fit


class Sampler:
    """The batches of a training."""

    def __init__(self, sources: Sequence[Source], recipe: Recipe, until: Sequence[float] = ()) -> None:
        """until: share of the steps after which each source is drawn no more, 1 by default.

        UserError where no source has what the recipe asks for.
        """
        self.sources, self.recipe = sources, recipe
        self.bounds = share_bounds([source.share for source in sources], recipe)
        self._until = list(until) or [1.0] * len(sources)
        self._pools = [_pools(source, recipe) for source in sources]
        self._pipeline = augment.augmentations(recipe.light_gradient, recipe.warped)
        if recipe.modality_dropout and len(sources[0].images[0].image) == 1:
            raise UserError(
                f"recipe: modality_dropout is {recipe.modality_dropout:g}, but the data has one lighting "
                "mode: make it 0",
                USAGE,
            )
        crop = f"a crop of {recipe.crop_px} px"
        for name, wanted in (
            ("clean_share", f"no place for {crop} without a defect"),
            ("small_crops", f"no component under {SMALL_PX} px"),
            ("balanced", "no component"),
            ("copy_paste", f"no component that fits into half of {crop}"),
        ):
            share = getattr(recipe, name)
            if share and not any(getattr(pools, name) for pools in self._pools):
                raise UserError(f"recipe: {name} is {share:g}, but the data has {wanted}: make it 0", USAGE)

    def crops(self, step: int) -> list[Crop]:
        """The crops of a step, from 0, canvas by canvas, as they are before any augmentation."""
        rng = np.random.default_rng([self.recipe.seed, step])
        return [self._crop(i, rng) for i in self._canvases(step) for _ in range(self.recipe.mosaic**2)]

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        recipe, crops = self.recipe, self.crops(step)
        images, labels = augment.to_batch([crop.image for crop in crops], [crop.mask for crop in crops])
        planes = [torch.from_numpy(np.stack([crop.weight for crop in crops]))]
        regions, areas = _of_batch(crops)
        if regions is not None:
            planes.append(torch.from_numpy(regions).float())  # whole numbers, exact up to 2^24
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        images, labels, *planes = augment.augment(self._pipeline, images, labels, *planes)
        images = mosaics(_without_modes(images, recipe, step), recipe.mosaic)
        labels, *planes = (mosaics(plane[:, None], recipe.mosaic)[:, 0] for plane in (labels, *planes))
        labelled = torch.from_numpy(
            np.stack([self.sources[index].labelled for index in self._canvases(step)])
        )
        carried = planes[1].long() if regions is not None else None
        return Batch(images, labels, planes[0], labelled, carried, torch.from_numpy(areas).float())

    def bounds_at(self, step: int) -> list[int]:
        """The first canvas after those of each source that is drawn at a step: a batch may get smaller."""
        counts = np.diff(self.bounds, prepend=0)
        drawn = [step < share * self.recipe.steps for share in self._until]
        bounds: list[int] = np.cumsum(counts[drawn]).tolist()
        return bounds

    def _canvases(self, step: int) -> list[int]:
        """The source of each canvas of a step's batch."""
        sources: list[int] = np.searchsorted(self.bounds, np.arange(self.bounds[-1]), side="right").tolist()
        return [i for i in sources if step < self._until[i] * self.recipe.steps]

    def _crop(self, index: int, rng: np.random.Generator) -> Crop:
        """A crop of the source of that index."""
        source, pools, recipe = self.sources[index], self._pools[index], self.recipe
        number, y, x = _place(source, pools, recipe, rng)
        window = (slice(y, y + recipe.crop_px), slice(x, x + recipe.crop_px))
        found = source.images[number]
        crop = Crop(
            found.image[:, *window].astype(np.float32),
            found.mask[window],
            found.weight[window].astype(np.float32),
            found.regions[window] if found.regions is not None and recipe.instance != "none" else None,
            found.areas,
        )
        if pools.copy_paste and rng.random() < recipe.copy_paste:
            component = _one_of_a_class(pools.copy_paste, rng)
            crop = paste(crop, component, source.images[component.image], rng)
        return crop


def _pools(source: Source, recipe: Recipe) -> _Pools:
    crop_px, components = recipe.crop_px, source.components
    small = [c for c in components if source.images[c.image].areas[c.id] < SMALL_PX]
    whole = [c for c in components if fits(c, source.images[c.image], crop_px)]
    return _Pools(
        [
            number
            for number, found in enumerate(source.images)
            if recipe.clean_share and clean_origins(found.mask, crop_px).any()
        ],
        small if recipe.small_crops else [],
        _by_class(components) if recipe.balanced else [],
        _by_class(whole) if recipe.copy_paste else [],
    )


def _by_class(components: list[Component]) -> list[list[Component]]:
    classes = sorted({component.defect_class for component in components})
    return [[c for c in components if c.defect_class == value] for value in classes]


def _one_of_a_class(by_class: list[list[Component]], rng: np.random.Generator) -> Component:
    """Every class is as likely as the others, every component as the others of its class."""
    pool = by_class[rng.integers(len(by_class))]
    return pool[rng.integers(len(pool))]


def _place(source: Source, pools: _Pools, recipe: Recipe, rng: np.random.Generator) -> tuple[int, int, int]:
    """Image, first line and first column of a crop: of the kind that is drawn, where the source has it."""
    kinds = np.cumsum([recipe.clean_share, recipe.small_crops, recipe.balanced])
    kind = int(np.searchsorted(kinds, rng.random(), side="right")) if kinds[-1] else len(kinds)
    if kind == 0 and pools.clean_share:
        number = pools.clean_share[rng.integers(len(pools.clean_share))]
        clean = clean_origins(source.images[number].mask, recipe.crop_px)
        y, x = divmod(int(rng.choice(np.flatnonzero(clean))), clean.shape[1])
        return number, y, x
    if kind == 1 and pools.small_crops:
        return _around(pools.small_crops[rng.integers(len(pools.small_crops))], source, recipe.crop_px, rng)
    if kind == 2 and pools.balanced:
        return _around(_one_of_a_class(pools.balanced, rng), source, recipe.crop_px, rng)
    number = int(rng.integers(len(source.images)))
    height, width = source.images[number].mask.shape
    y = int(rng.integers(height - recipe.crop_px + 1))
    return number, y, int(rng.integers(width - recipe.crop_px + 1))


def _around(
    component: Component, source: Source, crop_px: int, rng: np.random.Generator
) -> tuple[int, int, int]:
    """A crop with a pixel of the component in its middle half: a net would learn that it is the centre."""
    mask = source.images[component.image].mask
    pixels = np.argwhere(mask[component.box] == component.defect_class)
    pixel = pixels[rng.integers(len(pixels))] + [side.start for side in component.box]
    origin = pixel - crop_px // 2 + rng.integers(-(crop_px // 4), crop_px // 4 + 1, size=2)
    y, x = np.clip(origin, 0, np.subtract(mask.shape, crop_px)).tolist()
    return component.image, y, x


def clean_origins(mask: NDArray[np.uint8], crop_px: int) -> NDArray[np.bool_]:
    """Whether the crop from a pixel on has no defect: (H, W) -> (H - crop + 1, W - crop + 1)."""
    defect = (mask > 0) & (mask != IGNORE)
    above = np.pad(defect.cumsum(axis=0, dtype=np.int32).cumsum(axis=1), ((1, 0), (1, 0)))
    rows = above[crop_px:] - above[:-crop_px]
    clean: NDArray[np.bool_] = rows[:, crop_px:] == rows[:, :-crop_px]
    return clean


def _of_batch(crops: list[Crop]) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
    """Regions (N, H, W) with ids that differ from crop to crop, and the areas by them (C + 1,)."""
    first = np.cumsum([0, *(len(crop.areas) - 1 for crop in crops)])
    areas = np.concatenate([[0], *(crop.areas[1:] for crop in crops)])
    planes = [crop.regions for crop in crops if crop.regions is not None]
    if not planes:
        return None, areas
    starts = first[:-1, None, None]
    return np.where(np.stack(planes) > 0, np.stack(planes) + starts, 0), areas


def _without_modes(images: Tensor, recipe: Recipe, step: int) -> Tensor:
    """The images without the lighting modes that this step leaves out, the same of all: (N, M, H, W).

    One stays at least. The net averages its stem over the modes it gets, so a mode left out is not there.
    """
    if not recipe.modality_dropout:
        return images
    rng = np.random.default_rng([recipe.seed, step, 1])  # its own: the crops stay those of another rate
    kept = rng.random(images.shape[1]) >= recipe.modality_dropout
    kept[rng.integers(len(kept))] |= not kept.any()
    return images[:, torch.from_numpy(kept)]


def share_bounds(shares: Sequence[float], recipe: Recipe) -> NDArray[np.int64]:
    """The first mosaic after those of each source, the same in every batch as far as whole numbers allow."""
    canvases = recipe.batch // recipe.mosaic**2
    bounds: NDArray[np.int64] = np.round(np.cumsum(shares) / np.sum(shares) * canvases).astype(np.int64)
    if (np.diff(bounds, prepend=0) == 0).any():
        raise UserError(
            f"shares {', '.join(f'{share:g}' for share in shares)}: a batch of {canvases} mosaics leaves a "
            "source without one: choose a larger batch or more even shares",
            USAGE,
        )
    return bounds


def mosaics(crops: Tensor, side: int) -> Tensor:
    """Lay side x side crops out as one canvas: (N * side^2, C, H, W) -> (N, C, side * H, side * W).

    A strip has no border, but every pixel of a 192 px crop sees one: the net sees 169 px far. Trained on
    single crops it lost 7 points of mIoU from single images to the same images in a roll (val, measured).
    """
    n, channels, height, width = crops.shape
    grid = crops.reshape(n // side**2, side, side, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, side * height, side * width)
