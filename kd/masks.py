"""Where an image is replaced: boxes and cells of a grid, from fractions and numbers that were drawn.

Everything is worked out on the device, one box or one set of cells an image, without waiting for it.
"""

import torch
from torch import Tensor

__all__ = ["box_mask", "cell_mask", "even_span", "square_span"]


def even_span(center: Tensor, ratio: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last pixel [B] of 2 * (floor(side * ratio) // 2) pixels around the centre, clipped."""
    middle, half = _center_pixel(center, side), (side * ratio).long() // 2
    return (middle - half).clamp(min=0), (middle + half).clamp(max=side)


def square_span(center: Tensor, length: int, side: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last pixel [B] of `length` pixels around the centre, clipped."""
    start = _center_pixel(center, side) - length // 2
    return start.clamp(min=0), (start + length).clamp(max=side)


def box_mask(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Bool [B, 1, H, W], true inside each image's box; bounds are integers [B], the last ones exclusive."""
    rows = torch.arange(height, device=top.device)[None, :]
    columns = torch.arange(width, device=top.device)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def cell_mask(numbers: Tensor, count: Tensor | int, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Bool [B, 1, H, W], true in the `count` ([B] or one for all) cells of each image with the smallest numbers."""
    places = numbers.argsort(dim=1, stable=True).argsort(dim=1)  # of equal numbers the first come first
    chosen = places < (count[:, None] if isinstance(count, Tensor) else count)
    rows, columns = grid
    cells = chosen.reshape(-1, 1, rows, 1, columns, 1).expand(-1, 1, rows, height, columns, width)
    return cells.reshape(-1, 1, rows * height, columns * width)


def _center_pixel(fraction: Tensor, side: int) -> Tensor:
    """Integer pixel [B]; the clamp catches a fraction that rounded up to 1."""
    return (fraction * side).long().clamp(max=side - 1)
