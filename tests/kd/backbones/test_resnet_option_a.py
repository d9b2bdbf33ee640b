import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dalikd.kd.backbones import create_model

PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize(("depth", "count"), PARAMETERS.items())
def test_number_of_parameters_is_the_papers(depth, count):
    model = create_model(f"resnet{depth}_option_a", 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_keys_are_those_of_the_published_weights():
    batch_norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

    def layers(prefix, *numbers):
        for number in numbers:
            yield f"{prefix}conv{number}.weight"
            yield from (f"{prefix}bn{number}.{leaf}" for leaf in batch_norm)

    expected = [*layers("", 1)]
    for stage in (1, 2, 3):
        for block in range(3):
            expected += layers(f"layer{stage}.{block}.", 1, 2)
    expected += ["linear.weight", "linear.bias"]
    assert list(create_model("resnet20_option_a", 10).state_dict()) == expected


def test_shortcut_takes_every_second_pixel_and_fills_new_channels_on_both_sides_with_zeros():
    block = create_model("resnet20_option_a", 10).eval().layer2[0]
    nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    features = torch.rand(1, 16, 5, 7)
    output = block(features)
    assert output.shape == (1, 32, 3, 4)
    torch.testing.assert_close(output[:, 8:24], features[:, :, ::2, ::2])
    assert not output[:, :8].any()
    assert not output[:, 24:].any()


def test_logits_are_those_of_the_same_net_written_out(fill, images):
    model = fill(create_model("resnet20_option_a", 10), 1.05)

    def norm(features, name):
        weight, bias, mean, variance = (
            state[f"{name}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return F.batch_norm(features, mean, variance, weight, bias)

    state = model.state_dict()
    x = norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1").relu()
    for name in (f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)):
        grows = name in ("layer2.0", "layer3.0")
        residual = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=1 + grows, padding=1), f"{name}.bn1").relu()
        residual = norm(F.conv2d(residual, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if grows:
            zeros = torch.zeros_like(residual[:, : x.shape[1] // 2])
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
        x = (residual + x).relu()
    expected = F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), state["linear.weight"], state["linear.bias"])
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-10)
