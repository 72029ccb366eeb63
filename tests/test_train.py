"""Training: what a killed run goes on with, what it learns, and what it refuses."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData, open_labels
from rollsight.inspect.nets import NETS
from rollsight.inspect.train import (
    CHECKPOINT,
    CURVE,
    Recipe,
    _batch,
    _mosaics,
    _read_sources,
    _schedule,
    begin_from,
    model_classes,
    train,
)
from safetensors.torch import load_file
from torch import nn

TINY = Recipe(steps=4, batch=4, crop_px=64, mosaic=2, ema_half_life=2)


@pytest.fixture
def data(labelled_folder):
    return [open_labels(labelled_folder).of_split("train")]


def source(folder: Path, classes: tuple[str, ...], *pairs) -> LabelledData:
    """A source in memory's place: files of (image, mask) pairs under `folder`."""
    folder.mkdir()
    samples = []
    for i, (image, mask) in enumerate(pairs):
        for name, pixels in ((f"{i}.png", image), (f"{i}_mask.png", mask)):
            Image.fromarray(pixels).save(folder / name)
        samples.append(ImageFile(folder / f"{i}.png", folder / f"{i}_mask.png", "train", str(i)))
    return LabelledData(folder, classes, tuple(samples))


def gray(size=(64, 64), value=128):
    return np.full(size, value, dtype=np.uint8)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


# Stopped and resumed


@pytest.fixture
def uninterrupted(data, tmp_path):
    return train(data, tmp_path / "whole", TINY)


@pytest.mark.parametrize("stops", [(2,), (1, 2, 3), (0, 4)])
def test_a_run_that_was_stopped_and_resumed_gives_bit_identical_weights(data, tmp_path, uninterrupted, stops):
    for stop in stops:
        train(data, tmp_path / "cut", TINY, stop_after=stop)
    resumed = train(data, tmp_path / "cut", TINY)

    assert_same_weights(resumed, uninterrupted)
    whole, cut = (load_file(tmp_path / run / CHECKPOINT) for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)  # the optimiser's state too


def test_a_run_that_something_else_drew_numbers_before_is_the_same(data, tmp_path, uninterrupted):
    torch.rand(17)
    np.random.default_rng().random()

    assert_same_weights(train(data, tmp_path / "again", TINY), uninterrupted)


def test_another_seed_gives_other_weights(data, tmp_path, uninterrupted):
    other = train(data, tmp_path / "other", replace(TINY, seed=1))

    assert not torch.equal(other.head.weight, uninterrupted.head.weight)


def test_a_finished_run_is_not_trained_further(data, tmp_path, uninterrupted):
    steps = []
    again = train(data, tmp_path / "whole", TINY, on_step=lambda step, _: steps.append(step))

    assert_same_weights(again, uninterrupted)
    assert steps == []


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-4}, {"steps": 5}, {"seed": 1}, {"attention": "none"}]
)
def test_another_recipe_in_the_same_folder_is_refused(data, tmp_path, change):
    train(data, tmp_path / "run", TINY, stop_after=1)

    with pytest.raises(UserError, match=r"checkpoint.safetensors: made with another recipe") as error:
        train(data, tmp_path / "run", replace(TINY, **change))
    assert error.value.exit_code == USAGE


def test_other_data_in_the_same_folder_is_refused(data, tmp_path):
    train(data, tmp_path / "run", TINY, stop_after=1)
    fewer = [replace(data[0], samples=data[0].samples[:-1])]

    with pytest.raises(UserError, match=r"another recipe or other data"):
        train(fewer, tmp_path / "run", TINY)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(8) + b"{}"])
def test_a_damaged_checkpoint_is_refused_in_one_line(data, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT).write_bytes(content)

    with pytest.raises(UserError, match=r"checkpoint.safetensors: ") as error:
        train(data, tmp_path / "run", TINY)
    assert "\n" not in str(error.value)


