"""A proof as a whole, of a step or two: added and never replacing, paired, going on where it stopped."""

import fcntl
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels
from rollsight.inspect.nets import NETS
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.sampling import Sampler
from rollsight.inspect.train import train
from rollsight.inspect.training_data import read_sources
from rollsight.synth.arms import BASE, FINE_TUNING, RATIOS, SETTLING, UNTIL, settled
from rollsight.synth.data_card import open_provenance
from rollsight.synth.draws import piece_out, rarity
from rollsight.synth.fit_recipe import PRESETS
from rollsight.synth.generator import open_generator
from rollsight.synth.generic import shipped
from rollsight.synth.hard import CANDIDATES
from rollsight.synth.lift import over_real
from rollsight.synth.proof import Plan, Proof, of_plan, write_summary
from torch.nn import BatchNorm2d


@pytest.fixture
def proof(few_scenes, small_plan, tmp_path):
    return Proof(rarity(open_labels(few_scenes), "scratch"), small_plan, tmp_path / "work", tmp_path / "runs")


@pytest.fixture
def small_plan(small_fit):
    return Plan(
        k=2,
        draws=(0,),
        arms=("real", "both"),
        steps=2,
        base_steps=1,
        fit_steps=1,
        generic_steps=1,
        samples=3,
        fit=small_fit,
        arm=replace(FINE_TUNING, crop_px=64),
        base=replace(BASE, crop_px=64),
    )


def quiet(*_) -> None:
    """What is told on the way."""


def set_of(method, work):
    return [path for path in work.glob(f"*-d0-s0-*-{method}-3") if path.is_dir()]


def test_a_proof_leaves_one_small_file_for_each_run_and_repeats_none(proof, tmp_path):
    told = []
    results = proof.results(lambda *step: told.append(step), lambda _: None)

    assert [one["arm"] for one in results] == ["real", "both"]
    files = sorted((tmp_path / "runs").iterdir())
    assert [path.name for path in files] == [
        "scenes-scratch-k2-both-d0-s0.json",
        "scenes-scratch-k2-real-d0-s0.json",
    ]
    assert all(path.stat().st_size < 4000 for path in files)
    assert set(results[0]["counts"]["classes"]) == {"pit", "scratch"}
    assert results[0]["scenes"] == results[1]["scenes"] and len(results[0]["scenes"]) == 2
    for method in ("paste", "gan"):
        [made] = set_of(method, tmp_path / "work")
        groups = {
            mark["group"]
            for line in (made / "provenance.jsonl").read_text().splitlines()
            for mark in json.loads(line)["marks"]
        }
        assert groups <= set(results[0]["scenes"])  # made of this draw's scenes only

    told.clear()
    assert proof.results(lambda *step: told.append(step), lambda _: None) == results
    assert told == []
    gains = over_real(results, proof.plan)
    write_summary(tmp_path, proof.plan, results, [], gains)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["over_real"] == gains and [row["arm"] for row in gains] == ["both"]
    rows = summary["rows"]
    assert [row["arm"] for row in rows] == ["real", "both"] and "counts" not in rows[0]
    assert set(rows[0]["iou_by_class"]) == {"pit", "scratch"} == set(rows[0]["f1_h_by_class"])

    files[0].write_text("{")
    with pytest.raises(UserError, match="damaged: remove it, and it is made again"):
        proof.results(lambda *_: None, lambda _: None)


def test_each_run_says_what_it_was_made_with_and_of(proof, tmp_path):
    real, both = proof.results(quiet, quiet)

    assert real["made_of"] == [] and [one["method"] for one in both["made_of"]] == ["paste", "gan"]
    for one in both["made_of"]:
        [made] = set_of(one["method"], tmp_path / "work")
        assert open_labels(made).digest().startswith(one["set"])
        assert open_provenance(made)[0]["generator"].startswith(one["generator"])


