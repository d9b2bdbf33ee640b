"""Cross-entropy against hard labels, and against the two labels of a mixed image."""

from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import full_precision

__all__ = ["cross_entropy", "mixed_cross_entropy"]


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of `logits` [B, C] and `labels` int64 [B], a scalar in float32 (float64 stays)."""
    return functional.cross_entropy(full_precision(logits), labels, label_smoothing=label_smoothing)


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Mean of `lam * CE(labels) + (1 - lam) * CE(partner_labels)` over the batch.

    The loss of mixup (Zhang et al., ICLR 2018, arXiv 1710.09412) and CutMix (Yun et al., ICCV 2019, arXiv 1905.04899).

    Args:
        logits: [B, C].
        labels: int64 [B], of the sample itself.
        partner_labels: int64 [B], of the sample mixed into it.
        lam: [B], share of the sample itself.
        label_smoothing: share of each target spread evenly over the classes.
    """
    logits = full_precision(logits)
    own = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    partner = functional.cross_entropy(logits, partner_labels, label_smoothing=label_smoothing, reduction="none")
    lam = lam.to(logits.dtype)
    return (lam * own + (1 - lam) * partner).mean()
