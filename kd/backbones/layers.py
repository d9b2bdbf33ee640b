"""What several nets share."""

from torch import Tensor, nn

__all__ = ["initialise_convolutions", "projection", "shuffle_channels"]


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


def shuffle_channels(features: Tensor, groups: int) -> Tensor:
    """Interleave the channels of [B, C, H, W]: the first of each group, then the second of each, and so on.

    The result is channels_last in memory, as what a convolution of a channels_last net gives: one copy, and the next
    convolution needs none.
    """
    pixels = features.permute(0, 2, 3, 1)
    return pixels.unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
