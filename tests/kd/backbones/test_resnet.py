import torch

from dalikd.kd.backbones import create_model


def test_features_are_after_relu():
    features = create_model("resnet8", 10).outputs(torch.randn(2, 3, 32, 32)).features
    assert all((feature >= 0).all() for feature in features)


def test_a_shortcut_that_changes_its_shape_is_projected_also_at_stride_1():
    assert "layer1.0.downsample.0.weight" in create_model("resnet8x4", 10).state_dict()
    assert "layer1.0.downsample.0.weight" not in create_model("resnet8", 10).state_dict()
