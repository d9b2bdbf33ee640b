"""Consistency of logits within and across two views, where the teacher is sure.

Zhang et al., "Cross-View Consistency Regularisation for Knowledge Distillation", ACM MM 2024, arXiv 2412.16493.
"""

from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import Weight, check_weight, full_precision, standardize_logits
from dalikd.kd.losses.kd import check_temperature, kl_rows
from dalikd.kd.losses.views import TwoViewLoss, Views

__all__ = ["CRLD", "crld_loss"]


def crld_loss(
    student: Views,
    teacher: Views,
    temperature: float = 4.0,
    within_threshold: float = 0.9,
    cross_threshold: float = 0.2,
    *,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The student's KL from the teacher on the same view, and on the other one (Zhang et al., 2024, as in their code).

    Each is the sum over both views, times T^2, averaged over the batch. A sample counts 0 within views where the
    teacher's largest probability on the original is below `within_threshold`, and across views where that on the
    augmented image is below `cross_threshold`. These probabilities are at temperature 1 and never standardised.

    Args:
        student: logits [B, C] on each view.
        teacher: the same.
        temperature: T > 0.
        within_threshold: in [0, 1].
        cross_threshold: in [0, 1].
        standardize: compare standardised logits.

    Returns:
        Two scalars: within views, across views; in float32 (float64 stays), finite for every finite logit.
    """
    sure, sure_augmented = (
        (functional.softmax(full_precision(logits), dim=1).amax(1) >= threshold).to(full_precision(logits).dtype)
        for logits, threshold in zip(teacher, (within_threshold, cross_threshold), strict=True)
    )
    prepared = standardize_logits if standardize else full_precision
    own, own_augmented, target, target_augmented = (
        functional.log_softmax(prepared(logits) / temperature, dim=1) for logits in (*student, *teacher)
    )
    within = (kl_rows(own, target) + kl_rows(own_augmented, target_augmented)) * sure
    cross = (kl_rows(own_augmented, target) + kl_rows(own, target_augmented)) * sure_augmented
    return temperature**2 * within.mean(), temperature**2 * cross.mean()


class CRLD(TwoViewLoss):
    """Cross-view consistency (Zhang et al., ACM MM 2024): `crld_loss` beside the cross-entropy of both views.

    The weak view is the original image, the strong one the augmented image: RandAugment in the paper.

    Args:
        ce_weight: Weight of the cross-entropy of each view, 0 or more, a number or a schedule over epochs; 2 on
            ImageNet.
        within_weight: Weight of the comparison within views; likewise.
        cross_weight: Weight of the comparison across views; likewise.
        temperature: Divides the logits of both nets; above 0; 1 on ImageNet.
        within_threshold: A sample counts within views where the teacher's largest probability on the original is this
            or more, in [0, 1].
        cross_threshold: A sample counts across views where that on the augmented image is this or more, in [0, 1].
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        standardize: Compare standardised logits (Sun et al., CVPR 2024).
    """

    paper = "Zhang et al., ACM MM 2024, arXiv 2412.16493"

    def __init__(
        self,
        ce_weight: Weight = 1.0,
        within_weight: Weight = 2.0,
        cross_weight: Weight = 0.5,
        temperature: float = 4.0,
        within_threshold: float = 0.9,
        cross_threshold: float = 0.2,
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(ce_weight, {"within": within_weight, "cross": cross_weight}, label_smoothing, standardize)
        check_weight("within_weight", within_weight)
        check_weight("cross_weight", cross_weight)
        check_temperature(temperature)
        for name, threshold in (("within_threshold", within_threshold), ("cross_threshold", cross_threshold)):
            if not 0 <= threshold <= 1:
                raise ValueError(f"{name} is {threshold}: give a number in [0, 1]")
        self.temperature, self.within_threshold, self.cross_threshold = temperature, within_threshold, cross_threshold

    def compare(self, student: Views, teacher: Views) -> dict[str, Tensor]:
        """`crld_loss`: "within" and "cross"."""
        thresholds = self.within_threshold, self.cross_threshold
        within, cross = crld_loss(student, teacher, self.temperature, *thresholds, standardize=self.standardize)
        return {"within": within, "cross": cross}
