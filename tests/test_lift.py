"""The proof's arithmetic: draws that nest, paired intervals with known answers, nothing shown by chance."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from rollsight.inspect.engines import torch_engine
from rollsight.inspect.errors import UserError
from rollsight.inspect.evaluate import padded_logits
from rollsight.inspect.labels import open_labels
from rollsight.inspect.metrics import Tally
from rollsight.synth.arms import (
    Thresholds,
    best_thresholds,
    counts,
    crops_of,
    figures,
    generator_of,
    judged,
    needs_generator,
    net_logits,
)
from rollsight.synth.draws import piece_out, rarity
from rollsight.synth.lift import OF_CLASS, lift, means, over_real, summary
from rollsight.synth.proof import Plan
from rollsight.synth.strip import SimulatedStrip, simulate_roll


def run(hits: np.ndarray, alarms: float = 1.0) -> np.ndarray:
    """Counts of a run that finds `hits` of 100 px and, of 10 components, a tenth of that, in each group.

    alarms: false ones in each group, on a hundredth of a Mpx.
    """
    hits = np.asarray(hits, dtype=np.float64)
    full = np.full_like(hits, 100)
    parts = [full / 10, hits / 10, hits / 10, hits / 10, np.full_like(hits, alarms), 100 * full]
    return np.stack([hits, full, *parts], axis=1)


def test_a_lift_in_every_draw_and_group_is_its_own_interval():
    first = {d: [run(np.full(20, 40 + 5 * d))] for d in range(4)}
    second = {d: [run(np.full(20, 50 + 5 * d))] for d in range(4)}

    told = lift(first, second, "iou")

    assert told["difference"] == pytest.approx(0.1)
    assert told["low"] == pytest.approx(0.1) and told["high"] == pytest.approx(0.1)  # draws are paired
    assert lift(first, second, "f1_h")["difference"] > 0.05


def test_draws_that_disagree_widen_the_interval_beyond_0():
    rng = np.random.default_rng(0)
    first = {d: [run(np.full(20, 50))] for d in range(4)}
    second = {d: [run(np.full(20, 50 + gain))] for d, gain in enumerate((20, -8, 3, -3))}
    spread = {d: [run(rng.uniform(20, 80, 20)), run(rng.uniform(20, 80, 20))] for d in range(4)}

    told, by_groups = lift(first, second, "iou"), lift(first, spread, "iou")

    assert told["low"] < 0 < told["difference"] < told["high"]
    assert by_groups["low"] < by_groups["difference"] < by_groups["high"]
    assert lift(first, second, "iou") == told  # the same draws each time


def test_fewer_than_three_paired_draws_give_no_interval():
    first, second = {0: [run([50.0])], 7: [run([50.0])]}, {0: [run([60.0])], 1: [run([90.0])]}

    told = lift(first, second, "iou")

    assert told == {"difference": pytest.approx(0.1), "low": None, "high": None, "draws": 1}


@pytest.mark.parametrize("by_group", [0, 10])
@pytest.mark.parametrize("draws", [3, 4, 8])
def test_where_nothing_differs_an_interval_leaves_0_out_as_seldom_as_it_says(draws, by_group):
    """Of 200 proofs without any effect; percentiles as they come did so in 15 to 27 of 100.

    by_group: deviation, in px, of what a test group gains in all draws.
    """
    rng = np.random.default_rng(draws)
    wrong = 0
    for _ in range(200):
        of_groups = 50 + rng.normal(0, by_group, 9)
        first = {d: [run(np.full(9, 50.0))] for d in range(draws)}
        second = {d: [run(of_groups + rng.normal(0, 5))] for d in range(draws)}
        told = lift(first, second, "iou")
        wrong += told["low"] > 0 or told["high"] < 0

    assert wrong <= 18  # 10 are expected; the seeds are fixed


def result(
    arm: str, draw: int, hits: float, alarms: float = 1.0, seed: int = 0, other: float = 50, small: int = 1
) -> dict:
    rows = [run(np.full(9, of), alarms).T.tolist() for of in (hits, other)]
    classes = {name: dict(zip(OF_CLASS, row[:6], strict=True)) for name, row in zip("co", rows, strict=True)}
    counts = {
        "classes": classes,
        "by_size": {
            "tiny": {"truth": [1] * 9, "found": [1] * 9},
            "small": {"truth": [4] * 9, "found": [small] * 9},
        },
        "clean": dict(zip(("alarms", "area"), rows[0][6:], strict=True)),
    }
    told = {"data": "d", "rare_class": "c", "k": 10, "gan_seed": seed, "iou": hits / 100, "f1_h": hits / 100}
    return {**told, "arm": arm, "draw": draw, "fa_per_mpx": 100 * alarms, "counts": counts}


def plan_of(draws: Sequence[int], *arms: str, **more) -> Plan:
    return Plan(draws=tuple(draws), arms=arms, **more)


def test_means_are_of_the_draws_that_all_arms_have():
    results = [result("real", d, 40 + d) for d in range(3)] + [result("gan", d, 60 + d) for d in (1, 2, 7)]

    told = means(results, plan_of((0, 1, 2, 7), "real", "paste", "gan"))

    assert [(row["arm"], row["draws"]) for row in told] == [("real", 2), ("gan", 2)]
    assert (
        not any(row["complete"] for row in told)
        and means(results[:3], plan_of(range(3), "real"))[0]["complete"]
    )
    assert [row["iou"] for row in told] == pytest.approx([0.415, 0.615])
    assert means([], plan_of((0,), "real")) == []


def test_a_gan_is_held_against_the_best_arm_without_one():
    results = [result("real", d, 40) for d in range(3)] + [result("paste", d, 60) for d in range(3)]
    better = [result("gan", d, 65) for d in range(3)]
    alarming = [result("gan", d, 65, alarms=2.0) for d in range(3)]

    plan = plan_of(range(3), "real", "paste", "gan")
    [row] = summary(results + better, plan)
    [same] = summary(results + [result("gan", d, 60) for d in range(3)], plan)
    [louder] = summary(results + alarming, plan)

    assert (row["best_without_gan"], row["shown"]) == ("paste", True)
    assert row["difference"] == pytest.approx(0.05) and row["goal"]
    sizes = row["f1_h"]["recall_by_size"]
    assert sizes["small"] == {"best": 0.25, "gan": 0.25, "n": 36}
    assert sizes["tiny"] == {"best": None, "gan": None, "n": 9}  # too few for a recall
    assert not same["shown"] and not louder["shown"]
    assert (louder["fa_per_mpx"]["best"], louder["fa_per_mpx"]["gan"]) == pytest.approx((100, 200))
    assert louder["fa_per_mpx"]["difference"] == pytest.approx(100)


def test_every_arm_is_held_against_real_only_too():
    results = [
        result(arm, d, hits) for arm, hits in (("real", 50), ("paste", 60), ("gan", 45)) for d in range(3)
    ]

    told = over_real(results, plan_of(range(3), "real", "paste", "gan"))

    assert [row["arm"] for row in told] == ["paste", "gan"]
    for row, gain, shown in zip(told, (0.1, -0.05), (True, False), strict=True):
        assert row["complete"] and (row["iou"]["real"], row["iou"]["draws"]) == (0.5, 3)
        assert row["iou"]["added"] == pytest.approx(0.5 + gain)
        assert row["other_classes"]["o"]["f1_h"]["difference"] == 0
        assert row["iou"]["difference"] == pytest.approx(gain) and row["iou"]["shown"] is shown
    [without_its_last] = over_real(results[:5], plan_of(range(3), "real", "paste"))
    assert (
        without_its_last["iou"]["draws"] == 2
        and not without_its_last["complete"]
        and not without_its_last["iou"]["shown"]
    )
    assert over_real(results[3:], plan_of(range(3), "real", "paste", "gan")) == []


def test_more_alarms_in_the_mean_are_more_whatever_their_interval():
    plain, plan = [result("paste", d, 60) for d in range(4)], plan_of(range(4), "paste", "gan")
    as_many, more = (
        [result("gan", d, 65, alarms=alarms) for d, alarms in enumerate((0.5, last, 0.75, 1.5))]
        for last in (1.25, 1.5)
    )

    [row], [louder] = summary(plain + as_many, plan), summary(plain + more, plan)

    assert row["fa_per_mpx"]["difference"] == 0 and row["shown"]
    assert louder["fa_per_mpx"]["low"] < 0 < louder["fa_per_mpx"]["difference"] and not louder["shown"]


def test_f1_is_held_against_the_arm_that_is_best_in_it_and_may_be_what_is_shown():
    plain = [result("real", d, 62) for d in range(3)] + [result("paste", d, 60) for d in range(3)]
    better = [result("gan", d, 62) for d in range(3)]
    for one in plain:
        if one["arm"] == "real":
            one["counts"]["classes"]["c"]["true"] = [1.0] * 9
    for one in better:
        one["counts"]["classes"]["c"]["predicted"] = [5.0] * 9

    [row] = summary(plain + better, plan_of(range(3), "real", "paste", "gan"))

    assert (row["best_without_gan"], row["shown"]) == ("real", False)
    assert (row["f1_h"]["best_without_gan"], row["f1_h"]["shown"], row["goal"]) == ("paste", True, True)


def test_nothing_is_shown_while_a_planned_run_is_missing():
    runs = [
        result(arm, d, hits) for arm, hits in (("real", 50), ("paste", 60), ("gan", 65)) for d in range(4)
    ]
    plan = plan_of(range(4), "real", "paste", "gan", gan_seeds={3: 2})

    [row] = summary(runs, plan)
    [whole] = summary([*runs, result("gan", 3, 65, seed=1)], plan)
    [no_rival] = summary(
        [one for one in runs if one["arm"] != "real"], plan_of(range(4), "real", "paste", "gan")
    )

    assert (row["complete"], row["shown"]) == (False, False)
    assert (whole["complete"], whole["shown"]) == (True, True)
    assert (no_rival["best_without_gan"], no_rival["shown"]) == ("paste", False)


def test_without_an_image_free_of_the_class_nothing_is_said_of_alarms():
    results = [result(arm, d, hits) for arm, hits in (("paste", 60), ("gan", 65)) for d in range(3)]
    for one in results:
        one["counts"]["clean"] = {"alarms": [0.0] * 9, "area": [0.0] * 9}

    [row] = summary(results, plan_of(range(3), "paste", "gan"))

    assert row["fa_per_mpx"] is None and row["shown"]


def test_a_neighbour_class_that_falls_is_told():
    results = [result("paste", d, 60, other=55) for d in range(3)]
    results += [result("gan", d, 65, other=50 - d) for d in range(3)]

    [row] = summary(results, plan_of(range(3), "paste", "gan"))

    told = row["other_classes"]["o"]["iou"]
    assert (told["best"], told["gan"]) == pytest.approx((0.55, 0.49))
    assert told["difference"] == pytest.approx(-0.06) and told["high"] < 0


def test_a_draw_with_two_fits_counts_once_and_arms_are_held_against_each_other_on_draws_of_both():
    plain = [result("paste", d, 50) for d in range(3)] + [result("paste", 7, 95)]
    of_fits = ((40, 3, 4), (60, 1, 2))
    fits = [result("gan", 0, hits, alarms, seed, small=n) for seed, (hits, alarms, n) in enumerate(of_fits)]
    others = [result("gan", 1, 62), result("gan", 2, 64), result("gan", 8, 5)]

    [row] = summary(plain + fits + others, plan_of((0, 1, 2, 7, 8), "paste", "gan", gan_seeds={0: 2}))

    # draw 0 is the mean of its fits, 50; draws 7 and 8 have one arm only
    assert (row["best"], row["gan"]) == pytest.approx((0.5, (50 + 62 + 64) / 300))
    assert row["difference"] == pytest.approx((0 + 12 + 14) / 300) and row["draws"] == 3
    assert row["fa_per_mpx"]["gan"] == pytest.approx(100 * (2 + 1 + 1) / 3)
    assert row["f1_h"]["recall_by_size"]["small"]["gan"] == pytest.approx((3 + 1 + 1) / 3 / 4)


def test_draws_of_fewer_scenes_are_part_of_larger_ones_and_no_other_scene_holds_the_class(few_scenes):
    found = rarity(open_labels(few_scenes), "scratch")

    base, two = found.drawn(2, 0)
    one = found.drawn(1, 0)[1]

    assert {sample.group for sample in base.samples} == {"piece-0", "piece-2", "piece-4"}
    assert one.samples[0] in two.samples and len(two.samples) == 2
    assert found.drawn(2, 0)[1] == two
    assert len({found.drawn(1, draw)[1].samples for draw in range(12)}) == 3
    assert len(found.drawn(None, 0)[1].samples) == 3
    with pytest.raises(UserError, match="3 train images hold scratch alone, 4 were asked for"):
        found.drawn(4, 0)
    with pytest.raises(UserError, match="class 'dent' is not known"):
        rarity(open_labels(few_scenes), "dent")


def test_a_piece_that_is_left_out_teaches_nothing_and_is_what_a_draw_is_judged_on(few_scenes):
    found = piece_out(open_labels(few_scenes), "pit")  # pieces 0, 2 and 4 of train, 6 of val

    base, rare = found.drawn(None, 3)
    held = found.held("test", 3)

    assert [sample.group for sample in base.samples] == ["piece-1", "piece-3", "piece-5"]
    assert [sample.group for sample in rare.samples] == ["piece-0", "piece-2", "piece-4"]
    assert [sample.group for sample in held.samples] == ["piece-6", "piece-7"]
    others = found.drawn(None, 0)[1].samples
    assert [(sample.group, sample.split) for sample in others[2:]] == [("piece-6", "train")]
    with pytest.raises(UserError, match="a piece that is left out is for the test alone"):
        found.held("val", 0)
    with pytest.raises(UserError, match="3 scenes with a piece left out: a draw has all of the others"):
        found.drawn(3, 0)


def test_rolls_whose_tiles_are_of_any_split_prove_nothing(tmp_path):
    simulate_roll(tmp_path / "S-1.zarr", SimulatedStrip(2.0, 6, width_px=300, density=4))
    data = open_labels(tmp_path)

    for split in (rarity, piece_out):
        with pytest.raises(UserError, match="rolls have no test split: a proof needs labelled images"):
            split(data, "pit")


def test_alarms_count_on_images_without_the_class_only():
    whole, clean = Tally(("pit", "scratch")), Tally(("pit", "scratch"))
    truth, found = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    truth[5:15, 5:15], found[5:15, 5:10], found[30:35, 30:35] = 2, 2, 2
    whole.add(truth, found, found, "a")
    for tally in (whole, clean):
        tally.add(truth * 0, found, found, "b")

    by_group = counts(whole, clean, "scratch")
    told = figures(by_group, "scratch")

    # truth 100 px; found 50 + 25 on the one image, 75 on the other
    assert told["iou"] == pytest.approx(50 / (100 + 25 + 75))
    assert told["fa_per_mpx"] == pytest.approx(2 / (1600 / 1e6))
    assert told["f1_h"] == pytest.approx(2 * 1 * 0.25 / 1.25)
    rare = by_group["classes"]["scratch"]
    assert (rare["both"], rare["either"], rare["predicted"]) == ([50, 0], [125, 75], [2, 2])
    assert by_group["clean"] == {"alarms": [0, 2], "area": [0, 1600]}
    assert by_group["by_size"]["small"] == {"truth": [1, 0], "found": [1, 0]}
    assert by_group["classes"]["pit"]["either"] == [0, 0]
    assert told["recall_by_size"]["small"] == {"recall": None, "n": 1} == told["recall_by_size"]["tiny_small"]


class Spot(torch.nn.Module):
    """Is sure of so many px of the second class in the middle of any image, and of nothing else."""

    def __init__(self, px: int) -> None:
        super().__init__()
        self.px = px

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 3, *image.shape[2:])
        logits[:, 0] = 9
        y, x = image.shape[2] // 2, image.shape[3] // 2
        logits[:, 2, y, x : x + self.px] = 18
        return logits


def test_what_a_scan_would_leave_out_of_its_table_is_no_alarm(few_scenes):
    data = open_labels(few_scenes).of_split("train")

    two, three = (judged(Spot(px), data, "scratch")["figures"] for px in (2, 3))

    assert two["fa_per_mpx"] == 0 and three["fa_per_mpx"] > 0


class Dark(torch.nn.Module):
    """Gives dark px of an image p = 0.98 to be of the second class, and a spot in its middle 0.73."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 3, *image.shape[2:])
        logits[:, 1] = -9
        logits[:, 2] = torch.where(image[:, 0] < 0.2, 4.0, -9.0)
        y, x = image.shape[2] // 2, image.shape[3] // 2
        logits[:, 2, y : y + 3, x : x + 3] = 1.0
        return logits


