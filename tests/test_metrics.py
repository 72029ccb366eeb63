"""Pixel, instance, size and false-alarm figures against cases worked out by hand, MONAI and scipy."""

import csv
import json
import os
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import PanopticQualityMetric, compute_surface_dice
from monai.metrics.meaniou import compute_iou
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.metrics import (
    IOU_UNIT,
    Tally,
    bootstrap,
    bootstrap_difference,
    class_iou,
    components,
    dilate,
    garwood,
    match_tau,
    mean_iou,
    tiny_small_f1,
    wilson,
)
from scipy import ndimage, stats

Map = NDArray[np.uint8]
TWO = ("pit", "scratch")


def grid(*rows: str) -> Map:
    """A label map from one digit per pixel; `x` is 255."""
    return np.array([[255 if c == "x" else int(c) for c in row] for row in rows], dtype=np.uint8)


def field(*rectangles: tuple[int, int, int, int, int], size: tuple[int, int] = (40, 40)) -> Map:
    """A background map with rectangles (label, y, x, height, width)."""
    out = np.zeros(size, dtype=np.uint8)
    for label, y, x, height, width in rectangles:
        out[y : y + height, x : x + width] = label
    return out


def judged(*pairs: tuple[Map, Map], classes: tuple[str, ...] = TWO, a_min: int = 1) -> Tally:
    """A tally of (truth, prediction) pairs, each its own group, with one prediction for both uses."""
    tally = Tally(classes, a_min)
    for i, (truth, predicted) in enumerate(pairs):
        tally.add(truth, predicted, predicted, group=f"g{i:03}")
    return tally


# --- components


def test_pixels_that_touch_at_a_corner_are_one_component() -> None:
    found = components(grid("10", "01"), class_count=1)

    assert len(found) == 1
    assert found.areas.tolist() == [2]


def test_two_classes_that_touch_are_two_components() -> None:
    found = components(grid("12", "12"), class_count=2)

    assert found.classes.tolist() == [1, 2]
    assert found.areas.tolist() == [2, 2]


def test_components_below_a_min_are_dropped_and_the_rest_renumbered() -> None:
    found = components(grid("10011", "00000", "10111"), class_count=1, a_min=2)

    assert found.areas.tolist() == [2, 3]
    assert found.ids.max() == 2
    assert [found.ids[box].max() for box in found.boxes] == [1, 2]


def test_a_component_more_than_half_inside_ignore_is_dropped_and_half_is_kept() -> None:
    label_map = grid("1111", "0000", "2222")
    ignore = np.zeros((3, 4), dtype=bool)
    ignore[0, :2] = True  # half of the upper one
    ignore[2, :3] = True  # three quarters of the lower one

    found = components(label_map, class_count=2, ignore=ignore)

    assert found.classes.tolist() == [1]
    assert found.areas.tolist() == [2]  # its visible part
    assert found.ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_ignore_does_not_cut_a_component_in_two() -> None:
    ignore = grid("00x00") == 255

    found = components(grid("11111"), class_count=1, ignore=ignore)

    assert found.areas.tolist() == [4]
    assert found.ids.tolist() == [[1, 1, 0, 1, 1]]


@given(arrays(np.uint8, (9, 11), elements=st.integers(0, 3)))
def test_components_are_those_of_scipy_class_by_class(label_map: Map) -> None:
    found = components(label_map, class_count=3)

    assert np.array_equal(found.labels, label_map)
    for c in (1, 2, 3):
        oracle, n = ndimage.label(label_map == c, structure=np.ones((3, 3)))
        assert (found.classes == c).sum() == n
        pairs = {(int(a), int(b)) for a, b in zip(oracle[oracle > 0], found.ids[oracle > 0], strict=True)}
        assert len(pairs) == n


@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_dilation_by_2_px_is_that_of_a_5_by_5_square(mask: NDArray[np.bool_]) -> None:
    assert np.array_equal(dilate(mask), ndimage.binary_dilation(mask, np.ones((5, 5))))


# --- pixel figures


def test_pixel_figures_of_four_pixels() -> None:
    """Class 1: 1 px right, 1 missed, 1 too many. Class 2: its one pixel is called 1."""
    report = judged((grid("11", "20"), grid("10", "10"))).report()["pixel"]

    assert report["iou"] == {"pit": pytest.approx(1 / 3), "scratch": 0.0}
    assert report["dice"] == {"pit": pytest.approx(2 / 4), "scratch": 0.0}
    assert report["iou_background"] == pytest.approx(1 / 2)
    assert report["miou"] == pytest.approx(1 / 6)
    assert report["miou_classes"] == ["pit", "scratch"]


