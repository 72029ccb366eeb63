"""Compressed models: INT8 and pruned ones compute what they should, and one that sees less is refused."""

import csv
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from rollsight.inspect.compress import Gate, Judged
from rollsight.inspect.engines import open_engine
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.golden import GOLDEN, GOLDEN_WINDOWS, check_golden, write_golden
from rollsight.inspect.labels import describe, open_labels
from rollsight.inspect.metrics import Tally
from rollsight.inspect.models import open_model, save_model, sha256_of, update_card
from rollsight.inspect.nets import NETS
from rollsight.inspect.nets.reach import halo_px
from rollsight.inspect.nets.widths import take_widths
from rollsight.inspect.plant import Plant
from rollsight.inspect.prune import ROUND_TO, multiplications, prune, renew_norms
from rollsight.inspect.quantise import quantise
from rollsight.inspect.rolls import LabelWriter, RollWriter, Strip, roll_path
from rollsight.inspect.train import Recipe, begin_from, train
from rollsight.inspect.windows import cut_windows
from rollsight.jobs.commands.compress import compress
from rollsight.jobs.compress_job import compress_model, recipe_by_source
from scipy.special import softmax

RECIPE = Recipe(
    net="fast",
    attention="none",
    steps=100,
    batch=8,
    crop_px=64,
    mosaic=1,
    learning_rate=4e-3,
    ema_half_life=5,
)
COUNTS = {"images": 1, "groups": 1, "digest": "0" * 64}
BUDGET = 200.0  # false alarms per Mpx: what four clean tiles can show


@pytest.fixture(scope="module")
def pits(tmp_path_factory):
    """Noisy tiles of 64 px with two bright pits of 6 px, and some clean ones: 24 to learn from, 16 + 16."""
    root = tmp_path_factory.mktemp("pits")
    rng = np.random.default_rng(0)
    rows = [("image", "mask", "split", "group")]
    for split, count in (("train", 24), ("val", 16), ("test", 16)):
        for i in range(count):
            image, mask = rng.normal(128, 4, (64, 64)), np.zeros((64, 64), dtype=np.uint8)
            for left in (8, 40) if i % 4 else ():
                y, x = rng.integers(4, 54), left + rng.integers(8)
                image[y : y + 6, x : x + 6], mask[y : y + 6, x : x + 6] = 200, 1
            names = f"{split}{i}.png", f"{split}{i}_mask.png"
            for name, pixels in zip(names, (image.clip(0, 255).astype(np.uint8), mask), strict=True):
                Image.fromarray(pixels).save(root / name)
            rows.append((*names, split, f"{split}{i}"))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (root / "classes.json").write_text(json.dumps(["pit"]))
    return open_labels(root)


@pytest.fixture(scope="module")
def plant(pits, tmp_path_factory):
    """A plant with a model that finds those pits."""
    home = Plant(tmp_path_factory.mktemp("plant"))
    learned = pits.of_split("train")
    net = train([learned], home.home / "training", RECIPE)
    card = {
        "name": "whole",
        "net": "fast",
        "net_options": {"attention": "none"},
        "classes": ("pit",),
        "thresholds": {"pit": 0.5},
        "thresholds_basis": "none",
        "trained_on": [{"source": "earlier", "split": "train", "group_names": ["earlier-1"], **COUNTS}],
        "recipe": {name: getattr(RECIPE, name) for name in ("steps", "batch", "crop_px", "mosaic")},
    }
    save_model(home.models / "whole", net, card, cut_windows([learned], GOLDEN_WINDOWS, 64))
    return home


@pytest.fixture(scope="module")
def int8(plant, pits):
    """The same model in INT8, through the gate."""
    return compress_model(plant, plant.model("whole"), "int8", [pits], budget_per_mpx=BUDGET)


@pytest.fixture(scope="module")
def strip(pits):
    """Strip (1, 128, 512) in [0, 1] laid out of the test tiles: pits that the model can find."""
    tiles = [sample.read()[0] for sample in pits.of_split("test").samples]
    return np.concatenate([np.concatenate(tiles[i : i + 8], axis=2) for i in (0, 8)], axis=1)


def told(function, *arguments, **options):
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return error.value


# Windows


def test_at_least_half_of_the_windows_lie_around_a_defect(pits):
    windows = cut_windows([pits.of_split("train")], 8, 32)

    assert windows.shape == (8, 1, 32, 32)
    assert windows.dtype == np.float32
    assert (windows.max(axis=(1, 2, 3)) > 0.75).sum() >= 4
    assert np.array_equal(windows, cut_windows([pits.of_split("train")], 8, 32))