def test_the_thresholds_are_the_lowest_of_those_with_the_best_figures(labelled_folder):
    data = open_labels(labelled_folder).of_split("train")

    best = best_thresholds(Dark(), data, "scratch")

    assert best == Thresholds(px=0.8, components=0.8)
    low, high = (judged(Dark(), data, "scratch", of)["figures"] for of in (Thresholds(), best))
    assert high["f1_h"] == 1 > low["f1_h"] and high["fa_per_mpx"] == 0 < low["fa_per_mpx"]
    assert high["iou"] > low["iou"]
    apart = judged(Dark(), data, "scratch", Thresholds(px=0.8))["figures"]
    assert apart["iou"] == high["iou"] and apart["f1_h"] == low["f1_h"]


def test_an_arms_net_sees_an_image_as_evaluate_shows_it(small_model):
    image = np.random.default_rng(0).random((1, 70, 90), dtype=np.float32)

    logits = net_logits(small_model.net().eval(), image)

    assert logits.shape == (3, 70, 90)
    np.testing.assert_allclose(logits, padded_logits(torch_engine(small_model), image), atol=1e-4)


def test_a_plan_counts_its_runs_and_refuses_what_it_cannot_do():
    plan = Plan(draws=(0, 1), arms=("real", "paste", "gan", "whole"), gan_seeds={1: 2})

    runs = list(plan.runs())

    assert len(runs) == 4 + 5 and ("gan", 1, 1) in runs
    assert ("paste", 1, 1) not in runs and ("whole", 1, 1) not in runs
    assert ("whole", 1, 1) in replace(plan, refitted=("gan", "whole")).runs()
    with pytest.raises(UserError, match="arm paste has no generator of its own to fit again"):
        replace(plan, refitted=("paste",))
    assert needs_generator("both") == {"gan"} and needs_generator("poisson") == set()
    assert needs_generator("free") == {"free"} and needs_generator("degraded") == set()
    assert needs_generator("free_hard") == {"free"} and needs_generator("paste_hard") == set()
    assert [generator_of(method) for method in ("paste", "degraded", "whole")] == ["gan", "free", "whole"]
    with pytest.raises(UserError, match="arm 'magic': it must be one of real, paste"):
        Plan(arms=("magic",))
    with pytest.raises(UserError, match="at least one step"):
        Plan(fit_steps=0)
    with pytest.raises(UserError, match="ratio 0: synthetic crops per real one, above 0"):
        Plan(ratio=0)
    with pytest.raises(UserError, match=r"ratio 0.05: 0 synthetic crops .*, from 1 sets: give 0.1 or more"):
        Plan(arms=("real", "gan"), ratio=0.05)
    assert (crops_of(0, 0.5), crops_of(2, 0.5), crops_of(2, 0.2)) == ([], [3, 2], [1, 1])
