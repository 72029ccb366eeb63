"""The same model on ONNX Runtime (the default on a CPU), OpenVINO, and torch (the oracle, and for a GPU).

No GPU was at hand when this was written: what a CUDA device does here was never run. Which device is taken,
the batches and the refusals were tested on a CPU.
"""

import ctypes
import os
import platform
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.inspect.golden import check_golden
from rollsight.inspect.models import Model

if TYPE_CHECKING:
    from torch import nn

# Gray windows (M, H, W) float32 in [0, 1], H and W multiples of the cell -> logits (K + 1, H, W) float32.
Engine = Callable[[NDArray[np.float32]], NDArray[np.float32]]

BATCH_PX = 2**23  # per call on a GPU: two windows over the full width of 2560 px, 2 GB at 258 B/px (torch)


def onnx_engine(model: Model, threads: int = 1) -> Engine:
    """The model's graph on ONNX Runtime, on CPU.

    One thread per call by default: parallelism is windows side by side, and the result must not depend
    on how many run. The arena stays on: without it a window takes 23 % longer and 22 % less memory
    (measured).
    """
    import onnxruntime as ort
    from rollsight.inspect.graph import for_one_mode

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3

    def opened(graph: str | bytes) -> Any:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    one = opened(for_one_mode(model.graph))
    _check_halo(model, one.get_modelmeta().custom_metadata_map.get("halo_px"))
    several = _Once(lambda: opened(str(model.graph)))

    def run(window: NDArray[np.float32]) -> NDArray[np.float32]:
        session = one if len(window) == 1 else several()
        return session.run(None, {"planes": window[:, None]})[0][0]  # type: ignore[no-any-return]

    return run


def openvino_engine(model: Model, threads: int = 1) -> Engine:
    """The model's graph on OpenVINO, on CPU: the fastest for INT8 (bench/compress.py).

    As many streams as cores, each of `threads`, so that windows run side by side as on ONNX Runtime. fp32 is
    asked for: with AMX OpenVINO takes bf16 by itself. With pinning two processes share one core: 0.97 times
    the speed of one in place of 1.88 (measured).
    """
    import openvino
    from rollsight.inspect.graph import for_one_mode

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": cores * threads,
        "NUM_STREAMS": cores,
        "ENABLE_CPU_PINNING": False,
    }
    graph = core.read_model(for_one_mode(model.graph))
    where = ["framework", "halo_px"]  # where OpenVINO keeps the metadata of an ONNX graph
    _check_halo(model, str(graph.get_rt_info(where).value) if graph.has_rt_info(where) else None)
    one = core.compile_model(graph, "CPU", settings)
    several = _Once(lambda: core.compile_model(core.read_model(str(model.graph)), "CPU", settings))
    own = threading.local()  # a request serves one caller at a time

    def run(window: NDArray[np.float32]) -> NDArray[np.float32]:
        kind = "one" if len(window) == 1 else "several"
        if not hasattr(own, kind):
            setattr(own, kind, (one if kind == "one" else several()).create_infer_request())
        planes = np.ascontiguousarray(window[:, None])
        logits: NDArray[np.float32] = getattr(own, kind).infer({0: planes}, share_inputs=True)[0][0]
        return logits

    return run


class _Once:
    """Something that is made when it is first asked for, by one thread."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._lock, self._made = make, threading.Lock(), None

    def __call__(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


def torch_engine(model: Model, threads: int = 1) -> Engine:
    """The net itself in fp32 on CPU, channels-last."""
    import torch

    torch.set_num_threads(threads)
    net = _net(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(window: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(window))[None]
            return net(x.to(memory_format=torch.channels_last))[0].contiguous().numpy()  # type: ignore[no-any-return]

    return run


class BatchEngine:
    """The net in torch, windows in batches: for a GPU, where it runs channels-last under fp16 autocast.

    While a batch is computed the next one is read into pinned memory, so at most two are held. One lock
    per process lets one batch at a time onto the device, whose memory is then that of one batch; several
    bands may still read at once. The last batch is filled up with copies: one shape of input, so that the
    same kernels run whatever the band. On device "cpu" it computes in fp32, which is how it is tested.
    """

    def __init__(self, model: Model, device: str, batch_px: int = BATCH_PX) -> None:
        import torch

        self.device = torch.device(device)
        self.batch_px = batch_px
        self._on_gpu = self.device.type == "cuda"
        self._net = _net(model).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self._on_gpu:  # the same bits at each run; TF32 has 10 bits of mantissa
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False

    def __call__(self, window: NDArray[np.float32]) -> NDArray[np.float32]:
        [logits] = self.stream([window])
        return logits

    def stream(self, windows: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """The logits of each window, in order; all windows have one shape."""
        source, begun = iter(windows), None
        for first in source:
            size = max(1, self.batch_px // (first.shape[1] * first.shape[2]))
            following = self._begin([first, *islice(source, size - 1)], size)
            if begun is not None:
                yield from self._finish(*begun)
            begun = following
        if begun is not None:
            yield from self._finish(*begun)

    def _begin(self, windows: list[NDArray[np.float32]], size: int) -> tuple[int, Any, Any]:
        """Put a batch on the device; its number of windows, its logits to be, and the event of their end."""
        import torch

        x = torch.empty((size, *windows[0].shape), pin_memory=self._on_gpu)
        for i in range(size):
            x[i] = torch.from_numpy(windows[min(i, len(windows) - 1)])
        half = torch.autocast(self.device.type, torch.float16, enabled=self._on_gpu)
        with _device_lock, torch.inference_mode(), half:
            y = self._net(
                x.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            ).float()
            logits = torch.empty(y.shape, pin_memory=self._on_gpu)
            logits.copy_(y, non_blocking=True)
            done = None
            if self._on_gpu:
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(torch.cuda.current_stream(self.device))
        return len(windows), logits, done

    def _finish(self, count: int, logits: Any, done: Any) -> Iterator[NDArray[np.float32]]:
        if done is not None:
            done.synchronize()
        yield from logits[:count].numpy()


def _net(model: Model) -> "nn.Module":
    """The net as it is run: fused where it can be."""
    net = model.net()
    return net.fused() if hasattr(net, "fused") else net  # type: ignore[operator]


def _check_halo(model: Model, needed: str | None) -> None:
    """Refuse a graph that needs another halo (export.py writes it there) than the card says."""
    if needed != str(model.card.halo_px):
        raise UserError(
            f"{model.folder}: halo_px is {model.card.halo_px} on the card, but its graph needs {needed}: "
            "tiles would not fit together; export the model again"
        )


_device_lock = threading.Lock()
ENGINES = {"onnx": onnx_engine, "torch": torch_engine, "openvino": openvino_engine}
ON_CPU_ONLY = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}  # they run the graph


def streamed(engine: Engine, windows: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The logits of each window, in order: one by one on a CPU, in batches on a GPU."""
    return engine.stream(windows) if isinstance(engine, BatchEngine) else map(engine, windows)


