import torch
from torch.nn import functional as F

from dalikd.kd.backbones import create_model


def test_stage_features_are_raw_sums_and_the_pooled_ones_activated(fill, images):
    model = fill(create_model("wrn_16_2", 10), 1.1)
    features = model.outputs(images).features
    assert all((feature < 0).any() for feature in features[:-1])
    torch.testing.assert_close(features[-1], F.relu(model.bn1(features[-2])).mean(dim=(2, 3)))


def test_dropout_acts_in_training_only_and_adds_no_keys():
    model = create_model("wrn_16_1", 10, dropout=0.5)
    plain = create_model("wrn_16_1", 10)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))
    assert not torch.equal(model.train()(images), plain.train()(images))


def test_last_layer_starts_without_bias():
    assert not create_model("wrn_16_1", 10).fc.bias.any()
