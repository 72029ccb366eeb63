"""The same steel in two groups is found however it was turned or treated; other steel is not."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rollsight.inspect.leaks import TURNS, UNDONE, Picture, find_leaks, turned
from scipy import ndimage

DATA = Path(os.environ.get("ROLLSIGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def steel(seed, shape=(200, 200)):
    """Rolled steel of its own grain, with stripes, a gradient of light and a scratch at one place of all."""
    rng = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(rng.normal(0, 1, shape), (2, 1))
    stripes = ndimage.gaussian_filter1d(np.random.default_rng(0).normal(0, 1, shape[1]), 1)
    gray = 0.45 + 0.12 * grain + 0.05 * stripes + np.linspace(0, 0.2, shape[1])
    gray[:, 80:84] += 0.3
    return gray.clip(0, 1).astype(np.float32)


def eight_bit(gray):
    return (gray.clip(0, 1) * 255).round().astype(np.uint8)


def jpeg(gray, quality):
    file = io.BytesIO()
    Image.fromarray(eight_bit(gray)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def resized(gray, factor):
    size = (round(gray.shape[1] * factor), round(gray.shape[0] * factor))
    return np.asarray(Image.fromarray(eight_bit(gray)).resize(size), np.float32) / 255


def leaks_of(*grays, groups=None, splits=None):
    groups = groups or [f"g{i}" for i in range(len(grays))]
    splits = splits or ["train"] * len(grays)
    return find_leaks(
        Picture(f"{i}.png", split, group, np.ascontiguousarray(gray, np.float32))
        for i, (gray, group, split) in enumerate(zip(grays, groups, splits, strict=True))
    )


def test_different_steel_with_the_same_stripes_and_scratch_is_no_leak():
    assert leaks_of(*(steel(seed) for seed in range(1, 25))) == []


@pytest.mark.parametrize("side", [8, 24, 50, 90])
def test_small_pictures_of_noise_are_not_alike_by_chance(side):
    rng = np.random.default_rng(side)
    noise = [rng.random((side, side)) for _ in range(25)]

    assert leaks_of(*noise) == []
    assert len(leaks_of(*noise, noise[3])) == 1
    assert len(leaks_of(*noise, noise[3] * 0.8)) == (side >= 20)  # smaller, only the same pixels are sure


def test_the_same_pixels_are_an_exact_leak_that_names_both_sides():
    [leak] = leaks_of(steel(1), steel(2), steel(1), splits=["train", "val", "test"])

    assert (leak.kind, leak.first, leak.second, leak.alike) == ("exact", "0.png", "2.png", 1.0)
    assert leak.line() == "0.png (train, group 'g0') and 2.png (test, group 'g2') are the same pixels"


@pytest.mark.parametrize("turn", range(1, 8))
def test_turned_pixels_are_a_leak_and_the_turn_is_named(turn):
    [leak] = leaks_of(steel(1), steel(2), turned(steel(1), turn))

    assert (leak.kind, leak.first, leak.second) == ("turned", "0.png", "2.png")
    assert leak.turn == TURNS[UNDONE[turn]]  # what lays the second like the first


@pytest.mark.parametrize(
    "treated",
    [
        lambda gray: gray * 1.2 + 0.05,
        lambda gray: gray**1.5,
        lambda gray: jpeg(gray, 60),
        lambda gray: jpeg(np.rot90(gray), 60),
        lambda gray: resized(gray, 0.9),
        lambda gray: gray[5:, 3:],
        lambda gray: np.pad(gray, ((6, 0), (9, 0)), mode="reflect")[:200, :200],
        lambda gray: np.hstack([steel(99)[:, :120], gray[:, 120:]]),
    ],
    ids=["lighter", "darker", "jpeg", "turned and jpeg", "resized", "cropped", "shifted", "pasted over"],
)
def test_treated_steel_is_a_near_leak(treated):
    [leak] = leaks_of(steel(1), *(steel(seed) for seed in range(2, 12)), treated(steel(1)))

    assert (leak.kind, leak.first, leak.second) == ("near", "0.png", "11.png")
    assert f"show the same steel over {leak.alike:.0%}" in leak.line()


def test_alike_pictures_inside_one_group_are_what_groups_are_for():
    assert leaks_of(steel(1), steel(1), jpeg(steel(1), 60), groups=["a", "a", "a"]) == []


def test_many_copies_are_told_once_each_and_not_in_all_pairs():
    assert [leak.second for leak in leaks_of(*([steel(1)] * 5))] == [f"{i}.png" for i in range(1, 5)]


def test_flat_pictures_and_pictures_of_any_size_are_compared():
    flat, tiny, long = np.full((50, 70), 0.3), np.full((1, 1), 0.5), steel(1, (40, 900))

    assert [leak.kind for leak in leaks_of(flat, tiny, long, flat, steel(2))] == ["exact"]
    assert leaks_of() == []
    assert leaks_of(flat) == []


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 7))
def test_a_turn_is_undone_by_its_opposite(height, width, turn):
    image = np.arange(height * width).reshape(height, width)

    assert np.array_equal(turned(turned(image, turn), UNDONE[turn]), image)


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(6)))
def test_the_order_of_the_pictures_changes_no_pair(order):
    grays = [steel(1), steel(2), jpeg(steel(1), 60), np.rot90(steel(3)), steel(4), steel(3)]
    found = find_leaks(
        Picture(str(i), "train", str(i), np.ascontiguousarray(grays[i], np.float32)) for i in order
    )

    assert {frozenset((leak.first, leak.second)) for leak in found} == {
        frozenset(("0", "2")),
        frozenset(("3", "5")),
    }


@pytest.mark.shared
@pytest.mark.skipif(not (DATA / "mt").is_dir(), reason=f"no labelled data at {DATA}")
def test_of_real_tiles_copies_are_found_and_few_others():
    """Six exposures of a piece are one group; MT_Break_071 and free0643 are one piece (seen by eye)."""
    rows = list(csv.DictReader((DATA / "mt" / "manifest.csv").open(encoding="utf-8")))[::6]
    real = [
        Picture(
            row["image"],
            row["split"],
            row["group"],
            np.asarray(Image.open(DATA / "mt" / row["image"]).convert("L"), np.float32) / 255,
        )
        for row in rows
    ]
    made = [
        Picture(f"made {p.name}", "test", f"made {p.group}", jpeg(np.rot90(p.gray), 60)) for p in real[::6]
    ]
    found = {(leak.first, leak.second) for leak in find_leaks([*real, *made])}

    assert {(p.name, f"made {p.name}") for p in real[::6]} <= found
    assert len([pair for pair in found if not pair[1].startswith("made")]) <= 3
