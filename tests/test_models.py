"""The model file: what is saved is opened, and nothing damaged or foreign is taken for a model."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from rollsight.inspect.errors import UserError
from rollsight.inspect.models import (
    CARD,
    GRAPH,
    MAX_CARD_BYTES,
    README,
    SHIPPED,
    WEIGHTS,
    open_model,
    save_model,
    sha256_of,
    update_card,
)
from rollsight.inspect.nets.reach import halo_px
from rollsight.inspect.plant import Plant
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.fixture
def model(small_model, tmp_path):
    """A copy of the small model that may be damaged, in a folder of models."""
    shutil.copytree(small_model.folder, tmp_path / "models" / "small")
    return open_model("small", tmp_path / "models")


def change_card(model, **changes):
    """Edit fields of the card on disk, as by hand."""
    path = model.folder / CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(model, match):
    """The line that the model is refused with, by opening it or by building its net."""
    with pytest.raises(UserError, match=match) as error:
        open_model("small", model.folder.parent).net()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Tiny(nn.Module):
    """A net of one convolution with the two halves that an export needs, quick to export."""

    def __init__(self, by_width: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_width = by_width
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm: nn.Module = nn.Identity()
        self.head = nn.Conv2d(4, 3, 1)

    def stem_of(self, plane):
        return self.stem(plane)

    def from_stem(self, features):
        return self.head(self.norm(features)) * (features.shape[3] / 64 if self.by_width else 1)

    def forward(self, x):
        features = self.stem_of(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (-1, x.shape[1]))
        return self.from_stem(features.mean(dim=1))


def card_of(model):
    return model.card.model_dump(exclude={"halo_px", "weights_sha256", "graph_sha256"})


# Round trip


def test_a_saved_model_is_opened_with_its_card_and_its_weights(small_model, untrained_net):
    found = open_model("small", small_model.folder.parent)

    assert found == small_model
    assert found.card.classes == ("pit", "scratch")
    assert found.thresholds == (0.5, 0.25)
    assert found.card.halo_px == halo_px(untrained_net)
    net, expected = found.net(), untrained_net.state_dict()
    assert not net.training
    assert net.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in net.state_dict().items())


def test_a_model_is_found_by_name_or_by_path(small_model, tmp_path):
    assert open_model(str(small_model.folder), tmp_path).card.name == "small"


def test_a_model_file_holds_weights_graph_card_and_readme_and_nothing_else(small_model):
    assert {path.name for path in small_model.folder.iterdir()} == {WEIGHTS, GRAPH, CARD, README}
    assert list(small_model.folder.parent.iterdir()) == [small_model.folder]
    assert small_model.folder.stat().st_mode & 0o777 == 0o755


def test_the_readme_tells_what_the_card_says(model):
    figures = {"miou": (0.75, 0.7, 0.8)}
    update_card(
        model,
        notes=["Only for tests."],
        trained_on=[{"source": "neu_clean", "split": "train", "images": 620, "groups": 620}],
        metrics=[{"data": "neu_clean", "split": "val", "n_images": 169, "figures": figures}],
    )

    text = (model.folder / README).read_text()

    assert "classes: pit, scratch" in text
    assert "- Only for tests." in text
    assert "- neu_clean (train): 620 images, 620 groups" in text
    assert "| miou | 0.750 | 0.700 to 0.800 |" in text
    assert "- scratch: 0.25" in text


def test_the_readme_tells_on_what_thresholds_and_temperature_were_fitted(model):
    source = {"source": "mt", "split": "val", "images": 80, "groups": 30, "digest": "ab" * 32}
    update_card(model, temperature=1.25, budget=30.0, thresholds_basis="By budget.", calibrated_on=source)

    text = (model.folder / README).read_text()

    assert "By budget." in text
    assert "Temperature of the probabilities: 1.25. Data: mt (val), 80 images, 30 groups" in text
    assert open_model("small", model.folder.parent).card.temperature == 1.25


def test_a_changed_card_is_read_back_and_the_hash_of_the_model_stays(model):
    changed = update_card(model, thresholds={"pit": 0.75, "scratch": 0.125})

    assert open_model("small", model.folder.parent).thresholds == (0.75, 0.125)
    assert changed.hash == model.hash


def test_the_hash_names_the_weights_the_net_and_the_classes(model):
    other = [
        update_card(model, weights_sha256="0" * 64).hash,
        update_card(model, net_options={"attention": "none"}).hash,
        update_card(model, classes=("scratch", "pit")).hash,
    ]

    assert len({model.hash, *other}) == 4


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_opens_by_its_name_and_no_new_one_takes_it(name, tmp_path):
    plant = Plant(tmp_path)
    assert plant.model(name).folder == SHIPPED[name]
    with pytest.raises(UserError, match=f"model '{name}' exists: choose another name"):
        plant.check_new_model(name)


def test_a_plant_that_has_a_model_called_fast_keeps_its_own(model):
    """It was made before a model of that name was shipped."""
    shutil.copytree(model.folder, model.folder.parent / "fast")
    assert open_model("fast", model.folder.parent).folder == model.folder.parent / "fast"


# Damaged or foreign


def test_a_model_that_is_not_there_is_refused_with_those_that_are(model):
    with pytest.raises(
        UserError, match="no model 'other': there are default, fast, small, or give a model's folder"
    ):
        open_model("other", model.folder.parent)


@pytest.mark.parametrize("name", [WEIGHTS, GRAPH])
def test_damaged_or_missing_weights_and_graphs_are_refused(model, name):
    path = model.folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(model, f"{name}: missing or not the file that card.json names")

    path.write_bytes(b"")
    refused(model, f"{name}: missing or not the file")

    path.unlink()
    refused(model, f"{name}: missing or not the file")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"schema_version": 1}'])
def test_a_damaged_card_is_refused(model, content):
    (model.folder / CARD).write_bytes(content)
    refused(model, r"card.json: not a model card: ")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"thresholds": {"pit": 0.5}}, "thresholds: needs one per class"),
        ({"thresholds": {"pit": 0.5, "scratch": 0.5, "scale": 0.5}}, "thresholds: needs one per class"),
        ({"thresholds": {"pit": 0.5, "scratch": 1.0}}, "thresholds: each is a probability"),
        ({"thresholds": {"pit": 0.5, "scratch": float("nan")}}, "card.json: not a model card"),
        ({"classes": ["pit", "pit"]}, "classes: a name stands twice"),
        ({"classes": []}, "classes: "),
        ({"halo_px": 200}, "halo_px is 200: it must be a multiple of the 64 px cell"),
        ({"halo_px": -64}, "halo_px: "),
        ({"halo_px": 1 << 20}, "halo_px: "),
        ({"name": "../x"}, "name: "),
        ({"temperature": 0.0}, "temperature: "),
        ({"budget": -1.0}, "budget: "),
        ({"weights_sha256": "0"}, "weights_sha256: "),
        ({"schema_version": 2}, "schema_version: "),
        ({"extra": 1}, "extra: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_card_that_contradicts_itself_is_refused(model, changes, match):
    change_card(model, **changes)
    refused(model, match)


def test_a_card_that_is_too_large_is_refused(model):
    change_card(model, notes=["x" * MAX_CARD_BYTES])
    refused(model, rf"card.json: \d+ bytes: a model card has at most {MAX_CARD_BYTES}")


def test_a_halo_below_the_reach_of_the_net_is_refused(model):
    change_card(model, halo_px=192)
    refused(model, "halo_px is 192, the net sees 256 px")


def test_a_net_that_this_version_lacks_is_refused_with_those_it_has(model):
    change_card(model, net="deeplab")
    refused(model, "needs the net 'deeplab': this version has fcn, unet, unet_lite, ")


@pytest.mark.parametrize("options", [{"attention": "cbma"}, {"depth": "5"}])
def test_options_that_the_net_does_not_know_are_refused(model, options):
    change_card(model, net_options=options)
    refused(model, "net_options .* do not fit unet_lite")


def test_weights_of_another_net_are_refused(model):
    change_card(model, net_options={"attention": "none"})
    refused(model, "weights.safetensors: not the weights of unet_lite: ")


@pytest.mark.parametrize("broken", [b"", b"\xff" * 64])
def test_weights_that_are_no_safetensors_are_refused_even_where_the_card_names_them(model, broken):
    (model.folder / WEIGHTS).write_bytes(broken)
    change_card(model, weights_sha256=sha256_of(model.folder / WEIGHTS))
    refused(model, "weights.safetensors: not the weights of unet_lite: ")


def test_weights_without_a_tensor_are_refused(model):
    tensors = load_file(model.folder / WEIGHTS)
    del tensors["head.bias"]
    save_file(tensors, model.folder / WEIGHTS)
    change_card(model, weights_sha256=sha256_of(model.folder / WEIGHTS))
    refused(model, "not the weights of unet_lite: .*head.bias")


# Whole or not at all


def test_saving_over_a_model_replaces_it(model):
    saved = save_model(model.folder, Tiny(), {**card_of(model), "notes": ["new"]})

    assert open_model("small", model.folder.parent) == saved
    assert saved.card.notes == ["new"]
    assert [path.name for path in model.folder.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("fault", ["card", "net", "graph"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(model, fault):
    before, net, card = files_of(model.folder), Tiny(by_width=fault == "graph"), card_of(model)
    if fault == "card":
        card["thresholds"] = {"pit": 0.5}
    elif fault == "net":
        net.norm = nn.GroupNorm(2, 4)

    with pytest.raises((ValueError, RuntimeError), match=r"one per class|in tiles|ONNX graph differs"):
        save_model(model.folder, net, card)

    assert files_of(model.folder) == before
    assert [path.name for path in model.folder.parent.iterdir()] == ["small"]


def test_a_save_says_nothing(tmp_path, model, capfd):
    save_model(tmp_path / "quiet", Tiny(), card_of(model))

    assert capfd.readouterr() == ("", "")


def test_a_failed_first_save_leaves_nothing(model, tmp_path):
    with pytest.raises(ValidationError):
        save_model(tmp_path / "new" / "model", Tiny(), {**card_of(model), "classes": ()})

    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_is_no_model_is_never_replaced(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "family.jpg").write_bytes(b"dear")

    with pytest.raises(UserError, match="photos: exists and is not a model: choose another folder"):
        save_model(tmp_path / "photos", Tiny(), card_of(model))

    assert (tmp_path / "photos" / "family.jpg").read_bytes() == b"dear"
