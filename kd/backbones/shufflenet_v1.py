"""ShuffleNet (the first) for small images: ShuffleV1.

Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR 2018,
arXiv:1707.01083, table 1, three groups; with a 1x1 stem that keeps the resolution, as in Tian et al., "Contrastive
Representation Distillation", ICLR 2020, arXiv:1910.10699.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import ReluBlock, StagedNet, shuffle_channels

__all__ = ["ShuffleNetV1"]

_WIDTHS = (24, 240, 480, 960)  # of the stem and of the stages
_BLOCKS = (4, 8, 4)
_GROUPS = 3


class ShuffleNetV1(StagedNet):
    """A ShuffleNet with three groups and three stages of 240, 480 and 960 channels.

    Args:
        num_classes: length of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1, self.layer2, self.layer3 = map(self.make_stage, range(3))
        self.linear = nn.Linear(_WIDTHS[-1], num_classes)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised."""
        channels = _WIDTHS[number + 1]
        groups = _GROUPS if number else 1  # the stem has too few channels
        first = _Block(channels, channels, 1, _GROUPS) if again else _Block(_WIDTHS[number], channels, 2, groups)
        return nn.Sequential(first, *(_Block(channels, channels, 1, _GROUPS) for _ in range(_BLOCKS[number] - 1)))


class _Block(ReluBlock):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; at stride 2 the pooled input is appended instead of added.

    Args:
        in_channels: of the input.
        channels: of the output; at stride 2 with the input's.
        stride: 1 or 2.
        first_groups: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, first_groups: int) -> None:
        super().__init__()
        self.appends = stride == 2
        self.groups = first_groups
        new_channels = channels - in_channels if self.appends else channels
        hidden = new_channels // 4
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, new_channels, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(new_channels)

    def preactivation(self, features: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(features)))
        residual = F.relu(self.bn2(self.conv2(shuffle_channels(residual, self.groups))))
        residual = self.bn3(self.conv3(residual))
        if self.appends:
            return torch.cat((residual, F.avg_pool2d(features, 3, stride=2, padding=1)), dim=1)
        return residual + features
