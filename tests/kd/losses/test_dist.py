"""dist_loss against correlations by numpy, and what it ignores."""

import numpy as np
import pytest
import torch

from dalikd.kd.losses import dist_loss


def test_it_equals_the_equations():
    random = np.random.RandomState(0)
    student, teacher = 3 * random.randn(6, 5), 3 * random.randn(6, 5)
    s, t = (np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True) for logits in (student, teacher))
    over_classes = np.mean([1 - np.corrcoef(s[i], t[i])[0, 1] for i in range(6)])
    over_samples = np.mean([1 - np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(5)])
    loss = dist_loss(torch.from_numpy(student), torch.from_numpy(teacher), 3.0, 0.5, 2.0).item()
    assert loss == pytest.approx(4 * (3 * over_classes + 0.5 * over_samples), rel=1e-6)  # but for 1e-8 beside the norms


def test_affine_maps_of_the_probabilities_are_ignored():
    teacher = 3 * torch.randn(6, 5, dtype=torch.float64)
    student = (0.4 * teacher.softmax(1) + 0.6 / 5).log()
    assert dist_loss(student, teacher, temperature=1.0).item() == pytest.approx(0.0, abs=1e-5)


def test_one_sample_has_no_correlation_over_the_batch():
    student, teacher = torch.randn(2, 1, 5, dtype=torch.float64)
    assert dist_loss(student, teacher, gamma=9.0).item() == dist_loss(student, teacher, gamma=0.0).item()
    assert dist_loss(student, student, gamma=9.0).item() == pytest.approx(0.0, abs=1e-4)
