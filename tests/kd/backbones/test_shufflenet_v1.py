import torch
from torch import nn

from dalikd.kd.backbones import create_model


def test_features_are_after_relu():
    features = create_model("ShuffleV1", 10).outputs(torch.randn(2, 3, 32, 32)).features
    assert all((feature >= 0).all() for feature in features)


def test_a_strided_block_appends_its_pooled_input():
    block = create_model("ShuffleV1", 10).eval().layer1[0]
    features = torch.rand(1, 24, 5, 8)
    output = block(features)
    assert output.shape == (1, 240, 3, 4)
    pooled = nn.AvgPool2d(3, 2, 1)(features)
    assert torch.equal(output[:, 216:], pooled)


def test_a_block_of_stride_one_adds_its_input():
    block = create_model("ShuffleV1", 10).eval().layer1[1]
    nn.init.zeros_(block.conv3.weight)  # silences the convolutions
    features = torch.rand(1, 240, 4, 4)
    assert torch.equal(block(features), features)


def test_only_the_first_convolution_after_the_stem_has_no_groups():
    model = create_model("ShuffleV1", 10)
    groups = [block.conv1.groups for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    assert groups == [1] + [3] * 15
