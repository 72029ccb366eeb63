"""A fit: resumes bit by bit, stops where a loss is no number, tells of what it cannot use."""

import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels
from rollsight.synth.adversarial import STATE, read_state
from rollsight.synth.fit_recipe import FitRecipe, check_fit_recipe
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.generator import WEIGHTS, open_generator
from rollsight.synth.mask_bank import narrow
from rollsight.synth.patch_batches import PatchSampler
from rollsight.synth.patches import Scene


@pytest.fixture
def scenes(few_scenes, tmp_path):
    """A copy of them that a test may change."""
    return shutil.copytree(few_scenes, tmp_path / "scenes")


def weights(folder):
    parts, _ = read_state(folder / WEIGHTS)
    return {f"{part}/{key}": t for part, of in parts.items() for key, t in of.items()}


KILLED = """
import os, signal, sys
from pathlib import Path
from rollsight.inspect.labels import open_labels
from rollsight.synth.fit_recipe import FitRecipe
from rollsight.synth.fitting import fit_data, fit_generator
recipe = FitRecipe(
    steps=6, size_px=32, editor=(8, 12), judge=(8, 12, 16), batch=2, checkpoint_every=2, penalty_every=2
)
found = fit_data(open_labels(Path(sys.argv[1])), "scratch")
stop = lambda step, _: os.kill(os.getpid(), signal.SIGKILL) if step == 5 else None
fit_generator(found, Path(sys.argv[2]), recipe, on_step=stop)
"""


def test_a_fit_that_was_killed_ends_with_the_same_bits(scenes, tmp_path, small_fit):
    found = fit_data(open_labels(scenes), "scratch")
    whole = fit_generator(found, tmp_path / "whole", small_fit)

    killed = subprocess.run(
        [sys.executable, "-c", KILLED, scenes, tmp_path / "killed"], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / ".killed.fit" / STATE).is_file() and not (tmp_path / "killed").exists()
    resumed = fit_generator(found, tmp_path / "killed", small_fit)

    first, second = weights(whole.folder), weights(resumed.folder)
    assert first.keys() == second.keys() and len(first) > 50
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert whole.hash == resumed.hash
    curve = (resumed.folder / "fitting" / "curve.csv").read_text()
    assert curve == (whole.folder / "fitting" / "curve.csv").read_text()
    assert [line.split(",")[0] for line in curve.splitlines()] == ["step", "2", "4", "6"]
    with Image.open(resumed.folder / "fitting" / "samples-000006.png") as sheet:
        assert sheet.size == (2 * 34 * 10, 2 * 34 * 5)
    assert not list(tmp_path.glob(".*.fit"))


def test_a_fit_by_the_px_begins_from_one_by_the_patch_and_resumes_bit_by_bit(scenes, tmp_path, small_fit):
    found = fit_data(open_labels(scenes), "scratch")
    first = fit_generator(found, tmp_path / "first", small_fit)
    by_px = replace(small_fit, per_pixel=True)
    whole = fit_generator(found, tmp_path / "whole", by_px, init=first)

    assert fit_generator(found, tmp_path / "cut", by_px, init=first, stop_after=4) is None
    cut = fit_generator(found, tmp_path / "cut", by_px, init=first)
    onward = fit_generator(
        found, tmp_path / "onward", replace(by_px, steps=1, learning_rate=(1e-9, 1e-9)), init=whole
    )

    assert weights(whole.folder).keys() == weights(cut.folder).keys()
    assert all(torch.equal(t, weights(cut.folder)[key]) for key, t in weights(whole.folder).items())
    taken = weights(onward.folder)["judge/head.weight"] - weights(whole.folder)["judge/head.weight"]
    assert taken.abs().max() < 1e-6  # one by the px is taken over
    assert open_generator(whole.folder).card.recipe["per_pixel"] is True


def test_a_fit_whose_state_was_taken_away_begins_a_curve_of_its_own(scenes, tmp_path, small_fit):
    found = fit_data(open_labels(scenes), "scratch")
    fit_generator(found, tmp_path / "g", small_fit, stop_after=4)
    (tmp_path / ".g.fit" / STATE).unlink()

    generator = fit_generator(found, tmp_path / "g", small_fit)

    curve = (generator.folder / "fitting" / "curve.csv").read_text()
    assert [line.split(",")[0] for line in curve.splitlines()] == ["step", "2", "4", "6"]


