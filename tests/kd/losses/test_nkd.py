"""nkd_loss against the paper's equation, in loops."""

import math

import numpy as np
import pytest
import torch

from dalikd.kd.losses import nkd_loss


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0)])
def test_it_equals_the_equation(gamma: float, temperature: float):
    random = np.random.RandomState(0)
    student, teacher, labels = 3 * random.randn(4, 5), 3 * random.randn(4, 5), [1, 0, 4, 1]
    expected = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        others = [c for c in range(5) if c != label]
        on_target = np.exp(t[label]) / np.exp(t).sum() * math.log(np.exp(s[label]) / np.exp(s).sum())
        s_rest, t_rest = (np.exp(logits[others] / temperature) for logits in (s, t))
        on_others = sum(t_rest / t_rest.sum() * np.log(s_rest / s_rest.sum()))
        expected -= (on_target + gamma * temperature**2 * on_others) / 4
    given = torch.from_numpy(student), torch.from_numpy(teacher), torch.tensor(labels)
    assert nkd_loss(*given, gamma, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_its_gradient_on_the_other_classes_is_none_where_both_nets_agree():
    logits, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 3, 5])
    student = logits.clone().requires_grad_()
    (nkd_loss(student, logits, labels, 2.0) - nkd_loss(student, logits, labels, 1.0)).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15