def choose(name: str = "auto", device: str = "auto") -> tuple[str, str]:
    """The engine and the device ("cpu", "cuda:0", ...) that run a model here.

    `auto` takes a CUDA device where torch sees one, else ONNX Runtime on the CPU, and torch where that is
    missing. Raises UserError for an engine or device that there is not.
    """
    if name != "auto" and name not in ENGINES:
        raise UserError(f"no engine {name!r}: there are auto, {', '.join(ENGINES)}", CONFIG)
    if name == "openvino" and not find_spec("openvino"):
        raise UserError("OpenVINO is not installed: pip install 'rollsight[compress]'", CONFIG)
    asked = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", device)
    if asked is None:
        raise UserError(f"no device {device!r}: it is auto, cpu, cuda or cuda:N", USAGE)
    if device.startswith("cuda"):
        if name in ON_CPU_ONLY:
            raise UserError(f"{ON_CPU_ONLY[name]} runs on the CPU here: for a GPU take --engine torch", USAGE)
        count, index = cuda_devices(), int(asked[1] or 0)
        if index >= count:
            raise UserError(
                f"no device cuda:{index}: torch sees {count} CUDA devices here; "
                "take --device cpu, or install a CUDA build of torch and a driver",
                CONFIG,
            )
        return "torch", f"cuda:{index}"
    if device == "auto" and name not in ON_CPU_ONLY and cuda_devices():
        return "torch", "cuda:0"
    if name == "auto":
        name = "onnx" if find_spec("onnxruntime") else "torch"
    return name, "cpu"


def open_engine(
    model: Model, name: str = "auto", threads: int = 1, device: str = "cpu"
) -> tuple[str, Engine]:
    """The engine by name on that device, held against the model's golden windows, and what it is: `choose`.

    Raises UserError for torch and an INT8 model: its thresholds are for its graph, which torch does not run.
    """
    name, device = choose(name, device)
    if model.card.precision == "int8" and name not in ON_CPU_ONLY:
        parent = model.card.compressed.get("parent", "its parent")
        raise UserError(
            f"model {model.card.name} is INT8, which torch does not run: take --engine onnx or openvino with "
            f"--device cpu, or the model that it was made from, {parent}",
            USAGE,
        )
    gpu = device.startswith("cuda")
    engine: Engine = BatchEngine(model, device) if gpu else ENGINES[name](model, threads)
    if model.card.golden_sha256:
        rounded = gpu or model.card.precision == "int8"
        check_golden(model.folder, engine, rounded=rounded, who=f"{engine_version(name)} on {isa(device)}")
    return name, engine


@cache
def cuda_devices() -> int:
    """How many CUDA devices torch sees. Torch takes a second to import: only a driver makes us ask it."""
    try:
        ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def engine_version(name: str) -> str:
    """The library and its version, for the plan: another version may round otherwise."""
    from importlib.metadata import version

    package = {"onnx": "onnxruntime"}.get(name, name)
    return f"{package} {version(package)}"


def precision(device: str) -> str:
    """What the net computes in, for the plan."""
    return "fp16" if device.startswith("cuda") else "fp32"


# Flags of a CPU, widest first. INT8 without VNNI adds in 16 bits, which may overflow.
WIDEST = ("amx_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


def isa(device: str = "cpu") -> str:
    """What decides how an engine rounds: machine and widest vector instructions, or the kind of GPU."""
    if device.startswith("cuda"):
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    widest = next((name for name in WIDEST if name in flags.split()), "baseline")
    return f"{platform.machine()} {widest}"
