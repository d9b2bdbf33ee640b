"""Distillation through a token: the class token learns the labels, the distillation token learns the teacher.

Touvron et al., "Training Data-Efficient Image Transformers & Distillation Through Attention", ICML 2021,
arXiv 2012.12877.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dalikd.kd.backbones.layers import shape_of
from dalikd.kd.losses.base import DistillationLoss, LossContext, StepOutputs, check_smoothing, cross_entropy
from dalikd.kd.losses.kd import check_temperature, kd_loss

__all__ = ["DistillationToken"]


class DistillationToken(DistillationLoss):
    """`(1 - weight) * CE(class token, labels) + weight * D(distillation token, teacher)` on the originals.

    D is the cross-entropy against the teacher's best class where hard (eq. 3), else `kd_loss` (eq. 2). The student has
    a head for each token, such as timm:deit_tiny_distilled_patch16_224 and timm:levit_128s; its own logits, which are
    evaluated, are the mean of both.

    Args:
        weight: Of the distillation token, from 0 to 1.
        target: What it learns: the teacher's best class ("hard") or its softened probabilities ("soft").
        temperature: Divides the logits of both nets where soft; above 0.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); published 0.1, for the class
            token alone.
    """

    paper = "Touvron et al., ICML 2021, arXiv 2012.12877"
    needs = frozenset({"heads"})

    def __init__(
        self,
        weight: float = 0.5,
        target: Literal["hard", "soft"] = "hard",
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}: give a number from 0 to 1")
        if target not in ("hard", "soft"):
            raise ValueError(f'target is {target}: give "hard" or "soft"')
        check_smoothing(label_smoothing)
        check_temperature(temperature)
        self.weight, self.ce_weight, self.target = weight, 1 - weight, target
        self.temperature, self.label_smoothing = temperature, label_smoothing

    @property
    def uses_augmented(self) -> bool:
        """Both tokens learn from the originals."""
        return False

    @property
    def label_options(self) -> Sequence[str] | None:
        """The class token learns from labels alone, unless the distillation token has all the weight."""
        return [] if self.weight == 1 else None

    def build(self, context: LossContext) -> None:
        """Check the heads.

        Raises:
            ValueError: the student has not two of them, for the classes.
        """
        heads = context.student.heads
        if [tuple(head.shape[1:]) for head in heads] != [(context.classes,)] * 2:
            found = ", ".join(map(shape_of, heads)) or "none"
            raise ValueError(
                f"DistillationToken needs a student with two heads of {context.classes} classes, and its heads are "
                f"{found}: take one with a distillation token, such as --model timm:deit_tiny_distilled_patch16_224"
            )

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", "ce" of the class token and "kd" of the distillation token."""
        first, second = outputs.student.heads
        teacher = outputs.teacher.logits
        if self.target == "hard":
            kd = cross_entropy(second, teacher.argmax(1))
        else:
            kd = kd_loss(second, teacher, self.temperature)
        if not outputs.labelled:
            return {"loss": kd + 0 * first.sum(), "kd": kd}  # several processes wait for a gradient of every weight
        ce = cross_entropy(first, outputs.labels, self.label_smoothing)
        return {"loss": self.ce_weight * ce + self.weight * kd, "ce": ce, "kd": kd}
