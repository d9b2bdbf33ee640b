"""Softmax regression representation learning: the teacher's classifier judges the student's features.

Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.connectors import check_classifier
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, check_weight, full_precision, weight_at

__all__ = ["SRRL"]


class SRRL(FeatureLoss):
    """The pooled features, brought to the teacher's width, against the teacher's; and the logits that the teacher's
    frozen classifier makes of them against the teacher's own. Both are mean squared differences.

    Args:
        weight: Of both, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1).
        logit_weight: Of the logits within both; likewise.
    """

    paper = "Yang et al., ICLR 2021"
    needs = frozenset({"teacher_classifier"})
    places = slice(-1, None)

    def __init__(
        self, weight: Weight = 1.0, ce_weight: Weight = 1.0, label_smoothing: float = 0.0, logit_weight: Weight = 1.0
    ) -> None:
        super().__init__(weight, ce_weight, label_smoothing)
        check_weight("logit_weight", logit_weight)
        self.logit_weight = logit_weight

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:
        """Make the connector: a 1x1 convolution, that is a linear layer, a batch norm and a ReLU.

        Raises:
            ValueError: the teacher's classifier does not make its logits of its pooled features.
        """
        classifier = context.teacher_classifier
        assert classifier is not None
        check_classifier("SRRL", "teacher", context.teacher, classifier)
        width, wanted = student[0].shape[1], teacher[0].shape[1]
        linear = nn.Linear(width, wanted, bias=False)
        nn.init.kaiming_normal_(linear.weight, mode="fan_out")
        self.connector = nn.Sequential(linear, nn.BatchNorm1d(wanted), nn.ReLU())
        self._classifier = (classifier,)  # the teacher's: no part of the loss

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:
        """The two mean squared differences."""
        features = self.connector(student[0])
        logits = full_precision(self._classifier[0](features))
        own = functional.mse_loss(full_precision(features), full_precision(teacher[0]))
        judged = functional.mse_loss(logits, full_precision(outputs.teacher.logits))
        return own + weight_at(self.logit_weight, outputs.epoch) * judged
