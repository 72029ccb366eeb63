"""Labelled data as a training holds it in memory: images with what is known of each pixel and component."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect import augment
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData, Sample
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.roll_tiles import whole_components
from rollsight.inspect.tiles import cell_margins
from scipy import ndimage


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """One image, padded to a crop at least, and its planes."""

    image: NDArray[np.float16]  # (M, H, W) in [0, 1]
    mask: NDArray[np.uint8]  # (H, W) in model classes, 255 ignored
    weight: NDArray[np.float16]  # (H, W) of small components
    regions: NDArray[np.int32] | None  # (H, W) the component nearest to each pixel, from 1, where wanted
    areas: NDArray[np.int64]  # (C + 1,) px of each component, on a roll with those beyond the tile


@dataclass(frozen=True, slots=True)
class Component:
    """Where a component lies."""

    image: int  # of the source
    id: int  # in its planes
    defect_class: int  # of the model, from 1
    box: tuple[slice, slice]  # lines, columns
    is_whole: bool  # no px of it lies beyond the tile of a roll


@dataclass(frozen=True, slots=True)
class Source:
    """The samples of one source, with its share of each batch."""

    images: list[TrainingImage]
    components: list[Component]
    labelled: NDArray[np.bool_]  # (K + 1,) which model classes it labels
    share: float


def model_classes(data: Sequence[LabelledData]) -> tuple[str, ...]:
    """The classes of a model trained on several sources: their union, in order of appearance."""
    return tuple(dict.fromkeys(name for source in data for name in source.classes))


def read_sources(
    data: Sequence[LabelledData],
    classes: tuple[str, ...],
    recipe: Recipe,
    shares: Sequence[float],
    exhaustive: Sequence[bool],
) -> list[Source]:
    """Read all that the recipe needs of the data; `shares` and `exhaustive` as `train` has them.

    Images smaller than the crop are padded right and bottom by reflection, the padding ignored; with
    `recipe.padded` image files are first padded all around to whole cells, as they are judged.
    """
    read = [[_read(source, sample, classes) for sample in source.samples] for source in data]
    if len({image.shape[0] for samples in read for image, _ in samples}) > 1:
        raise UserError("the sources differ in their number of lighting modes: train on one number of modes")
    # Components come from whole masks: a crop would cut slivers off them, as the border of a tile does.
    found = [
        [_components(sample, mask) for sample, (_, mask) in zip(source.samples, samples, strict=True)]
        for source, samples in zip(data, read, strict=True)
    ]
    area_ref = augment.reference_area(areas for samples in found for _, areas in samples)
    carried = recipe.instance != "none" or recipe.copy_paste > 0
    sources = []
    equal, none = [1.0] * len(data), [False] * len(data)
    for source, samples, parts, share, whole in zip(
        data, read, found, shares or equal, exhaustive or none, strict=True
    ):
        images, components = [], []
        for number, (sample, (image, mask), (ids, areas)) in enumerate(
            zip(source.samples, samples, parts, strict=True)
        ):
            weight, regions = augment.component_planes(ids, areas, area_ref)
            around = recipe.padded and isinstance(sample, ImageFile)
            pad = [_padding(size, recipe.crop_px, around=around) for size in mask.shape]
            images.append(
                TrainingImage(
                    np.pad(image, [(0, 0), *pad], mode="reflect"),
                    np.pad(mask, pad, constant_values=IGNORE),
                    np.pad(weight, pad),
                    np.pad(regions, pad) if carried else None,
                    areas,
                )
            )
            (top, _), (left, _) = pad
            for i, (y, x) in enumerate(ndimage.find_objects(ids), start=1):
                own = mask[y, x][ids[y, x] == i]
                box = (slice(y.start + top, y.stop + top), slice(x.start + left, x.stop + left))
                components.append(Component(number, i, int(own[0]), box, own.size == areas[i]))
        labelled = np.array([True, *(whole or name in source.classes for name in classes)])
        sources.append(Source(images, components, labelled, share))
    return sources


def _padding(px: int, crop_px: int, *, around: bool) -> tuple[int, int]:
    """Padding before and after `px` of an image: `around` to whole cells, or not; and to a crop at least."""
    before, after = cell_margins(px) if around else (0, 0)
    return before, after + max(0, crop_px - before - px - after)


def _read(
    source: LabelledData, sample: Sample, classes: tuple[str, ...]
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Image (M, H, W) and mask (H, W) of a sample, in model classes."""
    image, mask = source.read(sample)
    return image.astype(np.float16), to_model_classes(source, classes)[mask]


def _components(sample: Sample, mask: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The components of a sample's mask, as `augment.component_areas`; of a tile with what lies beyond."""
    if isinstance(sample, ImageFile):
        return augment.component_areas(mask)
    return whole_components(sample, mask)


def to_model_classes(source: LabelledData, classes: Sequence[str]) -> NDArray[np.uint8]:
    """Mask value of a source -> class of the model: (256,)."""
    table = np.zeros(256, dtype=np.uint8)
    table[IGNORE] = IGNORE
    for index, name in enumerate(source.classes, start=1):
        table[index] = classes.index(name) + 1
    return table


def check_enough(sources: Sequence[Source], classes: Sequence[str], fewest: int) -> None:
    """Refuse, as UserError, a training from scratch that has fewer components of a class to learn from.

    A mark that lies in two tiles of a roll counts in each.
    """
    counts = Counter(component.defect_class for source in sources for component in source.components)
    for index, name in enumerate(classes, start=1):
        if counts[index] < fewest:
            raise UserError(
                f"class {name!r}: {counts[index]} components to learn from, a training from scratch needs "
                f"{fewest}: label more, or fine-tune a model with --init (the shipped one is `default`)",
                USAGE,
            )
