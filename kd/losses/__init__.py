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
from dalikd.kd.losses.cc import CC, cc_loss
from dalikd.kd.losses.crd import CRD, crd_draws, crd_loss, crd_scores
from dalikd.kd.losses.kd import KD, kd_loss
from dalikd.kd.losses.logits import Logits, logits_loss
from dalikd.kd.losses.pkt import PKT, pkt_loss
from dalikd.kd.losses.rkd import RKD, rkd_loss
from dalikd.kd.losses.vid import VID, vid_loss

__all__ = [
    "CC",
    "CRD",
    "KD",
    "PKT",
    "RKD",
    "VID",
    "DistillationLoss",
    "FeatureLoss",
    "LogitLoss",
    "Logits",
    "LossContext",
    "MixedOutputs",
    "Schedule",
    "StepOutputs",
    "WeightedSum",
    "cc_loss",
    "crd_draws",
    "crd_loss",
    "crd_scores",
    "cross_entropy",
    "kd_loss",
    "logits_loss",
    "mixed_cross_entropy",
    "pkt_loss",
    "rkd_loss",
    "standardize_logits",
    "vid_loss",
]
