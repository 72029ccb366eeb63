"""Which crops a batch holds, what is pasted onto them, and what they carry along."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.sampling import Sampler, clean_origins, mosaics
from rollsight.inspect.training_data import check_enough, model_classes, read_sources
from scipy import ndimage

TINY = Recipe(batch=4, crop_px=64, mosaic=2)


@pytest.fixture
def source(tmp_path):
    """Makes a source of (image, mask) pairs: files under `tmp_path`."""

    def make(classes, *pairs):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        samples = []
        for i, (image, mask) in enumerate(pairs):
            for name, pixels in ((f"{i}.png", image), (f"{i}_mask.png", mask)):
                Image.fromarray(pixels).save(folder / name)
            samples.append(ImageFile(folder / f"{i}.png", folder / f"{i}_mask.png", "train", str(i)))
        return LabelledData(folder, tuple(classes), tuple(samples))

    return make


def gray(size=(64, 64), value=128):
    return np.full(size, value, dtype=np.uint8)


def marked(*squares, side=256):
    """Image and mask of `side` px with squares (y, x, size, class); a defect's gray is 100 + 20 * class."""
    mask = gray((side, side), 0)
    for y, x, size, value in squares:
        mask[y : y + size, x : x + size] = value
    noise = np.random.default_rng(0).integers(90, 110, mask.shape)
    return np.where(mask > 0, 100 + 20 * mask, noise).astype(np.uint8), mask


def sampler_of(data, recipe=TINY, shares=(), exhaustive=()):
    classes = model_classes(data)
    return Sampler(read_sources(data, classes, recipe, shares, exhaustive), recipe)


def crops_of(data, recipe, steps=8):
    sampler = sampler_of([data], recipe)
    return [crop for step in range(steps) for crop in sampler.crops(step)]


def has_defect(crop):
    return ((crop.mask > 0) & (crop.mask != IGNORE)).any()


# Canvases


@pytest.mark.parametrize(("batch", "mosaic"), [(8, 1), (32, 2)])
def test_a_batch_has_the_share_of_each_source_in_whole_mosaics(source, batch, mosaic):
    first = source(["pit"], (gray(), gray(value=1)))
    second = source(["scratch"], (gray(), gray(value=1)))
    sampler = sampler_of([first, second], Recipe(batch=batch, crop_px=64, mosaic=mosaic), [3.0, 1.0])

    for step in range(3):
        found = sampler.batch(step)
        assert found.images.shape == (8, 1, 64 * mosaic, 64 * mosaic)
        assert found.labels.shape == found.weights.shape == found.images[:, 0].shape
        assert found.labelled.tolist() == [[True, True, False]] * 6 + [[True, False, True]] * 2
        assert [int(t.unique()) for t in found.labels] == [1] * 6 + [2] * 2
        assert found.regions is None


