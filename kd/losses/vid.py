"""Variational information distillation: the teacher's features as a Gaussian around a regression of the student's.

Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv 1904.05835.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.connectors import check_maps, pool_alike
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, full_precision

__all__ = ["VID", "vid_loss"]

_EPS = 1e-5


def vid_loss(mean: Tensor, teacher: Tensor, log_scale: Tensor) -> Tensor:
    """Mean of `((mean - teacher)^2 / var + log var) / 2`, `var = softplus(log_scale) + 1e-5`: how unlikely the
    teacher's features are, but for a constant. It may be below 0, and is not 0 where they are met.

    Args:
        mean: what is expected of the teacher, [B, C, H, W].
        teacher: [B, C, H, W].
        log_scale: of each channel's variance, [C].

    Returns:
        A scalar, computed in float32 (float64 stays).
    """
    variance = (functional.softplus(full_precision(log_scale)) + _EPS)[:, None, None]
    return 0.5 * ((full_precision(mean) - full_precision(teacher)).square() / variance + variance.log()).mean()


class VID(FeatureLoss):
    """Variational information distillation: `vid_loss` of each stage's features, with a regression of three 1x1
    convolutions and a variance a channel, both trained along. Maps of other sizes are average-pooled to the smaller.

    Args:
        init_variance: Of each channel before training, above 1e-5.
    """

    paper = "Ahn et al., CVPR 2019, arXiv 1904.05835"

    def __init__(self, init_variance: float = 5.0, **others: Any) -> None:
        super().__init__(**others)
        if not _EPS < init_variance < math.inf:
            raise ValueError(f"init_variance is {init_variance}: give a number above {_EPS}")
        self.init_variance = init_variance

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """A regression and a variance for each pair."""
        check_maps("VID", *student, *teacher)
        pairs = [(one.shape[1], other.shape[1]) for one, other in zip(student, teacher, strict=True)]
        self.regressors = nn.ModuleList(_regressor(*channels) for channels in pairs)
        variance = self.init_variance - _EPS
        log_scale = variance + math.log(-math.expm1(-variance))  # softplus gives the variance
        self.log_scales = nn.ParameterList(torch.full((channels,), log_scale) for _, channels in pairs)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`vid_loss`, summed over the pairs."""
        losses = []
        for regressor, log_scale, *maps in zip(self.regressors, self.log_scales, student, teacher, strict=True):
            pooled, target = pool_alike(*maps)
            losses.append(vid_loss(regressor(pooled), target, log_scale))
        return torch.stack(losses).sum()


def _regressor(channels: int, wanted: int) -> nn.Sequential:
    """Three 1x1 convolutions without bias."""
    first, *others = (nn.Conv2d(source, wanted, 1, bias=False) for source in (channels, wanted, wanted))
    return nn.Sequential(first, nn.ReLU(), others[0], nn.ReLU(), others[1])