def test_ignored_pixels_count_in_no_pixel_figure() -> None:
    report = judged((grid("1x", "x0"), grid("11", "10"))).report()["pixel"]

    assert report["iou"]["pit"] == 1.0
    assert report["iou_background"] == 1.0


def test_a_class_absent_from_the_truth_is_left_out_of_the_mean_even_where_predicted() -> None:
    report = judged((grid("1100"), grid("1102"))).report()["pixel"]

    assert report["iou"] == {"pit": 1.0, "scratch": None}
    assert report["miou"] == 1.0
    assert report["miou_classes"] == ["pit"]


def test_one_missed_defect_on_ten_images_reads_zero_and_not_nine_tenths() -> None:
    empty = field()
    report = judged((field((1, 5, 5, 3, 3)), empty), *[(empty, empty)] * 9).report()

    assert report["pixel"]["iou"]["pit"] == 0.0
    assert report["instance"]["recall_h"] == 0.0


def test_argmax_feeds_the_pixel_figures_and_thresholded_the_instance_figures() -> None:
    truth, nothing = field((1, 5, 5, 4, 4)), field()
    tally = Tally(TWO)
    tally.add(truth, argmax=nothing, thresholded=truth, group="a")

    assert tally.report()["pixel"]["miou"] == 0.0
    assert tally.report()["instance"]["recall_h"] == 1.0


