"""VGG nets for small images, with batch norm and one linear layer: vgg8, vgg11, vgg13, vgg16, vgg19.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
arXiv:1409.1556; the form for 32x32 images as in Tian et al., "Contrastive Representation Distillation", ICLR 2020,
arXiv:1910.10699.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import NetOutput, ReluBlock, StagedNet, leave_initialised

__all__ = ["VGG"]

_WIDTHS = (64, 128, 256, 512, 512)
_LARGE = 64 >> 3  # after three poolings
_Pools = Literal["always", "large", "never"]


class VGG(StagedNet):
    """A VGG net of five blocks.

    Images of 64 pixels and more are pooled once more, before the last block, than smaller ones.

    Args:
        convolutions: how many 3x3 convolutions each of the five blocks has.
        num_classes: length of the logits.
    """

    _stages = ("block1", "block2", "block3", "block4")
    _classifier = "classifier"
    _initialise_head = staticmethod(leave_initialised)

    def __init__(self, convolutions: tuple[int, int, int, int, int], /, num_classes: int) -> None:
        super().__init__()
        self._convolutions = convolutions
        self.block0 = _Block(3, _WIDTHS[0], convolutions[0], pools="never")
        self.block1, self.block2, self.block3, self.block4 = map(self.make_stage, range(4))
        self.classifier = nn.Linear(_WIDTHS[4], num_classes)
        _initialise(self)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh block, from block1 on, to be initialised."""
        in_channels = _WIDTHS[-1] if again else _WIDTHS[number]
        pools: _Pools = "never" if again else "large" if number == 3 else "always"
        return _Block(in_channels, _WIDTHS[number + 1], self._convolutions[number + 1], pools)

    def branch_points(self) -> tuple[int, ...]:
        """All blocks but block3."""
        return -1, 0, 1, 3

    def branch_features(self, found: NetOutput) -> tuple[Tensor, ...]:
        """What auxiliary heads take, of what `outputs` gives."""
        return *found.features[:3], found.features[4]

    def branch(self, stages: list[nn.Module]) -> dict[str, nn.Module]:
        """An auxiliary head up to the pooled [B, D].

        Published ones have poolings and ReLUs as modules of their own, which are a block's own here: something must
        stand in their places. They never pool before the last block.
        """
        parts: list[nn.Module] = []
        for stage in stages:
            assert isinstance(stage, _Block)
            if stage.pools == "large":
                stage.pools = "never"
            parts += [nn.Identity()] * (stage.pools == "always") + [stage, nn.Identity()]
        return super().branch(parts)

    def stem(self, images: Tensor) -> Tensor:
        """The first block."""
        return self.block0(images)


class _Block(ReluBlock, nn.Sequential):
    """Max pooling, then convolution, batch norm, ReLU and so on.

    Args:
        in_channels: of the input.
        channels: of the output.
        convolutions: how many.
        pools: its input always, never, or where that is as large as images of 64 pixels make it.
    """

    def __init__(self, in_channels: int, channels: int, convolutions: int, pools: _Pools = "always") -> None:
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            in_channels = channels
        super().__init__(*layers[:-1])
        self.pools = pools

    def preactivation(self, features: Tensor) -> Tensor:
        if self.pools == "always" or (self.pools == "large" and features.shape[2] >= _LARGE):
            features = F.max_pool2d(features, 2)
        return nn.Sequential.forward(self, features)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # normal(0, sqrt(2 / n)), n = kernel area times output channels
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
