"""Starts that an editor has to make a defect of: of the mark only outline and a drawn contrast are left."""

import numpy as np
import pytest
from rollsight.synth.degraded import CONTRAST, VISIBLE, contrast_at, degraded, surroundings


def canvas(contrast: float, texture: float = 0.06, spread: float = 0.02):
    """Noisy steel of gray 0.5, a mark of 20 x 5 px with its own texture pasted onto it, the mark's px."""
    rng = np.random.default_rng(0)
    steel = rng.normal(0.5, spread, (64, 64)).astype(np.float32)
    inside = np.zeros((64, 64), dtype=bool)
    inside[20:40, 30:35] = True
    pasted = steel.copy()
    pasted[inside] = 0.5 + contrast + rng.normal(0, texture, inside.sum())
    return steel, pasted, inside


@pytest.mark.parametrize("contrast", [-0.2, 0.15])
def test_contrast_is_drawn_near_the_pastes_with_its_sign_and_what_is_told_is_there(contrast):
    steel, pasted, inside = canvas(contrast)
    own = contrast_at(pasted, inside)
    drawn = [degraded(steel, pasted, inside, np.random.default_rng(seed)) for seed in range(60)]

    ratios = [contrast_at(image, inside) / own for image, _ in drawn]
    assert [told["contrast"] for _, told in drawn] == pytest.approx(np.multiply(ratios, own), abs=1e-3)
    assert [told["of_paste"] for _, told in drawn] == pytest.approx(ratios, abs=0.01)
    assert CONTRAST[0] - 0.01 <= min(ratios) < 0.65 and 1.05 < max(ratios) <= CONTRAST[1] + 0.01
    assert {told["kind"] for _, told in drawn} == {"low-pass", "plain"}


def test_the_steel_beyond_2_px_stays_and_the_texture_of_the_mark_is_gone():
    steel, pasted, inside = canvas(-0.2)
    ring = surroundings(inside)
    inner = inside & np.pad(inside[2:-2, 2:-2] & inside[4:, 2:-2] & inside[:-4, 2:-2], 2)
    inner &= np.roll(inside, 2, axis=1) & np.roll(inside, -2, axis=1)

    for seed in range(10):
        image, told = degraded(steel, pasted, inside, np.random.default_rng(seed))
        np.testing.assert_array_equal(image[ring], steel[ring])
        assert (image[inner] - image[inner].mean()).std() < 0.3 * pasted[inner].std(), told


def test_a_faint_mark_stays_visible_and_one_told_by_its_texture_is_left_alone():
    steel, pasted, inside = canvas(-0.1, spread=0.1)
    floor = VISIBLE * steel[surroundings(inside)].std()
    drawn = [degraded(steel, pasted, inside, np.random.default_rng(seed)) for seed in range(40)]
    least = min(abs(told["contrast"]) for _, told in drawn)

    assert least == pytest.approx(floor, rel=0.02)
    assert degraded(*canvas(0.0, spread=0.1), np.random.default_rng(0)) is None
