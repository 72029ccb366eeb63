"""Outlines that no label has: whole, wide enough, never turned, the same again from their seed."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.labels import open_labels
from rollsight.synth.backgrounds import Backgrounds
from rollsight.synth.compose import Order, make_data, make_sample
from rollsight.synth.data_card import open_provenance
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.generator import OUTLINES, Generator, open_generator
from rollsight.synth.made_outlines import learn_outlines
from rollsight.synth.mask_bank import Mark, MaskBank, marks_of, narrow
from rollsight.synth.mask_gan import OutlineRecipe, fit_outlines, in_box, on_grid
from rollsight.synth.patches import Scene
from scipy import ndimage

FREE = (False,) * 4
QUICK = OutlineRecipe(steps=60, batch=8)


def streak(seed: int) -> Scene:
    """Gray steel of 80 x 96 px with one dark streak along the strip that narrows towards its ends."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0.5, 0.02, (80, 96)).astype(np.float32)
    y, x = np.mgrid[0:80, 0:96]
    long, wide = rng.uniform(16, 30), rng.uniform(3, 6)
    mask = (((y - 40) / long) ** 2 + ((x - 24) / wide) ** 2 < 1).astype(np.uint8)
    image[mask == 1] -= 0.2
    return Scene(image, mask, f"{seed}.png", f"piece-{seed}")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [streak(seed) for seed in range(60)]


@pytest.fixture(scope="module")
def marks(scenes) -> list[Mark]:
    return marks_of(scenes, ("streak",))


@pytest.fixture(scope="module")
def learned(marks):
    outlines, told = learn_outlines(marks, QUICK)
    assert outlines is not None
    return outlines, told


@pytest.fixture(scope="module")
def bank(marks, learned) -> MaskBank:
    return MaskBank(marks, "streak", learned[0])


def test_with_fewer_than_50_marks_there_is_none_and_why_is_said(marks):
    assert learn_outlines(marks[:49], QUICK) == (
        None,
        {"marks": 49, "why": "49 marks, outlines are learned from 50 on"},
    )
    assert learn_outlines(marks, OutlineRecipe(steps=0)) == (None, {"marks": 60, "why": "not asked for"})


def test_the_card_holds_made_outlines_beside_those_that_were_held_back(learned):
    told = learned[1]

    assert (told["marks"], told["held_marks"]) == (60, 10)  # 50 are left to learn from
    assert 0 <= told["refused"] < 0.5
    # Trained or not, an outline of a box covers a share of it, and is like some learned one but is none.
    assert abs(told["made"]["fill"][1] - told["held"]["fill"][1]) < 0.25
    assert 0.5 < told["made"]["nearest"] < 1 and told["held"]["nearest"] > 0.7


def test_groups_are_held_back_only_as_far_as_enough_marks_are_left(marks):
    by_coil = [replace(mark, group="one" if i < 48 else f"{i}") for i, mark in enumerate(marks)]

    held = [learn_outlines(by_coil, replace(QUICK, steps=1, seed=seed))[1]["held_marks"] for seed in range(8)]

    assert set(held) <= {0, 1, 2, 3} and max(held) > 0  # of coil one, without which 12 would teach, never


def test_an_outline_is_the_same_again_from_its_seed_whatever_torch_did_before(learned):
    outlines = learned[0]
    first = outlines(7, (50, 9), FREE)
    torch.manual_seed(123)
    torch.randn(100)

    np.testing.assert_array_equal(outlines(7, (50, 9), FREE), first)
    assert np.abs(outlines(8, (50, 9), FREE) - first).max() > 0.1


def test_two_fits_end_with_the_same_bits_and_another_seed_with_others(marks):
    insides, cuts = [mark.inside[mark.box] for mark in marks], [mark.cut for mark in marks]
    few = replace(QUICK, steps=4)
    first, second, other = (
        fit_outlines(insides, cuts, recipe).net.state_dict() for recipe in (few, few, replace(few, seed=1))
    )

    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_loss_that_is_no_number_is_one_line(marks):
    insides, cuts = [mark.inside[mark.box] for mark in marks], [mark.cut for mark in marks]

    with pytest.raises(UserError, match=r"outlines, step \d+: a loss is (nan|inf)"):
        fit_outlines(insides, cuts, replace(QUICK, learning_rate=1e30))


def test_an_outline_that_is_empty_small_or_in_pieces_is_none_and_others_keep_their_share_of_the_box():
    grid = np.zeros((32, 32), dtype=np.float32)
    assert in_box(grid, (20, 10)) is None
    grid[:, :16] = 1
    assert in_box(grid, (20, 10)) is None  # half of the box's width
    grid[24:] = 1
    whole = in_box(grid, (20, 10))
    assert whole is not None and whole.shape == (20, 10) and whole.sum() == 20 * 5 + 5 * 5
    grid[20:24] = 0
    assert in_box(grid, (20, 10)) is None  # two pieces


