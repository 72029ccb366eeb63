"""Why a net sees a defect: Grad-CAM over the defect's crop."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rollsight.inspect.defect_mask import defect_mask
from rollsight.inspect.tiles import CELL, up_to_cell
from torch import Tensor, nn

MARGIN_PX = (24, 64)  # of strip shown around a defect: as much as it is long or wide, within these
FINEST = 4  # stride: at finer ones the evidence is the outline of the mask itself
MAX_VIEW_PX = 384  # of a longer defect its middle is shown; with margins and halo a window has some 1100 px

ReadGray = Callable[[int, int], NDArray[np.float32]]  # lines [y0, y1) -> (M, y1 - y0, W) in [0, 1]
ReadMask = Callable[[int, int], NDArray[np.uint8]]  # lines [y0, y1) -> (y1 - y0, W), i + 1 is class i


@dataclass(frozen=True, slots=True)
class Explanation:
    """A crop, the defect in it, and where the net saw it."""

    title: str
    y0: int  # first line and first pixel of the crop, on the roll or image
    x0: int
    gray: NDArray[np.float32]  # (h, w) in [0, 1], the mean of the lighting modes
    mask: NDArray[np.bool_]  # (h, w) the defect
    heat: NDArray[np.float32]  # (h, w) evidence for its class, a share of the largest; all 0 without any


def explain_defect(
    net: nn.Module,
    halo_px: int,
    size: tuple[int, int],
    read_gray: ReadGray,
    read_mask: ReadMask,
    box: tuple[int, int, int, int],
    kind: int,
    title: str,
) -> Explanation:
    """Grad-CAM of one defect: class `kind` (1..K) with box (x0, y0, x1, y1) on a roll of `size` (lines, px).

    The crop is computed on the grid of cells and with its halo, so the net sees what it saw in the scan.
    Of a defect longer or wider than MAX_VIEW_PX the middle is shown. Raises ValueError where the mask has no
    pixel of that class in the box.
    """
    lines, width = size
    along = box[1], box[3], (box[1] + box[3]) // 2, lines
    y0, y1 = _view(*along)
    found = read_mask(max(y0, box[1]), min(y1, box[3]))[:, box[0] : box[2]] == kind
    columns = np.flatnonzero(found.any(axis=0))
    if not columns.size:
        raise ValueError(f"no pixel of class {kind} in the box {box}")
    columns += box[0]
    across = int(columns[0]), int(columns[-1]) + 1, int(columns[columns.size // 2]), width
    x0, x1 = _view(*across, least=(y1 - y0) // 2)
    y0, y1 = _view(*along, least=(x1 - x0) // 2)
    top, bottom = max(0, y0 // CELL * CELL - halo_px), min(up_to_cell(lines), up_to_cell(y1) + halo_px)
    left, right = max(0, x0 // CELL * CELL - halo_px), min(up_to_cell(width), up_to_cell(x1) + halo_px)
    # Beyond the roll the canvas repeats its last line and its last column, as in a scan.
    gray = read_gray(top, min(bottom, lines))[:, :, left : min(right, width)]
    pad = (0, bottom - top - gray.shape[1]), (0, right - left - gray.shape[2])
    window = np.pad(gray, ((0, 0), *pad), mode="edge")
    mask = np.zeros((bottom - top, right - left), dtype=np.bool_)
    view = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    of_class = read_mask(y0, y1)[:, x0:x1] == kind
    mask[view] = defect_mask(of_class, (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0))
    heat = grad_cam(net, window, mask, kind)[view]
    largest = float(heat.max())
    return Explanation(
        title,
        y0,
        x0,
        window[:, *view].mean(axis=0),
        mask[view],
        heat / largest if largest > 0 else heat,
    )


def grad_cam(
    net: nn.Module, image: NDArray[np.float32], mask: NDArray[np.bool_], kind: int
) -> NDArray[np.float32]:
    """Where the evidence for a class in a mask lies: image (M, H, W), mask (H, W) -> (H, W), 0 or more.

    Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) of the class's logits summed over the mask, as
    Vinogradova et al. 2020 (arXiv:2002.11434) do for segmentation; but each place of a layer is weighted by
    its own gradient, not by the channel's mean (HiResCAM: Draelos & Carin 2020, arXiv:2011.08891). With the
    mean, a pit of 5 px was explained by places all over the crop, and a patch by the other patch beside it
    (seen, 2026-11-22). Negative evidence is cut. In torch: ONNX graphs have no gradients.
    """
    from captum.attr import LayerAttribution, LayerGradientXActivation

    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None]
    inside = torch.from_numpy(mask)

    def evidence(planes: Tensor) -> Tensor:
        logits: Tensor = net(planes)
        return (logits[:, kind] * inside).sum(dim=(1, 2))

    layer = layer_for(net, x, float(mask.sum()) ** 0.5)
    cam = LayerGradientXActivation(evidence, layer).attribute(x).sum(dim=1, keepdim=True).relu()
    heat = LayerAttribution.interpolate(cam, x.shape[2:], "bilinear")
    return heat[0, 0].detach().numpy()  # type: ignore[no-any-return]


def layer_for(net: nn.Module, x: Tensor, size_px: float) -> nn.Module:
    """The last module that runs at the coarsest stride which still resolves a defect of that size.

    Strides are from 4 up to under a cell; what is pooled over cells is coarser, and has one value for a
    whole cell.
    """
    found: list[tuple[int, nn.Module]] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            found.append((x.shape[2] // output.shape[2], module))

    hooks = [module.register_forward_hook(note) for module in net.modules() if module is not net]
    try:
        with torch.inference_mode():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    stride = max(stride for stride, _ in found if stride <= max(FINEST, size_px) and stride < CELL)
    return [module for of, module in found if of == stride][-1]


def picture(explanations: Sequence[Explanation], aspect: float = 1.0) -> bytes:
    """A PNG with a row for each defect: its crop with its outline, and the evidence laid over it.

    aspect is the height of a pixel over its width (mm per line over mm per px across).
    """
    from matplotlib.figure import Figure

    shapes = [told.gray.shape for told in explanations]
    inches = [min(max(4.0 * aspect * height / width, 1.5), 6.0) + 0.7 for height, width in shapes]
    figure = Figure(figsize=(10, sum(inches)), dpi=110, layout="constrained")
    axes = figure.subplots(len(inches), 2, squeeze=False, height_ratios=inches)
    for (crop, overlay), told in zip(axes, explanations, strict=True):
        height, width = told.gray.shape
        extent = (told.x0, told.x0 + width, told.y0 + height, told.y0)
        low, high = np.percentile(told.gray, (0.5, 99.5))
        shown: dict[str, Any] = {"extent": extent, "aspect": aspect}
        gray: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 0.05), **shown}
        crop.imshow(told.gray, **gray)
        crop.set_title(told.title, fontsize=10, loc="left")
        overlay.imshow(told.gray, **gray)
        heat = overlay.imshow(told.heat, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * told.heat, **shown)
        evidence = "where the net saw it" if told.heat.any() else "no evidence for it"
        overlay.set_title(f"{evidence} (Grad-CAM)", fontsize=10, loc="left")
        figure.colorbar(heat, ax=overlay, label="share of the largest")
        for panel in (crop, overlay):
            panel.contour(
                np.arange(width) + told.x0 + 0.5,
                np.arange(height) + told.y0 + 0.5,
                told.mask,
                levels=[0.5],
                colors="cyan",
                linewidths=0.8,
            )
            panel.set_xlabel("px across")
            panel.set_ylabel("line")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _view(start: int, stop: int, middle: int, size: int, least: int = 0) -> tuple[int, int]:
    """What is shown of a defect from start to stop along one axis of `size` px, at least `least` of it."""
    if stop - start > MAX_VIEW_PX:
        start, stop = middle - MAX_VIEW_PX // 2, middle + MAX_VIEW_PX // 2
    margin = max(int(np.clip(stop - start, *MARGIN_PX)), (least - stop + start) // 2)
    return max(0, start - margin), min(size, stop + margin)
