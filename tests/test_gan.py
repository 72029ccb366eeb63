"""The editor's laws: nothing outside the gate, contrast kept; losses with known answers."""

import math

import pytest
import torch
from rollsight.synth.gan import (
    SEEN_PX,
    Editor,
    Judge,
    PixelJudge,
    Widths,
    contrast,
    gate,
    judged_px,
    limited,
    ring,
    score,
    spread,
)
from rollsight.synth.gan_losses import by_pixel, contrast_loss, editor_loss, judge_loss, penalty, relativistic
from rollsight.synth.shaking import shake

SMALL = Widths(editor=(8, 12), judge=(8, 12, 16))


def inputs(n: int = 3, size: int = 32):
    draws = torch.Generator().manual_seed(0)
    start = torch.rand(n, 1, size, size, generator=draws) * 0.2 + 0.4
    mask = torch.zeros(n, 1, size, size)
    mask[:, :, 12:18, 14:17] = 1
    noise = torch.randn(n, 1, size, size, generator=draws)
    return start, mask, noise, torch.randn(n, 64, generator=draws), torch.arange(n) % 2


def wild_editor(whole: bool = False) -> Editor:
    """An editor whose last layer is far from its small beginning, so that it changes all it may."""
    torch.manual_seed(0)
    editor = Editor(2, SMALL, whole)
    torch.nn.init.normal_(editor.last.weight, std=1.0)
    return editor.eval()


def test_gate_law_nothing_changes_beyond_its_reach():
    start, mask, *rest = inputs()

    with torch.no_grad():
        edited = wild_editor()(start, mask, *rest)

    beyond = torch.nn.functional.max_pool2d(mask, 11, stride=1, padding=5) == 0
    change = (edited - start).abs()
    assert gate(mask)[beyond].max() == 0
    assert change[beyond].max() < 1 / 255
    assert change[mask > 0].mean() > 0.05  # inside it does change a lot


def test_an_empty_mask_changes_nothing():
    start, mask, *rest = inputs()

    with torch.no_grad():
        edited = wild_editor()(start, mask * 0, *rest)

    torch.testing.assert_close(edited, start, rtol=0, atol=0)


def test_an_image_does_not_depend_on_what_is_made_with_it():
    """No statistic of a batch: alone or among others, but for the order of sums."""
    editor, (start, mask, noise, latent, classes) = wild_editor(), inputs()

    with torch.no_grad():
        together = editor(start, mask, noise, latent, classes)
        alone = editor(start[:1], mask[:1], noise[:1], latent[:1], classes[:1])

    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_the_editor_takes_any_size_of_whole_strides_and_no_other():
    start, mask, noise, latent, classes = inputs(size=40)

    assert wild_editor()(start, mask, noise, latent, classes).shape == start.shape
    with pytest.raises(ValueError, match="both sides must be multiples of 4"):
        wild_editor()(*(t[..., :38] for t in (start, mask, noise)), latent, classes)


def test_the_rival_makes_anew_what_the_judge_sees_and_leaves_the_rest():
    start, mask, *rest = inputs()

    with torch.no_grad():
        first, second = (wild_editor(whole=True)(t, mask, *rest) for t in (start, 1 - start))

    inner, seen = (spread(mask, px) > 0 for px in (2, SEEN_PX))
    torch.testing.assert_close(first[inner], second[inner])  # it never sees the steel
    torch.testing.assert_close(first[~seen], start[~seen], rtol=0, atol=0)
    assert first.min() >= 0 and first.max() <= 1 and (first - start)[inner].abs().mean() > 0.05


@pytest.mark.parametrize("dark", [True, False])
def test_contrast_law_an_edit_that_erases_is_drawn_back(dark):
    steel = torch.full((2, 1, 32, 32), 0.5)
    mask = inputs(2)[1]
    start = steel + (-0.3 if dark else 0.3) * mask
    edited = torch.stack([steel[0], start[1] * 0.9 + steel[1] * 0.1])  # one is erased, one hardly touched

    held = limited(start, edited, mask, keep=0.6)

    kept = contrast(held, mask) / contrast(start, mask)
    torch.testing.assert_close(kept, torch.tensor([0.6, 0.9]), rtol=0, atol=1e-5)
    assert contrast_loss(start, edited, mask, 0.8) > 0.3
    assert contrast_loss(start, start, mask, 0.8) == 0