def test_the_curve_has_a_row_for_each_checkpoint(data, tmp_path):
    for stop in (1, 3, 4):
        train(data, tmp_path / "run", TINY, stop_after=stop)

    with (tmp_path / "run" / CURVE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3", "4"]
    assert all(float(row["loss"]) > 0 for row in rows)


# What is learned


def test_the_loss_falls_on_a_trivial_task(tmp_path):
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        mask = gray(value=0)
        y, x = rng.integers(0, 44, 2)
        mask[y : y + 20, x : x + 20] = 1
        pairs.append((np.where(mask, 250, 90).astype(np.uint8), mask))
    losses = []
    recipe = Recipe(steps=30, batch=4, crop_px=64, mosaic=1, learning_rate=3e-3)

    train(
        [source(tmp_path / "data", ("pit",), *pairs)],
        tmp_path / "run",
        recipe,
        on_step=lambda _, f: losses.append(f),
    )

    first, last = (np.mean([f["dice"] + f["focal"] for f in part]) for part in (losses[:5], losses[-5:]))
    assert last < 0.7 * first


def test_the_averaged_net_moves_by_the_half_life_in_weights_and_in_buffers(data, tmp_path):
    """After step 1 it is the net, after step 2 it holds 2^(-1/2) of that and the rest of the new net."""
    train(data, tmp_path / "run", TINY, stop_after=1)
    before = load_file(tmp_path / "run" / CHECKPOINT)
    train(data, tmp_path / "run", TINY, stop_after=2)
    after = load_file(tmp_path / "run" / CHECKPOINT)

    keep = 0.5 ** (1 / TINY.ema_half_life)
    for name in ("head.weight", "up_8.fuse.1.running_mean", "encoder.stages.2.0.layers.1.running_var"):
        assert torch.equal(before[f"average.module.{name}"], before[f"net.{name}"])
        expected = keep * before[f"net.{name}"] + (1 - keep) * after[f"net.{name}"]
        torch.testing.assert_close(after[f"average.module.{name}"], expected)
        assert not torch.equal(after[f"average.module.{name}"], after[f"net.{name}"])


def test_the_trained_net_is_the_average_in_eval_mode_with_the_statistics_of_the_data(data, tmp_path):
    net = train(data, tmp_path / "run", TINY)
    average = load_file(tmp_path / "run" / CHECKPOINT)
    pretrained = NETS["unet_lite"](2, pretrained=True)

    assert not net.training
    assert all(torch.equal(t, average[f"average.module.{name}"]) for name, t in net.state_dict().items())
    assert not torch.equal(net.stem[1].running_mean, pretrained.stem[1].running_mean)


def test_the_learning_rate_warms_up_and_falls_to_one_percent():
    recipe = Recipe(steps=1000, warmup=0.05)
    rates = [_schedule(step, recipe) for step in range(1000)]

    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == rates[49] == rates[50] == 1
    assert rates[525] == pytest.approx(0.505)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)


# Batches


@pytest.mark.parametrize(("batch", "mosaic"), [(8, 1), (32, 2)])
def test_a_batch_has_the_share_of_each_source_in_whole_mosaics(tmp_path, batch, mosaic):
    first = source(tmp_path / "a", ("pit",), (gray(), gray(value=1)))
    second = source(tmp_path / "b", ("scratch",), (gray(), gray(value=1)))
    recipe = Recipe(batch=batch, crop_px=64, mosaic=mosaic)
    sources = _read_sources([first, second], ("pit", "scratch"), recipe, [3.0, 1.0], ())

    for step in range(3):
        image, labels, weight, labelled = _batch(sources, recipe, step, planes_of)
        assert image.shape == (8, 1, 64 * mosaic, 64 * mosaic)
        assert labels.shape == weight.shape == image[:, 0].shape
        assert labelled.tolist() == [[True, True, False]] * 6 + [[True, False, True]] * 2
        assert [int(t.unique()) for t in labels] == [1] * 6 + [2] * 2


