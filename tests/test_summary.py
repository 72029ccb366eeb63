"""Coverage of a whole roll, and what it lists as not inspected."""

import numpy as np
import pytest
from rollsight.inspect.defects import band_components
from rollsight.inspect.linescan import CellRow, NotInspected
from rollsight.jobs.summary import MAX_LISTED, from_strip_edge, inspected, joined, strip_edges


def rows(*edges: tuple[int | None, int | None]) -> list[CellRow]:
    """Rows of 64 lines with these strip edges, all inspected where a strip was seen."""
    return [CellRow(64 * i, 64 * i + 64, left, right, 0, ()) for i, (left, right) in enumerate(edges)]


def coverage_of(found: list[CellRow]) -> tuple[float, list[NotInspected]]:
    return inspected(found, *strip_edges(found, 1000))


def test_a_lamp_that_fails_at_the_strip_edge_is_not_a_narrower_strip() -> None:
    """Drive-side half dark in one row of ten: 5 % of the strip was not inspected."""
    edges = [(100, 900)] * 10
    edges[4] = (500, 900)
    coverage, parts = coverage_of(rows(*edges))
    assert coverage == pytest.approx(0.95)
    assert parts == [NotInspected(100, 256, 500, 320, "dark")]


def test_a_defect_beside_a_failed_lamp_is_placed_from_the_edge_of_the_strip() -> None:
    """The band saw light from 500 px on and counted from there; the strip begins at 100 px."""
    edges = [(100, 900)] * 10
    edges[4] = (500, 900)
    mask = np.zeros((640, 1000), np.uint8)
    mask[40:50, 300:310] = mask[270:280, 600:620] = mask[300:340, 700:706] = 1
    left = np.repeat([edge[0] for edge in edges], 64)
    components = band_components(mask, np.ones(mask.shape, np.float32), left, 0)
    assert components.facts["strip_x0"].tolist() == [200, 100, 200]

    facts = from_strip_edge(components, rows(*edges), 1000).facts

    assert facts["strip_x0"].tolist() == [200, 500, 600]
    assert facts["strip_x1"].tolist() == [210, 520, 606]
    assert {name: facts[name].tolist() for name in ("x0", "y0", "area_px")} == {
        name: components.facts[name].tolist() for name in ("x0", "y0", "area_px")
    }


def test_where_no_lamp_failed_the_places_are_those_of_the_bands() -> None:
    mask = np.zeros((128, 1000), np.uint8)
    mask[60:70, 300:310] = 1
    components = band_components(
        mask, np.ones(mask.shape, np.float32), np.repeat([100, 104], 64).astype(np.int64), 0
    )
    moved = from_strip_edge(components, rows((100, 900), (104, 904)), 1000)
    assert moved.facts["strip_x0"].tolist() == components.facts["strip_x0"].tolist() == [196]
    empty = band_components(mask * 0, np.ones(mask.shape, np.float32), np.zeros(128, np.int64), 0)
    assert len(from_strip_edge(empty, rows((None, None), (None, None)), 1000)) == 0


def test_a_strip_that_wanders_far_keeps_its_edges_and_is_inspected_whole() -> None:
    edges = [(100, 900)] * 7 + [(180, 980)] * 3
    assert coverage_of(rows(*edges)) == (1.0, [])
    mask = np.zeros((640, 1000), np.uint8)
    mask[500:510, 190:200] = 1  # 10 px from the drive-side edge as it is there
    left = np.repeat([edge[0] for edge in edges], 64)
    components = band_components(mask, np.ones(mask.shape, np.float32), left, 0)
    assert from_strip_edge(components, rows(*edges), 1000).facts["strip_x0"].tolist() == [10]


def test_where_a_lamp_fails_while_the_strip_wanders_its_edge_is_that_of_the_rows_beside() -> None:
    edges = [(100 + 40 * i, 900 + 40 * i) for i in range(5)]
    edges[3] = (500, 1020)
    left, right = strip_edges(rows(*edges), 1100)
    assert (left.tolist(), right.tolist()) == ([100, 140, 180, 220, 260], [900, 940, 980, 1020, 1060])


def test_a_strip_that_wanders_by_less_than_a_cell_is_inspected_whole() -> None:
    coverage, parts = coverage_of(rows(*((100 + d, 900 + d) for d in range(0, 40, 4))))
    assert (coverage, parts) == (1.0, [])


def test_rows_without_a_strip_count_with_the_width_of_their_neighbours() -> None:
    assert coverage_of(rows((100, 900), (None, None), (100, 900), (100, 900)))[0] == pytest.approx(0.75)


def test_a_roll_without_any_strip_has_no_coverage() -> None:
    assert coverage_of(rows((None, None), (None, None)))[0] == 0.0


def test_parts_below_one_another_are_one_although_the_edge_wanders() -> None:
    parts = [NotInspected(100 + i % 3, 64 * i, 900, 64 * i + 64, "dark") for i in range(20)]
    assert joined(parts) == ([NotInspected(100, 0, 900, 1280, "dark")], True)


def test_however_many_parts_there_are_the_list_is_bounded_and_leaves_no_line_out() -> None:
    parts = [NotInspected(100, 640 * i, 900, 640 * i + 64, "dropped") for i in range(3 * MAX_LISTED)]
    listed, exact = joined(parts)
    assert len(listed) <= MAX_LISTED and not exact
    covered = np.zeros(640 * len(parts), dtype=np.bool_)
    for part in listed:
        covered[part.y0 : part.y1] = True
    assert all(covered[part.y0 : part.y1].all() for part in parts)


def test_of_too_many_parts_those_are_joined_that_lie_nearest() -> None:
    """Single lines, a thousand too many, most of them 9 lines apart: what is joined is little more."""
    rng = np.random.default_rng(0)
    at = np.cumsum(
        np.where(np.arange(MAX_LISTED + 1000) % 2, 10, rng.integers(2000, 4000, MAX_LISTED + 1000))
    )
    parts = [NotInspected(0, int(y), 5000, int(y) + 1, "dropped") for y in at]
    listed, exact = joined(parts)
    assert len(listed) <= MAX_LISTED and not exact
    assert sum(part.y1 - part.y0 for part in listed) <= 11 * len(parts) < 0.01 * at[-1]


def test_parts_of_more_columns_than_may_be_listed_are_joined_across_the_strip() -> None:
    parts = [NotInspected(64 * i, 0, 64 * i + 8, 64, "saturated") for i in range(MAX_LISTED + 5)]
    listed, exact = joined(parts)
    assert len(listed) <= MAX_LISTED and not exact
    assert all(any(box.x0 <= part.x0 and part.x1 <= box.x1 for box in listed) for part in parts)
