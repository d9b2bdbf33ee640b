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
from dalikd.kd.losses.crld import CRLD, crld_loss
from dalikd.kd.losses.ctkd import CTKD
from dalikd.kd.losses.dist import DIST, dist_loss
from dalikd.kd.losses.dkd import DKD, dkd_loss
from dalikd.kd.losses.fitnet import FitNet, hint_loss
from dalikd.kd.losses.fsp import FSP, fsp_loss
from dalikd.kd.losses.ft import FT, ft_loss
from dalikd.kd.losses.kd import KD, kd_loss
from dalikd.kd.losses.kdsvd import KDSVD, kdsvd_loss
from dalikd.kd.losses.mlkd import MLKD, mlkd_loss
from dalikd.kd.losses.nkd import NKD, nkd_loss
from dalikd.kd.losses.nst import NST, nst_loss
from dalikd.kd.losses.rld import RLD, rld_loss
from dalikd.kd.losses.sp import SP, sp_loss
from dalikd.kd.losses.ttm import TTM, WTTM, ttm_loss, wttm_loss
from dalikd.kd.losses.views import TwoViewLoss, Views

__all__ = [
    "AB",
    "AT",
    "CRLD",
    "CTKD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "KD",
    "KDSVD",
    "MLKD",
    "NKD",
    "NST",
    "RLD",
    "SP",
    "TTM",
    "WTTM",
    "DistillationLoss",
    "FeatureLoss",
    "FitNet",
    "LogitLoss",
    "LossContext",
    "MixedOutputs",
    "Schedule",
    "StepOutputs",
    "TwoViewLoss",
    "Views",
    "WeightedSum",
    "ab_loss",
    "at_loss",
    "crld_loss",
    "cross_entropy",
    "dist_loss",
    "dkd_loss",
    "fsp_loss",
    "ft_loss",
    "hint_loss",
    "kd_loss",
    "kdsvd_loss",
    "mixed_cross_entropy",
    "mlkd_loss",
    "nkd_loss",
    "nst_loss",
    "rld_loss",
    "sp_loss",
    "standardize_logits",
    "ttm_loss",
    "wttm_loss",
]
