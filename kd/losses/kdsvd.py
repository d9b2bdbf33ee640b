"""Distillation of singular vectors.

Lee, Kim and Song, "Self-supervised Knowledge Distillation Using Singular Value Decomposition", ECCV 2018, arXiv
1807.06819.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import shape_of
from dalikd.kd.connectors import connect_stages
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["KDSVD", "kdsvd_loss"]

#: of the largest squared singular value: what is smaller is taken for 0, and what is nearer for equal
_TOLERANCE = 1e-6


def kdsvd_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    k: int = 1,
    *,
    teacher_signs: Sequence[Tensor] | None = None,
) -> Tensor:
    """How the main channel patterns of a layer go with those of the layer before, by radial basis functions.

    Of each image's features, as a matrix of positions and channels, the first k right singular vectors are taken. Each
    vector of the teacher meets that of the student's first k + 3 which is nearest to it, turned to its side. Both are
    multiplied by the teacher's singular values (together of length 1). For layers a and b that follow each other,
    exp(-(a_i - b_j)^2 / 8) of all channels i and j is compared between the nets: squared differences, summed over
    channels and vectors, meaned over images.

    It differs from the published code in three ways. The sign of a singular vector is arbitrary, and the published loss
    changes with the teacher's: here the component of largest magnitude is positive. Vectors of a singular value of 0
    are arbitrary, and count as 0. The gradient of a vector is infinite where its singular value equals another one:
    such parts of it are left out, so that it is finite for dead channels, and for features that are all 0. Squared
    singular values are taken for 0 below 1e-6 of the largest, and for equal within it.

    On CUDA it waits for the device: torch's decomposition reads whether it converged.

    Args:
        student_features: two or more of [n, C, H, W].
        teacher_features: as many, of the same channels; sizes may differ.
        k: singular vectors that are compared, at most the channels and positions of each feature.
        teacher_signs: signs of the largest components instead, [n, k] for each layer.

    Returns:
        A scalar in float32 (float64 stays), under autocast too.
    """
    students, teachers = [], []
    for number, (one, other) in enumerate(zip(student_features, teacher_features, strict=True)):
        teacher, values = _singular_vectors(other, k)
        largest = teacher.gather(1, teacher.abs().argmax(1, keepdim=True))
        teacher = teacher * torch.where(largest < 0, -1.0, 1.0).to(teacher)
        if teacher_signs is not None:
            teacher = teacher * teacher_signs[number][:, None].to(teacher)
        student, _ = _singular_vectors(one, k + 3)
        cosines = (student.detach()[..., None] * teacher[:, :, None]).sum(1)  # [n, k + 3, k]
        nearest = cosines.abs().argmax(1, keepdim=True)
        student = student.gather(2, nearest.expand(-1, student.shape[1], -1)) * cosines.gather(1, nearest).sign()
        weights = functional.normalize(values)[:, None]
        students.append(student * weights)
        teachers.append(teacher * weights)
    terms = []
    for (before, after), (teacher_before, teacher_after) in zip(pairwise(students), pairwise(teachers), strict=True):
        difference = _radial(before, after) - _radial(teacher_before, teacher_after)
        terms.append(difference.square().sum() / len(difference))
    return torch.stack(terms).sum()


def _singular_vectors(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors [n, C, count], and their singular values [n, count], these without gradient.

    By the eigenvectors of the smaller matrix of products. These are found without gradient, and then moved to the first
    order by a change of the matrix that is 0: unlike in torch's own gradient, nothing is divided by zero where
    eigenvalues are equal.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = full_precision(features).flatten(2)  # [n, C, positions]
        wide = rows.shape[1] > rows.shape[2]
        products = rows.mT @ rows if wide else rows @ rows.mT
        fixed = products.detach().nan_to_num(posinf=0.0, neginf=0.0)  # a diverged run is the loop's to name
        values, basis = torch.linalg.eigh(fixed)  # ascending
        top, vectors = values[:, -count:].flip(1), basis[..., -count:].flip(2)
        least = _TOLERANCE * values[:, -1:]
        gaps = top[:, None] - values[..., None]  # [n, side, count]
        shares = torch.where(gaps.abs() > least[..., None], 1 / gaps, 0.0)
        vectors = vectors + basis @ (shares * (basis.mT @ ((products - products.detach()) @ vectors)))
        vectors = functional.normalize(rows @ vectors, dim=1) if wide else vectors
    return torch.where((top > least)[:, None], vectors, 0.0), top.clamp(min=0).sqrt()


def _radial(before: Tensor, after: Tensor) -> Tensor:
    return (-(after[:, :, None] - before[:, None]).square() / 8).exp()


class KDSVD(FeatureLoss):
    """Singular vectors: how the main channel pattern of each stage goes with that before (ECCV 2018, arXiv 1807.06819).

    `ce_weight * CE(x) + weight * KDSVD(x)` over all stages; see `kdsvd_loss`, which tells how it differs from the
    published code. Waits for the device on CUDA.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
        k: Singular vectors that are compared, 1 or more.
        connect: Bring the student's channels to the teacher's by 1x1 convolutions with batch normalisation, where they
            differ; not in the paper.
    """

    paper = "Lee et al., ECCV 2018, arXiv 1807.06819"

    def __init__(
        self,
        weight: Weight = 1.0,
        k: int = 1,
        connect: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(weight, **others)
        if k < 1:
            raise ValueError(f"k is {k}: give 1 or more")
        self.k, self.connects, self.connectors = k, connect, nn.ModuleList()

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:  # noqa: ARG002
        """Refuse what has other channels, or connect it; and what has fewer singular vectors."""
        self.connectors = connect_stages("KDSVD", student, teacher, self.connects)
        for features in (*student, *teacher):
            if min(features.shape[1], features[0, 0].numel()) < self.k:
                raise ValueError(f"k is {self.k}, and features of {shape_of(features)} have fewer singular vectors")

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`kdsvd_loss`."""
        pairs = zip(self.connectors, student, strict=True)
        return kdsvd_loss([connector(features) for connector, features in pairs], teacher, self.k)
