"""All that is wrong with labelled data, told at once: broken pairs and masks, groups cut apart, leaks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import (
    ANY_SPLIT,
    IGNORE,
    SPLITS,
    ImageFile,
    LabelledData,
    Sample,
    open_labels,
)
from rollsight.inspect.leaks import Leak, Picture, find_leaks

CLEAN = "clean"  # in the counts: images without any class


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    kind: str  # "classes" | "manifest" | "missing" | "straddles" | "split" | "twice" | "stray" | "broken"
    #            | "values" | "ignored" | "unused"
    line: str  # in words


@dataclass(frozen=True, slots=True)
class LabelCheck:
    """What a check found."""

    images: int
    groups: int
    counts: dict[str, dict[str, int]]  # split -> class -> images that hold it; "clean" counts those with none
    faults: tuple[Fault, ...]
    leaks: tuple[Leak, ...]  # between splits: figures on one of them are not to be believed
    alike: tuple[
        Leak, ...
    ]  # between groups of one split, or of rolls, which have none: ought to be one group


def check_labels(
    roots: Sequence[Path],
    on_image: Callable[[int, int], None] | None = None,
    on_pair: Callable[[int, int], None] | None = None,
) -> LabelCheck:
    """Read all of the labelled data under `roots`, as one body, and tell every fault and leak.

    Groups of different roots are different groups. UserError only where a folder cannot be read at all.
    The callbacks get (done, total): images read, then pairs of images compared.
    """
    faults: list[Fault] = []

    def on_fault(kind: str, line: str) -> None:
        faults.append(Fault(kind, line))

    sources = [open_labels(root, on_fault) for root in roots]
    counts: dict[str, dict[str, int]] = {}
    found = find_leaks(_pictures(sources, counts, on_fault, on_image), on_pair)
    for root, data in zip(roots, sources, strict=True):
        faults += _around(root, data)
    for name in dict.fromkeys(name for data in sources for name in data.classes):
        if not any(of_split.get(name) for of_split in counts.values()):
            on_fault("unused", f"class {name!r} occurs in no mask: nothing can be learned or tested of it")
    across = [set(leak.splits) <= set(SPLITS) and leak.splits[0] != leak.splits[1] for leak in found]
    return LabelCheck(
        sum(len(data.samples) for data in sources),
        sum(len(data.groups()) for data in sources),
        counts,
        tuple(faults),
        tuple(leak for leak, leaks in zip(found, across, strict=True) if leaks),
        tuple(leak for leak, leaks in zip(found, across, strict=True) if not leaks),
    )


def _pictures(
    sources: Sequence[LabelledData],
    counts: dict[str, dict[str, int]],
    on_fault: Callable[[str, str], None],
    on_image: Callable[[int, int], None] | None,
) -> Iterator[Picture]:
    """Every image that can be read; on the way its mask is checked and its classes are counted."""
    total, done = sum(len(data.samples) for data in sources), 0
    for data in sources:
        for sample in data.samples:
            name = _name(sample)
            try:
                image = sample.read_image()
                yield Picture(
                    name,
                    sample.split,
                    sample.group if len(sources) == 1 else f"{data.root}: {sample.group}",
                    image.mean(axis=0),
                )
                values = np.unique(sample.read_mask(image.shape[1:]))
            except UserError as fault:
                on_fault("broken", str(fault))
            else:
                _check_values(name, values.tolist(), data.classes, on_fault)
                of_split = counts.setdefault(sample.split, {})
                held = [data.classes[v - 1] for v in values if 0 < v <= len(data.classes)]
                for held_class in held or [CLEAN]:
                    of_split[held_class] = of_split.get(held_class, 0) + 1
            done += 1
            if on_image is not None:
                on_image(done, total)


def _check_values(
    name: str, values: list[int], classes: tuple[str, ...], on_fault: Callable[[str, str], None]
) -> None:
    beyond = [v for v in values if len(classes) < v < IGNORE]
    if classes and beyond:
        on_fault(
            "values",
            f"{name}: its mask holds {', '.join(map(str, beyond))}, but there are {len(classes)} classes: "
            f"values are 0 to {len(classes)}, and {IGNORE} where nobody labelled",
        )
    if values == [IGNORE]:
        on_fault("ignored", f"{name}: all of its mask is {IGNORE}: nobody labelled it, nothing is learned")


def _around(root: Path, data: LabelledData) -> Iterator[Fault]:
    """Faults of the files as a whole: listed twice, splits that no command reads, masks without an image."""
    seen: set[Path] = set()
    for sample in data.samples:
        if isinstance(sample, ImageFile):
            if sample.image in seen:
                yield Fault("twice", f"{sample.image}: listed twice")
            seen.add(sample.image)
    for split in sorted({sample.split for sample in data.samples} - {*SPLITS, ANY_SPLIT}):
        yield Fault("split", f"{root}: split {split!r} is read by nothing: splits are {', '.join(SPLITS)}")
    masks = {sample.mask for sample in data.samples if isinstance(sample, ImageFile)}
    for mask in sorted(path for folder in {mask.parent for mask in masks} for path in folder.glob("*.png")):
        if mask not in masks and mask not in seen:
            yield Fault("stray", f"{mask}: no image belongs to this mask")


def _name(sample: Sample) -> str:
    if isinstance(sample, ImageFile):
        return str(sample.image)
    return f"{sample.roll.location} y {sample.y} x {sample.x}"
