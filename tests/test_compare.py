"""Models compared on the same groups: better is said only where the interval holds no 0."""

import json

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.compare import FIGURES, NOT_SHOWN, compare, draw, in_words
from rollsight.inspect.metrics import Tally


def judged(
    seed: int, found: float, alarms: float, images: int = 30, groups: int = 30, side: int = 6
) -> Tally:
    """One pit of `side` x `side` px per image, found with one probability, and alarms with another."""
    tally, rng = Tally(("pit",)), np.random.default_rng(seed)
    for i in range(images):
        truth, predicted = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
        pit = slice(4, 4 + side), slice(4, 4 + side)
        truth[pit] = 1
        predicted[pit] = rng.random() < found
        predicted[30:33, 30:33] = rng.random() < alarms
        tally.add(truth, predicted, predicted, f"g{i % groups}")
    return tally


def test_a_model_that_finds_more_is_better_and_one_that_alarms_more_is_worse():
    told = compare({"a": judged(0, 0.4, 0.1), "b": judged(1, 0.95, 0.9)})
    [difference] = told["differences"]

    assert difference["recall_tiny_small"]["says"] == difference["miou"]["says"] == "better"
    assert difference["recall_tiny_small"]["low"] > 0
    assert difference["fa_per_mpx"]["says"] == "worse"
    assert difference["fa_per_mpx"]["value"] > 0
    assert "better in mIoU, F1 (hit), recall tiny + small" in in_words(difference)
    assert "worse in false alarms per Mpx" in in_words(difference)


def test_fewer_alarms_are_better():
    told = compare({"a": judged(0, 0.9, 0.9), "b": judged(1, 0.9, 0.1)})
    assert told["differences"][0]["fa_per_mpx"]["says"] == "better"
    assert told["differences"][0]["fa_per_mpx"]["high"] < 0


def test_a_difference_whose_interval_holds_0_is_not_shown_and_the_words_say_so():
    told = compare({"a": judged(0, 0.8, 0.5), "b": judged(1, 0.8, 0.5), "c": judged(2, 0.8, 0.5)})

    assert [d["name"] for d in told["differences"]] == ["b", "c"]
    assert {d["against"] for d in told["differences"]} == {"a"}
    for difference in told["differences"]:
        assert {difference[key]["says"] for key in FIGURES} == {NOT_SHOWN}
        assert difference["f1_h"]["low"] <= 0 <= difference["f1_h"]["high"]
        assert "is not shown: its interval holds 0" in in_words(difference)


def test_a_model_against_itself_differs_by_nothing():
    told = compare({"a": judged(0, 0.8, 0.5), "b": judged(0, 0.8, 0.5)})
    for key in FIGURES:
        assert told["differences"][0][key] == {"value": 0.0, "low": 0.0, "high": 0.0, "says": NOT_SHOWN}


def test_the_figures_are_those_of_the_report():
    tally = judged(0, 0.7, 0.5)
    told, report = compare({"a": tally, "b": judged(1, 0.7, 0.5)})["models"][0], tally.report()

    assert told["miou"]["value"] == report["pixel"]["miou"]
    assert told["f1_h"]["value"] == report["instance"]["f1_h"]
    assert told["recall_tiny_small"]["value"] == report["instance"]["recall_by_size"]["tiny_small"]["recall"]
    assert told["fa_per_mpx"]["value"] == pytest.approx(report["false_alarms"]["per_mpx"])
    span = tally.intervals()["pixel"]["miou"]
    assert (told["miou"]["low"], told["miou"]["high"]) == (span["low"], span["high"])


def test_fewer_than_ten_small_defects_or_one_group_say_nothing():
    told = compare({"a": judged(0, 0.2, 0.5, side=20), "b": judged(1, 1.0, 0.5, side=20)})
    assert told["differences"][0]["recall_tiny_small"]["value"] is None
    assert "nothing can be said of recall tiny + small" in in_words(told["differences"][0])

    told = compare({"a": judged(0, 1.0, 0.5, groups=1), "b": judged(1, 1.0, 0.5, groups=1)})
    difference = told["differences"][0]["miou"]
    assert difference["value"] is not None and difference["low"] is None
    json.dumps(told, allow_nan=False)


def test_fewer_than_ten_defects_of_any_size_say_nothing_but_of_false_alarms():
    """Nine pits, all missed or all found, are no difference that counts; alarms need no defect."""
    told = compare({"a": judged(0, 0.0, 0.0, 9), "b": judged(1, 1.0, 1.0, 9)})
    [difference] = told["differences"]

    for row in (*told["models"], difference):
        assert [key for key in FIGURES if row[key]["value"] is not None] == ["fa_per_mpx"]
    assert difference["fa_per_mpx"]["says"] == "worse"
    assert "nothing can be said of mIoU, F1 (hit), recall tiny + small" in in_words(difference)

    ten = compare({"a": judged(0, 0.0, 0.0, 10), "b": judged(1, 1.0, 1.0, 10)})
    assert ten["differences"][0]["miou"]["says"] == "better"


def test_other_groups_are_no_pair():
    with pytest.raises(ValueError, match="same groups"):
        compare({"a": judged(0, 1, 1, 5), "b": judged(0, 1, 1, 6)})


def test_the_plot_is_a_png_and_nothing_else_is_left(tmp_path):
    told = compare({"a": judged(0, 0.4, 0.1, 9), "b": judged(1, 0.95, 0.9, 9), "c": judged(2, 0.4, 0.1, 9)})
    path = tmp_path / "runs" / "plot.png"
    draw(told, "three models", path)

    assert [file.name for file in path.parent.iterdir()] == ["plot.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.unique(np.asarray(image.convert("L"))).size > 10
