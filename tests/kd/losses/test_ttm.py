"""ttm_loss and wttm_loss against the paper's equations, in loops."""

import numpy as np
import pytest
import torch

from dalikd.kd.losses import ttm_loss, wttm_loss


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_they_equal_the_equations(gamma: float):
    random, plain, weighted = np.random.RandomState(0), 0.0, 0.0
    student, teacher = 3 * random.randn(4, 5), 3 * random.randn(4, 5)
    for s, t in zip(student, teacher, strict=True):
        q, p = np.exp(s) / np.exp(s).sum(), (np.exp(t) / np.exp(t).sum()) ** gamma
        distance = sum(p / p.sum() * np.log(p / p.sum() / q))
        plain, weighted = plain + distance / 4, weighted + p.sum() * distance / 4
    given = torch.from_numpy(student), torch.from_numpy(teacher)
    assert ttm_loss(*given, gamma).item() == pytest.approx(plain, rel=1e-12)
    assert wttm_loss(*given, gamma).item() == pytest.approx(weighted, rel=1e-12)


def test_they_are_zero_where_the_student_gives_the_powers():
    teacher = torch.randn(4, 7, dtype=torch.float64)
    for loss in (ttm_loss, wttm_loss):
        assert loss(0.3 * teacher + 2, teacher, 0.3).item() == pytest.approx(0.0, abs=1e-14)


def test_the_weights_lie_between_a_sure_teacher_and_an_even_one():
    student = torch.randn(1, 8, dtype=torch.float64)
    for teacher, weight in ((torch.eye(8, dtype=torch.float64)[:1] * 500, 1.0), (torch.zeros(1, 8).double(), 8**0.8)):
        ratio = wttm_loss(student, teacher, 0.2) / ttm_loss(student, teacher, 0.2)
        assert ratio.item() == pytest.approx(weight, rel=1e-9)
