"""Distillation by correlation: the student's probabilities shall vary as the teacher's do, over classes and samples.

Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import LogitLoss, Weight, check_weight, full_precision
from dalikd.kd.losses.kd import check_temperature

__all__ = ["DIST", "dist_loss"]


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """T^2 * (beta * (1 - correlation over the classes) + gamma * (1 - correlation over the batch)).

    Correlations are Pearson's, of probabilities at T, the first averaged over samples, the second over classes (Huang
    et al., eq. 7 to 10; the T^2 and the 1e-8 beside the norms as in their code). What varies less than about 1e-4 in
    both nets is therefore neglected, and the loss of equal logits is small, but not 0.

    Args:
        student_logits: [B, C]. For one sample there is no correlation over the batch, and that part is 0.
        teacher_logits: [B, C].
        beta: weight of the correlation over the classes.
        gamma: weight of the correlation over the batch.
        temperature: T > 0.

    Returns:
        A scalar, computed in float32 (float64 stays), finite for every finite logit.
    """
    student, teacher = (
        functional.softmax(full_precision(logits) / temperature, dim=1) for logits in (student_logits, teacher_logits)
    )
    total = beta * (1 - _correlation(student, teacher).mean())
    if len(student) > 1:
        total = total + gamma * (1 - _correlation(student.T, teacher.T).mean())
    return temperature**2 * total


def _correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson's, of each row; of a row whose values are all alike it is 0, without a gradient."""
    one, other = (values - values.mean(1, keepdim=True) for values in (student, teacher))
    one = torch.where(one.norm(dim=1, keepdim=True) > 1e-7, one, one.detach())  # else the gradient were of 1e8
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1) + 1e-8)


class DIST(LogitLoss):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022): `dist_loss` beside the cross-entropy.

    The batch is that of each process.

    Args:
        kd_weight: Weight of everything but the cross-entropy.
        beta: Weight of the correlation over the classes, 0 or more.
        gamma: Weight of the correlation over the batch, 0 or more.
        temperature: Divides the logits of both nets, above 0; 4 on CIFAR-100, 1 on ImageNet.
        kwargs: The others of `LogitLoss`.
    """

    paper = "Huang et al., NeurIPS 2022, arXiv 2205.10536"

    def __init__(
        self,
        kd_weight: Weight = 2.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(kd_weight=kd_weight, **kwargs)
        check_weight("beta", beta)
        check_weight("gamma", gamma)
        check_temperature(temperature)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`dist_loss`."""
        return dist_loss(student, teacher, self.beta, self.gamma, self.temperature)
