"""The simulated coil: its bytes, its surfaces, its edges, and a truth that agrees with its mask."""

import hashlib
import json
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
from rollsight.synth.stamps import DARK_FIELDS
from rollsight.synth.strip import (
    CLASSES,
    EFFECTS,
    LIGHTINGS,
    MARKERS,
    ROLL_PITCH_MM,
    SURFACES,
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


PINS = [
    (
        {"length_m": 6.0, "seed": 3, "width_px": 640, "density": 4.0, "blackouts": [(2500, 2540)]},
        (2100, 4200),
        ("f63f34352b5f791b", "30cc4d0e08988fac", "27c337eb173714cf"),
    ),
    (
        {"length_m": 30.0, "seed": 11, "width_px": 320},
        (18_000, 19_000),
        ("f67e97baa4a090a1", "b48937fa40299f5b", "8e30c27c25a36ab6"),
    ),
    (
        {"length_m": 8.0, "seed": 2, "width_px": 256, "mm_per_line": 0.5},
        (3000, 4000),
        ("7e5741faaca33ecf", "24a046dc04fefdb6", "f7f60cc745642fd3"),
    ),
    (
        {"length_m": 2.0, "seed": 7},
        (0, 700),
        ("a0e793e029d74663", "eaa2aaebf4878eaa", "8eb80c2f72237649"),
    ),
    (
        {"length_m": 1.0, "seed": 4, "width_px": 400, "clean": True},
        (100, 900),
        ("dc9fa6934495f111", "ac2878215ad33205", "4f53cda18c2baa0c"),
    ),
]


@pytest.mark.parametrize(("arguments", "lines", "pinned"), PINS)
def test_hot_rolled_strip_has_the_bytes_it_was_first_made_with(arguments, lines, pinned):
    """Image, mask and truth: the shipped model learned from such strip, and benchmarks compare over time."""
    strip = SimulatedStrip(**arguments)
    image, mask = strip.block(*lines)
    truth = json.dumps(strip.truth.to_pylist()).encode()

    assert tuple(hashlib.sha256(made).hexdigest()[:16] for made in (image, mask, truth)) == pinned


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


# -- every surface, both lighting modes ---------------------------------------------------------------------

BOTH_LINES = 2400


def both(surface: str, length_m: float = BOTH_LINES / 1000, **changed) -> SimulatedStrip:
    """A busy strip of a surface in both modes with all that a line does to it."""
    arguments = {"seed": 5, "width_px": 288, "density": 4.0, "effects": EFFECTS, **changed}
    return SimulatedStrip(length_m, surface=surface, lighting=LIGHTINGS, **arguments)


@pytest.fixture(scope="module", params=SURFACES)
def any_strip(request) -> tuple[SimulatedStrip, np.ndarray, np.ndarray]:
    """A strip of each surface with bars, drops, weld, ends and dropped lines; its image and its mask."""
    strip = both(request.param, 6.5, width_px=512, seed=9)
    return strip, *strip.block(0, strip.lines)


@pytest.fixture(scope="module")
def wholes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {surface: both(surface).block(0, BOTH_LINES) for surface in SURFACES}


@settings(max_examples=6, deadline=None)
@given(
    surface=st.sampled_from(list(SURFACES)),
    cuts=st.sets(st.integers(1, BOTH_LINES - 1), max_size=4),
    backwards=st.booleans(),
)
def test_the_bytes_of_every_surface_and_mode_do_not_depend_on_the_blocks(wholes, surface, cuts, backwards):
    strip, (image, mask) = both(surface), wholes[surface]
    lines = strip.lines_of(0, BOTH_LINES)
    spans = list(pairwise([0, *sorted(cuts), BOTH_LINES]))
    for y0, y1 in reversed(spans) if backwards else spans:
        made, told = strip.block(y0, y1)

        assert made.shape == (2, y1 - y0, 288)
        assert np.array_equal(made, image[:, y0:y1])
        assert np.array_equal(told, mask[y0:y1])
        assert np.array_equal(strip.mask(y0, y1), told)
        for values, all_values in zip(strip.lines_of(y0, y1), lines, strict=True):
            assert np.array_equal(values, all_values[y0:y1])


@pytest.mark.parametrize("surface", SURFACES)
def test_the_bright_mode_is_the_same_with_a_dark_one_beside_it(surface):
    alone = SimulatedStrip(1.5, seed=3, width_px=256, surface=surface, density=3.0)
    beside = SimulatedStrip(1.5, seed=3, width_px=256, surface=surface, density=3.0, lighting=LIGHTINGS)

    assert np.array_equal(alone.block(0, 1500)[0][0], beside.block(0, 1500)[0][0])
    assert np.array_equal(alone.block(0, 1500)[1], beside.block(0, 1500)[1])
    assert alone.truth == beside.truth


def test_the_truth_of_every_surface_lists_the_parts_of_its_mask(any_strip):
    strip, _, mask = any_strip
    found = Counter()
    for value, name in enumerate(strip.classes, start=1):
        labels, _ = ndimage.label(mask == value, EIGHT)
        areas = np.bincount(labels.ravel())
        for number, (y, x) in enumerate(ndimage.find_objects(labels), start=1):
            found[name, x.start, y.start, x.stop, y.stop, int(areas[number])] += 1
    told = Counter(
        tuple(row[key] for key in ("class", "x0", "y0", "x1", "y1", "area_px")) for row in rows(strip)
    )

    assert told == found
    assert mask.max() <= len(strip.classes)


def test_nothing_is_planted_where_no_strip_is(any_strip):
    """Not beyond edges, head and tail, and not on lines that were dropped: those are black and not valid."""
    strip, image, mask = any_strip
    valid = strip.lines_of(0, strip.lines)[2]
    planted = mask > 0
    on_strip = image.max(axis=0) >= 14

    assert not valid.all()
    assert not image[:, ~valid].any()
    assert not planted[~valid].any()
    assert on_strip[planted].mean() > 0.999
    assert image[:, 0].max() <= 9
    assert image[:, -1].max() <= 9


def test_the_surfaces_hold_more_than_ten_classes_of_defects_and_each_is_planted():
    """Over a few seeds; the drops and the weld are there too, and clean strip has none of any."""
    defects = {name for surface in SURFACES.values() for name in surface.classes}
    for surface in ("cold-rolled", "galvanised"):
        planted = Counter()
        for seed in range(2):
            strip = SimulatedStrip(7.0, seed=seed, width_px=512, surface=surface, density=4.0)
            counts = Counter(strip.truth["class"].to_pylist())
            assert counts["weld"] == 1
            planted += counts
        assert set(planted) == set(strip.classes)
        assert set(MARKERS) < set(strip.classes)
        clean = SimulatedStrip(2.0, seed=0, width_px=256, surface=surface, clean=True)
        assert clean.truth.num_rows == 0
        assert not clean.block(0, 2000)[1].any()

    assert len(defects) >= 18
    assert not defects & set(MARKERS)
    assert defects | set(MARKERS) == set(DARK_FIELDS)
    assert SimulatedStrip(1.0, seed=0).classes == CLASSES


def test_bars_reach_from_edge_to_edge_and_chatter_marks_keep_their_pitch():
    strip = both("cold-rolled", 6.5, width_px=256, seed=9)
    fields: dict[int, list[dict]] = {}
    for row in rows(strip):
        if row["class"] in ("chatter_mark", "roll_stop", "weld"):
            left, right = strip.edges(row["y0"], row["y1"])
            assert row["x0"] == pytest.approx(left.min(), abs=1.5)
            assert row["x1"] == pytest.approx(right.max(), abs=1.5)
        if row["class"] == "chatter_mark":
            fields.setdefault(row["periodic_group"], []).append(row)

    assert fields
    for marks in fields.values():
        pitch = np.diff([row["y0"] for row in marks])
        assert len(marks) >= 6
        assert np.ptp(pitch) <= 1
        assert 16 <= pitch.mean() <= 61


def test_the_weld_lies_near_an_end():
    for seed in range(8):
        strip = SimulatedStrip(12.0, seed=seed, width_px=128, surface="galvanised", density=0.0)
        [weld] = rows(strip, "weld")

        assert min(weld["y_m"], 12.0 - weld["y_m"]) < 3.0


def test_dark_field_rings_a_pit_hides_a_stain_and_lights_one_flank_of_a_dent():
    """Against clean strip, so the contrast is that of the defect alone; bright field shows all three."""

    def change(name: str, surface: str, mode: int) -> np.ndarray:
        arguments = {"seed": 21, "width_px": 640, "surface": surface, "lighting": LIGHTINGS, "effects": ()}
        dirty = SimulatedStrip(5.0, density=4.0, **arguments)
        clean = SimulatedStrip(5.0, clean=True, **arguments)
        row = max(rows(dirty, name), key=lambda row: row["area_px"])
        lines, columns = (row["y0"] - 2, row["y1"] + 2), slice(row["x0"] - 2, row["x1"] + 2)
        one, other = (strip.block(*lines)[0][mode][:, columns].astype(int) for strip in (dirty, clean))
        return one - other

    pit = change("pit", "hot-rolled", 0)
    ring = change("pit", "hot-rolled", 1)
    assert pit[pit.shape[0] // 2, pit.shape[1] // 2] < -20
    assert pit.max() < 10
    assert ring.max() > 40
    assert ring[ring.shape[0] // 2, ring.shape[1] // 2] < 0.5 * ring.max()
    assert change("stain", "cold-rolled", 0).min() < -12
    assert not change("stain", "cold-rolled", 1).any()
    dent = change("roll_mark", "galvanised", 1)
    assert dent.max() > 20
    assert dent.min() < -15


@pytest.mark.parametrize("surface", ["cold-rolled", "galvanised"])
def test_every_defect_of_the_new_surfaces_shows_in_one_of_the_modes(surface):
    """Its strongest change is over two deviations of the fine texture of that mode."""
    arguments = {"length_m": 6.5, "seed": 8, "width_px": 400, "surface": surface, "lighting": LIGHTINGS}
    arguments["effects"] = ("drops",)
    dirty, clean = SimulatedStrip(**arguments, density=3.0), SimulatedStrip(**arguments, clean=True)
    image, mask = dirty.block(0, dirty.lines)
    plain = clean.block(0, clean.lines)[0]
    middle = plain[:, 3000:4000, 60:-60].astype(np.float64)
    sigma = (middle - ndimage.gaussian_filter(middle, (0, 8, 8))).std(axis=(1, 2))

    for row in rows(dirty):
        box = (slice(row["y0"], row["y1"]), slice(row["x0"], row["x1"]))
        inside = mask[box] == dirty.classes.index(row["class"]) + 1
        strongest = [np.abs(image[m][box].astype(int) - plain[m][box])[inside].max() for m in (0, 1)]
        assert max(strongest / sigma) >= 2, row["class"]


def test_speed_rises_from_the_head_and_falls_to_the_tail_and_times_and_counts_only_grow():
    strip = SimulatedStrip(60.0, seed=1, width_px=128, surface="cold-rolled", clean=True)
    encoder, t_ns, _ = strip.lines_of(0, strip.lines)
    metres_per_s = 1e6 * np.diff(encoder) / np.diff(t_ns)  # a line is 1 mm

    assert np.all(np.diff(encoder) > 0)
    assert np.all(np.diff(t_ns) > 0)
    assert np.all(np.diff(metres_per_s[:7000]) > -1e-3)
    assert np.all(np.diff(metres_per_s[-7000:]) < 1e-3)
    assert metres_per_s[30_000] == pytest.approx(8.0, rel=1e-3)
    assert metres_per_s[[0, -1]] == pytest.approx([1.2, 1.2], rel=0.2)
    assert metres_per_s == pytest.approx(strip.travel.speed(0, strip.lines)[1:], rel=0.25)


def test_the_lamps_drift_and_each_for_itself():
    arguments = {"seed": 2, "width_px": 128, "clean": True, "lighting": LIGHTINGS, "blackouts": ()}
    drifting = SimulatedStrip(200.0, effects=("lamp_drift",), **arguments)
    steady = SimulatedStrip(200.0, **arguments)
    shares = []
    for y0 in range(0, 200_000, 20_000):
        one, other = (
            strip.block(y0, y0 + 64)[0][:, :, 40:90].mean(axis=(1, 2)) for strip in (drifting, steady)
        )
        shares.append(one / other)
    bright, dark = np.array(shares).T

    assert bright[0] > 1.02
    assert 0.05 < np.ptp(bright) < 0.3
    assert np.abs(bright - dark).max() > 0.005


def test_an_effect_can_be_asked_for_alone():
    """On hot-rolled strip, that has none by itself; and the others can go without."""
    plain = SimulatedStrip(2.0, seed=3, width_px=256)
    welded = SimulatedStrip(2.0, seed=3, width_px=256, effects=["weld"])
    bare = SimulatedStrip(2.0, seed=3, width_px=256, surface="galvanised", effects=())

    assert plain.effects == ()
    assert welded.classes == (*CLASSES, "weld")
    assert [row["class"] for row in rows(welded)].count("weld") == 1
    assert bare.classes == SURFACES["galvanised"].classes
    assert bare.lines_of(0, 2000)[2].all()
    assert bare.block(0, 1)[0].max() > 60


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

    # Four times the strip; the largest stamp met, drawn in half a megabyte, may be larger on the longer one.
    assert peak_of_reading(24.0) < 1.25 * peak_of_reading(6.0)


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


def test_a_roll_of_another_surface_holds_both_modes_its_classes_and_its_lines(tmp_path):
    strip = SimulatedStrip(3.0, seed=4, width_px=256, surface="galvanised", lighting=LIGHTINGS, density=2.0)
    roll = simulate_roll(tmp_path / "S-3.zarr", strip)

    assert roll.strip.lighting == ("bright", "dark")
    assert np.array_equal(roll.read(0, 3000), strip.block(0, 3000)[0])
    assert np.array_equal(roll.read_label(TRUTH_LABEL, 0, 3000), strip.mask(0, 3000))
    assert roll.label_classes(TRUTH_LABEL) == strip.classes
    lines = roll.read_lines(0, 3000)
    for kept, made in zip((lines.encoder, lines.t_ns, lines.valid), strip.lines_of(0, 3000), strict=True):
        assert np.array_equal(kept, made)


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
        ({"surface": "tin"}, "surface is 'tin'"),
        ({"lighting": ("dark",)}, "lighting is dark"),
        ({"effects": ("rain",)}, "effect 'rain'"),
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
