"""rld_loss against the paper's equations, in loops."""

import math

import numpy as np
import pytest
import torch

from dalikd.kd.losses import rld_loss


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize(("temperature", "confidence_temperature"), [(4.0, None), (2.0, 1.0)])
def test_it_equals_the_equations(temperature: float, confidence_temperature: float | None):
    random, own = np.random.RandomState(1), confidence_temperature or temperature
    student, teacher = 3 * random.randn(6, 5), 3 * random.randn(6, 5)
    labels = [int(t.argmax()) for t in teacher[:2]] + [int(t.argmin()) for t in teacher[2:4]] + [0, 1]
    confidence = correlation = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        for_label, largest = softmax(s / own)[label], softmax(t / own).max()
        confidence += largest * math.log(largest / for_label)
        confidence += (1 - largest) * math.log((1 - largest) / (1 - for_label))
        below = [c for c in range(5) if t[c] < t[label]]
        of_student, of_teacher = softmax(s[below] / temperature), softmax(t[below] / temperature)
        correlation += sum(of_teacher * np.log(of_teacher / of_student))
    expected = (2 * own**2 * confidence + 3 * temperature**2 * correlation) / 6
    given = torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher), torch.tensor(labels)
    loss = rld_loss(*given, 2.0, 3.0, temperature, confidence_temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert given[0].grad is not None
    assert given[0].grad.isfinite().all()


def test_no_class_below_the_label_leaves_the_order_alone():
    student, teacher = torch.randn(2, 4, requires_grad=True), torch.tensor([[0.0, 1, 2, 3], [2, 2, 2, 2]])
    loss = rld_loss(student, teacher, torch.tensor([0, 1]), alpha=0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()
