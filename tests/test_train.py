"""Training: what a killed run goes on with, what it learns, and what it refuses."""

import contextlib
import copy
import csv
import json
import math
import resource
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.checkpoints import BEST, CHECKPOINT, CONFIG, CURVE
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData, open_labels
from rollsight.inspect.nets import NETS
from rollsight.inspect.train import Recipe, _parameter_groups, _schedule, begin_from, model_classes, train
from rollsight.inspect.validation import mean_iou, read_held
from safetensors.torch import load_file
from torch import nn

TINY = Recipe(net="fast", attention="none", steps=4, batch=4, crop_px=64, mosaic=2, ema_half_life=2, fewest=0)
NORM = next(name for name, m in NETS[TINY.net](1, "none").named_modules() if isinstance(m, nn.BatchNorm2d))


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


def test_a_kill_between_curve_and_checkpoint_loses_no_row(data, tmp_path, uninterrupted, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("add_to_curve", "save_checkpoint"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"rollsight.inspect.train.{name}", killed)
            train(data, tmp_path / "cut", TINY)
    resumed = train(data, tmp_path / "cut", TINY)

    assert_same_weights(resumed, uninterrupted)
    whole, cut = ((tmp_path / run / CURVE).read_text() for run in ("whole", "cut"))
    assert cut == whole


def test_a_gradient_that_is_no_number_ends_a_training_before_it_is_followed(data, tmp_path):
    """Of this focal loss the value is one."""
    with pytest.raises(UserError, match="step 1: the gradient is nan: try a lower learning rate"):
        train(data, tmp_path / "run", replace(TINY, focal_gamma=math.inf))
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_a_full_disk_ends_a_training_in_one_line(data, tmp_path):
    """The system lets a file have 64 KiB at most: safetensors says so by an error that is no OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*checkpoint.safetensors: .*; free the disk"):
            train(data, tmp_path / "run", TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
    "change", [{"learning_rate": 1e-4}, {"steps": 5}, {"seed": 1}, {"attention": "cbam"}]
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


def test_a_checkpoint_taken_away_as_the_refusal_says_begins_a_training_of_its_own(data, val, tmp_path):
    """Neither curve nor best weights of the one before are left, whose terms were others."""
    run = tmp_path / "run"
    train(data, run, replace(PATIENT, steps=2), val=val)
    with pytest.raises(UserError, match=rf"another name, or remove the folder {run}$"):
        train(data, run, replace(TINY, loss="lovasz"))
    (run / CHECKPOINT).unlink()
    train(data, run, replace(TINY, loss="lovasz"))

    [row] = curve_of(run)
    assert list(row) == ["step", "loss", "lovasz", "small"]
    assert row["step"] == TINY.steps
    assert not (run / BEST).exists()


def test_a_curve_goes_on_from_the_checkpoint_with_whole_rows(data, tmp_path):
    """The checkpoint is of step 2; of the curve's row for step 3 and half a row of 4 nothing stays."""
    run = tmp_path / "run"
    for stop in (1, 2):
        train(data, run, TINY, stop_after=stop)
    earlier = (run / CHECKPOINT).read_bytes()
    kept = (run / CURVE).read_bytes()
    train(data, run, TINY, stop_after=3)
    (run / CHECKPOINT).write_bytes(earlier)
    with (run / CURVE).open("ab") as file:
        file.write(b"4,0.5")
    train(data, run, TINY, stop_after=2)
    assert (run / CURVE).read_bytes() == kept
    train(data, run, TINY)

    assert [row["step"] for row in curve_of(run)] == [1, 2, 4]


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
    recipe = replace(TINY, steps=20, mosaic=1, learning_rate=1e-2)

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
    for name in ("head.weight", *(f"{NORM}.running_{statistic}" for statistic in ("mean", "var"))):
        assert torch.equal(before[f"average.module.{name}"], before[f"net.{name}"])
        expected = keep * before[f"net.{name}"] + (1 - keep) * after[f"net.{name}"]
        torch.testing.assert_close(after[f"average.module.{name}"], expected)
        assert not torch.equal(after[f"average.module.{name}"], after[f"net.{name}"])


def test_the_trained_net_is_the_average_in_eval_mode_with_the_statistics_of_the_data(data, tmp_path):
    net = train(data, tmp_path / "run", TINY)
    average = load_file(tmp_path / "run" / CHECKPOINT)
    begun = NETS[TINY.net](2, "none", pretrained=True)

    assert not net.training
    assert all(torch.equal(t, average[f"average.module.{name}"]) for name, t in net.state_dict().items())
    ours, before = (one.get_buffer(f"{NORM}.running_mean") for one in (net, begun))
    assert not torch.equal(ours, before)


def test_the_learning_rate_warms_up_and_falls_to_one_percent():
    recipe = Recipe(steps=1000, warmup=0.05)
    rates = [_schedule(step, recipe) for step in range(1000)]

    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == rates[49] == rates[50] == 1
    assert rates[525] == pytest.approx(0.505)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)