@given(
    st.lists(
        st.tuples(*[arrays(np.uint8, (6, 7), elements=st.integers(0, 3))] * 2),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=50, deadline=None)
def test_pooled_iou_is_that_of_monai_on_all_images_as_one(images: list[tuple[Map, Map]]) -> None:
    report = judged(*images, classes=("a", "b", "c")).report()
    truth, predicted = (torch.from_numpy(np.concatenate([pair[i] for pair in images])) for i in (0, 1))

    def one_hot(labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(labels.long(), 4).permute(2, 0, 1)[None]

    oracle = compute_iou(one_hot(predicted), one_hot(truth), include_background=False)[0]

    for mine, theirs in zip(report["pixel"]["iou"].values(), oracle.tolist(), strict=True):
        assert (mine is None) == np.isnan(theirs)
        assert mine is None or mine == pytest.approx(theirs)


# --- match H


def test_a_boundary_moved_by_2_px_counts_as_one_and_by_3_px_not_at_all() -> None:
    truth = field((1, 10, 10, 12, 12))
    pixel = judged((truth, field((1, 10, 12, 12, 12)))).report()["pixel"]
    assert pixel["boundary_f1"] == {"pit": 1.0, "scratch": None}
    assert pixel["mean_boundary_f1"] == 1.0

    beside = judged((field((1, 10, 4, 30, 4)), field((1, 10, 10, 30, 4)))).report()["pixel"]
    assert beside["boundary_f1"]["pit"] == 0.0


def test_the_border_of_the_image_and_of_ignored_parts_is_no_boundary() -> None:
    whole = judged((np.ones((9, 9), np.uint8), np.ones((9, 9), np.uint8)))
    assert whole.report()["pixel"]["boundary_f1"]["pit"] is None

    cut = grid("1110", "1110", "xxxx")
    assert judged((cut, cut)).statistics()["edges"].tolist() == [[[2, 2, 2, 2], [0, 0, 0, 0]]]


@settings(max_examples=30)
@given(arrays(np.bool_, (2, 6, 6)))
def test_boundaries_within_2_px_are_those_of_monai_surface_dice(coarse: NDArray[np.bool_]) -> None:
    """Inside the image: MONAI takes the border of the image for a boundary."""
    masks = np.pad(coarse.repeat(2, axis=1).repeat(3, axis=2), ((0, 0), (1, 1), (1, 1))).astype(np.uint8)
    truth, predicted = masks
    if not (truth.any() and predicted.any()):
        return
    near, all_px, near_truth, truth_px = judged((truth, predicted)).statistics()["edges"][0, 0].tolist()
    one_hot = [torch.from_numpy(np.stack([m == 0, m == 1]))[None].float() for m in (predicted, truth)]
    oracle = compute_surface_dice(*one_hot, class_thresholds=[2.0]).item()

    assert (near + near_truth) / (all_px + truth_px) == pytest.approx(oracle)


def test_a_3_by_3_defect_moved_by_one_px_in_x_and_y_is_found_though_its_iou_is_only_4_of_14() -> None:
    report = judged((field((1, 10, 10, 3, 3)), field((1, 11, 11, 3, 3)))).report()

    assert report["pixel"]["iou"]["pit"] == pytest.approx(4 / 14)
    assert report["instance"]["recall_h"] == 1.0
    assert report["instance"]["precision_h"] == 1.0
    match_t = report["instance"]["match_t"]
    assert match_t["0.1"]["sq"] == pytest.approx(4 / 14, abs=1e-9)
    assert [match_t[tau]["f1"] for tau in ("0.1", "0.3", "0.5")] == [1.0, 0.0, 0.0]
    assert match_t["0.5"]["pq"] == 0.0
    assert match_t["0.5"]["sq"] is None


@pytest.mark.parametrize(("gap_px", "recall"), [(1, 1.0), (2, 0.0)])
def test_a_single_pixel_is_reached_over_a_gap_of_one_px_and_not_of_two(gap_px: int, recall: float) -> None:
    """Dilation by 2 px reaches the pixel 2 further on, so there is one free pixel between."""
    report = judged((field((1, 5, 5, 1, 1)), field((1, 5, 6 + gap_px, 1, 1)))).report()

    assert report["instance"]["recall_h"] == recall
    assert report["instance"]["precision_h"] == recall
    assert report["instance"]["f1_h"] == recall


@pytest.mark.parametrize(("length_px", "recall"), [(30, 1.0), (31, 0.0)])
def test_a_defect_is_found_from_ten_percent_of_its_area_on(length_px: int, recall: float) -> None:
    """One predicted pixel at the start of a line covers 3 px of it with its reach: 10 % of 30."""
    report = judged((field((1, 5, 0, 1, length_px)), field((1, 5, 0, 1, 1)))).report()

    assert report["instance"]["recall_h"] == recall
    assert report["instance"]["precision_h"] == 1.0


def test_the_right_place_with_the_wrong_class_counts_class_agnostic_only() -> None:
    report = judged((field((1, 5, 5, 4, 4)), field((2, 5, 5, 4, 4)))).report()

    instance = report["instance"]
    assert (instance["recall_h"], instance["precision_h"], instance["f1_h"]) == (0.0, 0.0, 0.0)
    agnostic = instance["class_agnostic"]
    assert (agnostic["recall_h"], agnostic["precision_h"], agnostic["f1_h"]) == (1.0, 1.0, 1.0)
    assert agnostic["match_t"]["0.5"]["f1"] == 1.0
    assert agnostic["confusion"]["pit"] == {"pit": 0, "scratch": 1, "(foreign)": 0}
    assert report["false_alarms"]["alarms"] == 1
    assert report["false_alarms"]["class_agnostic"]["alarms"] == 0


def test_a_scratch_found_in_three_pieces_is_one_split_and_one_component_over_two_pits_one_merge() -> None:
    pieces = judged((field((1, 5, 0, 2, 30)), field((1, 5, 0, 2, 8), (1, 5, 11, 2, 8), (1, 5, 22, 2, 8))))
    bridge = judged((field((1, 5, 0, 2, 8), (1, 5, 20, 2, 8)), field((1, 5, 0, 2, 28))))

    assert (pieces.report()["instance"]["splits"], pieces.report()["instance"]["merges"]) == (1, 0)
    assert (bridge.report()["instance"]["splits"], bridge.report()["instance"]["merges"]) == (0, 1)
    assert pieces.report()["instance"]["precision_h"] == 1.0
    assert bridge.report()["instance"]["recall_h"] == 1.0


def test_pieces_beside_a_scratch_but_within_reach_are_a_split_too() -> None:
    """Rows 5 and 6 reach row 8, so half of each piece on rows 8 and 9."""
    beside = judged((field((1, 5, 0, 2, 30)), field((1, 8, 0, 2, 8), (1, 8, 11, 2, 8))))

    assert beside.report()["instance"]["splits"] == 1


def test_recall_and_precision_of_a_mixed_image() -> None:
    """Truth: 3 pits, 2 found. Prediction: 2 right pits, 1 alarm, 1 scratch on a pit."""
    truth = field((1, 2, 2, 3, 3), (1, 2, 20, 3, 3), (1, 20, 2, 3, 3))
    predicted = field((1, 2, 2, 3, 3), (1, 2, 20, 3, 3), (1, 30, 30, 3, 3), (2, 20, 2, 3, 3))
    instance = judged((truth, predicted)).report()["instance"]

    assert instance["recall_h"] == pytest.approx(2 / 3)
    assert instance["precision_h"] == pytest.approx(2 / 4)
    assert instance["f1_h"] == pytest.approx(2 * 2 / 3 * 1 / 2 / (2 / 3 + 1 / 2))
    assert instance["class_agnostic"]["recall_h"] == 1.0
    assert instance["class_agnostic"]["precision_h"] == pytest.approx(3 / 4)


# --- match T


def test_a_pair_under_tau_takes_no_partner_from_a_pair_above_it() -> None:
    """Taking all pairs, (0, 1) and (1, 0) sum to 0.74 and leave one pair of 0.45; alone above 0.3 is 0.5."""
    pairs = np.array([[0, 0], [0, 1], [1, 0]])
    ious = np.array([0.5, 0.45, 0.29])

    chosen, chosen_iou = match_tau(pairs, ious, tau=0.3)

    assert chosen.tolist() == [[0, 0]]
    assert chosen_iou.tolist() == [0.5]


def test_one_prediction_over_two_truths_matches_only_one_of_them() -> None:
    """Truths of 10 and 20 px under one prediction of 30 px: IoU 1/3 and 2/3."""
    truth = field((1, 5, 0, 1, 10), (1, 5, 11, 1, 20))
    predicted = field((1, 5, 0, 1, 31))
    match_t = judged((truth, predicted)).report()["instance"]["match_t"]

    assert match_t["0.3"]["pairs"] == 1
    assert match_t["0.3"]["f1"] == pytest.approx(2 / 3)  # 2 * 1 / (2 + 1)
    assert match_t["0.3"]["sq"] == pytest.approx(20 / 31, abs=1e-9)
    assert match_t["0.3"]["pq"] == pytest.approx(20 / 31 * 2 / 3, abs=1e-9)


def test_matches_are_those_of_monai_panoptic_quality() -> None:
    """On blobs that drift; 11 of the 50 pairs have IoU 0.5, where MONAI asks for more than its threshold."""
    rng = np.random.default_rng(7)
    metric = PanopticQualityMetric(num_classes=2, match_iou_threshold=0.5 - 1e-6, reduction="none")
    tally = Tally(TWO)
    expected = np.zeros(4)
    for _ in range(12):
        truth, predicted = field(size=(64, 64)), field(size=(64, 64))
        for _ in range(14):
            label, y, x = rng.integers(1, 3), *rng.integers(0, 55, 2)
            h, w = rng.integers(3, 9, 2)
            truth[y : y + h, x : x + w] = label
            dy, dx = rng.integers(0, 3, 2)
            predicted[y + dy : y + dy + h, x + dx : x + dx + w] = label if rng.random() < 0.8 else 3 - label
        tally.add(truth, predicted, predicted, "a")
        stacks = [
            torch.from_numpy(np.stack([components(m, 2).ids, m.astype(np.int32)]))[None]
            for m in (predicted, truth)
        ]
        expected += metric(*stacks).numpy().sum((0, 1))  # per class: right, false, missed, sum of IoU
    tp, fp, fn, iou_sum = expected
    instance = tally.report()["instance"]
    at_half = instance["match_t"]["0.5"]

    assert tp == 50
    assert at_half["pairs"] == tp
    assert (instance["n_predicted"] - at_half["pairs"], instance["n_truth"] - at_half["pairs"]) == (fp, fn)
    assert at_half["f1"] == pytest.approx(tp / (tp + fp / 2 + fn / 2))
    assert at_half["sq"] == pytest.approx(iou_sum / tp, rel=1e-6)
    assert at_half["pq"] == pytest.approx(iou_sum / (tp + fp / 2 + fn / 2), rel=1e-6)


# --- sizes


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [
        (1, 31, "tiny"),
        (2, 16, "small"),
        (5, 51, "small"),
        (16, 16, "medium"),
        (63, 65, "medium"),
        (64, 64, "large"),
    ],
)
def test_buckets_begin_at_32_256_and_4096_px(height: int, width: int, bucket: str) -> None:
    truth = field((1, 1, 1, height, width), size=(70, 70))
    report = judged((truth, truth)).report()

    sizes = report["instance"]["recall_by_size"]
    assert {name for name, at in sizes.items() if at["n"]} - {"tiny_small"} == {bucket}
    assert sizes["tiny_small"]["n"] == (bucket in ("tiny", "small"))


def test_no_recall_is_told_below_ten_defects_of_a_size_but_their_number_is() -> None:
    truth = field((1, 5, 5, 3, 3))
    nine = judged(*[(truth, truth)] * 9).report()["instance"]["recall_by_size"]["tiny"]
    ten = judged(*[(truth, truth)] * 9, (truth, field())).report()["instance"]["recall_by_size"]["tiny"]

    assert nine == {"recall": None, "n": 9, "low": None, "high": None}
    assert (ten["recall"], ten["n"]) == (0.9, 10)
    # Wilson by hand: z2 = 3.8415; (0.9 + 0.19207) / 1.38415 = 0.78898; half = 0.19323
    assert (ten["low"], ten["high"]) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))


