import torch

from dalikd.kd.backbones import create_model


def test_first_stage_is_projected_without_losing_resolution():
    with torch.device("meta"):
        model = create_model("ResNet50", 10)
        features = model.outputs(torch.empty(1, 3, 40, 40)).features
    assert model.layer1[0].shortcut[0].weight.shape == (256, 64, 1, 1)
    assert [feature.shape[-1] for feature in features[:-1]] == [40, 40, 20, 10, 5]
