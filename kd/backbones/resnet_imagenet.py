"""Residual nets for large images: resnet18_imagenet, resnet34_imagenet, resnet50_imagenet.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, table 1; bottleneck blocks halve
the resolution in their 3x3 convolution. The names in the state_dict are torchvision's.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones.layers import StagedNet, initialise_convolutions
from dalikd.kd.backbones.resnet import BasicBlock
from dalikd.kd.backbones.resnet_bottleneck import Bottleneck, stage_of

__all__ = ["ImageNetBottleneck", "ImageNetResNet"]


class ImageNetBottleneck(Bottleneck):
    """A bottleneck block with torchvision's names."""

    _shortcut = "downsample"


class ImageNetResNet(StagedNet):
    """A residual net of four stages behind a 7x7 convolution and a pooling, which quarter the resolution.

    Args:
        block: class of its blocks.
        blocks: how many each of the four stages has.
        num_classes: length of the logits.
    """

    _stages = ("layer1", "layer2", "layer3", "layer4")
    _classifier = "fc"
    _initialise_head = staticmethod(initialise_convolutions)

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, int, int, int], /, num_classes: int
    ) -> None:
        super().__init__()
        self._block, self._blocks = block, blocks
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = map(self.make_stage, range(4))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise_convolutions(self)

    def make_stage(self, number: int, again: bool = False) -> nn.Module:
        """A fresh stage, to be initialised."""
        return stage_of(self._block, number, self._blocks[number], again)

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the first stage."""
        return F.max_pool2d(super().stem(images), 3, stride=2, padding=1)
