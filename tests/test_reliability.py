"""Calibration error against MONAI's bins, and pixels near a defect."""

import numpy as np
import pytest
import torch
from monai.metrics import calibration_binning
from rollsight.inspect.reliability import BINS, TEMPERATURES, Reliability, evenly, near


def drawn(n, scale, seed=0):
    """Logits (3, n) and truths drawn from their own probabilities; the logits are made `scale` larger."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (3, n)).astype(np.float32)
    p = np.exp(z) / np.exp(z).sum(axis=0)
    truth = (rng.random(n) > p.cumsum(axis=0)).sum(axis=0).clip(max=2).astype(np.uint8)
    return z * np.float32(scale), truth


def test_the_bins_are_those_of_monai():
    z, truth = drawn(4000, 2)
    told = Reliability()
    told.add(z, truth)

    p = torch.from_numpy(z).double().softmax(dim=0)
    confidence, taken = p.max(dim=0)
    right = (taken == torch.from_numpy(truth)).double()
    mean_p, mean_right, n = calibration_binning(confidence[None, None], right[None, None], num_bins=BINS)
    held = n[0, 0] > 0
    error = (n * (mean_p - mean_right).abs()).nansum() / n.sum()

    assert told.error() == pytest.approx(float(error), abs=1e-6)
    assert [row["n"] for row in told.bins()] == n[0, 0][held].int().tolist()
    np.testing.assert_allclose([row["right"] for row in told.bins()], mean_right[0, 0][held])
    np.testing.assert_allclose([row["confidence"] for row in told.bins()], mean_p[0, 0][held], atol=1e-6)
    cross_entropy = torch.nn.functional.cross_entropy(
        torch.from_numpy(z).T.double(), torch.from_numpy(truth).long(), reduction="sum"
    )
    assert told.nats == pytest.approx(float(cross_entropy), rel=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_smallest_likelihood_loss_finds_how_much_too_sure_the_logits_are(scale):
    z, truth = drawn(20_000, scale)
    trials = []
    for t in TEMPERATURES:
        trials.append(Reliability())
        trials[-1].add(z / np.float32(t), truth)
    best = int(np.argmin([trial.nats for trial in trials]))

    assert TEMPERATURES[best] == pytest.approx(scale, rel=0.06)
    assert trials[best].error() < 0.02


def test_one_is_among_the_temperatures():
    assert TEMPERATURES[len(TEMPERATURES) // 2] == 1


def test_pixels_near_a_defect_are_those_within_16_px_that_are_not_ignored():
    truth, predicted = np.zeros((60, 60), np.uint8), np.zeros((60, 60), np.uint8)
    truth[20, 20], predicted[20, 40], truth[20, 22] = 1, 2, 255
    found = near(truth, predicted)
    assert found[20, 4] and not found[20, 3]
    assert found[20, 56] and not found[20, 57]
    assert not found[20, 22] and not found[59, 20]


def test_a_sample_is_spread_evenly_and_holds_all_of_few():
    assert evenly(np.ones((10, 10), bool), 25).tolist() == list(range(0, 100, 4))
    assert evenly(np.eye(3, dtype=bool), 25).tolist() == [0, 4, 8]


def test_nothing_counted_has_no_error():
    assert Reliability().error() is None
