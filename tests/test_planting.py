"""Whole rolls with new defects: the copy is the source outside of them, the truth is their masks."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollsight.inspect.defects import label_mask
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import open_labels
from rollsight.inspect.rolls import LabelWriter, RollWriter, Strip, open_roll
from rollsight.synth.backgrounds import open_backgrounds
from rollsight.synth.compose import Order
from rollsight.synth.data_card import open_provenance
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.mask_bank import MaskBank
from rollsight.synth.new_defect import CLEAR_PX, make_defect, open_field, remake_defect
from rollsight.synth.placing import Density
from rollsight.synth.planting import plant_roll
from rollsight.synth.realism import check_set
from rollsight.synth.strip import SimulatedStrip, simulate_roll


@pytest.fixture(scope="module")
def generator(few_scenes, small_fit, tmp_path_factory):
    """A generator of pits after a few steps, whose editor changes as much as it may."""
    folder = tmp_path_factory.mktemp("generators") / "pit"
    made = fit_generator(fit_data(open_labels(few_scenes), "pit"), folder, small_fit)
    made.editor.last.weight.data.mul_(30)
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A simulated roll of 9 m x 300 px with a dark stretch, its truth beside it."""
    path = tmp_path_factory.mktemp("rolls") / "S-1.zarr"
    return simulate_roll(path, SimulatedStrip(9.0, 6, width_px=300, blackouts=[(4000, 4300)]))


def bare_roll(folder: Path, roll_id: str = "coil-1", units: str = "mm", dtype=np.uint8, lines: int = 700):
    """Noisy steel of 400 px between dark sides, some lines dropped, no class mask; `white` is 250 of 255."""
    white = 250 if dtype == np.uint8 else 4000
    gray = np.random.default_rng(0).normal(0.45, 0.02, (1, lines, 400)).clip(0.3, 1)
    image = (gray * white).astype(dtype)
    image[:, :, :30] = image[:, :, 370:] = 0
    image[:, 320:350] = 0
    size = {"mm_per_px_x": 0.8, "mm_per_line": 1.0} if units == "mm" else dict.fromkeys(("mm_per_px_x",))
    strip = Strip(
        roll_id, "top", ("bright",), **({"mm_per_line": None} | size), heat="H-1", scale=(float(white),)
    )
    with RollWriter(folder / f"{roll_id}.zarr", strip, 400, dtype, total_lines=lines) as writer:
        writer.append(image, valid=np.arange(lines) % 640 != 500)
        return writer.close()


def planes(roll):
    return roll.read(0, roll.lines)[0], roll.read_label("truth", 0, roll.lines)


def overlapping(placed, box) -> bool:
    y0, x0, y1, x1 = box
    return any(y0 < c and a < y1 and x0 < d and b < x1 for a, b, c, d in (one.box for one in placed))


def test_outside_of_the_new_defects_the_copy_is_the_source(generator, source, tmp_path):
    card = plant_roll(open_field(generator, source, Order(seed=1)), tmp_path / "S-2.zarr", 30)
    made = open_roll(tmp_path / "S-2.zarr")

    (image, truth), (new_image, new_truth) = planes(source), planes(made)
    outside = np.ones(image.shape, dtype=bool)
    for line in open_provenance(made.path, "roll"):
        x0, y0, x1, y1 = line["marks"][0]["box"]
        outside[y0 - CLEAR_PX : y1 + CLEAR_PX, x0 - CLEAR_PX : x1 + CLEAR_PX] = False
    assert np.array_equal(new_image[outside], image[outside]) and (new_image != image).sum() > 1000
    assert np.array_equal(new_truth[outside], truth[outside])
    assert np.array_equal(new_truth[truth > 0], truth[truth > 0])
    assert made.label_classes("truth") == source.label_classes("truth")
    before, after = source.read_lines(0, 9000), made.read_lines(0, 9000)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert (made.strip.line_id, made.strip.mm_per_px_x) == ("synthetic", 0.8)
    assert card["samples"] == 30 and card["into"] == "S-1"
    assert json.loads((made.path / "dataset.json").read_text()) == card


