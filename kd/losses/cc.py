"""Correlation congruence, in the form of the protocol of contrastive distillation.

Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv 1904.01802. The paper compares whole
correlation matrices; this form, of neighbours in the batch, is that of Tian et al. (ICLR 2020, arXiv 1910.10699).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["CC", "cc_loss"]


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over neighbours i, i+1 of the batch of `sum_d |s - t|[i, d] * |s - t|[i + 1, d]`.

    It depends on the order of the batch, which a new order each epoch makes a random choice of pairs.

    Args:
        student: embeddings [B, D].
        teacher: embeddings [B, D].

    Returns:
        A scalar, computed in float32 (float64 stays); 0 for a batch of one image, which has no neighbour.
    """
    apart = (full_precision(student) - full_precision(teacher)).abs()
    return (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)


class CC(FeatureLoss):
    """Correlation congruence: `cc_loss` of linear embeddings, trained along, of both nets' pooled features.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
        feat_dim: Dimensions of the embeddings.
    """

    paper = "Peng et al., ICCV 2019, arXiv 1904.01802"
    places = slice(-1, None)

    def __init__(self, weight: Weight = 0.02, feat_dim: int = 128, **others: Any) -> None:
        super().__init__(weight, **others)
        if feat_dim < 1:
            raise ValueError(f"feat_dim is {feat_dim}: give 1 or more")
        self.feat_dim = feat_dim

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Two linear layers for each pair."""
        self.student_embeds, self.teacher_embeds = (
            nn.ModuleList(nn.Linear(feature[0].numel(), self.feat_dim) for feature in features)
            for features in (student, teacher)
        )

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:
        """`cc_loss`, summed over the pairs."""
        pairs = zip(self.student_embeds, student, self.teacher_embeds, teacher, strict=True)
        with torch.autocast(outputs.labels.device.type, enabled=False):  # 16 bits could overflow
            return torch.stack([cc_loss(_embedded(own, s), _embedded(its, t)) for own, s, its, t in pairs]).sum()


def _embedded(embed: nn.Module, features: Tensor) -> Tensor:
    return embed(full_precision(features).flatten(1))
