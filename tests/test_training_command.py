"""`inspect train`, each option once, and what a training leaves in its model's folder."""

import csv
import inspect
import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.golden import GOLDEN
from rollsight.inspect.labels import open_labels
from rollsight.inspect.models import open_model
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.rolls import LabelWriter, RollWriter, Strip, roll_path
from rollsight.jobs.cli import app
from rollsight.jobs.commands.training import train
from rollsight.jobs.train_job import describe_apart
from safetensors.numpy import load_file

SMALLEST = ["--crop-px", "64", "--batch", "4", "--attention", "none", "--threads", "1"]


def run(home, *arguments):
    app([*map(str, arguments), "--home", str(home)], standalone_mode=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 128 px with pits and scratches, one of them clean: four to train on, two to judge by."""
    root = tmp_path_factory.mktemp("data")
    (root / "classes.json").write_text(json.dumps(["pit", "scratch"]))
    rng = np.random.default_rng(0)
    rows = []
    for i, split in enumerate(["train"] * 4 + ["val"] * 2):
        mask = np.zeros((128, 128), dtype=np.uint8)
        if i:
            mask[4:100:20, 4:100:24], mask[8:100:20, 4:100:24] = 1, 1
            mask[106:110, 10:118], mask[122:124, 10:118:4] = 2, 2
        image = rng.normal(128, 4, mask.shape) + 60 * (mask == 1) - 60 * (mask == 2)
        Image.fromarray(image.astype(np.uint8)).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_mask.png")
        rows.append((f"{i}.png", f"{i}_mask.png", split, f"piece-{i}"))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "split", "group"), *rows])
    return root


@pytest.fixture(scope="module")
def home(data, tmp_path_factory):
    """A plant with `deep`, a model trained with all that a source of one lighting mode allows."""
    home = tmp_path_factory.mktemp("plant")
    run(
        *(home, "train", "deep", "--data", data, *SMALLEST, "--net", "unet", "--deep-supervision"),
        *("--mosaic", 1, "--loss", "boundary", "--focal-gamma", 2, "--small-weight", 0.3),
        *("--instance", "cc_dice", "--instance-weight", 0.7, "--clean-share", 0.25, "--small-crops", 0.25),
        *("--balanced", 0.25, "--copy-paste", 0.5, "--light-gradient", 0.5, "--warped", 0.75),
        *("--learning-rate", 0.002, "--fresh-rate", 2),
        *("--steps", 3, "--patience", 1, "--evaluate-every", 1, "--seed", 3, "--note", "All of it."),
    )
    return home


def test_the_card_has_what_was_asked_for(home):
    card = open_model("deep", home / "models").card

    asked = {
        "net": "unet",
        "attention": "none",
        "mosaic": 1,
        "loss": "boundary",
        "focal_gamma": 2,
        "small_weight": 0.3,
        "instance": "cc_dice",
        "instance_weight": 0.7,
        "deep_supervision": True,
        "clean_share": 0.25,
        "small_crops": 0.25,
        "balanced": 0.25,
        "copy_paste": 0.5,
        "warped": 0.75,
        "light_gradient": 0.5,
        "learning_rate": 0.002,
        "fresh_rate": 2,
        "steps": 3,
        "patience": 1,
        "evaluate_every": 1,
        "seed": 3,
    }
    assert {name: card.recipe[name] for name in asked} == asked
    assert card.recipe.keys() >= {field.name for field in fields(Recipe)}
    assert card.notes == ["All of it."]
    assert [(m["split"], m["n_images"]) for m in card.metrics] == [("val", 2)]


def test_a_model_keeps_configuration_curve_and_pictures_of_its_training(home):
    kept = home / "models" / "deep" / "training"

    assert json.loads((kept / "config.json").read_text())["recipe"]["loss"] == "boundary"
    with (kept / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 2 <= len(rows) <= 3
    assert rows[0].keys() == {"step", "loss", "dice", "focal", "boundary", "small", "instance", "val_miou"}
    for name in ("curve.png", "worst_1.png"):
        with Image.open(kept / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert {path.name for path in kept.iterdir()} == {"config.json", "curve.csv", "curve.png", "worst_1.png"}
    assert [path.name for path in (home / "models").iterdir()] == [
        "deep"
    ]  # nothing is left of the checkpoints


def test_a_class_with_too_few_samples_is_refused_and_fine_tuning_offered(home, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "train" / part).mkdir(parents=True)
    (tmp_path / "classes.json").write_text(json.dumps(["pit"]))
    for i in range(20):
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[i : i + 8, 20:30] = 1
        Image.fromarray(100 + 50 * mask).save(tmp_path / "train" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "train" / "masks" / f"{i}.png")

    with pytest.raises(UserError, match=r"class 'pit': 20 components .* needs 30: .* --init") as error:
        run(home, "train", "few", "--data", tmp_path, *SMALLEST, "--net", "fast", "--steps", 1)
    assert error.value.exit_code == USAGE


def test_a_model_of_two_lighting_modes_learns_from_a_teacher_and_is_tuned(home, tmp_path, capsys):
    roll = two_modes(tmp_path)
    options = [*SMALLEST, "--net", "fast", "--steps", 2, "--loss", "lovasz", "--json"]

    run(home, "train", "taught", "--data", roll, *options, "--teacher", "deep", "--modality-dropout", 0.5)
    more = ["--init", "taught", "--frozen-norms", "--instance", "blob", "--batch", 8]
    twice = ["--data", roll.parent, "--share", 2, "--share", 1, "--exhaustive", roll]
    run(home, "train", "tuned", "--data", roll, *options, *more, *twice)

    taught, tuned = (open_model(name, home / "models") for name in ("taught", "tuned"))
    deep = open_model("deep", home / "models")
    assert taught.card.recipe["teacher"] == deep.hash
    assert taught.card.recipe["modality_dropout"] == 0.5
    assert (
        (taught.folder / "training" / "curve.csv").read_text().startswith("step,loss,lovasz,small,teacher\n")
    )
    assert tuned.card.recipe["init"] == taught.hash
    assert tuned.card.recipe["frozen_norms"] is True
    assert (tuned.card.recipe["shares"], tuned.card.recipe["exhaustive"]) == ([2, 1], [True, False])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["card"]["name"] for one in told] == ["taught", "tuned"]


def test_golden_windows_are_of_rolls_where_there_are_some(data, tmp_path):
    """Images of others may not be passed on with a model."""
    dark = labelled_roll(tmp_path, {"dark": 40})

    run(
        tmp_path,
        "train",
        "both",
        "--data",
        data,
        "--data",
        dark,
        *SMALLEST,
        "--mosaic",
        1,
        "--steps",
        1,
        "--net",
        "fast",
    )

    windows = load_file(open_model("both", tmp_path / "models").folder / GOLDEN)["windows"]
    assert 0 < windows.max() < 0.5  # the images are at 128 of 255 and above


def test_two_sources_of_one_folder_name_are_told_apart_on_the_card(data, tmp_path):
    """Each line has its folder `labels`: the figures of one do not take the place of the other's."""
    lines = [tmp_path / line / "labels" for line in ("line-1", "line-2")]
    for folder in lines:
        shutil.copytree(data, folder)
    manifest = lines[1] / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("piece-", "coil-"))
    options = [*SMALLEST, "--mosaic", 1, "--steps", 1, "--net", "fast"]
    run(tmp_path, "train", "m", "--data", lines[0], "--data", lines[1], *options)
    run(tmp_path, "evaluate", "m", "--data", lines[1], "--split", "val", "--card")

    card = open_model("m", tmp_path / "models").card
    assert [entry["source"] for entry in card.trained_on] == ["line-1/labels", "line-2/labels"]
    assert [(m["data"], m["split"]) for m in card.metrics] == [
        ("line-1/labels", "val"),
        ("line-2/labels", "val"),
    ]
    run(tmp_path, "calibrate", "m", "--data", lines[0])
    card = open_model("m", tmp_path / "models").card
    assert card.calibrated_on["source"] == "line-1/labels"
    assert [m["data"] for m in card.metrics] == ["line-1/labels"]


