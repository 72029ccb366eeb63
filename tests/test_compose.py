"""Synthetic data: labels right by construction, every sample can be made again, nothing of val or test."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.synth.backgrounds import open_backgrounds
from rollsight.synth.compose import Order, make_data, make_sample, sized
from rollsight.synth.data_card import open_provenance
from rollsight.synth.fit_recipe import FREE
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.generator import KEEP, kept_contrast, open_generator
from rollsight.synth.mask_bank import MaskBank
from rollsight.synth.placing import Density
from rollsight.synth.strip import SimulatedStrip, simulate_roll


@pytest.mark.parametrize("method", ["gan", "paste", "poisson"])
def test_samples_are_labelled_data_that_train_reads(method, generator, steel, tmp_path):
    written, card = make_data(generator, steel, Order(seed=3, method=method), 4, tmp_path / "made")

    data = open_labels(tmp_path / "made")
    assert written.counts["train"]["scratch"] == 4 == len(data.samples)
    assert data.classes == ("pit", "scratch")
    lines = open_provenance(tmp_path / "made")
    for sample, line in zip(data.samples, lines, strict=True):
        image, mask = sample.read()
        assert sample.group == line["background"]["group"]
        assert image.shape[1:] == mask.shape == (96, 90)
        for mark in line["marks"]:
            x0, y0, x1, y1 = mark["box"]
            assert (mask[y0:y1, x0:x1] == 2).sum() >= mark["area_px"] > 0
            assert mark["group"] in ("piece-1", "piece-3", "piece-5")
    assert card["samples"] == 4 and card["marks"] == sum(len(line["marks"]) for line in lines)
    assert json.loads((tmp_path / "made" / "dataset.json").read_text()) == card


def test_any_sample_is_made_again_alone_with_the_same_bits(generator, steel, tmp_path):
    order = Order(seed=11)
    make_data(generator, steel, order, 5, tmp_path / "made")
    lines = open_provenance(tmp_path / "made")

    for line in reversed(lines):
        again = make_sample(generator, steel, order, line["index"])
        assert again.provenance["sha256"] == line["sha256"]
        with Image.open(tmp_path / "made" / line["image"]) as kept:
            np.testing.assert_array_equal(np.asarray(kept), again.image)
    assert len({line["sha256"] for line in lines}) == 5
    assert make_sample(generator, steel, Order(seed=12), 0).provenance["sha256"] != lines[0]["sha256"]


def test_methods_put_the_same_marks_at_the_same_places(generator, steel):
    """So that arms of a proof are paired: they differ in how the mark is drawn, not in which and where."""
    made = [make_sample(generator, steel, Order(method=method), 1) for method in ("paste", "poisson")]

    first, second = ([mark["place"] for mark in one.provenance["marks"]] for one in made)
    assert first == second
    np.testing.assert_array_equal(made[0].mask, made[1].mask)
    assert (made[0].image != made[1].image).any()


def test_an_edited_sample_keeps_its_steel_and_its_contrast(generator, steel):
    for index in range(6):
        made = make_sample(generator, steel, Order(), index)
        away = np.ones(made.mask.shape, dtype=bool)
        for inside in made.marks:
            ys, xs = np.nonzero(inside)
            away[max(0, ys.min() - 6) : ys.max() + 7, max(0, xs.min() - 6) : xs.max() + 7] = False
            assert kept_contrast(made.start, made.image / np.float32(255), inside) > KEEP - 0.03
        background = next(
            scene for scene in steel.scenes if scene.name == made.provenance["background"]["name"]
        )
        np.testing.assert_array_equal(made.image[away], np.round(background.image * 255)[away])


def test_a_share_of_the_samples_lies_on_the_marks_own_steel_the_same_for_all_methods(generator, steel):
    own, others = (
        [scene for scene in steel.scenes if (scene.mask == 2).any() == holds] for holds in (True, False)
    )
    both = replace(steel, scenes=others, own=own, own_share=0.4)
    names = {method: [] for method in ("paste", "poisson", "gan")}
    for method, found in names.items():
        for index in range(30):
            made = make_sample(generator, both, Order(method=method), index)
            found.append(made.provenance["background"]["name"])

    on_own = [name in {scene.name for scene in own} for name in names["paste"]]
    assert 6 <= sum(on_own) <= 18
    assert names["paste"] == names["poisson"] == names["gan"]


@pytest.fixture(scope="module")
def free(few_scenes, small_fit, tmp_path_factory):
    """A generator whose editor was given half of its starts degraded."""
    folder = tmp_path_factory.mktemp("generators") / "free"
    return fit_generator(fit_data(open_labels(few_scenes), "scratch"), folder, replace(small_fit, **FREE))


def test_degraded_starts_are_told_by_mark_and_made_again_with_the_same_bits(free, steel, tmp_path):
    make_data(free, steel, Order(seed=7), 8, tmp_path / "made")
    lines = open_provenance(tmp_path / "made")

    told = [mark.get("degraded") for line in lines for mark in line["marks"]]
    assert 2 <= sum(one is not None for one in told) <= len(told) - 2
    for one in filter(None, told):
        assert one["kind"] in ("low-pass", "plain") and 0.49 < one["of_paste"] < 1.41
    for line in lines:
        assert make_sample(free, steel, Order(seed=7), line["index"]).provenance["sha256"] == line["sha256"]
        assert min(mark["contrast_kept"] for mark in line["marks"]) > KEEP - 0.03  # of the drawn contrast


def test_starts_without_the_editor_are_those_it_was_given_and_other_methods_know_none(free, generator, steel):
    free.editor.last.weight.data.mul_(30)
    changed = 0
    for index in range(6):
        made, starts, paste = (
            make_sample(free, steel, Order(method=method), index) for method in ("gan", "degraded", "paste")
        )
        np.testing.assert_array_equal(made.start, starts.start)
        np.testing.assert_array_equal(made.mask, paste.mask)
        np.testing.assert_array_equal(starts.image, np.round(starts.start * 255).astype(np.uint8))
        given = [mark for mark in starts.provenance["marks"] if "degraded" in mark]
        assert bool(given) == (starts.image != paste.image).any()
        assert not any("degraded" in mark for mark in paste.provenance["marks"])
        changed += bool(given)
    assert changed >= 1
    with pytest.raises(
        UserError, match="degraded starts: scratch was fitted without them: fit it with --free"
    ):
        make_sample(generator, steel, Order(method="degraded"), 0)


def test_the_labels_of_the_steel_stay_and_nothing_overlaps_them(generator, steel):
    for index in range(6):
        made = make_sample(generator, steel, Order(method="paste"), index)
        background = next(
            scene for scene in steel.scenes if scene.name == made.provenance["background"]["name"]
        )
        labelled = background.mask > 0
        np.testing.assert_array_equal(made.mask[labelled], background.mask[labelled])


def test_a_generator_of_whole_patches_paints_over_no_other_label(few_scenes, small_fit, steel, tmp_path):
    found = fit_data(open_labels(few_scenes), "scratch")
    made_by = fit_generator(found, tmp_path / "whole", replace(small_fit, whole=True, steps=2))
    kept = 0
    for index in range(6):
        made = make_sample(made_by, steel, Order(), index)
        background = next(s for s in steel.scenes if s.name == made.provenance["background"]["name"])
        labelled = background.mask > 0
        np.testing.assert_array_equal(made.image[labelled], np.round(background.image * 255)[labelled])
        assert (made.mask == 2).sum() > (background.mask == 2).sum()
        kept += labelled.any()
    assert kept == 6


def test_clean_windows_of_a_roll_are_steel_and_its_dark_sides_are_unknown(generator, tmp_path):
    image = np.random.default_rng(0).normal(110, 4, (1, 600, 400)).clip(60, 255).astype(np.uint8)
    image[:, :, :30] = 0
    image[:, 200:320] = 255  # blinded: not inspected
    strip = Strip(roll_id="coil-1", side="top", lighting=("bright",), mm_per_px_x=0.8, mm_per_line=1.0)
    with RollWriter(tmp_path / "coil-1.zarr", strip, 400, np.uint8, total_lines=600) as writer:
        writer.append(image)
        writer.close()
    steel = open_backgrounds([tmp_path / "coil-1.zarr"], generator.card.data_classes, ())

    made = [make_sample(generator, steel, Order(density=Density("lane", lane=0.5)), i) for i in range(6)]

    for one in made:
        y, x = one.provenance["background"]["y"], one.provenance["background"]["x"]
        lost = np.zeros((600, 400), dtype=bool)
        lost[:, :30] = lost[192:320] = True  # whole cells of 64 lines
        assert one.image.shape == (256, 256) and one.group == "coil-1"
        np.testing.assert_array_equal(one.mask == 255, lost[y : y + 256, x : x + 256])
        assert (one.mask == 2).any()


def test_a_roll_of_several_lighting_modes_is_no_steel(generator, tmp_path):
    simulate_roll(tmp_path / "S-1.zarr", SimulatedStrip(0.5, 6, width_px=256, lighting=("bright", "dark")))
    with pytest.raises(UserError, match=r"roll S-1 has 2 lighting modes \(bright, dark\): synthetic"):
        open_backgrounds([tmp_path / "S-1.zarr"], generator.card.data_classes, ())


def test_sources_of_val_and_test_and_no_sources_are_refused(few_scenes, generator, tmp_path):
    rows = list(csv.reader((few_scenes / "manifest.csv").open()))
    other = tmp_path / "relabelled"
    other.mkdir()
    for name in ("6.png", "6_mask.png", "classes.json"):
        (other / name).write_bytes((few_scenes / name).read_bytes())
    row = next(row for row in rows if row[0] == "6.png")
    with (other / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], [*row[:2], "train", row[3]]])
    classes, held = generator.card.data_classes, generator.card.held_groups

    with pytest.raises(UserError, match="backgrounds: group 'piece-6' is in val or test"):
        open_backgrounds([other], classes, held)
    with pytest.raises(UserError, match=r"no backgrounds \(none given\): give --backgrounds"):
        open_backgrounds([], classes, held)
    (few_images := tmp_path / "labelled" / "images").mkdir(parents=True)
    for name in ("6.png", "6_mask.png"):
        (few_images / name).write_bytes((few_scenes / name).read_bytes())
    assert len(open_backgrounds([few_images], classes, held)) == 2  # clean by the word of who gives them
    nested = shutil.copytree(few_images, tmp_path / "clean" / "coil-7").parent
    assert {scene.group for scene in open_backgrounds([nested], classes, held).scenes} == {"coil-7"}
    with pytest.raises(UserError, match="backgrounds: group 'coil-7' is in val or test"):
        open_backgrounds([nested], classes, (*held, "coil-7"))
    (few_images.parent / "classes.json").write_text('["pit", "scratch"]')
    with pytest.raises(
        UserError, match=r"holds labelled data \(.*labelled\), whose defects are on its images"
    ):
        open_backgrounds([tmp_path], classes, held)  # val, test and masks would have been steel
    (nested / "masks").mkdir()
    with pytest.raises(UserError, match=r"clean holds labelled data \(.*clean\)"):
        open_backgrounds([nested], classes, held)
    with pytest.raises(UserError, match=r"images lies in the labelled data .*labelled, whose defects are on"):
        open_backgrounds([few_images], classes, held)
    (few_images.parent / "classes.json").unlink()
    (few_images / "6.json").write_text("{}")
    with pytest.raises(UserError, match=r"6.png has a label file beside it: .* `inspect labels import`"):
        open_backgrounds([few_images], classes, held)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no backgrounds \(.*empty\)"):
        open_backgrounds([tmp_path / "empty"], classes, held)


def test_steel_on_which_nothing_shows_ends_in_one_line(generator, tmp_path):
    black = np.zeros((96, 96), dtype=np.uint8)
    black[0, 0] = 255
    Image.fromarray(black).save(tmp_path / "black.png")
    steel = open_backgrounds([tmp_path], generator.card.data_classes, ())

    with pytest.raises(UserError, match=r"sample 0: 40 attempts without one to keep \(faint 40\)"):
        make_sample(generator, steel, Order(), 0)


def test_steel_of_12_bits_in_files_of_16_is_refused(generator, tmp_path):
    """Made images of it would have a handful of gray levels."""
    levels = np.random.default_rng(0).integers(1700, 4096, (96, 96)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "dim.png")
    with pytest.raises(UserError, match=r"the brightest px is 6.\d% of white, as of 12 bits in files of 16"):
        open_backgrounds([tmp_path], generator.card.data_classes, ())
    Image.fromarray(levels * 16).save(tmp_path / "dim.png")
    assert len(open_backgrounds([tmp_path], generator.card.data_classes, ())) == 1


def test_images_that_seldom_show_a_line_of_the_pitch_are_asked_more_often(generator, tmp_path):
    rng = np.random.default_rng(0)
    high = (rng.normal(128, 4, (16_000, 96))).clip(0, 255).astype(np.uint8)
    Image.fromarray(high).save(tmp_path / "high.png")
    steel = open_backgrounds([tmp_path], generator.card.data_classes, ())
    whole = [replace(mark, cut=(False,) * 4) for mark in generator.bank.marks]
    made_by = replace(generator, bank=MaskBank(whole, "scratch"))
    order = Order(method="paste", density=Density("periodic", pitch_px=15_000))

    made = [make_sample(made_by, steel, order, index).provenance for index in range(3)]

    assert max(one["attempt"] for one in made) >= 40
    for one in made:
        assert (one["background"]["y"] + one["marks"][0]["place"][0]) % 15_000 == 0


def test_damaged_provenance_is_one_line(tmp_path):
    with pytest.raises(UserError, match="this is no folder made by `inspect synth make`"):
        open_provenance(tmp_path)
    (tmp_path / "provenance.jsonl").write_text('{"image": 1')
    with pytest.raises(UserError, match="damaged"):
        open_provenance(tmp_path)


def with_mm(generator, mm):
    """The generator as if its labels said that a px is `mm` along and across."""
    marks = [replace(mark, mm=mm) for mark in generator.bank.marks]
    return replace(generator, bank=MaskBank(marks, "scratch"))


@pytest.mark.parametrize(
    ("steel_mm", "factor"), [((0.5, 0.4), (2, 2)), ((1.0, 0.4), (1, 2)), ((2.0, 0.8), (0.5, 1))]
)
def test_a_mark_of_one_camera_has_its_mm_on_the_steel_of_another(generator, steel_mm, factor):
    """On 0.4 mm per px a mark from 0.8 takes twice the px; along and across each by its own."""
    fine = with_mm(generator, (1.0, 0.8))
    number, how = fine.bank.draw(np.random.default_rng(4))

    at_home, zoom = sized(fine.bank, number, how, (1.0, 0.8))
    moved, moved_zoom = sized(fine.bank, number, how, steel_mm)

    assert (zoom, moved_zoom) == ((1.0, 1.0), pytest.approx(factor))
    sizes = [np.ptp(np.nonzero(mark.inside), axis=1) + 1 for mark in (at_home, moved)]
    assert sizes[1] == pytest.approx(sizes[0] * np.array(factor), abs=3)
    assert moved.inside.sum() == pytest.approx(at_home.inside.sum() * factor[0] * factor[1], rel=0.25)


def test_sizes_go_by_mm_where_both_sides_know_them_and_the_card_says_which(generator, few_scenes, tmp_path):
    classes, held = generator.card.data_classes, generator.card.held_groups
    plain, known = (open_backgrounds([few_scenes], classes, held, mm) for mm in (None, (0.8, 0.4)))
    fine = with_mm(generator, (1.0, 0.8))
    told = {}
    for name, made_by, steel in (("mm", fine, known), ("no mm", fine, plain), ("labels", generator, known)):
        _, card = make_data(made_by, steel, Order(seed=2, method="paste"), 2, tmp_path / name)
        marks = [mark for line in open_provenance(tmp_path / name) for mark in line["marks"]]
        told[name] = (card["sizes"], marks)

    assert told["mm"][0] == "mm: length and width are those of the labelled defects"
    for mark in told["mm"][1]:
        x0, y0, x1, y1 = mark["box"]
        assert mark["zoom"] == [1.25, 2.0]
        assert mark["length_mm"] == pytest.approx(0.8 * (y1 - y0))
        assert mark["width_mm"] == pytest.approx(0.4 * (x1 - x0))
    assert told["no mm"][0] == "px: the steel does not say how large a px is"
    assert told["labels"][0] == "px: the labels do not say how large a px is"
    assert all(mark["zoom"] is None for name in ("no mm", "labels") for mark in told[name][1])


def test_a_mark_that_is_too_narrow_or_too_far_from_its_camera_is_told(generator, few_scenes):
    classes, held = generator.card.data_classes, generator.card.held_groups
    coarse, finer = (open_backgrounds([few_scenes], classes, held, mm) for mm in ((1.0, 3.0), (1.0, 0.05)))
    fine = with_mm(generator, (1.0, 0.8))

    with pytest.raises(UserError, match=r"sample 0: 40 attempts without one to keep \(narrow 40\)"):
        make_sample(fine, coarse, Order(), 0)
    with pytest.raises(UserError, match=r"labels of 0.8 x 1 mm per px on steel of 0.05 x 1: .* by 16 x 1,"):
        make_sample(fine, finer, Order(), 0)


def test_the_mm_of_the_labels_stay_with_the_marks(few_scenes, small_fit, tmp_path):
    found = fit_data(open_labels(few_scenes), "pit", mm=(1.0, 0.8))
    made = fit_generator(found, tmp_path / "pit", replace(small_fit, steps=1))

    assert {mark.mm for mark in open_generator(tmp_path / "pit").bank.marks} == {(1.0, 0.8)}
    half = [replace(mark, mm=(0.5, 0.4)) for mark in made.bank.marks]
    mixed = MaskBank([*made.bank.marks, *half], "pit")
    assert mixed.in_mm and mixed.log_side[1] == pytest.approx(np.log(2) / 2, abs=0.01)  # two sizes in mm
    unknown = MaskBank([*half, replace(half[0], mm=None)], "pit")
    assert not unknown.in_mm and np.exp(unknown.log_side[0]) == pytest.approx(np.sqrt(56), rel=0.01)


def test_a_labelled_roll_says_itself_how_large_its_px_are(generator, tmp_path):
    simulate_roll(tmp_path / "S-1.zarr", SimulatedStrip(3.0, 6, width_px=300, mm_per_px_x=0.5, density=4))

    found = fit_data(open_labels(tmp_path), "pit")
    assert {scene.mm for scene in found.scenes} == {(1.0, 0.5)}
    with pytest.raises(UserError, match="a roll knows how large its px are: leave --mm-per-px-x and"):
        fit_data(open_labels(tmp_path), "pit", mm=(1.0, 0.8))
    with pytest.raises(UserError, match="are for images: a roll says itself how large its px are"):
        open_backgrounds([tmp_path / "S-1.zarr"], generator.card.data_classes, (), (1.0, 0.8))
