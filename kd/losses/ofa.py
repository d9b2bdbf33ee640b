"""One for all: branches turn each stage of the student into logits, which any teacher's logits can be compared with.

Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", NeurIPS 2023,
arXiv 2310.19444.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.connectors import check_maps
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, check_weight, full_precision, weight_at
from dalikd.kd.losses.kd import check_temperature

__all__ = ["OFA", "ofa_loss"]


def ofa_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, epsilon: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy against the teacher's probabilities, the label's enhanced: (1 + p)^epsilon - 1 (eq. 6).

    -sum over the classes of ((p + y)^epsilon - y) log q, mean over the batch, with p the teacher's and q the student's
    probabilities and y 1 for the label, else 0. With epsilon 1 it is the cross-entropy of q against p.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        labels: int64 [B].
        epsilon: 1 or more: how much more the label counts where the teacher is sure of it.
        temperature: divides the logits of both nets; above 0.

    Returns:
        a scalar in float32 (float64 stays), finite for every finite logit.
    """
    logs = functional.log_softmax(full_precision(student_logits) / temperature, dim=1)
    target = functional.softmax(full_precision(teacher_logits) / temperature, dim=1)
    label = torch.zeros_like(target).scatter(1, labels[:, None], 1.0)
    return -(((target + label).pow(epsilon) - label) * logs).sum(1).mean()


class OFA(FeatureLoss):
    """`ofa_loss` of the logits, and of those of a branch on each stage of the student.

    A branch halves a stage's map by separable convolutions until it is as small as the last stage's, averages it and
    classifies. The tokens of a transformer are a map too: its branches are the same, without the paper's attention.

    Args:
        weight: Of the branches, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1).
        student_features: Which of the student's features have a branch, as numbers: 0 is the stem's, then one for each
            stage; default: all stages. Name a few of a transformer, where each block is a stage:
            [2, 5, 8, 11] of 12, whose numbers start at 0.
        kd_weight: Of the logits, 0 or more; a number, or a schedule over epochs.
        epsilon: Enhances the label where the teacher is sure of it, 1 or more; published 1 to 1.5.
        temperature: Divides the logits of both nets; above 0.
    """

    paper = "Hao et al., NeurIPS 2023, arXiv 2310.19444"
    counted = False

    def __init__(
        self,
        weight: Weight = 1.0,
        ce_weight: Weight = 1.0,
        label_smoothing: float = 0.0,
        student_features: list[int] | None = None,
        kd_weight: Weight = 1.0,
        epsilon: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weight, ce_weight, label_smoothing, student_features)
        check_weight("kd_weight", kd_weight)
        check_temperature(temperature)
        if not 1 <= epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}: give 1 or more")
        self.kd_weight, self.epsilon, self.temperature = kd_weight, epsilon, temperature

    @property
    def label_options(self) -> Sequence[str] | None:
        """None: the label's class is what it enlarges."""
        return None

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Make the branches, as wide at their end as the wider of the two nets' pooled features."""
        check_maps("OFA", *student)
        width = max(net.features[-1].shape[1] for net in context[:2])
        smallest = min(feature.shape[2] for feature in student)
        self.branches = nn.ModuleList(_branch(feature, smallest, width, context.classes) for feature in student)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """The sum over the branches."""
        logits = [branch(feature) for branch, feature in zip(self.branches, student, strict=True)]
        return torch.stack([self._distance(own, outputs) for own in logits]).sum()

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", "ce", "kd" of the logits, and "ofa" of the branches."""
        terms = super().forward(outputs)
        kd = self._distance(outputs.student.logits, outputs)
        return {**terms, "loss": terms["loss"] + weight_at(self.kd_weight, outputs.epoch) * kd, "kd": kd}

    def _distance(self, logits: Tensor, outputs: StepOutputs) -> Tensor:
        return ofa_loss(logits, outputs.teacher.logits, outputs.labels, self.epsilon, self.temperature)


def _branch(feature: Tensor, smallest: int, width: int, classes: int) -> nn.Sequential:
    channels, side = feature.shape[1], feature.shape[2]
    halvings = max(round(math.log2(side / smallest)), 0)
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 1)] if halvings == 0 else []
    for left in reversed(range(halvings)):
        wanted = 2 * channels if left else width
        layers += [*_separable(channels, channels, 2), *_separable(channels, wanted, 1)]
        channels = wanted
    branch = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return branch


def _separable(channels: int, wanted: int, stride: int) -> tuple[nn.Module, ...]:
    depthwise = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)
    return depthwise, nn.Conv2d(channels, wanted, 1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU()