def test_contrast_is_mask_against_ring_and_0_without_either():
    image, mask = torch.zeros(3, 1, 32, 32), inputs()[1]
    image[mask > 0], mask[1], mask[2] = 0.25, 0, 1

    assert contrast(image, mask).tolist() == [0.25, 0.0, 0.0]
    assert not (ring(mask) * mask).any()


def test_relativistic_pairs_and_penalty_have_their_known_values():
    real, fake = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    image = torch.ones(2, 1, 4, 4, requires_grad=True)

    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert relativistic(real, fake).item() == pytest.approx(expected)
    # the logit is 3 times the sum of 16 px: a gradient of 3 at each
    assert penalty(3 * image.sum(dim=(1, 2, 3)), image).item() == pytest.approx(16 * 9)


def test_image_and_mask_are_shaken_alike_and_light_leaves_the_mask():
    mask = inputs(8)[1]
    image = 0.3 + 0.4 * mask

    shaken, moved = shake(8, 0.8, torch.Generator().manual_seed(1), torch.device("cpu"))(image, mask)

    levels = [one[m > 0.99] for one, m in zip(shaken, moved, strict=True)]
    assert all(level.numel() and level.std() < 0.02 for level in levels)
    assert moved.min() >= 0 and moved.max() <= 1
    assert (moved.flatten(1) != mask.flatten(1)).any(dim=1).any()


def test_the_judge_knows_classes_apart_by_projection():
    torch.manual_seed(0)
    judge, (start, mask, *_) = Judge(2, SMALL, 32), inputs(2)

    first, second = (judge(start, mask, torch.full((2,), k)) for k in (0, 1))

    assert first.shape == (2,)
    assert (first - second).abs().min() > 0


def logits_of(shown: torch.Tensor, sure: float = 30.0) -> torch.Tensor:
    """(N, H, W) channels of a `PixelJudge` of two classes -> logits that are sure of them."""
    return sure * torch.nn.functional.one_hot(shown, 4).movedim(3, 1).float()


def test_a_judge_by_the_px_weighs_a_mark_as_much_as_what_is_around_it():
    _, mask, *_ = inputs(1)
    marked, steel = mask[:, 0] > 0, PixelJudge.STEEL
    truth = torch.where(marked, PixelJudge.FIRST_CLASS + 1, steel)
    blind = torch.full_like(truth, steel)  # it sees no mark: wrong on 18 px of 7 x 10

    assert by_pixel(logits_of(truth), mask, truth) < 1e-6
    assert by_pixel(logits_of(blind), mask, truth).item() == pytest.approx(30 / 2, rel=1e-3)
    assert judged_px(mask).sum() == 7 * 10
    made = torch.full_like(truth, PixelJudge.MADE)
    assert score(logits_of(made), mask).item() == pytest.approx(-30 + math.log(3), rel=1e-3)
    assert score(logits_of(truth), mask).item() == pytest.approx(30, rel=1e-3)
    elsewhere = torch.where(judged_px(mask)[:, 0], truth, made)  # what is not asked does not count
    assert score(logits_of(elsewhere), mask).item() == pytest.approx(30, rel=1e-3)


def test_a_judge_by_the_px_learns_to_tell_made_marks_and_an_editor_hears_of_it():
    torch.manual_seed(0)
    start, mask, _, _, classes = inputs(4)
    real, made = start - 0.2 * mask, (start - 0.2 * mask * (1 + torch.randn_like(mask))).requires_grad_()
    judge = PixelJudge(2, SMALL)
    descent = torch.optim.Adam(judge.parameters(), lr=3e-3)
    for _ in range(60):
        loss, d_real, d_made = judge_loss(judge, (real, mask), (made.detach(), mask), classes)
        descent.zero_grad()
        loss.backward()
        descent.step()

    assert loss < 1 and d_real.min() > d_made.max()  # it began at 2 ln 4 = 2.8
    _, _, heard = judge_loss(judge, (real, mask), (made, mask), classes)
    torch.testing.assert_close(judge(made, mask, classes), heard)
    wrong = editor_loss(judge, (real, mask), (made, mask), classes)
    wrong.backward()
    assert wrong > 1 > editor_loss(judge, (real, mask), (real, mask), classes)
    assert made.grad.abs()[judged_px(mask)].max() > 0
    far = spread(mask, SEEN_PX) == 0
    assert made.grad[far].abs().max() == 0  # it never looked there
