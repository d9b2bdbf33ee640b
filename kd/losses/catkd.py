"""Class attention transfer: where each class is seen, in the student as in the teacher.

Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, arXiv 2304.12777.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import shape_of
from dalikd.kd.connectors import check_classifier
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["CATKD", "class_attention"]


def class_attention(features: Tensor, weight: Tensor, resolution: int, normalize: bool = True) -> Tensor:
    """Class activation maps: a linear classifier applied to each place of the last map, average-pooled.

    Args:
        features: the last map [B, D, H, W].
        weight: of the classifier [C, D].
        resolution: side of the pooled maps.
        normalize: each map to a length of 1.

    Returns:
        [B, C, resolution, resolution] in float32 (float64 stays).
    """
    with torch.autocast(features.device.type, enabled=False):
        pooled = functional.adaptive_avg_pool2d(full_precision(features), resolution)  # before: it is linear
        maps = torch.einsum("bdhw,cd->bchw", pooled, weight.to(pooled.dtype))
    return functional.normalize(maps.flatten(2), dim=2).unflatten(2, maps.shape[2:]) if normalize else maps


class CATKD(FeatureLoss):
    """The mean squared difference of the nets' class attention maps, for nets that average their last map for a linear
    classifier.

    The published weight and resolution differ by pair on CIFAR-100: not normalised, with a resolution of 2, 0.7 for
    resnet56 to resnet20, 15 for resnet32x4 to resnet8x4, 4.5 for vgg13 to vgg8; normalised, with a resolution of 4, 600
    for resnet32x4 to ShuffleV1. ImageNet, ResNet-34 to ResNet-18: not normalised, 4, 0.5.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1).
        resolution: Side of the maps that are compared; larger ones are average-pooled.
        normalize: Compare maps of length 1.
    """

    paper = "Guo et al., CVPR 2023, arXiv 2304.12777"
    needs = frozenset({"teacher_classifier", "student_classifier"})
    places = slice(-2, -1)

    def __init__(
        self,
        weight: Weight = 400.0,
        ce_weight: Weight = 1.0,
        label_smoothing: float = 0.0,
        resolution: int = 2,
        normalize: bool = True,
    ) -> None:
        super().__init__(weight, ce_weight, label_smoothing)
        if resolution < 1:
            raise ValueError(f"resolution is {resolution}: give 1 or more")
        self.resolution, self.normalize = resolution, normalize

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:
        """Keep the classifiers, which stay the nets'.

        Raises:
            ValueError: a net does not average its last map for a linear layer, or the resolution is too fine.
        """
        for side, maps in (("student", student[0]), ("teacher", teacher[0])):
            if maps.dim() == 4 and self.resolution > min(maps.shape[2:]):
                raise ValueError(
                    f"--loss.resolution {self.resolution} is finer than the {side}'s last map {shape_of(maps)}: give "
                    f"at most {min(*student[0].shape[2:], *teacher[0].shape[2:])}"
                )
        self._classifiers = (
            _linear("student", context.student_classifier),
            _linear("teacher", context.teacher_classifier),
        )
        for side, given, classifier in zip(("student", "teacher"), context[:2], self._classifiers, strict=True):
            check_classifier("CATKD", side, given, classifier, of_map=True)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """The mean squared difference of the maps; the student's classifier learns by it too."""
        own, other = (
            class_attention(maps[0], classifier.weight, self.resolution, self.normalize)
            for maps, classifier in zip((student, teacher), self._classifiers, strict=True)
        )
        return functional.mse_loss(own, other)


def _linear(net: str, classifier: nn.Module | None) -> nn.Linear:
    assert classifier is not None
    layers = list(classifier) if isinstance(classifier, nn.Sequential) else [classifier]
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear):
        raise ValueError(
            f"CATKD needs a linear classifier, and the {net}'s is {type(classifier).__name__}: take a net such as "
            "resnet20, vgg8 or timm:resnet18, or a loss on logits"
        )
    return layers[0]
