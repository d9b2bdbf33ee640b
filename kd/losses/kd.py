"""Knowledge distillation by softened outputs, on original and on augmented images.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909.
"""

import math

from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import LogitLoss, Weight, full_precision

__all__ = ["KD", "check_temperature", "kd_loss", "kl_rows"]


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, teacher_temperature: float | None = None
) -> Tensor:
    """T^2 * KL(softmax(teacher / T_t) || softmax(student / T)), mean over the batch (Hinton et al., 2015).

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]. A gradient flows into these too: detach them where the teacher is being trained.
        temperature: T > 0.
        teacher_temperature: T_t > 0; default: T.

    Returns:
        A scalar, computed in float32 (float64 stays), finite for every finite logit.
    """
    student = functional.log_softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = functional.log_softmax(full_precision(teacher_logits) / (teacher_temperature or temperature), dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row [B], both as log-probabilities [B, C]."""
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raises ValueError for one that cannot divide logits."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name} is {temperature}: give a number above 0")


class KD(LogitLoss):
    """Hinton's distillation with augmented images as a further source of teacher knowledge.

    `ce_weight * CE(x) + kd_weight * (kd_share * KL(x) + ce_mix_share * CE(x') + kd_mix_share * KL(x'))` with
    originals x and augmented images x' (Wang et al., NeurIPS 2022); without these the first two terms. KL is `kd_loss`,
    CE(x') `mixed_cross_entropy`.

    Args:
        ce_weight: Weight of the cross-entropy of the original images (gamma in the paper), 0 or more; a number, or a
            schedule over epochs.
        kd_weight: Weight of everything else (alpha in the paper); likewise.
        temperature: Divides the logits of both nets in every KL term; above 0.
        teacher_temperature: Divides the teacher's instead; default: temperature.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        kd_share: Share of the KL on original images in kd_weight, 0 or more.
        ce_mix_share: Share of the cross-entropy on augmented images.
        kd_mix_share: Share of the KL on augmented images. With --augmentation identity the originals come twice, as
            published: 0 is plain distillation then.
        standardize: Compare standardised logits (Sun et al., CVPR 2024).
    """

    paper = "Hinton et al., 2015, arXiv 1503.02531"

    def __init__(
        self,
        ce_weight: Weight = 0.1,
        kd_weight: Weight = 0.9,
        temperature: float = 4.0,
        teacher_temperature: float | None = None,
        label_smoothing: float = 0.0,
        kd_share: float = 1.0,
        ce_mix_share: float = 0.0,
        kd_mix_share: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(ce_weight, kd_weight, label_smoothing, kd_share, ce_mix_share, kd_mix_share, standardize)
        check_temperature(temperature)
        if teacher_temperature is not None:
            check_temperature(teacher_temperature, "teacher_temperature")
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`kd_loss`."""
        return kd_loss(student, teacher, self.temperature, self.teacher_temperature)