def test_f1_of_tiny_and_small_judges_each_side_by_its_own_areas() -> None:
    """A pit found, a pit missed, a large patch found in full, and a false pit: recall 1/2, precision 1/2."""
    patch = (1, 2, 20, 18, 18)
    truth = field((1, 2, 2, 4, 4), (1, 30, 2, 4, 4), patch)
    predicted = field((1, 2, 2, 4, 4), (1, 30, 30, 4, 4), patch)
    counts = {key: table.sum(axis=0) for key, table in judged((truth, predicted)).statistics().items()}

    assert tiny_small_f1(counts) == pytest.approx(0.5)


def test_tiny_and_small_are_pooled_where_neither_has_ten() -> None:
    pairs = [(m, m) for m in (field((1, 5, 5, 3, 3)), field((1, 5, 5, 8, 8))) for _ in range(5)]
    sizes = judged(*pairs).report()["instance"]["recall_by_size"]

    assert sizes["tiny"]["recall"] is None
    assert sizes["small"]["recall"] is None
    assert sizes["tiny_small"]["recall"] == 1.0
    assert sizes["tiny_small"]["n"] == 10


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_wilson_interval_is_that_of_scipy(n: int, share: float) -> None:
    hits = round(share * n)
    oracle = stats.binomtest(hits, n).proportion_ci(method="wilson")

    assert wilson(hits, n) == (pytest.approx(oracle.low, abs=1e-12), pytest.approx(oracle.high, abs=1e-12))


