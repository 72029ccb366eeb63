"""Control bands and drift, held against what they are made to find and against chance."""

import numpy as np
import pytest
from rollsight.inspect.trends import LEAST_NIGHTS, SCORE_BINS, score_drift, u_chart
from scipy import stats


def test_the_band_is_that_of_the_book():
    """Mean +- 3 sqrt(mean / area), per night's own area, of the nights before the last."""
    counts, areas = [4, 6, 5, 5, 4, 6, 5, 5, 20, 40], [1.0] * 8 + [4.0, 4.0]
    chart = u_chart(counts, areas)

    assert chart.mean == pytest.approx(60 / 12)
    assert chart.high[0] == pytest.approx(5 + 3 * np.sqrt(5))
    assert chart.high[-1] == pytest.approx(5 + 3 * np.sqrt(5 / 4))
    assert (chart.spread, chart.says) == (1.0, "above")


def test_a_night_by_chance_is_seldom_out_of_band_and_a_doubled_rate_is_found():
    rng = np.random.default_rng(0)
    areas = rng.uniform(20, 40, 30)
    nights = [rng.poisson(2 * areas) for _ in range(400)]
    quiet = [u_chart(counts, areas).says for counts in nights]
    loud = [u_chart([*counts[:-1], rng.poisson(4 * areas[-1])], areas).says for counts in nights]

    assert np.mean([says in ("above", "below") for says in quiet]) < 0.02
    assert np.mean([says == "above" for says in loud]) > 0.98


def test_clusters_widen_the_band():
    """Negative binomial counts that scatter three times as wide: Poisson limits would cry wolf."""
    rng = np.random.default_rng(1)
    areas = np.full(30, 30.0)
    charts = [u_chart(rng.negative_binomial(7.5, 7.5 / 67.5, 30), areas) for _ in range(300)]

    assert np.mean([chart.says in ("above", "below") for chart in charts]) < 0.03
    plain = [60 + 3 * np.sqrt(60) < chart.rate[-1] * 30 for chart in charts]
    assert np.mean(plain) > 0.1


def test_nine_nights_above_the_mean_have_risen():
    chart = u_chart([10] * 20 + [14] * 9, np.ones(29))

    assert chart.says == "risen"
    assert chart.rate[-1] < chart.high[-1]


def test_too_few_nights_make_no_band_and_a_night_without_strip_is_left_out():
    few = u_chart([1] * LEAST_NIGHTS, [1] * LEAST_NIGHTS)
    gap = u_chart([1] * 9 + [0], [1] * 9 + [0])

    assert (few.says, few.mean) == ("too few nights", None)
    assert np.isnan(gap.rate[-1]) and gap.says == "in band"


def histogram(scores) -> np.ndarray:
    return np.histogram(scores, bins=SCORE_BINS, range=(0, 1))[0]


def test_scores_of_the_same_kind_are_alike_and_shifted_ones_drift():
    rng = np.random.default_rng(2)
    old = histogram(rng.beta(8, 2, 5000))
    same = [score_drift(old, histogram(rng.beta(8, 2, n))).says for n in (60, 300, 2000) for _ in range(100)]
    moved = [score_drift(old, histogram(rng.beta(5, 3, n))).says for n in (300, 2000) for _ in range(50)]

    assert same.count("alike") >= 295
    assert set(moved) == {"drift"}


def test_the_index_is_the_one_of_the_book():
    """Two even halves of the reference against 60 : 40, worked out by hand."""
    old, new = np.zeros(SCORE_BINS), np.zeros(SCORE_BINS)
    old[5], old[15] = 50_000, 50_000
    new[5], new[15] = 60_000, 40_000

    assert score_drift(old, new).index == pytest.approx(0.1 * np.log(1.2) - 0.1 * np.log(0.8), rel=1e-3)


def test_chance_is_what_the_book_says():
    """The mean of the index without any change is (B - 1)(1/n + 1/m), within what 400 draws can tell."""
    rng = np.random.default_rng(3)
    old = histogram(rng.uniform(0, 1, 1000))
    index = [
        score_drift(histogram(rng.uniform(0, 1, 1000)), histogram(rng.uniform(0, 1, 1000))).index
        for _ in range(400)
    ]

    assert old.sum() == 1000
    assert np.mean(index) == pytest.approx(9 * 2 / 1000, rel=0.15)
    assert stats.sem(index) < 0.002


def test_few_scores_tell_nothing():
    assert score_drift(np.full(SCORE_BINS, 100), np.ones(SCORE_BINS)).says == "too few scores"
