"""Losses: pure tensor functions, and one module a method."""

from dalikd.kd.losses.base import (
    DistillationLoss,
    FeatureLoss,
    LogitLoss,
    LossContext,
    MixedOutputs,
    Schedule,
    StepOutputs,
    WeightedSum,
    cross_entropy,
    mixed_cross_entropy,
    standardize_logits,
)
from dalikd.kd.losses.hsakd import hsakd_mutual_loss, hsakd_student_loss, hsakd_teacher_loss
from dalikd.kd.losses.kd import KD, kd_loss

__all__ = [
    "KD",
    "DistillationLoss",
    "FeatureLoss",
    "LogitLoss",
    "LossContext",
    "MixedOutputs",
    "Schedule",
    "StepOutputs",
    "WeightedSum",
    "cross_entropy",
    "hsakd_mutual_loss",
    "hsakd_student_loss",
    "hsakd_teacher_loss",
    "kd_loss",
    "mixed_cross_entropy",
    "standardize_logits",
]
