"""Found defects and false alarms at every threshold: the tally, MONAI, cases worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_froc_curve_data, compute_froc_score
from rollsight.inspect.froc import RATES, Sweep
from rollsight.inspect.metrics import Tally


def field(*rectangles, size=(40, 40), dtype=np.float32):
    """Background 0 with rectangles (value, y, x, height, width)."""
    out = np.zeros(size, dtype=dtype)
    for value, y, x, height, width in rectangles:
        out[y : y + height, x : x + width] = value
    return out


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_each_threshold_counts_what_the_tally_counts_on_its_map(seed):
    """Also where parts are ignored, as far as alarms go (a truth component has no px there)."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((2, 1, 6, 6)).repeat(4, axis=2).repeat(4, axis=3)
    truth, p = (coarse[0, 0] > 0.7).astype(np.uint8), coarse[1].astype(np.float32)
    truth[rng.random(truth.shape) < 0.02] = 1  # defects of one px
    p *= rng.uniform(0.8, 1, p.shape).astype(np.float32)
    if seed % 2:
        truth[5:12, 5:12] = 255
    thresholds = (0.2, 0.5, 0.51, 0.8)
    sweep = Sweep(("pit",), thresholds)
    sweep.add(truth, p)

    for i, t in enumerate(thresholds):
        tally, found = Tally(("pit",)), (p[0] >= t).astype(np.uint8)
        tally.add(truth, found, found, "a")
        counts = tally.statistics()
        assert sweep.predicted[i, 0] == counts["predicted"].sum()
        assert sweep.true[i, 0] == counts["true"].sum()
        assert np.array_equal(sweep.truth, counts["truth"][0])
        if not seed % 2:
            assert np.array_equal(sweep.found[i], counts["found"][0])


def test_the_score_is_that_of_monai_where_a_threshold_only_drops_components():
    """Two images with flat blobs, a threshold between each two of their probabilities."""
    levels = np.arange(0.05, 0.96, 0.1)
    sweep = Sweep(("pit",), np.round(levels - 0.02, 3))
    rng = np.random.default_rng(3)
    hits, alarms, defects = [], [], 0
    for scores in rng.permutation(levels).reshape(2, 5).tolist():
        truth, p = field(dtype=np.uint8), field()
        for i, score in enumerate(scores):
            p[8 * i : 8 * i + 3, 2:6] = score
            if rng.random() < 0.6:
                truth[8 * i : 8 * i + 3, 2:6] = 1
                hits.append(score)
            else:
                alarms.append(score)
        truth[2:4, 30:33] = 1  # never found
        defects += int(len(np.unique(truth)) > 1)
        sweep.add(truth, p[None])
    n = len(hits) + defects
    curve = compute_froc_curve_data(np.array(alarms), np.array(hits), n, 2)
    m2_per_mpx = 300.0  # so that the alarms come at rates of the score
    area = 2 * 40 * 40 / 1e6 * m2_per_mpx
    rates = tuple(r * area / 2 for r in RATES)  # per image instead of per m2

    # MONAI leaves out the lowest threshold, which only lengthens the curve beyond the rates.
    assert len(alarms) > 1
    assert sweep.froc(m2_per_mpx)["score"] == pytest.approx(compute_froc_score(*curve, rates))
    measured = {(round(rate * 2 / area, 6), round(recall, 6)) for rate, recall in zip(*curve, strict=True)}
    own = {(round(p["rate"], 6), round(p["recall"], 6)) for p in sweep.froc(m2_per_mpx)["curve"]}
    assert len(own - measured) <= 1
    assert measured <= own


def test_a_false_region_that_breaks_into_many_counts_as_many():
    p = field((0.6, 4, 4, 9, 30), (0.9, 6, 6, 3, 3), (0.9, 6, 20, 3, 3))
    sweep = Sweep(("pit",), (0.5, 0.8))
    sweep.add(np.zeros((40, 40), np.uint8), p[None])
    assert sweep.alarms().tolist() == [[1], [2]]


def test_below_one_half_alarms_that_melt_into_one_stay_two():
    p = field((0.6, 4, 4, 3, 3), (0.6, 4, 20, 3, 3), (0.3, 4, 7, 3, 13))
    sweep = Sweep(("pit",), (0.2, 0.5, 0.8))
    sweep.add(np.zeros((40, 40), np.uint8), p[None])
    assert sweep.predicted.tolist() == [[1], [2], [0]]
    assert sweep.alarms().tolist() == [[2], [2], [0]]


def test_alarms_are_counted_on_clean_images_where_there_are_any():
    spot = field((0.9, 4, 4, 3, 3))[None]
    sweep = Sweep(("pit",))
    sweep.add(field((1, 30, 30, 5, 5), dtype=np.uint8), spot)
    assert (sweep.alarms()[9, 0], sweep.alarm_mpx) == (1, 40 * 40 / 1e6)
    sweep.add(np.zeros((20, 20), np.uint8), spot[:, :20, :20] * 0)
    assert (sweep.alarms()[9, 0], sweep.alarm_mpx) == (0, 20 * 20 / 1e6)


def test_the_right_place_with_the_wrong_class_is_a_miss_and_an_alarm():
    truth, spot = field((1, 4, 4, 6, 6), dtype=np.uint8), field((0.9, 4, 4, 6, 6))
    sweep = Sweep(("pit", "scratch"))
    sweep.add(truth, np.stack([spot * 0, spot]))
    assert sweep.found.sum() == 0
    assert sweep.alarms()[9].tolist() == [0, 1]


def test_without_a_defect_there_is_no_recall():
    sweep = Sweep(("pit",))
    sweep.add(np.zeros((20, 20), np.uint8), np.zeros((1, 20, 20), np.float32))
    assert sweep.froc()["score"] is None
    assert sweep.precision_recall() == {}


def test_precision_and_recall_stand_at_each_threshold_that_predicts_anything():
    truth = field((1, 4, 4, 6, 6), dtype=np.uint8)
    p = field((0.7, 4, 4, 6, 6), (0.4, 20, 20, 6, 6))[None]
    sweep = Sweep(("pit",), (0.3, 0.6, 0.8))
    sweep.add(truth, p)
    assert sweep.precision_recall() == {
        "pit": [
            {"threshold": 0.3, "precision": 0.5, "recall": 1.0},
            {"threshold": 0.6, "precision": 1.0, "recall": 1.0},
        ]
    }
