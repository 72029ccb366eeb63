"""How a model does on labelled data: the figures of metrics.md, and those that go on its card."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.engines import Engine
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import LabelledData
from rollsight.inspect.metrics import Tally
from rollsight.inspect.models import Model
from rollsight.inspect.scan import decide
from rollsight.inspect.tiles import up_to_cell

FOREIGN = 254  # label of model classes that the data does not know


def evaluate(
    model: Model, engine: Engine, data: LabelledData, *, on_image: Callable[[int, int], None] | None = None
) -> Tally:
    """Count the model's results on every image of `data`.

    Images are padded right and bottom by reflection to whole cells; only their own pixels count. Pixel
    figures use the plain argmax, instance figures the model's thresholds. Raises UserError where the
    model knows none of the data's classes.
    """
    shared = set(model.card.classes) & set(data.classes)
    if not shared:
        raise UserError(
            f"{data.root} labels {', '.join(data.classes)}; model {model.card.name} knows "
            f"{', '.join(model.card.classes)}: they share no class"
        )
    to_data = np.full(256, FOREIGN, dtype=np.uint8)
    to_data[0] = 0
    for index, name in enumerate(model.card.classes, start=1):
        if name in shared:
            to_data[index] = data.classes.index(name) + 1
    tally = Tally(data.classes)
    for number, sample in enumerate(data.samples, start=1):
        image, truth = sample.read()
        logits = padded_logits(engine, image)
        thresholded, _ = decide(logits, model.thresholds)
        argmax = logits.argmax(axis=0).astype(np.uint8)
        tally.add(truth, to_data[argmax], to_data[thresholded], sample.group)
        if on_image is not None:
            on_image(number, len(data.samples))
    return tally


def padded_logits(engine: Engine, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (K + 1, H, W) of an image (M, H, W) of any size, padded to whole cells by reflection."""
    _, height, width = image.shape
    pad = ((0, 0), (0, up_to_cell(height) - height), (0, up_to_cell(width) - width))
    return engine(np.pad(image, pad, mode="reflect"))[:, :height, :width]


def report(model: Model, data: LabelledData, tally: Tally) -> dict[str, Any]:
    """The figures as plain numbers, with the model's thresholds and 95 % intervals over groups."""
    seen = {group for source in model.card.trained_on for group in source.get("group_names", ())}
    return {
        **tally.report(),
        "thresholds": dict(model.card.thresholds),
        "intervals": tally.intervals(),
        "unknown_classes": [name for name in data.classes if name not in model.card.classes],
        "groups_trained_on": sorted(seen & set(data.groups())),
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