def test_a_mosaic_lays_its_crops_out_row_by_row():
    crops = (
        torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 5) + torch.tensor([0, 100, 200])[:, None, None]
    )

    canvases = mosaics(crops, 2)

    assert canvases.shape == (2, 3, 4, 10)
    assert canvases[:, :, ::2, ::5].reshape(2, 3, 4)[:, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(canvases[0, 2, 2:, :5], crops[2, 2])
    assert torch.equal(mosaics(crops, 1), crops)


def test_image_mask_and_weight_of_a_crop_are_of_the_same_place(source):
    crops = crops_of(source("abcd", *[(gray(value=50 * v), gray(value=v)) for v in (1, 2, 3, 4)]), TINY)

    assert len({int(crop.mask[0, 0]) for crop in crops}) == 4
    for crop in crops:
        assert np.allclose(crop.image[0], 50 * crop.mask / 255, atol=1e-3)
        assert (crop.weight == 1).all()


def test_a_batch_is_the_same_whenever_it_is_drawn(source):
    data = source(["pit"], marked((20, 30, 9, 1), (120, 130, 40, 1)))
    recipe = replace(TINY, copy_paste=0.5, small_crops=0.5, instance="blob")
    first, second = (sampler_of([data], recipe) for _ in range(2))
    second.batch(0)
    torch.rand(3)

    for ours, theirs in zip(
        *[(b.images, b.labels, b.weights, b.regions, b.areas) for b in (first.batch(7), second.batch(7))],
        strict=True,
    ):
        assert torch.equal(ours, theirs)


# Classes, padding, weights


def test_the_classes_of_a_model_are_the_union_in_order(source):
    first = source(["pit", "scale"], (gray(), gray(value=0)))
    second = source(["scratch", "pit"], (gray(), gray(value=2)))
    classes = model_classes([first, second])

    [_, other] = read_sources([first, second], classes, TINY, (), ())

    assert classes == ("pit", "scale", "scratch")
    assert np.unique(other.images[0].mask).tolist() == [1]  # value 2 of the second source is its pit
    assert other.labelled.tolist() == [True, True, False, True]


def test_an_exhaustive_source_says_that_the_classes_of_the_others_are_absent(source):
    first = source(["pit"], (gray(), gray(value=0)))
    second = source(["scratch"], (gray(), gray(value=1)))

    exhaustive, other = read_sources([first, second], ("pit", "scratch"), TINY, (), [True, False])

    assert exhaustive.labelled.tolist() == [True, True, True]
    assert other.labelled.tolist() == [True, False, True]


def test_a_component_cut_by_a_crop_keeps_the_weight_and_the_area_of_the_whole(source):
    sampler = sampler_of([source(["pit"], marked((8, 8, 240, 1)))], replace(TINY, instance="blob"))

    for step in range(6):
        batch = sampler.batch(step)
        assert (batch.weights[batch.labels == 1] == 1).all()  # 64 x 64 px alone would weigh sqrt(240² / 64²)
        assert (batch.areas[batch.regions[batch.labels == 1]] == 240**2).all()


def test_an_image_smaller_than_the_crop_is_reflected_and_the_padding_ignored(source):
    image = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30).astype(np.uint8)
    [found] = read_sources([source(["pit"], (image, gray((40, 30), 1)))], ("pit",), TINY, (), ())
    [padded] = found.images

    assert padded.image.shape == (1, 64, 64)
    assert (padded.mask[:40, :30] == 1).all()
    assert (padded.mask[40:] == IGNORE).all()
    assert (padded.mask[:, 30:] == IGNORE).all()
    assert np.array_equal(padded.image[0, 40, :30], padded.image[0, 38, :30])


# Components


def test_an_image_that_lies_in_its_padding_is_reflected_all_around_as_it_is_judged(source):
    image, mask = marked((0, 60, 8, 1), side=100)
    data = source(("pit",), (image, mask))

    [read] = read_sources([data], ("pit",), replace(TINY, padded=True), [], [])

    [found], [component] = read.images, read.components
    assert found.mask.shape == (128, 128)
    assert component.box == (slice(14, 22), slice(74, 82))
    assert (found.mask[component.box] == 1).all()
    assert (found.mask[:14] == IGNORE).all() and (found.mask[114:] == IGNORE).all()
    np.testing.assert_array_equal(found.mask[14:114, 14:114], mask)
    np.testing.assert_array_equal(found.image[0, 14:0:-1], found.image[0, 14:28])


def test_the_crops_of_a_batch_have_components_of_their_own(source):
    """Two crops of one image may show the same pit: in a batch it is two components, each with its area."""
    sampler = sampler_of(
        [source(["pit"], marked((10, 10, 20, 1), (120, 120, 9, 1), side=160))],
        replace(TINY, batch=16, instance="cc_dice"),
    )

    for step in range(3):
        batch = sampler.batch(step)
        defect = batch.labels == 1
        assert set(batch.areas[batch.regions[defect]].tolist()) <= {400.0, 81.0}
        quarters = batch.regions.unflatten(1, (2, 64)).unflatten(3, (2, 64)).movedim(3, 2).flatten(0, 2)
        seen = [set(quarter.unique().tolist()) - {0} for quarter in quarters]
        assert sum(map(len, seen)) == len(set.union(*seen))