@pytest.mark.parametrize(
    ("change", "made_anew"),
    [
        ({"base": {"learning_rate": 1e-3}}, {"base"}),
        ({"fit": {"contrast_weight": 1.0}}, {"generic-gan", "gan-d0", "gan-3", "paste-3"}),
        ({"arm": {"ema_half_life": 7}}, set()),
    ],
)
def test_nothing_of_another_recipe_is_taken_for_what_a_plan_asks_for(proof, tmp_path, change, made_anew):
    parts = {
        "base": "*-base-*.safetensors",
        "generic-gan": "*-generic-gan-????????",
        "gan-d0": "*-gan-d0-s0-????????",
        "gan-3": "*-gan-d0-s0-*-gan-3",
        "paste-3": "*-gan-d0-s0-*-paste-3",
    }
    found = lambda: {name: set((tmp_path / "work").glob(like)) for name, like in parts.items()}  # noqa: E731
    proof.results(quiet, quiet)
    before = found()
    [(part, fields)] = change.items()
    other = replace(proof, plan=replace(proof.plan, **{part: replace(getattr(proof.plan, part), **fields)}))

    with pytest.raises(UserError, match=r"made with .*: choose another folder, or remove it"):
        other.results(quiet, quiet)
    kept = [json.loads(path.read_text()) for path in proof.out.glob("*.json")]
    assert len(of_plan(kept, proof)) == 2
    with pytest.raises(UserError, match=r"made with .*: remove it, and it is made again"):
        of_plan(kept, other)
    replace(other, out=tmp_path / "others").results(quiet, quiet)

    assert {name for name, paths in found().items() if len(paths) > len(before[name])} == made_anew


def test_a_piece_of_val_teaches_when_another_is_left_out(few_scenes, proof, tmp_path):
    plan = replace(proof.plan, k=None, arms=("gan",))
    [one] = replace(proof, found=piece_out(open_labels(few_scenes), "pit"), plan=plan).results(
        lambda *_: None, lambda _: None
    )

    assert one["scenes"] == ["piece-2", "piece-4", "piece-6"]
    assert one["groups"] == ["piece-0", "piece-7"]
    [made] = set_of("gan", tmp_path / "work")
    sources = {mark["group"] for line in open_provenance(made) for mark in line["marks"]}
    assert sources <= set(one["scenes"])


def test_a_dot_in_the_name_of_the_data_makes_no_lock_wait_for_itself(few_scenes, proof, tmp_path):
    line = shutil.copytree(few_scenes, tmp_path / "line.3")
    (line / "classes.json").write_text(json.dumps(["pit", "scratch 0.5"]))

    replace(proof, found=rarity(open_labels(line), "scratch 0.5")).results(quiet, quiet)

    assert (tmp_path / "runs" / "line.3-scratch 0.5-k2-both-d0-s0.json").is_file()
    assert (
        len(list((tmp_path / "work").glob("*.lock"))) == 8
    )  # 2 runs, nets and sets, a generator, one to begin from


