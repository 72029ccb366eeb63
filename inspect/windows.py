"""Windows cut from labelled data: what a net is calibrated on, and what an engine is held against."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import IGNORE, LabelledData


def cut_windows(data: Sequence[LabelledData], count: int, side_px: int, seed: int = 0) -> NDArray[np.float32]:
    """Windows (N, M, side, side) in [0, 1] of up to `count` images, at least half of them around a defect.

    The images are drawn at random from all sources together; without a defect a window lies anywhere. Smaller
    images are continued by reflection, right and bottom. There are fewer windows where the data has fewer
    images, or too few with a defect: the last ones without are then left out. Raises UserError where no image
    has one, or where the sources differ in their number of lighting modes.
    """
    rng = np.random.default_rng(seed)
    samples = [sample for source in data for sample in source.samples]
    windows: list[NDArray[np.float32]] = []
    clean: list[int] = []  # of the windows, those without a defect
    for index in rng.permutation(len(samples)):
        if len(windows) == count:
            break
        image, mask = samples[index].read()
        ys, xs = np.nonzero((mask != 0) & (mask != IGNORE))
        if len(ys):
            pick = rng.integers(len(ys))
            at = ys[pick], xs[pick]
        elif len(clean) < count // 2:
            at = tuple(rng.integers(size) for size in mask.shape)
            clean.append(len(windows))
        else:
            continue
        windows.append(_window(image, at, side_px))
    defects = len(windows) - len(clean)
    if not defects:
        raise UserError(
            f"{data[0].root}: none of its {len(samples)} images has a defect: give some that have"
        )
    if len({window.shape for window in windows}) > 1:
        raise UserError("the sources differ in their number of lighting modes: give one number of modes")
    left_out = clean[defects:]
    return np.stack([window for i, window in enumerate(windows) if i not in left_out])


def _window(image: NDArray[np.float32], at: tuple[int, int], side_px: int) -> NDArray[np.float32]:
    """The square (M, side, side) of an image (M, H, W) around the place `at`, as far as the edge allows."""
    pad = [(0, max(0, side_px - size)) for size in image.shape[1:]]
    padded = np.pad(image, [(0, 0), *pad], mode="reflect")
    start = [
        min(max(0, i - side_px // 2), size - side_px) for i, size in zip(at, padded.shape[1:], strict=True)
    ]
    return padded[:, start[0] : start[0] + side_px, start[1] : start[1] + side_px]
