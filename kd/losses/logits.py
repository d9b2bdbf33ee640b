"""Regression of the teacher's logits.

Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv 1312.6184.
"""

from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import LogitLoss, full_precision

__all__ = ["Logits", "logits_loss"]


def logits_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the logits, over the batch and the classes.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].

    Returns:
        A scalar, computed in float32 (float64 stays).
    """
    return functional.mse_loss(full_precision(student_logits), full_precision(teacher_logits))


class Logits(LogitLoss):
    """The student's logits shall be the teacher's: `ce_weight * CE(x) + kd_weight * (kd_share * D(x) + ...)`, where D
    is the mean squared difference (Ba and Caruana, 2014).

    Args:
        ce_weight: Weight of the cross-entropy of the original images, 0 or more; a number, or a schedule over epochs.
        kd_weight: Weight of everything else; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        kd_share: Share of D on original images in kd_weight, 0 or more.
        ce_mix_share: Share of the cross-entropy on augmented images.
        kd_mix_share: Share of D on augmented images.
        standardize: Compare standardised logits (Sun et al., CVPR 2024).
    """

    paper = "Ba and Caruana, NeurIPS 2014, arXiv 1312.6184"

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`logits_loss`."""
        return logits_loss(student, teacher)
