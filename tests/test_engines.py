"""The engines: ONNX Runtime computes what torch computes, for every window shape and number of modes."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from rollsight.inspect.engines import (
    ENGINES,
    WIDEST,
    BatchEngine,
    choose,
    cuda_devices,
    engine_version,
    isa,
    open_engine,
    precision,
    streamed,
)
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.inspect.golden import PARITY
from rollsight.inspect.graph import for_one_mode
from rollsight.inspect.models import Model
from scipy.special import softmax

with_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is an extra")
HERE = [pytest.param(name, marks=with_openvino if name == "openvino" else ()) for name in ENGINES]


@pytest.fixture(scope="module")
def engines(small_model):
    """Every engine that is installed here."""
    names = [name for name in ENGINES if name != "openvino" or find_spec("openvino")]
    return {name: open_engine(small_model, name)[1] for name in names}


def window(modes, lines, px):
    """A window with something of strip: noise on a slope, (M, H, W) float32 in [0, 1]."""
    noise = np.random.default_rng(0).normal(size=(modes, lines, px)) / 10
    return (np.linspace(0.2, 0.8, px) + noise).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("name", ["onnx", pytest.param("openvino", marks=with_openvino)])
@pytest.mark.parametrize(("modes", "lines", "px"), [(1, 64, 64), (2, 192, 320), (3, 640, 128)])
def test_every_engine_gives_the_probabilities_and_classes_of_torch(engines, name, modes, lines, px):
    x = window(modes, lines, px)

    found, expected = engines[name](x), engines["torch"](x)

    assert found.shape == expected.shape == (3, lines, px)
    assert found.dtype == expected.dtype == np.float32
    found, expected = softmax(found, axis=0), softmax(expected, axis=0)
    assert abs(found - expected).max() < PARITY
    second, first = np.sort(expected, axis=0)[-2:]
    clear = first - second > 1e-4
    assert clear.mean() > 0.9
    assert np.array_equal(found.argmax(axis=0)[clear], expected.argmax(axis=0)[clear])
    assert len(np.unique(expected.argmax(axis=0))) > 1


def test_the_graph_for_one_mode_has_no_mean_over_modes_and_gives_the_same_bits(small_model):
    whole, one = onnx.load(str(small_model.graph)), onnx.load_from_string(for_one_mode(small_model.graph))
    means = [sum(node.op_type == "ReduceMean" for node in graph.graph.node) for graph in (whole, one)]
    assert means[1] == means[0] - 1
    planes = {"planes": window(1, 192, 320)[:, None]}
    found = [
        onnxruntime.InferenceSession(graph.SerializeToString()).run(None, planes)[0] for graph in (whole, one)
    ]
    assert np.array_equal(*found)


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x00 no protobuf")
    with pytest.raises(UserError, match=r"model.onnx: not an ONNX graph"):
        for_one_mode(path)


@pytest.mark.parametrize("name", HERE)
def test_a_window_cut_from_a_larger_array_is_the_window_itself(engines, name):
    band = window(2, 256, 384)
    cut = band[:, 64:192, 128:320]

    assert np.array_equal(engines[name](cut), engines[name](cut.copy()))


@pytest.mark.parametrize("name", HERE)
def test_windows_side_by_side_give_what_each_gives_alone(engines, name):
    windows = [window(1, 128, 128 + 64 * (i % 2)) for i in range(6)]
    alone = [engines[name](x) for x in windows]

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(engines[name], windows))

    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


def test_auto_is_onnx_runtime(small_model):
    assert open_engine(small_model)[0] == "onnx"


def test_an_engine_nobody_wrote_is_refused_with_those_there_are(small_model):
    with pytest.raises(UserError, match="no engine 'tensorrt': there are auto, onnx, torch") as error:
        open_engine(small_model, "tensorrt")
    assert error.value.exit_code == CONFIG


@with_openvino
def test_tiles_are_the_whole_on_openvino_too(small_model, engines):
    """On the cell grid, with the halo of the card, whatever the shape of the window."""
    run, halo = engines["openvino"], small_model.card.halo_px
    x = window(1, 64, 3 * 64 + 2 * halo)
    whole = run(x)

    for left in (0, 64, 128):
        tile = run(x[:, :, left : left + 64 + 2 * halo])
        assert np.array_equal(tile[:, :, halo : halo + 64], whole[:, :, left + halo : left + halo + 64])


@pytest.mark.parametrize("name", ["onnx", pytest.param("openvino", marks=with_openvino)])
def test_a_graph_that_needs_another_halo_than_the_card_says_is_refused(small_model, name):
    card = small_model.card.model_copy(update={"halo_px": 512})

    with pytest.raises(UserError, match="halo_px is 512 on the card, but its graph needs 256"):
        open_engine(Model(small_model.folder, card), name)


@pytest.mark.skipif(find_spec("openvino") is not None, reason="OpenVINO is here")
def test_openvino_that_is_not_installed_is_refused_with_how_to_install_it():
    with pytest.raises(UserError, match=r"pip install 'rollsight\[compress\]'") as error:
        choose("openvino")
    assert error.value.exit_code == CONFIG


def test_the_version_of_an_engine_is_that_of_its_library():
    assert engine_version("onnx") == f"onnxruntime {version('onnxruntime')}"
    assert engine_version("torch") == f"torch {version('torch')}"


without_gpu = pytest.mark.skipif(cuda_devices() > 0, reason="a GPU is here: auto takes it")


@without_gpu
def test_auto_falls_back_to_the_cpu_where_there_is_no_gpu():
    assert choose() == choose("auto", "cpu") == choose("onnx", "auto") == ("onnx", "cpu")
    assert choose("torch") == choose("torch", "cpu") == ("torch", "cpu")


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_an_error_and_never_a_slow_scan(small_model, device):
    with pytest.raises(UserError, match="torch sees 0 CUDA devices") as error:
        open_engine(small_model, device=device)
    assert error.value.exit_code == CONFIG


@pytest.mark.parametrize(
    ("name", "device", "told"),
    [
        ("onnx", "cuda", "take --engine torch"),
        pytest.param("openvino", "cuda", "take --engine torch", marks=with_openvino),
        ("auto", "gpu", "auto, cpu, cuda or cuda:N"),
        ("torch", "cuda:x", "cuda:N"),
        ("torch", "cpu:1", "cuda:N"),
    ],
)
def test_a_device_that_cannot_be_meant_is_refused(name, device, told):
    with pytest.raises(UserError, match=told) as error:
        choose(name, device)
    assert error.value.exit_code == USAGE


def test_what_decides_the_result_is_told_of_the_cpu():
    assert isa().split()[1] in (*WIDEST, "baseline")
    assert (precision("cpu"), precision("cuda:1")) == ("fp32", "fp16")


def test_batches_give_what_windows_give_one_by_one(small_model, engines):
    """Five windows in batches of two: the last batch is filled up, and nothing of that is seen."""
    windows = [window(2, 128, 192) + np.float32(i / 100) for i in range(5)]
    batched = BatchEngine(small_model, "cpu", batch_px=2 * 128 * 192)

    found = list(streamed(batched, windows))

    assert [logits.shape for logits in found] == [(3, 128, 192)] * 5
    for logits, x in zip(found, windows, strict=True):
        np.testing.assert_array_equal(logits, batched(x))  # alone, in a batch that is filled up
        np.testing.assert_allclose(logits, engines["torch"](x), atol=1e-4)


def test_the_next_batch_is_read_before_the_first_is_given_out_and_none_beyond(small_model):
    read = 0

    def windows():
        nonlocal read
        for _ in range(9):
            read += 1
            yield window(1, 64, 64)

    results = BatchEngine(small_model, "cpu", batch_px=2 * 64 * 64).stream(windows())

    seen = [read for _ in results]
    assert seen == [4, 4, 6, 6, 8, 8, 9, 9, 9]


def test_a_window_over_the_batch_size_is_a_batch_of_its_own(small_model):
    batched = BatchEngine(small_model, "cpu", batch_px=100)

    assert [logits.shape for logits in batched.stream([window(1, 64, 128)] * 2)] == [(3, 64, 128)] * 2


def test_bands_at_once_share_the_device_in_turn(small_model):
    """Two bands stream at once through one engine, each gets its own results in its own order."""
    batched = BatchEngine(small_model, "cpu", batch_px=2 * 64 * 128)
    bands = [
        [window(1, 64, 128) * np.float32(scale) for scale in band] for band in ((1, 0.7, 0.4), (0.9, 0.2))
    ]
    alone = [list(batched.stream(band)) for band in bands]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda band: list(batched.stream(band)), bands))

    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_the_graph_holds_nothing_of_the_machine_that_exported_it(small_model):
    content = small_model.graph.read_bytes()

    for here in (Path.cwd(), Path.home(), sys.prefix, sys.base_prefix, "site-packages", 'File "', '.py"'):
        assert str(here).encode() not in content
    assert len(socket.gethostname()) < 5 or socket.gethostname().encode() not in content
    assert all(
        not node.metadata_props and not node.doc_string for node in onnx.load(small_model.graph).graph.node
    )


def test_the_graph_is_free_in_modes_lines_and_px_and_fixed_in_classes(small_model):
    graph = onnx.load(small_model.graph).graph
    [planes], [logits] = graph.input, graph.output

    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (planes, logits)
    ]
    assert shapes == [["modes", 1, "lines", "px"], [1, 3, "lines", "px"]]
