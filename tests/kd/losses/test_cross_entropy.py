"""Cross-entropies against formulas written out in numpy."""

import numpy as np
import pytest
import torch

from dalikd.kd.losses import cross_entropy, mixed_cross_entropy

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0], [1.0, 4.0, -2.0], [0.3, 0.2, 0.1]])
LABELS = np.array([0, 1, 1, 2])
PARTNERS = np.array([1, 1, 0, 0])
LAM = np.array([1.0, 0.25, 0.5, 0.0])


def soft_cross_entropy(targets: np.ndarray) -> float:
    log_probabilities = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
    return float(-(targets * log_probabilities).sum(axis=1).mean())


def smooth(labels: np.ndarray, smoothing: float) -> np.ndarray:
    return (1 - smoothing) * np.eye(3)[labels] + smoothing / 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float):
    loss = cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS), smoothing)
    assert loss.item() == pytest.approx(soft_cross_entropy(smooth(LABELS, smoothing)), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lam_is_the_share_of_the_sample_itself(smoothing: float):
    targets = LAM[:, None] * smooth(LABELS, smoothing) + (1 - LAM[:, None]) * smooth(PARTNERS, smoothing)
    lam = torch.tensor(LAM, dtype=torch.float32)
    loss = mixed_cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS), torch.tensor(PARTNERS), lam, smoothing)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(soft_cross_entropy(targets), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32(dtype: torch.dtype):
    logits, labels, lam = torch.tensor(LOGITS, dtype=dtype), torch.tensor(LABELS), torch.tensor(LAM)
    for loss, exact in (
        (cross_entropy(logits, labels), cross_entropy(logits.float(), labels)),
        (mixed_cross_entropy(logits, labels, labels, lam), mixed_cross_entropy(logits.float(), labels, labels, lam)),
    ):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, exact)


def test_confidently_wrong_logits_stay_finite():
    logits, labels = torch.tensor([[500.0, -500.0]]), torch.tensor([1])
    assert cross_entropy(logits, labels).item() == pytest.approx(1000.0)
    assert mixed_cross_entropy(logits, labels, labels, torch.ones(1)).item() == pytest.approx(1000.0)
