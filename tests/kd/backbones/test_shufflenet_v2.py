import hashlib

import pytest
import torch

from dalikd.kd.backbones import create_model

# of the published net of each size: its parameters for 100 classes, and the SHA-256 of its keys and shapes
PUBLISHED = {
    0.2: (220_388, "7995b45219cb2e963c315a9c76327caaa1130a6185e19e92101f3c8c9657c2fa"),
    0.5: (443_716, "81aef8061dbc5d3d7fec6636f5c00564d0da0e00936e139d5281afb43a9d78c0"),
    1.5: (2_580_548, "7fb7226090c00648d205014bd7d8203031785808448d6c30413e9a765f4d0bf3"),
    2: (5_521_860, "1f750750920de3269acfd26e60f086b1bb0e0b618ea8be5146c3c3b1ef78cb39"),
}


@pytest.mark.parametrize(("size", "published"), PUBLISHED.items())
def test_other_sizes_have_the_published_keys_and_shapes(size, published):
    with torch.device("meta"):
        model = create_model("ShuffleV2", 100, size=size)
    text = "".join(f"{key}:{','.join(map(str, value.shape))};" for key, value in model.state_dict().items())
    assert sum(parameter.numel() for parameter in model.parameters()) == published[0]
    assert hashlib.sha256(text.encode()).hexdigest() == published[1]


def test_a_block_passes_the_first_half_of_its_channels_to_the_even_places():
    block = create_model("ShuffleV2", 10).eval().layer1[1]
    features = torch.rand(1, 116, 4, 4)  # as a ReLU gives them
    output = block(features)
    assert torch.equal(output[:, ::2], features[:, :58])
    assert (output[:, 1::2] >= 0).all()


def test_an_unknown_size_lists_those_there_are():
    with pytest.raises(ValueError, match=r"ShuffleV2 has no size 0\.7; there are 0\.2, 0\.3, 0\.5, 1, 1\.5, 2$"):
        create_model("ShuffleV2", 10, size=0.7)