def test_the_card_says_what_was_learned_from_and_what_was_held_back(scenes, tmp_path, small_fit):
    generator = fit_generator(
        fit_data(open_labels(scenes), "scratch"), tmp_path / "g", replace(small_fit, steps=1)
    )

    card = generator.card
    assert (card.classes, card.scenes, card.components) == (("pit", "scratch"), 3, 3)
    assert card.held_groups == ("piece-6", "piece-7")
    assert {mark.group for mark in generator.bank.marks} == {"piece-1", "piece-3", "piece-5"}
    assert str(tmp_path) not in (generator.folder / "card.json").read_text()


def test_few_components_need_other_classes_or_a_generator_to_begin_from(scenes, tmp_path, small_fit):
    labels = open_labels(scenes)

    assert (
        "3 components, 30 are needed from scratch: learned with the help of 1 other"
        in fit_data(labels, "scratch").note
    )
    with pytest.raises(UserError, match="leave --alone out, so that other classes help, or begin from"):
        fit_data(labels, "scratch", alone=True)
    base = fit_generator(fit_data(labels, "pit"), tmp_path / "base", replace(small_fit, steps=2))
    tuned = fit_generator(
        fit_data(labels, "scratch", alone=True, begun=True),
        tmp_path / "t",
        replace(small_fit, steps=1),
        init=base,
    )

    assert tuned.card.begun_from == base.hash and tuned.card.classes == ("scratch",)
    before, after = weights(base.folder), weights(tuned.folder)
    assert (before["average/stem.weight"] - after["average/stem.weight"]).abs().max() < 0.01


def test_a_loss_that_is_no_number_ends_the_fit_in_one_line(scenes, tmp_path, small_fit):
    found = fit_data(open_labels(scenes), "scratch")
    assert fit_generator(found, tmp_path / "g", small_fit, stop_after=2) is None
    hot = replace(small_fit, learning_rate=(1e30, 1e30))

    with pytest.raises(UserError, match=r"g: its fit was interrupted: the same `inspect synth fit` goes on"):
        open_generator(tmp_path / "g")
    with pytest.raises(UserError, match=r"step \d+: the loss of the (judge|editor) is (nan|inf)"):
        fit_generator(found, tmp_path / "hot", hot)
    assert fit_generator(found, tmp_path / "g", small_fit) is not None


def test_a_damaged_checkpoint_and_another_fits_are_refused(scenes, tmp_path, small_fit):
    found = fit_data(open_labels(scenes), "scratch")
    fit_generator(found, tmp_path / "g", small_fit, stop_after=2)
    state = tmp_path / ".g.fit" / STATE

    with pytest.raises(UserError, match="of a fit with other options or data: choose another --name"):
        fit_generator(found, tmp_path / "g", replace(small_fit, seed=1))
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"not a checkpoint of a fit .*: remove it and fit from the start"):
        fit_generator(found, tmp_path / "g", small_fit)


def test_a_generator_whose_files_do_not_belong_together_is_refused(scenes, tmp_path, small_fit):
    folder = fit_generator(
        fit_data(open_labels(scenes), "scratch"), tmp_path / "g", replace(small_fit, steps=1)
    ).folder
    (folder / WEIGHTS).write_bytes(b"no weights")

    with pytest.raises(UserError, match="missing or not the file its card names: fit the generator again"):
        open_generator(folder)
    (folder / "card.json").write_text("{}")
    with pytest.raises(UserError, match="not the card of a generator"):
        open_generator(folder)
    with pytest.raises(UserError, match="no generator: make one with `inspect synth fit`"):
        open_generator(tmp_path / "none")


def test_empty_masks_and_one_px_defects_are_one_clear_line(scenes, small_fit):
    for i in range(6):
        mask = np.zeros((96, 90), dtype=np.uint8)
        mask[5, 5] = i % 2  # one px of pit
        Image.fromarray(mask).save(scenes / f"{i}_mask.png")
    labels = open_labels(scenes)

    with pytest.raises(UserError, match="class 'scratch': 0 train images hold it and no component is 2 px"):
        fit_data(labels, "scratch")
    with pytest.raises(UserError, match="class 'pit': 3 train images hold it and no component is 2 px or"):
        fit_data(labels, "pit")
    with pytest.raises(UserError, match="class 'dent' is not known"):
        fit_data(labels, "dent")


