"""Similarity-preserving distillation.

Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import FeatureLoss, StepOutputs, Weight, full_precision

__all__ = ["SP", "sp_loss"]


def sp_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Squared difference of the batch's similarity matrices over n^2, summed over the layers (eq. 1 to 3).

    A similarity matrix [n, n] holds the products of each two images' features; its rows have length 1.

    Args:
        student_features: [n, ...] each, of any shape.
        teacher_features: as many.

    Returns:
        A scalar in float32 (float64 stays), under autocast too.
    """
    terms = []
    for pair in zip(student_features, teacher_features, strict=True):
        student, teacher = map(_similarities, pair)
        terms.append((student - teacher).square().sum() / len(student) ** 2)
    return torch.stack(terms).sum()


def _similarities(features: Tensor) -> Tensor:
    rows = full_precision(features).flatten(1)
    with torch.autocast(rows.device.type, enabled=False):
        return functional.normalize(rows @ rows.mT)


class SP(FeatureLoss):
    """Similarity-preserving distillation: which images of a batch are alike (ICCV 2019, arXiv 1907.09682).

    `ce_weight * CE(x) + weight * SP(x)` of the last stage; see `sp_loss`. Each process compares its own images.

    Args:
        weight: Of the similarities' difference, 0 or more; a number, or a schedule over epochs.
    """

    paper = "Tung and Mori, ICCV 2019, arXiv 1907.09682"
    places = slice(-2, -1)

    def __init__(
        self,
        weight: Weight = 3000.0,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`sp_loss`."""
        return sp_loss(student, teacher)