def test_what_begins_from_nothing_learns_faster():
    recipe = Recipe(learning_rate=1e-3, fresh_rate=5.0, weight_decay=1e-2)
    net = NETS["fcn"](2, pretrained=True)
    rates = {
        id(parameter): (group["rate"], group["weight_decay"])
        for group in _parameter_groups(net, recipe, net.pretrained)
        for parameter in group["params"]
    }

    assert len(rates) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        rate = 1.0 if name.startswith(("stem.", "encoder.")) else 5.0
        assert rates[id(parameter)] == (rate, 1e-2 if parameter.ndim > 1 else 0.0)
    assert {group["rate"] for group in _parameter_groups(NETS["fast"](2), recipe, ())} == {5.0}


# Beginning from another model


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


def test_a_model_to_begin_from_lifts_the_refusal_of_too_few(data, tmp_path, uninterrupted):
    recipe = replace(TINY, steps=1, fewest=30)

    train(data, tmp_path / "tuned", recipe, init=(uninterrupted, model_classes(data)))


# Judged on val


@pytest.fixture
def val(labelled_folder):
    return [open_labels(labelled_folder).of_split("val")]


PATIENT = replace(TINY, steps=12, patience=2, evaluate_every=1, learning_rate=1e-2)


def curve_of(run):
    with (run / CURVE).open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_training_ends_after_its_patience_and_gives_its_best_net(data, val, tmp_path):
    net = train(data, tmp_path / "run", PATIENT, val=val)

    judged = [row["val_miou"] for row in curve_of(tmp_path / "run")]
    best = judged.index(max(judged))
    assert len(judged) == min(best + 1 + PATIENT.patience, PATIENT.steps)
    assert len(judged) < PATIENT.steps
    kept = load_file(tmp_path / "run" / BEST)
    assert all(torch.equal(t, kept[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("stops", [(1,), (2, 3)])
def test_a_patient_training_that_was_stopped_and_resumed_is_the_same(data, val, tmp_path, stops):
    recipe = replace(PATIENT, evaluate_every=2, steps=5)
    whole = train(data, tmp_path / "whole", recipe, val=val)
    for stop in stops:
        train(data, tmp_path / "cut", recipe, val=val, stop_after=stop)
    resumed = train(data, tmp_path / "cut", recipe, val=val)

    assert_same_weights(resumed, whole)
    judged = [
        [(row["step"], row["val_miou"]) for row in curve_of(tmp_path / run) if row["val_miou"] >= 0]
        for run in ("whole", "cut")
    ]
    assert judged[0] == judged[1]


def test_the_figure_on_val_is_the_pooled_miou_of_the_averaged_net(tmp_path):
    """A net that finds class 1 at its place and half of class 2; a class the source lacks is no defect."""
    truth, found = np.zeros((40, 40), dtype=np.uint8), np.zeros((64, 64), dtype=np.int64)
    truth[:10, :10], truth[20:30, :10], truth[39, 39] = 1, 2, IGNORE
    inner = found[12:52, 12:52]  # the image lies in the middle of a cell
    inner[:10, :10], inner[20:30, :5], inner[35:, 35:], found[53:, 53:] = 1, 2, 3, 1
    held = read_held(
        [source(tmp_path / "a", ("pit", "dent"), (gray((40, 40)), truth))], ("pit", "dent", "rust")
    )

    assert mean_iou(Fixed(found), held, contextlib.nullcontext) == pytest.approx((1 + 0.5) / 2)


class Fixed(nn.Module):
    """Finds the same classes (H, W) in every image."""

    def __init__(self, found):
        super().__init__()
        self.logits = nn.Parameter(nn.functional.one_hot(torch.from_numpy(found), 4).movedim(-1, 0).float())

    def forward(self, x):
        assert x.shape[2:] == self.logits.shape[1:]
        return self.logits[None]


def test_a_val_split_without_a_defect_cannot_judge(data, tmp_path):
    clean = [source(tmp_path / "a", ("pit",), (gray(), gray(value=0)))]

    with pytest.raises(UserError, match="the val split holds no defect"):
        train(data, tmp_path / "run", PATIENT, val=clean)


# What else a recipe may ask for


def test_a_val_mask_with_a_value_beyond_the_classes_judges_nothing(tmp_path):
    held = [source(tmp_path / "a", ("pit",), (gray(), gray(value=2)))]

    with pytest.raises(UserError, match=r"0_mask.png: mask value 2, but .* has 1 classes"):
        read_held(held, ("pit",))


def test_deep_supervision_trains_the_depths_that_the_net_gives(data, tmp_path):
    deep = replace(TINY, net="unet", steps=2, deep_supervision=True)
    net = train(data, tmp_path / "deep", deep)
    plain = train(data, tmp_path / "plain", replace(deep, deep_supervision=False))

    torch.manual_seed(TINY.seed)
    begun = NETS["unet"](2, "none", pretrained=True).depths[0].weight
    assert torch.equal(plain.depths[0].weight, begun)  # what no loss sees stays as it began
    assert not torch.equal(net.depths[0].weight, begun)


def test_a_teacher_is_learned_from_in_the_classes_that_it_shares(data, tmp_path, uninterrupted):
    """The teacher's channels are found by name; classes that the net does not have are left out."""
    torch.manual_seed(1)
    teacher = NETS["fast"](3, "cbam")
    figures = []
    recipe = replace(TINY, steps=4, teacher="0" * 64)

    taught = train(
        data,
        tmp_path / "taught",
        recipe,
        teacher=(teacher, ("scratch", "rust", "pit")),
        on_step=lambda _, row: figures.append(row),
    )

    assert all(row["teacher"] > 0 for row in figures)
    assert not torch.equal(taught.head.weight, uninterrupted.head.weight)


def test_its_own_teacher_has_nothing_to_say_at_first(data, tmp_path, uninterrupted):
    """Only the norms differ: those of the batch in the net, those it has gathered in the teacher."""
    figures = []
    classes = model_classes(data)
    for name, taught_by in (("same", classes), ("swapped", classes[::-1])):
        train(
            data,
            tmp_path / name,
            replace(TINY, steps=1, frozen_norms=True),
            init=(uninterrupted, classes),
            teacher=(copy.deepcopy(uninterrupted), taught_by),
            on_step=lambda _, row: figures.append(row["teacher"]),
        )

    assert figures[0] == pytest.approx(0, abs=1e-6)
    assert figures[1] > 1e-4


def test_a_teacher_that_shares_no_class_is_refused(data, tmp_path, uninterrupted):
    with pytest.raises(UserError, match="teacher knows rust, hole, the data labels pit, scratch"):
        train(data, tmp_path / "run", TINY, teacher=(uninterrupted, ("rust", "hole")))


def test_the_folder_of_a_training_says_what_it_is(data, tmp_path):
    train(data, tmp_path / "run", replace(TINY, steps=1))

    config = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert config["recipe"] == asdict(replace(TINY, steps=1))
    assert config["data"] == [data[0].digest()]


# What cannot be trained on


def test_a_mask_value_without_a_class_is_refused_with_the_file(tmp_path):
    data = source(tmp_path / "a", ("pit",), (gray(), gray(value=2)))

    with pytest.raises(UserError, match=r"0_mask.png: mask value 2, but .* has 1 classes"):
        train([data], tmp_path / "run", TINY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop_px": 100}, "a crop of 100 px: it must be a multiple of 64"),
        ({"net": "resnet"}, "net is 'resnet': it must be one of .*unet_lite"),
        ({"attention": "transformer"}, "attention is 'transformer': it must be one of none"),
        ({"loss": "hinge"}, "loss is 'hinge': it must be one of dice_focal"),
        ({"instance": "ici"}, "instance is 'ici': it must be one of none, blob, cc_dice"),
        ({"copy_paste": 1.5}, "copy_paste is 1.5: a share is 0 to 1"),
        ({"clean_share": 0.6, "balanced": 0.6}, "are 1.2 together"),
        ({"modality_dropout": 1.0}, "modality_dropout is 1: a probability below 1"),
        ({"evaluate_every": 0}, "evaluated every 0 steps"),
        ({"patience": 2}, "patience is 2, but no source has a val split"),
        ({"deep_supervision": True}, "fast gives no logits of coarser depths"),
        ({"fewest": 30}, r"class 'pit': 2 components to learn from, .* needs 30.*--init"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_in_one_line(data, tmp_path, change, said):
    with pytest.raises(UserError, match=said) as error:
        train(data, tmp_path / "run", replace(TINY, **change))
    assert error.value.exit_code == USAGE
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("shares", [(1.0, 2.0), (0.0,), (-1.0,), (math.nan,), (math.inf,)])
def test_shares_that_do_not_fit_the_sources_are_refused(data, tmp_path, shares):
    with pytest.raises(UserError, match="one positive share for each"):
        train(data, tmp_path / "run", TINY, shares=shares)
