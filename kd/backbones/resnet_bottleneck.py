"""ResNet50 for small images: bottleneck blocks after a 3x3 stem without pooling.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, table 1, with the stem of the
32x32 nets, as in Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import ReluBlock, StagedNet, initialise_convolutions, projection

__all__ = ["Bottleneck", "BottleneckResNet", "stage_of"]


class BottleneckResNet(StagedNet):
    """A residual net of four stages of bottleneck blocks with 256, 512, 1024 and 2048 output channels.

    Args:
        blocks: how many blocks each of the four stages has.
        num_classes: length of the logits.
    """

    _stages = ("layer1", "layer2", "layer3", "layer4")
    _initialise_head = staticmethod(initialise_convolutions)

    def __init__(self, blocks: tuple[int, int, int, int], /, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self._blocks = blocks
        self.layer1, self.layer2, self.layer3, self.layer4 = map(self.make_stage, range(4))
        self.linear = nn.Linear(2048, num_classes)
        initialise_convolutions(self)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised."""
        return stage_of(Bottleneck, number, self._blocks[number], again)


class Bottleneck(ReluBlock):
    """1x1, 3x3, 1x1 with four times the channels."""

    expansion: ClassVar[int] = 4  # output channels over those of the 3x3 convolution
    _shortcut: ClassVar[str] = "shortcut"  # its name in the state_dict

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add_module(self._shortcut, projection(in_channels, out_channels, stride))

    def preactivation(self, features: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(features)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return residual + getattr(self, self._shortcut)(features)


def stage_of(block: Any, number: int, blocks: int, again: bool) -> nn.Sequential:
    """A stage of a net whose stages have 64, 128, 256, 512 channels times the blocks' expansion.

    Args:
        block: its class.
        number: of the stage, from 0.
        blocks: how many.
        again: it follows the last stage, and takes what that gives; the resolution stays.
    """
    channels, out_channels = 64 << number, (64 << number) * block.expansion
    in_channels = out_channels if again else out_channels // 2 if number else 64
    first = block(in_channels, channels, 1 if again or number == 0 else 2)
    return nn.Sequential(first, *(block(out_channels, channels, 1) for _ in range(blocks - 1)))
