"""What is wrong with a synthetic set: labels that do not hold, copies, sameness, distance to real defects."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import UserError
from rollsight.inspect.labelled_folder import Incoming, LabelledImage, write_labels
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData, Sample, open_labels, read_gray
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.train import train
from rollsight.synth.arms import BASE, FINE_TUNING, base_net, net_logits, run_arm
from rollsight.synth.compose import digest_of
from rollsight.synth.croissant import folder_card, write_card
from rollsight.synth.data_card import DATASET, PROVENANCE, checked_card, groups_in, open_provenance
from rollsight.synth.degraded import contrast_at
from rollsight.synth.features import (
    COPY_CORRELATION,
    COPY_RATIO,
    Box,
    Crop,
    Features,
    crop_of,
    kid,
    largest_correlation,
    nearest_ratio,
    residual_of,
    spread,
)
from rollsight.synth.mask_bank import Bools, marks_of
from rollsight.synth.patches import Scene, class_value, clean_places, held_groups, read_scenes, refuse_held
from scipy import ndimage
from torch import nn

KEPT = 0.5  # of the paste's contrast: below it the label is wrong
AREA = (
    0.5,
    2.0,
)  # area at half contrast over the mask's: outside, the label has another size than the defect
AREA_REACH_PX = 3  # around the mask that is looked at for it
DISAGREES, EASY = 0.1, 0.9  # IoU with the cross-fitted segmenter
NEAR_PX = 8  # around a defect: what a segmenter sees farther off is not about it
EASY_SHARE = 0.5  # of what nothing else drops: so many may be easy, at most
MOST_CROPS = 300  # of a set
MOST_KNOWN = 2000  # training defects among which copies are looked for: in a part of them they would not show
OWN_STEPS = 4  # a segmenter's own steps are a quarter of those of the net that both begin from
SEEN = 0.5  # of real defects: segmenters that see fewer of them say nothing of made ones
JUDGE = Recipe(net="fast", attention="none", mosaic=1, batch=12, balanced=0.5, small_weight=0.0, fewest=0)
_T = TypeVar("_T")
CLEAN_PX = 48  # side of the clean windows of the ceiling


@dataclass(frozen=True, slots=True)
class Judged:
    """One sample and why it is dropped, "" where it is kept."""

    image: str
    dropped: str
    kept_contrast: float  # the least of its marks
    area: float  # of the mark whose ratio is farthest from 1
    agreement: float  # least IoU with the segmenter; nan where none was heard
    box: Box  # of its first mark

    def scores(self) -> dict[str, float | None]:
        """What the provenance of a kept sample says of the check."""
        return {"area_ratio": round(self.area, 4), "agreement": _number(round(self.agreement, 4))}


@dataclass(frozen=True, slots=True)
class Check:
    """All that a check found."""

    samples: list[Judged]
    figures: dict[str, Any]
    made: list[Crop]  # of samples that are kept
    dropped: list[tuple[Crop, str]]  # of samples that are not, and why
    real: list[Crop]  # of held-out images; where these have none, of those that the defects come from
    held_out: bool  # whether it is of held-out ones


@dataclass(frozen=True, slots=True)
class _Defect:
    """One defect of an image, (H, W) both."""

    image: NDArray[np.float32]
    inside: Bools
    box: Box

    def crop(self) -> Crop:
        return crop_of(self.image, self.box)

    def residual(self) -> Crop:
        return residual_of(self.image, self.inside, self.box)


def check_set(
    folder: Path,
    labels: LabelledData,
    run: Path,
    *,
    steps: int,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Check:
    """Look at every sample of a synthetic folder beside the labelled data it was made of.

    steps: of the net that the two cross-fitted segmenters begin from, 0 for none; where they see fewer than
    SEEN of real defects (`_on_real`), nothing is dropped by them. Held-out crops are of the val split: the
    test split is for proofs. UserError where the folder is no synthetic one or holds another class.
    """
    lines, made = open_provenance(folder), open_labels(folder)
    if made.classes != labels.classes:
        raise UserError(
            f"{folder}: classes {', '.join(made.classes)}, {labels.root} has others: give its labels"
        )
    strange = {mark["group"] for line in lines for mark in line["marks"]} - set(labels.groups())
    if strange:
        raise UserError(
            f"{folder}: its defects come from {', '.join(sorted(strange)[:3])}, which {labels.root} does not "
            "have: give the labels that its generator was fitted on"
        )
    refuse_held(groups_in(lines), held_groups(labels), str(folder))
    if (images := len(made.samples)) != len(lines):
        raise UserError(f"{folder}: {images} images, {len(lines)} lines of {PROVENANCE}: make the data again")
    name = str(lines[0]["class"])
    value = class_value(labels.classes, name, labels.root)
    scenes = read_scenes(labels.of_split("train"))
    of_val = held_scenes(labels)
    nets = _cross_fitted(labels, scenes, lines, run, steps, seed, on_step) if steps else {}
    segmenters = {"steps": steps, **_on_real(nets, scenes, of_val, value)} if nets else None
    heard = segmenters is not None and segmenters["heard"]
    samples = {sample.image.name: sample for sample in made.samples if isinstance(sample, ImageFile)}
    judged = []
    for line in lines:
        image, mask = _sample_of(line, samples, folder)
        judged.append(_judge(line, image, mask, nets if heard else {}, value))
    judged = _few_easy(judged)
    kept, left = (
        [line for one, line in zip(judged, lines, strict=True) if bool(one.dropped) is out]
        for out in (False, True)
    )

    def new(line: dict[str, Any], number: int) -> _Defect:
        image, mask = _sample_of(line, samples, folder)
        return _new_defects(line, image, mask == value)[number]

    marks = [(line, number) for line in kept for number in range(len(line["marks"]))]
    known = _some(_labelled(scenes, labels.classes, name), seed, MOST_KNOWN)
    chosen = {
        "made": [new(*one) for one in _some(marks, seed)],
        "train": known,
        "held": _some(_labelled(of_val, labels.classes, name), seed),
        "clean": _some(_clean(scenes, seed), seed),
    }
    crops = {kind: [defect.crop() for defect in of] for kind, of in chosen.items()}
    residuals = {kind: [defect.residual() for defect in chosen[kind]] for kind in ("made", "train")}
    figures = _figures(judged, crops, residuals)
    figures["segmenters"] = segmenters
    why = {one.image: one.dropped for one in judged}
    dropped = [(new(line, 0).crop(), why[line["image"]]) for line in left[:MOST_CROPS]]
    held_out = bool(crops["held"])
    return Check(judged, figures, crops["made"], dropped, crops["held" if held_out else "train"], held_out)


def _sample_of(
    line: dict[str, Any], samples: Mapping[str, Sample], folder: Path
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Image and mask (H, W) of a line of provenance."""
    sample = samples.get(Path(line["image"]).name)
    if sample is None:
        raise UserError(f"{folder}: no image {line['image']} of its provenance: make the data again")
    image, mask = sample.read()
    return image[0], mask


