"""ShuffleNet V2 for small images, of any of its sizes: ShuffleV2 (size 1), ShuffleV2_0_3.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018, arXiv:1807.11164,
table 5, with a 1x1 stem that keeps the resolution, as in Tian et al., "Contrastive Representation Distillation",
ICLR 2020, arXiv:1910.10699. Sizes 0.2 and 0.3 are theirs, not the paper's.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import ReluBlock, StagedNet, leave_initialised, shuffle_channels

__all__ = ["ShuffleNetV2"]


class _Size(NamedTuple):
    widths: tuple[int, int, int]  # channels of the three stages
    last: int  # channels before the classifier
    blocks: tuple[int, int, int] = (3, 7, 3)  # of each stage, after the one that halves the resolution


_SIZES = {
    0.2: _Size((40, 80, 160), 512, (3, 3, 3)),
    0.3: _Size((40, 80, 160), 512),
    0.5: _Size((48, 96, 192), 1024),
    1.0: _Size((116, 232, 464), 1024),
    1.5: _Size((176, 352, 704), 1024),
    2.0: _Size((224, 488, 976), 2048),  # 224 as published weights have it; the paper has 244
}
_STEM_CHANNELS = 24


class ShuffleNetV2(StagedNet):
    """A ShuffleNet V2.

    Args:
        num_classes: length of the logits.
        size: 0.2, 0.3, 0.5, 1, 1.5 or 2.

    Raises:
        ValueError: there is no such size.
    """

    _initialise_head = staticmethod(leave_initialised)

    def __init__(self, num_classes: int, size: float = 1.0) -> None:
        super().__init__()
        if size not in _SIZES:
            raise ValueError(f"ShuffleV2 has no size {size}; there are {', '.join(f'{known:g}' for known in _SIZES)}")
        widths, last, self._blocks = _SIZES[size]
        self._widths = (_STEM_CHANNELS, *widths)
        self.conv1 = nn.Conv2d(3, _STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        self.layer1, self.layer2, self.layer3 = map(self.make_stage, range(3))
        self.conv2 = nn.Conv2d(widths[2], last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, num_classes)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised."""
        channels = self._widths[number + 1]
        first = _DownBlock(channels, channels, 1) if again else _DownBlock(self._widths[number], channels, 2)
        return nn.Sequential(first, *(_Block(channels) for _ in range(self._blocks[number])))

    def branch(self, stages: list[nn.Module]) -> dict[str, nn.Module]:
        """An auxiliary head up to the pooled [B, D], which comes from one more convolution too."""
        last = self.linear.in_features
        convolution = nn.Conv2d(self._widths[-1], last, 1, bias=False)
        return super().branch([*stages, convolution, nn.BatchNorm2d(last), nn.ReLU()])

    def tail(self, features: Tensor) -> Tensor:
        """The features of one more convolution, pooled to [B, D]."""
        return F.relu(self.bn2(self.conv2(features))).mean(dim=(2, 3))


def _relu_and_shuffle(features: Tensor) -> Tensor:
    return shuffle_channels(F.relu(features), 2)  # what was passed on has no negative value


class _Block(ReluBlock):
    """Half of the channels pass, the other half goes through 1x1, depthwise 3x3, 1x1; then both are shuffled."""

    activate = staticmethod(_relu_and_shuffle)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.passed = half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def preactivation(self, features: Tensor) -> Tensor:
        passed, changed = features[:, : self.passed], features[:, self.passed :]
        changed = F.relu(self.bn1(self.conv1(changed)))
        changed = self.bn2(self.conv2(changed))
        return torch.cat((passed, self.bn3(self.conv3(changed))), dim=1)


class _DownBlock(nn.Module):
    """All channels go through both branches, each of which gives half of the output; stride 2 halves the resolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=stride, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, features: Tensor) -> Tensor:
        short = self.bn1(self.conv1(features))
        short = F.relu(self.bn2(self.conv2(short)))
        long = F.relu(self.bn3(self.conv3(features)))
        long = self.bn4(self.conv4(long))
        long = F.relu(self.bn5(self.conv5(long)))
        return shuffle_channels(torch.cat((short, long), dim=1), 2)
