"""From the host and from DALI's buffers to the tensors of a batch, without waiting for the device."""

import ctypes
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalikd.pipelines.draw_spec import MixDraws

__all__ = ["Batch", "DeviceTransfer", "pack", "unpack"]

_ALIGNMENT = 16  # bytes; no array of the packed buffer starts inside another's word
Layout = dict[Any, tuple[int, tuple[int, ...], torch.dtype]]  # name -> first byte, shape, type


@dataclass(frozen=True)
class Batch:
    """One process's microbatch, on the device.

    Attributes:
        images: uint8 [B, S, S, 3], the base view.
        augmented: uint8 [B, S, S, 3] for each augmented view, in the order of `DrawSpec.views`.
        labels: int64 [B].
        ids: rows of the data set, int64 [B].
        mix: draws of each mixing run, in the order of `DrawSpec.mixes`.
        total: rows of this microbatch over all processes.
        extras: what the loader was told to attach, each [B, ...].
    """

    images: Tensor
    augmented: tuple[Tensor, ...]
    labels: Tensor
    ids: Tensor
    mix: tuple[MixDraws, ...]
    total: int
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> Tensor:
        """The images as [B, 3, S, S], in channels_last memory, without a copy."""
        return self.images.permute(0, 3, 1, 2)

    @property
    def augmented_pixels(self) -> tuple[Tensor, ...]:
        """The augmented views as [B, 3, S, S], in channels_last memory, without a copy."""
        return tuple(view.permute(0, 3, 1, 2) for view in self.augmented)


class DeviceTransfer:
    """Brings arrays and pixels to the device.

    On a GPU the arrays of a batch travel as one: packed into a pinned buffer and sent by one asynchronous copy. On the
    CPU nothing is copied unless there are buffers.

    Args:
        device: where tensors go.
        buffers: 0: every tensor owns its memory. n: n sets of fixed buffers are used in turn, so that nothing is
            allocated in a step; a batch then holds until n - 1 further batches have been taken.
    """

    def __init__(self, device: torch.device, buffers: int = 0) -> None:
        self._device = device
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(buffers)]
        self._turn = 0

    def advance(self) -> None:
        """Take the next set of buffers: a new batch begins."""
        if self._slots:
            self._turn = (self._turn + 1) % len(self._slots)

    def arrays(self, arrays: Mapping[Hashable, np.ndarray], place: str = "arrays") -> dict[Any, Tensor]:
        """Send arrays together.

        Args:
            arrays: by any keys, of any types and shapes.
            place: name of the buffer; each is used once a batch.
        """
        if not arrays:
            return {}
        if self._device.type == "cpu" and not self._slots:
            return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        packed, layout = pack(arrays, pin=self._device.type == "cuda")
        buffer = self._buffer(place, packed.shape, packed.dtype)
        # the pinned buffer goes back to torch's pool, which keeps it until the copy is done
        return unpack(buffer.copy_(packed, non_blocking=True), layout)

    def pixels(self, name: str, output: Any) -> Tensor:
        """Take pixels, uint8 [B, ...], out of DALI's buffer, which goes back to its pool in stream order.

        On a GPU by DALI's own copy: what it gives by DLPack it frees in a thread that waits for the whole device.
        """
        if self._device.type == "cuda":
            buffer = self._buffer(name, torch.Size(output.shape()), torch.uint8)
            stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
            output.copy_to_external(ctypes.c_void_p(buffer.data_ptr()), stream, non_blocking=True)
            return buffer
        tensor = torch.from_dlpack(output)
        return self._buffer(name, tensor.shape, tensor.dtype).copy_(tensor) if self._slots else tensor

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for a tensor: new, or the first rows of a fixed buffer."""
        if not self._slots:
            return torch.empty(shape, dtype=dtype, device=self._device)
        slot = self._slots[self._turn]
        fixed = slot.get(name)
        if fixed is None or len(fixed) < shape[0] or fixed.shape[1:] != shape[1:]:
            fixed = slot[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return fixed[: shape[0]]


def pack(arrays: Mapping[Hashable, np.ndarray], pin: bool = False) -> tuple[Tensor, Layout]:
    """Put arrays one after the other into one buffer.

    Returns:
        uint8 [bytes], in pinned memory where asked for, and where each array lies in it.
    """
    layout, size = {}, 0
    sources: dict[Hashable, Any] = {}
    for name, array in arrays.items():
        source = torch.from_numpy(np.ascontiguousarray(array))
        layout[name], sources[name] = (size, tuple(source.shape), source.dtype), source
        size += -(-source.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for name, target in unpack(packed, layout).items():
        target.copy_(sources[name])
    return packed, layout


def unpack(packed: Tensor, layout: Layout) -> dict[Any, Tensor]:
    """The arrays of a packed buffer, as views."""
    views = {}
    for name, (start, shape, dtype) in layout.items():
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        views[name] = packed[start : start + count].view(dtype).reshape(shape)
    return views