def _new_defects(line: dict[str, Any], image: NDArray[np.float32], inside: Bools) -> list[_Defect]:
    """Of a sample those that were made, without px of others within their boxes; inside: px of the class."""
    parts, _ = ndimage.label(inside, np.ones((3, 3)))
    boxes = ndimage.find_objects(parts)
    found = []
    for mark in line["marks"]:
        x0, y0, x1, y1 = mark["box"]
        place = (slice(y0, y1), slice(x0, x1))
        own = np.zeros_like(inside)
        own[place] = parts[place] == boxes.index(place) + 1 if place in boxes else inside[place]
        found.append(_Defect(image, own, (x0, y0, x1, y1)))
    return found


def _judge(
    line: dict[str, Any],
    image: NDArray[np.float32],
    mask: NDArray[np.uint8],
    nets: dict[str, Any],
    value: int,
) -> Judged:
    areas, agreements, inside = [], [], mask == value
    defects = _new_defects(line, image, inside)
    for mark, defect in zip(line["marks"], defects, strict=True):
        others = inside & ~defect.inside
        areas.append(area_ratio(image, defect.inside, others))
        if nets:
            agreements.append(iou_nearby(nets[mark["group"]](image) & ~others, defect.inside))
    kept = min(mark["contrast_kept"] for mark in line["marks"])
    area = max(areas, key=lambda ratio: abs(math.log(max(ratio, 1e-3))))
    agreement = min(agreements) if agreements else math.nan
    dropped = ""
    if _digest(image, mask) != line["sha256"]:
        dropped = "changed since it was made"  # so that its contrast is no longer what was measured then
    elif kept < KEPT:
        dropped = "contrast lost"
    elif not AREA[0] <= area <= AREA[1]:
        dropped = "other size than its label"
    elif agreement < DISAGREES:
        dropped = "segmenter does not see it"
    return Judged(line["image"], dropped, kept, area, agreement, defects[0].box)