def test_clean_windows_are_never_more_than_those_around_a_defect(pits):
    """One image with pits and four clean ones: one window of each."""
    few = replace(pits, samples=tuple(pits.samples[i] for i in (0, 1, 4, 8, 12)))
    windows = cut_windows([few], 8, 32)

    assert [window.max() > 0.75 for window in windows] in ([True, False], [False, True])


def test_images_smaller_than_a_window_are_continued_by_reflection(pits):
    [window] = cut_windows([pits], 1, 128)

    assert np.array_equal(window[:, :, :63], window[:, :, 126:63:-1])


def test_data_without_a_defect_cannot_calibrate(pits):
    clean = replace(pits, samples=tuple(pits.samples[i] for i in (0, 4, 8)))

    assert "none of its 3 images has a defect" in str(told(cut_windows, [clean], 8, 32))


# Golden windows


def test_a_model_is_held_against_its_golden_windows_by_every_engine_that_opens_it(plant, tmp_path):
    """A graph that is whole, of the right shapes, and not what the model's maker exported."""
    shutil.copytree(plant.models / "whole", tmp_path / "whole")
    model = open_model("whole", tmp_path)
    assert open_engine(model)[0] == "onnx"
    graph = onnx.load(model.graph)
    bias = next(t for t in graph.graph.initializer if t.name.endswith("head.bias"))
    values = onnx.numpy_helper.to_array(bias)
    bias.CopyFrom(
        onnx.numpy_helper.from_array(values + np.linspace(0, 1, len(values), dtype=np.float32), bias.name)
    )
    onnx.save(graph, model.graph)
    model = update_card(model, graph_sha256=sha256_of(model.graph))

    assert "onnxruntime" in str(told(open_engine, model))
    assert open_engine(model, "torch")[0] == "torch"


def test_damaged_golden_windows_are_a_damaged_model(plant, tmp_path):
    shutil.copytree(plant.models / "whole", tmp_path / "whole")
    (tmp_path / "whole" / GOLDEN).write_bytes(b"other")

    assert GOLDEN in str(told(open_model, "whole", tmp_path))


def test_rounding_may_differ_at_single_pixels_and_not_in_the_mean(tmp_path):
    write_golden(tmp_path, np.zeros((1, 1, 64, 64), np.float32), lambda _: np.zeros((2, 64, 64), np.float32))

    def other(px):
        logits = np.zeros((2, 64, 64), np.float32)
        logits[1, :px, 0] = 5.0
        return lambda _: logits

    check_golden(tmp_path, other(60), rounded=True, who="x")
    assert "allowed is 0.001" in str(told(check_golden, tmp_path, other(60), rounded=False, who="x"))
    check_golden(tmp_path, other(0), rounded=False, who="x")
    logits = np.full((2, 64, 64), [[[0.0]], [[0.2]]], np.float32)
    assert "in the mean" in str(told(check_golden, tmp_path, lambda _: logits, rounded=True, who="x"))


# INT8


def test_an_int8_model_finds_what_its_original_finds_and_its_graph_is_smaller(plant, int8, strip):
    assert int8.gate.passed
    assert int8.gate.original.found == int8.gate.original.n == 24
    assert int8.gate.lost == int8.about["lost_tiny_small"]
    before, after = int8.about["graph_bytes"]
    assert after < before / 2.5

    p = [softmax(open_engine(plant.model(name))[1](strip), axis=0) for name in ("whole", "int8")]
    assert 0 < abs(p[0] - p[1]).mean() < 0.02
    assert (p[0].argmax(axis=0) == p[1].argmax(axis=0)).mean() > 0.98


def test_the_card_of_a_compressed_model_says_from_what_how_and_what_the_gate_found(plant, int8):
    card, original = int8.model.card, plant.model("whole")

    assert (card.name, card.precision, card.net, card.classes) == ("int8", "int8", "fast", ("pit",))
    assert card.compressed["parent_hash"] == original.hash != int8.model.hash
    assert card.compressed["method"] == "int8"
    assert card.compressed["original"]["n_tiny_small"] == 24
    assert card.budget == BUDGET
    assert {(m["data"], m["split"]) for m in card.metrics} == {
        (m["data"], split) for m in card.metrics for split in ("val", "test")
    }
    assert card.calibrated_on["split"] == "val"
    assert "whole INT8: finds" in card.notes[-1]
    assert not list(plant.models.glob(".int8*"))