@pytest.mark.parametrize("size", [(3, 3), (5, 80), (64, 32), (200, 7)])
def test_the_grid_keeps_the_share_that_is_inside_and_its_sides(size):
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    inside = y * size[1] <= x * size[0]  # a triangle along the diagonal

    grid = on_grid(inside)

    assert grid.shape == (32, 32)
    assert grid.mean() == pytest.approx(inside.mean(), abs=0.03)
    assert grid[0, -1] > 0.9 and grid[-1, 0] < 0.1


def test_marks_in_made_outlines_are_whole_wide_enough_and_keep_the_direction(bank):
    rng = np.random.default_rng(0)
    drawn = [bank.draw(rng, "gan") for _ in range(40)]
    made = [(number, how) for number, how in drawn if how.outline >= 0]

    assert len(made) > 20
    for number, how in made:
        mark = bank.deformed(number, how)
        ys, xs = np.nonzero(mark.inside)
        assert not narrow(mark.inside)
        assert ndimage.label(mark.inside, np.ones((3, 3)))[1] == 1
        assert np.ptp(ys) > 1.5 * np.ptp(xs)  # a streak along the strip stays one
        assert abs(mark.image[mark.inside].mean() - 0.3) < 0.05  # and as dark as it was
    areas = [np.log(bank.deformed(number, how).inside.sum() ** 0.5) for number, how in made]
    assert abs(np.mean(areas) - bank.log_side[0]) < 0.35  # of the class's own sizes


def test_bank_outlines_are_drawn_as_if_there_was_no_mask_gan(bank, marks):
    alone = MaskBank(marks, "streak")
    for seed in range(5):
        expected = alone.draw(np.random.default_rng(seed))
        assert bank.draw(np.random.default_rng(seed), "bank") == expected
        assert alone.draw(np.random.default_rng(seed), "both") == expected
    drawn = [bank.draw(np.random.default_rng(seed), "both")[1].outline >= 0 for seed in range(60)]
    assert 10 < sum(drawn) < 45


@pytest.fixture(scope="module")
def generator(scenes, small_fit, tmp_path_factory) -> Generator:
    """A generator with a mask GAN, both hardly trained."""
    root = tmp_path_factory.mktemp("streaks")
    rows = [("image", "mask", "split", "group")]
    for scene in scenes:
        Image.fromarray((scene.image.clip(0, 1) * 255).astype(np.uint8)).save(root / scene.name)
        Image.fromarray(scene.mask).save(root / f"mask-{scene.name}")
        rows.append((scene.name, f"mask-{scene.name}", "train", scene.group))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (root / "classes.json").write_text('["streak"]')
    found = fit_data(open_labels(root), "streak")
    made = fit_generator(found, root / "g", replace(small_fit, steps=1), outlines=QUICK)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def steel(scenes) -> Backgrounds:
    clean = [replace(scene, mask=np.zeros_like(scene.mask)) for scene in scenes[:10]]
    return Backgrounds(clean, [], ("streak",))


def test_a_sample_tells_its_outline_net_and_seed_and_is_made_again(generator, steel, tmp_path):
    order = Order(seed=5, outlines="gan", most_marks=1)
    _, card = make_data(generator, steel, order, 4, tmp_path / "made")

    lines = open_provenance(tmp_path / "made")
    for line in reversed(lines):
        assert make_sample(generator, steel, order, line["index"]).provenance["sha256"] == line["sha256"]
        for mark in line["marks"]:
            assert mark["outline_net"] == generator.card.outlines["weights"]
            assert mark["deformation"]["outline"] >= 0
    assert card["order"]["outlines"] == "gan" and card["outlines"]["made"] == card["marks"] == 4
    _, plain = make_data(generator, steel, replace(order, outlines="bank"), 2, tmp_path / "plain")
    assert plain["outlines"] == {"made": 0, "refused": 0}


def test_the_outline_file_is_small_belongs_to_its_card_and_decides_the_hash(generator, tmp_path):
    folder = shutil.copytree(generator.folder, tmp_path / "g")
    path = folder / OUTLINES

    assert path.stat().st_size < 0.5e6
    again = open_generator(folder)
    assert again.hash == generator.hash and again.bank.outlines is not None
    without = replace(again, bank=MaskBank(again.bank.marks, "streak"))
    assert without.hash != again.hash
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"outlines\.safetensors: missing or not the file its card names"):
        open_generator(folder)


def test_outlines_of_a_mask_gan_that_is_not_there_are_one_line(generator, steel):
    without = replace(generator, bank=MaskBank(generator.bank.marks[:9], "streak"))

    with pytest.raises(UserError, match=r"has none, 9 marks .* give --outlines bank or both"):
        make_sample(without, steel, Order(outlines="gan"), 0)
    assert make_sample(without, steel, Order(outlines="both"), 0).provenance["marks"]
    with pytest.raises(UserError, match="outlines 'net': it must be one of both, bank, gan"):
        Order(outlines="net")
