"""Decoupled knowledge distillation: the target against the rest, and the other classes among themselves.

Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import LogitLoss, Schedule, Weight, check_weight, full_precision
from dalikd.kd.losses.kd import check_temperature, kl_rows

__all__ = ["DKD", "WARM_UP", "binary_kl", "dkd_loss", "is_label", "log_odds", "masked_log_softmax"]

#: of the weight of distillation, as in the paper's code. That counts epochs from 1; here epochs are those done, in
#: fractions too, so that the first step has a weight of 0 and the weight grows with every step
WARM_UP = Schedule([0.0, 20.0], [0.0, 1.0])


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    *,
    per_sample: bool = False,
) -> Tensor:
    """T^2 * (alpha * KL of (target, rest) + beta * KL among the other classes) (Zhao et al., eq. 7).

    With alpha = 1 and beta = 1 - p_t(target) it is `kd_loss`.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        labels: the targets, int64 [B].
        alpha: weight of the target.
        beta: weight of the other classes.
        temperature: T > 0.
        per_sample: give [B] instead of the mean.

    Returns:
        A scalar, computed in float32 (float64 stays), finite for every finite logit.
    """
    nets = [full_precision(logits) / temperature for logits in (student_logits, teacher_logits)]
    on_target = binary_kl(*(log_odds(logits, labels) for logits in nets))
    on_others = kl_rows(*(masked_log_softmax(logits, is_label(logits, labels)) for logits in nets))
    rows = temperature**2 * (alpha * on_target + beta * on_others)
    return rows if per_sample else rows.mean()


def is_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Bool [B, C]: which class is the label."""
    return labels[:, None] == torch.arange(logits.shape[1], device=labels.device)


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """log(p / (1 - p)) of one class of each row [B]; exact where p or 1 - p would be rounded to 0."""
    rest = logits.masked_fill(is_label(logits, classes), torch.finfo(logits.dtype).min)
    return logits.gather(1, classes[:, None]).squeeze(1) - rest.logsumexp(1)


def binary_kl(student_odds: Tensor, teacher_odds: Tensor) -> Tensor:
    """KL(teacher || student) of two outcomes [B], given by their log-odds."""
    parts = [
        teacher.sigmoid() * (functional.logsigmoid(teacher) - functional.logsigmoid(student))
        for student, teacher in ((student_odds, teacher_odds), (-student_odds, -teacher_odds))
    ]
    return parts[0] + parts[1]


def masked_log_softmax(logits: Tensor, dropped: Tensor) -> Tensor:
    """Log-probabilities [B, C] among the classes that are not `dropped` (bool [B, C]); 0 at those that are.

    A row may drop all of its classes: its log-probabilities, and their gradients, are 0.
    """
    kept = logits.masked_fill(dropped, torch.finfo(logits.dtype).min)
    return functional.log_softmax(kept, dim=1).masked_fill(dropped, 0)


class DKD(LogitLoss):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022): `dkd_loss`, with a warm-up over 20 epochs.

    On mixed images it is the mean of the losses for both labels, by the shares of these.

    Args:
        kd_weight: Weight of everything but the cross-entropy; default: from 0 to 1 in 20 epochs (ImageNet: in 1). The
            paper's code counts epochs from 1, and here they are counted as they go by, from 0.
        alpha: Weight of the target against the rest, 0 or more.
        beta: Weight of the other classes; in the paper 2 to 8 on CIFAR-100 (ResNet-56 to 20: 2), 0.5 on ImageNet.
        temperature: Divides the logits of both nets; above 0; 1 on ImageNet.
        kwargs: The others of `LogitLoss`.
    """

    paper = "Zhao et al., CVPR 2022, arXiv 2203.08679"
    by_labels = True

    def __init__(
        self,
        kd_weight: Weight | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(kd_weight=WARM_UP if kd_weight is None else kd_weight, **kwargs)
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        check_temperature(temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`dkd_loss` of each sample."""
        return dkd_loss(student, teacher, labels, self.alpha, self.beta, self.temperature, per_sample=True)
