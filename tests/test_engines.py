"""The engines: ONNX Runtime computes what torch computes, for every window shape and number of modes."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
from rollsight.inspect.engines import ENGINES, engine_version, open_engine
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.export import PARITY
from scipy.special import softmax


@pytest.fixture(scope="module")
def engines(small_model):
    return {name: open_engine(small_model, name)[1] for name in ENGINES}


def window(modes, lines, px):
    """A window with something of strip: noise on a slope, (M, H, W) float32 in [0, 1]."""
    noise = np.random.default_rng(0).normal(size=(modes, lines, px)) / 10
    return (np.linspace(0.2, 0.8, px) + noise).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("modes", [1, 2, 3])
@pytest.mark.parametrize(("lines", "px"), [(64, 64), (192, 320), (640, 128)])
def test_onnx_gives_the_probabilities_and_classes_of_torch(engines, modes, lines, px):
    x = window(modes, lines, px)

    found, expected = engines["onnx"](x), engines["torch"](x)

    assert found.shape == expected.shape == (3, lines, px)
    assert found.dtype == expected.dtype == np.float32
    found, expected = softmax(found, axis=0), softmax(expected, axis=0)
    assert abs(found - expected).max() < PARITY
    second, first = np.sort(expected, axis=0)[-2:]
    clear = first - second > 1e-4
    assert clear.mean() > 0.9
    assert np.array_equal(found.argmax(axis=0)[clear], expected.argmax(axis=0)[clear])
    assert len(np.unique(expected.argmax(axis=0))) > 1


@pytest.mark.parametrize("name", ENGINES)
def test_a_window_cut_from_a_larger_array_is_the_window_itself(engines, name):
    band = window(2, 256, 384)
    cut = band[:, 64:192, 128:320]

    assert np.array_equal(engines[name](cut), engines[name](cut.copy()))


@pytest.mark.parametrize("name", ENGINES)
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


def test_the_version_of_an_engine_is_that_of_its_library():
    assert engine_version("onnx") == f"onnxruntime {version('onnxruntime')}"
    assert engine_version("torch") == f"torch {version('torch')}"


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
