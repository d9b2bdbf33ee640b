"""VGG nets for small images, with batch norm and one linear layer: vgg8, vgg11, vgg13, vgg16, vgg19.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
arXiv:1409.1556; the form for 32x32 images as in Tian et al., "Contrastive Representation Distillation", ICLR 2020,
arXiv:1910.10699.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["VGG"]

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """A VGG net of five blocks.

    Images of 64 pixels and more are pooled once more, before the last block, than smaller ones.

    Args:
        convolutions: how many 3x3 convolutions each of the five blocks has.
        num_classes: length of the logits.
    """

    def __init__(self, convolutions: tuple[int, int, int, int, int], /, num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(3, _WIDTHS[0], convolutions[0])
        self.block1 = _block(_WIDTHS[0], _WIDTHS[1], convolutions[1])
        self.block2 = _block(_WIDTHS[1], _WIDTHS[2], convolutions[2])
        self.block3 = _block(_WIDTHS[2], _WIDTHS[3], convolutions[3])
        self.block4 = _block(_WIDTHS[3], _WIDTHS[4], convolutions[4])
        self.activations = nn.ModuleList(nn.ReLU() for _ in _WIDTHS)  # of each block's last layer
        self.classifier = nn.Linear(_WIDTHS[4], num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of normalised images [B, 3, H, W]."""
        return self.forward_features_and_logits(images)[1]

    def stage_modules(self) -> list[nn.Module]:
        """Modules whose outputs are the features of the blocks but the first, which is the stem; shallow to deep."""
        return list(self.activations)[1:]

    def forward_features_and_logits(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features of each of the five blocks (after ReLU, before pooling), then the pooled [B, D]; and the logits."""
        relu = self.activations
        block0 = relu[0](self.block0(images))
        block1 = relu[1](self.block1(F.max_pool2d(block0, 2)))
        block2 = relu[2](self.block2(F.max_pool2d(block1, 2)))
        block3 = relu[3](self.block3(F.max_pool2d(block2, 2)))
        block4_input = F.max_pool2d(block3, 2) if images.shape[2] >= 64 else block3
        block4 = relu[4](self.block4(block4_input))
        pooled = block4.mean(dim=(2, 3))
        return [block0, block1, block2, block3, block4, pooled], self.classifier(pooled)


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU and so on; the last ReLU is left to the caller."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers[:-1])


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
