"""A model's graph in INT8: static scales, one per channel of a convolution; gates, last layer in fp32."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

CALIBRATION_WINDOWS = 300  # as many as NNCF takes
CALIBRATION_PX = 256  # side of one: whole scenes of neu_clean, a few cells
# What stays in INT8 between convolutions. Convolutions alone would lose the range that a ReLU6 cuts off: then
# 79 % of px kept their class, so 98 % (default model, neu_clean val, 2026-11).
QUANTISED = ("Conv", "Clip", "Relu", "Add", "Concat", "Resize", "MaxPool")
SQUASHING = ("Sigmoid", "HardSigmoid")  # how a gate of attention ends


def quantise(
    source: Path,
    target: Path,
    windows: NDArray[np.float32],
    on_window: Callable[[int, int], None] | None = None,
) -> int:
    """Write the ONNX graph `source` as INT8 (QDQ) to `target`; returns how many convolutions stay in fp32.

    Weights are signed and symmetric per output channel, activations unsigned with a scale and zero point per
    tensor: their smallest and largest value on `windows` (N, M, H, W). Static, so a window's surroundings do
    not change its scales and tiles fit together. Attention (every gate, which multiplies features by a
    sigmoid) and the last convolution stay in fp32. Weights keep all 8 bits: with 7, which a CPU without VNNI
    needs lest its 16-bit sums overflow, 96.5 % of px kept their class in place of 97.8 % (same data). On such
    a CPU the golden windows tell whether the graph still does what it did where it was made.
    """

    class Windows(CalibrationDataReader):  # type: ignore[misc]
        """The windows in the layout of the graph's input."""

        def __init__(self) -> None:
            self._left: Iterator[tuple[int, NDArray[np.float32]]] = enumerate(windows, start=1)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            number, window = next(self._left, (0, None))
            if window is None:
                return None
            if on_window is not None:
                on_window(number, len(windows))
            return {"planes": window[:, None]}

    floating = _in_floating_point(onnx.load(source).graph)
    prepared = target.with_suffix(".prepared")
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends other ways on the root logger
    try:
        quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Windows(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in floating],
            # Entropy and percentiles keep every activation: over 100 GB (onnxruntime issue 10503).
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        logger.setLevel(level)
        prepared.unlink(missing_ok=True)
    return sum(node.op_type == "Conv" for node in floating)


def _in_floating_point(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of all gates, and the last convolution with what follows."""
    makers = {name: node for node in graph.node for name in node.output}
    kept: dict[str, onnx.NodeProto] = {}

    def behind(name: str, stop: str) -> dict[str, onnx.NodeProto] | None:
        """All nodes between the tensor `stop` and the tensor `name`; None where a way leads past `stop`."""
        between: dict[str, onnx.NodeProto] = {}
        ahead = [name]
        while ahead:
            node = makers.get(tensor := ahead.pop())
            if tensor == stop or (node is None and tensor not in inputs):
                continue  # a weight has no maker
            if node is None:
                return None
            if node.name not in between:
                between[node.name] = node
                ahead += node.input
        return between

    inputs = {value.name for value in graph.input}
    for node in graph.node:
        if node.op_type != "Mul":
            continue
        for features, gate in (node.input, reversed(node.input)):
            between = behind(gate, features)
            if between and any(part.op_type in SQUASHING for part in between.values()):
                kept |= between | {node.name: node}
    name = graph.output[0].name
    while name in makers:
        node = makers[name]
        kept[node.name] = node
        if node.op_type == "Conv":
            break
        name = node.input[0]
    return list(kept.values())
