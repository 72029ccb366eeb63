"""The losses on four pixels whose answer is known, and where a sum could overflow or be empty."""

import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from rollsight.inspect.labels import IGNORE
from rollsight.inspect.losses import dice, focal, focal_map, merge_unlabelled, small_object

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
