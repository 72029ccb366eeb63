"""Image, mask and weight move together; a small component weighs what its whole area says."""

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rollsight.inspect.augment import (
    LIGHT_GRADIENT,
    RING,
    Augmentations,
    ElasticTransform,
    augment,
    augmentations,
    component_areas,
    component_planes,
    reference_area,
    to_batch,
)
from rollsight.inspect.labels import IGNORE
from scipy import ndimage

SIDE = 128
GRAYS = {0: 0.3, 1: 0.42, 2: 0.54, 3: 0.66, IGNORE: 0.16}


@pytest.fixture(scope="module")
def batch():
    """Eight class maps of soft blobs, and the image that is the mask: one gray per class."""
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(8):
        height = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 10)
        masks.append(np.digitize(height / height.std(), [-0.7, 0.0, 0.9]).astype(np.uint8))
        masks[-1][48:80, 48:80] = IGNORE
    lut = np.zeros(256, dtype=np.float32)
    lut[list(GRAYS)] = list(GRAYS.values())
    images, labels = to_batch([lut[mask][None] for mask in masks], masks)
    weight = torch.zeros(labels.shape)
    weight[labels == 1], weight[labels == 2] = 8.0, 1.5
    return images, labels, weight


def draw(batch, seed, **options):
    torch.manual_seed(seed)
    return augment(augmentations(**options), *batch)


def misplaced(image, mask):
    """The share of px inside a class whose gray is not the gray of that class: image (H, W), mask (H, W)."""
    inner = ndimage.maximum_filter(mask, 7) == ndimage.minimum_filter(mask, 7)
    inner[:4] = inner[-4:] = inner[:, :4] = inner[:, -4:] = False  # reflection is not the same to the px
    wrong = np.zeros_like(inner)
    for value in np.unique(mask[inner]):
        inside = inner & (mask == value)
        wrong |= inside & (abs(image - np.median(image[inside])) > 0.01)
    return wrong.sum() / inner.sum()


# The pipeline


def test_image_and_mask_stay_aligned_through_the_whole_pipeline(batch):
    shares = []
    for seed in range(12):
        image, labels, _ = draw(batch, seed)
        shares += [misplaced(image[i, 0].numpy(), labels[i].numpy()) for i in range(len(labels))]

    assert max(shares) < 0.01
    assert np.mean(shares) < 0.001


def test_a_mask_8_px_beside_its_image_would_be_seen(batch):
    image, labels, _ = draw(batch, 0)

    assert misplaced(image[0, 0].numpy(), np.roll(labels[0].numpy(), 8, axis=1)) > 0.05


def test_each_class_keeps_a_gray_of_its_own(batch):
    """Light changes the grays, never which class has which: their order stays, up to black and white."""
    for seed in range(4):
        image, labels, _ = draw(batch, seed)
        for i in range(len(labels)):
            grays = [image[i, 0][labels[i] == value].median() for value in (0, 1, 2, 3)]
            assert grays == sorted(grays)


def test_mask_and_weight_are_aligned_with_each_other(batch):
    for seed in range(4):
        _, labels, weight = draw(batch, seed)
        assert torch.equal(weight == 8.0, labels == 1)
        assert torch.equal(weight == 1.5, labels == 2)


def test_no_class_and_no_weight_is_invented(batch):
    for seed in range(4):
        _, labels, weight = draw(batch, seed)
        assert set(labels.unique().tolist()) <= set(GRAYS)
        assert set(weight.unique().tolist()) <= {0.0, 1.5, 8.0}


def test_ignored_pixels_stay_ignored(batch):
    """The ignored middle is in every draw of every sample, scaled by 0.8 to 1.25 each way."""
    before = (batch[1] == IGNORE).sum(dim=(1, 2))
    for seed in range(8):
        share = (draw(batch, seed)[1] == IGNORE).sum(dim=(1, 2)) / before
        assert share.min() > 0.6
        assert share.max() < 1.7


def test_the_image_stays_between_black_and_white(batch):
    images = torch.stack([draw(batch, seed)[0] for seed in range(4)])

    assert images.min() >= 0
    assert images.max() <= 1


def test_the_same_seed_draws_the_same(batch):
    for first, second in zip(draw(batch, 3), draw(batch, 3), strict=True):
        assert torch.equal(first, second)


