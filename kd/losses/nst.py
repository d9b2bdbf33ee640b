"""Neuron selectivity transfer.

Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.connectors import check_maps, pool_alike
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["NST", "nst_loss"]


def nst_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Maximum mean discrepancy of the channels' activation maps, summed over the layers.

    Each channel's map is a sample, of length 1. The kernel of two samples is the square of their product: the paper's
    polynomial one with d = 2 and c = 0. It is meaned over channels and images.

    Args:
        student_features: [n, C, H, W] each. The larger of two maps is average-pooled to the size of the smaller.
        teacher_features: as many; channels may differ.

    Returns:
        A scalar in float32 (float64 stays), under autocast too.
    """
    terms = []
    for pair in zip(student_features, teacher_features, strict=True):
        pooled = pool_alike(*map(full_precision, pair))
        student, teacher = (functional.normalize(features.flatten(2), dim=2) for features in pooled)
        terms.append(_kernel(student, student) + _kernel(teacher, teacher) - 2 * _kernel(student, teacher))
    return torch.stack(terms).sum()


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    with torch.autocast(one.device.type, enabled=False):
        return (one @ other.mT).square().mean()


class NST(FeatureLoss):
    """Neuron selectivity transfer: where each channel is active, whatever its number (2017, arXiv 1707.01219).

    `ce_weight * CE(x) + weight * NST(x)` over all stages; see `nst_loss`.

    Args:
        weight: Of the discrepancy, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1).
        student_features: Numbers of the student's features, 0 for the stem's; default: all stages.
        teacher_features: The same of the teacher, as many.
    """

    paper = "Huang and Wang, 2017, arXiv 1707.01219"

    def __init__(
        self,
        weight: Weight = 50.0,
        ce_weight: Weight = 1.0,
        label_smoothing: float = 0.0,
        student_features: list[int] | None = None,
        teacher_features: list[int] | None = None,
    ) -> None:
        super().__init__(weight, ce_weight, label_smoothing, student_features, teacher_features)

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Refuse what are no maps."""
        check_maps("NST", *student, *teacher)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`nst_loss`."""
        return nst_loss(student, teacher)
