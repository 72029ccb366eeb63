"""A roll scanned while it grows."""

import threading
import time
from itertools import pairwise

import numpy as np
import pyarrow.parquet
import pytest
from rollsight.inspect.errors import LOCKED, UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import RollWriter, Strip, open_roll
from rollsight.jobs.cluster import Threads
from rollsight.jobs.live_job import LIVE_TABLE, scan_live
from rollsight.jobs.scan_job import scan_roll
from rollsight.synth.strip import SimulatedStrip

LINES, WIDTH = 11_000, 200  # two whole shards of 4096 lines and a part
STRIP = Strip("L", "top", ("bright",), 0.8, 1.0)

# Lines at which the writer pauses, and for how many seconds: five ways in which a roll grows.
GROWTH = {
    "all at once": ([LINES], 0.0),
    "shard by shard": ([4096, 8192, LINES], 0.4),
    "in odd pieces": ([*range(1500, LINES, 1500), LINES], 0.05),
    "a line, then the rest": ([1, 4095, 4097, LINES], 0.2),
    "long silent, then fast": ([100, 8300, LINES], 0.6),
}


@pytest.fixture(scope="module")
def image():
    return SimulatedStrip(LINES / 1000, 9, width_px=WIDTH, density=4).block(0, LINES)[0]


@pytest.fixture(scope="module")
def closed(image, small_model, tmp_path_factory):
    """The table of the roll scanned when it was closed."""
    plant = Plant(tmp_path_factory.mktemp("closed"))
    with RollWriter(plant.roll_path("L"), STRIP, WIDTH, "uint8") as writer:
        writer.append(image)
        roll = writer.close()
    return scan_roll(plant, roll, small_model).table


def grow(path, image, stops, pause_s, begun):
    with RollWriter(path, STRIP, WIDTH, "uint8", total_lines=LINES, live=True) as writer:
        for y0, y1 in pairwise([0, *stops]):
            writer.append(image[:, y0:y1])
            begun.set()
            time.sleep(pause_s)
        writer.close()


@pytest.mark.parametrize("pattern", GROWTH)
def test_a_roll_scanned_while_it_grows_ends_with_the_table_of_the_closed_one(
    pattern, image, closed, small_model, tmp_path
):
    """And a defect that was finished stays as it was: its id, its place, its area."""
    plant, begun, finished = Plant(tmp_path), threading.Event(), []

    def remember(_progress):
        [path] = plant.run("L", "").glob(f"*/{LIVE_TABLE}")
        table = pyarrow.parquet.read_table(path)
        finished.append(table.filter(~np.asarray(table["provisional"])).drop_columns("provisional"))

    writer = threading.Thread(target=grow, args=(plant.roll_path("L"), image, *GROWTH[pattern], begun))
    writer.start()
    begun.wait(30)
    executor = Threads(2)
    run = scan_live(
        plant, plant.roll_path("L"), small_model, executor, poll_s=0.01, patience_s=60, on_progress=remember
    )
    executor.close()
    writer.join()

    assert run.table.equals(closed)
    rows = {row["defect_id"]: row for row in closed.to_pylist()}
    for table in finished:
        assert all(rows[row["defect_id"]] == row for row in table.to_pylist())
    if GROWTH[pattern][1]:
        assert sum(table.num_rows for table in finished) > 0
    assert not list(run.folder.glob(LIVE_TABLE))


def test_a_roll_that_stands_still_is_given_up_with_what_was_scanned_kept(image, small_model, tmp_path):
    plant = Plant(tmp_path)
    writer = RollWriter(plant.roll_path("L"), STRIP, WIDTH, "uint8", total_lines=LINES, live=True)
    writer.append(image[:, :5000])
    executor = Threads(2)
    with pytest.raises(UserError, match="stands at 4096 lines") as fault:
        scan_live(plant, plant.roll_path("L"), small_model, executor, poll_s=0.01, patience_s=0.2)
    executor.close()
    writer.abort()

    assert fault.value.exit_code == LOCKED
    assert (
        len(list(plant.run("L", "").glob("*/bands/*.json"))) == 1
    )  # lines 0 to 2048; the next wants its halo
    assert not open_roll(plant.roll_path("L"), live=True).strip.closed
