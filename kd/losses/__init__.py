"""Losses: pure tensor functions, and one module a method."""

from dalikd.kd.losses.base import (
    DistillationLoss,
    LossContext,
    MixedOutputs,
    StepOutputs,
    WeightedSum,
    cross_entropy,
    mixed_cross_entropy,
)
from dalikd.kd.losses.kd import KD, kd_loss

__all__ = [
    "KD",
    "DistillationLoss",
    "LossContext",
    "MixedOutputs",
    "StepOutputs",
    "WeightedSum",
    "cross_entropy",
    "kd_loss",
    "mixed_cross_entropy",
]
