"""Strip edges and parts not inspected, from the gray alone."""

import numpy as np
import pytest
from numpy.typing import NDArray
from rollsight.inspect.linescan import NotInspected, read_row, runs

ALL = np.ones(64, dtype=np.bool_)


def strip(left: int = 40, right: int = 280, width: int = 320) -> NDArray[np.float32]:
    """One mode of 64 lines: background 4, strip about 120 of 255."""
    rng = np.random.default_rng(0)
    gray = np.full((1, 64, width), 4 / 255)
    gray[:, :, left:right] = rng.normal(120, 10, (1, 64, right - left)) / 255
    return gray.astype(np.float32)


def test_the_edges_are_where_the_strip_begins_and_ends() -> None:
    row = read_row(strip(37, 281), ALL, 128)
    assert (row.y0, row.y1, row.left, row.right, row.not_inspected) == (128, 192, 37, 281, ())


def test_a_bright_speck_beside_the_strip_does_not_move_its_edge() -> None:
    gray = strip()
    gray[:, :, 10:13] = 0.8
    assert read_row(gray, ALL, 0).left == 40


def test_lines_without_light_are_dark_over_the_whole_strip() -> None:
    gray = strip()
    gray[:, 10:20] = 2 / 255
    row = read_row(gray, ALL, 64)
    assert row.not_inspected == (NotInspected(40, 74, 280, 84, "dark"),)
    assert row.not_inspected_px == 10 * 240


def test_a_row_without_any_strip_is_not_inspected_and_has_no_edges() -> None:
    row = read_row(np.full((1, 64, 320), 4 / 255, dtype=np.float32), ALL, 0)
    assert (row.left, row.right) == (None, None)
    assert row.not_inspected == (NotInspected(0, 0, 320, 64, "dark"),)


def test_a_saturated_cell_is_not_inspected_and_one_with_a_small_reflection_is() -> None:
    gray = strip()
    gray[:, :, 128:192] = 1.0
    assert read_row(gray, ALL, 0).not_inspected == (NotInspected(128, 0, 192, 64, "saturated"),)
    gray = strip()
    gray[:, :20, 128:192] = 1.0
    assert read_row(gray, ALL, 0).not_inspected == ()


def test_a_dark_lane_takes_its_cells_within_the_strip_edges_only() -> None:
    """A blocked window: 40 of the cell's 64 px columns are black."""
    gray = strip()
    gray[:, :, 130:180] = 1 / 255
    row = read_row(gray, ALL, 0)
    assert row.not_inspected == (NotInspected(128, 0, 192, 64, "dark"),)
    assert row.not_inspected_px == 64 * 64


@pytest.mark.parametrize("how", ["record", "repeat"])
def test_dropped_lines_are_not_inspected(how: str) -> None:
    """Told by the camera's record, or by lines that repeat the one before bit by bit."""
    gray, valid = strip(), ALL.copy()
    if how == "record":
        valid[30:34] = False
    else:
        gray[:, 30:34] = gray[:, 29:30]
    row = read_row(gray, valid, 0)
    assert row.not_inspected == (NotInspected(40, 30, 280, 34, "dropped"),)
    assert row.not_inspected_px == 4 * 240


def test_a_line_that_repeats_the_one_above_its_row_of_cells_is_dropped() -> None:
    """Else one line in 64 of a long gap would count as inspected."""
    gray = strip()
    row = read_row(gray, ALL, 64, above=gray[:, 0])
    assert row.not_inspected == (NotInspected(40, 64, 280, 65, "dropped"),)
    assert read_row(gray, ALL, 64, above=gray[:, 1]).not_inspected == ()


def test_a_dark_field_image_beside_a_bright_one_is_inspected() -> None:
    bright = strip()
    assert read_row(np.concatenate([bright, bright * 0.05]), ALL, 0).not_inspected == ()


def test_runs_are_half_open() -> None:
    assert runs(np.array([True, False, True, True])) == [(0, 1), (2, 4)]
    assert runs(np.zeros(3, dtype=np.bool_)) == []
