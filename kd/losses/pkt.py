"""Probabilistic knowledge transfer: how likely each image is another's neighbour.

Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv 1803.10837.
As published with Tian et al. (ICLR 2020), the divergence is the mean over all pairs, not their sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalikd.kd.losses.base import FeatureLoss, StepOutputs, Weight, full_precision

__all__ = ["PKT", "pkt_loss"]

_EPS = 1e-7


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over pairs of images of `q * log((q + 1e-7) / (p + 1e-7))`, q the teacher's affinities, p the student's.

    An affinity is (1 + cosine) / 2, over the sum of its row.

    Args:
        student: embeddings [B, D], or features that are flattened to these.
        teacher: embeddings [B, E]. A gradient flows into these too.

    Returns:
        A scalar, computed in float32 (float64 stays); 0 for a batch of one. An embedding of zeros only is at a right
        angle to all, and gets no gradient (the published code gives NaN).
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_affinities(full_precision(rows).flatten(1)) for rows in (student, teacher))
        return (theirs * ((theirs + _EPS) / (ours + _EPS)).log()).mean()


def _affinities(rows: Tensor) -> Tensor:
    """[B, B], each row's sum 1."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = torch.where(norms > 0, rows / (norms + _EPS), torch.zeros_like(rows))
    affinities = ((rows @ rows.mT + 1) / 2).clamp(min=0)  # rounding, of TF32 above all, goes below
    return affinities / affinities.sum(1, keepdim=True)


class PKT(FeatureLoss):
    """Probabilistic knowledge transfer: `pkt_loss` of the pooled features.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
    """

    paper = "Passalis and Tefas, ECCV 2018, arXiv 1803.10837"
    places = slice(-1, None)

    def __init__(self, weight: Weight = 30000.0, **others: Any) -> None:
        super().__init__(weight, **others)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """`pkt_loss`, summed over the pairs."""
        return torch.stack([pkt_loss(s, t) for s, t in zip(student, teacher, strict=True)]).sum()