def sample_digest(folder: Path, image: str) -> str:
    """What `digest_of` says of the sample of a synthetic folder that is there now; UserError without one."""
    for sample in open_labels(folder).samples:
        if isinstance(sample, ImageFile) and sample.image.name == Path(image).name:
            found, mask = sample.read()
            return _digest(found[0], mask)
    raise UserError(f"{folder}: no image {image} of its provenance: make the data again")


def _digest(image: NDArray[np.float32], mask: NDArray[np.uint8]) -> str:
    return digest_of(np.round(image * 255).astype(np.uint8), mask)


def area_ratio(image: NDArray[np.float32], inside: Bools, others: Bools) -> float:
    """Area at half of the mark's contrast, within 3 px of it, over the mask's: 1 where both are the same.

    Where a mark has no contrast of its mean, texture alone tells it, and nothing is said: 1.
    """
    level = contrast_at(image, inside)
    around = ndimage.binary_dilation(inside, iterations=AREA_REACH_PX) & ~others
    ring = around & ~inside
    if abs(level) < 0.03 or not ring.any():
        return 1.0
    beyond = (image - image[ring].mean()) * np.sign(level) > abs(level) / 2
    return float((beyond & around).sum() / inside.sum())


def _few_easy(judged: list[Judged]) -> list[Judged]:
    """Easy samples beyond their share are dropped, the easiest first: what a net knows teaches it little."""
    kept = [one for one in judged if not one.dropped]
    easy = sorted((one for one in kept if one.agreement > EASY), key=lambda one: -one.agreement)
    over = max(0, len(easy) - math.ceil(len(kept) * EASY_SHARE))
    dropped = {one.image for one in easy[:over]}
    return [replace(one, dropped="too easy") if one.image in dropped else one for one in judged]


