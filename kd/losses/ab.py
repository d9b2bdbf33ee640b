"""Activation boundaries.

Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI 2019, arXiv
1811.03233.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dalikd.kd.connectors import check_maps, connectors
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, first_alone, full_precision

__all__ = ["AB", "ab_loss"]


def ab_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], margin: float = 1.0) -> Tensor:
    """How far the student's neurons are from being as active as the teacher's, and by the margin.

    For each neuron max(0, margin - s)^2 where the teacher's is above 0, else max(0, margin + s)^2: the paper's loss
    that can be differentiated. It is summed over neurons and meaned over images. The last layer counts 3/1000, each one
    before it half of the next one, as in the published code.

    Args:
        student_features: before the ReLU, [n, C, H, W] each.
        teacher_features: before the ReLU, of the same shapes.
        margin: above 0.

    Returns:
        A scalar in float32 (float64 stays); not 0 for equal features within the margin.
    """
    terms = []
    for depth, (one, other) in enumerate(zip(student_features, teacher_features, strict=True), 1):
        student, active = full_precision(one), other > 0
        missing = (margin + torch.where(active, -student, student)).clamp(min=0)
        terms.append(missing.square().sum() / len(student) * (0.003 * 2.0 ** (depth - len(student_features))))
    return torch.stack(terms).sum()


class AB(FeatureLoss):
    """Activation boundaries: which neurons are active, not how much (AAAI 2019, arXiv 1811.03233).

    In the first epochs the loss is `weight * AB(x)` over what comes before the last ReLU of all stages, afterwards it
    is `ce_weight * CE(x)`; see `ab_loss`. Where shapes differ, a convolution with batch normalisation connects the
    student's features (`ConvRegressor` without its ReLU). The first epochs are part of the run: give that many more,
    and later milestones. In them the classifier has no gradient, but weight decay goes on. In a sum of losses give the
    others a schedule that is 0 in the first epochs.

    Args:
        weight: Of the boundaries, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        margin: How far from the boundary a neuron should be, above 0.
        first_epochs: Epochs of the boundaries alone; 0: both parts are minimised all the time.
    """

    paper = "Heo et al., AAAI 2019, arXiv 1811.03233"
    needs = frozenset({"preactivations"})

    def __init__(
        self,
        weight: Weight = 1.0,
        ce_weight: Weight = 1.0,
        margin: float = 1.0,
        first_epochs: float = 30.0,
        **others: Any,
    ) -> None:
        weights = first_alone(weight, ce_weight, first_epochs)
        super().__init__(*weights, **others)
        if not 0 < margin < math.inf:
            raise ValueError(f"margin is {margin}: give a number above 0")
        self.margin, self.connectors = margin, nn.ModuleList()

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Make a connector for each pair of different shapes."""
        check_maps("AB", *student, *teacher)
        self.connectors = connectors(student, teacher)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`ab_loss` after the connectors."""
        pairs = zip(self.connectors, student, strict=True)
        return ab_loss([connector(features) for connector, features in pairs], teacher, self.margin)