def test_sources_are_named_by_no_more_folders_than_tell_them_apart(data, tmp_path):
    """Data that is given twice is one source and keeps its name; rolls are named by their folder."""
    for folder in ("a/x/labels", "b/x/labels"):
        shutil.copytree(data, tmp_path / folder)
    (tmp_path / "b/x/labels/classes.json").write_text('["scratch", "pit"]')
    for line, lighting in (("a", {"bright": 120}), ("b", {"bright": 140})):
        labelled_roll(tmp_path / line, lighting)
    labels = [open_labels(tmp_path / line / "x/labels") for line in ("a", "b")]
    rolls = [open_labels(path) for path in (roll_path(tmp_path / "a", "R1"), tmp_path / "b")]

    def names(*sources):
        return [entry["source"] for entry in describe_apart(sources, "train")]

    assert names(*labels, *rolls) == ["a/x/labels", "b/x/labels", "roll R1 in a", "roll R1 in b"]
    assert names(labels[0], labels[0], rolls[0]) == ["labels", "labels", "roll R1"]


def two_modes(folder):
    """A labelled roll of 256 x 512 px in two lighting modes, with 60 pits."""
    return labelled_roll(folder, {"bright": 120, "dark": 120})


def labelled_roll(folder, lighting):
    """A labelled roll of 256 x 512 px with 60 pits, brighter in the first mode and darker in the second."""
    mask = np.zeros((256, 512), dtype=np.uint8)
    mask[4:240:40, 4:480:48] = mask[5:240:40, 4:480:48] = 1
    pixels = (
        np.random.default_rng(0).normal(0, 4, (len(lighting), *mask.shape))
        + np.array([*lighting.values()])[:, None, None]
        + np.array([60, -60])[: len(lighting), None, None] * mask
    )
    path = roll_path(folder, "R1")
    strip = Strip("R1", "top", tuple(lighting), mm_per_px_x=0.5, mm_per_line=0.5)
    with RollWriter(path, strip, mask.shape[1], np.uint8) as writer:
        writer.append(pixels.astype(np.uint8))
    labels = LabelWriter.create(path, "truth", ("pit",), lines=256, width=512, shard_lines=4096)
    labels.write(0, mask)
    labels.close()
    return path


