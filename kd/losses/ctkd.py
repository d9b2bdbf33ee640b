"""A temperature that is learned against the student, more and more as training goes on.

Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv 2211.16231.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dalikd.kd.losses.base import LogitLoss, StepOutputs, Weight, full_precision
from dalikd.kd.losses.kd import check_temperature, kd_loss

__all__ = ["CTKD"]


class CTKD(LogitLoss):
    """`kd_loss` with one temperature for all samples that is a parameter and is trained to make the loss larger.

    The temperature is `lowest + span * sigmoid(p)` (the paper's code; p starts at 1, which gives 15.6). The gradient of
    p is turned round and multiplied by lambda, which grows from 0 to 1 along a cosine. p belongs to the loss: the
    student's optimizer trains it, and it is never exported.

    Args:
        ce_weight: Weight of the cross-entropy of the original images; 1 on ImageNet.
        kd_weight: Weight of everything else; 1 on ImageNet.
        lowest: The lowest temperature, above 0.
        span: The highest less the lowest, above 0.
        ramp_epochs: Epochs in which lambda grows, above 0; 5 on ImageNet. The paper's code counts them from 1, and here
            they are counted as they go by, from 0.
        kwargs: The others of `LogitLoss`.
    """

    paper = "Li et al., AAAI 2023, arXiv 2211.16231"

    def __init__(
        self,
        ce_weight: Weight = 0.1,
        kd_weight: Weight = 0.9,
        lowest: float = 1.0,
        span: float = 20.0,
        ramp_epochs: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        for name, value in (("lowest", lowest), ("span", span), ("ramp_epochs", ramp_epochs)):
            check_temperature(value, name)
        self.lowest, self.span, self.ramp_epochs = lowest, span, ramp_epochs
        self.raw_temperature = nn.Parameter(torch.ones(()))

    def temperature(self, epoch: Tensor) -> Tensor:
        """The temperature, a scalar. On its way to the parameter a gradient is multiplied by -lambda."""
        ramp = (1 - torch.cos(math.pi * (epoch / self.ramp_epochs).clamp(0, 1))) / 2
        raw = full_precision(self.raw_temperature)
        raw = raw.detach() + ramp * (raw.detach() - raw)
        return self.lowest + self.span * raw.sigmoid()

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`kd_loss` at the present temperature."""
        temperature = self.temperature(epoch)
        student, teacher = (full_precision(logits) / temperature for logits in (student, teacher))
        return temperature**2 * kd_loss(student, teacher, 1.0)

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return the terms of `LogitLoss` and "temperature"."""
        return {**super().forward(outputs), "temperature": self.temperature(outputs.epoch)}
