"""How a net that is being trained does on val: pooled mIoU of the plain argmax, and its worst images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, LabelledData
from rollsight.inspect.tiles import cell_margins
from rollsight.inspect.training_data import to_model_classes
from torch import nn


@dataclass(frozen=True, slots=True)
class Held:
    """The val split of one source in memory."""

    images: list[NDArray[np.float16]]  # (M, H, W), padded to whole cells by reflection, in the middle
    truths: list[NDArray[np.uint8]]  # (h, w) in model classes
    labelled: NDArray[np.uint8]  # class of the model -> itself, or 0 where the source does not label it


def read_held(data: Sequence[LabelledData], classes: Sequence[str]) -> list[Held]:
    """Read val splits; UserError for a mask value beyond the classes, and where none holds a defect.

    Without any there is no mIoU.
    """
    held = []
    for source in data:
        images, truths = [], []
        for sample in source.samples:
            image, mask = source.read(sample)
            pad = [cell_margins(size) for size in mask.shape]
            images.append(np.pad(image.astype(np.float16), [(0, 0), *pad], mode="reflect"))
            truths.append(to_model_classes(source, classes)[mask])
        known = [i if i == 0 or name in source.classes else 0 for i, name in enumerate(["", *classes])]
        held.append(Held(images, truths, np.array(known, dtype=np.uint8)))
    if not any(((truth > 0) & (truth != IGNORE)).any() for source in held for truth in source.truths):
        raise UserError("patience: the val split holds no defect to judge by: set it to 0", USAGE)
    return held


def mean_iou(net: nn.Module, held: Sequence[Held], mixed: Callable[[], AbstractContextManager[Any]]) -> float:
    """IoU of a class pooled over a source's images; the mean of those that occur, then of sources."""
    device = next(net.parameters()).device
    means = []
    net.eval()
    for source in held:
        classes = len(source.labelled)
        counts = np.zeros((classes, classes), dtype=np.int64)
        for image, truth in zip(source.images, source.truths, strict=True):
            x = torch.from_numpy(image).float()[None].to(device, memory_format=torch.channels_last)
            (top, _), (left, _) = (cell_margins(size) for size in truth.shape)
            rows, columns = slice(top, top + truth.shape[0]), slice(left, left + truth.shape[1])
            with torch.inference_mode(), mixed():
                found = net(x)[0].argmax(dim=0).cpu().numpy()[rows, columns]
            counted = truth != IGNORE
            pairs = truth[counted] * np.int64(classes) + source.labelled[found[counted]]
            counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        occurs = np.flatnonzero(counts[1:].sum(axis=1)) + 1
        union = counts.sum(axis=0) + counts.sum(axis=1) - counts.diagonal()
        if occurs.size:
            means.append((counts.diagonal()[occurs] / union[occurs]).mean())
    return float(np.mean(means))
