"""Thresholds that keep a false-alarm budget on small real folders, seen by an engine that reads the gray."""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rollsight.inspect.calibrate import THRESHOLDS, choose, fit_thresholds
from rollsight.inspect.errors import UserError
from rollsight.inspect.evaluate import evaluate, m2_per_mpx
from rollsight.inspect.froc import Sweep
from rollsight.inspect.labels import LabelledData, open_labels
from rollsight.inspect.metrics import garwood
from rollsight.inspect.models import Card, Model
from scipy import special, stats

SIDE = 128


def model_of(*classes: str, **fields) -> Model:
    """The card of an engine that reads the gray: no net is opened."""
    card = Card(
        name="gray",
        net="unet_lite",
        classes=classes,
        thresholds=fields.pop("thresholds", dict.fromkeys(classes, 0.5)),
        thresholds_basis="by hand",
        halo_px=0,
        weights_sha256="0" * 64,
        graph_sha256="0" * 64,
        **fields,
    )
    return Model(Path("gray"), card)


def gray_engine(window):
    """Bright px are class 1, dark ones class 2: the farther from mid-gray, the surer."""
    bright = (window[0] - 0.5) * 8
    return np.stack([np.zeros_like(bright), bright - 1, -bright - 1]).astype(np.float32)


def folder(root: Path, images: list[tuple[np.ndarray, np.ndarray]], classes=("pit", "scratch")) -> Path:
    root.mkdir()
    rows = []
    for i, (image, mask) in enumerate(images):
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_mask.png")
        rows.append((f"{i}.png", f"{i}_mask.png", "val", f"g{i}"))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "split", "group"), *rows])
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def strip(rng, defects: int, false: int, value: int = 1, gray=(150, 250), clutter=(150, 200)):
    """Mid-gray steel with labelled spots of 4 x 4 px and unlabelled ones, brighter or darker."""
    image, mask = np.full((SIDE, SIDE), 120.0), np.zeros((SIDE, SIDE), np.uint8)
    cells = rng.permutation(64)[: defects + false]
    for number, cell in enumerate(cells):
        y, x = 16 * (cell // 8) + 4, 16 * (cell % 8) + 4
        low, high = gray if number < defects else clutter
        image[y : y + 4, x : x + 4] = rng.uniform(low, high)
        if number < defects:
            mask[y : y + 4, x : x + 4] = value
    return image, mask


@pytest.fixture
def spots(tmp_path) -> LabelledData:
    """10 images with pits and 10 clean ones, with clutter less bright than most pits; no scratch."""
    rng = np.random.default_rng(0)
    images = [strip(rng, 6, 0) for _ in range(10)] + [strip(rng, 0, 6) for _ in range(10)]
    return open_labels(folder(tmp_path / "spots", images))


def test_the_upper_limit_of_the_alarms_stays_within_the_budget_and_the_next_threshold_breaks_it(spots):
    mpx = 10 * SIDE * SIDE / 1e6
    budget = 60.0
    fitted = fit_thresholds(model_of("pit"), pits_only, spots, budget_per_mpx=budget)

    assert fitted.mpx == pytest.approx(mpx)
    assert stats.poisson.cdf(fitted.alarms, budget * mpx) <= 0.05 or fitted.alarms == 0
    assert fitted.upper <= budget
    at = THRESHOLDS.index(fitted.thresholds["pit"])
    lower = model_of("pit", thresholds={"pit": THRESHOLDS[at - 4]}, temperature=fitted.temperature)
    alarms = evaluate(lower, pits_only, spots).report()["false_alarms"]["clean_images"]["alarms"]
    assert special.gammaincinv(alarms + 1, 0.95) / mpx > budget
    assert "10 clean images" in fitted.basis


def pits_only(window):
    return gray_engine(window)[:2]


def test_a_larger_budget_never_finds_less(spots):
    found = []
    for budget in (20.0, 60.0, 300.0):
        tally = fit_thresholds(model_of("pit"), pits_only, spots, budget_per_mpx=budget).tally
        found.append(tally.report()["instance"]["recall_by_size"]["tiny_small"]["recall"])
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_what_was_counted_is_what_evaluate_counts_with_the_fitted_card(spots):
    fitted = fit_thresholds(model_of("pit", "scratch"), gray_engine, spots, budget_per_mpx=60.0)
    card = fitted.card({})
    again = evaluate(
        model_of("pit", "scratch", thresholds=card["thresholds"], temperature=card["temperature"]),
        gray_engine,
        spots,
    )
    assert again.report() == fitted.tally.report()
    assert again.report()["false_alarms"]["clean_images"]["alarms"] == fitted.alarms


def test_a_budget_that_the_clean_area_cannot_show_is_refused_with_the_area_needed(spots):
    mpx = 10 * SIDE * SIDE / 1e6
    with pytest.raises(UserError, match=r"5 false alarms per Mpx .* 0.164 Mpx .* needs 0.6 Mpx"):
        fit_thresholds(model_of("pit"), pits_only, spots, budget_per_mpx=5.0)
    least = 3.0 / mpx
    assert garwood(0)[1] > 3.0  # the two-sided limit asks for more
    assert fit_thresholds(model_of("pit"), pits_only, spots, budget_per_mpx=least + 1e-6).alarms == 0


def test_a_budget_that_no_threshold_keeps_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    data = open_labels(
        folder(tmp_path / "d", [strip(rng, 5, 0), *(strip(rng, 0, 9, clutter=(254, 255)) for _ in range(4))])
    )
    with pytest.raises(UserError, match="false alarms are left"):
        fit_thresholds(model_of("pit"), sure, data, budget_per_mpx=50.0)


def sure(window):
    """As sure of a bright px as floats go."""
    return np.stack([0 * window[0], np.where(window[0] > 0.55, 60, -60)]).astype(np.float32)


def test_a_budget_above_all_that_can_be_seen_in_vain_is_one_that_no_longer_decides(spots):
    enough, huge = (
        fit_thresholds(model_of("pit"), pits_only, spots, budget_per_mpx=budget) for budget in (1e5, 1e300)
    )
    assert huge.thresholds == enough.thresholds
    assert huge.alarms == enough.alarms


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_that_is_no_finite_number_above_0_is_refused(spots, budget):
    with pytest.raises(UserError, match="needed a finite number above 0"):
        fit_thresholds(model_of("pit"), pits_only, spots, budget_per_mpx=budget)


def test_without_a_budget_there_are_no_more_alarms_than_before_and_no_promise(spots):
    model = model_of("pit", thresholds={"pit": 0.9})
    before = evaluate(model, pits_only, spots).report()
    fitted = fit_thresholds(model, pits_only, spots, budget_per_mpx=None)
    after = fitted.tally.report()

    assert fitted.alarms <= before["false_alarms"]["clean_images"]["alarms"]
    assert after["instance"]["recall_h"] >= before["instance"]["recall_h"]
    assert fitted.budget is None
    assert "no budget stands behind them" in fitted.basis


def test_the_budget_on_the_card_is_kept(spots):
    fitted = fit_thresholds(model_of("pit", budget=60.0), pits_only, spots, budget_per_mpx=None)
    assert fitted.budget == 60.0
    assert fitted.upper <= 60.0


def test_a_class_without_a_defect_gets_what_clean_images_stay_below_and_the_basis_says_so(spots):
    model = model_of("pit", "scratch")
    fitted = fit_thresholds(model, gray_engine, spots, budget_per_mpx=None)
    # gray 120 of 255 is 0.47: a logit of 0.47 - 1 above the background, before the temperature
    surest = special.expit((0.5 - 120 / 255) * 8 / fitted.temperature - 1 / fitted.temperature)
    assert fitted.thresholds["scratch"] == min(t for t in THRESHOLDS if t >= 0.9 * surest)
    assert "No defect of scratch is in it" in fitted.basis
    assert "99% of the clean images stay below" in fitted.basis


def test_a_class_without_a_defect_takes_none_of_the_budget(spots):
    """Its alarms would be fewer for the classes that have something to find."""
    fitted = fit_thresholds(model_of("pit", "scratch"), gray_engine, spots, budget_per_mpx=60.0)
    surest = special.expit((0.5 - 120 / 255) * 8 / fitted.temperature - 1 / fitted.temperature)
    assert fitted.thresholds["scratch"] == min(t for t in THRESHOLDS if t > surest)
    assert "what all clean images stay below" in fitted.basis


def test_a_class_that_the_data_does_not_label_keeps_its_margin(spots):
    model = model_of("pit", "stain", thresholds={"pit": 0.5, "stain": 0.8})
    fitted = fit_thresholds(model, gray_engine, spots, budget_per_mpx=60.0)
    margin = special.logit(fitted.thresholds["stain"]) * fitted.temperature
    assert margin == pytest.approx(special.logit(0.8), abs=1e-3)
    assert "not fitted: stain" in fitted.basis


@pytest.mark.parametrize("before", [1 / 3, 1.0, 3.0])
def test_the_highest_threshold_that_a_fit_gives_is_kept_at_any_temperature(spots, before):
    """0.9999977 of a class that the data does not label: rounded it would be 1, which is no threshold."""
    high = THRESHOLDS[-1]
    model = model_of("pit", "stain", thresholds={"pit": 0.5, "stain": high}, temperature=before)
    fitted = fit_thresholds(model, gray_engine, spots, budget_per_mpx=60.0)
    same_margin = special.expit(special.logit(high) * before / fitted.temperature)

    assert high == 0.9999977
    assert 1 - fitted.thresholds["stain"] == pytest.approx(max(1 - same_margin, 1e-9), rel=1e-6)
    Card(**{**model.card.model_dump(), **fitted.card({})})


def test_a_threshold_kept_at_the_same_temperature_is_the_same_to_the_last_digit(spots):
    fitted = fit_thresholds(model_of("pit", "stain"), gray_engine, spots, budget_per_mpx=60.0)
    kept = {"pit": 0.5, "stain": 0.9999977}
    again = model_of("pit", "stain", thresholds=kept, temperature=fitted.temperature)
    refitted = fit_thresholds(again, gray_engine, spots, budget_per_mpx=60.0)

    assert refitted.temperature == fitted.temperature
    assert refitted.thresholds["stain"] == 0.9999977


def test_without_a_clean_image_alarms_are_counted_beside_the_defects(tmp_path):
    rng = np.random.default_rng(1)
    data = open_labels(folder(tmp_path / "d", [strip(rng, 6, 3) for _ in range(12)]))
    fitted = fit_thresholds(model_of("pit"), pits_only, data, budget_per_mpx=60.0)
    assert fitted.mpx == pytest.approx(12 * SIDE * SIDE / 1e6)
    assert "None of the images is clean" in fitted.basis


def test_ignored_data_is_refused(tmp_path):
    blank = np.full((SIDE, SIDE), 255, np.uint8)
    data = open_labels(folder(tmp_path / "d", [(blank, blank)]))
    with pytest.raises(UserError, match="ignored"):
        fit_thresholds(model_of("pit"), pits_only, data, budget_per_mpx=60.0)


def test_a_mask_value_beyond_the_classes_is_refused_with_the_file(tmp_path):
    gray = np.full((SIDE, SIDE), 120, np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:4, :4] = 3
    data = open_labels(folder(tmp_path / "d", [(gray, mask)]))
    with pytest.raises(UserError, match=r"0_mask.png: mask value 3, but .* has 2 classes"):
        fit_thresholds(model_of("pit"), pits_only, data, budget_per_mpx=60.0)


def test_steel_without_a_defect_true_or_found_says_nothing_of_the_temperature(tmp_path):
    """Every temperature explains no px alike; the first of the list was taken, four times too sure."""
    quiet = np.full((SIDE, SIDE), 120, np.uint8)
    data = open_labels(folder(tmp_path / "d", [(quiet, quiet * 0)] * 4))
    fitted = fit_thresholds(model_of("pit", temperature=1.5), pits_only, data, budget_per_mpx=60.0)
    assert fitted.temperature == 1.5 and fitted.ece == (0, 0)


def test_a_net_that_is_three_times_too_sure_gets_temperature_three(tmp_path):
    """Masks drawn from the probability that the gray stands for."""
    rng = np.random.default_rng(2)
    images = []
    for _ in range(3):
        gray = rng.uniform(60, 200, (SIDE, SIDE)).round()
        p = special.expit((gray / 255 - 0.5) * 8 / 3 - 1 / 3)
        images.append((gray, (rng.random(gray.shape) < p).astype(np.uint8)))
    data = open_labels(folder(tmp_path / "d", images))
    fitted = fit_thresholds(model_of("pit"), pits_only, data, budget_per_mpx=None)
    assert fitted.temperature == pytest.approx(3, rel=0.08)
    assert fitted.ece[1] < fitted.ece[0] / 3


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12) | st.just(10**15))
def test_the_choice_is_the_best_of_all_combinations(seed, allowed):
    """Two classes, all combinations tried: the mean of their recalls of tiny and small, fewest alarms."""
    rng = np.random.default_rng(seed)
    t = len(THRESHOLDS)
    sweep = Sweep(("a", "b"))
    sweep.area = 10**6
    sweep.truth[:, 0] = (20, 40)
    sweep.found[:, :, 0] = np.sort(rng.integers(0, 20, (t, 2)), axis=0)[::-1]
    sweep.predicted[:] = np.sort(rng.integers(0, 15, (t, 2)), axis=0)[::-1]

    def worth(i, j):
        alarms = sweep.predicted[i, 0] + sweep.predicted[j, 1]
        recall = sweep.found[i, 0, 0] / 20 + sweep.found[j, 1, 0] / 40
        return (round(recall, 9), -alarms) if alarms <= allowed else (-1, 0)

    best = max(worth(i, j) for i, j in itertools.product(range(t), repeat=2))
    chosen = choose(sweep, allowed, ("a", "b"), {})
    if best == (-1, 0):
        assert chosen is None
    else:
        assert worth(chosen["a"], chosen["b"]) == best


def test_a_mpx_has_square_metres_only_where_the_px_has_a_size(spots):
    assert m2_per_mpx(spots) is None
