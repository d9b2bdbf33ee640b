import warnings
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalikd.kd.backbones import NetOutput, create_model
from dalikd.kd.folding import fold_batch_norms


def _random_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, scales and shifts far from those of the start, which folding wrongly would not change."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            ranges = {"running_mean": (-0.5, 0.5), "running_var": (0.5, 2), "weight": (0.5, 1.5), "bias": (-0.3, 0.3)}
            for name, (low, high) in ranges.items():
                if (values := getattr(norm, name)) is not None:
                    values.data.uniform_(low, high, generator=generator)
    return model


def _net(name: str) -> nn.Module:
    torch.manual_seed(1)
    return _random_norms(create_model(name, 5)).double().eval()


def _images(side: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# -------------------------------------------------------------------------------------------------- real nets


# norms that fold, counted by hand, and those that stay
COUNTS = {
    "resnet20": (1 + 9 * 2 + 2, 0),  # stem, two in each of nine blocks, two projections
    "resnet8x4": (1 + 3 * 2 + 3, 0),
    "resnet20_option_a": (1 + 9 * 2, 0),
    "wrn_16_2": (6, 7),  # conv1 -> bn2 of six blocks; each bn1 and the last norm follow a sum
    "wrn_16_1": (6, 7),
    "vgg8": (5, 0),
    "vgg13": (10, 0),
    "ResNet50": (1 + 16 * 3 + 4, 0),
    "MobileNetV2": (1 + 17 * 3 + 1, 0),  # stem, three in each of 17 blocks, the last convolution
    "ShuffleV1": (1 + 16 * 3, 0),  # the shuffle stands between a norm and the next convolution
    "ShuffleV2": (1 + 3 * 5 + 13 * 3 + 1, 0),
    "timm:resnet18": (1 + 8 * 2 + 3, 0),
    "timm:resnet50": (1 + 16 * 3 + 4, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_folded_net_gives_the_same_logits_and_features(name):
    net = _net(name)
    folded = deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fold_batch_norms(folded) == COUNTS[name][0]
    assert _norms(folded) == COUNTS[name][1]
    with torch.no_grad():
        expected, expected_features, *_ = net.outputs(_images())
        logits, features, *_ = folded.outputs(_images())
        _assert_same(folded(_images()), expected)
    _assert_same(logits, expected)
    assert len(features) == len(expected_features)
    for found, wanted in zip(features, expected_features, strict=True):
        _assert_same(found, wanted)


def test_a_net_that_treats_large_images_differently_is_folded_for_all():
    net = _net("vgg8")
    folded = deepcopy(net)
    assert fold_batch_norms(folded) == 5
    for side in (32, 64):
        with torch.no_grad():
            _assert_same(folded(_images(side)), net(_images(side)))


def test_the_rest_of_the_state_keeps_its_names():
    net = _net("resnet20")
    before = set(net.state_dict())
    fold_batch_norms(net)
    after = set(net.state_dict())
    gone = {key for key in before - after if "bn" in key or "downsample.1" in key}
    assert before - after == gone
    assert len(gone) == 5 * 21
    convolutions = [key for key in before if key.endswith(("conv1.weight", "conv2.weight", "downsample.0.weight"))]
    assert after - before == {key.replace("weight", "bias") for key in convolutions}


def test_folding_twice_finds_nothing_more():
    net = _net("resnet20")
    fold_batch_norms(net)
    assert fold_batch_norms(net) == 0


def test_dtype_and_memory_format_stay_and_the_arithmetic_is_float64():
    net = _net("resnet8x4").float().to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    exact = deepcopy(net).double()
    assert fold_batch_norms(net) == fold_batch_norms(exact)
    for name, values in net.named_parameters():
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert torch.equal(values, exact.get_parameter(name).float()), name
    assert net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------- what is not folded


class _Small(nn.Module):
    """A convolution and a norm behind it, joined by a function of both."""

    def __init__(self, join: Callable[["_Small", Tensor], Tensor], **settings: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, **settings)
        self.join = join

    def forward(self, images: Tensor) -> Tensor:
        return self.join(self, images)


def _chain(net: _Small, images: Tensor) -> Tensor:
    return F.relu(net.norm(net.conv(images)))


def _used_twice(net: _Small, images: Tensor) -> Tensor:
    hidden = net.conv(images)
    return net.norm(hidden) + hidden


def _conv_called_twice(net: _Small, images: Tensor) -> Tensor:
    return net.norm(net.conv(images)) + net.conv(images.flip(0))


def _norm_called_twice(net: _Small, images: Tensor) -> Tensor:
    return net.norm(net.conv(images)) + net.norm(images.repeat(1, 2, 1, 1)[:, :4])


def _weight_read(net: _Small, images: Tensor) -> Tensor:
    return net.norm(net.conv(images)) * net.conv.weight.mean()


def _something_between(net: _Small, images: Tensor) -> Tensor:
    return net.norm(F.relu(net.conv(images)))


def _on_one_path_only(net: _Small, images: Tensor) -> Tensor:
    hidden = net.conv(images)
    return net.norm(hidden) if images.shape[2] > 40 else net.norm(hidden) + hidden.mean()


def _not_on_every_path(net: _Small, images: Tensor) -> Tensor:
    return net.norm(net.conv(images)) if images.shape[2] > 40 else images


@pytest.mark.parametrize(
    ("join", "count"),
    [
        (_chain, 1),
        (_not_on_every_path, 1),
        (_used_twice, 0),
        (_conv_called_twice, 0),
        (_norm_called_twice, 0),
        (_weight_read, 0),
        (_something_between, 0),
        (_on_one_path_only, 0),
    ],
)
def test_only_a_convolution_that_feeds_nothing_but_its_norm_is_folded(join, count):
    net = _random_norms(_Small(join)).double().eval()
    folded = deepcopy(net)
    assert fold_batch_norms(folded) == count
    for side in (32, 48):
        _assert_same(folded(_images(side)), net(_images(side)))


def test_a_feature_before_the_norm_is_left_as_it_is():
    class Features(_Small):
        def outputs(self, images: Tensor) -> NetOutput:
            hidden = self.conv(images)
            return NetOutput(self.norm(hidden), (hidden,))

    assert fold_batch_norms(Features(_chain).eval()) == 0


@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"track_running_stats": False}], ids=["plain", "no_affine", "no_statistics"]
)
def test_norms_without_statistics_stay(settings):
    net = _random_norms(_Small(_chain, **settings)).double().eval()
    folded = deepcopy(net)
    assert fold_batch_norms(folded) == int("track_running_stats" not in settings)
    _assert_same(folded(_images()), net(_images()))