def _cross_fitted(
    labels: LabelledData,
    scenes: Sequence[Scene],
    lines: list[dict[str, Any]],
    run: Path,
    steps: int,
    seed: int,
    on_step: Callable[[int, int], None] | None,
) -> dict[str, Callable[[NDArray[np.float32]], Bools]]:
    """Of each source group a segmenter that never saw its defects: the groups are dealt to two folds.

    scenes: those of the train split, as they were read.
    Both begin from one net of the scenes without the class and learn it as an arm of a proof does: from
    scratch, five scenes of a class among hundreds gave nets that saw none of it. Where those scenes show no
    other class there is nothing to begin from.
    """
    name = str(lines[0]["class"])
    value = class_value(labels.classes, name, labels.root)
    sources = sorted({mark["group"] for line in lines for mark in line["marks"]})
    if len(sources) < 2:
        raise UserError(f"one source group, {sources[0]!r}: a cross-fitted net needs two: give --steps 0")
    with_class: list[Sample] = []
    without: list[Sample] = []
    others = False
    for sample, scene in zip(labels.of_split("train").samples, scenes, strict=True):
        if (scene.mask == value).any():
            with_class.append(sample)
        else:
            without.append(sample)
            others |= bool(((scene.mask > 0) & (scene.mask != IGNORE)).any())
    base = LabelledData(labels.root, labels.classes, tuple(without))
    begun = steps if others else 0
    own = max(1, steps // OWN_STEPS) if others else steps

    def told(done: int, step: int, _: dict[str, float]) -> None:
        if on_step is not None:
            on_step(done + step, begun + 2 * own)

    if others:
        recipe = replace(BASE, steps=begun, seed=seed)
        init = base_net(base, name, run / "base", recipe, on_step=partial(told, 0))
    judges: dict[str, Callable[[NDArray[np.float32]], Bools]] = {}
    for fold in (0, 1):
        away, folder, tell = set(sources[fold::2]), run / f"fold-{fold}", partial(told, begun + fold * own)
        kept = tuple(sample for sample in with_class if sample.group not in away)
        if others:
            rare = LabelledData(labels.root, labels.classes, kept)
            recipe = replace(FINE_TUNING, steps=own, seed=seed)
            net = run_arm(base, rare, [], init, folder, recipe=recipe, on_step=tell)
        else:
            clean = tuple(sample for sample in without if sample.group not in away)
            learned = LabelledData(labels.root, labels.classes, (*clean, *kept))
            net = train([learned], folder, replace(JUDGE, steps=own, seed=seed), on_step=tell)
        judges.update(dict.fromkeys(away, partial(sees, net, value)))  # one object a fold: see _on_real
    return judges


def sees(net: nn.Module, value: int, image: NDArray[np.float32]) -> Bools:
    """Where a net sees a class on an image (H, W)."""
    found: Bools = net_logits(net, image[None]).argmax(axis=0) == value
    return found


def iou_nearby(found: Bools, own: Bools) -> float:
    """IoU of a defect's px (H, W) with what a segmenter finds on and near them."""
    near = ndimage.binary_dilation(own, iterations=NEAR_PX)
    return float((found & own).sum() / max(int(((found & near) | own).sum()), 1))


def _on_real(
    nets: Mapping[str, Callable[[NDArray[np.float32]], Bools]],
    scenes: Sequence[Scene],
    of_val: Sequence[Scene],
    value: int,
) -> dict[str, Any]:
    """How the segmenters do on real scenes that they did not learn from, and whether they are heard.

    Those of val; where none of these holds the class, the sources, each by the net that never saw it. `iou`
    of the class, `seen`: the share of its components on which they agree as they must on made ones.
    """
    of = "val" if any((scene.mask == value).any() for scene in of_val) else "sources"
    pairs = [(scene, see) for scene in of_val for see in set(nets.values())]
    if of == "sources":
        pairs = [(scene, nets[scene.group]) for scene in scenes if scene.group in nets]
    both = either = 0
    seen = []
    for scene, see in pairs:
        truth = scene.mask == value
        found = see(scene.image) & (scene.mask != IGNORE)
        both += int((found & truth).sum())
        either += int((found | truth).sum())
        parts, count = ndimage.label(truth, np.ones((3, 3)))
        for i in range(1, count + 1):
            own = parts == i
            seen.append(iou_nearby(found & (own | ~truth), own) >= DISAGREES)
    share = sum(seen) / max(len(seen), 1)
    return {"of": of, "iou": both / max(either, 1), "seen": share, "heard": share >= SEEN}


def held_scenes(labels: LabelledData) -> list[Scene]:
    """The val split's scenes; none where there is no such split."""
    scenes: list[Scene] = []
    for sample in labels.samples:
        if sample.split == "val":
            image, mask = labels.read(sample)
            scenes.append(Scene(image[0], mask, f"{len(scenes)}", sample.group))
    return scenes


def _labelled(scenes: Sequence[Scene], classes: Sequence[str], name: str) -> list[_Defect]:
    """All defects of a class on real scenes."""
    images = {scene.name: scene.image for scene in scenes}
    found = []
    for mark in marks_of(scenes, classes):
        if mark.defect_class == name:
            (y, x), (rows, columns) = mark.origin, mark.box
            image = images[mark.source]
            inside = np.zeros(image.shape, dtype=bool)
            inside[y : y + mark.inside.shape[0], x : x + mark.inside.shape[1]] = mark.inside
            box = (columns.start + x, rows.start + y, columns.stop + x, rows.stop + y)
            found.append(_Defect(image, inside, box))
    return found


def _clean(scenes: list[Scene], seed: int) -> list[_Defect]:
    """Windows without any defect, taken as if they were some."""
    rng = np.random.default_rng(seed)
    found = []
    for place in clean_places([scene for scene in scenes if not (scene.mask == IGNORE).all()], CLEAN_PX):
        y, x = place.origins[rng.integers(len(place.origins))].tolist()
        box = (x + 8, y + 8, x + CLEAN_PX - 8, y + CLEAN_PX - 8)
        found.append(_Defect(place.scene.image, place.scene.mask > 0, box))
    return found


def made_crops(folder: Path) -> list[Crop]:
    """The crops of all new defects of a synthetic folder."""
    crops = []
    for line in open_provenance(folder):
        image = read_gray(folder / line["image"])
        crops += [crop_of(image, tuple(mark["box"])) for mark in line["marks"]]
    return crops


def _some(found: list[_T], seed: int, most: int = MOST_CROPS) -> list[_T]:
    chosen = np.random.default_rng(seed).permutation(len(found))[:most]
    return [found[int(i)] for i in chosen]


def _figures(
    judged: list[Judged], sets: dict[str, list[Crop]], residuals: dict[str, list[Crop]]
) -> dict[str, Any]:
    """The figures of a check; None where a set is too small for one. Distances are of what is kept."""
    features = Features()
    of = {name: features(crops) for name, crops in sets.items() if crops}
    dropped: dict[str, int] = {}
    for one in judged:
        if one.dropped:
            dropped[one.dropped] = dropped.get(one.dropped, 0) + 1
    kept = [one for one in judged if not one.dropped]
    told: dict[str, Any] = {
        "samples": len(judged),
        "kept": len(kept),
        "dropped": dropped,
        "least_contrast_kept": min((one.kept_contrast for one in kept), default=None),
        "crops": {name: len(crops) for name, crops in sets.items()},
        "kid": {},
        "nearest_ratio": None,
        "nearest_alarm": COPY_RATIO,
        "copies": None,
        "diversity": {name: _number(spread(of[name])) for name in ("made", "train", "held") if name in of},
    }
    if "held" in of:
        for name, first in (("made", "made"), ("real, the floor", "train"), ("clean, the ceiling", "clean")):
            if first in of:
                mean, deviation = kid(of[first], of["held"])
                told["kid"][name] = {"mean": _number(mean), "spread": _number(deviation)}
    if {"made", "train", "held"} <= of.keys():
        told["nearest_ratio"] = _number(nearest_ratio(of["made"], of["train"], of["held"]))
    if residuals["made"] and residuals["train"]:
        correlation = largest_correlation(residuals["made"], residuals["train"])
        told["copies"] = {
            "median_correlation": float(np.median(correlation)),
            "share": float((correlation >= COPY_CORRELATION).mean()),
        }
    return told


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def write_kept(folder: Path, check: Check, out: Path) -> int:
    """Write the new folder `out` with the samples that were kept, provenance and card; how many they are."""
    dropped = {Path(one.image).name for one in check.samples if one.dropped}
    data = open_labels(folder)
    kept = [s for s in data.samples if isinstance(s, ImageFile) and s.image.name not in dropped]
    if not kept:
        raise UserError(f"{folder}: the check drops all {len(check.samples)} samples: nothing to write")
    images = (
        LabelledImage(
            PurePosixPath(s.image.name), s.image.read_bytes(), s.read()[1], s.split, s.group, s.source
        )
        for s in kept
    )
    scores = {Path(one.image).name: one.scores() for one in check.samples}
    lines = [
        {**line, "check": scores[Path(line["image"]).name]}
        for line in open_provenance(folder)
        if Path(line["image"]).name not in dropped
    ]
    card = checked_card(folder, lines, check.figures["dropped"])

    def beside(staging: Path) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (staging / PROVENANCE).write_text(text, encoding="utf-8")
        (staging / DATASET).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        write_card(staging, folder_card(staging, card, data.classes))

    write_labels(out, Incoming(data.classes, len(kept), iter(images)), beside=beside)
    return len(kept)
