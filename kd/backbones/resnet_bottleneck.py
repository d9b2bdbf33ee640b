"""ResNet50 for small images: bottleneck blocks after a 3x3 stem without pooling.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, table 1, with the stem of the
32x32 nets, as in Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import initialise_convolutions, projection

__all__ = ["BottleneckResNet"]

_EXPANSION = 4  # output channels of a block over those of its 3x3 convolution


class BottleneckResNet(nn.Module):
    """A residual net of four stages of bottleneck blocks with 256, 512, 1024 and 2048 output channels.

    Args:
        blocks: how many blocks each of the four stages has.
        num_classes: length of the logits.
    """

    def __init__(self, blocks: tuple[int, int, int, int], /, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(256, 128, blocks[1], stride=2)
        self.layer3 = _stage(512, 256, blocks[2], stride=2)
        self.layer4 = _stage(1024, 512, blocks[3], stride=2)
        self.linear = nn.Linear(2048, num_classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of normalised images [B, 3, H, W]."""
        return self.forward_features_and_logits(images)[1]

    def stage_modules(self) -> list[nn.Module]:
        """The stages, whose outputs are their features, shallow to deep."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward_features_and_logits(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features of the stem and of each stage (after ReLU), then the pooled [B, D]; and the logits."""
        stem = F.relu(self.bn1(self.conv1(images)))
        stage1 = self.layer1(stem)
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        stage4 = self.layer4(stage3)
        pooled = stage4.mean(dim=(2, 3))
        return [stem, stage1, stage2, stage3, stage4, pooled], self.linear(pooled)


class _Bottleneck(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, features: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(features)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + self.shortcut(features))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (_Bottleneck(channels * _EXPANSION, channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(_Bottleneck(in_channels, channels, stride), *rest)
