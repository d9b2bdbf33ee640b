import hashlib

import pytest
import torch
from torch import nn

from dalikd.kd.backbones import create_model

# of the published net of each width: its parameters for 100 classes, and the SHA-256 of its keys and shapes
PUBLISHED = {
    0.75: (1_475_692, "ca6412a76e6bf2131792b27efe873bf67555a4ba17e1cb47b39cbbc63fa8f33e"),
    1.0: (2_353_060, "81820961990fc898669f1403830bf9c308a8765579f7bb7b08c3d85eb4decd30"),
    1.4: (4_470_904, "ea24001011d6f9b441d2bb4f52ef766ce36be6b6228aed2980c9f6aff8b810cb"),
}


@pytest.mark.parametrize(("width", "published"), PUBLISHED.items())
def test_other_widths_have_the_published_keys_and_shapes(width, published):
    with torch.device("meta"):
        model = create_model("MobileNetV2", 100, width=width)
    text = "".join(f"{key}:{','.join(map(str, value.shape))};" for key, value in model.state_dict().items())
    assert sum(parameter.numel() for parameter in model.parameters()) == published[0]
    assert hashlib.sha256(text.encode()).hexdigest() == published[1]


def test_the_resolution_is_halved_by_the_stem_and_three_stages():
    with torch.device("meta"):
        features = create_model("MobileNetV2", 10).outputs(torch.empty(1, 3, 224, 224)).features
    assert [feature.shape[-1] for feature in features[:-1]] == [112, 112, 56, 28, 14]


def test_stages_end_linear_and_the_stem_in_a_relu():
    features = create_model("MobileNetV2", 10).outputs(torch.randn(2, 3, 32, 32)).features
    assert (features[0] >= 0).all()
    assert all((feature < 0).any() for feature in features[1:-1])


def test_only_blocks_of_equal_shape_have_a_shortcut():
    model = create_model("MobileNetV2", 10).eval()
    found = [[block.has_shortcut for block in stage] for stage in model.blocks]
    counts = (1, 2, 3, 4, 3, 3, 1)
    assert found == [[False] + [True] * (count - 1) for count in counts]
    block = model.blocks[1][1]
    nn.init.zeros_(block.conv[-1].weight)  # silences the convolutions
    features = torch.randn(1, 12, 8, 8)
    assert torch.equal(block(features), features)


def test_the_classifier_starts_small():
    torch.manual_seed(0)
    linear = create_model("MobileNetV2", 100).classifier[0]
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not linear.bias.any()


@pytest.mark.parametrize("width", [0, -1, 0.06])
def test_a_width_without_channels_is_named(width):
    with pytest.raises(ValueError, match=rf"MobileNetV2: width {width} leaves no channels; give at least 0.0625"):
        create_model("MobileNetV2", 10, width=width)
