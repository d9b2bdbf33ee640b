import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _pixels(kind: torch.dtype) -> torch.Tensor:
    pixels = torch.randint(0, 256, (4, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels if kind == torch.uint8 else pixels.to(kind) + 0.25


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("kept_in", [torch.float32, torch.float64])
def test_equals_torchvision_in_float64(pixels, kept_in):
    """To the rounding of float32, in which scale and shift are kept."""
    images = _pixels(pixels)
    expected = functional.normalize(images.double() / 255, list(MEAN), list(STD))
    found = Normalized(nn.Identity(), MEAN, STD).to(kept_in)(images)
    assert found.dtype == kept_in
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_keeps_channels_last_memory(pixels):
    images = _pixels(pixels).contiguous(memory_format=torch.channels_last)
    found = Normalized(nn.Identity(), MEAN, STD)(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not found.is_contiguous()
    assert torch.equal(found, Normalized(nn.Identity(), MEAN, STD)(images.contiguous()))


def test_pixels_of_the_data_mean_become_zero():
    mean_pixels = (255 * torch.tensor(MEAN))[None, :, None, None].expand(1, 3, 2, 2)
    assert Normalized(nn.Identity(), MEAN, STD)(mean_pixels).abs().max() < 1e-6


def test_the_net_alone_is_what_is_saved():
    net = Normalized(create_model("resnet8", 3), MEAN, STD)
    assert net.model.state_dict().keys() == create_model("resnet8", 3).state_dict().keys()
    assert {key.removeprefix("model.") for key in net.state_dict()} == net.model.state_dict().keys()
    assert all(key.startswith("model.") for key in net.state_dict())


def test_statistics_move_with_the_net_and_are_not_trained():
    net = Normalized(nn.Conv2d(3, 1, 1), MEAN, STD).to("meta")
    assert net.scale.device.type == net.shift.device.type == "meta"
    assert [name for name, _ in net.named_parameters()] == ["model.weight", "model.bias"]


def test_features_are_given_where_they_are_asked_for():
    net = Normalized(create_model("resnet8", 4).eval(), MEAN, STD)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    logits, before, after = net(pixels), net.outputs(pixels, preactivations=True), net.outputs(pixels, features=True)
    assert all(torch.equal(found.logits, logits) for found in (before, after, net.outputs(pixels)))
    assert net.outputs(pixels).features == after.preactivations == ()
    for old, new in zip(before.preactivations, after.features[1:-1], strict=True):
        assert torch.equal(torch.relu(old), new)
        assert (old < 0).any()


def test_a_net_without_features_says_so():
    pixels = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="Flatten gives no stage features: take another net, or a loss without them"):
        Normalized(nn.Flatten(), MEAN, STD).outputs(pixels, features=True)
    with pytest.raises(ValueError, match="ResNet gives no features before their last ReLU"):
        Normalized(create_model("timm:resnet18", 4), MEAN, STD).outputs(pixels, preactivations=True)
