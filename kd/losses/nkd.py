"""Normalised knowledge distillation: the target apart, the other classes normalised among themselves.

Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
Customized Soft Labels", ICCV 2023, arXiv 2303.13005.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import LogitLoss, Weight, check_weight, full_precision
from dalikd.kd.losses.dkd import is_label, masked_log_softmax
from dalikd.kd.losses.kd import check_temperature

__all__ = ["NKD", "nkd_loss"]


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
    *,
    per_sample: bool = False,
) -> Tensor:
    """-t log(s) of the target, less gamma * T^2 * the sum of t' log(s') over the other classes (Yang et al., eq. 7).

    t and s are probabilities at temperature 1, t' and s' at T and without the target. A cross-entropy: it is least, but
    not 0, where both nets agree.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        labels: the targets, int64 [B].
        gamma: weight of the other classes.
        temperature: T > 0, for the other classes alone.
        per_sample: give [B] instead of the mean.

    Returns:
        A scalar, computed in float32 (float64 stays), finite for every finite logit.
    """
    student, teacher = full_precision(student_logits), full_precision(teacher_logits)
    own = labels[:, None]
    target = functional.softmax(teacher, dim=1).gather(1, own) * functional.log_softmax(student, dim=1).gather(1, own)
    dropped = is_label(student, labels)
    log_student, log_teacher = (masked_log_softmax(logits / temperature, dropped) for logits in (student, teacher))
    rest = (log_teacher.exp() * log_student).sum(1)  # the target's log_student is 0
    rows = -target.squeeze(1) - gamma * temperature**2 * rest
    return rows if per_sample else rows.mean()


class NKD(LogitLoss):
    """Normalised knowledge distillation (Yang et al., ICCV 2023): `nkd_loss` beside the cross-entropy.

    On mixed images it is the mean of the losses for both labels, by the shares of these.

    Args:
        kd_weight: Weight of everything but the cross-entropy.
        gamma: Weight of the other classes, 0 or more; in the paper 1.5 on ImageNet (1 for vision transformers).
        temperature: Divides the logits of the other classes; above 0.
        kwargs: The others of `LogitLoss`.
    """

    paper = "Yang et al., ICCV 2023, arXiv 2303.13005"
    by_labels = True

    def __init__(self, kd_weight: Weight = 1.0, gamma: float = 1.5, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(kd_weight=kd_weight, **kwargs)
        check_weight("gamma", gamma)
        check_temperature(temperature)
        self.gamma, self.temperature = gamma, temperature

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`nkd_loss` of each sample."""
        return nkd_loss(student, teacher, labels, self.gamma, self.temperature, per_sample=True)
