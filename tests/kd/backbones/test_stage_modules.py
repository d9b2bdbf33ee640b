"""Every net lists the modules that give the features of its stages."""

import pytest
import torch
from torch import nn

from dalikd.kd.backbones import create_model

NETS = [
    "resnet8",
    "resnet20_option_a",
    "wrn_16_1",
    "vgg8",
    "ResNet50",
    "MobileNetV2_0_25",
    "mobilenetV2",
    "resnet18_imagenet",
    "ShuffleV1",
    "ShuffleV2_0_3",
    "timm:resnet18",
    "timm:convnext_atto",
]


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_the_outputs_of_stage_modules_are_the_stages_features(name: str):
    model = create_model(name, 5).eval()
    found = []
    for stage in model.stage_modules():
        stage.register_forward_hook(lambda *args: found.append(args[2]))
    features = model.outputs(torch.randn(2, 3, 64, 64)).features
    stages = features[:-1] if "convnext" in name else features[1:-1]  # no stem among them there
    assert len(found) == len(stages) >= 3
    for output, feature in zip(found, stages, strict=True):
        assert torch.equal(output, feature)


def test_a_timm_model_that_names_no_stages_has_none():
    model = create_model("timm:resnet18", 5)
    assert [type(stage) for stage in model.stage_modules()] == [nn.Sequential] * 4
    model.feature_info = [{"module": "nowhere"}]
    assert model.stage_modules() == []
    del model.feature_info
    assert model.stage_modules() == []


def test_a_transformers_stages_are_its_blocks():
    model = create_model("timm:vit_tiny_patch16_224", 5)
    assert model.stage_modules() == list(model.blocks)
