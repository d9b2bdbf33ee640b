"""Batch-level augmentation of pixels on the device: mixup, CutMix, Cutout.

Nothing is drawn here. The draws come in as tensors, one set per image, so that the result depends on the samples
alone and not on the generator, the batch size or the rank. Images are NCHW (any memory format, which is kept), in
pixel space.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MixDraws", "Mixed", "cutmix", "cutout", "mixup"]


class MixDraws(NamedTuple):
    """What chance decided for each image of a batch."""

    partner: Tensor  # int64 [B], row of this batch to mix in
    lam: Tensor  # float32 [B], wanted share of the image itself
    center: Tensor  # float32 [B, 2], (y, x) as fractions of the height and width, in [0, 1)


class Mixed(NamedTuple):
    """Augmented images and what each is made of."""

    images: Tensor  # [B, C, H, W]
    partner: Tensor  # int64 [B], row of the batch that was mixed in
    lam: Tensor  # float32 [B], share of the image itself


def mixup(images: Tensor, draws: MixDraws) -> Mixed:
    """Blend each image with its partner: lam * x + (1 - lam) * x[partner].

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: partner and lam are used.

    Returns:
        float32 images (float64 stays), the partners and lam as drawn.

    Raises:
        ValueError: the draws are not for as many images as there are.
    """
    _check_draws(images, draws)
    dtype = torch.promote_types(images.dtype, torch.float32)
    lam = draws.lam.to(dtype)[:, None, None, None]
    mixed = torch.lerp(images[draws.partner].to(dtype), images.to(dtype), lam)
    return Mixed(mixed, draws.partner, draws.lam)


def cutmix(images: Tensor, draws: MixDraws) -> Mixed:
    """Paste a box of the partner into each image.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
    arXiv 1905.04899. The box has sqrt(1 - lam) of each side, rounded down to an even number of pixels, and is clipped
    at the border; lam is then recomputed from the pixels that were really replaced.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: all three are used; the centre pixel is floor(center * side).

    Returns:
        Images in the dtype of the input, the partners and the recomputed lam.

    Raises:
        ValueError: the draws are not for as many images as there are.
    """
    _check_draws(images, draws)
    height, width = images.shape[-2:]
    ratio = (1 - draws.lam).sqrt()
    top, bottom = _even_span(draws.center[:, 0], ratio, height)
    left, right = _even_span(draws.center[:, 1], ratio, width)
    box = _box_mask(top, bottom, left, right, height, width)
    replaced = (bottom - top) * (right - left) / (height * width)
    return Mixed(torch.where(box, images[draws.partner], images), draws.partner, 1 - replaced)


def cutout(images: Tensor, draws: MixDraws, side: int, fill: Sequence[float]) -> Mixed:
    """Fill one square of each image, centred anywhere and clipped at the border.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, arXiv 1708.04552.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: center is used.
        side: of the square, in pixels, at least 1.
        fill: one pixel value per channel. The mean of the data set times 255 is zero after normalising.

    Returns:
        float32 images (float64 stays), each image as its own partner, lam = 1: the label is untouched.

    Raises:
        ValueError: side below 1, not one fill value per channel, or draws for another number of images.
    """
    _check_draws(images, draws)
    if side < 1:
        raise ValueError(f"cutout side is {side}: give at least 1 pixel")
    if len(fill) != images.shape[1]:
        raise ValueError(f"cutout fill has {len(fill)} values for {images.shape[1]} channels: give one per channel")
    height, width = images.shape[-2:]
    hole = _box_mask(
        *_square_span(draws.center[:, 0], side, height), *_square_span(draws.center[:, 1], side, width), height, width
    )
    filled = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
    for channel, value in enumerate(fill):  # scalars go as kernel arguments: a tensor of them would be a blocking copy
        filled[:, channel].masked_fill_(hole[:, 0], value)
    return Mixed(filled, torch.arange(len(images), device=images.device), torch.ones_like(draws.lam))


def _center_pixel(fraction: Tensor, side: int) -> Tensor:
    """Integer pixel [B]; the clamp catches a fraction that rounded up to 1."""
    return (fraction * side).long().clamp(max=side - 1)


def _even_span(center: Tensor, ratio: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last pixel [B] of 2 * (floor(side * ratio) // 2) pixels around the centre, clipped."""
    middle, half = _center_pixel(center, side), (side * ratio).long() // 2
    return (middle - half).clamp(min=0), (middle + half).clamp(max=side)


def _square_span(center: Tensor, length: int, side: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last pixel [B] of `length` pixels around the centre, clipped."""
    start = _center_pixel(center, side) - length // 2
    return start.clamp(min=0), (start + length).clamp(max=side)


def _box_mask(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Bool [B, 1, H, W], true inside each image's box; bounds are int64 [B], the last ones exclusive."""
    rows = torch.arange(height, device=top.device)[None, :]
    columns = torch.arange(width, device=top.device)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _check_draws(images: Tensor, draws: MixDraws) -> None:
    batch = len(images)
    shapes = tuple(tuple(draw.shape) for draw in draws)
    if shapes != ((batch,), (batch,), (batch, 2)):
        raise ValueError(f"draws have shapes {shapes} for {batch} images: give partner [B], lam [B], center [B, 2]")