# --- false alarms


@given(st.integers(0, 10_000))
def test_the_garwood_interval_is_that_of_chi_square(events: int) -> None:
    low, high = garwood(events)

    assert low == pytest.approx(stats.chi2.ppf(0.025, 2 * events) / 2 if events else 0.0)
    assert high == pytest.approx(stats.chi2.ppf(0.975, 2 * events + 2) / 2)


def test_no_alarm_on_three_and_a_half_mpx_leaves_an_upper_limit_of_1_05_per_mpx() -> None:
    clean = np.zeros((1750, 2000), dtype=np.uint8)
    rate = judged((clean, clean)).report()["false_alarms"]["clean_images"]

    assert (rate["n"], rate["with_alarm"], rate["alarms"], rate["mpx"]) == (1, 0, 0, 3.5)
    assert (rate["per_mpx"], rate["low"]) == (0.0, 0.0)
    assert rate["high"] == pytest.approx(1.054, abs=5e-4)  # 3.689 / 3.5


def test_false_alarms_are_counted_by_their_own_size_and_on_clean_images_apart() -> None:
    clean, alarmed = field(), field((1, 2, 2, 2, 2), (2, 20, 2, 6, 6))
    defect = field((1, 5, 5, 3, 3))
    alarms = judged((clean, alarmed), (clean, clean), (defect, defect)).report()["false_alarms"]

    assert alarms["alarms"] == 2
    assert alarms["per_mpx"] == pytest.approx(2 / (3 * 1600) * 1e6)
    assert alarms["by_size"] == {"tiny": 1, "small": 1, "medium": 0, "large": 0}
    assert alarms["clean_images"]["n"] == 2
    assert alarms["clean_images"]["with_alarm"] == 1
    assert alarms["clean_images"]["per_mpx"] == pytest.approx(2 / (2 * 1600) * 1e6)


def test_a_foreign_class_is_a_miss_and_no_class_aware_alarm_but_is_counted_apart() -> None:
    truth = field((1, 5, 5, 4, 4))
    report = judged((truth, field((7, 5, 5, 4, 4), (7, 30, 30, 2, 2)))).report()

    assert report["pixel"]["iou"] == {"pit": 0.0, "scratch": None}
    assert report["instance"]["recall_h"] == 0.0
    assert report["instance"]["n_predicted"] == 0
    assert report["false_alarms"]["alarms"] == 0
    assert report["false_alarms"]["foreign"]["alarms"] == 1  # the other one lies on a defect
    assert report["instance"]["class_agnostic"]["recall_h"] == 1.0
    assert report["instance"]["class_agnostic"]["precision_h"] == 0.5
    assert report["instance"]["class_agnostic"]["confusion"]["pit"]["(foreign)"] == 1


def test_a_foreign_class_alone_does_not_alarm_on_a_clean_image() -> None:
    alarms = judged((field(), field((7, 5, 5, 4, 4)))).report()["false_alarms"]

    assert (alarms["clean_images"]["n"], alarms["clean_images"]["with_alarm"]) == (1, 0)
    assert alarms["clean_images"]["alarms"] == 0
    assert alarms["foreign"]["alarms"] == 1


