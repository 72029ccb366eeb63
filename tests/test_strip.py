"""The simulated coil: its bytes, its surface, its edges, and a truth that agrees with its mask."""

import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.rolls import open_roll
from rollsight.synth.strip import (
    CLASSES,
    ROLL_PITCH_MM,
    TRUTH_FILE,
    TRUTH_LABEL,
    SimulatedStrip,
    simulate_roll,
)
from scipy import ndimage

EIGHT = np.ones((3, 3), dtype=bool)


@pytest.fixture(scope="module")
def busy() -> SimulatedStrip:
    """Six metres with four times the usual defects and a short blackout."""
    return SimulatedStrip(6.0, seed=3, width_px=640, density=4.0, blackouts=[(2500, 2540)])


@pytest.fixture(scope="module")
def coil() -> SimulatedStrip:
    """Thirty metres as in the demo, narrower."""
    return SimulatedStrip(30.0, seed=11, width_px=320)


def rows(strip: SimulatedStrip, name: str | None = None) -> list[dict]:
    return [row for row in strip.truth.to_pylist() if name in (None, row["class"])]


CUT_LINES = 3000


@pytest.fixture(scope="module")
def whole() -> tuple[np.ndarray, np.ndarray]:
    return SimulatedStrip(CUT_LINES / 1000, seed=5, width_px=256, density=4.0).block(0, CUT_LINES)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, CUT_LINES - 1), max_size=6), backwards=st.booleans())
def test_the_bytes_of_a_strip_do_not_depend_on_its_blocks(whole, cuts, backwards):
    strip = SimulatedStrip(CUT_LINES / 1000, seed=5, width_px=256, density=4.0)
    borders = [0, *sorted(cuts), CUT_LINES]
    spans = list(pairwise(borders))
    for y0, y1 in reversed(spans) if backwards else spans:
        image, mask = strip.block(y0, y1)

        assert image.shape == (1, y1 - y0, 256)
        assert image.dtype == mask.dtype == np.uint8
        assert np.array_equal(image, whole[0][:, y0:y1])
        assert np.array_equal(mask, whole[1][y0:y1])
        assert np.array_equal(strip.mask(y0, y1), mask)


def test_another_seed_gives_another_strip():
    one, two = SimulatedStrip(1.0, seed=1, width_px=256), SimulatedStrip(1.0, seed=2, width_px=256)

    assert not np.array_equal(one.block(0, 1000)[0], two.block(0, 1000)[0])
    assert one.truth != two.truth


def test_the_truth_table_lists_the_connected_parts_of_the_mask(busy):
    """Class, box and area of every 8-connected part, and nothing else."""
    mask = busy.block(0, busy.lines)[1]
    found = Counter()
    for value, name in enumerate(CLASSES, start=1):
        parts, _ = ndimage.label(mask == value, EIGHT)
        areas = np.bincount(parts.ravel())
        for number, (y, x) in enumerate(ndimage.find_objects(parts), start=1):
            found[name, x.start, y.start, x.stop, y.stop, int(areas[number])] += 1
    told = Counter(
        tuple(row[key] for key in ("class", "x0", "y0", "x1", "y1", "area_px")) for row in rows(busy)
    )

    assert told == found
    assert {row["class"] for row in rows(busy)} == set(CLASSES)
    assert [row["defect_id"] for row in rows(busy)] == list(range(1, len(rows(busy)) + 1))


def test_mm_follow_from_px_and_x_is_measured_from_the_drive_side_edge(busy):
    for row in rows(busy):
        middle = (row["y0"] + row["y1"]) // 2
        lit = np.flatnonzero(busy.block(middle, middle + 1)[0][0, 0] >= 16)
        if lit.size:  # else the middle lies in the blackout
            assert row["x_mm"] == pytest.approx(0.8 * (row["x0"] - lit[0]), abs=2.4)
        assert row["y_m"] == pytest.approx(row["y0"] / 1000)
        assert row["width_mm"] == pytest.approx(0.8 * (row["x1"] - row["x0"]))
        assert row["length_mm"] == pytest.approx(row["y1"] - row["y0"])
        assert row["area_mm2"] == pytest.approx(0.8 * row["area_px"])


def test_every_pit_is_smaller_than_32_px(coil):
    areas = [row["area_px"] for row in rows(coil, "pit")]

    assert len(areas) > 30
    assert min(areas) >= 4
    assert max(areas) < 32


