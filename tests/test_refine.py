"""Edge refinement: what it may change, what it must leave, and what it is measured against."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollsight.inspect.defects import label_mask
from rollsight.inspect.errors import UserError
from rollsight.inspect.refine import REACH_PX, REFINERS, TINY_PX, refine
from scipy import ndimage


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A dark blotch and a dark spot of 9 px on noisy strip; what a blurred net says of it; the truth."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((96, 96), dtype=np.uint8)
    truth[20:60, 24:70] = 1
    truth[80:83, 10:13] = 2
    image = np.where(truth > 0, 0.3, 0.6) + rng.normal(0, 0.02, truth.shape)
    planes = np.stack(
        [ndimage.gaussian_filter((truth == c).astype(float), 3 if c == 1 else 0.6) for c in (1, 2)]
    )
    planes[0] = np.roll(planes[0], 2, axis=1)  # and two px beside it
    p = np.concatenate([1 - planes.sum(axis=0, keepdims=True), planes])
    p = np.clip(p, 0.001, 1)
    return image.astype(np.float32), (p / p.sum(axis=0)).astype(np.float32), truth


@pytest.mark.parametrize("method", REFINERS)
def test_a_blurred_outline_moves_to_the_edge_of_the_image(method):
    image, p, truth = scene()

    before = (p.argmax(axis=0) == 1) != (truth == 1)
    after = (refine(image, p, method).argmax(axis=0) == 1) != (truth == 1)

    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("method", REFINERS)
def test_probabilities_stay_probabilities(method):
    image, p, _ = scene()

    refined = refine(image, p, method)

    assert refined.dtype == np.float32 and refined.min() >= 0
    np.testing.assert_allclose(refined.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("method", REFINERS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_tiny_component_is_the_same_component_afterwards(method, seed):
    """Not a pixel lost, none gained, whatever lies around it."""
    rng = np.random.default_rng(seed)
    image = rng.random((48, 40)).astype(np.float32)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, 48, 40)), (0, 1.5, 1.5)) * 12
    p = np.exp(noise).astype(np.float32)
    p /= p.sum(axis=0)

    before = p.argmax(axis=0).astype(np.uint8)
    after = refine(image, p, method).argmax(axis=0).astype(np.uint8)

    ids, count = label_mask(before)
    ids_after, _ = label_mask(after)
    for number in range(1, count + 1):
        inside = ids == number
        if inside.sum() < TINY_PX:
            [same] = np.unique(ids_after[inside])
            assert same > 0 and np.array_equal(ids_after == same, inside)


@pytest.mark.parametrize("method", REFINERS)
def test_nothing_changes_far_from_a_large_component(method):
    image, p, _ = scene()

    changed = (refine(image, p, method) != p).any(axis=0)

    large = p.argmax(axis=0) == 1
    assert changed.any()
    assert not changed[ndimage.distance_transform_cdt(~large, "chessboard") > REACH_PX].any()


def test_clean_strip_comes_back_as_it_was():
    p = np.stack([np.full((64, 64), 0.9), np.full((64, 64), 0.1)]).astype(np.float32)

    np.testing.assert_array_equal(refine(np.zeros((64, 64), np.float32), p, "crf"), p)


def test_without_messages_the_mean_field_is_the_net():
    image, p, _ = scene()
    import torch
    from rollsight.inspect.refine import crf

    unmoved = crf(torch.from_numpy(image)[None], torch.from_numpy(p), strength=0.0)

    np.testing.assert_allclose(unmoved.numpy(), p, atol=1e-6)


def test_modes_of_light_count_together():
    """An edge that one of two modes shows is an edge."""
    image, p, truth = scene()
    flat = np.full_like(image, 0.5)

    both = refine(np.stack([flat, image]), p, "crf").argmax(axis=0) == 1
    alone = refine(flat, p, "crf").argmax(axis=0) == 1

    assert (both != (truth == 1)).sum() < (alone != (truth == 1)).sum()


def test_an_unknown_method_is_one_line():
    image, p, _ = scene()

    with pytest.raises(UserError, match="no refinement 'sharpen': there are guided, crf"):
        refine(image, p, "sharpen")


def test_sizes_that_do_not_fit_are_refused():
    image, p, _ = scene()

    with pytest.raises(ValueError, match="of the same size"):
        refine(image[:-1], p, "crf")
