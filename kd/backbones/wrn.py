"""Wide residual nets for small images: wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146: pre-activation blocks B(3,3),
WRN-depth-factor with depth = 6n + 4.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import StagedNet

__all__ = ["WideResNet"]


class WideResNet(StagedNet):
    """A wide residual net.

    Args:
        depth: number of layers, 6n + 4 with n blocks a stage.
        widen_factor: channels of the stages are 16, 32, 64 times this.
        num_classes: length of the logits.
        dropout: probability of dropping an element between the two convolutions of a block.
    """

    _stages = ("block1", "block2", "block3")
    _classifier = "fc"

    def __init__(self, depth: int, widen_factor: int, /, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, depth
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self._widths, self._blocks, self._dropout = widths, blocks, dropout
        self.block1, self.block2, self.block3 = map(self.make_stage, range(3))
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    def make_stage(self, number: int, again: bool = False) -> "_Stage":
        """A fresh stage, to be initialised."""
        channels = self._widths[number + 1]
        in_channels, stride = (channels if again else self._widths[number]), 1 if again or number == 0 else 2
        return _Stage(in_channels, channels, self._blocks, stride, self._dropout)

    def branch(self, stages: list[nn.Module]) -> dict[str, nn.Module]:
        """An auxiliary head up to the pooled [B, D]: its last sum is normalised too."""
        extractor, pool = super().branch(stages).values()
        return {"block_extractor": extractor, "bn": nn.BatchNorm2d(self._widths[-1]), "relu": nn.ReLU(), "pool": pool}

    def stem(self, images: Tensor) -> Tensor:
        """The first convolution."""
        return self.conv1(images)

    def tail(self, features: Tensor) -> Tensor:
        """The last stage's sum, normalised, after ReLU, pooled to [B, D]."""
        return F.relu(self.bn1(features)).mean(dim=(2, 3))

    def norms_before_last_relu(self) -> list[nn.BatchNorm2d]:
        """Those that follow the stages."""
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]  # pyright: ignore[reportReturnType]

    def around_last_relu(self, stage: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        """A stage ends in a sum: what comes before a ReLU is the sum normalised by the norm that follows the stage.

        It is normalised here once more, by this process's batch in training, without a second update of running
        statistics.
        """
        norm, output = self.norms_before_last_relu()[self.stages.index(stage)], stage(features)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        own = norm.training or norm.running_mean is None
        means = (None, None) if own else (norm.running_mean, norm.running_var)
        return F.batch_norm(output, *means, norm.weight, norm.bias, own, 0.0, norm.eps), output


class _Stage(nn.Module):
    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int, dropout: float) -> None:
        super().__init__()
        rest = (_Block(channels, channels, 1, dropout) for _ in range(blocks - 1))
        self.layer = nn.Sequential(_Block(in_channels, channels, stride, dropout), *rest)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features)


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # the name is part of the published state_dict
        self.convShortcut = (
            None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        activated = F.relu(self.bn1(features))
        residual = F.relu(self.bn2(self.conv1(activated)))
        residual = self.conv2(self.dropout(residual))
        # the projection sees the activated features, the identity the raw ones
        shortcut = features if self.convShortcut is None else self.convShortcut(activated)
        return residual + shortcut


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # normal(0, sqrt(2 / n)), n = kernel area times output channels
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
