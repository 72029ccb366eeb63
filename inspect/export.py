"""The ONNX graph of a net: what the scan runs, held against the net before anyone trusts it."""

import io
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from rollsight.inspect.golden import PARITY
from rollsight.inspect.nets.reach import halo_px
from rollsight.inspect.tiles import CELL
from torch import nn

HALO = "halo_px"  # metadata of the graph: what its net needs, so that the card cannot say less


def export_onnx(net: nn.Module, path: Path) -> None:
    """Write the net as ONNX with free mode count, lines and px, and hold it against the net.

    Input `planes` (M, 1, H, W) float32 in [0, 1], output `logits` (1, K + 1, H, W); the normalisation is in
    the graph, and a net that can be fused is. Exported at one shape and then freed: the graph holds scale
    factors only, no sizes, and an export with symbolic sizes takes minutes. Raises RuntimeError where a
    probability differs by 1e-3 or more.
    """

    class Planes(torch.nn.Module):
        """The net on (M, 1, H, W): without the mode axis's reshapes, which would fix M."""

        def __init__(self) -> None:
            super().__init__()
            self.net: Any = net.fused() if hasattr(net, "fused") else net  # type: ignore[operator]

        def forward(self, planes: torch.Tensor) -> torch.Tensor:
            features = self.net.stem_of(planes).mean(dim=0, keepdim=True)
            return self.net.from_stem(features)  # type: ignore[no-any-return]

    example = (torch.rand(1, 1, 4 * CELL, 5 * CELL),)
    # The exporter reports its progress on stdout, and warns of torchvision and of its own innards.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            Planes().eval(),
            example,
            dynamo=True,
            input_names=["planes"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    source, result = graph.graph.input[0].type.tensor_type.shape, graph.graph.output[0].type.tensor_type.shape
    for shape, axes in ((source, {0: "modes", 2: "lines", 3: "px"}), (result, {2: "lines", 3: "px"})):
        for axis, symbol in axes.items():
            shape.dim[axis].dim_param = symbol
    del graph.graph.value_info[:]
    graph.doc_string = ""
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]  # they hold the source paths of the machine that exported
    onnx.helper.set_model_props(graph, {HALO: str(halo_px(net))})
    onnx.save(graph, str(path))

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for modes, lines, px in ((1, 3 * CELL, 4 * CELL), (3, 5 * CELL, 2 * CELL)):
        planes = torch.rand(modes, 1, lines, px, generator=generator)
        with torch.inference_mode():
            expected = net(planes.transpose(0, 1)).softmax(dim=1)
        found = torch.from_numpy(session.run(None, {"planes": planes.numpy()})[0]).softmax(dim=1)
        difference = float((expected - found).abs().max())
        if difference >= PARITY:
            raise RuntimeError(
                f"the ONNX graph differs from the net by {difference:.1e} at {modes} modes: over {PARITY:g}"
            )
