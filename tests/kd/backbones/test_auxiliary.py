"""Nets with auxiliary heads against HSAKD's: keys, shapes, logits, heads; and what else a net is used for."""

import copy
import hashlib
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dalikd.kd.backbones import AuxiliaryNet, NetOutput, create_model, input_statistics
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.folding import fold_batch_norms
from dalikd.kd.manifold import check_mixable
from dalikd.kd.teacher import Teacher

DATA = json.loads((Path(__file__).parents[2] / "data" / "hsakd_models.json").read_text())
PUBLISHED, PAIRS = DATA["nets"], DATA["pairs"]
LARGE = ("vgg13_bn_aux", "ResNet50_aux", "resnet18_imagenet_aux")
WITH_VALUES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE))
    for name, entry in PUBLISHED.items()
    if "classes" in entry
]
NETS = ["resnet8", "resnet20_option_a", "wrn_16_1", "vgg8", "MobileNetV2_0_25", "ShuffleV1", "ShuffleV2_0_3"]


def meta_net(name, classes=100):
    with torch.device("meta"):  # no memory and no time for the large ones
        return create_model(name, classes)


def keys(net):
    return "".join(f"{key}:{','.join(map(str, value.shape))};" for key, value in net.state_dict().items())


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def small_net(name="resnet8_aux", **options):
    torch.manual_seed(0)
    return create_model(name, 3, **options)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_has_the_published_keys_order_and_shapes(name):
    net, entry = meta_net(name, 1000 if "imagenet" in name else 100), PUBLISHED[name]
    assert sha256(keys(net)) == entry["keys_sha256"]
    assert sum(values.numel() for values in net.parameters()) == entry["parameters"]
    assert sum(values.numel() for values in net.backbone.parameters()) == entry["backbone_parameters"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pairs_keys_are_those_of_two_nets(name):
    net = meta_net(PAIRS[name]["base"], 1000 if "imagenet" in PAIRS[name]["base"] else 100)
    assert sha256(keys(nn.ModuleDict({"net1": net, "net2": copy.deepcopy(net)}))) == PAIRS[name]["keys_sha256"]


@pytest.mark.parametrize("name", WITH_VALUES)
def test_values_are_the_published_ones(name, fill):
    entry = PUBLISHED[name]
    net = fill(create_model(name, entry["classes"]), entry["gain"])
    side = 224 if "imagenet" in name else 32
    images = torch.from_numpy(np.random.RandomState(0).randn(2, 3, side, side).astype(np.float32))

    def close(found, expected, tolerance):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(
            found[: len(expected), : expected.shape[-1]].double(), expected, rtol=0, atol=tolerance
        )

    with torch.no_grad():
        found = net(images.double())
        close(net.logits(images.double()), entry["logits_first8"], 1e-9)
        single = copy.deepcopy(net).float()(images)
        trained = net.train()(images.double())
    for given, tolerance in ((found, 1e-9), (single, 2e-5)):
        close(given.logits, entry["logits_first8"], tolerance)
        for head, expected in zip(given.heads, entry["heads_first8"], strict=True):
            assert head.shape == (2, 4 * entry["classes"])
            close(head, expected, tolerance)
    for feature, expected in zip(net.backbone.branch_features(found), entry["branch_features"], strict=True):
        assert list(feature.shape) == expected["shape"]
        assert feature.mean().item() == pytest.approx(expected["mean"], abs=1e-9)
        assert feature.std(correction=0).item() == pytest.approx(expected["std"], abs=1e-9)
    close(trained.logits, entry["train_mode"]["logits_first4"], 1e-8)
    for head, expected in zip(trained.heads, entry["train_mode"]["heads_first4_row0"], strict=True):
        close(head, [expected], 1e-8)
    counters = [values for key, values in net.state_dict().items() if key.endswith("num_batches_tracked")]
    assert {counter.item() for counter in counters} == {1}


@pytest.mark.parametrize("detach_heads", [True, False])
def test_the_heads_gradient_reaches_the_backbone_only_where_it_may(detach_heads):
    net = small_net(detach_heads=detach_heads)
    sum(head.square().sum() for head in net(IMAGES).heads).backward()
    assert all(values.grad is not None for values in net.auxiliary_classifier.parameters())
    reached = [key for key, values in net.backbone.named_parameters() if values.grad is not None]
    stages = [key for key, _ in net.backbone.named_parameters() if not key.startswith("fc.")]
    assert reached == ([] if detach_heads else stages)
    net.zero_grad()
    net.detach_heads = False
    found = net(IMAGES)
    (found.logits.sum() + sum(head.square().sum() for head in found.heads)).backward()
    assert all(values.grad is not None for values in net.parameters())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("side", [33, 64])
def test_any_staged_net_takes_heads_and_any_side(name, side):
    net = meta_net(f"{name}_aux", 7)
    found = net(torch.empty(3, 3, side, side, device="meta"))
    assert found.logits.shape == (3, 7)
    assert len(found.heads) == len(net.backbone.branch_points()) >= 3
    assert {tuple(head.shape) for head in found.heads} == {(3, 28)}


def test_vggs_heads_never_pool_before_the_last_block():
    net = meta_net("vgg8_aux", 7)
    assert [module.pools for module in net.auxiliary_classifier.modules() if hasattr(module, "pools")].count(
        "large"
    ) == 0
    assert net.backbone.block4.pools == "large"


def std(module):
    return module.weight.std().item()


def test_heads_start_as_published_ones():
    torch.manual_seed(0)
    for name in ("resnet8x4_aux", "wrn_16_2_aux", "ShuffleV1_aux", "mobilenetV2_aux"):
        for head in create_model(name, 10).auxiliary_classifier.modules():
            if isinstance(head, nn.Conv2d) and head.weight.numel() > 20000:
                fan_out = head.out_channels * head.kernel_size[0] ** 2
                assert std(head) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
    assert std(create_model("mobilenetV2_aux", 100).auxiliary_classifier.fc1) == pytest.approx(0.01, rel=0.02)
    assert not create_model("wrn_16_2_aux", 10).auxiliary_classifier.fc1.bias.any()
    for name in ("vgg8_bn_aux", "ShuffleV2_aux"):  # torch's default
        for head in create_model(name, 10).auxiliary_classifier.modules():
            if isinstance(head, nn.Conv2d) and head.weight.numel() > 20000:
                assert std(head) == pytest.approx((3 * head.weight[0].numel()) ** -0.5, rel=0.05), name


def test_heads_are_fresh_not_copies_of_the_backbone():
    net = small_net()
    own = {values.data_ptr() for values in net.backbone.parameters()}
    assert own.isdisjoint(values.data_ptr() for values in net.auxiliary_classifier.parameters())
    one, other = net.backbone.layer3[0].conv1, net.auxiliary_classifier.block_extractor2[0][0].conv1
    assert one.weight.shape == other.weight.shape
    assert not torch.equal(one.weight, other.weight)


# ------------------------------------------------------------------------------------------------ what uses a net


def test_with_pixels_logits_cost_no_head_and_heads_come_where_asked_for():
    pixels = (IMAGES * 50 + 128).clamp(0, 255)
    net = Normalized(small_net(), (0.5,) * 3, (0.2,) * 3).eval()
    calls = []
    net.model.auxiliary_classifier.register_forward_hook(lambda *_: calls.append(1))
    logits = net(pixels)
    assert torch.equal(net.outputs(pixels).logits, logits)
    torch.testing.assert_close(Teacher(copy.deepcopy(net))(pixels), logits)
    assert calls == []
    for wanted in ({"features": True}, {"preactivations": True}):
        found = net.outputs(pixels, **wanted)
        with_heads = net.outputs(pixels, **wanted, heads=True)
        assert torch.equal(found.logits, logits)
        assert (found.heads, [head.shape for head in with_heads.heads]) == ((), [(2, 12)] * 3)
        assert len(found.features) == len(with_heads.features) == 5
        assert len(found.preactivations) == len(with_heads.preactivations) == (3 if "preactivations" in wanted else 0)
    assert len(calls) == 2
    teacher = Teacher(net)
    assert (len(teacher.outputs(pixels).heads), len(teacher.outputs(pixels, heads=True).heads)) == (0, 3)
    plain = Normalized(create_model("resnet8", 3), (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(ValueError, match="ResNet has no auxiliary heads: take the net NAME_aux"):
        plain.outputs(pixels, heads=True)


@pytest.mark.parametrize(
    "name", ["resnet8_aux", "wrn_16_1_aux", "vgg8_aux", "MobileNetV2_0_25_aux", "timm:test_resnet_aux"]
)
def test_norms_fold_in_net_and_heads(name):
    net = small_net(name).double()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)
    folded = copy.deepcopy(net.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count = fold_batch_norms(folded)
    assert count > fold_batch_norms(copy.deepcopy(net.backbone)) > 0
    with torch.no_grad():
        expected, found = net(IMAGES.double()), folded(IMAGES.double())
    for one, other in zip((expected.logits, *expected.heads), (found.logits, *found.heads), strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("name", ["resnet8_aux", "timm:test_resnet_aux"])
def test_a_copy_is_whole(duplicate, name):
    net = small_net(name).eval()
    with torch.no_grad():
        pairs = zip(net(IMAGES).heads, duplicate(net)(IMAGES).heads, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_stages_and_classifier_are_the_backbones():
    net = small_net()
    assert net.stage_modules() == net.backbone.stage_modules()
    assert net.get_classifier() is net.backbone.fc
    check_mixable(Normalized(net, (0.5,) * 3, (0.2,) * 3), "resnet8_aux", side=32)


def test_a_compiler_sees_one_graph():
    found = torch._dynamo.explain(small_net().eval())(IMAGES)
    torch.compiler.reset()
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_a_frozen_backbone_keeps_its_statistics_while_heads_learn():
    net = small_net().train()
    net.backbone.requires_grad_(False).eval()
    before = copy.deepcopy(net.backbone.state_dict())
    sum(head.sum() for head in net(IMAGES).heads).backward()
    assert all(torch.equal(values, before[key]) for key, values in net.backbone.state_dict().items())
    assert all(values.grad is not None for values in net.auxiliary_classifier.parameters())


# --------------------------------------------------------------------------------------------------------- names


def test_two_mobilenets_have_two_names():
    theirs, ours = meta_net("MobileNetV2"), meta_net("mobilenetV2")
    assert "classifier.0.weight" in theirs.state_dict()
    assert "classifier.weight" in ours.state_dict()
    sides = [net.outputs(torch.empty(1, 3, 32, 32, device="meta")).features[-2].shape[-1] for net in (theirs, ours)]
    assert sides == [2, 4]
    with pytest.raises(ValueError, match=r'unknown model "mobilenet_v2": did you mean MobileNetV2, mobilenetV2'):
        create_model("mobilenet_v2", 3)


def test_options_reach_the_backbone_and_bad_names_are_named():
    assert create_model("wrn_16_1_aux", 3, dropout=0.5).backbone.block1.layer[0].dropout.p == 0.5
    with pytest.raises(ValueError, match=r'unknown model "resnet21": did you mean .*resnet20'):
        create_model("resnet21_aux", 3)
    with pytest.raises(ValueError, match="resnet8 has no option depth"):
        create_model("resnet8_aux", 3, depth=4)
    with pytest.raises(ValueError, match="Linear names no stages to put auxiliary heads behind"):
        AuxiliaryNet(nn.Linear(2, 3), 3)


# ----------------------------------------------------------------------------------------------------- timm's nets


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_nfnet", "test_mambaout"])
@torch.no_grad()
def test_a_head_on_a_timm_net_is_the_rest_of_it_over_again(name):
    net = small_net(f"timm:{name}_aux").eval()
    side = net.pretrained_cfg["input_size"][-1]
    found = net(torch.randn(2, 3, side, side))
    assert isinstance(found, NetOutput)
    features, heads = net.backbone.branch_features(found), net.auxiliary_classifier
    assert [head.shape for head in found.heads] == [(2, 12)] * len(net.stage_modules())
    own = net.backbone.state_dict()
    for number, feature in enumerate(features[:-1], start=1):
        rest = getattr(heads, f"block_extractor{number}")
        rest.net.load_state_dict({key: own[key] for key in rest.net.state_dict()})
        torch.testing.assert_close(rest(feature), found.features[-1])


def test_timm_nets_that_cannot_be_taken_apart_are_named():
    with pytest.raises(ValueError, match="stages of timm's VisionTransformer does not run alone"):
        create_model("timm:test_vit_aux", 3)
    with pytest.raises(ValueError, match="timm's HighResolutionNet names no stages to put auxiliary heads behind"):
        meta_net("timm:hrnet_w18_small_aux", 3)


def test_what_timm_says_of_a_backbones_weights_holds_for_the_whole_net():
    assert input_statistics(create_model("timm:test_resnet_aux", 3)) == ((0.5,) * 3, (0.5,) * 3)
    assert input_statistics(create_model("resnet8_aux", 3)) is None