def test_int8_weights_have_a_scale_for_each_channel_and_the_last_layer_stays_in_fp32(int8):
    graph = onnx.load(int8.model.graph).graph
    makers = {name: node for node in graph.node for name in node.output}
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    quantised = [makers[node.input[1]] for node in convolutions if node.input[1] in makers]

    assert len(quantised) == len(convolutions) - 1 >= 10
    assert all(node.op_type == "DequantizeLinear" for node in quantised)
    for node in quantised:
        weight, scale = (tensors[name] for name in node.input[:2])
        assert weight.dtype == np.int8
        assert scale.shape == weight.shape[:1]
    assert convolutions[-1].input[1] in tensors
    content = int8.model.graph.read_bytes()
    assert str(int8.model.folder.parent).encode() not in content


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_tiles_of_an_int8_model_are_the_whole(int8, strip, engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    run, halo = open_engine(int8.model, engine)[1], int8.model.card.halo_px
    x = np.concatenate([strip, strip[:, ::-1, ::-1]])  # two lighting modes
    whole = run(x)

    for left in range(0, 512 - 64 - 2 * halo + 1, 64):
        core = slice(left + halo, left + halo + 64)
        tile = run(x[:, :, left : left + 64 + 2 * halo])
        assert np.array_equal(tile[:, :, halo : halo + 64], whole[:, :, core])
    assert len(np.unique(whole.argmax(axis=0))) == 2


def test_torch_does_not_run_an_int8_model(int8):
    error = told(open_engine, int8.model, "torch")

    assert "INT8" in str(error) and "made from, whole" in str(error)
    assert error.exit_code == USAGE


def test_gates_of_attention_stay_in_fp32(tmp_path, strip):
    """The shipped model: four convolutions of its channel gate, one of its spatial gate, and the head."""
    windows = np.ascontiguousarray(strip.reshape(1, 128, 4, 128).transpose(2, 0, 1, 3))

    kept = quantise(open_model("default", tmp_path).graph, tmp_path / "int8.onnx", windows)

    graph = onnx.load(tmp_path / "int8.onnx").graph
    floats = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    in_fp32 = [n.input[1] for n in graph.node if n.op_type == "Conv" and n.input[1] in floats]
    assert kept == len(in_fp32) == 6
    assert sum(".attention." in name for name in in_fp32) == 5
    assert [".head." in name for name in in_fp32] == [False] * 5 + [True]
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Sigmoid":
            assert makers[node.input[0]].op_type in ("Conv", "Add")


# Pruning


@pytest.mark.parametrize(("name", "attention"), [("fast", "cbam"), ("unet_lite", "eca"), ("unet", "se")])
def test_a_pruned_net_is_built_again_from_its_function_and_its_weights(name, attention):
    torch.manual_seed(0)
    net = NETS[name](2, attention=attention).eval()
    before = {key: t.clone() for key, t in net.state_dict().items()}
    narrow = prune(net, 0.5)
    again = NETS[name](2, attention=attention)
    take_widths(again, narrow.state_dict())
    again.load_state_dict(narrow.state_dict())
    x = torch.rand(1, 2, 64, 128)

    with torch.inference_mode():
        assert torch.equal(again.eval()(x), narrow(x))
        if hasattr(net, "auxiliary"):
            assert [y.shape for y in again.auxiliary(x)] == [y.shape for y in net.auxiliary(x)]
    assert multiplications(narrow) < 0.45 * multiplications(net)
    assert halo_px(again) == halo_px(net)
    assert again.head.out_channels == net.head.out_channels
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())  # the net itself is whole
    changed = [t for key, t in narrow.state_dict().items() if t.shape != before[key].shape]
    assert all(t.shape[0] % ROUND_TO == 0 for t in changed if t.ndim == 1)


def test_training_begins_from_a_pruned_net_with_other_classes():
    torch.manual_seed(0)
    narrow = prune(NETS["fast"](2, attention="none"), 0.5)
    net = NETS["fast"](3, attention="none")

    begin_from(net, ("a", "pit", "scratch"), narrow, ("pit", "scratch"))

    rows = net.head.weight.unflatten(0, (4, -1))
    assert torch.equal(rows[2], narrow.head.weight.unflatten(0, (3, -1))[1])
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, 4, 64, 64)


def test_weights_with_more_channels_or_that_do_not_fit_together_are_refused():
    weights, net = NETS["unet_lite"](2).state_dict(), NETS["unet_lite"](2)
    name = "up_8.fuse.0.weight"
    wide = weights | {name: torch.cat([weights[name]] * 2)}
    take_widths(net, wide)
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(wide)

    with pytest.raises(RuntimeError):
        take_widths(net, weights | {name: weights[name][:8]})