def test_the_truth_table_lists_the_connected_parts_of_the_mask_as_a_simulated_rolls_does(
    generator, source, tmp_path
):
    plant_roll(open_field(generator, source, Order(seed=2)), tmp_path / "S-2.zarr", 20)
    made = open_roll(tmp_path / "S-2.zarr")

    table, mask = pq.read_table(made.path / "truth.parquet"), planes(made)[1]
    assert table.schema == pq.read_schema(source.path / "truth.parquet")
    names = made.label_classes("truth")
    n = label_mask(mask)[1]
    assert table.num_rows == n > pq.read_metadata(source.path / "truth.parquet").num_rows
    assert table["defect_id"].to_pylist() == list(range(1, n + 1))
    assert table["y0"].to_pylist() == sorted(table["y0"].to_pylist())
    boxes = set()
    for row in table.to_pylist():
        part = mask[row["y0"] : row["y1"], row["x0"] : row["x1"]] == names.index(row["class"]) + 1
        assert part.sum() >= row["area_px"] > 0
        assert row["length_mm"] == pytest.approx(row["y1"] - row["y0"])
        assert row["area_mm2"] == pytest.approx(0.8 * row["area_px"])
        assert 0 <= row["x_mm"] < 300 * 0.8
        boxes.add((row["class"], row["y0"], row["x0"], row["y1"], row["x1"]))
    for line in open_provenance(made.path, "roll"):
        x0, y0, x1, y1 = line["marks"][0]["box"]
        assert ("pit", y0, x0, y1, x1) in boxes


def test_the_new_roll_is_labelled_data(generator, source, tmp_path):
    plant_roll(open_field(generator, source, Order(seed=1)), tmp_path / "S-2.zarr", 5)

    data = open_labels(tmp_path)
    assert data.groups() == ["S-2"] and data.classes == source.label_classes("truth")
    assert sum(bool((sample.read()[1] == 4).any()) for sample in data.samples) > 3  # pits


def test_the_same_seed_is_the_same_roll_and_more_defects_begin_with_the_same(generator, source, tmp_path):
    field = open_field(generator, source, Order(seed=5))
    for name, n in (("A", 12), ("B", 12), ("C", 18)):
        plant_roll(field, tmp_path / f"{name}.zarr", n)
    first, second, third = (open_provenance(tmp_path / f"{name}.zarr", "roll") for name in "ABC")

    assert np.array_equal(planes(open_roll(tmp_path / "A.zarr")), planes(open_roll(tmp_path / "B.zarr")))
    assert [line["sha256"] for line in first] == [line["sha256"] for line in third[:12]]
    other = open_field(generator, source, Order(seed=6))
    assert make_defect(other, 0, lambda *_: False).provenance["sha256"] != first[0]["sha256"]
    for line in reversed(second):  # any of them alone, without those before it
        again = remake_defect(field, line["index"], line["attempt"])
        assert again.provenance["sha256"] == line["sha256"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["anywhere", "edges", "lane", "periodic"]))
def test_no_defect_lies_on_another_or_on_what_was_there_or_was_not_inspected(generator, source, seed, kind):
    lane = 0.4 if kind in ("lane", "periodic") else 0.5
    density = Density(kind, lane=lane, pitch_px=700 if kind == "periodic" else 0)
    field = open_field(generator, source, Order(seed=seed, method="paste", density=density))
    placed = []
    for number in range(8):
        made = make_defect(field, number, lambda *box: overlapping(placed, box))
        y0, x0, y1, x1 = made.box
        assert not overlapping(placed, made.box)
        assert (source.read_label("truth", y0, y1)[:, x0:x1] == 0).all()
        assert (source.read(y0, y1)[0, :, x0:x1] > 16).mean() > 0.9  # strip, neither beside it nor dark
        assert not (y0 < 4300 and y1 > 4000)
        placed.append(made)


def test_placement_edges_lane_and_periodic(generator, source):
    def middles(density):
        field = open_field(generator, source, Order(seed=1, method="paste", density=density))
        made = []
        for number in range(10):
            made.append(make_defect(field, number, lambda *box: overlapping(made, box)))
        boxes = np.array([one.box for one in made])
        return boxes[:, 0] + CLEAR_PX, (boxes[:, 1] + boxes[:, 3]) / 600, made

    assert np.abs(middles(Density("lane", lane=0.3))[1] - 0.3).max() < 0.15
    near, any_place = (
        np.minimum(across, 1 - across) for across in (middles(Density(k))[1] for k in ("edges", "anywhere"))
    )
    assert np.median(near) < 0.18 < 0.22 < np.median(any_place)
    along, across, made = middles(Density("periodic", lane=0.5, pitch_px=700))
    assert (along % 700 == 0).all() and len({*along.tolist()}) == 10
    assert np.ptp(across) < 0.05  # the edges wander a little, and it with them
    assert len({one.inside.shape for one in made}) == 1  # one damaged mill roll leaves one mark


