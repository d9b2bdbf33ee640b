"""The role of the projector: pooled features, projected and batch-normalised, by the logarithm of a sum of powers.

Miles and Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024, arXiv 2303.11098.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["SRD", "log_sum_distance"]

_TINY = 1e-5  # within the logarithm


def log_sum_distance(student: Tensor, teacher: Tensor, alpha: float = 4.0) -> Tensor:
    """log(sum of |student - teacher|^alpha + 1e-5) over batch and width.

    Args:
        student: features [B, D].
        teacher: features [B, D].
        alpha: the power, 1 or more.

    Returns:
        a scalar in float32 (float64 stays); log(1e-5) where they are equal.
    """
    difference = full_precision(student) - full_precision(teacher)
    return torch.log(difference.abs().pow(alpha).sum() + _TINY)


class SRD(FeatureLoss):
    """`log_sum_distance` of the pooled features: a linear layer brings the student's to the teacher's width, and both
    are normalised over the batch, without scale and shift. Batches of two images or more.

    Published for ImageNet with a weight of 2 beside KD of temperature 1 and weight 1: a WeightedSum of both.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1).
        alpha: Power of the differences, 1 or more: how much more large ones count.
    """

    paper = "Miles and Mikolajczyk, AAAI 2024, arXiv 2303.11098"
    places = slice(-1, None)

    def __init__(
        self, weight: Weight = 2.0, ce_weight: Weight = 1.0, label_smoothing: float = 0.0, alpha: float = 4.0
    ) -> None:
        super().__init__(weight, ce_weight, label_smoothing)
        if not 1 <= alpha < math.inf:
            raise ValueError(f"alpha is {alpha}: give 1 or more")
        self.alpha = alpha

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Make the projector and the two normalisations."""
        width = teacher[0].shape[1]
        self.projector = nn.Linear(student[0].shape[1], width)
        self.student_norm, self.teacher_norm = (nn.BatchNorm1d(width, eps=1e-4, affine=False) for _ in range(2))

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """The distance of the projected and normalised features, none of it in half precision."""
        with torch.autocast(student[0].device.type, enabled=False):
            own = self.student_norm(self.projector(full_precision(student[0])))
            return log_sum_distance(own, self.teacher_norm(full_precision(teacher[0])), self.alpha)
