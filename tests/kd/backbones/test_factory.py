"""Every net against the published one of its name: keys, shapes, features, logits, batch statistics."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from dalikd.kd.backbones import create_model

PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "backbones.json").read_text())
WITH_VALUES = [name for name, entry in PUBLISHED.items() if "logits" in entry]
OPTION_A = [f"resnet{depth}_option_a" for depth in (20, 32, 44, 56, 110)]
HE_NORMAL = ["resnet8", "resnet8x4", "resnet20_option_a", "wrn_16_2", "vgg8", "ResNet50", "MobileNetV2"]
TORCH_DEFAULT = ["ShuffleV1", "ShuffleV2"]
ONE_PER_FAMILY = [*HE_NORMAL, *TORCH_DEFAULT]


def meta_model(name, num_classes=100):
    with torch.device("meta"):  # no memory and no time for the large ones
        return create_model(name, num_classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_has_the_published_keys_order_and_shapes(name):
    model = meta_model(name)
    text = "".join(f"{key}:{','.join(map(str, value.shape))};" for key, value in model.state_dict().items())
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED[name]["keys_sha256"]
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_features_have_the_published_shapes(name):
    logits, features, *_ = meta_model(name).outputs(torch.empty(2, 3, 32, 32, device="meta"))
    assert [list(feature.shape) for feature in features] == PUBLISHED[name]["feature_shapes"]
    assert logits.shape == (2, 100)


@pytest.mark.parametrize("name", WITH_VALUES)
def test_values_are_the_published_ones(name, fill, images):
    entry = PUBLISHED[name]
    model = fill(create_model(name, 100), entry["gain"])
    expected = torch.tensor(entry["logits"], dtype=torch.float64)
    with torch.no_grad():
        logits, features, *_ = model.outputs(images)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    for feature, figures in zip(features, entry["features"], strict=True):
        assert feature.mean().item() == pytest.approx(figures["mean"], abs=1e-9)
        assert feature.std(correction=0).item() == pytest.approx(figures["std"], abs=1e-9)
        assert feature.flatten()[:4].tolist() == pytest.approx(figures["first4"], abs=1e-9)


@pytest.mark.parametrize("name", [name for name, entry in PUBLISHED.items() if "preactivations" in entry])
def test_features_before_the_last_relu_are_the_published_ones(name, fill, images):
    entry = PUBLISHED[name]
    model = fill(create_model(name, 100), entry["gain"])
    with torch.no_grad():
        found, usual = model.preactivations(images), model.outputs(images)
    assert torch.equal(found.logits, usual.logits)
    assert all(torch.equal(one, other) for one, other in zip(found.features, usual.features, strict=True))
    assert usual.preactivations == ()
    for feature, figures in zip(found.preactivations, entry["preactivations"], strict=True):
        assert feature.mean().item() == pytest.approx(figures["mean"], abs=1e-9)
        assert feature.std(correction=0).item() == pytest.approx(figures["std"], abs=1e-9)
        assert feature.flatten()[:4].tolist() == pytest.approx(figures["first4"], abs=1e-9)


@pytest.mark.parametrize("name", WITH_VALUES)
def test_one_forward_in_training_mode_updates_each_batch_norm_once(name, fill, images):
    entry = PUBLISHED[name]
    model = fill(create_model(name, 100), entry["gain"]).train()
    with torch.no_grad():
        logits = model.preactivations(images).logits  # which does all that `outputs` does
    expected = torch.tensor(entry["train_mode"]["logits_first8"], dtype=torch.float64)
    torch.testing.assert_close(logits[:, :8], expected, rtol=0, atol=1e-8)
    state = model.state_dict()
    for batch_norm in entry["train_mode"]["batch_norms"]:
        for statistic in ("running_mean", "running_var"):
            values = state[f"{batch_norm['name']}.{statistic}"][:4].tolist()
            assert values == pytest.approx(batch_norm[f"{statistic}_first4"], abs=1e-8)
    assert {value.item() for key, value in state.items() if key.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@pytest.mark.parametrize("side", [33, 48, 64, 224])
def test_any_side_gives_a_row_of_logits_an_image(name, side):
    logits, features, *_ = meta_model(name, 7).outputs(torch.empty(3, 3, side, side, device="meta"))
    assert logits.shape == (3, 7)
    assert features[-1].ndim == 2


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_images_need_not_be_square_and_pooled_is_what_the_last_layer_sees(name, fill):
    model = fill(create_model(name, 5), 1.0)
    last_layer = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        logits, features, *_ = model.outputs(torch.randn(2, 3, 33, 40).double())
        torch.testing.assert_close(last_layer(features[-1]), logits, rtol=0, atol=0)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_parameter_is_trained(name):
    model = create_model(name, 4)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", HE_NORMAL)
def test_convolutions_start_with_the_scale_of_their_paper(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            fan = module.in_channels if name.endswith("option_a") else module.out_channels
            expected = (2 / (fan * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06), key
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", TORCH_DEFAULT)
def test_convolutions_start_with_torchs_default_where_published_code_sets_nothing(name):
    torch.manual_seed(0)
    for key, module in create_model(name, 10).named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            fan_in = module.weight[0].numel()  # of one group
            bound = fan_in**-0.5
            assert 0.98 * bound < module.weight.abs().max().item() <= bound, key
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), key


@pytest.mark.parametrize("name", ["ShuffleV2", pytest.param("ShuffleV1", marks=pytest.mark.full)])
def test_channels_last_stays_from_stage_to_stage(name):
    model = create_model(name, 10).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        features = model.outputs(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)).features
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features[:-1])


@pytest.mark.parametrize("name", ["MobileNetV2", *TORCH_DEFAULT])
def test_a_compiler_sees_one_graph(name):
    model = create_model(name, 10).eval()
    found = torch._dynamo.explain(model.outputs)(torch.randn(2, 3, 32, 32))
    torch.compiler.reset()
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_unknown_name_lists_close_ones_and_says_how_to_name_timm_models():
    with pytest.raises(ValueError, match=r'unknown model "resnet21": did you mean .*resnet20.*\? .*"timm:NAME"'):
        create_model("resnet21", 10)
    with pytest.raises(ValueError, match="did you mean wrn_40_2"):
        create_model("WRN-40-2", 10)
    with pytest.raises(ValueError, match=r"there are resnet8, .*ResNet50, .*ShuffleV2_0_3\. timm"):
        create_model("qqq", 10)


def test_unknown_option_and_bad_number_of_classes_are_named():
    with pytest.raises(ValueError, match="resnet20 has no option pretrained; it takes none"):
        create_model("resnet20", 10, pretrained=True)
    with pytest.raises(ValueError, match="wrn_16_1 has no option depth; it takes dropout"):
        create_model("wrn_16_1", 10, depth=40)
    with pytest.raises(ValueError, match="vgg8: num_classes must be at least 1, not 0"):
        create_model("vgg8", 0)