def test_periodic_marks_are_a_damaged_roll_of_their_own_beside_those_that_were_there(
    generator, source, tmp_path
):
    order = Order(seed=1, method="paste", density=Density("periodic", pitch_px=700))
    groups = []
    for before, name in ((source, "S-2"), (None, "S-3")):
        roll = before or open_roll(tmp_path / "S-2.zarr")
        plant_roll(open_field(generator, roll, order), tmp_path / f"{name}.zarr", 2)
        table = pq.read_table(tmp_path / f"{name}.zarr" / "truth.parquet")
        groups.append({group for group in table["periodic_group"].to_pylist() if group is not None})

    here = {g for g in pq.read_table(source.path / "truth.parquet")["periodic_group"].to_pylist() if g}
    assert [len(of) for of in groups] == [len(here) + 1, len(here) + 2]


def test_a_bare_roll_gets_a_mask_of_the_new_class_and_255_where_it_was_not_inspected(generator, tmp_path):
    roll = bare_roll(tmp_path, units="px", dtype=np.uint16)
    plant_roll(open_field(generator, roll, Order(seed=3)), tmp_path / "new.zarr", 6)
    made = open_roll(tmp_path / "new.zarr")

    (image, truth) = planes(made)
    assert made.label_classes("truth") == ("pit",) and made.dtype == np.uint16
    assert (truth[320:350, 100:300] == 255).all() and (truth[500, 100:300] == 255).all()
    assert (truth[:320, :20] == 0).all()  # beside the strip, as a simulated roll has it
    changed = image != roll.read(0, 700)[0]
    assert changed[truth == 1].mean() > 0.8 and not changed[truth == 255].any()
    table = pq.read_table(made.path / "truth.parquet")
    assert table.num_rows >= 6 and table["x_mm"].null_count == table.num_rows
    assert made.strip.heat == "H-1" and made.strip.units == "px"


def test_what_a_scan_found_is_neither_clean_nor_truth(generator, tmp_path):
    roll = bare_roll(tmp_path)
    found = np.zeros((700, 400), dtype=np.uint8)
    found[100:140, 100:300], found[320:350] = 2, 255
    label = LabelWriter.create(roll.path, "run-1", ("x", "pit"), lines=700, width=400, shard_lines=4096)
    label.write(0, found)
    label.close()
    plant_roll(open_field(generator, open_roll(roll.path), Order(seed=3)), tmp_path / "new.zarr", 6)

    truth = planes(open_roll(tmp_path / "new.zarr"))[1]
    assert (truth[found > 0] == 255).all() and set(np.unique(truth)) == {0, 1, 255}
    assert pq.read_metadata(tmp_path / "new.zarr" / "truth.parquet").num_rows >= 6


def test_a_truth_without_its_table_is_counted_and_a_second_class_joins_the_first(generator, source, tmp_path):
    plant_roll(open_field(generator, source, Order(seed=1)), tmp_path / "S-2.zarr", 4)
    (tmp_path / "S-2.zarr" / "truth.parquet").unlink()
    stranger = replace(generator, card=generator.card.model_copy(update={"defect_class": "dent"}))
    stranger.card.classes = tuple("dent" if name == "pit" else name for name in stranger.card.classes)
    field = open_field(stranger, open_roll(tmp_path / "S-2.zarr"), Order(seed=2))
    plant_roll(field, tmp_path / "S-3.zarr", 3)
    made = open_roll(tmp_path / "S-3.zarr")

    assert made.label_classes("truth") == (*source.label_classes("truth"), "dent")
    assert pq.read_metadata(made.path / "truth.parquet").num_rows == label_mask(planes(made)[1])[1]
    told = [(line["roll"], line["class"]) for line in open_provenance(made.path, "roll")]
    assert told == [("S-2", "pit")] * 4 + [("S-3", "dent")] * 3


KILLED = """
import os, signal, sys
from pathlib import Path
from rollsight.inspect.rolls import open_roll
from rollsight.synth.compose import Order
from rollsight.synth.generator import open_generator
from rollsight.synth.new_defect import open_field
from rollsight.synth.planting import plant_roll
field = open_field(open_generator(Path(sys.argv[1])), open_roll(Path(sys.argv[2])), Order(seed=1))
def die(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
plant_roll(field, Path(sys.argv[3]), 8, **{sys.argv[4]: die})
"""