# Which crops


def test_clean_crops_have_no_defect_and_come_in_their_share(source):
    data = source(["pit"], marked((8, 8, 150, 1)), marked((0, 0, 256, 1)))

    crops = crops_of(data, replace(TINY, clean_share=1.0))
    some = crops_of(data, replace(TINY, batch=16, clean_share=0.5), steps=20)

    assert not any(map(has_defect, crops))
    assert len({crop.image.tobytes() for crop in crops}) > 4
    assert 0.4 < np.mean([not has_defect(crop) for crop in some]) < 0.65  # some come by chance


def test_clean_origins_are_those_whose_window_has_no_defect():
    mask = (
        np.random.default_rng(0).choice([0, 1, IGNORE], p=[0.97, 0.01, 0.02], size=(20, 23)).astype(np.uint8)
    )

    found = clean_origins(mask, 6)

    assert found.shape == (15, 18)
    assert 0 < found.sum() < found.size
    for y, x in np.ndindex(found.shape):
        assert found[y, x] == (1 not in mask[y : y + 6, x : x + 6])


def test_small_crops_are_around_a_component_under_256_px(source):
    data = source(["pit"], marked((8, 8, 150, 1), (230, 20, 4, 1)))

    for crop in crops_of(data, replace(TINY, small_crops=1.0)):
        y, x = ndimage.center_of_mass(crop.weight == crop.weight.max())
        assert crop.weight.max() > 1
        assert 14 <= x <= 50  # a pixel of it in the middle half
        assert 14 <= y <= 64  # but no crop leaves the image


def test_balanced_crops_show_every_class_alike(source):
    many = [(y, x, 6, 1) for y in range(0, 240, 20) for x in range(0, 200, 20)]
    data = source(["pit", "scratch"], marked(*many, (120, 230, 6, 2)))

    crops = crops_of(data, replace(TINY, batch=16, balanced=1.0), steps=10)
    plain = crops_of(data, replace(TINY, batch=16), steps=10)

    assert np.mean([(crop.mask == 2).any() for crop in crops]) > 0.4
    assert np.mean([(crop.mask == 2).any() for crop in plain]) < 0.25


def test_a_share_that_another_source_cannot_give_is_drawn_anywhere(source):
    full, empty = source(["pit"], marked((0, 0, 256, 1))), source(["pit"], marked())
    recipe = replace(TINY, batch=8, clean_share=1.0)

    crops = sampler_of([full, empty], recipe).crops(0)

    assert [has_defect(crop) for crop in crops] == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("option", "squares", "said"),
    [
        ("clean_share", [(0, 0, 256, 1)], "no place for a crop of 64 px without a defect"),
        ("small_crops", [(0, 0, 16, 1)], "no component under 256 px"),
        ("balanced", [], "no component"),
        ("copy_paste", [(10, 10, 40, 1)], "no component that fits into half of a crop of 64 px"),
        ("modality_dropout", [(10, 10, 40, 1)], "one lighting mode"),
    ],
)
def test_what_the_data_does_not_have_is_refused(source, option, squares, said):
    with pytest.raises(UserError, match=said) as error:
        sampler_of([source(["pit"], marked(*squares))], replace(TINY, **{option: 0.5}))
    assert error.value.exit_code == USAGE


# Copy-paste


