"""What every distillation loss shares: its interface, and the arithmetic around named terms."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["DistillationLoss", "MixedOutputs", "full_precision", "with_total"]


class MixedOutputs(NamedTuple):
    """Outputs on the augmented images x' of a step, and the two labels each of them carries.

    Row i shows `lam[i]` of a sample labelled `labels[i]` and `1 - lam[i]` of one labelled `partner_labels[i]`.
    """

    student_logits: Tensor  # [B, C], on x'
    teacher_logits: Tensor  # [B, C], on x', not a mixture of the logits on x
    labels: Tensor  # int64 [B]
    partner_labels: Tensor  # int64 [B]
    lam: Tensor  # float [B], in [0, 1]


class DistillationLoss(nn.Module, ABC):
    """A distillation objective: outputs of both nets in, named scalar terms out.

    A method is a subclass. The caller minimises "loss" and logs every term under its own name, so that a new method
    changes no training loop. Parameters of a subclass (connectors, regressors) are trained along with the student.
    """

    @abstractmethod
    def forward(
        self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor, mixed: MixedOutputs | None = None
    ) -> dict[str, Tensor]:
        """Compute the objective of one batch.

        Args:
            student_logits: [B, C], on the original images x.
            labels: int64 [B].
            teacher_logits: [B, C], on x, without gradient.
            mixed: outputs on the augmented images x', if there are any.

        Returns:
            Scalars by name: "loss" first, to be minimised, then its unweighted parts. All are attached to the graph.
        """


def full_precision(values: Tensor) -> Tensor:
    """Return `values` in float32, or in float64 where they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def with_total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Put "loss", the sum of `weights[name] * terms[name]` over the terms, in front of the terms."""
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"loss": total, **terms}