@pytest.mark.parametrize("seed", range(3))
def test_a_scratch_on_30_m_crosses_at_least_five_bands(seed):
    strip = SimulatedStrip(30.0, seed=seed, width_px=320, blackouts=())
    longest = max(rows(strip, "scratches"), key=lambda row: row["length_mm"])

    assert (longest["y1"] - 1) // 2048 - longest["y0"] // 2048 >= 5
    assert longest["width_mm"] < 60
    labels, count = ndimage.label(strip.mask(longest["y0"], longest["y1"]) == 3, EIGHT)
    column = labels[0, longest["x0"] : longest["x1"]].max()
    assert count >= 1
    assert (labels[-1] == column).any()


def test_roll_marks_repeat_at_the_pitch_of_the_roll_within_a_line(coil):
    """At one distance from the drive-side edge within 2 mm, in one shape; a blackout may hide one."""
    marks = [row for row in rows(coil, "roll_mark") if row["periodic_group"] == 1]
    turns = np.diff([row["y_m"] for row in marks]) * 1000 / ROLL_PITCH_MM
    first = marks[0]

    assert len(marks) >= 12
    assert np.all(np.abs(turns - np.round(turns)) * ROLL_PITCH_MM <= 1.0)
    assert np.round(turns).max() <= 2
    for number, row in enumerate(marks):
        assert row["x_mm"] == pytest.approx(first["x_mm"], abs=2.0)
        assert row["area_px"] == first["area_px"]
        if np.all(np.round(turns) == 1):
            assert row["y_m"] * 1000 - first["y_m"] * 1000 == pytest.approx(number * ROLL_PITCH_MM, abs=1.0)
    assert all(row["periodic_group"] is None for row in rows(coil) if row["class"] != "roll_mark")


def test_a_roll_mark_keeps_its_pitch_in_mm_when_a_line_is_half_a_mm():
    strip = SimulatedStrip(8.0, seed=2, width_px=256, mm_per_line=0.5)
    marks = [row for row in rows(strip, "roll_mark") if row["periodic_group"] == 1]
    y_mm = [row["y_m"] * 1000 for row in marks]

    assert strip.lines == 16_000
    assert len(y_mm) >= 4
    assert np.diff(y_mm) == pytest.approx(np.full(len(y_mm) - 1, ROLL_PITCH_MM), abs=0.5)


def test_no_defect_lies_outside_the_edges_and_outside_is_dark(busy):
    image, mask = busy.block(0, busy.lines)
    left, right = busy.edges(0, busy.lines)
    centre = np.arange(busy.width_px) + 0.5
    outside = (centre < left[:, None]) | (centre > right[:, None])
    far = (centre < left[:, None] - 1) | (centre > right[:, None] + 1)

    assert not mask[outside].any()
    assert image[0][far].max() < 16
    assert 2 < image[0][far].mean() < 6


def test_edge_cracks_start_at_a_strip_edge(busy):
    left, right = busy.edges(0, busy.lines)
    for row in rows(busy, "edge_crack"):
        lines = slice(row["y0"], row["y1"])
        gap = min(abs(row["x0"] - left[lines]).min(), abs(row["x1"] - right[lines]).min())

        assert gap < 8


def test_the_edges_wander_by_millimetres_and_slowly(coil):
    left, right = coil.edges(0, coil.lines)
    smooth = ndimage.uniform_filter1d(left, 256)

    assert 2.0 < 0.8 * np.ptp(smooth) < 25.0
    assert np.abs(np.diff(left)).max() < 0.5
    assert left.min() > 1
    assert right.max() < coil.width_px - 1


@pytest.mark.parametrize("seed", range(6))
def test_the_surface_is_gray_steel_drawn_out_along_rolling(seed):
    strip = SimulatedStrip(1.024, seed=seed, width_px=512, clean=True)
    image, mask = strip.block(0, 1024)
    steel = image[0, :, 40:-40].astype(np.float64)
    grain = steel - ndimage.gaussian_filter(steel, 8)

    assert not mask.any()
    assert strip.truth.num_rows == 0
    assert 90 <= np.median(image) <= 150
    assert steel.min() > 30
    assert steel.max() < 255
    assert 2.0 < grain.std() < 8.0
    along, across = (grain[1:] * grain[:-1]).mean(), (grain[:, 1:] * grain[:, :-1]).mean()
    assert along > across > 0