def test_a_val_mask_with_a_value_beyond_the_classes_is_refused_before_the_first_step(data, tmp_path):
    """It was told after all steps, or learned as background where a patience judges by it."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    Image.fromarray(np.full((128, 128), 3, dtype=np.uint8)).save(copy / "4_mask.png")

    with pytest.raises(UserError, match=r"4_mask.png: mask value 3, but .* has 2 classes"):
        run(tmp_path / "plant", "train", "m", "--data", copy, *SMALLEST, "--steps", 1)
    assert not list((tmp_path / "plant").rglob("*.training"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learning-rate", "0"], "learning_rate is 0: it must be above 0; 0.001 is usual"),
        (["--fresh-rate", "-1"], "fresh_rate is -1: it must be above 0; 5 is usual"),
        (["--frozen-norms"], "--frozen-norms needs --init"),
        (["--net", "resnet"], "net is 'resnet'"),
        (["--init", "deep", "--net", "fast"], "begin from a model of the same net"),
        (["--modality-dropout", "0.5"], "one lighting mode"),
        (["--init", "nope"], "no model 'nope'"),
    ],
)
def test_what_cannot_be_done_is_one_line(home, data, options, said):
    with pytest.raises(UserError, match=said) as error:
        run(home, "train", "m", "--data", data, *SMALLEST, *options)
    assert "\n" not in str(error.value)


def test_the_defaults_of_the_command_are_those_of_the_recipe():
    recipe = Recipe()
    defaults = {name: option.default for name, option in inspect.signature(train).parameters.items()}

    told = {field.name for field in fields(Recipe)} & defaults.keys() - {"init", "teacher"}
    assert {name: defaults[name] for name in told} == {name: getattr(recipe, name) for name in told}
    hidden = {"weight_decay", "warmup", "ema_half_life", "small_ramp", "fewest", "init", "teacher"}
    assert {field.name for field in fields(Recipe)} - told == hidden
