"""The reused teacher classifier: the student learns the teacher's last map, and the teacher's classifier does the rest.

Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv 2203.14001.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import NetOutput, Normalized, shape_of
from dalikd.kd.checkpoints import load_weights, read_state_dict
from dalikd.kd.connectors import check_classifier, check_maps, pool_alike
from dalikd.kd.losses.base import FeatureLoss, LossContext, StepOutputs, Weight, full_precision

__all__ = ["ReusedClassifier", "SimKD", "load_simkd"]


class ReusedClassifier(nn.Module):
    """A student whose last map is projected to the teacher's, averaged, and classified as the teacher does it.

    Args:
        student: gives features; what comes after its last map is not used.
        channels: of its last map, of the projector's middle, and of the teacher's last map.
        classifier: pooled features of the teacher -> logits. It is frozen.
        size: the largest height and width that is compared: the student's last map is pooled to it.
    """

    def __init__(
        self, student: nn.Module, channels: tuple[int, int, int], classifier: nn.Module, size: tuple[int, int]
    ) -> None:
        super().__init__()
        first, middle, last = channels
        self.student = student
        self.projector = nn.Sequential(
            *_convolution(first, middle, 1), *_convolution(middle, middle, 3), *_convolution(middle, last, 1)
        )
        self.classifier = classifier.requires_grad_(False)
        self.register_buffer("size", torch.tensor(size))  # kept in the file
        self._size = size

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        return self.outputs(images).logits

    def outputs(self, images: Tensor) -> NetOutput:
        """Logits; the student's features, but the projected map in place of the last, and what is pooled of it."""
        features = self.student.outputs(images).features  # pyright: ignore[reportCallIssue]
        last = features[-2]
        size = min(last.shape[2], self._size[0]), min(last.shape[3], self._size[1])
        if size != tuple(last.shape[2:]):
            last = functional.adaptive_avg_pool2d(last, size)
        projected = self.projector(last)
        pooled = projected.mean((2, 3))
        return NetOutput(self.classifier(pooled), (*features[:-2], projected, pooled))

    def get_classifier(self) -> nn.Module:
        """The teacher's."""
        return self.classifier

    def stage_modules(self) -> list[nn.Module]:
        """The student's."""
        return self.student.stage_modules()  # pyright: ignore[reportCallIssue]


class SimKD(FeatureLoss):
    """The student's last map, projected, against the teacher's: their mean squared difference.

    The teacher's classifier, frozen, makes the logits of the projected map. So the net that is trained, evaluated and
    saved is a `ReusedClassifier`: the student, the projector and the classifier; `load_simkd` reads its file again. In
    a sum of losses the others must be on logits. Published without cross-entropy, the method has one weight alone.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1).
        reduction: The projector's middle has as many channels as the teacher's last map divided by this; 2, 4 and 8 are
            published.
    """

    paper = "Chen et al., CVPR 2022, arXiv 2203.14001"
    needs = frozenset({"teacher_classifier"})
    places = slice(-2, -1)

    def __init__(
        self, weight: Weight = 1.0, ce_weight: Weight = 0.0, label_smoothing: float = 0.0, reduction: int = 2
    ) -> None:
        super().__init__(weight, ce_weight, label_smoothing)
        if reduction < 1:
            raise ValueError(f"reduction is {reduction}: give 1 or more")
        self.reduction = reduction

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:
        """Note what the completed student is made of.

        Raises:
            ValueError: the teacher does not average its last map for a linear layer, or has too few channels.
        """
        classifier = context.teacher_classifier
        assert classifier is not None
        check_maps("SimKD", *student, *teacher)
        check_classifier("SimKD", "teacher", context.teacher, classifier, of_map=True)
        first, last = student[0].shape[1], teacher[0].shape[1]
        if last < self.reduction:
            raise ValueError(
                f"--loss.reduction {self.reduction} leaves no channel of the teacher's last map {shape_of(teacher[0])} "
                f"for the student's {shape_of(student[0])}: give at most {last}"
            )
        channels, size = (first, last // self.reduction, last), (teacher[0].shape[2], teacher[0].shape[3])
        self._parts, self._side = (channels, classifier, size), context.side

    def complete(self, student: Normalized) -> Normalized:
        """The student with the projector and a copy of the teacher's classifier. What of the student comes after its
        last map is frozen: nothing is asked of it."""
        _freeze_unused(student, self._side)
        channels, classifier, size = self._parts
        model = ReusedClassifier(student.model, channels, deepcopy(classifier), size)
        return Normalized(model, *student.normalisation).to(student.scale)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:  # noqa: ARG002
        """Their mean squared difference, at the size of the smaller."""
        return functional.mse_loss(*pool_alike(full_precision(student[0]), full_precision(teacher[0])))


def load_simkd(student: nn.Module, path: str | Path) -> ReusedClassifier:
    """A student that SimKD has trained, from its file.

    `Normalized(load_simkd(create_model("resnet8x4", 100), path), *read_origin(path).normalisation)` takes pixels.

    Args:
        student: of the same architecture; it becomes a part of the result.
        path: the run's student.safetensors.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `load_weights`; or it is no file of SimKD's.
    """
    weights = read_state_dict(path)
    needed = ("projector.0.weight", "projector.6.weight", "classifier.weight", "size")
    if not all(key in weights for key in needed):
        raise ValueError(f"{path} holds no student of SimKD: read it with load_weights")
    first, last = (weights[f"projector.{layer}.weight"] for layer in (0, 6))
    classes, width = weights["classifier.weight"].shape
    classifier = nn.Linear(width, classes, bias="classifier.bias" in weights)
    height, width = weights["size"].tolist()
    model = ReusedClassifier(student, (first.shape[1], len(first), len(last)), classifier, (height, width))
    load_weights(model, path)
    return model


def _convolution(channels: int, wanted: int, size: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, wanted, size, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(wanted), nn.ReLU()


def _freeze_unused(student: Normalized, side: int) -> None:
    """Freeze the parameters that the last map does not depend on: processes that share a step wait for gradients of
    all that is trained."""
    parameters = [values for values in student.parameters() if values.requires_grad]
    if not parameters:
        return
    modes = {part: part.training for part in student.modules()}
    black = torch.zeros(2, 3, side, side, device=student.scale.device)
    with torch.enable_grad():
        last = student.eval().outputs(black, features=True).features[-2]
        gradients = torch.autograd.grad(last.sum(), parameters, allow_unused=True)
    for part, training in modes.items():
        part.training = training
    for values, gradient in zip(parameters, gradients, strict=True):
        values.requires_grad_(gradient is not None)
