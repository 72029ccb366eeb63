"""Golden windows: real windows in the model file with what its maker computed, for all who open it.

An exporter, a library or a processor that computes something else is found before the scan, not by its
defects. Three windows of 64 px cost an opening 25 ms on ONNX Runtime, 140 ms on OpenVINO, which compiles for
their shape (default model, one thread of a busy machine, 2026-11).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import LabelledData, is_rolls
from rollsight.inspect.tensor_errors import tensor_errors
from rollsight.inspect.tiles import CELL
from rollsight.inspect.windows import cut_windows
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

GOLDEN = "golden.safetensors"
GOLDEN_WINDOWS = 3
GOLDEN_PX = CELL  # side of one
PARITY = 1e-3  # largest difference of a probability between engines in fp32 (metrics.md, parity gates)
# Mean difference of a probability where sums are rounded, INT8 and fp16. Two engines round otherwise: single
# pixels at the rim of a defect differ by up to 0.5, the mean by 0.002; INT8 itself differs from fp32 by 0.008
# in the mean (default model, ONNX Runtime against OpenVINO, 2026-11). fp16 on a GPU was never measured.
ROUNDED = 0.01

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # as engines.Engine


def golden_windows(data: Sequence[LabelledData], seed: int = 0) -> NDArray[np.float32]:
    """The golden windows (N, M, H, W) of a model that learns from `data`.

    Of rolls where there are some: images of others may not be passed on with a model.
    """
    shown = [source for source in data if is_rolls(source)] or data
    return cut_windows(shown, GOLDEN_WINDOWS, GOLDEN_PX, seed)


def write_golden(folder: Path, windows: NDArray[np.float32], run: Run) -> None:
    """Keep the windows (N, M, H, W) in a model's folder with the logits (N, K + 1, H, W) that `run` gives."""
    # Stacked planes of a channels-last net keep its order, and save_file takes any order for C.
    logits = np.ascontiguousarray(np.stack([run(window) for window in windows]))
    with tensor_errors(folder / GOLDEN):
        save_file({"windows": np.ascontiguousarray(windows), "logits": logits}, folder / GOLDEN)


def check_golden(folder: Path, run: Run, *, rounded: bool, who: str) -> None:
    """Hold an engine against the golden windows of a model's folder.

    `rounded` says that it, or the model, computes in INT8 or fp16: then the mean difference of a probability
    counts, else the largest. Raises UserError, which names the engine as `who`, where it is too large.
    """
    try:
        tensors = load_file(folder / GOLDEN)
        windows, logits = tensors["windows"], tensors["logits"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{folder / GOLDEN}: not golden windows ({error}): fetch the model again") from None
    found = np.stack([run(window) for window in windows])
    if found.shape != logits.shape:
        raise UserError(
            f"{folder}: {who} gives logits {found.shape[1:]}, its maker got {logits.shape[1:]}: "
            "fetch the model again"
        )
    differences = np.abs(_probabilities(found) - _probabilities(logits))
    difference, limit = (differences.mean(), ROUNDED) if rounded else (differences.max(), PARITY)
    if not difference < limit:
        raise UserError(
            f"{folder}: {who} computes other probabilities than the model's maker got: they differ by "
            f"{difference:.2g} {'in the mean' if rounded else 'at most'}, allowed is {limit:g}; take another "
            "engine, or make the model again on this kind of machine"
        )


def _probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K + 1, H, W)."""
    p: NDArray[np.float32] = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p
