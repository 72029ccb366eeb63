"""Each kind of roll that a mill brings goes the whole way: made, scanned, told on a page."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from rollsight.inspect.ingest import ingest
from rollsight.inspect.models import open_model
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import Roll, Strip
from rollsight.jobs.scan_job import scan_roll
from rollsight.synth.strip import SURFACES, TRUTH_FILE, SimulatedStrip, simulate_roll

MODES = {1: ("bright",), 2: ("bright", "dark"), 4: ("bright", "dark", "left", "right")}


def scanned_whole(plant: Plant, roll: Roll) -> None:
    """The scan of a roll ends with mask, table, summary and page that agree with each other."""
    run = scan_roll(plant, roll, open_model("default", plant.models), threads=1)
    mask = roll.read_label(run.summary["run_id"], 0, roll.lines)
    table = pyarrow.parquet.read_table(run.folder / "defects.parquet")

    assert mask.shape == (roll.lines, roll.width)
    assert table.equals(run.table)
    assert run.summary["defects"] == table.num_rows == sum(run.summary["by_class"].values())
    assert table["area_px"].to_numpy().sum() <= ((mask > 0) & (mask < 255)).sum()
    assert 0 <= run.summary["coverage"] <= 1
    assert run.summary["lighting"] == list(roll.strip.lighting)
    assert run.summary["verdict"] == ("HOLD" if run.summary["coverage"] < 0.99 else "UNGRADED")
    assert (run.folder / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("lighting", [("bright",), ("bright", "dark")], ids=lambda modes: "+".join(modes))
@pytest.mark.parametrize("surface", SURFACES)
def test_each_surface_in_each_lighting_is_simulated_and_scanned(surface, lighting, tmp_path):
    plant = Plant(tmp_path)
    strip = SimulatedStrip(1.2, 5, width_px=360, surface=surface, lighting=lighting)
    roll = simulate_roll(plant.roll_path("S"), strip)

    assert pyarrow.parquet.read_table(roll.path / TRUTH_FILE).num_rows > 0
    scanned_whole(plant, roll)


def simulate_until_the_last_line(path):
    def stop(done, total):
        if done == total:
            os.kill(os.getpid(), signal.SIGKILL)

    simulate_roll(path, SimulatedStrip(1.2, 5, width_px=360), on_lines=stop)


def test_a_simulation_killed_before_its_truth_leaves_no_roll(tmp_path):
    path = tmp_path / "S.zarr"
    child = multiprocessing.get_context("spawn").Process(target=simulate_until_the_last_line, args=(path,))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not path.exists()

    roll = simulate_roll(path, SimulatedStrip(1.2, 5, width_px=360))
    assert pyarrow.parquet.read_table(roll.path / TRUTH_FILE).num_rows > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["S.zarr"]


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_each_depth_in_each_number_of_modes_is_ingested_and_scanned(bits, modes, tmp_path):
    """Raw BIL of a simulated strip, its gray stretched to the depth, gives the same gray in [0, 1]."""
    plant = Plant(tmp_path / "plant")
    gray = SimulatedStrip(0.4, 3, width_px=320).block(0, 400)[0][0]  # (400, 320) uint8
    planes = np.stack([gray // (1 + mode) for mode in range(modes)])
    white = 2**bits - 1
    raw = np.round(planes / 255 * white).astype("<u1" if bits == 8 else "<u2")
    (tmp_path / "coil.bil").write_bytes(raw.transpose(1, 0, 2).tobytes())
    sidecar = {"lines": 400, "width_px": 320, "bits": bits, "lighting": MODES[modes], "side": "top"}
    sidecar |= {"mm_per_px_x": 0.8, "mm_per_line": 1.0}
    (tmp_path / "coil.json").write_text(json.dumps(sidecar))

    strip = Strip("coil", None, (), None, None)
    roll = ingest(tmp_path / "coil.bil", plant.roll_path("coil"), strip).roll

    np.testing.assert_allclose(roll.read_unit(0, 400), planes / 255, atol=0.5 / white + 1e-6)
    scanned_whole(plant, roll)


def test_a_folder_for_each_mode_is_ingested_and_scanned(tmp_path):
    plant, folder = Plant(tmp_path / "plant"), tmp_path / "coil"
    image = SimulatedStrip(0.4, 3, width_px=320, lighting=("bright", "dark")).block(0, 400)[0]
    for name, plane in zip(("bright", "dark"), image, strict=True):
        (folder / name).mkdir(parents=True)
        Image.fromarray(plane[:200]).save(folder / name / "strip-1.tif")
        Image.fromarray(plane[200:]).save(folder / name / "strip-2.tif")

    strip = Strip("coil", "top", (), 0.8, 1.0)
    roll = ingest(folder, plant.roll_path("coil"), strip).roll

    assert roll.strip.lighting == ("bright", "dark")
    np.testing.assert_array_equal(roll.read(0, 400), image)
    scanned_whole(plant, roll)
