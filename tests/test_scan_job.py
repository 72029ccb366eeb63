"""A whole roll: the size of its bands, what it would take, where its mask lies, what a kill leaves."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from rollsight.inspect.engines import BatchEngine, torch_engine
from rollsight.inspect.errors import FAILED, UserError
from rollsight.inspect.models import Model, open_model
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import Roll, RollWriter, Strip, open_roll
from rollsight.inspect.scan import facts_here, plan_scan, scan_lines, slot_bytes
from rollsight.jobs.cluster import Threads
from rollsight.jobs.scan_job import (
    IMAGE,
    Planned,
    _job,
    _journal,
    estimate_roll,
    fit_bands,
    plan_roll,
    scan_roll,
)
from rollsight.synth.strip import SimulatedStrip, simulate_roll

ROOT = Path(__file__).parent.parent
LINES, WIDTH, BAND = 500, 320, 64
PLAN: dict[str, Any] = {"core_lines": BAND, "engine": "onnx", "device": "cpu"}
SMALL: dict[str, Any] = PLAN | {"band_lines": BAND}


class Roomy(Threads):
    """Threads that may take so many bytes each."""

    def __init__(self, room: int) -> None:
        super().__init__(2)
        self._room = room

    def room(self) -> int:
        return self._room


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model("default", ROOT)


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    plant = Plant(tmp_path)
    simulate_roll(
        plant.roll_path("R"), SimulatedStrip(LINES / 1000, 5, width_px=WIDTH, density=8, blackouts=())
    )
    return plant


def planned(plant: Plant, roll: Roll, model: Model) -> Planned:
    return plan_roll(plant, roll, model, Threads(1), engine="onnx", device="cpu")


def test_a_band_is_as_large_as_memory_allows(plant: Plant, model: Model) -> None:
    scan = planned(plant, plant.roll("R"), model)
    needs = {size: slot_bytes(scan.plan, 1, size) for size in (1024, 2048, 4096)}
    assert needs[1024] < needs[2048] < needs[4096]

    sizes = [fit_bands(scan, Roomy(room)) for room in (needs[1024], needs[2048] - 1, needs[2048], 10**12)]
    assert sizes == [1024, 1024, 2048, 2048]


def test_where_not_even_the_smallest_band_fits_the_scan_is_refused_with_both_figures(
    plant: Plant, model: Model
) -> None:
    roll = plant.roll("R")
    scan = planned(plant, roll, model)
    needed = slot_bytes(scan.plan, 1, 1024) / 1e6
    told = f"1024 lines needs {needed:.0f} MB, and there are 20 MB for each band"
    with pytest.raises(UserError, match=re.escape(told)) as fault:
        scan_roll(plant, roll, model, Roomy(20_000_000), engine="onnx", device="cpu")
    assert fault.value.exit_code == FAILED
    assert not list((plant.home / "runs").glob("*/*/bands/*"))


def test_threads_are_fewer_where_memory_is_short_unless_their_number_was_said(
    plant: Plant, model: Model
) -> None:
    scan = planned(plant, plant.roll("R"), model)
    slots = []
    for executor in (Threads(), Threads(3)):
        executor.begin(_job(scan, executor), slot_bytes=10**15)
        slots.append(executor.slots())
        executor.close()
    assert slots == [1, 3]


def test_an_estimate_writes_nothing_and_after_some_bands_goes_by_them(plant: Plant, model: Model) -> None:
    roll, executor = plant.roll("R"), Threads(2)
    scan = plan_roll(plant, roll, model, executor, engine="onnx", device="cpu", core_lines=BAND)
    before = sorted(plant.home.rglob("*"))

    first = estimate_roll(scan, executor, BAND)

    assert sorted(plant.home.rglob("*")) == before
    assert (first.bands, first.bands_done, first.band_lines, first.slots) == (8, 0, BAND, 2)
    assert first.memory_bytes == 2 * slot_bytes(scan.plan, 1, BAND)
    assert first.basis == "a probe of 64 lines"
    assert first.seconds > 0
    assert first.disk_bytes > 0

    class StopError(Exception):
        pass

    def stop(done: int, lines: int) -> None:
        if done >= 4 * BAND:
            raise StopError

    with pytest.raises(StopError):
        scan_roll(plant, roll, model, executor, on_band=stop, **SMALL)
    later = estimate_roll(scan, executor, 2048)
    executor.close()
    assert (later.run_id, later.band_lines, later.basis) == (first.run_id, BAND, "finished bands")
    assert 4 <= later.bands_done < 8
    assert later.seconds > 0


def test_the_bands_not_scanned_are_named_in_metres(tmp_path: Path, model: Model) -> None:
    """Line by line 2 mm: a damaged shard holds lines 4096 to 8192, and the bands beside it see it too."""
    plant = Plant(tmp_path)
    gray = np.random.default_rng(0).integers(60, 200, (1, 8192 + 600, 64)).astype(np.uint8)
    strip = Strip("R", "top", ("bright",), 0.5, 2.0)
    with RollWriter(plant.roll_path("R"), strip, 64, gray.dtype) as writer:
        writer.append(gray)
        roll = writer.close()
    [shard] = (roll.path / "0" / "c" / "0" / "1").rglob("0")
    shard.write_bytes(b"not a shard")
    with pytest.raises(UserError) as fault:
        scan_roll(plant, roll, model, engine="onnx", device="cpu", band_lines=1024)
    told = str(fault.value)
    assert "6 of 9 bands are not scanned: 6.14 to 8.19 m, 8.19 to 10.24 m" in told
    assert "1 more" in told
    assert len(list((tmp_path / "runs").glob("R/*/bands/*.json"))) == 3


def test_a_band_in_batches_has_the_mask_of_one_window_at_a_time(plant: Plant, model: Model) -> None:
    """As a GPU would scan it, on the CPU: nine windows, two at once, the next rows read meanwhile."""
    roll = plant.roll("R")
    plan = plan_scan(roll, model, facts_here("torch"), core_lines=128, core_px=128)
    batched = BatchEngine(model, "cpu", batch_px=2 * 640 * 320)

    one_by_one, found = (scan_lines(plan, roll, e, 128, 500) for e in (torch_engine(model), batched))

    np.testing.assert_array_equal(found.mask, one_by_one.mask)
    assert len(found.components) == len(one_by_one.components) > 3
    assert found.rows == one_by_one.rows
    assert set(found.seconds) == {"read", "net", "mask"}
    assert min(found.seconds.values()) > 0


def test_a_temporary_receipt_that_a_kill_left_is_swept(plant: Plant, model: Model) -> None:
    roll = plant.roll("R")

    class KilledError(Exception):
        pass

    def kill(done: int, lines: int) -> None:
        if done:
            raise KilledError

    with pytest.raises(KilledError):
        scan_roll(plant, roll, model, on_band=kill, **SMALL)
    [bands] = (plant.home / "runs").glob("R/*/bands")
    left = [bands / ".0000000064.json.0123.partial", bands.parent / ".summary.json.0123.partial"]
    for path in left:
        path.write_bytes(b"{")
    run = scan_roll(plant, roll, model, **SMALL)
    assert not [path for path in run.folder.rglob("*") if path.name.endswith(".partial")]


def test_bands_at_work_are_noted_and_an_orderly_end_takes_that_back(tmp_path: Path) -> None:
    journal = tmp_path / "begun.log"
    journal.write_text("0\n64\n64\n12")  # the last line was cut short by a kill: still a band
    with pytest.raises(KeyboardInterrupt), _journal(journal) as deaths:
        with journal.open("a") as file:
            file.write("\n128\n")
        raise KeyboardInterrupt
    assert (deaths[0], deaths[64], deaths[128]) == (1, 2, 0)
    assert journal.read_text() == "0\n64\n64\n12"


def test_a_finished_run_leaves_no_journal(plant: Plant, model: Model) -> None:
    run = scan_roll(plant, plant.roll("R"), model, **SMALL)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        ".lock", "bands", "defects.csv", "defects.parquet", "plan.json", "report.html", "summary.json",
    ]  # fmt: skip
    plan = json.loads((run.folder / "plan.json").read_text())
    assert (plan["device"], plan["precision"]) == ("cpu", "fp32")


def test_a_roll_in_an_object_store_has_its_mask_in_the_run_folder(
    plant: Plant, model: Model, tmp_path: Path
) -> None:
    """memory:// stands for any fsspec store: the same table, mask and page as from the local disk."""
    local = plant.roll("R")
    url = f"memory://{tmp_path.name}/R.zarr"
    with RollWriter(url, local.strip, local.width, local.dtype) as writer:
        writer.append(local.read(0, local.lines))
    remote, elsewhere = open_roll(url), Plant(tmp_path / "elsewhere")

    run_local, run = (
        scan_roll(home, roll, model, **SMALL) for home, roll in ((plant, local), (elsewhere, remote))
    )

    assert run.table.equals(run_local.table)
    run_id = run.summary["run_id"]
    mask = remote.read_label(run_id, 0, remote.lines, folder=run.folder / "mask.zarr")
    np.testing.assert_array_equal(mask, local.read_label(run_id, 0, local.lines))
    assert (run.folder / "report.html").is_file()
    again = scan_roll(elsewhere, remote, model, **SMALL)
    assert again.summary == run.summary


