"""Knowledge review: each stage of the student, with what deeper ones passed up, learns a stage of the teacher.

Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision
from dalikd.kd.losses.dkd import WARM_UP

__all__ = ["ReviewKD", "hcl_loss"]

_LEVELS = (4, 2, 1)  # sides of the pooled maps
_WIDEST = 512  # channels of what is passed up


def hcl_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """The hierarchical context loss (section 3.3): mean squared differences of maps, and of these pooled.

    A map's own difference counts 1, those of the maps pooled to 4 x 4, 2 x 2 and 1 x 1, as far as they are smaller,
    1/2, 1/4 and 1/8; the sum is divided by the sum of these shares.

    Args:
        student_features: maps [B, C, H, W].
        teacher_features: maps of the same shapes, one for each.

    Returns:
        a scalar, the sum over the maps; float32 (float64 stays).
    """
    losses = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        difference = full_precision(student) - full_precision(teacher)  # pooling is linear
        sides = [side for side in _LEVELS if side < student.shape[2]]
        pooled = [functional.adaptive_avg_pool2d(difference, side).square().mean() for side in sides]
        shares = [0.5**level for level in range(len(sides) + 1)]
        parts = zip(shares, [difference.square().mean(), *pooled], strict=True)
        losses.append(torch.stack([share * part for share, part in parts]).sum() / sum(shares))
    return torch.stack(losses).sum()


class ReviewKD(FeatureLoss):
    """Knowledge review: features are fused from the deepest to the shallowest, and compared by `hcl_loss`.

    Sizes and channels follow from the nets. Published weights differ by pair: 0.6 to 8 on CIFAR-100 (5 for resnet32x4
    to resnet8x4), 1 on ImageNet, all with the same warm-up.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs; default: from 0 to 1 over the first
            20 epochs.
        teacher_preactivations: Compare with what comes before the last ReLU of the teacher's stages, as published;
            false where a net does not give that, as those of timm.
    """

    paper = "Chen et al., CVPR 2021, arXiv 2104.09044"
    places = slice(1, None)

    def __init__(
        self,
        weight: Weight | None = None,
        teacher_preactivations: bool = True,
        **others: Any,
    ) -> None:
        warm = WARM_UP if weight is None else weight
        super().__init__(warm, **others)
        self.teacher_preactivations = teacher_preactivations

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of both nets, as the option says."""
        return frozenset({"preactivations" if self.teacher_preactivations else "features"})

    def choose(self, student: NetOutput, teacher: NetOutput) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The student's features are those after the last ReLU."""
        return (
            self._chosen(student.features, self.student_features, "student"),
            self._chosen(self._given(teacher), self.teacher_features, "teacher"),
        )

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Make the fusions. Any two maps can be compared: they are brought to the teacher's size."""
        middle = min(_WIDEST, student[-1].shape[1])
        last = len(student) - 1
        self.fusions = nn.ModuleList(
            _Fusion(source.shape[1], middle, target.shape[1], fuses=place < last)
            for place, (source, target) in enumerate(zip(student, teacher, strict=True))
        )

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`hcl_loss` of the fused features."""
        targets, passed, found = [_as_map(target) for target in teacher], None, []
        for source, target, fusion in reversed(list(zip(student, targets, self.fusions, strict=True))):
            restored, passed = fusion(_as_map(source), passed, tuple(target.shape[2:]))
            found.append(restored)
        return hcl_loss(found[::-1], targets)


class _Fusion(nn.Module):
    """Attention-based fusion (figure 4a of the paper): a stage's features and what the deeper ones pass up, weighed by
    an attention map each.

    Args:
        channels: of the student's features.
        middle: channels of what is passed up.
        wanted: channels of the teacher's features.
        fuses: whether something is passed up to it.
    """

    def __init__(self, channels: int, middle: int, wanted: int, *, fuses: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(channels, middle, 1, bias=False)
        widen = nn.Conv2d(middle, wanted, 3, padding=1, bias=False)
        for convolution in (narrow, widen):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(narrow, nn.BatchNorm2d(middle))
        self.restore = nn.Sequential(widen, nn.BatchNorm2d(wanted))
        self.attend = nn.Conv2d(2 * middle, 2, 1) if fuses else None

    def forward(self, features: Tensor, passed: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is compared [n, wanted, *size], and what is passed on [n, middle, *size]."""
        hidden = self.reduce(features)
        if self.attend is not None and passed is not None:
            passed = functional.interpolate(passed, (hidden.shape[2], hidden.shape[3]), mode="nearest")
            own, other = self.attend(torch.cat((hidden, passed), dim=1)).sigmoid().split(1, dim=1)
            hidden = hidden * own + passed * other
        if tuple(hidden.shape[2:]) != size:
            hidden = functional.interpolate(hidden, size, mode="nearest")
        return self.restore(hidden), hidden


def _as_map(feature: Tensor) -> Tensor:
    """The pooled features [n, D] as a map [n, D, 1, 1]."""
    return feature[:, :, None, None] if feature.dim() == 2 else feature
