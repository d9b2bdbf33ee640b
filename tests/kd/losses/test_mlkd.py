"""mlkd_loss against loops over temperatures and pairs."""

import numpy as np
import pytest
import torch

from dalikd.kd.losses import Views, mlkd_loss


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(logits / temperature)
    return powers / powers.sum(1, keepdims=True)


def levels(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    count, classes = p.shape
    instance = temperature**2 * (p * np.log(p / q)).sum() / count
    batch = sum((p[i] @ p[j] - q[i] @ q[j]) ** 2 for i in range(count) for j in range(count)) / count
    of_class = sum((p[:, i] @ p[:, j] - q[:, i] @ q[:, j]) ** 2 for i in range(classes) for j in range(classes))
    return np.array([instance, batch, of_class / classes])


@pytest.mark.parametrize(("count", "relations"), [(6, False), (5, True)])
def test_it_equals_the_equations(count: int, relations: bool):
    random = np.random.RandomState(0)
    student, augmented_student, teacher, augmented_teacher = 2 * random.randn(4, count, 7)
    sure = softmax(teacher, 1.0)
    samples = (sure.max(1) <= np.percentile(sure.max(1), 50)).mean()
    classes = (sure.sum(0) <= np.percentile(sure.sum(0), 50)).mean()
    assert (samples, classes) == ((count + 1) // 2 / count, 4 / 7)
    augmented = np.array([1, relations, relations])
    expected = sum(
        np.array([samples, samples, classes]) * levels(student, teacher, temperature)
        + augmented * levels(augmented_student, augmented_teacher, temperature)
        for temperature in (2, 3, 4, 5, 6)
    )
    views = [torch.from_numpy(logits) for logits in (student, augmented_student, teacher, augmented_teacher)]
    found = mlkd_loss(Views(*views[:2]), Views(*views[2:]), augmented_relations=relations)
    assert [term.item() for term in found] == pytest.approx(list(expected), rel=1e-12)


def test_where_the_teacher_is_equally_sure_of_all_they_all_count():
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    alone = mlkd_loss(Views(student, teacher), Views(teacher, teacher), [1.0])[0]
    assert alone.item() == pytest.approx(levels(student.numpy(), teacher.numpy(), 1.0)[0], rel=1e-12)
