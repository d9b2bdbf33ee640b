"""He et al.'s own residual nets for CIFAR: resnet20_option_a ... resnet110_option_a, no parameters in the shortcuts.

"Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, section 4.2 and option A of section 3.3:
where a shortcut changes its shape, every second pixel is taken and the new channels are zero.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import ReluBlock, StagedNet

__all__ = ["OptionAResNet"]


class OptionAResNet(StagedNet):
    """A residual net of `depth` = 6n + 2 layers and 16, 32, 64 channels.

    Args:
        depth: number of layers, 6n + 2 with n blocks a stage.
        num_classes: length of the logits.
    """

    _initialise_head = staticmethod(lambda head: _initialise(head))

    def __init__(self, depth: int, /, num_classes: int) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0, depth
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self._blocks = blocks
        self.layer1, self.layer2, self.layer3 = map(self.make_stage, range(3))
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised."""
        channels = 16 << number
        keeps = again or number == 0
        return _stage(channels if keeps else channels // 2, channels, self._blocks, stride=1 if keeps else 2)


class _Block(ReluBlock):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def preactivation(self, features: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        return residual + self._shortcut(features)

    def _shortcut(self, features: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return features
        subsampled = features[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        return F.pad(subsampled, (0, 0, 0, 0, before, self.new_channels - before))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (_Block(channels, channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(_Block(in_channels, channels, stride), *rest)


def _initialise(model: nn.Module) -> None:
    # fan_in, as He et al. trained them; the projection nets of resnet.py use fan_out
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
