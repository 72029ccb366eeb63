"""The card for machines: what MLCommons' own reader makes of it."""

import hashlib
import json
from dataclasses import replace

import mlcroissant
import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.labels import open_labels
from rollsight.synth.backgrounds import open_backgrounds
from rollsight.synth.compose import Order, make_data
from rollsight.synth.data_card import open_provenance
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.new_defect import open_field
from rollsight.synth.planting import plant_roll
from rollsight.synth.strip import SimulatedStrip, simulate_roll


@pytest.fixture(scope="module")
def generator(few_scenes, small_fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generators") / "pit"
    return fit_generator(fit_data(open_labels(few_scenes), "pit"), folder, replace(small_fit, steps=2))


def opened(folder):
    """The card as mlcroissant reads it: it raises where a rule of the specification is broken."""
    found = mlcroissant.Dataset(jsonld=folder / "croissant.json")
    assert not found.metadata.ctx.issues.errors
    assert {line.rsplit('"', 2)[1] for line in found.metadata.ctx.issues.warnings} <= {
        "http://mlcommons.org/croissant/citeAs"  # there is no paper
    }
    return found


def test_a_folders_card_is_valid_and_gives_its_images_masks_and_provenance(generator, few_scenes, tmp_path):
    steel = open_backgrounds([few_scenes], generator.card.data_classes, generator.card.held_groups)
    _, card = make_data(generator, steel, Order(seed=2), 3, tmp_path / "made", licence="CC-BY-4.0")
    found, lines = opened(tmp_path / "made"), open_provenance(tmp_path / "made")

    images, masks = (list(found.records(name)) for name in ("images", "masks"))
    assert sorted(one["images/filename"].decode() for one in images) == sorted(
        line["image"].rsplit("/", 1)[1] for line in lines
    )
    for one in masks:
        with Image.open(tmp_path / "made/train/masks" / one["masks/filename"].decode()) as mask:
            assert np.array_equal(np.asarray(one["masks/content"])[..., 0], np.asarray(mask))
    told = {one["provenance/index"]: one for one in found.records("provenance")}
    for line in lines:
        one = told[line["index"]]
        assert one["provenance/sha256"].decode() == line["sha256"]
        assert one["provenance/background.y"] == line["background"]["y"]
        kept = [mark["contrast_kept"] for mark in line["marks"]]
        assert one["provenance/marks.contrast_kept"] == pytest.approx(kept)
    assert [one["samples/split"] for one in found.records("samples")] == [b"train"] * 3
    assert [one["classes/name"] for one in found.records("classes")] == ["pit", "scratch"]
    assert found.metadata.license == ["CC-BY-4.0"]
    assert found.metadata.data_limitations == card["known_failures"]
    assert f"{card['reject_rate']:.1%} rejected" in found.metadata.data_preprocessing_protocol[0]
    assert f"{len(card['sources'])} labelled images" in found.metadata.data_collection
    for file in json.loads((tmp_path / "made/croissant.json").read_text())["distribution"]:
        if "sha256" in file:
            content = (tmp_path / "made" / file["contentUrl"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_a_rolls_card_is_valid_and_gives_its_truth(generator, tmp_path):
    roll = simulate_roll(tmp_path / "S-1.zarr", SimulatedStrip(3.0, 6, width_px=300))
    plant_roll(open_field(generator, roll, Order(seed=1)), tmp_path / "S-2.zarr", 3)
    found = opened(tmp_path / "S-2.zarr")

    assert found.metadata.license == ["not stated: ask whom labels and steel are from"]
    truth = list(found.records("truth"))
    assert sum(one["truth/class"] == b"pit" for one in truth) >= 3
    assert [one["provenance/roll"] for one in found.records("provenance")] == [b"S-2"] * 3
    assert any("both belong to one split" in line for line in found.metadata.data_limitations)
