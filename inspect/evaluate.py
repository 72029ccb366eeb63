"""How a model does on labelled data: the figures of metrics.md, and those that go on its card."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.engines import Engine
from rollsight.inspect.errors import UserError
from rollsight.inspect.froc import Sweep
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData, Sample
from rollsight.inspect.metrics import Components, Tally, components, match_hit
from rollsight.inspect.models import Model
from rollsight.inspect.pro import LIMIT, Overlap
from rollsight.inspect.reliability import Reliability, near
from rollsight.inspect.roll_tiles import judged_truth
from rollsight.inspect.rolls import Roll
from rollsight.inspect.scan import CORE_LINES, decide
from rollsight.inspect.tiles import CELL, Grid, cell_margins, up_to_cell

FOREIGN = 254  # label of model classes that the data does not know
UNKNOWN = -1e9  # logit of data classes that the model does not know
WORST = 12  # missed defects, and false alarms, that are kept with their picture
CROP_PX = 64  # their smallest side
CONTEXT = 1.6  # of the component's size is shown


def evaluate(
    model: Model, engine: Engine, data: LabelledData, *, on_image: Callable[[int, int], None] | None = None
) -> Tally:
    """Count the model's results on every image of `data`.

    Images are padded all around by reflection to whole cells; only their own pixels count. Tiles of a
    roll are seen with the halo that a scan gives them, and judged by whole marks
    (`roll_tiles.judged_truth`). Pixel figures use the plain argmax, instance figures the model's thresholds.
    Raises UserError where the model knows none of the data's classes.
    """
    tally = Tally(data.classes)
    for seen in look(model, engine, data, on_image):
        argmax, thresholded = decided(seen.logits, model, data.classes)
        tally.add(seen.truth, argmax, thresholded, seen.sample.group)
    return tally


@dataclass(frozen=True, slots=True)
class Seen:
    """One image, or what is judged of a tile of a roll, and what the net says of it."""

    sample: Sample
    y: int  # of its first line in the image file or the roll
    x: int  # of its first px across
    image: NDArray[np.float32]  # (M, H, W) in [0, 1]
    truth: NDArray[np.uint8]  # (H, W)
    logits: NDArray[np.float32]  # (K + 1, H, W) of the model's classes, background first


def look(
    model: Model, engine: Engine, data: LabelledData, on_image: Callable[[int, int], None] | None = None
) -> Iterator[Seen]:
    """The net's word on each image of `data`.

    UserError where the model knows none of its classes, and for a mask with a value beyond them.
    """
    if not set(model.card.classes) & set(data.classes):
        raise UserError(
            f"{data.root} labels {', '.join(data.classes)}; model {model.card.name} knows "
            f"{', '.join(model.card.classes)}: they share no class"
        )
    for number, sample in enumerate(data.samples, start=1):
        if isinstance(sample, ImageFile):
            image, truth = data.read(sample)
            yield Seen(sample, 0, 0, image, truth, padded_logits(engine, image))
        else:
            truth, (lines, across) = judged_truth(sample)
            data.check(sample, truth)
            image, logits = scanned(engine, sample.roll, lines, across, model.card.halo_px)
            yield Seen(sample, lines.start, across.start, image, truth, logits)
        if on_image is not None:
            on_image(number, len(data.samples))


def decided(
    logits: NDArray[np.float32],
    model: Model,
    classes: Sequence[str],
    thresholds: tuple[float, ...] | None = None,
    temperature: float | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The plain argmax and the thresholded map (H, W), in labels of the data's `classes`.

    thresholds, in the order of the model's classes, and temperature: those of its card unless given.
    """
    to_data = np.full(256, FOREIGN, dtype=np.uint8)
    to_data[0] = 0
    for index, name in enumerate(model.card.classes, start=1):
        if name in classes:
            to_data[index] = list(classes).index(name) + 1
    thresholded, _ = decide(logits, thresholds or model.thresholds, temperature or model.card.temperature)
    return to_data[logits.argmax(axis=0)], to_data[thresholded]


