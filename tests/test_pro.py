"""The area under the per-region overlap against a computation over every threshold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollsight.inspect.pro import Overlap
from scipy import ndimage


def by_hand(truth, score, limit):
    """Every distinct score a threshold, components by scipy, the trapezoid cut at the limit."""
    regions, n = ndimage.label(truth > 0, np.ones((3, 3)))
    rate, overlap = [0.0], [0.0]
    for t in np.unique(score)[::-1]:
        over = score >= t
        rate.append(over[truth == 0].mean())
        overlap.append(np.mean([over[regions == i + 1].mean() for i in range(n)]))
    dense = np.linspace(0, limit, 20_001)  # the curve has upright steps
    return np.trapezoid(np.interp(dense, rate, overlap), dense) / limit


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_the_area_is_that_over_all_thresholds(seed):
    rng = np.random.default_rng(seed)
    truth = (rng.random((8, 8)).repeat(3, axis=0).repeat(3, axis=1) > 0.8).astype(np.uint8)
    truth[0, 0], truth[-1, -1] = 1, 0
    # 40 levels, so that each has a bin of its own
    score = np.round(np.clip(rng.normal(3.0 * truth, 2), -10, 10) * 2) / 2 + 0.01
    overlap = Overlap()
    overlap.add(truth, score.astype(np.float32))

    assert overlap.area(0.3) == pytest.approx(by_hand(truth, score, 0.3), abs=1e-3)


def test_a_perfect_score_has_area_one_and_a_constant_one_grows_with_the_rate():
    truth = np.zeros((40, 40), np.uint8)
    truth[5:9, 5:9] = truth[20, 20] = 1
    perfect, flat = Overlap(), Overlap()
    perfect.add(truth, np.where(truth, 5, -5).astype(np.float32))
    flat.add(truth, np.zeros((40, 40), np.float32))

    assert perfect.area() == 1
    assert flat.area(0.05) == pytest.approx(0.025)


def test_a_defect_of_one_px_weighs_as_much_as_a_large_one():
    truth = np.zeros((40, 40), np.uint8)
    truth[5:15, 5:15] = truth[30, 30] = 1
    score = np.where(truth, 5, -5).astype(np.float32)
    score[30, 30] = -5  # missed
    overlap = Overlap()
    overlap.add(truth, score)
    # half of the overlap at once, the rest only with all of the background
    assert overlap.area(0.05) == pytest.approx(0.5 + 0.5 * 0.025)


def test_ignored_pixels_count_on_neither_side_and_nothing_has_no_area():
    truth = np.full((20, 20), 255, np.uint8)
    overlap = Overlap()
    overlap.add(truth, np.zeros((20, 20), np.float32))
    assert (overlap.regions, overlap.background.sum()) == (0, 0)
    assert overlap.area() is None
