"""Relational knowledge distillation: distances and angles between the images of a batch.

Park, Kim, Lu and Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068, section 3.2.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import FeatureLoss, StepOutputs, full_precision

__all__ = ["RKD", "rkd_loss"]


def rkd_loss(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Smooth L1 between the nets' distances of two images, over their mean, and cosines of the angles of three.

    Means are over all B^2 distances and B^3 cosines, the zeros of equal indices among them. Holds B^2 * D + B^3 numbers
    a net.

    Args:
        student: embeddings [B, D], or features that are flattened to these.
        teacher: embeddings [B, E]. A gradient flows into these too.
        distance_weight: of the distances; 0 leaves them out.
        angle_weight: of the angles; 0 leaves them out, and with them the B^3 numbers.

    Returns:
        A scalar, computed in float32 (float64 stays). Equal images have a distance of 1e-6, as published, and no
        gradient from it; a batch of one gives 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_differences(full_precision(rows).flatten(1)) for rows in (student, teacher))
        loss = ours.new_zeros(())
        if distance_weight:
            loss = loss + distance_weight * functional.smooth_l1_loss(_distances(ours), _distances(theirs))
        if angle_weight:
            loss = loss + angle_weight * functional.smooth_l1_loss(_cosines(ours), _cosines(theirs))
    return loss


def _differences(rows: Tensor) -> Tensor:
    """[B, B, D]: each row less each."""
    return rows[None] - rows[:, None]


def _distances(differences: Tensor) -> Tensor:
    """[B, B], over the mean of those between two images. The clamp keeps the root's gradient finite at 0."""
    count = len(differences)
    distances = differences.square().sum(2).clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(count, dtype=distances.dtype, device=distances.device))
    return distances / (distances.sum() / max(count * (count - 1), 1)).clamp(min=1e-12)


def _cosines(differences: Tensor) -> Tensor:
    """[B, B, B]: of the angle at one image between the directions to two others."""
    directions = functional.normalize(differences, dim=2)
    return directions @ directions.mT


class RKD(FeatureLoss):
    """Relational knowledge distillation: `rkd_loss` of the pooled features.

    Args:
        distance_weight: Of the distances between two images, 0 or more; 25 in the paper.
        angle_weight: Of the angles between three, 0 or more; 50 in the paper. It holds as many numbers as the batch
            size to the third power, for each net.
    """

    paper = "Park et al., CVPR 2019, arXiv 1904.05068"
    places = slice(-1, None)

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, **others: Any) -> None:
        super().__init__(**others)
        for name, value in (("distance_weight", distance_weight), ("angle_weight", angle_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: give 0 or more")
        if distance_weight == angle_weight == 0:
            raise ValueError("distance_weight and angle_weight are both 0: give one of them more")
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`rkd_loss`, summed over the pairs."""
        pairs = zip(student, teacher, strict=True)
        return torch.stack([rkd_loss(s, t, self.distance_weight, self.angle_weight) for s, t in pairs]).sum()