def test_the_ratio_is_chosen_by_two_processes_together(few_scenes, proof, tmp_path):
    """One that finds a trial taken makes the others, then waits for it."""
    plan = replace(proof.plan, arms=("real", "paste"))
    choosing = replace(proof, found=rarity(open_labels(few_scenes), "pit"), plan=plan)
    (tmp_path / "work").mkdir()
    name = "scenes-pit-k2-paste-d1000-s0-val-r0.2"
    with ThreadPoolExecutor() as pool, (tmp_path / "work" / f"{name}.lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        chosen = pool.submit(choosing.choose_ratio, quiet)
        while len(list((tmp_path / "runs").glob("*.json"))) < 2:
            assert not chosen.done()
            time.sleep(0.1)
        assert not (tmp_path / "runs" / f"{name}.json").exists()
        fcntl.flock(theirs, fcntl.LOCK_UN)

    told = chosen.result()
    assert told["ratio"] in RATIOS and [trial["ratio"] for trial in told["trials"]] == list(RATIOS)


def test_hard_samples_are_those_of_the_draws_own_net_of_real_which_is_trained_once(proof, tmp_path):
    told = []
    plan = replace(proof.plan, arms=("paste_hard", "real", "free_hard"))

    results = replace(proof, plan=plan).results(lambda what, *_: told.append(what), quiet)

    assert [one["arm"] for one in results] == ["paste_hard", "real", "free_hard"]
    assert len({what for what in told if "-real-" in what}) == 1
    [net] = (tmp_path / "work").glob("*-real-d0-*.safetensors")
    assert told.count(net.stem) == plan.steps
    for one in (results[0], results[2]):
        [made] = [p for p in (tmp_path / "work").glob(f"*-{one['arm']}-3-*") if p.is_dir()]
        assert all(0 <= line["candidate"] < CANDIDATES for line in open_provenance(made))


@pytest.mark.parametrize(("name", "begun"), [("scratch", True), ("scratches", False)])
def test_a_class_that_is_labelled_alone_begins_from_the_shipped_generator_unless_that_knows_it(
    few_scenes, small_plan, tmp_path, name, begun
):
    labels = shutil.copytree(few_scenes, tmp_path / "labels")
    (labels / "classes.json").write_text(json.dumps([name]))
    for path in labels.glob("*_mask.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray((mask == 2).astype(np.uint8)).save(path)
    plan = replace(small_plan, arms=("gan",), fit=PRESETS["cpu-64"])

    [one] = Proof(rarity(open_labels(labels), name), plan, tmp_path / "work", tmp_path / "runs").results(
        quiet, quiet
    )

    [folder] = [path for path in (tmp_path / "work").glob("*-gan-d0-s0-????????") if path.is_dir()]
    card = open_generator(folder).card
    assert card.begun_from == (shipped().hash if begun else "") and card.classes == (name,)
    assert one["iou_by_class"].keys() == {name}


def test_a_net_that_knows_the_class_is_none_to_begin_from(proof, small_model):
    begun = replace(proof, plan=replace(proof.plan, begin=str(small_model.folder)))

    with pytest.raises(UserError, match="knows scratch: a proof begins from a net that never saw it"):
        begun.results(lambda *_: None, lambda _: None)


def test_synthetic_crops_are_added_and_end_before_the_last_steps(few_scenes):
    data = open_labels(few_scenes).of_split("train")
    recipe = Recipe(net="fast", steps=10, batch=8, mosaic=1, crop_px=64)
    sources = read_sources([data, data], data.classes, recipe, [5, 3], [])
    sampler = Sampler(sources, recipe, until=[1.0, 0.8])

    assert [sampler.bounds_at(step) for step in (0, 7, 8, 9)] == [[5, 8], [5, 8], [5], [5]]
    assert [len(sampler.batch(step).images) for step in (7, 8)] == [8, 5]
    first, last = sampler.crops(7), sampler.crops(8)
    alone = Sampler(sources[:1], Recipe(net="fast", steps=10, batch=5, mosaic=1, crop_px=64))
    for step, crops in ((7, first), (8, last)):
        for mine, real in zip(crops, alone.crops(step), strict=False):
            np.testing.assert_array_equal(mine.image, real.image)  # the real ones are not replaced


def test_what_is_judged_has_its_norms_from_real_crops_whatever_it_was_trained_on(few_scenes):
    base, rare = rarity(open_labels(few_scenes), "scratch").drawn(2, 0)
    recipe = replace(FINE_TUNING, crop_px=64)
    nets = [NETS["fast"](2, attention="none") for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    norms = [[m for m in net.modules() if isinstance(m, BatchNorm2d)] for net in nets]
    for norm in norms[1]:  # as if from much brighter crops
        norm.running_mean += 3

    first, second = (settled(net, base, rare, recipe) for net in nets)

    assert not first.training and norms[0][0].num_batches_tracked == SETTLING
    assert norms[0][0].momentum is not None
    for name, mine in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], mine, rtol=0, atol=0)
    assert FINE_TUNING.ema_half_life < (1 - UNTIL) * FINE_TUNING.steps


@pytest.mark.parametrize("until", [(1.0,), (0.9, 0.9), (0.0, 1.0), (1.0, float("nan"))])
def test_shares_of_the_steps_that_leave_nothing_are_refused(until, few_scenes, tmp_path):
    data = open_labels(few_scenes).of_split("train")

    with pytest.raises(UserError, match="for 2 sources: give each the share of the steps"):
        train([data, data], tmp_path, Recipe(net="fast", steps=2), until=until)
