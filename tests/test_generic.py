"""The generic generator: learned from several data sets, without marks, and what a rare class begins from."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels
from rollsight.synth.adversarial import read_state
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.gan import LATENT
from rollsight.synth.generator import WEIGHTS, open_generator
from rollsight.synth.generic import fit_generic, generic_data, open_generic, open_start, save_generic, suits


def labelled(root, classes, train, val=0):
    """Scenes of 96 x 96 px, one dark bar of 4 x 30 px each, of the classes in turn."""
    root.mkdir()
    rng = np.random.default_rng(len(classes))
    rows = [("image", "mask", "split", "group")]
    for i in range(train + val):
        image, mask = rng.normal(110, 4, (96, 96)), np.zeros((96, 96), dtype=np.uint8)
        x = int(rng.integers(60, 85))
        mask[20:50, x : x + 4], image[20:50, x : x + 4] = 1 + i % len(classes), 50
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_mask.png")
        rows.append((f"{i}.png", f"{i}_mask.png", "train" if i < train else "val", f"piece-{i}"))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (root / "classes.json").write_text(json.dumps(classes))
    return open_labels(root)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two data sets that have one class in common."""
    root = tmp_path_factory.mktemp("sets")
    return generic_data(
        [labelled(root / "a", ["bar", "dent"], 8, 22), labelled(root / "b", ["hole", "bar"], 4)], 32
    )


@pytest.fixture(scope="module")
def generic(found, small_fit, tmp_path_factory):
    """A generic generator of two steps, with figures of four samples."""
    folder = tmp_path_factory.mktemp("generics") / "many"
    run = folder.with_name(".many.fit")
    adversary = fit_generic(found, run, replace(small_fit, steps=2))
    return save_generic(folder, found, adversary, run, ["No licence file comes with it."], samples=4)


def test_classes_of_several_sets_are_joined_by_name_and_the_train_split_is_used(found):
    assert found.classes == found.taken == ("bar", "dent", "hole")
    assert found.counts == {"bar": 6, "dent": 4, "hole": 2}
    values = {scene.name: int(scene.mask.max()) for scene in found.scenes}
    assert len(values) == 12  # of the val split none
    assert (values["0/1.png"], values["1/0.png"], values["1/1.png"]) == (2, 3, 1)


def test_a_class_that_no_patch_can_show_is_left_out_and_why_is_said(tmp_path):
    data = labelled(tmp_path / "a", ["bar", "dent"], 4)
    whole = np.full((96, 96), 2, dtype=np.uint8)
    whole[:, 95] = 0
    for i in (1, 3):
        Image.fromarray(whole).save(tmp_path / "a" / f"{i}_mask.png")

    found = generic_data([data], 32)

    assert found.taken == ("bar",)
    assert found.left_out == {"dent": "half of its components cover more than a patch of 32 px"}
    with pytest.raises(UserError, match=r"no class to learn from \(bar: half .*; dent: half .*\): give"):
        generic_data([data], 8)


def test_it_has_no_marks_and_its_card_says_what_it_learned_from_and_how_near_it_comes(generic):
    card = generic.card

    assert {path.name for path in generic.folder.iterdir()} == {"card.json", "README.md", WEIGHTS, "fitting"}
    assert [source["images"] for source in card.trained_on] == [8, 4]
    assert [(one["source"], one["class"], one["held"]) for one in card.checks] == [
        ("a", "bar", 11),
        ("a", "dent", 11),
    ]
    for one in card.checks:
        assert one["samples"] == 4 and one["made"]["mean"] is not None
        assert one["floor"]["mean"] < one["ceiling"]["mean"]
    text = (generic.folder / "README.md").read_text()
    assert "No licence file comes with it." in text and "Too few in val for figures: hole." in text
    with pytest.raises(UserError, match=r"a generic generator has no marks .*: fit a class from it"):
        open_generator(generic.folder)


def test_a_class_of_five_patches_that_it_never_saw_begins_from_it(generic, small_fit, tmp_path):
    labels = labelled(tmp_path / "few", ["rare"], 5)
    found = fit_data(labels, "rare", alone=True, generic=True)
    assert found.from_generic
    assert found.note == (
        "class 'rare': 5 components, 30 are needed from scratch: begins from the generic generator that "
        "comes with the package"
    )
    assert suits(generic, small_fit) and not suits(generic, replace(small_fit, editor=(8, 16)))

    made = fit_generator(
        found, tmp_path / "rare", replace(small_fit, steps=1), init=open_start(generic.folder)
    )

    assert made.card.begun_from == generic.hash
    before, after = (read_state(folder / WEIGHTS)[0] for folder in (generic.folder, made.folder))
    # Its style begins as the mean of those of the classes that are known, give or take one step.
    known = before["average"]["style.0.weight"][:, LATENT:].mean(dim=1)
    assert (after["average"]["style.0.weight"][:, LATENT] - known).abs().max() < 0.01
    assert (before["average"]["stem.weight"] - after["average"]["stem.weight"]).abs().max() < 0.01


def test_with_enough_components_or_another_generator_it_is_not_begun_from(tmp_path):
    labels = labelled(tmp_path / "some", ["rare"], 5)

    assert not fit_data(labels, "rare", alone=True, generic=True, fewest=5).from_generic
    given = fit_data(labels, "rare", alone=True, begun=True, generic=True)
    assert not given.from_generic and "learned with the help of the generator given" in given.note
    with pytest.raises(UserError, match="leave --alone out"):
        fit_data(labels, "rare", alone=True)


def test_a_fit_that_was_interrupted_ends_with_the_same_bits(found, small_fit, tmp_path):
    recipe = replace(small_fit, steps=4)
    whole = fit_generic(found, tmp_path / "whole", recipe)
    fit_generic(found, tmp_path / "cut", recipe, stop_after=2)
    resumed = fit_generic(found, tmp_path / "cut", recipe)

    first, second = whole.average.state_dict(), resumed.average.state_dict()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_damaged_one_is_one_line(generic, tmp_path):
    folder = shutil.copytree(generic.folder, tmp_path / "many")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])

    with pytest.raises(UserError, match=r"generator\.safetensors: missing or not the file its card names"):
        open_start(folder)
    (folder / "card.json").write_text('{"trained_on": []}')
    with pytest.raises(UserError, match=r"card\.json: not the card of a generic generator"):
        open_start(folder)
    (folder / "card.json").unlink()
    with pytest.raises(UserError, match="no generic generator: make one with `inspect synth generic`"):
        open_generic(folder)
    with pytest.raises(UserError, match="no generator: make one with `inspect synth fit`"):
        open_start(folder)
