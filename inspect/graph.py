"""A model's ONNX graph as an engine runs it."""

from pathlib import Path

import onnx
from onnx import numpy_helper


def for_one_mode(path: Path) -> bytes:
    """The graph of that file without the mean over lighting modes, for windows of one mode: the same bits.

    A mean of one is what it was, but ONNX Runtime computes it, and lays out its features anew before and
    after: `fast` took 75 ms of CPU for a window of 1024 x 1280 px, 61 without, unet_lite 472 and 414;
    OpenVINO 77 and 70 (measured 2026-11-26). A graph without such a mean comes back as it is.
    """
    graph = onnx.load(str(path), load_external_data=False)
    axes = {
        one.name: numpy_helper.to_array(one).tolist() for one in graph.graph.initializer if one.dims == [1]
    }
    for node in graph.graph.node:
        if node.op_type == "ReduceMean" and axes.get(node.input[1]) == [0]:  # modes are the first axis
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
            break
    content: bytes = graph.SerializeToString()
    return content
