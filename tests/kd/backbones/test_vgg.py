import pytest
import torch

from dalikd.kd.backbones import create_model


@pytest.mark.parametrize(("side", "last_side"), [(32, 4), (48, 6), (64, 4), (96, 6)])
def test_images_from_64_pixels_on_are_pooled_once_more(side, last_side):
    with torch.device("meta"):
        features = create_model("vgg8", 10).outputs(torch.empty(1, 3, side, side)).features
    assert features[-2].shape == (1, 512, last_side, last_side)


def test_the_extra_pooling_takes_the_maximum_of_the_fourth_blocks_features(fill):
    model = fill(create_model("vgg8", 10), 1.2)
    features = model.outputs(torch.randn(1, 3, 64, 64).double()).features
    expected = model.block4(torch.nn.functional.max_pool2d(features[3], 2)).relu()
    torch.testing.assert_close(features[4], expected)


def test_last_layer_starts_small_and_without_bias():
    torch.manual_seed(0)
    classifier = create_model("vgg8", 100).classifier
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not classifier.bias.any()
