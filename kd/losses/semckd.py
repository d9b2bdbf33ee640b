"""Semantic calibration: attention says, image by image, which of the teacher's stages a stage of the student learns.

Chen et al., "Cross-Layer Distillation with Semantic Calibration", AAAI 2021, arXiv 2012.03236.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.connectors import check_maps, pool_alike
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["SemCKD"]

_NARROWING = 4  # the batch over the width of queries and keys


class SemCKD(FeatureLoss):
    """Every stage of the student against every stage of the teacher: mean squared differences, weighed by attention.

    Query and key of an image are made of its row in the matrix of inner products with the batch (eq. 5 to 7). So the
    batch of a process has the same size all through a run. Any numbers of stages do. Published on top of KD with
    weight 1, temperature 4 and a weight of 1 for the labels: a WeightedSum of both.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs; published 400 on CIFAR-100, 50 on
            ImageNet.
        temperature: Divides the products of queries and keys before the softmax; above 0.
    """

    paper = "Chen et al., AAAI 2021, arXiv 2012.03236"
    counted = False

    def __init__(
        self,
        weight: Weight = 400.0,
        temperature: float = 1.0,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}: give a number above 0")
        self.temperature = temperature

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:
        """Make queries, keys, and a projector for each pair.

        Raises:
            ValueError: features are no maps, or the batch is too small.
        """
        check_maps("SemCKD", *student, *teacher)
        if context.batch < _NARROWING:
            raise ValueError(
                f"SemCKD compares the images of a batch with each other, and a process has {context.batch}: give a "
                f"--batch_size of at least {_NARROWING} a process and accumulated part"
            )
        self.batch = context.batch
        self.queries, self.keys = (
            nn.ModuleList(_embedding(context.batch) for _ in features) for features in (student, teacher)
        )
        self.projectors = nn.ModuleList(
            nn.ModuleList(_projector(own.shape[1], other.shape[1]) for other in teacher) for own in student
        )

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """The weighed differences: a sum over the teacher's stages, a mean over images and the student's stages."""
        rows = []
        for own, projectors in zip(student, self.projectors, strict=True):
            pairs = [(projector, *pool_alike(own, other)) for projector, other in zip(projectors, teacher, strict=True)]  # pyright: ignore[reportArgumentType]
            differences = [full_precision(projector(one)) - full_precision(two) for projector, one, two in pairs]
            rows.append(torch.stack([difference.square().mean((1, 2, 3)) for difference in differences], dim=1))
        return (self.attention(student, teacher) * torch.stack(rows, dim=1)).sum(2).mean()

    def attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """[B, stages of the student, stages of the teacher], which sum to 1 over the last; never in half precision."""
        with torch.autocast(student[0].device.type, enabled=False):
            queries, keys = (
                torch.stack([embed(self._products(feature)) for embed, feature in pairs], dim=1)
                for pairs in (zip(self.queries, student, strict=True), zip(self.keys, teacher, strict=True))
            )
            unit_queries, unit_keys = functional.normalize(queries, dim=2), functional.normalize(keys, dim=2)
            return torch.softmax(unit_queries @ unit_keys.transpose(1, 2) / self.temperature, dim=2)

    def _products(self, feature: Tensor) -> Tensor:
        """Inner products of each image's features with those of all, [B, batch]."""
        rows = full_precision(feature).flatten(1)
        return rows @ rows.T


def _embedding(batch: int) -> nn.Sequential:
    width = batch // _NARROWING
    return nn.Sequential(nn.Linear(batch, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def _projector(channels: int, wanted: int) -> nn.Sequential:
    middle = 2 * wanted
    return nn.Sequential(
        nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
        nn.Conv2d(middle, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
        nn.Conv2d(middle, wanted, 1, bias=False),
    )  # fmt: skip
