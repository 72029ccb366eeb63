"""The same model on ONNX Runtime (the default on a CPU) and on torch (the oracle and the fallback)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.models import Model

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
    needed = session.get_modelmeta().custom_metadata_map.get("halo_px")  # export.py puts it there
    if needed != str(model.card.halo_px):
        raise UserError(
            f"{model.folder}: halo_px is {model.card.halo_px} on the card, but its graph needs {needed}: "
            "tiles would not fit together; export the model again"
        )

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
