"""Marks and how they are varied: direction kept, never under 2 px, at home where their scene ended."""

from dataclasses import replace

import numpy as np
import pytest
from rollsight.inspect.augment import RING
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import IGNORE
from rollsight.synth.degraded import contrast_at
from rollsight.synth.mask_bank import BEND, TILT, Deformation, MaskBank, deform, dressed, marks_of, narrow
from rollsight.synth.patches import Scene
from rollsight.synth.placing import Density, by_gradients, find_place, pasted
from scipy import ndimage

CLASSES = ("pit", "scratch")
STILL = Deformation(False, False, 1.0, 1.0, 0.0, 0.0, 0)


def scene(seed: int = 0) -> Scene:
    """Gray steel of 96 x 96 px: a dark scratch from the top to line 60, a bright pit, one bright px alone."""
    image = np.random.default_rng(seed).normal(0.4, 0.02, (96, 96)).astype(np.float32)
    mask = np.zeros((96, 96), dtype=np.uint8)
    mask[:60, 30:34], mask[70:79, 60:69], mask[10, 80] = 2, 1, 1
    image[mask == 2] -= 0.2
    image[mask == 1] += 0.3
    return Scene(image, mask, f"{seed}.png", f"piece-{seed}")


@pytest.fixture
def bank() -> MaskBank:
    return MaskBank(marks_of([scene(0), scene(1)], CLASSES), "scratch")


def test_marks_carry_where_they_come_from_and_one_px_is_none():
    scratch, pit = sorted(marks_of([scene()], CLASSES), key=lambda mark: mark.defect_class)[::-1]

    assert (scratch.defect_class, pit.defect_class) == CLASSES[::-1]
    assert scratch.cut == (True, False, False, False) and pit.cut == (False,) * 4
    assert pit.origin == (64, 54) and pit.inside.sum() == 81 and pit.source == "0.png"


def test_a_mark_is_cut_off_where_the_px_of_another_scene_begin():
    """The last tile of a roll holds px of the one before it, ignored: what both see goes on there."""
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[:, :20] = IGNORE
    mask[10:30, 20:30] = 1
    tile = Scene(np.full(mask.shape, 0.5, np.float32), mask, "coil-1/0-40", "coil-1", seen=(0, 20))

    [mark] = marks_of([tile], ["pit"])

    assert mark.cut == (False, False, True, False)


def test_a_class_of_one_px_defects_is_one_clear_line():
    lone = scene()
    lone.mask[:] = 0
    lone.mask[10, 80] = 1

    with pytest.raises(UserError, match="class 'pit': no component of 2 px or wider in the train split"):
        MaskBank(marks_of([lone], CLASSES), "pit")


def test_elastic_displacement_alone_stays_under_a_pixel(bank):
    mark = bank.marks[0]

    same = deform(mark, STILL)

    changed = same.inside != mark.inside
    assert 0 < changed.sum() < 0.25 * mark.inside.sum()
    assert not (changed & (ndimage.distance_transform_cdt(mark.inside) > 1)).any()
    assert mark.cut == same.cut


def test_deformations_keep_the_direction_and_2_px(bank):
    rng = np.random.default_rng(3)
    for _ in range(30):
        number, how = bank.draw(rng)
        mark = bank.deformed(number, how)
        ys, xs = np.nonzero(mark.inside)

        assert not narrow(mark.inside)
        assert np.ptp(ys) > 3 * np.ptp(xs)  # a scratch along the strip stays one
        assert mark.cut[0] != mark.cut[1] and (mark.cut[1] == how.flip_y)
        assert mark.inside[0 if mark.cut[0] else -1].any()  # and still ends at the border


def test_variety_goes_farther_in_size_proportions_and_contrast_and_not_in_direction(bank):
    def drawn(variety: float) -> list[Deformation]:
        rng = np.random.default_rng(3)
        return [bank.draw(rng, variety=variety)[1] for _ in range(200)]

    less, usual, more = drawn(0.5), drawn(1.0), drawn(2.0)

    def spread(of: list[Deformation]) -> float:
        return float(np.std([np.log(one.scale_y / one.scale_x) for one in of]))

    assert spread(less) < 0.6 * spread(usual) < 0.4 * spread(more)
    assert {one.gain for one in less + usual} == {1.0}
    gains = np.log([one.gain for one in more])
    assert 0.2 < gains.std() < 0.4 and np.abs(gains).max() <= 0.71
    assert max(abs(one.tilt) for one in more) <= TILT and max(abs(one.bend) for one in more) <= BEND


