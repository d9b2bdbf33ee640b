"""The flow of solution procedure.

Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning", CVPR
2017.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dalikd.kd.connectors import connect_stages, pool_alike
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, first_alone, full_precision

__all__ = ["FSP", "fsp_loss"]


def fsp_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the FSP matrices, summed over the pairs of features that follow each other (eq. 1, 2).

    An FSP matrix [C, D] holds the products of each channel of one feature with each of the next, meaned over positions;
    the larger of the two maps is average-pooled to the size of the smaller.

    Args:
        student_features: two or more of [n, C, H, W].
        teacher_features: as many, of the same channels; sizes may differ.

    Returns:
        A scalar in float32 (float64 stays), under autocast too.
    """
    flows = zip(_flows(student_features), _flows(teacher_features), strict=True)
    return torch.stack([(student - teacher).square().mean() for student, teacher in flows]).sum()


def _flows(features: Sequence[Tensor]) -> list[Tensor]:
    pairs = [pool_alike(one, after) for one, after in pairwise(map(full_precision, features))]
    with torch.autocast(features[0].device.type, enabled=False):
        return [one.flatten(2) @ after.flatten(2).mT / one[0, 0].numel() for one, after in pairs]


class FSP(FeatureLoss):
    """The flow of solution procedure: how each stage's channels go with those of the one before (CVPR 2017).

    `ce_weight * CE(x) + weight * FSP(x)` over the stem and all stages; see `fsp_loss`. A weight of 1 / pairs makes the
    sum over the pairs their mean (1/3 for a stem and three stages). With first_epochs above 0 in two stages as in the
    paper: `weight * FSP(x)` alone, then `ce_weight * CE(x)` alone. The first epochs are part of the run: give that many
    more, and later milestones; in a sum of losses give the others a schedule that is 0 in them.

    Args:
        weight: Of the flows' difference, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        first_epochs: Epochs of the flows alone; 0: both parts are minimised all the time.
        connect: Bring the student's channels to the teacher's by 1x1 convolutions with batch normalisation, where they
            differ; not in the paper.
    """

    paper = "Yim et al., CVPR 2017"
    places = slice(0, -1)

    def __init__(
        self,
        weight: Weight = 50.0,
        ce_weight: Weight = 1.0,
        first_epochs: float = 0.0,
        connect: bool = False,
        **others: Any,
    ) -> None:
        weights = first_alone(weight, ce_weight, first_epochs)
        super().__init__(*weights, **others)
        self.connects, self.connectors = connect, nn.ModuleList()

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Refuse what has other channels, or connect it."""
        self.connectors = connect_stages("FSP", student, teacher, self.connects)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`fsp_loss`."""
        pairs = zip(self.connectors, student, strict=True)
        return fsp_loss([connector(features) for connector, features in pairs], teacher)