def test_a_roll_in_an_object_store_that_was_replaced_under_its_id_is_scanned_anew(
    plant: Plant, model: Model, tmp_path: Path
) -> None:
    """Same id, size and description; only the image is another. So is a local roll of that id."""
    local, elsewhere = plant.roll("R"), Plant(tmp_path / "elsewhere")
    image = local.read(0, local.lines)
    urls = [f"memory://{tmp_path.name}/{folder}/R.zarr" for folder in ("here", "there")]

    def put(url: str, pixels: np.ndarray) -> Roll:
        with suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(url, recursive=True)
        with RollWriter(url, local.strip, local.width, local.dtype) as writer:
            writer.append(pixels)
        return open_roll(url)

    first = scan_roll(elsewhere, put(urls[0], image), model, **SMALL)
    for roll in (put(urls[0], image[:, ::-1]), put(urls[1], image[:, ::-1])):
        other = scan_roll(elsewhere, roll, model, **SMALL)
        assert (other.folder, other.summary["created_at"]) != (first.folder, first.summary["created_at"])
        assert sorted(other.table["y0"].to_pylist()) != sorted(first.table["y0"].to_pylist())
        assert str(roll.location) in (other.folder / IMAGE).read_text()
        assert "None" not in (other.folder / IMAGE).read_text()
        assert scan_roll(elsewhere, roll, model, **SMALL).summary == other.summary
        scan = plan_roll(elsewhere, roll, model, Threads(1), **PLAN)
        assert estimate_roll(scan, Threads(1)).bands_done > 0
    scan = plan_roll(elsewhere, put(urls[0], image), model, Threads(1), **PLAN)
    assert estimate_roll(scan, Threads(1)).bands_done == 0

    shutil.copytree(local.path, elsewhere.roll_path("R"), ignore=shutil.ignore_patterns("labels"))
    beside = scan_roll(elsewhere, elsewhere.roll("R"), model, **SMALL)
    assert beside.table.equals(first.table)
    assert not (beside.folder / "mask.zarr").exists() and not (beside.folder / IMAGE).exists()
