import pytest
import torch

from dalikd.kd.rotation import class_logits, joint_labels, rotations


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_row_4i_plus_k_is_image_i_after_k_quarter_turns(dtype, memory_format):
    images = torch.randint(0, 256, (3, 3, 5, 5)).to(dtype).contiguous(memory_format=memory_format)
    turned = rotations(images)
    assert turned.shape == (12, 3, 5, 5)
    assert turned.dtype == dtype
    assert turned.is_contiguous(memory_format=memory_format)
    for row in range(12):
        assert torch.equal(turned[row], torch.rot90(images[row // 4], row % 4, (1, 2)))


def test_a_gradient_turns_back():
    images = torch.randn(2, 1, 4, 4, requires_grad=True)
    weights = torch.randn(8, 1, 4, 4)
    (rotations(images) * weights).sum().backward()
    for number in range(2):
        back = sum(torch.rot90(weights[4 * number + turn], -turn, (1, 2)) for turn in range(4))
        torch.testing.assert_close(images.grad[number], back)


def test_images_that_are_not_square_are_named():
    with pytest.raises(ValueError, match=r"images of 4 x 6 pixels have no quarter turns: .*square"):
        rotations(torch.zeros(2, 3, 4, 6))


def test_joint_labels_are_4y_plus_k():
    assert joint_labels(torch.tensor([2, 0, 5])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 20, 21, 22, 23]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_a_classs_score_is_the_sum_of_its_four_joint_logits(dtype, expected):
    joint = torch.arange(24.0).reshape(2, 12).to(dtype)
    scores = class_logits(joint)
    assert scores.dtype == expected
    assert scores.tolist() == [[6, 22, 38], [54, 70, 86]]
    with pytest.raises(ValueError, match="logits of 10 joint classes: give 4 for each class"):
        class_logits(torch.zeros(2, 10))