def test_each_sample_has_a_draw_of_its_own(batch):
    one = tuple(plane[:1].repeat_interleave(4, dim=0) for plane in batch)

    image, _, _ = draw(one, 0)

    assert len({image[i].numpy().tobytes() for i in range(4)}) > 1


def test_all_lighting_modes_of_a_sample_move_together(batch):
    image, labels, weight = batch

    found, _, _ = draw((image.repeat(1, 3, 1, 1), labels, weight), 0)

    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])


# The weight of small components


def component_weight(mask, area_ref):
    return component_planes(*component_areas(mask), area_ref)[0]


def regions_of(mask):
    return component_planes(*component_areas(mask), 1.0)[1]


def mask_of(*squares, side=96):
    """A mask with squares (y, x, size, class)."""
    mask = np.zeros((side, side), dtype=np.uint8)
    for y, x, size, value in squares:
        mask[y : y + size, x : x + size] = value
    return mask


@pytest.mark.parametrize(
    ("size", "area_ref", "weight"),
    [
        (8, 64.0, 1.0),  # its area is the reference
        (4, 64.0, 2.0),  # sqrt(64 / 16)
        (2, 64.0, 2.0),  # 4 px weigh like 16
        (1, 64.0, 2.0),
        (20, 64.0, 1.0),  # never below 1
        (4, 1024.0, 8.0),
        (4, 1e6, 8.0),  # never above 8
    ],
)
def test_the_weight_is_the_root_of_the_area_ratio_between_1_and_8(size, area_ref, weight):
    found = component_weight(mask_of((40, 40, size, 1)), area_ref)

    assert found[40, 40] == weight
    assert set(np.unique(found)) == {0.0, weight}


def test_the_ring_is_5_px_wide():
    found = component_weight(mask_of((40, 40, 8, 2)), 256.0)

    assert np.flatnonzero(found[44]).tolist() == list(range(40 - 5, 48 + 5))
    assert np.flatnonzero(found[:, 44]).tolist() == list(range(40 - 5, 48 + 5))
    assert found[36, 36] == 0  # 4 px up and 4 px left: over 5 px away
    assert found[37, 36] == 2  # 3 px up and 4 px left: 5 px


def test_a_component_keeps_its_own_weight_beside_a_smaller_one():
    found = component_weight(mask_of((40, 20, 16, 1), (40, 38, 4, 2)), 256.0)

    assert (found[40:56, 20:36] == 1).all()
    assert (found[40:44, 38:42] == 4).all()
    assert found[42, 36] == 1  # between them, the nearer one
    assert found[42, 37] == 4


def test_components_of_two_classes_that_touch_are_two():
    found = component_weight(mask_of((40, 20, 16, 1), (40, 36, 4, 2)), 256.0)

    assert found[42, 35] == 1
    assert found[42, 36] == 4


def test_a_diagonal_line_is_one_component():
    _, areas = component_areas(np.eye(20, dtype=np.uint8))

    assert areas.tolist() == [380, 20]


def test_ignored_pixels_are_no_component():
    assert (component_weight(mask_of((40, 40, 8, IGNORE)), 64.0) == 0).all()


def test_a_clean_mask_has_no_weight():
    assert (component_weight(mask_of(), 64.0) == 0).all()


def test_a_sliver_that_a_crop_cut_off_keeps_the_weight_of_the_whole():
    mask = mask_of((10, 10, 80, 1))
    crop = slice(0, 12)

    assert component_weight(mask, 6400.0)[crop, crop].max() == 1.0
    assert component_weight(mask[crop, crop], 6400.0).max() == 8.0


@given(arrays(np.uint8, (14, 15), elements=st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2, IGNORE])))
def test_weight_is_where_a_component_is_within_5_px(mask):
    ys, xs = np.nonzero((mask > 0) & (mask < IGNORE))
    y, x = np.indices(mask.shape)
    near = np.zeros(mask.shape, dtype=bool)
    for py, px in zip(ys, xs, strict=True):
        near |= (y - py) ** 2 + (x - px) ** 2 <= RING**2

    weight = component_weight(mask, 100.0)

    assert ((weight > 0) == near).all()
    assert weight.max() <= 8
    assert not near.any() or weight[near].min() >= 1


