import pytest
import torch

from dalikd.kd.backbones.layers import shuffle_channels


@pytest.mark.parametrize(
    ("groups", "order"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 3, 1, 4, 2, 5]), (3, [0, 2, 4, 1, 3, 5])]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_of_the_groups_take_turns(groups, order, memory_format):
    features = torch.arange(2 * 6 * 3 * 5.0).reshape(2, 6, 3, 5).contiguous(memory_format=memory_format)
    shuffled = shuffle_channels(features, groups)
    assert torch.equal(shuffled, features[:, order])
    if groups > 1:
        assert shuffled.is_contiguous(memory_format=torch.channels_last)
