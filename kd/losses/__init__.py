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
from dalikd.kd.losses.catkd import CATKD, class_attention
from dalikd.kd.losses.kd import KD, kd_loss
from dalikd.kd.losses.ofa import OFA, ofa_loss
from dalikd.kd.losses.ofd import OFD, ofd_loss
from dalikd.kd.losses.reviewkd import ReviewKD, hcl_loss
from dalikd.kd.losses.semckd import SemCKD
from dalikd.kd.losses.simkd import ReusedClassifier, SimKD, load_simkd
from dalikd.kd.losses.srd import SRD, log_sum_distance
from dalikd.kd.losses.srrl import SRRL
from dalikd.kd.losses.token import DistillationToken

__all__ = [
    "CATKD",
    "KD",
    "OFA",
    "OFD",
    "SRD",
    "SRRL",
    "DistillationLoss",
    "DistillationToken",
    "FeatureLoss",
    "LogitLoss",
    "LossContext",
    "MixedOutputs",
    "ReusedClassifier",
    "ReviewKD",
    "Schedule",
    "SemCKD",
    "SimKD",
    "StepOutputs",
    "WeightedSum",
    "class_attention",
    "cross_entropy",
    "hcl_loss",
    "kd_loss",
    "load_simkd",
    "log_sum_distance",
    "mixed_cross_entropy",
    "ofa_loss",
    "ofd_loss",
    "standardize_logits",
]
