"""Hints.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.connectors import ConvRegressor
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["FitNet", "hint_loss"]


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two features of one shape (eq. 3, with the mean for half the norm).

    Returns:
        A scalar in float32 (float64 stays).
    """
    return functional.mse_loss(full_precision(student), full_precision(teacher))


class FitNet(FeatureLoss):
    """A hint: the student's features, through a convolution, are those of the teacher (ICLR 2015, arXiv 1412.6550).

    `ce_weight * CE(x) + weight * MSE(regressor(student), teacher)`, of the second stage (with more features named, the
    sum over them). Both are minimised together, as in Tian et al. (ICLR 2020, arXiv 1910.10699); in the paper the hint
    comes first, alone: give the weights schedules for that. See `ConvRegressor` for shapes that go together.

    Args:
        weight: Of the hint, 0 or more; a number, or a schedule over epochs.
    """

    paper = "Romero et al., ICLR 2015, arXiv 1412.6550"
    places = slice(2, 3)

    def __init__(
        self,
        weight: Weight = 100.0,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)
        self.regressors = nn.ModuleList()

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Make a regressor for each pair."""
        self.regressors = nn.ModuleList(map(ConvRegressor, student, teacher))

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`hint_loss` after the regressor."""
        triples = zip(self.regressors, student, teacher, strict=True)
        return torch.stack([hint_loss(regressor(one), other) for regressor, one, other in triples]).sum()