@pytest.mark.parametrize("when", ["on_defect", "on_lines"])
def test_killed_in_the_middle_nothing_stands_under_its_name_and_the_next_one_makes_it(
    generator, source, tmp_path, when
):
    path = tmp_path / "S-2.zarr"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, generator.folder, source.path, path, when],
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert died.returncode == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == [".S-2.partial.zarr"]

    plant_roll(open_field(generator, source, Order(seed=1)), path, 8)
    assert [entry.name for entry in tmp_path.iterdir()] == ["S-2.zarr"]
    assert (open_roll(path).label_names(), len(open_provenance(path, "roll"))) == (["truth"], 8)


def test_interrupted_it_leaves_nothing(generator, source, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plant_roll(open_field(generator, source, Order()), tmp_path / "S-2.zarr", 2, on_lines=stop)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_roll(generator, tmp_path):
    peaks = []
    for lines in (9_000, 36_000):
        roll = bare_roll(tmp_path, f"coil-{lines}", lines=lines)
        field = open_field(generator, roll, Order(method="paste"))
        tracemalloc.start()
        plant_roll(field, tmp_path / f"new-{lines}.zarr", 3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_what_cannot_be_is_one_line(generator, source, tmp_path):
    path = tmp_path / "S-2.zarr"
    card = generator.card.model_copy(update={"held_groups": ("S-1",)})
    with pytest.raises(UserError, match="roll S-1: group 'S-1' is in val or test of the labels") as refused:
        open_field(replace(generator, card=card), source, Order())
    assert refused.value.exit_code == USAGE
    field = open_field(generator, source, Order(density=Density("periodic", pitch_px=1000)))
    with pytest.raises(UserError, match=r"9 periodic marks: 9000 lines have 8 places 1000 px apart"):
        plant_roll(field, path, 9)
    with pytest.raises(UserError, match="the new roll needs another id than its source S-1"):
        plant_roll(field, tmp_path / "S-1.zarr", 1)
    small = bare_roll(tmp_path, "short", lines=16)
    with pytest.raises(UserError, match=r"defect 0: 40 attempts without one to keep \(.*\): ask for fewer"):
        plant_roll(open_field(generator, small, Order()), path, 1)
    with pytest.raises(UserError, match=r"roll .*S-3.zarr exists: choose another id, or say --overwrite"):
        (tmp_path / "S-3.zarr").mkdir()
        plant_roll(open_field(generator, source, Order()), tmp_path / "S-3.zarr", 1)
    whole = generator.card.model_copy(update={"recipe": generator.card.recipe | {"whole": True}})
    with pytest.raises(UserError, match="generator pit makes whole patches"):
        open_field(replace(generator, card=whole), source, Order())
    assert not path.exists()


def test_a_roll_made_of_a_held_back_one_is_refused_too(generator, source, tmp_path):
    plant_roll(open_field(generator, source, Order(seed=1)), tmp_path / "S-2.zarr", 1)

    card = generator.card.model_copy(update={"held_groups": ("S-1",)})
    with pytest.raises(UserError, match="roll S-2: group 'S-1' is in val or test"):
        open_field(replace(generator, card=card), open_roll(tmp_path / "S-2.zarr"), Order())
    with pytest.raises(UserError, match="backgrounds: group 'S-1' is in val or test"):
        open_backgrounds([tmp_path / "S-2.zarr"], generator.card.data_classes, ("S-1",))


def test_marks_that_no_border_cut_off_are_taken_where_there_are_some(generator, source):
    whole, cut = generator.bank.marks[0], replace(generator.bank.marks[1], cut=(True, False, False, False))
    mixed = replace(generator, bank=MaskBank([whole, cut, cut], "pit"))
    field = open_field(mixed, source, Order(method="paste"))

    for number in range(6):
        told = make_defect(field, number, lambda *_: False).provenance["marks"][0]
        assert told["source"] == whole.source


def test_a_roll_is_no_folder_of_samples_and_the_other_way_round(generator, source, few_scenes, tmp_path):
    plant_roll(open_field(generator, source, Order(seed=1)), tmp_path / "S-2.zarr", 1)

    with pytest.raises(UserError, match="its samples are of rolls: needed those of images"):
        check_set(tmp_path / "S-2.zarr", open_labels(few_scenes), tmp_path, steps=0)
