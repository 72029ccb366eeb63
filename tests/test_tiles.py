"""The grid: every px of a roll is answered for once, by a window that sees all it needs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollsight.inspect.tiles import CELL, Grid, cell_margins, up_to_cell

cells = st.integers(1, 9).map(lambda n: n * CELL)
grids = st.builds(
    Grid,
    lines=st.integers(1, 3000),
    width=st.integers(1, 2500),
    core_lines=cells,
    core_px=cells,
    halo=st.integers(0, 5).map(lambda n: n * CELL),
)


def all_windows(grid):
    return [window for row in range(grid.rows) for window in grid.windows(row)]


@given(grids)
def test_the_cores_of_all_windows_cover_the_roll_exactly_once(grid):
    answered = np.zeros((grid.canvas_lines, grid.canvas_px), dtype=np.uint8)
    for w in all_windows(grid):
        answered[w.core_y0 : w.core_y1, w.core_x0 : w.core_x1] += 1

    assert (answered[: grid.lines, : grid.width] == 1).all()
    assert answered.max() == 1


@given(grids)
def test_windows_start_on_cells_and_stay_in_the_canvas(grid):
    for w in all_windows(grid):
        assert w.y % CELL == w.x % CELL == 0
        assert 0 <= w.y <= grid.canvas_lines - grid.window_lines
        assert 0 <= w.x <= grid.canvas_px - grid.window_px


@given(grids)
def test_a_window_holds_its_core_and_the_halo_wherever_the_canvas_goes_on(grid):
    for w in all_windows(grid):
        assert w.y <= max(0, w.core_y0 - grid.halo)
        assert w.x <= max(0, w.core_x0 - grid.halo)
        assert w.y + grid.window_lines >= min(grid.canvas_lines, w.core_y1 + grid.halo)
        assert w.x + grid.window_px >= min(grid.canvas_px, w.core_x1 + grid.halo)


@given(grids)
def test_the_canvas_is_whole_cells_and_at_least_one_window(grid):
    assert grid.canvas_lines % CELL == grid.canvas_px % CELL == 0
    assert grid.window_lines % CELL == grid.window_px % CELL == 0
    assert grid.canvas_lines >= max(grid.lines, grid.window_lines)
    assert grid.width <= grid.canvas_px < grid.width + CELL


@given(grids)
def test_the_rows_share_the_lines_of_the_roll_among_them(grid):
    rows = [grid.row_lines(row) for row in range(grid.rows)]

    assert [first for first, _ in rows] == [0, *(last for _, last in rows[:-1])]
    assert rows[-1][1] == grid.lines
    assert all(first < last for first, last in rows)


@given(grids)
def test_all_windows_of_a_row_read_the_lines_that_the_row_reads(grid):
    for row in range(grid.rows):
        y0, y1 = grid.read_lines(row)
        assert {(w.y, w.y + grid.window_lines) for w in grid.windows(row)} == {(y0, y1)}


def test_a_core_as_wide_as_the_roll_needs_no_halo_across():
    grid = Grid(lines=10_000, width=1250, core_lines=2048, core_px=1280, halo=256)

    assert (grid.window_lines, grid.window_px) == (2560, 1280)
    assert len(list(grid.windows(0))) == 1


def test_a_roll_smaller_than_a_window_is_one_window_on_a_larger_canvas():
    grid = Grid(lines=1, width=1, core_lines=64, core_px=64, halo=256)

    assert (grid.canvas_lines, grid.canvas_px) == (576, 64)
    assert len(all_windows(grid)) == 1


@pytest.mark.parametrize("size", ["core_lines", "core_px", "halo"])
@pytest.mark.parametrize("px", [100, -64])
def test_a_size_off_the_cell_grid_is_refused_by_name(size, px):
    sizes = {"core_lines": 128, "core_px": 128, "halo": 64, size: px}

    with pytest.raises(ValueError, match=f"{size} is {px} px: it must be a multiple of the 64 px cell"):
        Grid(1000, 1000, **sizes)


@pytest.mark.parametrize("size", ["core_lines", "core_px"])
def test_an_empty_core_is_refused(size):
    with pytest.raises(ValueError, match=f"{size} is 0 px"):
        Grid(1000, 1000, **{"core_lines": 128, "core_px": 128, "halo": 64, size: 0})


def test_an_empty_roll_is_refused():
    with pytest.raises(ValueError, match="0 lines x 10 px has nothing to scan"):
        Grid(0, 10, 64, 64, 0)


def test_up_to_cell_leaves_multiples_alone():
    assert [up_to_cell(px) for px in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]


@pytest.mark.parametrize(("px", "margins"), [(200, (28, 28)), (64, (0, 0)), (65, (31, 32)), (1, (31, 32))])
def test_an_image_lies_in_the_middle_of_its_cells(px, margins):
    assert cell_margins(px) == margins