def data_logits(
    logits: NDArray[np.float32],
    model_classes: Sequence[str],
    data_classes: Sequence[str],
    temperature: float,
) -> NDArray[np.float32]:
    """Calibrated logits of what the data tells apart: (K + 1, ...) of the model -> (D + 1, ...).

    Classes that the data does not label may hide in its background, so they are counted as background: its
    logit becomes the log of the sum of the exponents (`losses.merge_unlabelled`). Background comes first.
    """
    z = logits / np.float32(temperature)
    out = np.full((len(data_classes) + 1, *z.shape[1:]), UNKNOWN, dtype=np.float32)
    foreign = [i for i, name in enumerate(model_classes, start=1) if name not in data_classes]
    out[0] = np.logaddexp.reduce(z[[0, *foreign]], axis=0)
    for i, name in enumerate(data_classes, start=1):
        if name in model_classes:
            out[i] = z[list(model_classes).index(name) + 1]
    return out


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the first axis."""
    p: NDArray[np.float32] = np.exp(logits - logits.max(axis=0))
    p /= p.sum(axis=0)
    return p


@dataclass(frozen=True, slots=True)
class Finding:
    """A missed defect or a false alarm, with its surroundings."""

    defect_class: str
    taken_for: str | None  # a miss: the class found there; an alarm: the class labelled there
    where: str  # image, or roll and place
    area_px: int
    score: float  # largest probability of its class within it
    image: NDArray[np.float32]  # (h, w) in [0, 1], the first lighting mode
    own: NDArray[np.bool_]  # (h, w) the component itself
    truth: NDArray[np.bool_]  # (h, w), any class
    predicted: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Examination:
    """All that the evaluation page shows."""

    tally: Tally
    sweep: Sweep
    reliability: Reliability
    overlap: Overlap
    misses: list[Finding]  # largest first
    alarms: list[Finding]  # highest score first


def examine(
    model: Model, engine: Engine, data: LabelledData, *, on_image: Callable[[int, int], None] | None = None
) -> Examination:
    """`evaluate`, and what else the probabilities tell: every threshold, calibration, the worst faults."""
    told = Examination(
        Tally(data.classes),
        Sweep(data.classes),
        Reliability(),
        Overlap(),
        [],
        [],
    )
    for seen in look(model, engine, data, on_image):
        argmax, thresholded = decided(seen.logits, model, data.classes)
        told.tally.add(seen.truth, argmax, thresholded, seen.sample.group)
        z = data_logits(seen.logits, model.card.classes, data.classes, model.card.temperature)
        p = probabilities(z)
        told.sweep.add(seen.truth, p[1:])
        told.overlap.add(seen.truth, np.logaddexp.reduce(z[1:], axis=0) - z[0])
        judged = near(seen.truth, z.argmax(axis=0).astype(np.uint8))
        told.reliability.add(z[:, judged], seen.truth[judged])
        _keep_worst(told, seen, thresholded, p[1:], data.classes)
    return told


def _keep_worst(
    told: Examination,
    seen: Seen,
    thresholded: NDArray[np.uint8],
    p: NDArray[np.float32],
    classes: tuple[str, ...],
) -> None:
    """Add the image's missed defects and false alarms to the worst so far."""
    hidden = seen.truth == IGNORE
    predicted_map = np.where(thresholded == FOREIGN, 0, thresholded).astype(np.uint8)
    truth = components(seen.truth, len(classes))
    predicted = components(predicted_map, len(classes), 1, hidden if hidden.any() else None)
    for worst, side, other, rank in (
        (told.misses, truth, predicted, lambda finding: -finding.area_px),
        (told.alarms, predicted, truth, lambda finding: -finding.score),
    ):
        for i in np.flatnonzero(~match_hit(side, other, class_aware=True)):
            worst.append(_finding(seen, side, int(i), other, predicted.ids > 0, p, classes))
        worst.sort(key=rank)
        del worst[WORST:]