def test_a_mosaic_lays_its_crops_out_row_by_row():
    crops = (
        torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 5) + torch.tensor([0, 100, 200])[:, None, None]
    )

    canvases = _mosaics(crops, 2)

    assert canvases.shape == (2, 3, 4, 10)
    assert canvases[:, :, ::2, ::5].reshape(2, 3, 4)[:, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(canvases[0, 2, 2:, :5], crops[2, 2])
    assert torch.equal(_mosaics(crops, 1), crops)


def test_image_labels_and_weight_of_a_mosaic_are_the_same_crops(tmp_path):
    pairs = [(gray(value=50 * value), gray(value=value)) for value in (1, 2, 3, 4)]
    sources = _read_sources([source(tmp_path / "a", tuple("abcd"), *pairs)], tuple("abcd"), TINY, (), ())

    image, labels, weight, _ = _batch(sources, TINY, 0, planes_of)

    assert len(labels.unique()) > 1
    torch.testing.assert_close(image[:, 0], 50 * labels / 255, atol=1e-3, rtol=0)
    assert (weight == 1).all()


def planes_of(image, mask, weight):
    """A pipeline that leaves all as it is."""
    return image, mask, weight


def test_the_classes_of_a_model_are_the_union_in_order(tmp_path):
    first = source(tmp_path / "a", ("pit", "scale"), (gray(), gray(value=0)))
    second = source(tmp_path / "b", ("scratch", "pit"), (gray(), gray(value=2)))
    classes = model_classes([first, second])

    [_, other] = _read_sources([first, second], classes, replace(TINY, batch=8), (), ())

    assert classes == ("pit", "scale", "scratch")
    assert np.unique(other.masks[0]).tolist() == [1]  # value 2 of the second source is its pit
    assert other.labelled.tolist() == [True, True, False, True]


def test_an_exhaustive_source_says_that_the_classes_of_the_others_are_absent(tmp_path):
    first = source(tmp_path / "a", ("pit",), (gray(), gray(value=0)))
    second = source(tmp_path / "b", ("scratch",), (gray(), gray(value=1)))
    recipe = replace(TINY, batch=8)

    exhaustive, other = _read_sources([first, second], ("pit", "scratch"), recipe, (), [True, False])

    assert exhaustive.labelled.tolist() == [True, True, True]
    assert other.labelled.tolist() == [True, False, True]


def test_a_training_begins_from_the_net_it_is_given(data, tmp_path, uninterrupted):
    still = replace(TINY, steps=1, learning_rate=1e-12)
    started = train(data, tmp_path / "begun", still, init=(uninterrupted, model_classes(data)))

    for name, weight in started.named_parameters():
        torch.testing.assert_close(weight, uninterrupted.get_parameter(name), atol=1e-6, rtol=0)


def test_frozen_norms_keep_their_statistics(data, tmp_path, uninterrupted):
    recipe = replace(TINY, steps=2, frozen_norms=True)
    tuned = train(data, tmp_path / "tuned", recipe, init=(uninterrupted, model_classes(data)))

    kept = dict(uninterrupted.named_buffers())
    assert all(torch.equal(buffer, kept[name]) for name, buffer in tuned.named_buffers() if "running" in name)


def test_a_net_begun_from_one_of_other_classes_keeps_what_it_knew():
    """The logits of the classes that both know are the same; a new class begins on its own."""
    torch.manual_seed(0)
    known, net = NETS["unet_lite"](2).eval(), NETS["unet_lite"](3).eval()
    begin_from(net, ("scale", "scratch", "pit"), known, ("pit", "scratch"))
    x = torch.rand(1, 1, 64, 64)

    with torch.no_grad():
        torch.testing.assert_close(net(x)[:, [0, 3, 2]], known(x))


def test_a_component_cut_by_a_crop_keeps_the_weight_of_the_whole(tmp_path):
    mask = gray((256, 256), 0)
    mask[8:248, 8:248] = 1
    data = source(tmp_path / "a", ("pit",), (gray((256, 256)), mask))
    sources = _read_sources([data], ("pit",), TINY, (), ())

    for step in range(6):
        _, labels, weight, _ = _batch(sources, TINY, step, planes_of)
        assert (weight[labels == 1] == 1).all()  # a crop's 64 x 64 px alone would weigh sqrt(240² / 64²)


def test_an_image_smaller_than_the_crop_is_reflected_and_the_padding_ignored(tmp_path):
    image = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30).astype(np.uint8)
    data = source(tmp_path / "a", ("pit",), (image, gray((40, 30), 1)))
    [found] = _read_sources([data], ("pit",), TINY, (), ())

    assert found.images[0].shape == (1, 64, 64)
    assert (found.masks[0][:40, :30] == 1).all()
    assert (found.masks[0][40:] == IGNORE).all()
    assert (found.masks[0][:, 30:] == IGNORE).all()
    assert np.array_equal(found.images[0][0, 40, :30], found.images[0][0, 38, :30])


# What cannot be trained on


def test_a_mask_value_without_a_class_is_refused_with_the_file(tmp_path):
    data = source(tmp_path / "a", ("pit",), (gray(), gray(value=2)))

    with pytest.raises(UserError, match=r"0_mask.png: mask value 2, but .* has 1 classes"):
        train([data], tmp_path / "run", TINY)


@pytest.mark.parametrize("change", [{"crop_px": 100}, {"net": "unet"}])
def test_a_recipe_that_cannot_be_followed_is_refused(data, tmp_path, change):
    with pytest.raises(UserError, match=r"recipe: crop .* must be a multiple of 64, net one of"):
        train(data, tmp_path / "run", replace(TINY, **change))


@pytest.mark.parametrize("change", [{"batch": 6}, {"batch": 0}, {"mosaic": 0}, {"mosaic": 3}])
def test_a_batch_that_is_not_whole_mosaics_is_refused(data, tmp_path, change):
    with pytest.raises(UserError, match=r"recipe: a batch of \d crops must be whole mosaics"):
        train(data, tmp_path / "run", replace(TINY, **change))


def test_a_batch_with_fewer_mosaics_than_sources_is_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"and one for each of 2 sources"):
        train(data * 2, tmp_path / "run", TINY)


def test_a_share_too_small_for_one_mosaic_of_a_batch_is_refused(data, tmp_path):
    recipe = replace(TINY, batch=16)

    with pytest.raises(UserError, match=r"shares 10, 1: a batch of 4 mosaics leaves a source without one"):
        train(data * 2, tmp_path / "run", recipe, shares=[10.0, 1.0])


@pytest.mark.parametrize("shares", [(1.0, 2.0), (0.0,), (-1.0,)])
def test_shares_that_do_not_fit_the_sources_are_refused(data, tmp_path, shares):
    with pytest.raises(UserError, match="one positive share for each"):
        train(data, tmp_path / "run", TINY, shares=shares)
