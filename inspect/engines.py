"""The same model on ONNX Runtime (the default on a CPU) and on torch (the oracle and the fallback)."""

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.models import Model

if TYPE_CHECKING:
    from torch import nn

PARITY = 1e-3  # largest difference of a probability between engines (metrics.md, parity gates)

# Gray windows (M, H, W) float32 in [0, 1], H and W multiples of the cell -> logits (K + 1, H, W) float32.
Engine = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def onnx_engine(model: Model, threads: int = 1) -> Engine:
    """The model's graph on ONNX Runtime, on CPU.

    One thread per call by default: parallelism is windows side by side, and the result must not depend
    on how many run. The arena stays on: without it a window takes 23 % longer and 22 % less memory
    (measured).
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(model.graph), options, providers=["CPUExecutionProvider"])

    def run(window: NDArray[np.float32]) -> NDArray[np.float32]:
        return session.run(None, {"planes": window[:, None]})[0][0]  # type: ignore[no-any-return]

    return run


def torch_engine(model: Model, threads: int = 1) -> Engine:
    """The net itself in fp32 on CPU, channels-last."""
    import torch

    torch.set_num_threads(threads)
    net = model.net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(window: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(window))[None]
            return net(x.to(memory_format=torch.channels_last))[0].contiguous().numpy()  # type: ignore[no-any-return]

    return run


ENGINES = {"onnx": onnx_engine, "torch": torch_engine}


def open_engine(model: Model, name: str = "auto", threads: int = 1) -> tuple[str, Engine]:
    """The engine by name and what it is; `auto` takes ONNX Runtime, and torch where that is missing."""
    if name == "auto":
        try:
            return "onnx", onnx_engine(model, threads)
        except ImportError:
            return "torch", torch_engine(model, threads)
    if name not in ENGINES:
        raise UserError(f"no engine {name!r}: there are auto, {', '.join(ENGINES)}", CONFIG)
    return name, ENGINES[name](model, threads)


def engine_version(name: str) -> str:
    """The library and its version, for the plan: another version may round otherwise."""
    from importlib.metadata import version

    package = {"onnx": "onnxruntime", "torch": "torch"}[name]
    return f"{package} {version(package)}"


def export_onnx(net: "nn.Module", path: Path) -> None:
    """Write the net as ONNX with free mode count, lines and px, and hold it against the net.

    Input `planes` (M, 1, H, W) float32 in [0, 1], output `logits` (1, K + 1, H, W). Exported at one shape
    and then freed: the graph holds scale factors only, no sizes, and an export with symbolic sizes takes
    minutes. Raises RuntimeError where a probability differs by 1e-3 or more.
    """
    import onnx
    import onnxruntime as ort
    import torch
    from rollsight.inspect.tiles import CELL

    class Planes(torch.nn.Module):
        """The net on (M, 1, H, W): without the mode axis's reshapes, which would fix M."""

        def __init__(self) -> None:
            super().__init__()
            self.net: Any = net

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
