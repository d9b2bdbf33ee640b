"""Nets by name."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.mobilenetv2 import MobileNetV2, MobileNetV2OfHSAKD
from dalikd.kd.backbones.resnet import BasicBlock, ResNet
from dalikd.kd.backbones.resnet_bottleneck import BottleneckResNet
from dalikd.kd.backbones.resnet_imagenet import ImageNetBottleneck, ImageNetResNet
from dalikd.kd.backbones.resnet_option_a import OptionAResNet
from dalikd.kd.backbones.shufflenet_v1 import ShuffleNetV1
from dalikd.kd.backbones.shufflenet_v2 import ShuffleNetV2
from dalikd.kd.backbones.timm_models import create_timm_model
from dalikd.kd.backbones.vgg import VGG
from dalikd.kd.backbones.wrn import WideResNet

__all__ = ["create_model"]

_TIMM_PREFIX = "timm:"
_AUXILIARY_SUFFIX = "_aux"
_NARROW = (16, 16, 32, 64)
_TIMES_4 = (32, 64, 128, 256)

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, 8, _NARROW),
    "resnet14": partial(ResNet, 14, _NARROW),
    "resnet20": partial(ResNet, 20, _NARROW),
    "resnet32": partial(ResNet, 32, _NARROW),
    "resnet44": partial(ResNet, 44, _NARROW),
    "resnet56": partial(ResNet, 56, _NARROW),
    "resnet110": partial(ResNet, 110, _NARROW),
    "resnet8x4": partial(ResNet, 8, _TIMES_4),
    "resnet32x4": partial(ResNet, 32, _TIMES_4),
    "resnet20_option_a": partial(OptionAResNet, 20),
    "resnet32_option_a": partial(OptionAResNet, 32),
    "resnet44_option_a": partial(OptionAResNet, 44),
    "resnet56_option_a": partial(OptionAResNet, 56),
    "resnet110_option_a": partial(OptionAResNet, 110),
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "vgg8_bn": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg13_bn": partial(VGG, (2, 2, 2, 2, 2)),
    "ResNet50": partial(BottleneckResNet, (3, 4, 6, 3)),
    "resnet18_imagenet": partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34_imagenet": partial(ImageNetResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50_imagenet": partial(ImageNetResNet, ImageNetBottleneck, (3, 4, 6, 3)),
    "MobileNetV2": MobileNetV2,
    "mobilenetV2": MobileNetV2OfHSAKD,
    "MobileNetV2_0_25": partial(MobileNetV2, width=0.25),
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
    "ShuffleV2_0_3": partial(ShuffleNetV2, size=0.3),
}


def create_model(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Builds a freshly initialised net.

    `model(images)` gives logits [B, num_classes] of normalised images [B, 3, H, W], H and W >= 32 unless a timm
    model asks for more. `model.outputs(images)` gives a NetOutput: the logits, and the features of the stem and the
    stages, the last one pooled to [B, D]; `model.preactivations(images)`, which timm models lack, those before the
    stages' last ReLU. `model.stage_modules()` lists the modules that give those of the stages, the
    stem left out. The keys of the state_dict are the published ones.

    "NAME_aux" is the net NAME with auxiliary heads, an `AuxiliaryNet`, as HSAKD trains it: `model(images)` is a
    NetOutput then. Its mobilenetV2 is another net than MobileNetV2.

    Args:
        name: a net for small images, such as "resnet20", "wrn_40_2", "vgg13", "resnet20_option_a", "ResNet50",
            "MobileNetV2" or "ShuffleV2", for large ones "resnet18_imagenet", or any timm model as "timm:NAME"; each
            also with "_aux" behind, where its stages are known.
        num_classes: length of the logits.
        **kwargs: options of the net, such as `dropout` of the wide ones, `width` of MobileNetV2 and `size` of
            ShuffleV2; `detach_heads` of those with auxiliary heads; of `timm.create_model` for a timm model. Nothing is
            downloaded unless they say `pretrained=True`.

    Raises:
        ValueError: the name is unknown, the net has no such option or no stages to put heads behind, or `num_classes`
            is not positive.
    """
    if num_classes < 1:
        raise ValueError(f"{name}: num_classes must be at least 1, not {num_classes}")
    if name.endswith(_AUXILIARY_SUFFIX):
        detach_heads = kwargs.pop("detach_heads", True)
        backbone = create_model(name.removesuffix(_AUXILIARY_SUFFIX), num_classes, **kwargs)
        return AuxiliaryNet(backbone, num_classes, detach_heads=detach_heads)
    if name.startswith(_TIMM_PREFIX):
        return create_timm_model(name.removeprefix(_TIMM_PREFIX), num_classes, **kwargs)
    if name not in _BUILDERS:
        raise ValueError(_unknown_name(name))
    _check_options(name, kwargs)
    return _BUILDERS[name](num_classes=num_classes, **kwargs)


def _unknown_name(name: str) -> str:
    spellings = list(dict.fromkeys(map(str.lower, _BUILDERS)))
    close = get_close_matches(name.lower().replace("-", "_"), spellings, n=4)
    close = [known for spelling in close for known in _BUILDERS if known.lower() == spelling]
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(_BUILDERS)}."
    return f'unknown model "{name}": {hint} timm models are named "timm:NAME", such as "timm:resnet34"'


def _check_options(name: str, options: dict[str, Any]) -> None:
    known = [option for option in inspect.signature(_BUILDERS[name]).parameters if option != "num_classes"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