@pytest.mark.parametrize("seed", range(4))
def test_the_only_mark_wide_enough_to_paste_is_not_held_back(seed):
    rng = np.random.default_rng(0)
    scenes = []
    for i in range(5):
        mask = np.zeros((96, 96), dtype=np.uint8)
        mask[10:20, 10:14] = i == 0
        mask[10, 10] = 1
        image = (rng.normal(0.5, 0.01, (96, 96)) + 0.3 * mask).astype(np.float32)
        scenes.append(Scene(image, mask, f"{i}", f"piece-{i}"))

    sampler = PatchSampler(
        scenes, ("pit",), ("pit",), rare="pit", rare_share=0.6, size_px=32, batch=4, seed=seed
    )

    assert not any(narrow(mask.numpy() > 0) for mask in sampler.batch(0).mask[:, 0])


def test_defects_that_no_paste_can_show_end_a_fit_in_one_line():
    """A speck in a scene of lines of 1 px: no patch of a scene shows it alone."""
    rng, mask = np.random.default_rng(0), np.zeros((96, 96), dtype=np.uint8)
    mask[40:43, 40:43] = mask[4::9] = 1
    scene = Scene(rng.normal(0.5, 0.1, mask.shape).astype(np.float32), mask, "0", "piece-0")
    steel = Scene(rng.normal(0.5, 0.1, (96, 96)).astype(np.float32), mask * 0, "1", "piece-1")
    sampler = PatchSampler(
        [scene, steel], ("pit",), ("pit",), rare="pit", rare_share=0.6, size_px=32, batch=4, seed=0
    )

    with pytest.raises(UserError, match="1000 pastes of mask value 1, none 2 px wide on a patch of 32 px"):
        sampler.batch(0)


def test_without_any_clean_steel_backgrounds_are_asked_for(scenes, tmp_path, small_fit):
    for i in range(6):
        mask = np.full((96, 90), 255, dtype=np.uint8)
        mask[40:50, 40:44] = 1 + i % 2
        Image.fromarray(mask).save(scenes / f"{i}_mask.png")

    with pytest.raises(UserError, match=r"no clean window of 32 px .*: give --backgrounds"):
        fit_generator(fit_data(open_labels(scenes), "scratch"), tmp_path / "g", small_fit)


def test_a_share_of_the_rare_pastes_lies_on_steel_of_other_scenes_whose_gray_is_near():
    """Scenes of a class on gray 0.3, of another on 0.4, clean ones of 0.9: pastes lie on 0.3, and on 0.4."""
    scenes = []
    for number, gray in enumerate((0.3, 0.3, 0.4, 0.4, 0.9, 0.9)):
        image, mask = np.full((96, 96), gray, np.float32), np.zeros((96, 96), np.uint8)
        if gray < 0.9:
            mask[60:80, 60:66] = 2 if gray == 0.3 else 1
            image[mask > 0] = 0.1
        scenes.append(Scene(image, mask, f"{number}", f"{number}"))
    made = {
        share: PatchSampler(
            scenes,
            ("pit", "scratch"),
            ("scratch",),
            rare="scratch",
            rare_share=1.0,
            size_px=32,
            batch=8,
            seed=0,
            elsewhere=share,
        )
        for share in (0.0, 0.3)
    }

    grays = {}  # of the steel: marks are darker
    for share, of in made.items():
        pastes = np.concatenate([of.batch(step).start.numpy() for step in range(40)])
        grays[share] = np.round(10 * pastes.max(axis=(1, 2, 3))).astype(int).tolist()
    assert set(grays[0.0]) == {3}
    assert 0.2 < 1 - grays[0.3].count(3) / 320 < 0.4
    assert grays[0.3].count(4) > 0.9 * (320 - grays[0.3].count(3))


def test_a_share_of_the_pastes_is_given_without_its_texture_the_others_as_they_are(scenes):
    found = fit_data(open_labels(scenes), "scratch")
    plain, some = (
        PatchSampler(
            found.scenes,
            found.data.classes,
            ("scratch",),
            rare="scratch",
            rare_share=1.0,
            size_px=32,
            batch=1,
            seed=0,
            degraded=share,
        )
        for share in (0.0, 0.5)
    )

    batches = [(plain.batch(step), some.batch(step)) for step in range(60)]

    assert all(torch.equal(first.mask, second.mask) for first, second in batches)
    assert 15 <= sum(not torch.equal(first.start, second.start) for first, second in batches) <= 45


@pytest.mark.parametrize(
    "change",
    [
        *({"size_px": 40}, {"size_px": 8}, {"steps": 0}, {"batch": 1}),
        *({"contrast_weight": math.inf}, {"residual_weight": math.nan}),
        *({"elsewhere": 2}, {"degraded": -1}, {"degraded": 0.5, "whole": True}),
        {"per_pixel": True, "whole": True},
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(change, small_fit):
    with pytest.raises(UserError):
        check_fit_recipe(replace(FitRecipe(), **change))
