"""Overhaul of feature distillation: features before the ReLU, where negative ones count only down to a margin.

Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv 1904.01866.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import shape_of
from dalikd.kd.connectors import check_maps
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["OFD", "margins", "ofd_loss"]

_RARE = 0.001  # probability of a negative value below which its mean is not asked for


def margins(norm: nn.BatchNorm2d) -> Tensor:
    """The mean of a channel's negative values after batch normalisation (eq. 5), [C], in the type of its weights.

    With weight s and bias m a channel is about normal, and the mean of its negative values is
    m - |s| pdf(m / s) / cdf(-m / |s|); -3 |s| where hardly any is negative.
    """
    deviation, mean = norm.weight.detach().double().abs().clamp(min=1e-12), norm.bias.detach().double()
    ratio = mean / deviation
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    found = mean - deviation * density / negative.clamp(min=_RARE)
    return torch.where(negative > _RARE, found, -3 * deviation).to(norm.weight.dtype)


def ofd_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """The partial L2 distance to max(teacher, margin) (eq. 3): nothing where teacher <= 0 and student <= max(teacher,
    margin); summed over channels and places, mean over the batch.

    Args:
        student: features before the ReLU [B, C, H, W].
        teacher: the same shape.
        margin: [C, 1, 1], negative.

    Returns:
        a scalar in float32 (float64 stays).
    """
    student, teacher = full_precision(student), full_precision(teacher)
    target = torch.maximum(teacher, margin.to(teacher.dtype))
    counts = (teacher > 0) | (student > target)
    return torch.where(counts, student - target, 0).square().sum((1, 2, 3)).mean()


class OFD(FeatureLoss):
    """Overhaul of feature distillation: `ofd_loss` of each stage; the last one counts 1, the one before 1/2, and so on.

    A 1x1 convolution and a batch norm bring the student's features to the teacher's channels; the teacher's are pooled
    to the student's size. The margins follow from the teacher's batch norms.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
    """

    paper = "Heo et al., ICCV 2019, arXiv 1904.01866"
    needs = frozenset({"preactivations", "teacher_norms"})

    def __init__(
        self,
        weight: Weight = 0.001,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:
        """Make the connectors, and the margins of the teacher's batch norms.

        Raises:
            ValueError: the teacher has no batch norm of as many channels before a ReLU.
        """
        check_maps("OFD", *student, *teacher)
        norms = self._norms(context)
        self.connectors = nn.ModuleList()
        for place, (source, target, norm) in enumerate(zip(student, teacher, norms, strict=True)):
            if norm is None or norm.num_features != target.shape[1]:
                found = "no batch norm" if norm is None else f"a batch norm of {norm.num_features} channels"
                raise ValueError(
                    f"OFD takes its margins from the batch norm before a ReLU, and the teacher's features "
                    f"{shape_of(target)} follow {found}: take a teacher such as resnet56, wrn_40_2, vgg13 or ResNet50, "
                    "name other stages with --loss.teacher_features, or take ReviewKD"
                )
            convolution = nn.Conv2d(source.shape[1], target.shape[1], 1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(target.shape[1])))
            self.register_buffer(f"margin{place}", margins(norm)[:, None, None], persistent=False)

    def _norms(self, context: LossContext) -> list[nn.BatchNorm2d | None]:
        """The batch norm before each of the teacher's features that are compared."""
        stages, norms = len(context.teacher.preactivations), context.teacher_norms
        by_place = [None, *(norms if len(norms) == stages else [None] * stages), None]
        return by_place[self.places] if self.teacher_features is None else [by_place[n] for n in self.teacher_features]

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`ofd_loss`, summed with halved weights from the last stage to the first."""
        losses = []
        for place, (source, target) in enumerate(zip(student, teacher, strict=True)):
            target = functional.adaptive_avg_pool2d(full_precision(target), (source.shape[2], source.shape[3]))
            loss = ofd_loss(self.connectors[place](source), target, getattr(self, f"margin{place}"))
            losses.append(loss / 2 ** (len(student) - 1 - place))
        return torch.stack(losses).sum()