def test_renewed_norms_hold_what_the_pruned_net_sees(pits):
    torch.manual_seed(0)
    narrow = prune(NETS["unet_lite"](1), 0.5)
    windows = cut_windows([pits.of_split("train")], 16, 64)
    renew_norms(narrow, windows)

    with torch.inference_mode():
        seen = narrow.stem[0]((torch.from_numpy(windows) - 0.498) / 0.502)
    np.testing.assert_allclose(narrow.stem[1].running_mean, seen.mean(dim=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(narrow.stem[1].running_var, seen.var(dim=(0, 2, 3)), rtol=1e-3)
    assert not narrow.training


def test_a_pruned_model_goes_through_fine_tuning_and_gate_and_into_int8(plant, pits, strip):
    original = plant.model("whole")

    made = compress_model(
        plant, original, "narrow", [pits], budget_per_mpx=BUDGET, prune_share=0.25, steps=30
    )

    assert made.gate.passed and made.model is not None
    before, after = made.about["parameters"]
    assert after < 0.7 * before
    assert made.model.card.recipe["init"] == f"{original.hash} without 0.25"
    assert made.model.card.recipe["teacher"] == original.hash
    assert made.model.card.groups() == {*pits.of_split("train").groups(), "earlier-1"}
    p = [softmax(open_engine(made.model, name)[1](strip), axis=0) for name in ("onnx", "torch")]
    assert abs(p[0] - p[1]).max() < 1e-3

    again = compress_model(plant, made.model, "narrow-int8", [pits], budget_per_mpx=BUDGET)

    assert again.about["parent"] == "narrow"
    assert again.about["graph_bytes"][1] < made.about["graph_bytes"][1] / 2


def of_two_sources(plant, name, trained_on, **recipe):
    """The model that finds the pits under another name, as if it had been trained so."""
    shutil.copytree(plant.models / "whole", plant.models / name)
    whole = plant.model(name)
    return update_card(
        whole, name=name, trained_on=trained_on, recipe={**whole.card.recipe, "steps": 100, **recipe}
    )


def test_fine_tuning_draws_its_sources_as_the_training_did_in_whatever_order_they_are_given(plant, pits):
    fewer = replace(pits, samples=pits.samples[4:])
    trained_on = [describe(source.of_split("train"), "train") for source in (fewer, pits)]
    asked = {"shares": [1.0, 3.0], "exhaustive": [True, False], "until": [0.5, 1.0]}
    original = of_two_sources(plant, "two", trained_on, **asked)

    made = compress_model(
        plant, original, "two-narrow", [pits, fewer], budget_per_mpx=BUDGET, prune_share=0.25, steps=30
    )

    assert made.model is not None
    turned = {"shares": [3.0, 1.0], "exhaustive": [False, True], "until": [1.0, 0.5]}
    assert {name: made.model.card.recipe[name] for name in asked} == turned
    assert recipe_by_source(original, 2) == (asked, [])


def test_what_the_recipe_says_of_other_sources_is_left_out_and_said(plant, pits, capsys):
    asked = {"shares": [1.0, 3.0], "exhaustive": [False, False], "until": [0.5, 1.0]}
    original = of_two_sources(plant, "two-others", [], **asked)
    error = told(compress, "two-others", "x", [pits.root], prune=0.25, budget=1.0, home=plant.home)

    assert recipe_by_source(original, 1) == ({}, ["shares", "until"])
    assert "cannot be shown" in str(error)  # that small a budget: nothing was trained yet
    [line] = capsys.readouterr().err.splitlines()
    assert "the shares and until of two-others's recipe are of another number of sources than the 1" in line


# The gate


def judged(found, n=12):
    """A model that finds the first `found` of n pits, each on an image of its own."""
    tally = Tally(("pit",))
    for i in range(n):
        truth = np.zeros((32, 32), np.uint8)
        truth[4:8, 4:8] = 1
        seen = truth if i < found else np.zeros_like(truth)
        tally.add(truth, seen, seen, str(i))
    return Judged(None, tally)  # type: ignore[arg-type]  # the gate itself does not look at the fit


@pytest.mark.parametrize(("found", "passed"), [(12, True), (10, True), (9, False), (0, False)])
def test_one_small_defect_less_passes_the_gate_and_two_do_not(found, passed):
    gate = Gate(judged(11), judged(found))

    assert gate.lost == 11 - found
    assert gate.passed is passed


def test_a_model_that_loses_small_defects_is_refused_with_the_table_and_nothing_is_kept(
    plant, pits, tmp_path, capsys
):
    """Calibrated on images of a lamp that was off: its scales cut off all that is bright."""
    root = shutil.copytree(pits.root, tmp_path / "dark")
    for sample in pits.of_split("train").samples:
        Image.new("L", (64, 64)).save(root / sample.image.name)

    error = told(compress, "whole", "blind", [root], int8=True, budget=BUDGET, home=plant.home)

    assert error.exit_code == 1
    assert "blind is not kept" in str(error) and "one is allowed" in str(error)
    table = capsys.readouterr().out
    assert "24 of 24" in table and "blind" in table and "95 % interval" in table
    assert [path.name for path in plant.models.glob("*blind*")] == []
    assert [path.name for path in plant.models.glob(".*")] == []


def test_a_test_split_with_few_small_defects_cannot_judge(plant, pits):
    left_out = {f"test{i}" for i in range(3, 16)}
    few = replace(pits, samples=tuple(s for s in pits.samples if s.group not in left_out))

    error = told(compress_model, plant, plant.model("whole"), "few", [few], budget_per_mpx=BUDGET)

    assert "has 4 tiny and small defects" in str(error) and "needs 10" in str(error)


def test_rolls_do_not_judge_a_compressed_model(plant, pits, tmp_path):
    """Their tiles are of any split: thresholds and gate would see what was learned from."""
    strip = Strip("S-1", "top", ("bright",), mm_per_px_x=1.0, mm_per_line=1.0)
    mask = np.zeros((512, 256), np.uint8)
    mask[100:106, 100:106] = 1
    with RollWriter(roll_path(tmp_path, "S-1"), strip, 256, np.uint8) as writer:
        writer.append(np.full((1, 512, 256), 128, np.uint8))
    labels = LabelWriter.create(
        roll_path(tmp_path, "S-1"), "truth", ("pit",), lines=512, width=256, shard_lines=4096
    )
    labels.write(0, mask)
    labels.close()
    roll = open_labels(roll_path(tmp_path, "S-1"))

    error = told(compress_model, plant, plant.model("whole"), "x", [roll, pits], budget_per_mpx=BUDGET)

    assert "S-1.zarr: rolls have no val and no test split" in str(error)
    assert error.exit_code == USAGE
    assert not list(plant.models.glob(".x*"))


def test_a_group_of_the_test_split_that_another_source_teaches_is_refused_by_name(plant, pits):
    taught = tuple(replace(sample, split="train") for sample in pits.of_split("test").samples[:2])
    other = replace(pits, root=pits.root.with_name("more"), samples=taught)

    error = told(compress_model, plant, plant.model("whole"), "x", [pits, other], budget_per_mpx=BUDGET)

    assert "more: 2 groups of its train split are in the test split of" in str(error)
    assert "test0, test1" in str(error)
    assert error.exit_code == USAGE
    assert not list(plant.models.glob(".x*"))


def test_mistakes_are_told_before_the_work_starts(plant, pits, int8):
    run = partial(compress, "whole", "x", [pits.root], home=plant.home)
    for options, words in (
        ({}, "one of --int8 and --prune"),
        ({"int8": True, "prune": 0.5}, "one of --int8 and --prune"),
        ({"prune": 1.5}, "above 0 and below 1"),
        ({"int8": True, "steps": 5}, "--steps is for --prune"),
        ({"int8": True, "budget": 0.0}, "--budget 0: it must be a finite number above 0"),
        ({"int8": True, "budget": math.inf}, "--budget inf: it must be a finite number above 0"),
        ({"int8": True, "budget": math.nan}, "--budget nan: it must be a finite number above 0"),
        ({"int8": True}, "no budget of false alarms on its card"),
        ({"int8": True, "budget": BUDGET, "engine": "torch"}, "onnx or openvino"),
    ):
        error = told(run, **options)
        assert words in str(error)
        assert error.exit_code == USAGE
    job = partial(compress_model, plant, data=[pits], budget_per_mpx=BUDGET)
    assert "INT8 already" in str(told(job, int8.model, "x"))
    assert "exists" in str(told(job, plant.model("whole"), "int8"))
    other = replace(pits, classes=("scratch",))
    assert "knows pit" in str(told(job, plant.model("whole"), "x", data=[pits, other], prune_share=0.5))
