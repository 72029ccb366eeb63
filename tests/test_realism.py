"""The check of a synthetic set: distances with known answers, labels that do not hold, a page."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.synth.backgrounds import open_backgrounds
from rollsight.synth.check_page import told, write_page
from rollsight.synth.compose import Order, make_data
from rollsight.synth.features import (
    COPY_RATIO,
    Features,
    cosine_distances,
    crop_of,
    kid,
    largest_correlation,
    nearest_ratio,
    residual_of,
    spread,
)
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.patches import read_scenes
from rollsight.synth.realism import (
    Judged,
    _few_easy,
    _new_defects,
    _on_real,
    area_ratio,
    check_set,
    held_scenes,
    write_kept,
)


@pytest.fixture(scope="module")
def made(few_scenes, small_fit, tmp_path_factory):
    """Six synthetic samples of the few scenes."""
    folder = tmp_path_factory.mktemp("made")
    generator = fit_generator(fit_data(open_labels(few_scenes), "scratch"), folder / "scratch", small_fit)
    steel = open_backgrounds([few_scenes], generator.card.data_classes, generator.card.held_groups)
    make_data(generator, steel, Order(), 6, folder / "set")
    return folder / "set"


def test_the_kernel_distance_is_0_within_a_distribution_and_grows_with_the_shift():
    rng = np.random.default_rng(0)
    one, same, far = (rng.normal(shift, 1, (200, 16)) for shift in (0, 0, 1))

    assert abs(kid(one, same)[0]) < 3 * kid(one, same)[1] / math.sqrt(50) + 0.05
    assert kid(one, far)[0] > 20 * abs(kid(one, same)[0])
    assert math.isnan(kid(one[:3], far)[0])


def test_copies_are_nearer_to_training_than_held_out_ones_are_and_cross_the_alarm():
    rng = np.random.default_rng(0)
    train, held, fresh = (rng.normal(0, 1, (600, 32)) for _ in range(3))
    copies = train[:60] + rng.normal(0, 0.1, (60, 32))

    for few in (
        600,
        60,
        12,
    ):  # of train a part as small as the held-out set would seldom hold what was copied
        assert nearest_ratio(copies, train, held[:few]) < 0.1 < COPY_RATIO
        assert nearest_ratio(fresh, train, held[:few]) == pytest.approx(1, abs=0.15)
    assert math.isnan(nearest_ratio(fresh, train, held[:0]))


def test_a_flipped_copy_correlates_fully_and_noise_does_not():
    rng = np.random.default_rng(0)
    train = [rng.random((96, 96)).astype(np.float32) for _ in range(3)]

    found = largest_correlation(
        [train[1][:, ::-1] * 0.5 + 0.1, rng.random((96, 96)).astype(np.float32)], train
    )

    assert found[0] == pytest.approx(1, abs=1e-6) and found[1] < 0.3


def test_a_defect_on_other_steel_is_the_same_residual_and_another_crop():
    rng = np.random.default_rng(0)
    inside = np.zeros((64, 64), dtype=bool)
    inside[20:44, 30:36] = True
    texture, box = rng.normal(0.2, 0.03, (64, 64)) * inside, (30, 20, 36, 44)
    first, second = (
        np.where(inside, level + texture, rng.normal(level, 0.15, (64, 64))).astype(np.float32)
        for level in (0.3, 0.6)
    )
    half = inside & (np.arange(64)[:, None] < 32)

    on_others = largest_correlation([residual_of(second, inside, box)], [residual_of(first, inside, box)])
    of_crops = largest_correlation([crop_of(second, box)], [crop_of(first, box)])
    shorter = largest_correlation([residual_of(second, half, box)], [residual_of(first, inside, box)])

    assert on_others[0] > 0.98 and of_crops[0] < 0.8 and shorter[0] < 0.8
    assert not residual_of(first, inside & False, box).any()
    assert np.isfinite(residual_of(first, inside | True, (0, 0, 64, 64))).all()  # no steel around it


def test_a_mark_within_the_box_of_a_longer_one_is_no_part_of_it():
    image, mask = np.full((60, 60), 0.5, np.float32), np.zeros((60, 60), dtype=bool)
    rows = np.arange(5, 55)
    for x in range(3):
        mask[rows, rows + x - 1] = True
    mask[10:14, 45:49] = True
    line = {"marks": [{"box": [4, 5, 56, 55]}, {"box": [45, 10, 49, 14]}]}

    long, short = _new_defects(line, image, mask)

    assert (long.inside.sum(), short.inside.sum()) == (150, 16)
    assert not (long.inside & short.inside).any()
    [cut] = _new_defects({"marks": [{"box": [4, 5, 50, 40]}]}, image, mask)  # no component has that box
    assert cut.inside.sum() == mask[5:40, 4:50].sum()


def test_sameness_has_no_spread():
    x = np.random.default_rng(0).normal(0, 1, (20, 16))

    assert spread(np.repeat(x[:1], 20, axis=0)) == pytest.approx(0, abs=1e-9)
    assert spread(x) == pytest.approx(1, abs=0.1)
    assert math.isnan(spread(x[:1]))
    assert cosine_distances(x[:2], x[:2])[0, 0] == pytest.approx(0, abs=1e-12)


def test_features_do_not_see_exposure():
    crop = crop_of(np.random.default_rng(0).random((80, 90)).astype(np.float32), (70, 60, 90, 64))

    first, second = Features()([crop, crop * 1 + 0.2])

    assert crop.shape == (96, 96) and first.shape == (152,)
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-4)


def test_a_label_wider_than_its_defect_is_found_and_one_that_fits_is_1():
    image = np.full((60, 60), 0.5, np.float32)
    image[10:50, 28:32] = 0.8
    fits, wide = np.zeros((60, 60), bool), np.zeros((60, 60), bool)
    fits[10:50, 28:32], wide[5:55, 20:40] = True, True

    assert area_ratio(image, fits, fits & False) == pytest.approx(1)
    assert area_ratio(image, wide, fits & False) < 0.5
    assert area_ratio(image * 0 + 0.5, fits, fits & False) == 1  # no contrast: nothing is said


def test_easy_samples_are_half_of_what_nothing_else_drops_at_most():
    def one(name, agreement, dropped=""):
        return Judged(name, dropped, 1.0, 1.0, agreement, (0, 0, 1, 1))

    judged = [one(f"easy-{i}", 0.91 + i / 100) for i in range(5)] + [one("a", 0.5), one("b", 0.2)]

    kept = [sample.image for sample in _few_easy([*judged, one("c", 0.0, "segmenter does not see it")])]
    dropped = {sample.image: sample.dropped for sample in _few_easy(judged)}
    assert len(kept) == 8
    assert [name for name, why in dropped.items() if why] == ["easy-4"]
    assert sum(bool(sample.dropped) for sample in _few_easy(judged[:5])) == 2  # also where none is hard
    unjudged = [one(str(i), math.nan) for i in range(4)]
    assert _few_easy(unjudged) == unjudged


def test_a_check_drops_what_lost_its_contrast_and_writes_the_rest(made, few_scenes, tmp_path):
    lines = [json.loads(line) for line in (made / "provenance.jsonl").read_text().splitlines()]
    copy = tmp_path / "set"
    copy.mkdir()
    for path in made.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(made)).write_bytes(path.read_bytes())
    lines[2]["marks"][0]["contrast_kept"] = 0.3
    (copy / "provenance.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Image.open(copy / lines[4]["image"]) as image:
        flat = Image.new("L", image.size, 110)  # a label on nothing
    flat.save(copy / lines[4]["image"])

    found = check_set(copy, open_labels(few_scenes), tmp_path / "run", steps=0)

    why = {sample.image: sample.dropped for sample in found.samples}
    assert why[lines[2]["image"]] == "contrast lost"
    assert why[lines[4]["image"]] == "changed since it was made"
    assert found.figures["kept"] == sum(not reason for reason in why.values())
    assert set(found.figures["kid"]) <= {"made", "real, the floor", "clean, the ceiling"}
    assert found.figures["copies"]["median_correlation"] <= 1
    assert write_kept(copy, found, tmp_path / "kept") == found.figures["kept"]
    kept = {sample.image.name for sample in open_labels(tmp_path / "kept").samples}
    assert kept == {name.split("/")[-1] for name, reason in why.items() if not reason}
    scored = [json.loads(line) for line in (tmp_path / "kept" / "provenance.jsonl").read_text().splitlines()]
    assert all(0.5 <= line["check"]["area_ratio"] <= 2 for line in scored)
    assert {line["check"]["agreement"] for line in scored} == {None}  # no segmenter was asked for
    card = json.loads((tmp_path / "kept" / "dataset.json").read_text())
    assert (card["samples"], card["dropped_by_check"]) == (found.figures["kept"], found.figures["dropped"])
    assert "dropped 1: contrast lost" in (tmp_path / "kept" / "croissant.json").read_text()
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset.json: not the card of a set .*: make the data again"):
        write_kept(copy, found, tmp_path / "again")

    assert not found.held_out and len(found.real) == 3  # val has none of the class, train three
    write_page(tmp_path / "page.html", found, "Check of set")
    page = (tmp_path / "page.html").read_text()
    assert "Real, of the images that the defects come from" in page and "none of them held out" in page
    assert "Blind test" in page and "<figcaption>contrast lost</figcaption>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_a_segmenter_that_never_saw_the_sources_judges_each_sample(made, few_scenes, tmp_path):
    steps = []

    found = check_set(
        made, open_labels(few_scenes), tmp_path, steps=1, on_step=lambda done, of: steps.append((done, of))
    )

    assert steps == [(1, 3), (2, 3), (3, 3)]
    segmenters = found.figures["segmenters"]
    assert (segmenters["steps"], segmenters["of"]) == (1, "sources")  # val has none of the class
    told_rows = dict(told(found.figures))
    assert told_rows["cross-fitted segmenters, steps"] == "1"
    assert told_rows["held-out defects"] == "none: the labels have no val image of the class"


def test_segmenters_are_heard_where_they_see_half_of_the_defects_they_did_not_learn_from(few_scenes):
    labels = open_labels(few_scenes)
    scenes, of_val = read_scenes(labels.of_split("train")), held_scenes(labels)
    sighted = dict.fromkeys(("piece-1", "piece-3"), lambda image: image < 0.3)
    blind = dict.fromkeys(("piece-5",), lambda image: image < 0)

    told = _on_real({**sighted, **blind}, scenes, of_val, value=2)

    assert (told["of"], told["heard"]) == ("sources", True) and told["seen"] == pytest.approx(2 / 3)
    assert 0.6 < told["iou"] < 0.7
    assert _on_real(blind, scenes, of_val, value=2) == {"of": "sources", "iou": 0, "seen": 0, "heard": False}
    assert not _on_real(sighted, scenes, of_val, value=9)["heard"]  # labels that lost the class since
    bright = dict.fromkeys(("piece-1",), lambda image: image > 0.7)
    assert _on_real(bright, scenes, of_val, value=1)["of"] == "val"
    assert _on_real(bright, scenes, of_val, value=1)["seen"] == 1


def test_segmenters_that_see_no_real_defect_drop_nothing(made, few_scenes, tmp_path):
    labels = open_labels(few_scenes)
    of_val = replace(labels.samples[7], split="val")  # of the class, which the fixture's val has not
    labels = replace(labels, samples=(*labels.samples[:7], of_val))

    found = check_set(made, labels, tmp_path, steps=1)

    segmenters = found.figures["segmenters"]
    assert (segmenters["of"], segmenters["seen"], segmenters["heard"]) == ("val", 0, False)
    assert all(math.isnan(one.agreement) for one in found.samples)
    assert "segmenter does not see it" not in found.figures["dropped"]
    assert dict(told(found.figures))["segmenters"].startswith("not heard: they see under 50% of real defects")


def test_where_no_other_class_is_labelled_segmenters_learn_from_scratch(made, few_scenes, tmp_path):
    labels, steps = open_labels(few_scenes), []
    only = tuple(one for one in labels.samples if (one.read()[1] != 1).all())

    check_set(
        made, replace(labels, samples=only), tmp_path, steps=2, on_step=lambda *step: steps.append(step)
    )

    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_folder_of_another_kind_or_other_classes_is_refused(made, few_scenes, tmp_path):
    labels = open_labels(few_scenes)

    with pytest.raises(UserError, match="this is no folder made by `inspect synth make`"):
        check_set(few_scenes, labels, tmp_path, steps=0)
    elsewhere = LabelledData(
        few_scenes, labels.classes, tuple(replace(one, group=f"other-{one.group}") for one in labels.samples)
    )
    with pytest.raises(UserError, match=r"its defects come from piece-1, .*, which .* does not have: give"):
        check_set(made, elsewhere, tmp_path, steps=0)
    held = tuple(replace(one, split="val" if one.group == "piece-1" else one.split) for one in labels.samples)
    with pytest.raises(UserError, match="group 'piece-1' is in val or test of the labels"):
        check_set(made, LabelledData(few_scenes, labels.classes, held), tmp_path, steps=0)
    whole = (made / "provenance.jsonl").read_text()
    (made / "provenance.jsonl").write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match=r"\d+ images, 2 lines of provenance.jsonl: make the data again"):
        check_set(made, labels, tmp_path, steps=0)
    (made / "provenance.jsonl").write_text("")
    with pytest.raises(UserError, match=r"provenance.jsonl: damaged .*empty.*: make the data again"):
        check_set(made, labels, tmp_path, steps=0)
    (made / "provenance.jsonl").write_text(whole)
    (made / "classes.json").write_text(json.dumps(["pit", "dent"]))
    with pytest.raises(UserError, match=r"classes pit, dent, .* others: give its labels"):
        check_set(made, labels, tmp_path, steps=0)
