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
from dalikd.kd.losses.catkd import CATKD, class_attention
from dalikd.kd.losses.cc import CC, cc_loss
from dalikd.kd.losses.crd import CRD, crd_draws, crd_loss, crd_places, crd_scores
from dalikd.kd.losses.crld import CRLD, crld_loss
from dalikd.kd.losses.ctkd import CTKD
from dalikd.kd.losses.dist import DIST, dist_loss
from dalikd.kd.losses.dkd import DKD, dkd_loss
from dalikd.kd.losses.fitnet import FitNet, hint_loss
from dalikd.kd.losses.fsp import FSP, fsp_loss
from dalikd.kd.losses.ft import FT, ft_loss
from dalikd.kd.losses.hsakd import HSAKD, hsakd_mutual_loss, hsakd_teacher_loss
from dalikd.kd.losses.kd import KD, kd_loss
from dalikd.kd.losses.kdsvd import KDSVD, kdsvd_loss
from dalikd.kd.losses.logits import Logits, logits_loss
from dalikd.kd.losses.mlkd import MLKD, mlkd_loss
from dalikd.kd.losses.nkd import NKD, nkd_loss
from dalikd.kd.losses.nst import NST, nst_loss
from dalikd.kd.losses.ofa import OFA, ofa_loss
from dalikd.kd.losses.ofd import OFD, ofd_loss
from dalikd.kd.losses.pkt import PKT, pkt_loss
from dalikd.kd.losses.reviewkd import ReviewKD, hcl_loss
from dalikd.kd.losses.rkd import RKD, rkd_loss
from dalikd.kd.losses.rld import RLD, rld_loss
from dalikd.kd.losses.semckd import SemCKD
from dalikd.kd.losses.simkd import ReusedClassifier, SimKD, load_simkd
from dalikd.kd.losses.sp import SP, sp_loss
from dalikd.kd.losses.srd import SRD, log_sum_distance
from dalikd.kd.losses.srrl import SRRL
from dalikd.kd.losses.token import DistillationToken
from dalikd.kd.losses.ttm import TTM, WTTM, ttm_loss, wttm_loss
from dalikd.kd.losses.vid import VID, vid_loss
from dalikd.kd.losses.views import TwoViewLoss, Views

__all__ = [
    "AB",
    "AT",
    "CATKD",
    "CC",
    "CRD",
    "CRLD",
    "CTKD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "HSAKD",
    "KD",
    "KDSVD",
    "MLKD",
    "NKD",
    "NST",
    "OFA",
    "OFD",
    "PKT",
    "RKD",
    "RLD",
    "SP",
    "SRD",
    "SRRL",
    "TTM",
    "VID",
    "WTTM",
    "DistillationLoss",
    "DistillationToken",
    "FeatureLoss",
    "FitNet",
    "LogitLoss",
    "Logits",
    "LossContext",
    "MixedOutputs",
    "ReusedClassifier",
    "ReviewKD",
    "Schedule",
    "SemCKD",
    "SimKD",
    "StepOutputs",
    "TwoViewLoss",
    "Views",
    "WeightedSum",
    "ab_loss",
    "at_loss",
    "cc_loss",
    "class_attention",
    "crd_draws",
    "crd_loss",
    "crd_places",
    "crd_scores",
    "crld_loss",
    "cross_entropy",
    "dist_loss",
    "dkd_loss",
    "fsp_loss",
    "ft_loss",
    "hcl_loss",
    "hint_loss",
    "hsakd_mutual_loss",
    "hsakd_teacher_loss",
    "kd_loss",
    "kdsvd_loss",
    "load_simkd",
    "log_sum_distance",
    "logits_loss",
    "mixed_cross_entropy",
    "mlkd_loss",
    "nkd_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "pkt_loss",
    "rkd_loss",
    "rld_loss",
    "sp_loss",
    "standardize_logits",
    "ttm_loss",
    "vid_loss",
    "wttm_loss",
]
