"""Knowledge distillation by softened outputs, on original and on augmented images.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import DistillationLoss, StepOutputs, cross_entropy, full_precision, mixed_cross_entropy

__all__ = ["KD", "kd_loss"]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Hinton et al., 2015).

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]. A gradient flows into these too: detach them where the teacher is being trained.
        temperature: T > 0.

    Returns:
        A scalar, computed in float32 (float64 stays), finite for every finite logit.
    """
    student = functional.log_softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = functional.log_softmax(full_precision(teacher_logits) / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class KD(DistillationLoss):
    """Hinton's distillation with augmented images as a further source of teacher knowledge.

    With augmented images x' beside the originals x (Wang et al., NeurIPS 2022):
    `ce_weight * CE(x) + kd_weight * (lw_mix[0] * KL(x) + lw_mix[1] * CE(x') + lw_mix[2] * KL(x'))`.
    Without them: `ce_weight * CE(x) + kd_weight * lw_mix[0] * KL(x)`. KL is `kd_loss`, CE(x') `mixed_cross_entropy`.

    Args:
        ce_weight: Weight of the cross-entropy of the original images (gamma in the paper), 0 or more.
        kd_weight: Weight of everything else (alpha in the paper), 0 or more.
        temperature: Divides the logits of both nets in every KL term; above 0.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        lw_mix: Inner weights of KL on originals, cross-entropy on augmented images and KL on augmented images.
    """

    def __init__(
        self,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        lw_mix: tuple[float, float, float] = (1.0, 0.0, 1.0),
    ) -> None:
        super().__init__()
        for name, weight in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}: give 0 or more")
        _check(temperature, label_smoothing, lw_mix)
        kd_share, ce_mix_share, kd_mix_share = lw_mix
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.weights = {
            "ce": ce_weight,
            "kd": kd_weight * kd_share,
            "ce_mix": kd_weight * ce_mix_share,
            "kd_mix": kd_weight * kd_mix_share,
        }
        self.uses_mixed_labels = ce_mix_share != 0

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", "ce", "kd"; with augmented images also "kd_mix", and "ce_mix" where `lw_mix[1]` is not 0."""
        student, mixed = outputs.student.logits, outputs.mixed
        terms = {
            "ce": cross_entropy(student, outputs.labels, self.label_smoothing),
            "kd": kd_loss(student, outputs.teacher.logits, self.temperature),
        }
        if mixed is not None:
            if self.uses_mixed_labels:
                terms["ce_mix"] = mixed_cross_entropy(
                    mixed.student_logits, mixed.labels, mixed.partner_labels, mixed.lam, self.label_smoothing
                )
            terms["kd_mix"] = kd_loss(mixed.student_logits, mixed.teacher_logits, self.temperature)
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": total, **terms}


def _check(temperature: float, label_smoothing: float, lw_mix: tuple[float, ...]) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: give a number above 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: give a number in [0, 1)")
    if len(lw_mix) != 3 or not all(0 <= weight < math.inf for weight in lw_mix):
        raise ValueError(f"lw_mix is {lw_mix}: give three numbers, each 0 or more (KL on x, CE on x', KL on x')")