def test_what_was_not_inspected_is_missed_and_is_no_inspected_area() -> None:
    truth = field((1, 5, 5, 4, 4))
    predicted = field((255, 0, 0, 20, 40))
    report = judged((truth, predicted)).report()

    assert report["instance"]["recall_h"] == 0.0
    assert report["pixel"]["iou"]["pit"] == 0.0
    assert report["pixel"]["iou_background"] == pytest.approx(1584 / 1600)
    assert report["false_alarms"]["mpx"] == pytest.approx(800e-6)
    assert report["false_alarms"]["foreign"]["alarms"] == 0


def test_an_alarm_mostly_inside_ignore_is_no_false_alarm() -> None:
    truth = field((255, 0, 0, 10, 40))
    inside, outside = field((1, 7, 5, 4, 4)), field((1, 8, 5, 5, 4))  # 12 of 16 px and 8 of 20 px in ignore
    report = judged((truth, inside), (truth, outside)).report()

    assert report["false_alarms"]["alarms"] == 1
    assert report["false_alarms"]["mpx"] == pytest.approx(2 * 1200e-6)
    assert report["false_alarms"]["clean_images"]["n"] == 2


# --- nothing there


def test_without_images_nothing_is_defined() -> None:
    tally = Tally(TWO)
    report = tally.report()

    assert report["n_images"] == 0
    assert report["pixel"]["miou"] is None
    assert report["instance"]["f1_h"] is None
    assert report["false_alarms"]["per_mpx"] is None
    assert tally.intervals()["pixel"]["miou"] == {"low": None, "high": None}


def test_an_empty_image_predicted_empty_defines_no_recall_and_no_alarm() -> None:
    report = judged((field(), field())).report()

    assert report["pixel"]["miou"] is None
    assert [report["instance"][key] for key in ("recall_h", "precision_h", "f1_h")] == [None, None, None]
    assert report["instance"]["match_t"]["0.5"] == {"f1": None, "sq": None, "pq": None, "pairs": 0}
    assert report["false_alarms"]["per_mpx"] == 0.0


def test_an_image_ignored_as_a_whole_counts_for_nothing_but_its_number() -> None:
    ignored = np.full((10, 10), 255, dtype=np.uint8)
    report = judged((ignored, field((1, 2, 2, 3, 3), size=(10, 10)))).report()

    assert report["n_images"] == 1
    assert report["instance"]["n_predicted"] == 0
    assert report["false_alarms"]["mpx"] == 0.0
    assert report["false_alarms"]["per_mpx"] is None
    assert report["false_alarms"]["clean_images"]["n"] == 0


def test_alarms_without_any_defect_have_f1_zero() -> None:
    instance = judged((field(), field((1, 5, 5, 3, 3)))).report()["instance"]

    assert (instance["recall_h"], instance["precision_h"], instance["f1_h"]) == (None, 0.0, 0.0)


def test_a_truth_value_beyond_the_classes_is_refused_with_value_and_group() -> None:
    with pytest.raises(UserError, match=r"group coil-7 holds the value 3, but the data has 2 classes"):
        Tally(TWO).add(grid("13"), grid("11"), grid("11"), "coil-7")


def test_maps_of_another_size_or_type_are_refused() -> None:
    with pytest.raises(ValueError, match="thresholded is"):
        Tally(TWO).add(grid("11"), grid("11"), grid("1"), "a")
    with pytest.raises(ValueError, match="argmax is"):
        Tally(TWO).add(grid("11"), grid("11").astype(np.int64), grid("11"), "a")  # type: ignore[arg-type]


# --- laws

LABELS = arrays(np.uint8, (12, 14), elements=st.sampled_from([0, 0, 0, 0, 1, 2]))
PREDICTED = arrays(np.uint8, (12, 14), elements=st.sampled_from([0, 0, 0, 0, 1, 2, 5, 255]))
TRUTHS = arrays(np.uint8, (12, 14), elements=st.sampled_from([0, 0, 0, 0, 1, 2, 255]))


@given(LABELS)
@settings(deadline=None)
def test_a_perfect_prediction_has_every_figure_at_one(truth: Map) -> None:
    truth[0, 0] = 1
    report = judged((truth, truth)).report()
    instance = report["instance"]

    assert report["pixel"]["miou"] == 1.0
    for figures in (instance, instance["class_agnostic"]):
        assert (figures["recall_h"], figures["precision_h"], figures["f1_h"]) == (1.0, 1.0, 1.0)
        assert [figures["match_t"][tau]["pq"] for tau in ("0.1", "0.3", "0.5")] == [1.0, 1.0, 1.0]
    assert report["false_alarms"]["alarms"] == 0


