"""Pieces left out one by one: no image of a piece chooses the thresholds that it is judged at."""

from dataclasses import replace

import pytest
import torch
from rollsight.inspect.labels import open_labels
from rollsight.synth.arms import CHOICES, EVEN, Thresholds, judged, ladder
from rollsight.synth.draws import piece_out
from rollsight.synth.folds import folds


class Darkness(torch.nn.Module):
    """Is the surer of the first class the darker a px is."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 3, *image.shape[2:])
        logits[:, 1] = 20 * (0.45 - image[:, 0])
        logits[:, 2] = -9
        return logits


@pytest.fixture
def held(few_scenes):
    return piece_out(open_labels(few_scenes), "pit").held("test", 3)  # piece-6, and piece-7 without the class


def test_a_rung_tells_what_the_net_finds_at_its_threshold(held):
    rungs = ladder(Darkness(), held, "pit")

    assert [rung["threshold"] for rung in rungs] == list(CHOICES)
    areas = [rung["classes"]["pit"]["either"] for rung in rungs]
    assert areas[0] > areas[-1] > 0
    for choice in (0.3, 0.9):
        rung = rungs[CHOICES.index(choice)]
        told = judged(Darkness(), held, "pit", Thresholds(choice, choice))
        piece = told["groups"].index("piece-6")
        for key, value in rung["classes"]["pit"].items():
            assert value == told["counts"]["classes"]["pit"][key][piece]
        assert rung["classes"]["scratch"]["truth"] == sum(told["counts"]["classes"]["scratch"]["truth"])
        assert rung["clean"] == {key: sum(of) for key, of in told["counts"]["clean"].items()}


def test_without_a_clean_group_there_are_no_alarms_to_count(held):
    alone = replace(held, samples=tuple(s for s in held.samples if s.group == "piece-6"))

    assert {rung["clean"]["area"] for rung in ladder(Darkness(), alone, "pit")} == {0}


def piece(arm: str, draw: int, both: list[int], true: list[int]) -> dict:
    """A run whose rungs have so many px in common with the truth's 10, and of 10 found parts so many true."""
    none = {"iou": 0.0, "f1_h": 0.0, "recall_by_size": {}, "fa_per_mpx": 0.0}
    about = {"data": "mt", "rare_class": "pit", "k": None, "arm": arm, "draw": draw, "gan_seed": None}
    rungs = [
        {
            "classes": {
                "pit": {"both": b, "either": 10, "truth": 10, "found": t, "true": t, "predicted": 10},
                "dent": {"both": 1, "either": 2, "truth": 0, "found": 0, "true": 0, "predicted": t},
            },
            "by_size": {size: {"truth": 10, "found": t} for size in ("tiny", "small")},
            "clean": {"alarms": t, "area": 1_000_000},
        }
        for b, t in zip(both, true, strict=True)
    ]
    return {**about, **none, "iou_by_class": {}, "f1_h_by_class": {}, "ladder": rungs}


def test_a_piece_is_judged_at_the_thresholds_that_the_others_choose():
    told = [
        piece("gan", 0, [1, 2, 9], [6, 1, 1]),  # alone its best rungs would be the last and the first
        piece("gan", 1, [1, 8, 3], [1, 7, 1]),
        piece("gan", 2, [1, 8, 3], [1, 5, 1]),
    ]

    rows, [together] = folds(told, 3)

    assert [row["iou"] for row in rows] == [0.2, 0.3, 0.3]  # of 1 and 2 the last rung: 9 + 3 of 20 px
    assert [row["f1_h"] for row in rows] == pytest.approx([0.1, 0.1, 0.5])
    assert together["iou"] == pytest.approx((2 + 3 + 3) / 30) and together["complete"]
    assert together["recall_by_size"]["tiny_small"] == {"recall": pytest.approx(14 / 60), "n": 60}
    assert together["fa_per_mpx"] == pytest.approx(7 / 3) and together["pieces"] == 3
    assert together["iou_by_class"] == {"pit": together["iou"], "dent": 0.5}


def test_arms_are_told_together_on_the_pieces_that_all_have():
    told = [piece("real", draw, [1] * len(CHOICES), [1] * len(CHOICES)) for draw in (0, 1)]
    told.append(piece("gan", 1, list(range(len(CHOICES))), [1] * len(CHOICES)))

    rows, together = folds(told, 2)

    assert not any(one["complete"] for one in together)
    assert len(rows) == 3 and [(one["arm"], one["pieces"]) for one in together] == [("real", 1), ("gan", 1)]
    assert together[1]["iou"] == CHOICES.index(EVEN) / 10  # alone nothing tells its threshold
    assert folds([], 2) == ([], [])
