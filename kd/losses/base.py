"""What every distillation loss shares: its interface, and the cross-entropy against one label and against two."""

import itertools
import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import NetOutput

__all__ = [
    "DistillationLoss",
    "LossContext",
    "MixedOutputs",
    "StepOutputs",
    "WeightedSum",
    "cross_entropy",
    "full_precision",
    "mixed_cross_entropy",
]


class MixedOutputs(NamedTuple):
    """Outputs on the augmented images x' of a step, and the two labels each of them carries.

    Row i shows `lam[i]` of a sample labelled `labels[i]` and `1 - lam[i]` of one labelled `partner_labels[i]`.
    """

    student_logits: Tensor  # [B, C], on x'
    teacher_logits: Tensor  # [B, C], on x', not a mixture of the logits on x
    labels: Tensor  # int64 [B]
    partner_labels: Tensor  # int64 [B]
    lam: Tensor  # float [B], in [0, 1]


class StepOutputs(NamedTuple):
    """All that a loss may compare.

    Attributes:
        student: on the originals x.
        teacher: on x, without gradient.
        labels: int64 [B].
        ids: rows of the data set, int64 [B].
        epoch: epochs done, in fractions too; a float32 scalar.
        mixed: outputs on the augmented images x', if there are any.
    """

    student: NetOutput
    teacher: NetOutput
    labels: Tensor
    ids: Tensor
    epoch: Tensor
    mixed: MixedOutputs | None = None


class LossContext(NamedTuple):
    """What a loss is built from.

    Attributes:
        student: its outputs on two black images, all that the loss needs of them.
        teacher: the same.
        classes: of both nets.
        images: rows of the training set; ids are below.
        teacher_classifier: the teacher's last layer, where it is asked for: pooled features -> logits.
    """

    student: NetOutput
    teacher: NetOutput
    classes: int
    images: int
    teacher_classifier: nn.Module | None = None


class DistillationLoss(nn.Module, ABC):
    """A distillation objective: outputs of both nets in, named scalar terms out.

    A method is a subclass. The caller minimises "loss" and logs every term under its own name, so that a new method
    changes no training loop. Parameters of a subclass (connectors, regressors) are trained along with the student and
    are not exported with it.

    Attributes:
        needs: what it compares beside logits: "features"; "preactivations" and "teacher_classifier", which bring the
            features along.
        local_buffers: names of buffers that processes do not share (memory banks): the loss keeps them equal itself.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    local_buffers: ClassVar[tuple[str, ...]] = ()

    def build(self, context: LossContext) -> None:
        """Make what depends on the nets' shapes: connectors, memories. Called once, before the optimizer is made; a
        loss belongs to one task.

        Raises:
            ValueError: the nets do not go together; names both shapes.
        """

    @abstractmethod
    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Compute the objective of one batch.

        Returns:
            Scalars by name: "loss" first, to be minimised, then its unweighted parts. All are attached to the graph.
        """


class WeightedSum(DistillationLoss):
    """Several losses, each times its weight. Its terms keep their names; where two have one name they are numbered.

    Args:
        losses: The parts.
        weights: One for each, 0 or more; default: 1 for all.
    """

    def __init__(self, losses: list[DistillationLoss], weights: list[float] | None = None) -> None:
        super().__init__()
        self.weights = [1.0] * len(losses) if weights is None else weights
        if len(losses) != len(self.weights) or not losses:
            raise ValueError(f"{len(losses)} losses have {len(self.weights)} weights: give one for each, and a loss")
        if not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(f"weights are {self.weights}: give numbers of 0 or more")
        self.losses = nn.ModuleList(losses)

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All that the parts need."""
        return frozenset().union(*(loss.needs for loss in self._parts()))

    @property
    def local_buffers(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the parts."""
        return tuple(
            f"losses.{number}.{name}" for number, loss in enumerate(self._parts()) for name in loss.local_buffers
        )

    def _parts(self) -> list[DistillationLoss]:
        return list(self.losses)  # pyright: ignore[reportReturnType]

    def build(self, context: LossContext) -> None:
        """Build each part."""
        for loss in self._parts():
            loss.build(context)

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", then the terms of all parts; a part's own "loss" where it has no other term."""
        total, terms = torch.zeros((), device=outputs.labels.device), {}
        for loss, weight in zip(self.losses, self.weights, strict=True):
            found = loss(outputs)
            total = total + weight * found["loss"]
            own = {name: term for name, term in found.items() if name != "loss"} or {
                type(loss).__name__.lower(): found["loss"]
            }
            for name, term in own.items():
                numbered = (f"{name}{number}" for number in itertools.count(1))
                terms[name if name not in terms else next(free for free in numbered if free not in terms)] = term
        return {"loss": total, **terms}


def full_precision(values: Tensor) -> Tensor:
    """Return `values` in float32, or in float64 where they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


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