@given(TRUTHS, PREDICTED, st.integers(1, 2))
@settings(deadline=None)
def test_one_more_false_alarm_never_raises_precision_nor_changes_recall(
    truth: Map, predicted: Map, label: int
) -> None:
    room = ((0, 0), (0, 8))  # clean steel on the right, out of reach of anything else
    truth, predicted = np.pad(truth, room), np.pad(predicted, room)
    alarmed = predicted.copy()
    alarmed[5, -2] = label
    before, after = judged((truth, predicted)).report(), judged((truth, alarmed)).report()

    assert (after["instance"]["precision_h"] or 0.0) <= (before["instance"]["precision_h"] or 1.0)
    assert after["instance"]["recall_h"] == before["instance"]["recall_h"]
    assert after["false_alarms"]["alarms"] == before["false_alarms"]["alarms"] + 1


@given(st.lists(st.tuples(TRUTHS, PREDICTED, st.sampled_from("abc")), min_size=2, max_size=5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_report_and_its_intervals_do_not_depend_on_the_order_of_images(
    images: list[tuple[Map, Map, str]], random: Random
) -> None:
    def tally_of(order: list[tuple[Map, Map, str]]) -> Tally:
        tally = Tally(TWO)
        for truth, predicted, group in order:
            tally.add(truth, predicted, predicted, group)
        return tally

    shuffled = random.sample(images, len(images))
    first, second = tally_of(images), tally_of(shuffled)

    assert first.report() == second.report()
    assert first.intervals(draws=50) == second.intervals(draws=50)


@given(TRUTHS, PREDICTED)
@settings(deadline=None)
def test_class_agnostic_finds_no_less_and_pairs_no_more_than_there_is(truth: Map, predicted: Map) -> None:
    instance = judged((truth, predicted)).report()["instance"]
    agnostic = instance["class_agnostic"]

    assert (agnostic["recall_h"] or 0.0) >= (instance["recall_h"] or 0.0)
    for figures in (instance, agnostic):
        for at in figures["match_t"].values():
            assert at["pairs"] <= min(figures["n_truth"], figures["n_predicted"])


# --- intervals over groups


def shifted_strip(group: int, shift: int) -> tuple[Map, Map]:
    truth = field((1, 5, 5, 6, 4 + group), (2, 25, 4 + group, 5, 5))
    return truth, np.roll(truth, shift, axis=1)


def test_a_figure_that_is_the_same_in_all_groups_has_an_interval_without_width() -> None:
    truth, predicted = field((1, 5, 5, 4, 4)), field((1, 5, 5, 4, 2))
    low_high = judged(*[(truth, predicted)] * 5).intervals(draws=100)["pixel"]

    assert low_high["miou"] == {"low": 0.5, "high": 0.5}
    assert low_high["iou"]["scratch"] == {"low": None, "high": None}


def test_the_tiny_small_interval_pools_both_sizes_and_leaves_out_larger_ones() -> None:
    """Each group finds its small and its medium defect and misses its tiny one: 1 of 2."""
    tiny, small, medium = (1, 2, 2, 3, 3), (1, 2, 20, 8, 8), (1, 20, 2, 16, 17)
    tally = judged(*[(field(tiny, small, medium), field(small, medium))] * 6)
    sizes = tally.report()["instance"]["recall_by_size"]
    interval = tally.intervals(draws=50)["instance"]["recall_by_size"]["tiny_small"]["recall"]

    assert (sizes["tiny_small"]["recall"], sizes["tiny_small"]["n"]) == (0.5, 12)
    assert interval == {"low": 0.5, "high": 0.5}


def test_the_interval_of_a_share_over_many_groups_is_the_normal_one() -> None:
    """400 groups with one trial each, 30 % hits: 0.3 +- 1.96 sqrt(0.21 / 400)."""
    hits = (np.arange(400) % 10 < 3).astype(np.int64)
    low, high = bootstrap({"hits": hits, "n": np.ones(400)}, lambda c: c["hits"] / c["n"], draws=4000)

    assert low == pytest.approx(0.3 - 0.0449, abs=0.006)
    assert high == pytest.approx(0.3 + 0.0449, abs=0.006)


def test_the_interval_holds_the_figure_and_the_same_seed_gives_the_same_interval() -> None:
    tally = judged(*[shifted_strip(g, g % 4) for g in range(12)])
    intervals, miou = tally.intervals(), tally.report()["pixel"]["miou"]

    assert intervals["pixel"]["miou"]["low"] < miou < intervals["pixel"]["miou"]["high"]
    assert tally.intervals() == intervals
    assert tally.intervals(seed=1) != intervals


def test_group_counters_summed_again_give_the_figures_of_the_report() -> None:
    tally = judged(*[shifted_strip(g, g % 3) for g in range(6)])
    statistics = tally.statistics()
    total = {name: table.sum(axis=0) for name, table in statistics.items()}

    assert tally.groups == tuple(f"g{g:03}" for g in range(6))
    assert all(len(table) == 6 for table in statistics.values())
    assert float(mean_iou(total)) == tally.report()["pixel"]["miou"]
    assert class_iou(statistics).shape == (6, 3)  # the same figure, one per group
    assert total["pair_iou"].max() <= 12 * IOU_UNIT


def test_one_group_has_no_interval_over_groups() -> None:
    interval = judged(shifted_strip(1, 1)).intervals()

    assert interval["pixel"]["miou"] == {"low": None, "high": None}
    assert interval["instance"]["recall_h"] == {"low": None, "high": None}


def test_a_class_that_stands_in_one_group_only_has_no_interval() -> None:
    only_pit, both = field((1, 5, 5, 4, 4)), field((1, 5, 5, 4, 4), (2, 20, 20, 4, 4))
    iou = judged(*[(only_pit, only_pit)] * 9, (both, both)).intervals()["pixel"]["iou"]

    assert iou == {"pit": {"low": 1.0, "high": 1.0}, "scratch": {"low": None, "high": None}}


def test_a_tally_differs_from_itself_by_nothing_and_from_a_worse_one_by_more_than_nothing() -> None:
    good = judged(*[shifted_strip(g, 1) for g in range(8)])
    bad = judged(*[shifted_strip(g, 2) for g in range(8)])

    assert good.difference(good)["pixel"]["miou"] == {"low": 0.0, "high": 0.0}
    assert good.difference(bad)["pixel"]["miou"]["low"] > 0.0
    assert bad.difference(good)["pixel"]["miou"]["high"] < 0.0


def test_a_constant_gain_in_every_group_is_a_difference_without_width() -> None:
    a = np.arange(20.0)
    low, high = bootstrap_difference({"x": a}, {"x": a + 1}, lambda c: c["x"] / 20)

    assert (low, high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_a_paired_difference_needs_the_same_groups() -> None:
    with pytest.raises(ValueError, match="same groups"):
        judged(shifted_strip(1, 1)).difference(judged(shifted_strip(1, 1), shifted_strip(2, 1)))
    with pytest.raises(ValueError, match="same groups"):
        bootstrap_difference({"x": np.ones(3)}, {"x": np.ones(4)}, lambda c: c["x"])


# --- the shape others build on


def test_the_report_is_plain_json_with_the_agreed_keys() -> None:
    truth = field((1, 5, 5, 4, 4))
    report = json.loads(json.dumps(judged((truth, truth)).report(), allow_nan=False))

    assert isinstance(report["n_images"], int)
    assert set(report["pixel"]["iou"]) == set(TWO)
    assert {"recall_h", "precision_h", "f1_h", "recall_by_size"} <= set(report["instance"])
    assert list(report["instance"]["recall_by_size"]) == ["tiny", "small", "medium", "large", "tiny_small"]
    assert set(report["instance"]["recall_by_size"]["tiny"]) == {"recall", "n", "low", "high"}
    assert {"per_mpx", "clean_images"} <= set(report["false_alarms"])


DATA = Path(os.environ.get("ROLLSIGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.shared
@pytest.mark.skipif(not (DATA / "neu_clean").is_dir(), reason=f"needs the labelled data at {DATA}")
def test_the_171_neu_test_masks_with_noise_are_judged_in_under_three_seconds() -> None:
    folder = DATA / "neu_clean"
    rng = np.random.default_rng(0)
    tally = Tally(tuple(json.loads((folder / "classes.json").read_text())))
    spent_s = 0.0
    with (folder / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    for row in rows:
        truth = np.asarray(Image.open(folder / row["mask"]))
        predicted = np.roll(truth, (2, 1), (0, 1))
        noise = rng.random(truth.shape) < 0.002
        predicted[noise] = rng.integers(1, 4, noise.sum())
        start = time.process_time()
        tally.add(truth, predicted, predicted, row["group"])
        spent_s += time.process_time() - start
    report = tally.report()

    assert spent_s < 3.0  # 0.6 s on one core at 2.1 GHz
    assert report["n_images"] == 171
    assert report["instance"]["recall_by_size"]["tiny"]["n"] == 24  # as the data's README counts them
    assert report["instance"]["recall_h"] > 0.99
