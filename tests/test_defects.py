"""Components joined across bands: the same table for any cut."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from rollsight.inspect.defects import SCHEMA, Components, band_components, join, label_mask, table
from rollsight.inspect.rolls import Strip
from scipy import ndimage

MASKS = hnp.arrays(
    np.uint8, st.tuples(st.integers(2, 24), st.integers(1, 12)), elements=st.sampled_from([0, 0, 1, 2, 255])
)


def cut(mask: NDArray[np.uint8], borders: list[int]) -> Components:
    """The joined components of a mask cut into bands at these lines; each pixel scores by its place."""
    score = (np.arange(mask.size, dtype=np.float32).reshape(mask.shape) % 97) / 97
    left = np.arange(mask.shape[0]) % 3
    edges = [0, *sorted({b for b in borders if 0 < b < mask.shape[0]}), mask.shape[0]]
    bands = [band_components(mask[a:b], score[a:b], left[a:b], a) for a, b in pairwise(edges)]
    return join([Components.from_json(json.loads(json.dumps(band.to_json()))) for band in bands])


@settings(max_examples=200)
@given(MASKS, st.lists(st.integers(1, 23), max_size=8))
def test_any_cut_gives_the_components_of_the_whole(mask: NDArray[np.uint8], borders: list[int]) -> None:
    whole, parts = cut(mask, []), cut(mask, borders)
    assert whole.to_json() == parts.to_json()


@given(MASKS)
def test_components_are_those_of_scipy_per_class(mask: NDArray[np.uint8]) -> None:
    found = cut(mask, [5])
    expected = []
    for value in (1, 2):
        ids, _ = ndimage.label(mask == value, structure=np.ones((3, 3)))
        for number, (ys, xs) in enumerate(ndimage.find_objects(ids), start=1):
            area = int((ids[ys, xs] == number).sum())
            expected.append((value, area, xs.start, ys.start, xs.stop, ys.stop))
    columns = [found.classes, *(found.facts[name] for name in ("area_px", "x0", "y0", "x1", "y1"))]
    assert sorted(zip(*(c.tolist() for c in columns), strict=True)) == sorted(expected)


def test_a_u_shape_whose_arms_meet_in_the_next_band_is_one_defect() -> None:
    mask = np.zeros((6, 5), dtype=np.uint8)
    mask[:, 0] = mask[:, 4] = mask[5] = 1
    joined = cut(mask, [2, 4])
    assert len(joined) == 1
    assert joined.facts["area_px"].tolist() == [6 + 6 + 3]


def test_a_diagonal_step_over_the_seam_joins_and_another_class_does_not() -> None:
    mask = np.array([[1, 0, 0, 2], [0, 1, 2, 0]], dtype=np.uint8)
    assert len(cut(mask, [1])) == 2
    mask = np.array([[1, 0, 0, 2], [0, 2, 1, 0]], dtype=np.uint8)
    assert len(cut(mask, [1])) == 4


def test_label_mask_counts_255_as_background_and_does_not_join_classes() -> None:
    ids, n = label_mask(np.array([[1, 2, 255, 1]], dtype=np.uint8))
    assert n == 3
    assert ids[0, 2] == 0
    assert len(set(ids[0, [0, 1, 3]].tolist())) == 3


def test_positions_are_from_the_drive_side_edge_and_sizes_in_mm() -> None:
    """A 2 px wide, 3 lines long spot 10 px from an edge that wanders by 1 px a line."""
    mask = np.zeros((3, 40), dtype=np.uint8)
    left = np.array([5, 6, 7])
    for y in range(3):
        mask[y, left[y] + 10 : left[y] + 12] = 1
    bands = [band_components(mask, np.ones((3, 40), np.float32), left, 1000)]
    strip = Strip("R", "top", ("bright",), mm_per_px_x=0.5, mm_per_line=2.0)
    [row] = table(join(bands), ("pit",), strip, roll_id="R", run_id="r").to_pylist()
    assert (row["x_mm"], row["width_mm"], row["length_mm"]) == (5.0, 1.0, 6.0)
    assert row["y_m"] == pytest.approx(2.0)
    assert row["area_mm2"] == pytest.approx(6 * 0.5 * 2.0)
    assert (row["x0"], row["x1"], row["y0"], row["y1"]) == (15, 19, 1000, 1003)


def test_a_roll_without_defects_has_an_empty_table_of_the_same_schema() -> None:
    empty = table(join([]), ("pit",), Strip("R", "top", ("b",), None, None), roll_id="R", run_id="r")
    assert empty.num_rows == 0
    assert empty.schema.equals(SCHEMA, check_metadata=True)
