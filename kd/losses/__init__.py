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
from dalikd.kd.losses.crld import CRLD, crld_loss
from dalikd.kd.losses.ctkd import CTKD
from dalikd.kd.losses.dist import DIST, dist_loss
from dalikd.kd.losses.dkd import DKD, dkd_loss
from dalikd.kd.losses.kd import KD, kd_loss
from dalikd.kd.losses.mlkd import MLKD, mlkd_loss
from dalikd.kd.losses.nkd import NKD, nkd_loss
from dalikd.kd.losses.rld import RLD, rld_loss
from dalikd.kd.losses.ttm import TTM, WTTM, ttm_loss, wttm_loss
from dalikd.kd.losses.views import TwoViewLoss, Views

__all__ = [
    "CRLD",
    "CTKD",
    "DIST",
    "DKD",
    "KD",
    "MLKD",
    "NKD",
    "RLD",
    "TTM",
    "WTTM",
    "DistillationLoss",
    "FeatureLoss",
    "LogitLoss",
    "LossContext",
    "MixedOutputs",
    "Schedule",
    "StepOutputs",
    "TwoViewLoss",
    "Views",
    "WeightedSum",
    "crld_loss",
    "cross_entropy",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "mixed_cross_entropy",
    "mlkd_loss",
    "nkd_loss",
    "rld_loss",
    "standardize_logits",
    "ttm_loss",
    "wttm_loss",
]