def test_gain_multiplies_the_contrast_and_fades_around_the_mark(bank):
    [usual, half] = [bank.deformed(0, replace(STILL, gain=gain)) for gain in (1.0, 0.5)]

    np.testing.assert_array_equal(half.inside, usual.inside)
    assert contrast_at(half.image, half.inside) == pytest.approx(
        contrast_at(usual.image, usual.inside) / 2, abs=0.01
    )
    changed = half.image != usual.image
    assert not changed[ndimage.distance_transform_edt(~usual.inside) > RING].any()


def test_the_same_deformation_is_the_same_mark(bank):
    number, how = bank.draw(np.random.default_rng(1))

    first, second = bank.deformed(number, how), bank.deformed(number, how)

    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.inside, second.inside)


def test_another_outline_is_filled_with_the_marks_own_gray(bank):
    mark = bank.marks[0]
    wider = np.zeros_like(mark.inside)
    wider[:60, 3:13] = True

    new = dressed(mark, wider)

    np.testing.assert_array_equal(new.inside, wider & mark.own)
    assert abs(new.image[new.inside].mean() - 0.2) < 0.02


def test_a_mark_is_placed_free_of_others_and_at_the_border_that_cut_it(bank):
    taken = np.zeros((128, 128), dtype=bool)
    taken[:, :64] = True
    rng = np.random.default_rng(0)
    places = [find_place(bank.marks[0], taken, rng) for _ in range(50)]

    assert all(place is None or (place[0] == 0 and place[1] >= 64 + 1 - 6) for place in places)
    assert sum(place is not None for place in places) > 40
    assert find_place(bank.marks[0], np.ones((128, 128), dtype=bool), rng) is None


@pytest.mark.parametrize(
    ("density", "near"),
    [(Density("edges"), (0.0, 1.0)), (Density("lane", lane=0.25), (0.25,)), (Density(), (0.5,))],
)
def test_density_over_the_width(density, near, bank):
    rng = np.random.default_rng(0)
    places = [find_place(bank.marks[0], np.zeros((100, 1000), dtype=bool), rng, density) for _ in range(60)]
    across = np.array([place[1] + 8 for place in places]) / 1000
    far = np.abs(across[:, None] - np.array(near)).min(axis=1)

    assert np.median(far) < (0.1 if density.kind != "anywhere" else 0.4)
    assert (far > 0.2).mean() > 0.2 if density.kind == "anywhere" else True


def test_periodic_marks_lie_one_pitch_apart():
    pit = MaskBank(marks_of([scene()], CLASSES), "pit").marks[0]
    rng = np.random.default_rng(0)
    density = Density("periodic", lane=0.5, pitch_px=70)
    for y0 in (0, 33, 128):
        y, _ = find_place(pit, np.zeros((256, 256), dtype=bool), rng, density, (y0, 0, 256))
        assert (y0 + y) % 70 == 0


@pytest.mark.parametrize("poisson", [False, True])
def test_a_paste_changes_the_mark_and_its_ring_only_and_keeps_its_contrast(bank, poisson):
    steel = np.random.default_rng(9).normal(0.7, 0.02, (128, 128)).astype(np.float32)
    mark = bank.marks[0]

    image, inside = pasted(steel, mark, (0, 40), poisson=poisson)

    far = np.ones_like(inside)
    far[: 60 + 6, 40 : 40 + mark.inside.shape[1]] = False
    np.testing.assert_array_equal(image[far], steel[far])
    assert inside.sum() == mark.inside.sum()
    assert 0.7 - image[inside].mean() == pytest.approx(0.2, abs=0.04)


def test_gradients_of_a_constant_leave_the_steel_as_it_was():
    steel = np.tile(np.linspace(0.2, 0.8, 40, dtype=np.float32), (40, 1))
    inside = np.zeros((40, 40), dtype=bool)
    inside[15:25, 15:25] = True

    drawn = by_gradients(steel, np.full_like(steel, 0.1), np.ones_like(inside), inside)

    np.testing.assert_allclose(drawn, steel, atol=1e-5)  # a linear slope is harmonic


def test_an_outline_is_taken_from_a_mark_of_the_same_proportions_only():
    wide = scene(2)
    wide.mask[:] = 0
    wide.mask[40:44, 10:70] = 2  # a scratch across the strip
    bank = MaskBank(marks_of([scene(0), scene(1), wide], CLASSES), "scratch")

    partners = {number: set() for number in range(3)}
    for seed in range(200):
        number, how = bank.draw(np.random.default_rng(seed))
        partners[number].add(how.partner)

    assert partners == {0: {-1, 1}, 1: {-1, 0}, 2: {-1}}
