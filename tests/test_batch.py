"""Which rolls a command is given: patterns, a CSV, a line, a time; and every mistake in one line."""

import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from rollsight.inspect.errors import FAILED, USAGE, UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.jobs.batch import MAX_ROWS, choose_rolls

NOW = datetime(2026, 11, 24, 6, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    """Three rolls of two lines, closed 1, 30 and 80 h before NOW, and one that grows."""
    plant = Plant(tmp_path_factory.mktemp("plant"))
    for roll_id, line_id, hours in (("A-1", "CGL1", 80), ("A-2", "CGL2", 1), ("B-1", "CGL2", 30)):
        strip = Strip(roll_id, "top", ("bright",), 1.0, 1.0, line_id=line_id)
        with RollWriter(plant.roll_path(roll_id), strip, 64, np.uint8) as writer:
            writer.append(np.zeros((1, 8, 64), dtype=np.uint8))
        at = (NOW - timedelta(hours=hours)).timestamp()
        os.utime(plant.roll_path(roll_id) / "zarr.json", (at, at))
    growing = Strip("G-1", "top", ("bright",), 1.0, 1.0, line_id="CGL2")
    RollWriter(plant.roll_path("G-1"), growing, 64, np.uint8, live=True)
    (plant.home / "line.yaml").write_text("zone: Europe/Berlin\n")
    return plant


def write(folder: Path, text: str) -> Path:
    (folder / "batch.csv").write_text(text)
    return folder / "batch.csv"


def test_rolls_are_those_named_and_those_that_fit_a_pattern_each_once(plant: Plant) -> None:
    assert choose_rolls(plant, ["B-1", "A-*", "A-1", "s3://mill/R.zarr"]) == [
        "B-1", "A-1", "A-2", "s3://mill/R.zarr",
    ]  # fmt: skip


def test_a_batch_comes_by_priority_then_in_its_order(plant: Plant, tmp_path: Path) -> None:
    text = "\ufeffroll_id,priority,order\nA-1,,x\nA-2,5,y\nB-1,5,z\nA-1,9,w\n"
    assert choose_rolls(plant, batch=write(tmp_path, text)) == ["A-1", "A-2", "B-1"]


def test_line_and_time_choose_closed_rolls_oldest_first(plant: Plant) -> None:
    assert choose_rolls(plant, line="CGL2", now=NOW) == ["B-1", "A-2"]
    for since, rolls in (
        ("36h", ["B-1", "A-2"]),
        ("4d", ["A-1", "B-1", "A-2"]),
        ("2026-11-24T05:00+00:00", ["A-2"]),
        ("2026-11-24T05:59", ["A-2"]),  # Berlin's clock: 04:59 UTC
        ("2026-11-23", ["B-1", "A-2"]),
    ):
        assert choose_rolls(plant, since=since, now=NOW) == rolls, since
    assert choose_rolls(plant, ["A-*"], since="36h", line="CGL2", now=NOW) == ["A-2"]


MISTAKES = {
    "nothing named": ({}, None, USAGE, "no ROLL is named: name some, or say --batch, --since or --line"),
    "a pattern of nothing": ({"rolls": ["C-*"]}, None, FAILED, "fits 'C-*'"),
    "a line of nothing": ({"line": "CGL9"}, None, FAILED, "fits --line CGL9"),
    "no time": ({"since": "yesterday"}, None, USAGE, "--since 'yesterday': it is a date, a moment"),
    "a URL by line": ({"rolls": ["s3://m/R.zarr"], "line": "x"}, None, USAGE, "s3://m/R.zarr is none"),
    "no such file": ({"batch": Path("none.csv")}, None, USAGE, "none.csv: No such file or directory: name"),
    "no column": ({}, "coil\nR1\n", USAGE, "needs a column roll_id; it has coil"),
    "no rows": ({}, "roll_id\n", USAGE, "names no roll"),
    "an empty file": ({}, "", USAGE, "needs a column roll_id; it has none"),
    "a path as id": ({}, "roll_id\nR1\n../R2\n", USAGE, "line 3: '../R2' is no roll id"),
    "too many rows": (
        {},
        "roll_id\n" + "R1\n" * (MAX_ROWS + 1),
        USAGE,
        "has over 100,000 rows: give it in parts",
    ),
    "no number": ({}, "roll_id,priority\nR1,high\n", USAGE, "line 2: priority 'high' is no number"),
    "not UTF-8": ({}, "roll_id\nR\udcff\n", USAGE, "is not readable as CSV"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_line_and_its_exit_code(name: str, plant: Plant, tmp_path: Path) -> None:
    options, text, exit_code, told = MISTAKES[name]
    if text is not None:
        path = tmp_path / "b.csv"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        options = {**options, "batch": path}
    with pytest.raises(UserError) as fault:
        choose_rolls(plant, now=NOW, **options)  # type: ignore[arg-type]
    assert told in str(fault.value)
    assert fault.value.exit_code == exit_code


def test_a_roll_that_cannot_be_read_is_chosen_so_that_the_scan_says_why(plant: Plant, tmp_path: Path) -> None:
    copy = Plant(tmp_path)
    shutil.copytree(plant.roll_path("A-1"), copy.roll_path("A-1"))
    (copy.roll_path("A-1") / "zarr.json").write_text("{")
    assert choose_rolls(copy, line="CGL2") == ["A-1"]