def _finding(
    seen: Seen,
    side: Components,
    i: int,
    other: Components,
    predicted: NDArray[np.bool_],
    p: NDArray[np.float32],
    classes: tuple[str, ...],
) -> Finding:
    """Component i of `side` with its surroundings."""
    own = side.ids == i + 1
    label = int(side.classes[i])
    beneath = np.bincount(other.labels[own], minlength=len(classes) + 1)
    beneath[[0, label]] = 0
    crop = []
    for edge, size in zip(side.boxes[i], own.shape, strict=True):
        extent = max(s.stop - s.start for s in side.boxes[i])
        length = min(max(CROP_PX, int(CONTEXT * extent)), size)
        start = min(max((edge.start + edge.stop - length) // 2, 0), size - length)
        crop.append(slice(start, start + length))
    rows, columns = crop
    top, left = side.boxes[i][0].start, side.boxes[i][1].start
    sample = seen.sample
    name = sample.image.name if isinstance(sample, ImageFile) else sample.group
    return Finding(
        classes[label - 1],
        classes[int(beneath.argmax()) - 1] if beneath.any() else None,
        f"{name}, line {seen.y + top}, px {seen.x + left}",
        int(side.areas[i]),
        float(p[label - 1][own].max()),
        seen.image[0, rows, columns].copy(),
        own[rows, columns].copy(),
        (seen.truth[rows, columns] > 0) & (seen.truth[rows, columns] != IGNORE),
        predicted[rows, columns].copy(),
    )


def m2_per_mpx(data: LabelledData) -> float | None:
    """What a Mpx of the data covers, in m2; None where no pixel size, or not one for all, is known."""
    strips = [None if isinstance(sample, ImageFile) else sample.roll.strip for sample in data.samples]
    sizes = {
        None
        if strip is None or strip.mm_per_px_x is None or strip.mm_per_line is None
        else strip.mm_per_px_x * strip.mm_per_line
        for strip in strips
    }
    return sizes.pop() if len(sizes) == 1 else None


def padded_logits(engine: Engine, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (K + 1, H, W) of an image (M, H, W) of any size.

    It is padded to whole cells by reflection and lies in the middle: what a net does beside the zeros
    that it pads with itself is not what it does on a strip (val of neu_clean: 0.1 to 0.8 points of mIoU in
    four trainings, against padding on the right and at the bottom; measured 2026-11-24).
    """
    _, height, width = image.shape
    down, across = cell_margins(height), cell_margins(width)
    logits = engine(np.pad(image, ((0, 0), down, across), mode="reflect"))
    return logits[:, down[0] : down[0] + height, across[0] : across[0] + width]


def scanned(
    engine: Engine, roll: Roll, lines: slice, across: slice, halo: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A part of a roll, (M, H, W) in [0, 1], and its logits (K + 1, H, W): those that a scan of the roll has.

    The window lies on the cells of the scan's canvas, with the halo as far as the canvas goes. Net and halo
    in px are of one model.
    """
    grid = Grid(roll.lines, roll.width, CORE_LINES, CELL, halo)
    top, left = (max(0, side.start // CELL * CELL - halo) for side in (lines, across))
    bottom = min(grid.canvas_lines, up_to_cell(lines.stop) + halo)
    right = min(grid.canvas_px, up_to_cell(across.stop) + halo)
    gray = roll.read_unit(top, min(bottom, roll.lines))[:, :, left:right]
    pad = (0, bottom - top - gray.shape[1]), (0, right - left - gray.shape[2])
    logits = engine(np.ascontiguousarray(np.pad(gray, ((0, 0), *pad), mode="edge")))
    part = (
        slice(None),
        slice(lines.start - top, lines.stop - top),
        slice(across.start - left, across.stop - left),
    )
    return gray[part].copy(), logits[part]


def report(model: Model, data: LabelledData, tally: Tally) -> dict[str, Any]:
    """The figures as plain numbers, with the model's thresholds and 95 % intervals over groups."""
    return {
        **tally.report(),
        "thresholds": dict(model.card.thresholds),
        "intervals": tally.intervals(),
        "unknown_classes": [name for name in data.classes if name not in model.card.classes],
        "groups_trained_on": sorted(model.card.groups() & set(data.groups())),
    }


def examined(model: Model, data: LabelledData, told: Examination) -> dict[str, Any]:
    """`report`, and the figures of an examination: false alarms per m2 where a pixel size is known."""
    figures = report(model, data, told.tally)
    scale = m2_per_mpx(data)
    rate = figures["false_alarms"]["per_mpx"]
    figures["false_alarms"]["per_m2"] = None if rate is None or scale is None else rate / scale
    return {
        **figures,
        "froc": {
            "unit": "per_mpx" if scale is None else "per_m2",
            "alarms_on": "clean images" if told.sweep.clean else "all images",
            **told.sweep.froc(scale or 1.0),
        },
        "precision_recall": told.sweep.precision_recall(),
        "aupro": {"limit": LIMIT, "value": told.overlap.area(), "n": told.overlap.regions},
        "calibration": {
            "temperature": model.card.temperature,
            "ece": told.reliability.error(),
            "bins": told.reliability.bins(),
        },
    }


def card_metric(name: str, split: str, tally: Tally) -> dict[str, Any]:
    """What the model's card says of one split: figure -> (value, low, high)."""
    figures, intervals = tally.report(), tally.intervals()
    rows: dict[str, tuple[float, float, float]] = {}

    def add(label: str, value: Any, interval: Any) -> None:
        if value is not None and interval is not None and interval["low"] is not None:
            rows[label] = (value, interval["low"], interval["high"])

    add("mIoU", figures["pixel"]["miou"], intervals["pixel"]["miou"])
    for name_of_class, value in figures["pixel"]["iou"].items():
        add(f"IoU {name_of_class}", value, intervals["pixel"]["iou"][name_of_class])
    for key, label in (
        ("recall_h", "recall (hit)"),
        ("precision_h", "precision (hit)"),
        ("f1_h", "F1 (hit)"),
    ):
        add(label, figures["instance"][key], intervals["instance"][key])
    small = intervals["instance"]["recall_by_size"]["tiny_small"]["recall"]
    add("recall tiny + small", figures["instance"]["recall_by_size"]["tiny_small"]["recall"], small)
    return {"data": name, "split": split, "n_images": figures["n_images"], "figures": rows}
