"""Neuron selectivity transfer.

Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219.
"""

from collections.abc import Sequence
from typing import Any

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
    """

    paper = "Huang and Wang, 2017, arXiv 1707.01219"

    def __init__(
        self,
        weight: Weight = 50.0,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Refuse what are no maps."""
        check_maps("NST", *student, *teacher)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`nst_loss`."""
        return nst_loss(student, teacher)
