"""Images in all four quarter turns, and joint labels of class and turn.

Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021, arXiv:2107.13715, after Lee et
al., "Self-supervised Label Augmentation via Input Transformations", ICML 2020, arXiv:1910.05872.
"""

import torch
from torch import Tensor

__all__ = ["TURNS", "class_logits", "joint_labels", "rotations"]

TURNS = 4  # by 0, 90, 180 and 270 degrees


def rotations(images: Tensor) -> Tensor:
    """Every image in all four turns, as one gather on the images' device.

    Args:
        images: [B, C, S, S], of any dtype.

    Returns:
        [4B, C, S, S] in the images' dtype and memory format: row 4i + k is image i after k quarter turns
        counter-clockwise, `torch.rot90(image, k, (1, 2))`.

    Raises:
        ValueError: the images are not square.
    """
    batch, channels, height, width = images.shape
    if height != width:
        raise ValueError(f"images of {height} x {width} pixels have no quarter turns: make them square")
    places = torch.arange(height * width, device=images.device).reshape(height, width)
    sources = torch.stack([torch.rot90(places, turn) for turn in range(TURNS)])
    # pixel by pixel, whatever the memory format: that of most batches, channels_last, is read and written as it lies
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, sources.flatten())
    turned = pixels.reshape(TURNS * batch, height, width, channels).permute(0, 3, 1, 2)
    last = images.is_contiguous(memory_format=torch.channels_last)
    return turned if last else turned.contiguous()


def joint_labels(labels: Tensor) -> Tensor:
    """The labels of the turned images: 4y + k for class y after k turns.

    Args:
        labels: int64 [B].

    Returns:
        int64 [4B], in the order of `rotations`.
    """
    return (TURNS * labels[:, None] + torch.arange(TURNS, device=labels.device)).flatten()


def class_logits(joint: Tensor) -> Tensor:
    """Scores of the classes: the sum of a class's four joint logits, row by row.

    Args:
        joint: logits of class and turn, [n, 4C].

    Returns:
        [n, C], in at least float32.

    Raises:
        ValueError: these are no logits of four turns.
    """
    if joint.shape[1] % TURNS:
        raise ValueError(f"logits of {joint.shape[1]} joint classes: give {TURNS} for each class, those of its turns")
    return joint.unflatten(1, (-1, TURNS)).sum(dim=2, dtype=torch.promote_types(joint.dtype, torch.float32))
