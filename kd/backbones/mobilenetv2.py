"""MobileNetV2 for small images, of any width: MobileNetV2 (half as wide as the paper's), MobileNetV2_0_25.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381, table 2, with
less striding: of the paper's five halvings of the resolution the stem and three stages keep theirs, as in Tian et al.,
"Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.
"""

from typing import NamedTuple

from torch import Tensor, nn

from dalikd.kd.backbones.layers import StagedNet

__all__ = ["MobileNetV2"]


class _Stage(NamedTuple):
    expansion: int  # hidden channels of a block over those it gets
    channels: int  # of the net of width 1
    blocks: int
    stride: int  # of the first block


_STAGES = (
    _Stage(1, 16, 1, 1),
    _Stage(6, 24, 2, 1),
    _Stage(6, 32, 3, 2),
    _Stage(6, 64, 4, 2),
    _Stage(6, 96, 3, 1),
    _Stage(6, 160, 3, 2),
    _Stage(6, 320, 1, 1),
)
_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280  # never fewer
_STAGES_OF_FEATURES = (1, 2, 4, 6)  # the last ones at their resolution


class MobileNetV2(StagedNet):
    """A MobileNetV2.

    Args:
        num_classes: length of the logits.
        width: multiplies all channels but those before the classifier, which only grow.

    Raises:
        ValueError: the width leaves a layer without channels.
    """

    _classifier = "classifier"

    def __init__(self, num_classes: int, width: float = 0.5) -> None:
        super().__init__()
        if not width * _STAGES[0].channels >= 1:
            raise ValueError(f"MobileNetV2: width {width} leaves no channels; give at least {1 / _STAGES[0].channels}")
        channels = int(_STEM_CHANNELS * width)
        self.conv1 = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), *_norm_relu(channels))
        self.blocks = nn.ModuleList()
        for stage in _STAGES:
            self.blocks.append(_stage(channels, int(stage.channels * width), stage))
            channels = int(stage.channels * width)
        last = int(_LAST_CHANNELS * max(width, 1))
        self.conv2 = nn.Sequential(nn.Conv2d(channels, last, 1, bias=False), *_norm_relu(last))
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        _initialise(self)

    @property
    def stages(self) -> list[nn.Module]:
        """The seven of the paper."""
        return list(self.blocks)

    def stage_modules(self) -> list[nn.Module]:
        """The stages whose outputs are features: 1, 2, 4 and 6. They end in linear bottlenecks, without a ReLU."""
        return [self.blocks[number] for number in _STAGES_OF_FEATURES]

    def norms_before_last_relu(self) -> list[nn.BatchNorm2d]:
        """The last of each stage that gives a feature; no ReLU follows."""
        return [stage[-1].conv[-1] for stage in self.stage_modules()]  # pyright: ignore[reportIndexIssue]

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the first stage."""
        return self.conv1(images)

    def tail(self, features: Tensor) -> Tensor:
        """The features of one more convolution, pooled to [B, D]."""
        return self.conv2(features).mean(dim=(2, 3))


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            *_norm_relu(hidden),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            *_norm_relu(hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv(features) if self.has_shortcut else self.conv(features)


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


def _stage(in_channels: int, channels: int, stage: _Stage) -> nn.Sequential:
    rest = (_InvertedResidual(channels, channels, 1, stage.expansion) for _ in range(stage.blocks - 1))
    return nn.Sequential(_InvertedResidual(in_channels, channels, stage.stride, stage.expansion), *rest)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # normal(0, sqrt(2 / n)), n = kernel area times output channels, of all groups together
            n = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=(2 / n) ** 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
