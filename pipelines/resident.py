"""Data sets held in memory: crops and flips as one gather on the device, equal bit for bit to the DALI graph's."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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
        self._pixels = _pack(torch.from_numpy(np.ascontiguousarray(arrays)).to(device))
        self._view = view

    def __call__(self, rows: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gather a batch.

        Args:
            rows: int64 [B].
            draws: the view draws of the batch, as named by `DrawSpec.draw`.

        Returns:
            images and, where the draws hold an augmented view, augmented images: uint8 [B, side, side, 3].
        """
        pixels = self._move(self._pixels, rows, draws["crop"], draws["flip"]) if "flip" in draws else self._pixels[rows]
        if "augmented_flip" not in draws:
            return _unpack(pixels), None
        own = torch.arange(len(rows), device=pixels.device)
        augmented = self._move(pixels, own, draws.get("augmented_crop"), draws["augmented_flip"])
        return _unpack(pixels), _unpack(augmented)

    def _move(self, pixels: Tensor, rows: Tensor, crop: Tensor | None, flip: Tensor) -> Tensor:
        padding = 0 if crop is None else self._view.padding
        if crop is None:
            crop = torch.zeros(len(rows), 2, dtype=torch.int32, device=pixels.device)
        return _crop_and_flip(pixels, rows, crop, flip, padding, self._view.border)


def crop_and_flip(images: Tensor, rows: Tensor, crop: Tensor, flip: Tensor, padding: int, border: str) -> Tensor:
    """Pad, crop and flip pictures in one gather.

    Args:
        images: uint8 [N, S, S, 3].
        rows: which pictures, int64 [B].
        crop: top left corner (y, x) in the padded picture, 0 to 2 x padding, integers [B, 2].
        flip: 1 to mirror left and right, [B].
        padding: pixels on each side.
        border: "zero", or "reflect" (without repeating the edge).

    Returns:
        uint8 [B, S, S, 3].
    """
    return _unpack(_crop_and_flip(_pack(images), rows, crop, flip, padding, border))


def _pack(images: Tensor) -> Tensor:
    """RGB pixels [..., 3] as one int32 each [...]: a gather of words is faster than one of bytes."""
    return functional.pad(images, (0, 1)).view(torch.int32)[..., 0]


def _unpack(pixels: Tensor) -> Tensor:
    return pixels.contiguous()[..., None].view(torch.uint8)[..., :3].contiguous()


def _crop_and_flip(pixels: Tensor, rows: Tensor, crop: Tensor, flip: Tensor, padding: int, border: str) -> Tensor:
    side = pixels.shape[1]
    steps = torch.arange(side, device=pixels.device)
    mirrored = torch.where(flip[:, None] > 0, steps.flip(0), steps)
    ys = steps + (crop[:, :1] - padding)
    xs = mirrored + (crop[:, 1:] - padding)
    if border == "reflect":
        return _gather(pixels, rows, _reflect(ys, side), _reflect(xs, side))
    picked = _gather(pixels, rows, ys.clamp(0, side - 1), xs.clamp(0, side - 1))
    if not padding:
        return picked
    inside_y, inside_x = (ys >= 0) & (ys < side), (xs >= 0) & (xs < side)
    return torch.where(inside_y[:, :, None] & inside_x[:, None, :], picked, 0)


def _reflect(index: Tensor, side: int) -> Tensor:
    return (side - 1) - (index.abs() - (side - 1)).abs()


def _gather(pixels: Tensor, rows: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    side = pixels.shape[1]
    return torch.take(pixels, ((rows[:, None] * side + ys)[:, :, None] * side) + xs[:, None, :])
