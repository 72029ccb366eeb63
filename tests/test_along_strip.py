"""Evidence along the strip: faint lines are found, clean strip is quiet, and no cut changes a thing."""

import json
import shutil
from typing import Any

import numpy as np
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollsight.inspect.along_strip import (
    ALARM,
    STRIPE_PX,
    UNIT,
    UNSEEN,
    cell_evidence,
    faint_lines,
    hide,
)
from rollsight.inspect.errors import UserError
from rollsight.inspect.linescan import CellRow, NotInspected
from rollsight.inspect.plant import open_plant
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.inspect.tiles import CELL
from rollsight.jobs.scan_job import Run, scan_roll


def strip(rows: int = 60, stripes: int = 80, seed: int = 0) -> np.ndarray:
    """Evidence of sound strip: 11 nats against a scratch, give or take half a nat."""
    noise = np.random.default_rng(seed).normal(-11, 0.5, (rows, stripes))
    return np.rint(noise * UNIT).astype(np.int16)


def scratched(seed: int = 0, nats: float = 1.6) -> np.ndarray:
    """The same with a scratch over 40 cells that drifts by three stripes."""
    evidence = strip(seed=seed)
    for row in range(10, 50):
        evidence[row, 30 + (row - 10) // 12] += round(nats * UNIT)
    return evidence


def test_clean_strip_has_no_line():
    assert faint_lines(strip(rows=400)) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_scratch_that_no_line_shows_is_found_where_it_lies(seed):
    """Every pixel says 9 nats against it."""
    [line] = faint_lines(scratched(seed))

    assert line.evidence > ALARM
    assert abs(line.y0 - 10 * CELL) <= 4 * CELL and abs(line.y1 - 50 * CELL) <= 4 * CELL
    assert line.x0 <= 31 * STRIPE_PX and line.x1 >= 33 * STRIPE_PX and line.x1 - line.x0 <= 6 * STRIPE_PX
    assert abs(line.head_px - 30.5 * STRIPE_PX) <= STRIPE_PX


def test_a_short_strong_defect_is_no_line():
    evidence = strip()
    evidence[20:24, 40:44] = 2 * UNIT

    assert faint_lines(evidence) == []


def test_two_scratches_in_one_lane_are_two_lines():
    evidence = strip(rows=110)
    evidence[10:40, 20] += 2 * UNIT
    evidence[70:100, 20] += 2 * UNIT

    lines = faint_lines(evidence)

    assert sorted(line.y0 // CELL for line in lines) == pytest.approx([10, 70], abs=3)


def test_a_change_of_the_surface_along_the_roll_is_no_line():
    evidence = strip()
    evidence[30:] += 4 * UNIT  # the other half of the roll looks more like scratches, all of it

    assert faint_lines(evidence) == []


def test_what_was_not_inspected_adds_nothing():
    evidence = scratched()
    evidence[20:24] = UNSEEN  # a failed lamp amid the scratch

    [line] = faint_lines(evidence)

    assert line.y0 <= 14 * CELL and line.y1 >= 46 * CELL


def test_a_roll_without_strip_has_no_line():
    assert faint_lines(np.full((20, 40), UNSEEN, np.int16)) == []
    assert faint_lines(np.zeros((0, 0), np.int16)) == []


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_evidence_is_the_same_however_the_lines_and_the_width_are_cut(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = data.draw(st.integers(1, 4)) * CELL + data.draw(st.integers(0, CELL - 1))
    width = 2 * CELL + data.draw(st.integers(1, CELL))
    logits = rng.normal(0, 6, (3, rows, width)).astype(np.float32)
    whole = cell_evidence(logits, 1)
    down = data.draw(st.integers(0, rows // CELL)) * CELL
    parts = [logits[:, a:b] for a, b in ((0, down), (down, rows)) if b > a]

    in_bands = np.concatenate([cell_evidence(part, 1) for part in parts])
    in_cores = np.concatenate(
        [cell_evidence(logits[:, :, :CELL], 1), cell_evidence(logits[:, :, CELL:], 1)], axis=1
    )

    np.testing.assert_array_equal(in_bands, whole)
    np.testing.assert_array_equal(in_cores, whole)


def test_evidence_is_the_mean_over_lines_of_the_largest_lead_in_a_stripe():
    logits = np.zeros((3, CELL, 2 * STRIPE_PX), np.float32)
    logits[0], logits[2] = 3.0, -1.0  # background leads by 3
    logits[1, :16, 5] = 4.0  # a quarter of the lines leads by 1

    np.testing.assert_array_equal(
        cell_evidence(logits, 1), [[round((0.25 * 1 - 0.75 * 3) * UNIT), -3 * UNIT]]
    )


def test_edges_and_parts_not_inspected_are_hidden():
    evidence = np.zeros(40, np.int16)

    hide(evidence, CellRow(0, 64, 20, 300, 0, (NotInspected(128, 0, 192, 64, "dark"),)))

    assert (evidence[:6] == UNSEEN).all() and (evidence[34:] == UNSEEN).all()
    assert (evidence[16:24] == UNSEEN).all() and (evidence[6:16] == 0).all() and (evidence[24:34] == 0).all()


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    """A roll of 40 cells' length: noise, with a line along it that is 25 gray darker."""
    gray = np.random.default_rng(1).normal(130, 6, (40 * CELL, 3 * CELL))
    gray[4 * CELL :, 100:103] -= 25
    plant = open_plant(tmp_path_factory.mktemp("plant"))
    strip = Strip(roll_id="r1", side="top", lighting=("bright",), mm_per_px_x=0.8, mm_per_line=1.0)
    size = {"total_lines": len(gray)}
    with RollWriter(plant.roll_path("r1"), strip, gray.shape[1], np.uint8, **size) as writer:
        writer.append(gray.clip(0, 255).astype(np.uint8)[None])
        writer.close()
    return plant


def scan(plant: Any, **options: Any) -> Run:
    return scan_roll(
        plant, plant.roll("r1"), plant.model("default"), engine="onnx", device="cpu", threads=1, **options
    )


def test_a_scan_carries_the_evidence_over_its_bands(plant):
    """The bands are cut otherwise, the lines are the same to the last figure; mask and table stay theirs."""
    plain = scan(plant)
    one = scan(plant, along="scratches", band_lines=3072)
    found = one.summary["faint_lines"]
    written = (one.folder / "faint_lines.csv").read_bytes()
    for receipt in (one.folder / "bands").iterdir():
        receipt.unlink()
    (one.folder / "report.html").unlink()
    shutil.rmtree(plant.roll("r1").path / "labels" / one.summary["run_id"])
    cut = scan(plant, along="scratches", band_lines=1024)

    assert cut.summary["run_id"] == one.summary["run_id"] != plain.summary["run_id"]
    assert cut.summary["band_lines"] == 1024 and one.summary["band_lines"] == 3072
    assert cut.summary["faint_lines"] == found
    assert (cut.folder / "faint_lines.csv").read_bytes() == written
    assert cut.table.drop_columns("run_id").equals(plain.table.drop_columns("run_id"))
    assert "faint_lines" not in plain.summary and not (plain.folder / "faint_lines.csv").exists()
    assert all("evidence" not in json.loads(path.read_bytes()) for path in (plain.folder / "bands").iterdir())
    [line] = pyarrow.csv.read_csv(cut.folder / "faint_lines.csv").to_pylist()
    assert line["class"] == "scratches" and line["x0"] <= 101 < line["x1"] and line["y0"] < 12 * CELL
    assert line["y1"] >= 36 * CELL and line["length_mm"] == line["y1"] - line["y0"]
    assert abs(line["x_mm"] - 0.8 * 101) < 8


def test_a_class_that_the_model_does_not_know_is_refused(plant):
    with pytest.raises(UserError, match="--along-strip rust: model "):
        scan(plant, along="rust")
