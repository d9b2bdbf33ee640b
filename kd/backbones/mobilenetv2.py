"""MobileNetV2 for small images, of any width: MobileNetV2 (half as wide as the paper's), MobileNetV2_0_25.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381, table 2, with
less striding: of the paper's five halvings of the resolution the stem and three stages keep theirs, as in Tian et al.,
"Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.
"""

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from dalikd.kd.backbones.layers import StagedNet

__all__ = ["MobileNetV2", "MobileNetV2OfHSAKD"]


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
    _initialise_head = staticmethod(lambda head: _initialise(head))
    _stem_stride: ClassVar[int] = 2
    telltale_keys: ClassVar[dict[str, str]] = {
        "classifier.weight": "of mobilenetV2, HSAKD's own, whose stem keeps the resolution: name that net"
    }

    def __init__(self, num_classes: int, width: float = 0.5) -> None:
        super().__init__()
        if not width * _STAGES[0].channels >= 1:
            raise ValueError(f"MobileNetV2: width {width} leaves no channels; give at least {1 / _STAGES[0].channels}")
        self._widths = [int(channels * width) for channels in (_STEM_CHANNELS, *(stage.channels for stage in _STAGES))]
        self._last = int(_LAST_CHANNELS * max(width, 1))
        stem, stride = self._widths[0], self._stem_stride
        self.conv1 = nn.Sequential(nn.Conv2d(3, stem, 3, stride=stride, padding=1, bias=False), *_norm_relu(stem))
        self.blocks = nn.ModuleList(map(self.make_stage, range(len(_STAGES))))
        self.conv2 = self._last_convolution()
        self.classifier = nn.Sequential(nn.Linear(self._last, num_classes))
        _initialise(self)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised."""
        stage, channels = _STAGES[number], self._widths[number + 1]
        in_channels, stride = (self._widths[-1], 1) if again else (self._widths[number], stage.stride)
        rest = (_InvertedResidual(channels, channels, 1, stage.expansion) for _ in range(stage.blocks - 1))
        return nn.Sequential(_InvertedResidual(in_channels, channels, stride, stage.expansion), *rest)

    def branch_points(self) -> tuple[int, ...]:
        """The stages whose outputs are features."""
        return _STAGES_OF_FEATURES

    def branch(self, stages: list[nn.Module]) -> dict[str, nn.Module]:
        """An auxiliary head up to the pooled [B, D], which comes from one more convolution too."""
        extractor, pool = super().branch(stages).values()
        return {"block_extractor": extractor, "conv2_": self._last_convolution(), "pool": pool}

    def _last_convolution(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(self._widths[-1], self._last, 1, bias=False), *_norm_relu(self._last))

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


class MobileNetV2OfHSAKD(MobileNetV2):
    """The MobileNetV2 of Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021,
    arXiv:2107.13715: the stem keeps the resolution, and the classifier has another name. Weights of one do not fit the
    other.

    Args:
        num_classes: length of the logits.
        width: multiplies all channels but those before the classifier, which only grow.

    Raises:
        ValueError: the width leaves a layer without channels.
    """

    _stem_stride = 1
    telltale_keys: ClassVar[dict[str, str]] = {
        "classifier.0.weight": "of MobileNetV2, whose stem halves the resolution: name that net"
    }

    def __init__(self, num_classes: int, width: float = 0.5) -> None:
        super().__init__(num_classes, width)
        self.classifier: nn.Module = self.classifier[0]  # pyright: ignore[reportIndexIssue]


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


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # normal(0, sqrt(2 / n)), n = kernel area times output channels, of all groups together
            n = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=(2 / n) ** 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
