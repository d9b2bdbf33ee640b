"""Residual nets for small images with projection shortcuts: resnet8 ... resnet110, resnet8x4, resnet32x4.

Three stages of basic blocks after a 3x3 stem (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
arXiv:1512.03385, section 4.2), with a 1x1 convolution wherever a shortcut changes its shape (their option B).
The "x4" nets have four times the channels in every stage and twice in the stem
(Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699).
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import ReluBlock, StagedNet, initialise_convolutions, projection

__all__ = ["BasicBlock", "ResNet"]


class ResNet(StagedNet):
    """A residual net of `depth` = 6n + 2 layers.

    Args:
        depth: number of layers, 6n + 2 with n blocks a stage.
        widths: channels of the stem and of the three stages.
        num_classes: length of the logits.
    """

    _classifier = "fc"

    def __init__(self, depth: int, widths: tuple[int, int, int, int], /, num_classes: int) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0, depth
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self._widths, self._blocks = widths, blocks
        self.layer1, self.layer2, self.layer3 = map(self.make_stage, range(3))
        self.fc = nn.Linear(widths[3], num_classes)
        initialise_convolutions(self)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised."""
        channels = self._widths[number + 1]
        return _stage(
            channels if again else self._widths[number], channels, self._blocks, stride=1 if again or number == 0 else 2
        )


class BasicBlock(ReluBlock):
    """Two 3x3 convolutions."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = projection(in_channels, channels, stride)

    def preactivation(self, features: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        return residual + self.downsample(features)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)
