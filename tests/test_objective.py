"""What a training minimises: the terms that the recipe names, each with its weight."""

from dataclasses import replace

import pytest
import torch
from rollsight.inspect.losses import LOSSES, dice, distillation, focal, small_object
from rollsight.inspect.objective import objective
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.sampling import Batch

RECIPE = Recipe(steps=10, small_ramp=0.5)
LATE = 9  # a step after the small term's ramp


def noise(seed=0, n=2):
    return torch.randn((n, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch():
    """Two canvases with a pit and a scratch each."""
    labels = torch.zeros((2, 32, 32), dtype=torch.long)
    labels[:, 4:12, 4:12], labels[:, 20:22, 2:30] = 1, 2
    regions = torch.where(torch.arange(32)[:, None] < 16, 1, 2).expand(2, 32, 32) + torch.tensor(
        [[[0]], [[2]]]
    )
    weights = (labels > 0) * 2.0
    areas = torch.tensor([0.0, 64.0, 56.0, 64.0, 56.0])
    return Batch(noise()[:, :1], labels, weights, torch.ones((2, 3), dtype=torch.bool), regions, areas)


def test_the_default_is_dice_and_focal_and_a_tenth_of_the_small_term(batch):
    batch = replace(batch, regions=None)
    logits, labels = noise(), batch.labels

    loss, terms = objective([logits], batch, RECIPE, LATE, [2])

    expected = (
        dice(logits, labels) + focal(logits, labels) + 0.1 * small_object(logits, labels, batch.weights)
    )
    torch.testing.assert_close(loss, expected)
    assert list(terms) == ["dice", "focal", "small"]


def test_the_small_term_is_ramped_in(batch):
    batch = replace(batch, regions=None)
    losses = [objective([noise()], batch, RECIPE, step, [2]) for step in (0, 1, 5, 9)]

    parts = [loss - terms["dice"] - terms["focal"] for loss, terms in losses]
    torch.testing.assert_close(
        torch.stack(parts) / (0.1 * losses[0][1]["small"]), torch.tensor([0, 0.2, 1, 1])
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("instance", ["none", "blob", "cc_dice"])
def test_each_loss_has_its_terms_and_each_weighs_in(batch, name, instance):
    recipe = replace(RECIPE, loss=name, instance=instance, instance_weight=2.0, small_weight=0.3)
    if instance == "none":
        batch = replace(batch, regions=None)
    weights = {"small": 0.3, "instance": 2.0}

    loss, terms = objective([noise()], batch, recipe, LATE, [2])

    assert set(terms) == {*LOSSES[name], "small", *(["instance"] if instance != "none" else [])}
    torch.testing.assert_close(loss, sum(weights.get(key, 1.0) * term for key, term in terms.items()))
    assert all(term > 0 for term in terms.values())


def test_without_weight_there_is_no_small_term(batch):
    _, terms = objective([noise()], batch, replace(RECIPE, small_weight=0.0, instance="blob"), LATE, [2])

    assert "small" not in terms


def test_regions_are_compared_source_by_source_by_their_share(batch):
    """Of three canvases two are of the first source: its Dice counts two thirds."""
    three = [0, 1, 0]
    batch = Batch(
        *(getattr(batch, name)[three] for name in ("images", "labels", "weights", "labelled")),
        None,
        batch.areas,
    )
    logits = noise(n=3)

    _, terms = objective([logits], batch, RECIPE, LATE, [2, 3])

    first, second = (dice(logits[part], batch.labels[part]) for part in (slice(0, 2), slice(2, 3)))
    torch.testing.assert_close(terms["dice"], (2 * first + second) / 3)


def test_each_depth_counts_half_of_the_finer_one(batch):
    recipe, outputs = replace(RECIPE, instance="cc_dice"), [noise(seed) for seed in range(3)]
    each = [objective([output], batch, recipe, LATE, [2])[0] for output in outputs]

    together, _ = objective(outputs, batch, recipe, LATE, [2])

    torch.testing.assert_close(together, (4 * each[0] + 2 * each[1] + each[2]) / 7)


def test_a_teacher_is_compared_in_its_own_channels_with_the_finest_output(batch):
    taught = noise(5)[:, :2]
    outputs = [noise(), noise(1)]
    recipe = replace(RECIPE, instance="blob")
    alone, _ = objective(outputs, batch, recipe, LATE, [2])

    loss, terms = objective(outputs, batch, recipe, LATE, [2], (taught, [0, 2]))

    torch.testing.assert_close(terms["teacher"], distillation(outputs[0][:, [0, 2]], taught, batch.labels))
    torch.testing.assert_close(loss, alone + terms["teacher"])
