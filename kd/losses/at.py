"""Attention transfer.

Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer", ICLR 2017, arXiv 1612.03928.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.connectors import check_maps, pool_alike
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["AT", "at_loss", "attention_map", "check_power"]


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """The mean of |features|^p over the channels, flattened and of length 1 (section 3.1).

    Args:
        features: [n, C, H, W].
        p: 1 or more.

    Returns:
        [n, H * W], in float32 (float64 stays); 0 where all features are.
    """
    return functional.normalize(full_precision(features).abs().pow(p).mean(1).flatten(1))


def at_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """Mean squared difference of the attention maps, summed over the layers (eq. 2, with the mean for the norm).

    Args:
        student_features: [n, C, H, W] each. The larger of two maps is average-pooled to the size of the smaller.
        teacher_features: as many; channels may differ.
        p: power of the attention maps.

    Returns:
        A scalar in float32 (float64 stays).
    """
    terms = []
    for pair in zip(student_features, teacher_features, strict=True):
        student, teacher = (attention_map(features, p) for features in pool_alike(*map(full_precision, pair)))
        terms.append((student - teacher).square().mean())
    return torch.stack(terms).sum()


def check_power(name: str, power: float) -> None:
    """Raises ValueError for a power whose gradient is not finite at 0."""
    if not 1 <= power < math.inf:
        raise ValueError(f"{name} is {power}: give a number of 1 or more")


class AT(FeatureLoss):
    """Attention transfer: where in the image the stages of both nets are active (ICLR 2017, arXiv 1612.03928).

    `ce_weight * CE(x) + weight * AT(x)` over all stages; see `at_loss`.

    Args:
        weight: Of the attention maps' difference, 0 or more; a number, or a schedule over epochs.
        p: Power of the attention maps, 1 or more.
    """

    paper = "Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928"

    def __init__(
        self,
        weight: Weight = 1000.0,
        p: float = 2.0,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)
        check_power("p", p)
        self.p = p

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Refuse what are no maps."""
        check_maps("AT", *student, *teacher)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`at_loss`."""
        return at_loss(student, teacher, self.p)
