"""The losses on four pixels whose answer is known, and where a sum could overflow or be empty."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kornia.losses import lovasz_softmax_loss
from monai.losses import BoundaryLoss, DiceLoss, FocalLoss, TverskyLoss
from rollsight.inspect.labels import IGNORE
from rollsight.inspect.losses import (
    BOUNDARY_REACH,
    FALSE_ALARM,
    LOSSES,
    MISS,
    REGIONAL,
    TEMPERATURE,
    boundary,
    dice,
    distillation,
    focal,
    focal_map,
    lovasz,
    merge_unlabelled,
    small_object,
    tversky,
)

LN2 = math.log(2)
SURE = 30.0  # a logit whose softmax is 1 in fp32


def four(*values):
    """Four pixels: (1, 2, 2) int64."""
    return torch.tensor(values).reshape(1, 2, 2)


def sure(labels, classes):
    """Logits (1, K, 2, 2) of a net that is sure of `labels`."""
    return SURE * F.one_hot(labels, classes).movedim(-1, 1).float()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Focal


@pytest.mark.parametrize(("gamma", "nats"), [(0.0, LN2), (1.0, LN2 / 2), (2.0, LN2 / 4)])
def test_focal_of_an_even_choice_is_ln_2_faded_by_gamma(gamma, nats):
    assert focal(torch.zeros(1, 2, 2, 2), four(0, 1, 1, 0), gamma).item() == pytest.approx(nats)


def test_focal_at_gamma_0_is_cross_entropy():
    logits, labels = noise(2, 4, 8, 8), torch.arange(128).reshape(2, 8, 8) % 4

    torch.testing.assert_close(focal(logits, labels, gamma=0.0), F.cross_entropy(logits, labels))


def test_ignored_pixels_have_no_focal_and_are_not_counted():
    logits = sure(four(1, 1, 1, 1), 2)
    labels = four(0, 1, IGNORE, IGNORE)

    assert focal_map(logits, labels)[0, 1].tolist() == [0, 0]
    assert focal(logits, labels).item() == pytest.approx(SURE / 2)


# Dice


def test_dice_of_the_truth_is_0_and_of_the_opposite_is_nearly_1():
    labels = four(0, 1, 1, 0)

    assert dice(sure(labels, 2), labels).item() == pytest.approx(0.0)
    assert dice(sure(1 - labels, 2), labels).item() == pytest.approx(1 - 1 / 5)  # overlap 0, sum 4, and 1


def test_dice_of_an_even_choice_is_known():
    # overlap 0.5 + 0.5, sum 4 * 0.5 + 2: 1 - (2 + 1) / (4 + 1)
    assert dice(torch.zeros(1, 2, 2, 2), four(0, 1, 1, 0)).item() == pytest.approx(0.4)


def test_dice_is_pooled_over_the_batch_as_monai_does_it():
    logits, labels = noise(3, 4, 8, 8), torch.arange(192).reshape(3, 8, 8) % 7 % 4
    oracle = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0
    )

    torch.testing.assert_close(dice(logits, labels), oracle(logits, labels[:, None]))


def test_a_class_that_does_not_occur_has_no_dice():
    logits, labels = noise(1, 3, 2, 2), four(0, 1, 1, 0)
    oracle = DiceLoss(reduction="none", to_onehot_y=True, softmax=True, batch=True, smooth_nr=1, smooth_dr=1)

    torch.testing.assert_close(dice(logits, labels), oracle(logits, labels[:, None]).ravel()[1])


def test_what_lies_under_ignored_pixels_does_not_change_dice_or_focal():
    labels = four(0, 1, IGNORE, 1)
    logits = noise(1, 3, 2, 2)
    other = logits.clone()
    other[:, :, 1, 0] += torch.tensor([5.0, -5.0, 9.0])

    assert dice(other, labels) == dice(logits, labels)
    assert focal(other, labels) == focal(logits, labels)


# Nothing to learn from, and half precision


@pytest.mark.parametrize("value", [0, IGNORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_without_a_defect_give_finite_losses_and_gradients(value, dtype):
    logits = (1000 * noise(2, 3, 64, 64)).to(dtype).requires_grad_()
    labels = torch.full((2, 64, 64), value)

    total = (
        dice(logits, labels) + focal(logits, labels) + small_object(logits, labels, torch.zeros(2, 64, 64))
    )
    total.backward()

    assert total.isfinite()
    assert logits.grad.isfinite().all()
    assert dice(logits, labels).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_those_of_the_same_logits_in_fp32(dtype):
    half = (10_000 * noise(2, 3, 64, 64)).to(dtype)
    labels = torch.arange(2 * 64 * 64).reshape(2, 64, 64) % 3
    weight = torch.ones(2, 64, 64, dtype=torch.float16)

    for loss in (dice, focal, lambda x, y: small_object(x, y, weight)):
        found, expected = loss(half, labels), loss(half.float(), labels)
        assert found.isfinite()
        assert found.dtype == torch.float32
        assert found == expected


# Sources that do not label all classes


def labelled(*flags):
    return torch.tensor([flags])


def test_the_background_takes_the_probability_of_unlabelled_classes():
    logits = noise(1, 4, 2, 2)
    p = logits.softmax(dim=1)

    merged = merge_unlabelled(logits, labelled(True, True, False, False)).softmax(dim=1)

    torch.testing.assert_close(merged[:, 0], p[:, 0] + p[:, 2] + p[:, 3])
    torch.testing.assert_close(merged[:, 1], p[:, 1])
    assert (merged[:, 2:] == 0).all()


def test_where_all_classes_are_labelled_nothing_is_merged():
    logits = noise(1, 3, 2, 2)

    merged = merge_unlabelled(logits, labelled(True, True, True))

    torch.testing.assert_close(merged, logits)


def test_an_unlabelled_class_on_background_costs_nothing():
    background = four(0, 0, 0, 0)
    logits = sure(four(2, 2, 2, 2), 3)

    assert focal(merge_unlabelled(logits, labelled(True, True, False)), background).item() == 0
    assert focal(merge_unlabelled(logits, labelled(True, True, True)), background).item() > SURE / 2


def test_a_labelled_defect_may_not_be_an_unlabelled_class():
    logits = sure(four(2, 2, 2, 2), 3)

    assert focal(merge_unlabelled(logits, labelled(True, True, False)), four(1, 1, 1, 1)).item() > SURE / 2


def test_a_background_pixel_teaches_nothing_about_an_unlabelled_class():
    """Its gradient moves background and unlabelled class in the proportion the net gives them."""
    logits = noise(1, 3, 2, 2).requires_grad_()
    focal(merge_unlabelled(logits, labelled(True, True, False)), four(0, 0, 0, 0), gamma=0.0).backward()

    p, gradient = logits.detach().softmax(dim=1), logits.grad
    torch.testing.assert_close(gradient[:, 0] / gradient[:, 2], p[:, 0] / p[:, 2])


def test_each_sample_of_a_batch_merges_what_its_own_source_lacks():
    logits, flags = noise(2, 3, 2, 2), torch.tensor([[True, True, False], [True, False, True]])

    alone = [merge_unlabelled(logits[i : i + 1], flags[i : i + 1]) for i in range(2)]

    torch.testing.assert_close(merge_unlabelled(logits, flags), torch.cat(alone))


def test_merged_half_precision_logits_give_finite_losses_and_gradients():
    logits = (10_000 * noise(1, 3, 64, 64)).half().requires_grad_()
    merged = merge_unlabelled(logits, labelled(True, True, False))
    total = dice(merged, torch.ones(1, 64, 64, dtype=torch.long)) + focal(
        merged, four(0, 1, 1, 0).repeat(1, 32, 32)
    )
    total.backward()

    assert total.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_a_pixel_that_is_sure_has_a_finite_gradient_at_any_gamma(gamma):
    labels = four(0, 1, 1, 0)
    logits = sure(labels, 2).requires_grad_()
    focal(logits, labels, gamma).backward()

    assert logits.grad.isfinite().all()


# Small objects


def test_small_object_is_the_weighted_mean_of_focal():
    logits, labels = noise(1, 2, 2, 2), four(0, 1, 1, IGNORE)
    weight = torch.tensor([[[0.0, 8.0], [2.0, 4.0]]])
    pixels = focal_map(logits, labels)[0]

    found = small_object(logits, labels, weight)

    torch.testing.assert_close(found, (8 * pixels[0, 1] + 2 * pixels[1, 0]) / 10)


def test_twice_the_weight_everywhere_is_the_same_loss():
    logits, labels = noise(1, 2, 2, 2), four(0, 1, 1, 0)
    weight = torch.tensor([[[1.0, 8.0], [2.0, 0.0]]])

    torch.testing.assert_close(small_object(logits, labels, 2 * weight), small_object(logits, labels, weight))


# What holds for every loss that a training can name

EVERY = {**REGIONAL, "focal": focal}
ALL = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY.keys())


def patchwork(samples=2, classes=3, side=16):
    """Labels (N, side, side) in patches of 4 x 4 px, some of them ignored."""
    patches = torch.arange(samples * (side // 4) ** 2).reshape(samples, side // 4, side // 4) * 5 % 7
    labels = torch.where(patches < classes, patches, torch.where(patches == 6, IGNORE, 0))
    return labels.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)


def test_every_name_that_a_training_can_choose_is_made_of_these():
    assert {term for terms in LOSSES.values() for term in terms} == EVERY.keys()
    assert LOSSES["dice_focal"] == ("dice", "focal")


@ALL
def test_a_loss_is_0_at_the_truth_and_above_it_elsewhere(loss):
    labels = patchwork()
    truth = torch.where(labels == IGNORE, 0, labels)

    assert loss(sure(truth, 3), labels).item() == pytest.approx(0, abs=1e-4)
    assert loss(noise(2, 3, 16, 16), labels) > 0.05
    assert loss(sure((truth + 1) % 3, 3), labels) > 0.2


@ALL
@given(order=st.permutations(range(4)), seed=st.integers(0, 2**16))
def test_the_order_of_the_samples_does_not_matter(loss, order, seed):
    labels = patchwork(samples=4)
    logits = 3 * torch.randn((4, 3, 16, 16), generator=torch.Generator().manual_seed(seed))

    found = loss(logits, labels)

    assert found >= 0
    torch.testing.assert_close(loss(logits[order], labels[order]), found, atol=1e-5, rtol=1e-5)


@ALL
def test_the_gradient_is_finite_and_0_on_ignored_pixels(loss):
    labels = patchwork()
    logits = (20 * noise(2, 3, 16, 16)).requires_grad_()
    loss(logits, labels).backward()

    assert logits.grad.isfinite().all()
    assert (logits.grad != 0).any()
    assert (logits.grad.movedim(1, -1)[labels == IGNORE] == 0).all()


@ALL
def test_a_batch_of_nothing_but_ignored_pixels_costs_nothing(loss):
    logits = noise(2, 3, 8, 8).requires_grad_()
    found = loss(logits, torch.full((2, 8, 8), IGNORE))
    found.backward()

    assert found.item() == 0
    assert (logits.grad == 0).all()


@ALL
def test_clean_steel_gives_a_finite_loss_and_gradient(loss):
    logits = (1000 * noise(2, 3, 8, 8)).half().requires_grad_()
    found = loss(logits, torch.zeros((2, 8, 8), dtype=torch.long))
    found.backward()

    assert found.isfinite()
    assert logits.grad.isfinite().all()


@ALL
def test_a_class_merged_into_the_background_changes_nothing(loss):
    """A source that does not label it sees the loss of a net that never had it."""
    labels = patchwork(classes=2)
    logits = noise(2, 3, 16, 16)
    merged = merge_unlabelled(logits, torch.tensor([[True, True, False]] * 2))

    torch.testing.assert_close(loss(merged, labels), loss(merged[:, :2], labels))


@ALL
def test_under_autocast_a_loss_is_that_of_the_same_logits_in_fp32(loss):
    labels = patchwork()
    half = (100 * noise(2, 3, 16, 16)).bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        found = loss(half, labels)

    assert found.dtype == torch.float32
    assert found == loss(half.float(), labels)


# Against other libraries


def test_tversky_is_monais_pooled_over_the_batch():
    logits, labels = noise(3, 4, 8, 8), torch.arange(192).reshape(3, 8, 8) % 7 % 4
    oracle = TverskyLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=True,
        alpha=FALSE_ALARM,
        beta=MISS,
        smooth_nr=0.5,
        smooth_dr=0.5,
    )

    torch.testing.assert_close(tversky(logits, labels), oracle(logits, labels[:, None]))


def test_tversky_costs_a_missed_pixel_more_than_a_false_one():
    labels = four(0, 1, 1, 0)

    assert tversky(sure(four(0, 1, 0, 0), 2), labels) > tversky(sure(four(1, 1, 1, 0), 2), labels)


def test_focal_at_gamma_2_is_monais():
    logits, labels = noise(3, 4, 8, 8), torch.arange(192).reshape(3, 8, 8) % 7 % 4
    oracle = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0, reduction="sum")

    torch.testing.assert_close(
        focal(logits, labels, 2.0), oracle(logits, labels[:, None]) / 3
    )  # of a mean per px


def test_lovasz_is_kornias_on_the_pixels_that_count_as_one_image():
    logits, labels = noise(2, 3, 16, 16), patchwork()
    counted = labels != IGNORE
    pixels = logits.movedim(1, -1)[counted].T[None, :, None]

    torch.testing.assert_close(
        lovasz(logits, labels), lovasz_softmax_loss(pixels, labels[counted][None, None])
    )


def test_lovasz_of_a_sure_net_is_1_minus_iou_over_the_classes_that_occur():
    labels, found = four(0, 1, 1, 0), four(0, 1, 0, 0)

    # Background 2 of 3, class 1: 1 of 2; class 2 does not occur.
    assert lovasz(sure(found, 3), labels).item() == pytest.approx(1 - (2 / 3 + 1 / 2) / 2)


def test_the_boundary_loss_is_monais_less_that_of_the_truth():
    labels = torch.zeros((2, 12, 12), dtype=torch.long)
    labels[0, 2:7, 3:9], labels[1, 8:, :4], labels[1, 1:3, 5:8] = 1, 2, 1
    logits = noise(2, 3, 12, 12)
    oracle = BoundaryLoss(include_background=False, to_onehot_y=True, softmax=True)

    found = boundary(logits, labels) * BOUNDARY_REACH / 2  # MONAI takes the mean of the two classes

    expected = oracle(logits, labels[:, None]) - oracle(sure(labels, 3), labels[:, None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_false_alarm_beyond_the_boundarys_reach_costs_no_more():
    labels = torch.zeros((1, 8, 64), dtype=torch.long)
    labels[:, 2:6, 2:6] = 1
    costs = []
    for x in (12, 30, 50):
        found = labels.clone()
        found[:, 2:6, x : x + 4] = 1
        costs.append(boundary(sure(found, 2), labels).item())

    assert costs[0] < costs[1] == pytest.approx(costs[2])


# Learning from a teacher


def test_a_net_that_says_what_its_teacher_says_has_nothing_to_learn():
    logits, labels = noise(1, 3, 2, 2), four(0, 1, IGNORE, 0)

    assert distillation(logits + 3, logits, labels).item() == pytest.approx(0, abs=1e-6)
    assert distillation(-logits, logits, labels) > 0.05


def test_the_teachers_gradient_is_the_difference_of_the_softened_probabilities():
    """Hinton et al. 2015, eq. 2, times T^2: T (q - p) for each pixel."""
    taught, labels = noise(1, 3, 2, 2), four(0, 1, 1, 0)
    logits = (taught.flip(1) + 1).requires_grad_()
    distillation(logits, taught, labels).backward()

    q, p = ((x / TEMPERATURE).softmax(dim=1) for x in (logits.detach(), taught))
    torch.testing.assert_close(logits.grad, TEMPERATURE * (q - p) / 4)


def test_ignored_pixels_are_not_learned_from_a_teacher():
    logits = noise(1, 3, 2, 2).requires_grad_()
    distillation(logits, -logits.detach(), four(0, IGNORE, 1, IGNORE)).backward()

    assert (logits.grad[0, :, :, 1] == 0).all()
    assert (logits.grad[0, :, :, 0] != 0).all()
