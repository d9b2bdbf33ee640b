"""Logits matched sample by sample, and by how samples and classes resemble each other, at several temperatures.

Jin, Wang and Lin, "Multi-Level Logit Distillation", CVPR 2023.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import Weight, check_weight, full_precision, standardize_logits
from dalikd.kd.losses.kd import check_temperature, kd_loss
from dalikd.kd.losses.views import TwoViewLoss, Views

__all__ = ["MLKD", "mlkd_loss"]

_TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


def mlkd_loss(
    student: Views,
    teacher: Views,
    temperatures: Sequence[float] = _TEMPERATURES,
    *,
    augmented_relations: bool = False,
    standardize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three levels, each summed over the temperatures (Jin et al., CVPR 2023).

    - instance: `kd_loss` on each view;
    - batch: squared difference of P P^T [B, B], summed, over B; P are the probabilities [B, C];
    - class: squared difference of P^T P [C, C], summed, over C.

    Thresholds work as in the paper's code, which averages over the batch first and masks then: on the original view,
    the instance and batch levels are multiplied by the share of samples whose largest probability in the teacher is at
    most the batch's median, the class level by the share of classes whose probability, summed over the batch, is at
    most the median. That is a half, or more where there are ties.

    One thing differs: for the augmented view's instance level that code takes the logits of the original view at T = 2
    and 6, and here they are those of the augmented view at every T.

    Args:
        student: logits [B, C] on each view.
        teacher: the same.
        temperatures: each above 0.
        augmented_relations: count the batch and class levels on the augmented view too, in full; the paper's code
            computes them and does not add them.
        standardize: standardise the logits, for the instance level alone (as Sun et al., CVPR 2024, do).

    Returns:
        Three scalars, instance, batch and class level; in float32 (float64 stays), finite for every finite logit.
    """
    confidence = functional.softmax(full_precision(teacher.original), dim=1)
    samples, classes = _share_below_median(confidence.amax(1)), _share_below_median(confidence.sum(0))
    prepared = standardize_logits if standardize else full_precision
    views = [(samples, classes, student.original, teacher.original), (1.0, 1.0, student.augmented, teacher.augmented)]
    instance = [
        weight * kd_loss(prepared(own), prepared(target), temperature)
        for temperature in temperatures
        for weight, _, own, target in views
    ]
    batch, by_class = [], []
    for temperature in temperatures:
        for weight, class_weight, own, target in views[: 2 if augmented_relations else 1]:
            one, other = (functional.softmax(full_precision(logits) / temperature, dim=1) for logits in (own, target))
            batch.append(weight * _gram_distance(one, other))
            by_class.append(class_weight * _gram_distance(one.T, other.T))
    return torch.stack(instance).sum(), torch.stack(batch).sum(), torch.stack(by_class).sum()


def _share_below_median(values: Tensor) -> Tensor:
    """The share of `values` [n] that are at most their median, a scalar."""
    ordered, count = values.sort().values, len(values)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return (values <= median).to(values.dtype).mean()


def _gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the products of all rows of [n, m], summed, over n."""
    with torch.autocast(student.device.type, enabled=False):  # else the products were of half precision
        return (teacher @ teacher.T - student @ student.T).square().sum() / len(student)


class MLKD(TwoViewLoss):
    """Multi-level logit distillation (Jin et al., CVPR 2023): `mlkd_loss` beside the cross-entropy of both views.

    The weak view is the original image, the strong one the augmented image: RandAugment in the paper's code. The batch
    is that of each process.

    Args:
        ce_weight: Weight of the cross-entropy of each view, 0 or more, a number or a schedule over epochs; 0.5 on
            ImageNet.
        kd_weight: Weight of all three levels; likewise; 0.5 on ImageNet.
        temperatures: At which the nets are compared, each above 0; on ImageNet 1 takes the place of 4.
        augmented_relations: Count the batch and class levels on the augmented images too; the paper's code does not.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        standardize: Compare standardised logits (Sun et al., CVPR 2024), at the instance level alone.
    """

    paper = "Jin et al., CVPR 2023"

    def __init__(
        self,
        ce_weight: Weight = 0.1,
        kd_weight: Weight = 0.9,
        temperatures: Sequence[float] = _TEMPERATURES,
        augmented_relations: bool = False,
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(
            ce_weight, dict.fromkeys(("instance", "batch", "class"), kd_weight), label_smoothing, standardize
        )
        check_weight("kd_weight", kd_weight)
        if not temperatures:
            raise ValueError("temperatures is empty: give one or more")
        for temperature in temperatures:
            check_temperature(temperature, "a temperature")
        self.temperatures, self.augmented_relations = tuple(temperatures), augmented_relations

    def compare(self, student: Views, teacher: Views) -> dict[str, Tensor]:
        """`mlkd_loss`: "instance", "batch" and "class"."""
        switches = {"augmented_relations": self.augmented_relations, "standardize": self.standardize}
        levels = mlkd_loss(student, teacher, self.temperatures, **switches)
        return dict(zip(self.weights, levels, strict=True))
