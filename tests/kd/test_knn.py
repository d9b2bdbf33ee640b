"""Nearest neighbours as a classifier, against plain numpy in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from dalikd.kd import knn
from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.checkpoints import find_classifier
from dalikd.kd.knn import classifier_inputs, knn_scores


def _unit(rows, seed):
    features = np.random.default_rng(seed).normal(size=(rows, 6))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize(("rows_at_once", "neighbours"), [(7, 5), (7, 9), (100, 1), (41, 41)])
def test_votes_are_those_of_brute_force(rows_at_once, neighbours, monkeypatch):
    """In pieces shorter than the number of neighbours, too."""
    monkeypatch.setattr(knn, "_ROWS_AT_ONCE", rows_at_once)
    features, bank, labels = _unit(13, 0), _unit(41, 1), np.random.default_rng(2).integers(0, 4, 41)
    expected = np.zeros((13, 5))
    for scores, feature in zip(expected, features, strict=True):
        cosines = bank @ feature
        for row in np.argsort(-cosines)[:neighbours]:
            scores[labels[row]] += np.exp(cosines[row] / 0.07)
    given = map(torch.from_numpy, (features, bank, labels))
    np.testing.assert_allclose(knn_scores(*given, 5, neighbours).numpy(), expected, rtol=1e-12)


def test_a_closer_row_outvotes_two_that_are_further():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([2, 0, 0])
    assert knn_scores(torch.tensor([[1.0, 0.0]]), bank, labels, 3, 3).argmax() == 2
    assert knn_scores(torch.tensor([[1.0, 0.0]]), bank, labels, 3, 3, temperature=100.0).argmax() == 0


def test_mixed_precision_leaves_similarities_alone():
    features, bank = (torch.from_numpy(_unit(rows, rows)).float() for rows in (8, 30))
    labels = torch.arange(30) % 3
    expected = knn_scores(features, bank, labels, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_scores(features, bank, labels, 3, 5), expected)


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "vgg8", "timm:test_resnet"])
def test_what_the_classifier_sees_is_the_pooled_feature(name):
    torch.manual_seed(0)
    net = Normalized(create_model(name, 7), (0.5,) * 3, (0.5,) * 3).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).byte()
    seen = classifier_inputs(net, find_classifier(net.model).values(), pixels)
    torch.testing.assert_close(seen, net.outputs(pixels, features=True).features[-1])
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_net_of_two_classifiers_has_the_features_of_both():
    model = create_model("timm:deit_tiny_distilled_patch16_224", 3, img_size=32, depth=1)
    net = Normalized(model, (0.5,) * 3, (0.5,) * 3).eval()
    parts = find_classifier(model)
    assert list(parts) == ["head", "head_dist"]
    seen = classifier_inputs(net, parts.values(), torch.zeros(2, 3, 32, 32))
    logits = [part(rows) for part, rows in zip(parts.values(), seen.chunk(2, dim=1), strict=True)]
    torch.testing.assert_close((logits[0] + logits[1]) / 2, net(torch.zeros(2, 3, 32, 32)))


def test_a_classifier_that_is_not_called():
    net = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="Sequential does not call the classifier that it names"):
        classifier_inputs(net, [nn.Linear(3, 2)], torch.zeros(2, 3, 1, 1))
