"""What the residual nets with projection shortcuts share."""

from torch import nn

__all__ = ["initialise_convolutions", "projection"]


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut: a strided 1x1 convolution with normalisation where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def initialise_convolutions(model: nn.Module) -> None:
    """Kaiming-normal by fan_out (He et al., ICCV 2015); everything else keeps torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