def areas_of(*masks):
    return [component_areas(mask)[1] for mask in masks]


def test_the_reference_is_the_median_area_of_all_masks():
    masks = [mask_of((5, 5, 4, 1), (40, 40, 10, 2)), mask_of((5, 5, 5, 1)), mask_of()]

    assert reference_area(areas_of(*masks)) == 25


def test_the_reference_of_clean_masks_is_1():
    assert reference_area(areas_of(mask_of())) == 1
    assert reference_area([]) == 1


# The component nearest to each pixel


@given(arrays(np.uint8, (14, 15), elements=st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, 2, IGNORE])))
def test_a_pixels_region_is_a_component_that_none_is_nearer_than(mask):
    ids, areas = component_areas(mask)

    regions = regions_of(mask)

    assert (regions[ids > 0] == ids[ids > 0]).all()
    if len(areas) == 1:
        assert not regions.any()
        return
    to_each = np.stack([ndimage.distance_transform_edt(ids != i) for i in range(1, len(areas))])
    assert (np.take_along_axis(to_each, regions[None] - 1, axis=0)[0] == to_each.min(axis=0)).all()


def test_planes_beside_the_labels_are_warped_as_they_are(batch):
    image, labels, weight = batch
    _, expected, other = draw(batch, 5)

    _, found, first, second = draw((image, labels, weight, labels.float()), 5)

    assert torch.equal(found, expected)
    assert torch.equal(first, other)
    assert torch.equal(second.long(), found)


# Light that falls off


def test_a_bent_sample_moves_by_three_px_and_smoothly():
    """A ramp tells where each pixel came from: std 3 px, and neighbours move alike."""
    torch.manual_seed(0)
    side = 192
    ramp = torch.arange(side, dtype=torch.float32).expand(8, 1, side, side) / 256
    bent = ElasticTransform()(ramp)

    moved = ((bent - ramp) * 256)[:, 0, :, 16:-16]
    assert 2.0 < moved.std() < 4.0
    assert (moved[:, 1:] - moved[:, :-1]).abs().max() < 1.5


def test_a_transform_is_done_to_the_samples_that_it_is_drawn_for_and_to_no_other(batch):
    flip = Augmentations(moves=[(0.5, K.RandomHorizontalFlip(p=1.0))], lights=[])

    torch.manual_seed(0)
    image, labels, _ = augment(flip, *batch)

    flipped = [torch.equal(after, before.flip(-1)) for after, before in zip(labels, batch[1], strict=True)]
    assert 0 < sum(flipped) < len(flipped)
    for i, was in enumerate(flipped):
        assert torch.equal(image[i], batch[0][i].flip(-1) if was else batch[0][i])
        assert torch.equal(labels[i], batch[1][i].flip(-1) if was else batch[1][i])


def test_nothing_is_warped_where_no_share_is(batch):
    """Flips and quarter turns move pixels as they are: the number of px of each class stays."""
    _, labels, _ = draw(batch, 0, warped=0.0)

    for before, after in zip(batch[1], labels, strict=True):
        assert torch.equal(before.unique(return_counts=True)[1], after.unique(return_counts=True)[1])


def test_a_light_gradient_runs_from_one_side_to_the_other_and_moves_no_label(batch):
    image, labels, weight = (plane[:1].repeat_interleave(8, dim=0) for plane in batch)
    light = augmentations(light_gradient=1.0).lights[-1]

    torch.manual_seed(0)
    lit, kept, _ = augment(Augmentations(moves=[], lights=[light]), image, labels, weight)

    change = (lit - image)[:, 0]
    assert torch.equal(kept, labels)
    assert (change.abs().amax(dim=(1, 2)) <= LIGHT_GRADIENT[1] + 1e-6).all()
    assert (change.abs().amax(dim=(1, 2)) >= LIGHT_GRADIENT[0] - 1e-6).all()
    along = torch.stack(
        [change.diff(dim=1).abs().amax(dim=(1, 2)), change.diff(dim=2).abs().amax(dim=(1, 2))]
    )
    assert ((along > 1e-5).sum(dim=0) == 1).all()  # across or along, never both
