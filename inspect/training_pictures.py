"""What a training looks like: its curves, and the val images that its model does worst on."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from rollsight.inspect.engines import Engine
from rollsight.inspect.evaluate import decided, look
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData, Sample
from rollsight.inspect.models import Model

WORST = 12  # images on a sheet
COLUMNS = 4
TRUTH, FOUND = "#00bfff", "#ff8c00"  # sky blue and orange: apart for every eye, and on gray
MIOU = "val_miou"  # the curve's column that is no loss


@dataclass(frozen=True, slots=True)
class Judged:
    """One image, its truth and what the model made of it."""

    name: str
    gray: NDArray[np.float32]  # (H, W) in [0, 1], the mean of the lighting modes
    truth: NDArray[np.uint8]  # (H, W) in labels of the data
    found: NDArray[np.uint8]  # (H, W) the plain argmax
    iou: float  # `defect_iou`


def worst_images(model: Model, engine: Engine, data: LabelledData, most: int = WORST) -> list[Judged]:
    """The images of `data` with the lowest IoU of their defects, the lowest first.

    UserError where the model knows none of the data's classes.
    """
    worst: list[Judged] = []
    for seen in look(model, engine, data):
        found, _ = decided(seen.logits, model, data.classes)
        found = np.where(found <= len(data.classes), found, 0).astype(np.uint8)  # no truth tells of others
        iou = defect_iou(seen.truth, found)
        worst.append(Judged(_name(seen.sample), seen.image.mean(axis=0), seen.truth, found, iou))
        worst = sorted(worst, key=lambda judged: judged.iou)[:most]
    return worst


def defect_iou(truth: NDArray[np.uint8], found: NDArray[np.uint8]) -> float:
    """Share of the px with a defect in truth or found whose class is right; 1 where neither has any."""
    defect = (truth != IGNORE) & ((truth > 0) | (found > 0))
    return float((truth == found)[defect].mean()) if defect.any() else 1.0


def draw_worst(judged: Sequence[Judged], classes: Sequence[str], path: Path) -> None:
    """A sheet of images with the outlines of truth and prediction, each with its IoU and classes: a PNG."""
    lines = -(-len(judged) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3.3 * lines + 0.5), layout="constrained")
    panels: list[Axes] = figure.subplots(lines, COLUMNS, squeeze=False).ravel().tolist()
    for axes, one in zip(panels, judged, strict=False):
        axes.imshow(one.gray, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for mask, colour in ((one.truth, TRUTH), (one.found, FOUND)):
            _outline(axes, (mask > 0) & (mask != IGNORE), colour)
        told = f"{_classes_in(one.truth, classes)} → {_classes_in(one.found, classes)}"
        axes.set_title(f"{one.name}\nIoU {one.iou:.2f}: {told}", fontsize=8)
    for axes in panels:
        axes.set_axis_off()
    marks = [Line2D([], [], color=TRUTH, label="truth"), Line2D([], [], color=FOUND, label="prediction")]
    figure.legend(handles=marks, loc="outside upper center", ncols=2, frameon=False)
    _save(figure, path)


def draw_curves(curve: Path, path: Path) -> None:
    """The columns of a training's curve against its steps, mIoU on val apart where it was taken: a PNG."""
    with curve.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    steps = columns.pop("step")
    miou = columns.pop(MIOU, None)
    figure = Figure(figsize=(6 if miou is None else 11, 4), layout="constrained")
    axes = figure.subplots(1, 1 if miou is None else 2, squeeze=False)[0]
    for name, values in columns.items():
        axes[0].plot(steps, values, label=name, linewidth=2 if name == "loss" else 1, marker=".")
    axes[0].set(xlabel="step", ylabel="mean since the row before", title="Loss and its terms")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    if miou is not None:
        taken = ~np.isnan(miou)
        axes[1].plot(steps[taken], miou[taken], marker=".", color="black")
        axes[1].set(
            xlabel="step", ylabel="mIoU", title="mIoU on val, averaged net, plain argmax", ylim=(0, 1)
        )
    for one in axes:
        one.grid(alpha=0.3)
    _save(figure, path)


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """The edges of a mask's pixels, closed at the image's border; a single px has one too."""
    if mask.any():
        larger = np.pad(mask.astype(np.float32), 1).repeat(4, axis=0).repeat(4, axis=1)
        at = (np.arange(len(larger)) + 0.5) / 4 - 1.5, (np.arange(larger.shape[1]) + 0.5) / 4 - 1.5
        axes.contour(at[1], at[0], larger, levels=[0.5], colors=[colour], linewidths=1)


def _classes_in(mask: NDArray[np.uint8], classes: Sequence[str]) -> str:
    return ", ".join(_in_order(mask, classes)) or "clean"


def _in_order(mask: NDArray[np.uint8], classes: Sequence[str]) -> Iterable[str]:
    return (name for value, name in enumerate(classes, start=1) if (mask == value).any())


def _name(sample: Sample) -> str:
    if isinstance(sample, ImageFile):
        return sample.image.stem
    return f"{sample.group} y {sample.y} x {sample.x}"


def _save(figure: Figure, path: Path) -> None:
    """Write the PNG whole or not at all."""
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)