def test_a_norm_in_training_mode_stays():
    net = _Small(_chain).eval()
    net.norm.train()
    assert fold_batch_norms(net) == 0
    assert isinstance(net.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["conv", "norm"])
def test_modules_that_somebody_listens_to_stay(name):
    net = _Small(_chain).eval()
    net.get_submodule(name).register_forward_hook(lambda *_: None)
    assert fold_batch_norms(net) == 0


def test_any_convolution_is_folded():
    torch.manual_seed(0)
    settings = {"stride": 2, "dilation": 2, "padding": 3, "padding_mode": "reflect", "groups": 2}
    net = nn.Sequential(nn.Conv2d(4, 8, 3, **settings), nn.BatchNorm2d(8, eps=0.1))
    net = _random_norms(net).double().eval()
    folded = deepcopy(net)
    assert fold_batch_norms(folded) == 1
    _assert_same(folded(_images(channels=4)), net(_images(channels=4)))


def test_another_convolution_with_the_same_weight_is_not_touched():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    net[3].weight = net[0].weight
    net = _random_norms(net).double().eval()
    folded = deepcopy(net)
    assert fold_batch_norms(folded) == 1
    _assert_same(folded(_images()), net(_images()))


def test_a_norm_with_two_names_is_replaced_under_both():
    net = _random_norms(_Small(lambda net, images: net.same(net.conv(images)))).double().eval()
    net.same = net.norm
    folded = deepcopy(net)
    assert fold_batch_norms(folded) == 1
    _assert_same(folded(_images()), net(_images()))


# ------------------------------------------------------------------------------------------ what cannot be traced


def _reads_values(net: _Small, images: Tensor) -> Tensor:
    return _chain(net, images) * len(images)


def _many_conditions(net: _Small, images: Tensor) -> Tensor:
    for side in range(7):
        images = images * 2 if images.shape[2] > side else images
    return _chain(net, images)


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (_reads_values, r"RuntimeError: .*len"),
        (_many_conditions, "ValueError: more than 64 paths lead through forward"),
    ],
)
def test_a_net_that_cannot_be_traced_warns_and_stays(join, reason):
    net = _random_norms(_Small(join)).double().eval()
    kept = deepcopy(net)
    with pytest.warns(UserWarning, match=f"_Small keeps its batch norms.*{reason}.*--teacher.fold_bn false") as caught:
        assert fold_batch_norms(kept) == 0
    assert len(caught) == 1
    assert torch.equal(kept(_images()), net(_images()))


def test_nets_without_batch_norm_are_not_traced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fold_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))) == 0
