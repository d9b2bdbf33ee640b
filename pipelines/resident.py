"""Data sets held in memory: crops and flips as one gather on the device, equal bit for bit to the DALI graph's."""

import numpy as np
import torch
from torch import Tensor

from dalikd.pipelines.augment import View

__all__ = ["ResidentViews", "crop_and_flip"]


class ResidentViews:
    """Makes the views of pictures that lie decoded on the device.

    Args:
        arrays: uint8 [N, side, side, 3], with side equal to `view.size`.
        view: pad_crop or center_crop.
        device: where the pictures are kept and gathered.
    """

    def __init__(self, arrays: np.ndarray, view: View, device: torch.device) -> None:
        assert arrays.shape[1:] == (view.size, view.size, 3), arrays.shape
        self._images = torch.from_numpy(np.ascontiguousarray(arrays)).to(device)
        self._view = view

    def __call__(self, rows: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gather a batch.

        Args:
            rows: int64 [B].
            draws: the view draws of the batch, as named by `DrawSpec.draw`.

        Returns:
            images and, where the draws hold an augmented view, augmented images: uint8 [B, side, side, 3].
        """
        images = (
            self._images[rows] if "flip" not in draws else self._move(self._images, rows, draws["crop"], draws["flip"])
        )
        if "augmented_flip" not in draws:
            return images, None
        own = torch.arange(len(images), device=images.device)
        crop = draws.get("augmented_crop")
        return images, self._move(images, own, crop, draws["augmented_flip"])

    def _move(self, images: Tensor, rows: Tensor, crop: Tensor | None, flip: Tensor) -> Tensor:
        padding = 0 if crop is None else self._view.padding
        if crop is None:
            crop = torch.zeros(len(rows), 2, dtype=torch.int32, device=images.device)
        return crop_and_flip(images, rows, crop, flip, padding, self._view.border)


def crop_and_flip(images: Tensor, rows: Tensor, crop: Tensor, flip: Tensor, padding: int, border: str) -> Tensor:
    """Pad, crop and flip pictures in one gather.

    Args:
        images: uint8 [N, S, S, C].
        rows: which pictures, int64 [B].
        crop: top left corner (y, x) in the padded picture, 0 to 2 x padding, integers [B, 2].
        flip: 1 to mirror left and right, [B].
        padding: pixels on each side.
        border: "zero", or "reflect" (without repeating the edge).

    Returns:
        uint8 [B, S, S, C].
    """
    side = images.shape[1]
    steps = torch.arange(side, device=images.device)
    mirrored = torch.where(flip[:, None] > 0, steps.flip(0), steps)
    ys = steps + (crop[:, :1] - padding)
    xs = mirrored + (crop[:, 1:] - padding)
    if border == "reflect":
        return _gather(images, rows, _reflect(ys, side), _reflect(xs, side))
    picked = _gather(images, rows, ys.clamp(0, side - 1), xs.clamp(0, side - 1))
    if not padding:
        return picked
    inside_y, inside_x = (ys >= 0) & (ys < side), (xs >= 0) & (xs < side)
    return picked * (inside_y[:, :, None, None] & inside_x[:, None, :, None])


def _reflect(index: Tensor, side: int) -> Tensor:
    return (side - 1) - (index.abs() - (side - 1)).abs()


def _gather(images: Tensor, rows: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    return images[rows[:, None, None], ys[:, :, None], xs[:, None, :]]
