"""Transformed teacher matching: the teacher alone is softened, as a power of its probabilities.

Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024, arXiv 2402.11148.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import LogitLoss, Weight, full_precision
from dalikd.kd.losses.kd import check_temperature, kd_loss, kl_rows

__all__ = ["TTM", "WTTM", "ttm_loss", "wttm_loss"]


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, gamma: float = 0.1) -> Tensor:
    """KL of the student's probabilities from the teacher's to the power of gamma, normalised; mean over the batch.

    Args:
        student_logits: [B, C]; their temperature is 1.
        teacher_logits: [B, C].
        gamma: above 0; 1 / T of a temperature T.

    Returns:
        A scalar, computed in float32 (float64 stays), finite for every finite logit.
    """
    return kd_loss(student_logits, teacher_logits, 1.0, 1 / gamma)


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, gamma: float = 0.1) -> Tensor:
    """`ttm_loss` with each sample weighted by the sum of p_t^gamma: the smoother the teacher, the larger.

    The weight lies between 1 (all on one class) and C^(1 - gamma) (all classes alike). Arguments as of `ttm_loss`.
    """
    powers = gamma * functional.log_softmax(full_precision(teacher_logits), dim=1)
    log_weight = powers.logsumexp(1, keepdim=True)
    rows = kl_rows(functional.log_softmax(full_precision(student_logits), dim=1), powers - log_weight)
    return (log_weight.squeeze(1).exp() * rows).mean()


class TTM(LogitLoss):
    """Transformed teacher matching (Zheng and Yang, ICLR 2024): `ttm_loss` beside the cross-entropy.

    Args:
        kd_weight: Weight of everything but the cross-entropy (beta in the paper); 45 for VGG-13 to VGG-8 on CIFAR-100.
        gamma: The power that the teacher's probabilities are raised to, above 0; 1 / T of a temperature T.
        kwargs: The others of `LogitLoss`.
    """

    paper = "Zheng and Yang, ICLR 2024, arXiv 2402.11148"

    def __init__(self, kd_weight: Weight = 45.0, gamma: float = 0.1, **kwargs: Any) -> None:
        super().__init__(kd_weight=kd_weight, **kwargs)
        check_temperature(gamma, "gamma")
        self.gamma = gamma

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`ttm_loss`."""
        return ttm_loss(student, teacher, self.gamma)


class WTTM(TTM):
    """Weighted transformed teacher matching (Zheng and Yang, ICLR 2024): `wttm_loss` beside the cross-entropy.

    Args:
        kd_weight: Weight of everything but the cross-entropy (beta in the paper). It goes with gamma: samples are
            weighted by up to C^(1 - gamma). The default is what the paper's code shows beside CRD, VGG-13 to VGG-8.
        gamma: The power that the teacher's probabilities are raised to, above 0.
        kwargs: The others of `LogitLoss`.
    """

    paper = "Zheng and Yang, ICLR 2024, arXiv 2402.11148"

    def __init__(self, kd_weight: Weight = 4.0, gamma: float = 0.2, **kwargs: Any) -> None:
        super().__init__(kd_weight, gamma, **kwargs)

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`wttm_loss`."""
        return wttm_loss(student, teacher, self.gamma)
