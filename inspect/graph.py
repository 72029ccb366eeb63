"""A model's ONNX graph as an engine runs it."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from rollsight.inspect.errors import UserError


def for_one_mode(path: Path) -> bytes:
    """The graph of that file without the mean over lighting modes, for windows of one mode: the same bits.

    A mean of one is what it was, but ONNX Runtime computes it, and lays out its features anew before and
    after: `fast` took 75 ms of CPU for a window of 1024 x 1280 px, 61 without, unet_lite 472 and 414;
    OpenVINO 77 and 70 (measured 2026-11-26). A graph without such a mean comes back as it is. Raises
    UserError for a file that is no graph.
    """
    try:
        graph = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise UserError(f"{path}: not an ONNX graph: fetch or train the model again") from None
    axes = {
        one.name: numpy_helper.to_array(one).tolist() for one in graph.graph.initializer if one.dims == [1]
    }
    for node in graph.graph.node:
        if node.op_type == "ReduceMean" and axes.get("".join(node.input[1:])) == [0]:  # modes come first
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
            break
    content: bytes = graph.SerializeToString()
    return content
