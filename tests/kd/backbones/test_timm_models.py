import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from dalikd.kd.backbones import create_model, input_statistics


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return create_model("timm:resnet18", 10).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_resnet18_is_timms_with_stage_features(resnet18, images):
    plain = timm.create_model("resnet18", num_classes=10).eval()
    assert list(plain.state_dict()) == list(resnet18.state_dict())
    plain.load_state_dict(resnet18.state_dict())
    with torch.no_grad():
        logits, features, *_ = resnet18.outputs(images)
        expected_logits = plain(images)
        final, expected_features = plain.forward_intermediates(images)
        expected_features.append(plain.global_pool(final))
        assert torch.equal(resnet18(images), expected_logits)
    assert torch.equal(logits, expected_logits)
    assert [tuple(feature.shape) for feature in features] == [
        (2, 64, 32, 32),
        (2, 64, 16, 16),
        (2, 128, 8, 8),
        (2, 256, 4, 4),
        (2, 512, 2, 2),
        (2, 512),
    ]
    assert all(torch.equal(feature, expected) for feature, expected in zip(features, expected_features, strict=True))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "efficientvit_m0", "resnetv2_18"])
def test_logits_are_timms_whatever_the_head(name):
    """Heads with tokens, with a norm before or in the classifier, and with a convolution for one."""
    model = create_model(f"timm:{name}", 7).eval()
    for module in model.modules():  # batch statistics as after training
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
    side = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        logits, features, *_ = model.outputs(images)
        torch.testing.assert_close(logits, model(images))
    assert features[-1].ndim == 2
    assert all(feature.ndim == 4 for feature in features[:-1])


DISTILLED = {
    "deit_tiny_distilled_patch16_224": {
        "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "drop_rate": 0.5,
    },
    "levit_128s": {"embed_dim": (16, 24), "key_dim": 8, "depth": (1, 1), "num_heads": (2, 3), "img_size": 64},
    "pit_ti_distilled_224": {"img_size": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", DISTILLED)
def test_a_net_with_a_distillation_token_gives_two_heads(name):
    model = create_model(f"timm:{name}", 7, **DISTILLED[name]).eval()
    with torch.no_grad():
        model.head_dist.apply(lambda part: part.bias.normal_() if isinstance(part, nn.Linear) else None)
        images = torch.randn(3, 3, DISTILLED[name]["img_size"], DISTILLED[name]["img_size"])
        logits, features, _, heads, *_ = model.outputs(images)
        assert torch.equal(logits, model(images))
        assert [head.shape for head in heads] == [(3, 7), (3, 7)]
        assert not torch.allclose(*heads)
        assert torch.equal((heads[0] + heads[1]) / 2, logits)
        assert (model.training, model.distilled_training, features[-1].dim()) == (False, False, 2)
        model.apply(lambda part: setattr(part, "p", 0.0) if isinstance(part, nn.Dropout) else None)
        model.train().set_distilled_training()
        assert all(map(torch.equal, model.outputs(images).heads, model(images)))
        assert (model.training, model.distilled_training) == (True, True)


def test_two_heads_are_compiled_in_one_graph():
    name = "deit_tiny_distilled_patch16_224"
    model, images = create_model(f"timm:{name}", 7, **DISTILLED[name]).eval(), torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    found = torch.compile(model.outputs, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(found.heads, model.outputs(images).heads)
    assert not model.training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_whole_and_independent(duplicate, resnet18, images):
    twin = duplicate(resnet18)
    with torch.no_grad():
        before = resnet18.outputs(images).logits
        assert torch.equal(twin.outputs(images).logits, before)
        twin.fc.weight.zero_()
        assert torch.equal(resnet18.outputs(images).logits, before)
        assert not torch.equal(twin.outputs(images).logits, before)
    assert type(twin) is type(resnet18)
    assert isinstance(twin, timm.models.resnet.ResNet)


def test_options_reach_timm():
    assert create_model("timm:test_resnet", 3, in_chans=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_input_statistics_are_those_of_the_pretrained_weights(resnet18):
    assert input_statistics(resnet18) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert input_statistics(create_model("timm:test_vit", 10)) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert input_statistics(create_model("resnet8", 10)) is None


def test_bad_names_and_options_are_named():
    with pytest.raises(ValueError, match=r'timm has no model "resnet19": did you mean .*resnet18'):
        create_model("timm:resnet19", 10)
    with pytest.raises(ValueError, match='timm has no model "": '):
        create_model("timm:", 10)
    with pytest.raises(ValueError, match=r"timm cannot build resnet18\.nonsense with the options \[\]: .*nonsense"):
        create_model("timm:resnet18.nonsense", 10)
    with pytest.raises(ValueError, match=r"resnet18 with the options \['colour'\]: .*colour"):
        create_model("timm:resnet18", 10, colour=3)
    with pytest.raises(ValueError, match="downloaded: allow it with pretrained=True"):
        create_model("timm:hf-hub:timm/resnet18.a1_in1k", 10)


def test_a_model_without_intermediates_says_so(resnet18, images, monkeypatch):
    monkeypatch.delattr(timm.models.resnet.ResNet, "forward_intermediates")
    with pytest.raises(ValueError, match="timm's ResNet gives no stage features"):
        resnet18.outputs(images)