def test_every_defect_differs_from_the_clean_strip_by_two_deviations():
    """Against the same surface without defects, so the contrast is that of the defect alone."""
    arguments = {"length_m": 5.0, "seed": 8, "width_px": 640}
    dirty, clean = SimulatedStrip(**arguments, density=4.0), SimulatedStrip(**arguments, clean=True)
    image, mask = dirty.block(0, dirty.lines)
    plain = clean.block(0, clean.lines)[0]
    change = image[0].astype(np.float64) - plain[0]
    steel = plain[0, :, 60:-60].astype(np.float64)
    sigma = (steel - ndimage.gaussian_filter(steel, 8)).std()

    contrasts = []
    for row in rows(dirty):
        box = (slice(row["y0"], row["y1"]), slice(row["x0"], row["x1"]))
        inside = mask[box] == CLASSES.index(row["class"]) + 1
        contrasts.append(np.abs(change[box][inside]).max())

    assert min(contrasts) >= 2 * sigma
    assert max(contrasts) > 2.5 * min(contrasts)
    assert np.abs(change[ndimage.binary_dilation(mask > 0, iterations=9) == 0]).max() < 0.4 * 90


def test_a_blackout_is_dark_across_and_holds_no_truth(busy):
    image, mask = busy.block(2490, 2550)

    assert image[0, 10:50].max() < 16
    assert not mask[10:50].any()
    assert np.median(image[0, :10]) > 60


def test_the_default_blackout_leaves_99_percent_of_the_demo_coil_and_short_strip_has_none(coil, whole):
    [(start, stop)] = coil.blackouts

    assert stop - start == 100
    assert coil.block(start, stop)[0].max() < 16
    assert SimulatedStrip(5.0, seed=11).blackouts == ()
    assert SimulatedStrip(30.0, seed=11, blackouts=()).blackouts == ()


def peak_of_reading(length_m: float) -> int:
    """Peak bytes allocated while a strip is made and read through, without its truth table."""
    tracemalloc.start()
    strip = SimulatedStrip(length_m, seed=4, width_px=256, density=0.5)
    for y0 in range(0, strip.lines, 1024):
        strip.block(y0, min(y0 + 1024, strip.lines))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_length_of_the_strip():
    peak_of_reading(3.0)  # what is allocated once for all strips

    assert peak_of_reading(24.0) < 1.15 * peak_of_reading(6.0)


def test_a_block_far_down_a_million_lines_is_made_without_those_before_it():
    strip = SimulatedStrip(1000.0, seed=1, width_px=256)
    image, mask = strip.block(987_000, 987_600)
    again = SimulatedStrip(1000.0, seed=1, width_px=256).block(986_900, 987_600)

    assert np.array_equal(image, again[0][:, 100:])
    assert np.array_equal(mask, again[1][100:])


def test_a_simulated_roll_holds_image_mask_and_truth(tmp_path):
    strip = SimulatedStrip(4.5, seed=6, width_px=300, density=2.0)
    seen = []
    roll = simulate_roll(
        tmp_path / "S-1.zarr", strip, on_lines=lambda done, total: seen.append((done, total))
    )

    image, mask = strip.block(0, strip.lines)
    assert (roll.lines, roll.width, roll.modes, roll.strip.units) == (4500, 300, 1, "mm")
    assert np.array_equal(roll.read(0, 4500), image)
    again = open_roll(tmp_path / "S-1.zarr")
    assert again.label_classes(TRUTH_LABEL) == CLASSES
    assert np.array_equal(again.read_label(TRUTH_LABEL, 0, 4500), mask)
    assert pq.read_table(tmp_path / "S-1.zarr" / TRUTH_FILE).equals(strip.truth)
    assert seen[-1] == (4500, 4500)
    with pytest.raises(UserError, match="exists"):
        simulate_roll(tmp_path / "S-1.zarr", strip)


def test_an_interrupted_simulation_leaves_no_roll(tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_roll(tmp_path / "S-2.zarr", SimulatedStrip(2.0, seed=6, width_px=256), on_lines=stop)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"length_m": 0.0}, "length_m is 0.0"),
        ({"length_m": float("nan")}, "length_m is nan"),
        ({"length_m": 0.0001}, "shorter than one line"),
        ({"seed": -1}, "seed is -1"),
        ({"width_px": 20}, "width_px is 20"),
        ({"density": -0.5}, "density is -0.5"),
        ({"mm_per_line": 0.0}, "mm_per_line is 0.0"),
        ({"blackouts": [(900, 1100)]}, "blackout 900-1100"),
    ],
)
def test_a_strip_that_cannot_be_made_is_refused_by_name(changed, named):
    with pytest.raises(UserError, match=named) as refused:
        SimulatedStrip(**{"length_m": 1.0, "seed": 0, **changed})

    assert refused.value.exit_code == USAGE


def test_lines_that_are_not_on_the_strip_are_refused():
    strip = SimulatedStrip(1.0, seed=0, width_px=256)
    for y0, y1 in ((0, 1001), (5, 5), (-1, 4)):
        with pytest.raises(ValueError, match="1000"):
            strip.block(y0, y1)
