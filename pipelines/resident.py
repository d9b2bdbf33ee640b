"""Data sets held in memory: crops and flips as one gather on the device, equal bit for bit to the DALI graph's."""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Resident", "ResidentViews", "check_fits", "crop_and_flip"]

_PACKED_ROWS = 4096  # packed at once: bounds the scratch memory
_LARGEST_SHARE = 0.8  # of the free memory; nets and activations need the rest


@dataclass(frozen=True, eq=False)
class Resident:
    """The decoded images of a split, on the device.

    Attributes:
        pixels: int32 [N, S, S], a word holds red, green, blue and nothing.
        replaced: row that could not be decoded -> row whose image is in its place.
    """

    pixels: Tensor
    replaced: dict[int, int] = field(default_factory=dict)

    @classmethod
    def empty(cls, count: int, size: int, device: torch.device, replaced: dict[int, int] | None = None) -> Self:
        """Room for `count` images of `size` x `size`.

        Raises:
            ValueError: the device has not enough memory.
        """
        check_fits(count, size, device)
        return cls(torch.empty(count, size, size, dtype=torch.int32, device=device), replaced or {})

    @classmethod
    def from_arrays(cls, arrays: np.ndarray, device: torch.device) -> Self:
        """Take over images uint8 [N, S, S, 3]."""
        resident = cls.empty(len(arrays), arrays.shape[1], device)
        for start in range(0, len(arrays), _PACKED_ROWS):
            part = np.ascontiguousarray(arrays[start : start + _PACKED_ROWS])
            resident.put(slice(start, start + len(part)), torch.from_numpy(part).to(device))
        return resident

    def put(self, rows: slice | Tensor, images: Tensor) -> None:
        """Store images uint8 [B, S, S, 3] on the device."""
        self.pixels[rows] = _pack(images)


def check_fits(count: int, size: int, device: torch.device) -> None:
    """Check that the images fit into the device's memory.

    Raises:
        ValueError: they take more than 80 % of what is free.
    """
    needed, free = 4 * count * size * size, _free_bytes(device)
    if needed > _LARGEST_SHARE * free:
        raise ValueError(
            f"{count} images of {size} x {size} pixels need {needed / 2**30:.1f} GiB to stay in memory, of which "
            f"{device.type} has {free / 2**30:.1f} GiB free (at most {100 * _LARGEST_SHARE:.0f} % of it is taken): "
            "leave out --data.resident true if you gave it, or use a smaller --data.image_size, or fewer images with "
            "--data.limit and --data.val_limit"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


class ResidentViews:
    """Makes the views of images that lie decoded on the device.

    Args:
        resident: images of the view's side.
        padding: pixels on each side, where draws crop.
        border: what it holds: "zero" or "reflect".
        count: how many augmented views there are, each a flip, or a crop and a flip.
    """

    def __init__(self, resident: Resident, padding: int = 0, border: str = "zero", count: int = 0) -> None:
        self._pixels = resident.pixels
        self._padding, self._border, self._count = padding, border, count

    def __call__(self, rows: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gather a batch.

        Args:
            rows: int64 [B].
            draws: the view draws of the batch, as named by `DrawSpec.draw`.

        Returns:
            images, and augmented images for each augmented view: uint8 [B, side, side, 3] each.
        """
        pixels = self._move(self._pixels, rows, draws["crop"], draws["flip"]) if "flip" in draws else self._pixels[rows]
        own = torch.arange(len(rows), device=pixels.device)
        moved = (
            self._move(pixels, own, draws.get(f"augmented_crop{index}"), draws[f"augmented_flip{index}"])
            for index in range(self._count)
        )
        return _unpack(pixels), tuple(map(_unpack, moved))

    def _move(self, pixels: Tensor, rows: Tensor, crop: Tensor | None, flip: Tensor) -> Tensor:
        padding = 0 if crop is None else self._padding
        if crop is None:
            crop = torch.zeros(len(rows), 2, dtype=torch.int32, device=pixels.device)
        return _crop_and_flip(pixels, rows, crop, flip, padding, self._border)


def crop_and_flip(images: Tensor, rows: Tensor, crop: Tensor, flip: Tensor, padding: int, border: str) -> Tensor:
    """Pad, crop and flip images in one gather.

    Args:
        images: uint8 [N, S, S, 3].
        rows: which images, int64 [B].
        crop: top left corner (y, x) in the padded image, 0 to 2 x padding, integers [B, 2].
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
