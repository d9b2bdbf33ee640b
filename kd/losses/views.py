"""What losses share that compare two views of each image: the original x and one augmented image x' of it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dalikd.kd.losses.base import (
    DistillationLoss,
    StepOutputs,
    Weight,
    check_smoothing,
    check_weight,
    cross_entropy,
    mixed_cross_entropy,
    weight_at,
)

__all__ = ["TwoViewLoss", "Views"]


class Views(NamedTuple):
    """One net's logits on two views of the same images; rows of one index belong together."""

    original: Tensor  # [B, C]
    augmented: Tensor  # [B, C]


class TwoViewLoss(DistillationLoss):
    """Labels on both views, and logits that are compared: `ce_weight * (CE(x) + CE(x')) + sum of weight * term`.

    Meant for augmentations that keep the label. Of mixed images CE(x') has both labels, by their shares.

    Args:
        ce_weight: Weight of both cross-entropies, 0 or more; a number, or a schedule over epochs.
        weights: of the other terms, by their names; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        standardize: Compare logits whose mean over the classes is 0 and whose standard deviation is 1 (Sun et al., CVPR
            2024, arXiv 2403.01427).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"augmented"})

    def __init__(
        self, ce_weight: Weight, weights: Mapping[str, Weight], label_smoothing: float, standardize: bool
    ) -> None:
        super().__init__()
        check_weight("ce_weight", ce_weight)
        check_smoothing(label_smoothing)
        self.ce_weight, self.weights = ce_weight, weights
        self.label_smoothing, self.standardize = label_smoothing, standardize

    @property
    def label_options(self) -> Sequence[str] | None:
        """The weight of both cross-entropies."""
        return [] if self.ce_weight == 0 else ["ce_weight"]

    @abstractmethod
    def compare(self, student: Views, teacher: Views) -> dict[str, Tensor]:
        """The other terms by their names, scalars."""

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", "ce", "ce_mix", and what is compared.

        Raises:
            ValueError: there is not one augmented image for each original.
        """
        student, teacher, mixed, epoch = outputs.student.logits, outputs.teacher.logits, outputs.mixed, outputs.epoch
        if mixed is None or len(mixed.labels) != len(outputs.labels):
            raise ValueError(
                f"{type(self).__name__} compares two views of each image: {len(outputs.labels)} originals have "
                f"{0 if mixed is None else len(mixed.labels)} augmented images, give one for each"
            )
        smoothing, carried = self.label_smoothing, (mixed.labels, mixed.partner_labels, mixed.lam)
        ce = {}
        if outputs.labelled:
            ce["ce"] = cross_entropy(student, outputs.labels, smoothing)
            ce["ce_mix"] = mixed_cross_entropy(mixed.student_logits, *carried, smoothing)
        compared = self.compare(Views(student, mixed.student_logits), Views(teacher, mixed.teacher_logits))
        weighted = [weight_at(self.ce_weight, epoch) * term for term in ce.values()]
        weighted += [weight_at(self.weights[name], epoch) * term for name, term in compared.items()]
        return {"loss": torch.stack(weighted).sum(), **ce, **compared}