def test_a_pasted_component_brings_its_pixels_class_weight_and_region(source):
    """The clean image gets the pit of the other one: whole, in its own gray against the steel around it."""
    pit = marked((100, 100, 5, 2), (10, 10, 60, 1))
    data = source(["patch", "pit"], pit, marked())
    recipe = replace(TINY, copy_paste=1.0, clean_share=1.0, instance="cc_dice")

    crops = crops_of(data, recipe)

    assert all((crop.mask == 2).sum() == 25 for crop in crops)
    assert len({np.argwhere(crop.mask == 2)[0].tobytes() for crop in crops}) > 8
    for crop in crops:
        inside = crop.mask == 2
        near = ndimage.distance_transform_edt(~inside)
        assert crop.image[0][inside].mean() == pytest.approx(140 / 255, abs=0.03)
        assert crop.image[0][near > 5].max() < 0.44  # nothing else has come along
        assert (crop.weight[near <= 5] == crop.weight.max()).all()
        assert crop.weight.max() > 1
        assert len(crop.areas) == crop.regions[inside].max() + 1
        assert (crop.areas[crop.regions[inside]] == 25).all()


def test_a_component_is_pasted_on_clean_steel_only(source):
    """Neither a defect nor an ignored pixel is within 5 px of it."""
    blocks = np.random.default_rng(1).choice([0, 1, IGNORE], p=[0.7, 0.15, 0.15], size=(8, 8))
    mask = np.kron(blocks, np.ones((32, 32))).astype(np.uint8)
    data = source(["pit", "dent"], (gray(mask.shape, 100), mask), marked((100, 100, 6, 2)))
    recipe = replace(TINY, batch=16, copy_paste=1.0)
    crops = crops_of(data, recipe, steps=10)

    pasted = [crop for crop in crops if 2 in crop.mask and (1 in crop.mask or IGNORE in crop.mask)]
    for crop in pasted:
        new = ndimage.distance_transform_edt(crop.mask != 2) <= 5
        assert set(np.unique(crop.mask[new])) <= {0, 2}
    assert len(pasted) > 20


def test_a_region_goes_to_the_pasted_component_where_it_is_nearer(source):
    data = source(["pit"], marked((30, 30, 8, 1), side=64))
    recipe = replace(TINY, copy_paste=1.0, instance="blob")

    for crop in crops_of(data, recipe):
        ids, count = ndimage.label(crop.mask == 1)
        if count == 1:
            continue  # no place was found
        to_each = np.stack([ndimage.distance_transform_edt(ids != i) for i in (1, 2)])
        apart = to_each[0] != to_each[1]
        assert len(np.unique(crop.regions)) == 2
        for i in (1, 2):
            assert len(np.unique(crop.regions[apart & (to_each.argmin(axis=0) == i - 1)])) == 1


# Lighting modes


def test_modality_dropout_leaves_out_whole_modes_and_one_stays(source):
    data = source(["pit"], marked((10, 10, 9, 1)))
    recipe = replace(TINY, modality_dropout=0.6)
    [read] = read_sources([data], ("pit",), recipe, (), ())
    three = replace(read, images=[replace(i, image=np.stack([i.image[0]] * 3)) for i in read.images])
    sampler = Sampler([three], recipe)

    counts = [sampler.batch(step).images.shape[1] for step in range(30)]

    assert set(counts) == {1, 2, 3}
    plain = Sampler([three], replace(recipe, modality_dropout=0.0))
    assert plain.batch(0).images.shape[1] == 3
    assert torch.equal(plain.batch(4).labels, sampler.batch(4).labels)  # the crops are the same


# Enough to learn from


def test_a_class_with_too_few_components_is_refused_by_name_and_count(source):
    data = source(["pit", "dent"], marked(*[(y, 10, 3, 1) for y in range(0, 240, 8)], (100, 100, 9, 2)))
    sources = read_sources([data], ("pit", "dent"), TINY, (), ())

    with pytest.raises(UserError, match=r"class 'dent': 1 components to learn from, .* needs 30.*--init"):
        check_enough(sources, ("pit", "dent"), 30)
    check_enough(sources, ("pit",), 30)
    check_enough(sources, ("pit", "dent"), 1)
