"""Refined logits: the teacher's confidence in whatever it predicts, and its order of the classes below the label.

Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025, arXiv 2408.07703.
"""

from typing import Any

from torch import Tensor

from dalikd.kd.losses.base import LogitLoss, Weight, check_weight, full_precision
from dalikd.kd.losses.dkd import WARM_UP, binary_kl, log_odds, masked_log_softmax
from dalikd.kd.losses.kd import check_temperature, kl_rows

__all__ = ["RLD", "rld_loss"]


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float | None = None,
    *,
    per_sample: bool = False,
) -> Tensor:
    """T_c^2 * alpha * sample confidence + T^2 * beta * masked correlation (Sun et al., 2024).

    Sample confidence is the KL between the teacher's (largest probability, rest) and the student's (probability of the
    label, rest). Masked correlation is the KL among the classes that the teacher puts below the label; it is 0 where
    there are none. So a wrong teacher neither lowers the label nor changes its order of the other classes.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        labels: int64 [B].
        alpha: weight of sample confidence.
        beta: weight of masked correlation.
        temperature: T > 0.
        confidence_temperature: T_c > 0; default: T.
        per_sample: give [B] instead of the mean.

    Returns:
        A scalar, computed in float32 (float64 stays), finite for every finite logit.
    """
    student, teacher = full_precision(student_logits), full_precision(teacher_logits)
    softness = confidence_temperature or temperature
    confidence = binary_kl(log_odds(student / softness, labels), log_odds(teacher / softness, teacher.argmax(1)))
    dropped = teacher >= teacher.gather(1, labels[:, None])
    correlation = kl_rows(*(masked_log_softmax(logits / temperature, dropped) for logits in (student, teacher)))
    rows = alpha * softness**2 * confidence + beta * temperature**2 * correlation
    return rows if per_sample else rows.mean()


class RLD(LogitLoss):
    """Distillation with refined logits (Sun et al., ICCV 2025): `rld_loss`, with a warm-up over 20 epochs.

    On mixed images it is the mean of the losses for both labels, by the shares of these.

    Args:
        kd_weight: Weight of everything but the cross-entropy; default: from 0 to 1 in 20 epochs (ImageNet: in 1). The
            paper's code counts epochs from 1, and here they are counted as they go by, from 0.
        alpha: Weight of the sample confidence, 0 or more.
        beta: Weight of the masked correlation; 8 for most pairs on CIFAR-100, 0.5 (ResNet-34 to 18) on ImageNet.
        temperature: Divides the logits of both nets; above 0; 1 on ImageNet.
        confidence_temperature: Divides them for the sample confidence instead; default: temperature, as in the
            command that the paper's code shows (its configuration begins with 1).
        kwargs: The others of `LogitLoss`.
    """

    paper = "Sun et al., ICCV 2025, arXiv 2408.07703"
    by_labels = True

    def __init__(
        self,
        kd_weight: Weight | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        confidence_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(kd_weight=WARM_UP if kd_weight is None else kd_weight, **kwargs)
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        check_temperature(temperature)
        if confidence_temperature is not None:
            check_temperature(confidence_temperature, "confidence_temperature")
        self.alpha, self.beta = alpha, beta
        self.temperature, self.confidence_temperature = temperature, confidence_temperature

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`rld_loss` of each sample."""
        temperatures = self.temperature, self.confidence_temperature
        return rld_loss(student, teacher, labels, self.alpha, self.beta, *temperatures, per_sample=True)
