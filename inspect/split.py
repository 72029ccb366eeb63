"""A split by group, written as a manifest: no scene, piece or coil lies in two parts."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import (
    COLUMNS,
    SPLITS,
    ImageFile,
    file_within,
    manifest_rows,
    open_labels,
    refuse,
)
from rollsight.inspect.leaks import Leak
from rollsight.inspect.rolls import write_durably

SPLIT_SHARES = (0.7, 0.15, 0.15)  # of the images: train, val, test


def write_split(
    root: Path,
    shares: Sequence[float] = SPLIT_SHARES,
    seed: int = 0,
    *,
    leaks: Iterable[Leak] = (),
    overwrite: bool = False,
    on_image: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Give each group of the labelled data under `root` a split, and write it as `manifest.csv` there.

    Each class comes as near to the shares of train, val and test as whole groups allow. Groups that `leaks`
    (of a check of this folder) found to show the same steel become one, under the first one's name. The same
    data, shares and seed give the same bytes. Returns split -> class -> images that hold it, "clean" for
    those with none and "images" for all. UserError for shares that are none, rolls, broken pairs, fewer
    groups than parts, and a manifest that is there already, unless `overwrite`: then its groups and other
    columns are kept.
    """
    wanted = np.array(shares, np.float64)
    if len(wanted) != len(SPLITS) or not np.isfinite(wanted).all() or wanted.min() < 0 or wanted.sum() <= 0:
        raise UserError(
            f"shares {list(shares)}: {', '.join(SPLITS)} need one number of 0 or more each", USAGE
        )
    if abs(wanted.sum() - 1) > 1e-3:
        raise UserError(f"shares {list(shares)} add up to {wanted.sum():g}: they must add up to 1", USAGE)
    manifest = root / "manifest.csv"
    if manifest.exists() and not overwrite:
        raise UserError(f"{manifest} is there already: --force replaces its splits", USAGE)
    data = open_labels(root, _refuse_but_straddling)
    samples = [sample for sample in data.samples if isinstance(sample, ImageFile)]
    if len(samples) < len(data.samples):
        raise UserError(f"{root}: a roll is one group and cannot be split: give whole rolls to each part")

    unit_of = _units(data.groups(), leaks)
    units = {unit: number for number, unit in enumerate(sorted(set(unit_of.values())))}
    # Images of each unit that hold each class, the first for those with none.
    held = np.zeros((len(units), len(data.classes) + 1), np.int64)
    images = np.zeros(len(units), np.int64)
    names = ("clean", *data.classes)
    holds = []
    for done, sample in enumerate(samples, start=1):
        values = np.unique(sample.read()[1])
        classes = [int(v) for v in values if 0 < v < len(names)] or [0]
        unit = units[unit_of[sample.group]]
        held[unit, classes] += 1
        images[unit] += 1
        holds.append(classes)
        if on_image is not None:
            on_image(done, len(samples))
    split_of = stratify(held, images, wanted, seed)
    for split in np.flatnonzero((wanted > 0) & (np.bincount(split_of, minlength=len(SPLITS)) == 0)):
        raise UserError(
            f"{root}: {len(units)} groups are too few for a {SPLITS[split]} part of {wanted[split]:.0%}: "
            "label more scenes, or give larger shares to the small parts"
        )

    listed = manifest.is_file()
    rows = list(manifest_rows(manifest)) if listed else [{} for _ in samples]
    if listed and [file_within(root, row["image"]) for row in rows] != [sample.image for sample in samples]:
        raise UserError(f"{manifest} was changed while the images were read: split them again")
    counts: dict[str, dict[str, int]] = {name: {"images": 0} for name in SPLITS}
    table = []
    for sample, row, classes in zip(samples, rows, holds, strict=True):
        image, mask = (path.relative_to(root).as_posix() for path in (sample.image, sample.mask))
        unit_name = unit_of[sample.group]
        split_name = SPLITS[split_of[units[unit_name]]]
        table.append({**row, "image": image, "mask": mask, "split": split_name, "group": unit_name})
        counts[split_name]["images"] += 1
        for value in classes:
            counts[split_name][names[value]] = counts[split_name].get(names[value], 0) + 1
    text = io.StringIO(newline="")
    columns = list(rows[0]) if listed else COLUMNS  # the manifest's, in its order
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_durably(manifest, text.getvalue().encode())
    return counts


def _refuse_but_straddling(kind: str, line: str) -> None:
    """A group that lies in two parts is what a split puts right."""
    if kind != "straddles":
        refuse(kind, line)


def _units(groups: Sequence[str], leaks: Iterable[Leak]) -> dict[str, str]:
    """Group -> the first of the groups that show the same steel, over any number of pairs."""
    unit_of = {group: group for group in groups}
    for leak in leaks:
        first, second = sorted(unit_of[group] for group in leak.groups)
        unit_of = {group: first if unit == second else unit for group, unit in unit_of.items()}
    return unit_of


def stratify(
    held: NDArray[np.int64], images: NDArray[np.int64], shares: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """A part for each unit: held (N, K) images per class, images (N,), shares (P,) -> (N,) in [0, P).

    The rarest class first, its largest units first, each to the part that lacks most of that class, then
    most images. Iterative stratification of Sechidis et al. 2011 (ECML PKDD, LNCS 6913), on whole groups.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(held))  # among equals, chance decides
    lacks = shares[:, None] * held.sum(axis=0)  # (P, K)
    lacks_images = shares * images.sum()
    part = np.full(len(held), -1)
    possible = shares > 0
    for _ in range(held.shape[1]):
        left = held[part < 0].sum(axis=0)
        if not left.any():
            break
        rarest = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
        mine = [unit for unit in order if part[unit] < 0 and held[unit, rarest] > 0]
        for unit in sorted(mine, key=lambda unit: -held[unit, rarest]):
            keys = (lacks_images, lacks[:, rarest], possible)  # the last decides first
            part[unit] = np.lexsort(keys)[-1]
            lacks[part[unit]] -= held[unit]
            lacks_images[part[unit]] -= images[unit]
    return part
