"""Losses in which each component counts alike: against plain loops over components, and their laws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceLoss
from rollsight.inspect.augment import component_areas, component_planes
from rollsight.inspect.instance_losses import INSTANCE_LOSSES, blob, cc_dice_ce
from rollsight.inspect.labels import IGNORE

SURE = 30.0
BOTH = pytest.mark.parametrize("loss", INSTANCE_LOSSES.values(), ids=INSTANCE_LOSSES.keys())


def planes(*masks):
    """Labels, regions with ids of their own in each sample, and areas, of whole masks."""
    regions, areas, first = [], [np.zeros(1)], 0
    for mask in masks:
        ids, found = component_areas(mask)
        near = component_planes(ids, found, 1.0)[1]
        regions.append(np.where(near > 0, near + first, 0))
        areas.append(found[1:])
        first += len(found) - 1
    labels = torch.from_numpy(np.stack(masks)).long()
    return labels, torch.from_numpy(np.stack(regions)).long(), torch.from_numpy(np.concatenate(areas)).float()


def scene(seed=0, samples=2, classes=2):
    """Masks of 24 x 24 px with some squares of each class, and an ignored corner."""
    rng, masks = np.random.default_rng(seed), []
    for _ in range(samples):
        mask = np.zeros((24, 24), dtype=np.uint8)
        for value in range(1, classes + 1):
            for _ in range(2):
                (y, x), size = rng.integers(0, 20, 2), rng.integers(1, 5)
                mask[y : y + size, x : x + size] = value
        mask[20:, 20:] = IGNORE
        masks.append(mask)
    return masks


def noise(n=2, classes=3, seed=0):
    return 2 * torch.randn((n, classes, 24, 24), generator=torch.Generator().manual_seed(seed))


def sure(labels, classes=3):
    truth = torch.where(labels == IGNORE, 0, labels)
    return SURE * F.one_hot(truth, classes).movedim(-1, 1).float()


def each_component(labels, regions):
    """Sample, class and own pixels (H, W) of each component."""
    for i in regions[(labels > 0) & (labels < IGNORE)].unique():
        n = int((regions == i).nonzero()[0, 0])
        own = (regions[n] == i) & (labels[n] > 0) & (labels[n] < IGNORE)
        yield n, int(labels[n][own][0]), own, regions[n] == i


def monai_dice(p, truth):
    return DiceLoss(smooth_nr=1.0, smooth_dr=1.0)(p[None, None], truth[None, None].float())


def test_cc_dice_ce_is_monais_dice_and_cross_entropy_in_the_region_of_each_component():
    labels, regions, areas = planes(*scene())
    logits = noise()
    p, nats = logits.softmax(dim=1), F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    expected = []
    for n, value, own, region in each_component(labels, regions):
        inside = region & (labels[n] != IGNORE)
        expected.append(monai_dice(p[n, value][inside], own[inside]) + nats[n][inside].mean())

    torch.testing.assert_close(cc_dice_ce(logits, labels, regions, areas), torch.stack(expected).mean())


def test_blob_is_monais_dice_of_each_component_with_the_others_masked_out():
    labels, regions, areas = planes(*scene())
    p = noise().softmax(dim=1)
    expected = []
    for n, value, own, _ in each_component(labels, regions):
        domain = own | (labels[n] == 0)
        expected.append(monai_dice(p[n, value][domain], own[domain]))

    torch.testing.assert_close(blob(noise(), labels, regions, areas), torch.stack(expected).mean())


@BOTH
def test_the_truth_costs_nothing_and_clean_steel_in_its_place_much(loss):
    labels, regions, areas = planes(*scene())

    assert loss(sure(labels), labels, regions, areas).item() < 1e-3
    assert loss(sure(torch.zeros_like(labels)), labels, regions, areas).item() > 0.5


@BOTH
def test_a_missed_pit_of_4_px_costs_a_tenth_of_a_missed_patch_of_400_px_at_least(loss):
    """A loss by pixel would have it at a hundredth."""
    mask = np.zeros((24, 48), dtype=np.uint8)
    mask[2:22, 2:22], mask[10:12, 36:38] = 1, 1
    labels, regions, areas = planes(mask)

    def cost(found):
        return loss(0.2 * sure(found, 2), labels, regions, areas)  # sure to 99.8 %

    large, small = (cost(torch.where(regions == i, 0, labels)) - cost(labels) for i in (1, 2))

    assert small > 0.1 * large > 0


@BOTH
def test_a_sliver_that_a_crop_cut_off_weighs_by_the_share_of_it_that_is_seen(loss):
    mask = np.zeros((24, 24), dtype=np.uint8)
    mask[0:20, 0:20], mask[4:8, 22:24] = 1, 1
    labels, regions, areas = planes(mask)
    crop = (slice(None), slice(0, 12), slice(18, 24))  # 12 x 2 px of the patch, all of the pit
    shares = torch.tensor([24 / 400, 1.0])
    logits = noise(1, 2)[:, :, :12, :6]

    found = loss(logits, labels[crop], regions[crop], areas)

    each = [
        loss(logits, labels[crop], torch.where(regions[crop] == i, 1, 2), torch.tensor([0.0, area, 1e12]))
        for i, area in ((1, 24.0), (2, 8.0))
    ]
    torch.testing.assert_close(found, (shares * torch.stack(each)).sum() / shares.sum())


@BOTH
@given(order=st.permutations(range(4)))
def test_the_order_of_the_samples_does_not_matter(loss, order):
    labels, regions, areas = planes(*scene(samples=4))
    logits = noise(4)

    found = loss(logits[order], labels[order], regions[order], areas)

    torch.testing.assert_close(found, loss(logits, labels, regions, areas))


@BOTH
def test_ignored_pixels_have_no_influence(loss):
    labels, regions, areas = planes(*scene())
    logits = noise().requires_grad_()
    loss(logits, labels, regions, areas).backward()

    assert (logits.grad.movedim(1, -1)[labels == IGNORE] == 0).all()
    assert logits.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("value", [0, IGNORE])
def test_a_batch_without_a_component_costs_nothing(loss, value):
    labels, regions, areas = planes(np.full((24, 24), value, dtype=np.uint8))
    logits = noise(1).requires_grad_()

    found = loss(logits, labels, regions, areas)
    found.backward()

    assert found.item() == 0
    assert (logits.grad == 0).all()


@BOTH
def test_a_component_outside_the_crop_does_not_count(loss):
    labels, regions, areas = planes(*scene())
    seen = loss(noise(), labels, regions, areas)

    more = loss(noise(), labels, regions, torch.cat([areas, torch.tensor([50.0])]))

    torch.testing.assert_close(more, seen)


@BOTH
def test_under_autocast_and_from_half_precision_the_loss_is_that_of_fp32(loss):
    labels, regions, areas = planes(*scene())
    half = (100 * noise()).bfloat16()
    expected = loss(half.float(), labels, regions, areas)

    with torch.autocast("cpu", torch.bfloat16):
        found = loss(half, labels, regions, areas)

    assert found.dtype == torch.float32
    assert found == expected


@BOTH
def test_classes_merged_into_the_background_give_a_finite_loss_and_gradient(loss):
    labels, regions, areas = planes(*scene(classes=1))
    logits = noise()
    logits[:, 2] = -1e9
    logits.requires_grad_()
    found = loss(logits, labels, regions, areas)
    found.backward()

    assert found.isfinite()
    assert logits.grad.isfinite().all()
