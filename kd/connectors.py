"""What brings the features of one net to the shapes of another's. All of it is trained with the student, and never a
part of it."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import NetOutput, shape_of

__all__ = [
    "ConvRegressor",
    "check_classifier",
    "check_maps",
    "connect_stages",
    "connectors",
    "pool_alike",
]


class ConvRegressor(nn.Module):
    """A convolution that maps features [n, C, H, W] to the channels and the size of a target's, then batch
    normalisation and a ReLU (Romero et al., "FitNets", ICLR 2015, arXiv 1412.6550; keys of Tian et al., ICLR 2020).

    Halves a map twice as large as the target's, doubles one half as large, and keeps or crops any other with a
    convolution without padding.

    Args:
        source: features of two or more images as they come, [n, C, H, W].
        target: as they shall be, [n, D, P, Q].
        relu: whether it ends in a ReLU.

    Raises:
        ValueError: the source is smaller than the target, and not half of it.
    """

    def __init__(self, source: Tensor, target: Tensor, *, relu: bool = True) -> None:
        super().__init__()
        check_maps("a convolutional regressor", source, target)
        _, channels, height, width = source.shape
        _, wanted, rows, columns = target.shape
        if height == 2 * rows:
            self.conv: nn.Module = nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
        elif 2 * height == rows:
            self.conv = nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
        elif height >= rows and width >= columns:
            self.conv = nn.Conv2d(channels, wanted, (1 + height - rows, 1 + width - columns))
        else:
            raise ValueError(
                f"no convolution brings the student's features {shape_of(source)} to the teacher's {shape_of(target)}: "
                "compare other features with --loss.student_features and --loss.teacher_features"
            )
        self.bn = nn.BatchNorm2d(wanted)
        self.relu = relu

    def forward(self, features: Tensor) -> Tensor:
        """[n, D, P, Q] of [n, C, H, W]."""
        found = self.bn(self.conv(features))
        return functional.relu(found) if self.relu else found


def connectors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.ModuleList:
    """One for each pair of maps: a `ConvRegressor` without its ReLU where shapes differ, else the identity (Heo et al.,
    AAAI 2019, arXiv 1811.03233).

    Raises:
        ValueError: no convolution brings one to the shape of the other.
    """
    return nn.ModuleList(
        nn.Identity() if one.shape[1:] == other.shape[1:] else ConvRegressor(one, other, relu=False)
        for one, other in zip(student, teacher, strict=True)
    )


def connect_stages(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor], connect: bool) -> nn.ModuleList:
    """What brings each of two or more maps of the student to the channels of the teacher's, at its own size.

    Args:
        what: the method, for messages.
        student: maps, shallow to deep.
        teacher: as many.
        connect: where channels differ, connect them; else they are refused.

    Raises:
        ValueError: features are no maps, or fewer than two; or channels differ, and are not to be connected.
    """
    check_maps(what, *student, *teacher)
    if len(student) < 2:
        raise ValueError(
            f"{what} compares features that follow each other, and is given {len(student)}: name two or more"
        )
    for one, other in zip(student, teacher, strict=True):
        if one.shape[1] != other.shape[1] and not connect:
            raise ValueError(
                f"{what} needs as many channels in both nets, and the student's {shape_of(one)} meets the teacher's "
                f"{shape_of(other)}: give --loss.connect true, or take AT, which needs none of it"
            )
    wanted = [one.new_empty(2, other.shape[1], *one.shape[2:]) for one, other in zip(student, teacher, strict=True)]
    return connectors(student, wanted)


def pool_alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [n, C, H, W] and [n, D, P, Q] at the size of the smaller: the larger is average-pooled."""
    side = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    pooled = [
        features if tuple(features.shape[2:]) == side else functional.adaptive_avg_pool2d(features, side)
        for features in (one, other)
    ]
    return pooled[0], pooled[1]


def check_maps(what: str, *features: Tensor) -> None:
    """Raises ValueError where features are no maps [n, C, H, W]: those of a stage are, the pooled are not."""
    for feature in features:
        if feature.dim() != 4:
            raise ValueError(
                f"{what} needs maps of channels x height x width, and is given {shape_of(feature)}: name the features "
                "of stages with --loss.student_features and --loss.teacher_features"
            )


@torch.no_grad()
def check_classifier(what: str, net: str, given: NetOutput, classifier: nn.Module, *, of_map: bool = False) -> None:
    """Check on what a net gives for two images that a classifier alone makes its logits of its pooled features.

    Args:
        what: needs that, for messages.
        net: whose, for messages.
        given: logits and features; half precision will do.
        classifier: pooled features [n, D] -> logits [n, C].
        of_map: the pooled features must also be the mean of the last map.

    Raises:
        ValueError: it is not so; names the features.
    """
    *_, last, pooled = (feature.double() for feature in given.features)
    if of_map and (last.dim() != 4 or last.shape[1] != pooled.shape[1] or not _close(last.mean((2, 3)), pooled)):
        raise ValueError(
            f"{what} needs a {net} that averages its last map for its classifier, and this one makes "
            f"{shape_of(pooled)} of {shape_of(last)} otherwise: take one such as resnet56, vgg13, ResNet50 or "
            "timm:resnet34, or the loss SRRL"
        )
    try:
        same = _close(deepcopy(classifier).double()(pooled), given.logits.double())
    except RuntimeError:  # a convolution, say
        same = False
    if not same:
        raise ValueError(
            f"{what} needs a {net} whose classifier makes its logits of the pooled features, and "
            f"{type(classifier).__name__} does not make {shape_of(given.logits)} of {shape_of(pooled)}: take one whose "
            "last layer is linear, such as resnet56, or a loss on other features, such as ReviewKD"
        )


def _close(one: Tensor, other: Tensor) -> bool:
    """Up to half precision."""
    return one.shape == other.shape and bool(((one - other).abs().max() <= 0.05 * other.abs().max()).item())
