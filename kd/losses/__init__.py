"""Losses: pure tensor functions, and one module a method."""

from dalikd.kd.losses.ab import AB, ab_loss
from dalikd.kd.losses.at import AT, at_loss
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
from dalikd.kd.losses.fitnet import FitNet, hint_loss
from dalikd.kd.losses.fsp import FSP, fsp_loss
from dalikd.kd.losses.ft import FT, ft_loss
from dalikd.kd.losses.kd import KD, kd_loss
from dalikd.kd.losses.kdsvd import KDSVD, kdsvd_loss
from dalikd.kd.losses.nst import NST, nst_loss
from dalikd.kd.losses.sp import SP, sp_loss

__all__ = [
    "AB",
    "AT",
    "FSP",
    "FT",
    "KD",
    "KDSVD",
    "NST",
    "SP",
    "DistillationLoss",
    "FeatureLoss",
    "FitNet",
    "LogitLoss",
    "LossContext",
    "MixedOutputs",
    "Schedule",
    "StepOutputs",
    "WeightedSum",
    "ab_loss",
    "at_loss",
    "cross_entropy",
    "fsp_loss",
    "ft_loss",
    "hint_loss",
    "kd_loss",
    "kdsvd_loss",
    "mixed_cross_entropy",
    "nst_loss",
    "sp_loss",
    "standardize_logits",
]
