"""Pixels in, logits out: each net with its own mean and standard deviation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput

__all__ = ["Normalisation", "Normalized"]


class Normalisation(NamedTuple):
    """How a net's images are normalised: a number a channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Normalized(nn.Module):
    """A net that takes pixels: its first operation normalises, so that batches stay pixels until here.

    Args:
        model: takes normalised images [B, 3, H, W].
        mean: of each channel, of pixels scaled to 0..1.
        std: of each channel, of pixels scaled to 0..1.

    Attributes:
        model: the net alone. Its state_dict is what is saved and published.
        normalisation: mean and std.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.normalisation = Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
        means, stds = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self.register_buffer("scale", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("shift", (-means / stds).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of pixels [B, 3, H, W], uint8 or float, 0..255."""
        return self.model(self.normalize(pixels))

    def outputs(self, pixels: Tensor, *, features: bool = False, preactivations: bool = False) -> NetOutput:
        """Logits of pixels [B, 3, H, W], and features of the stages where they are asked for.

        Args:
            pixels: uint8 or float, 0..255.
            features: of the stages.
            preactivations: before the stages' last ReLU; they come with the features.

        Raises:
            ValueError: the net does not give them.
        """
        if not features and not preactivations:
            return NetOutput(self(pixels))
        given = getattr(self.model, "preactivations" if preactivations else "outputs", None)
        if given is None:
            kind = "features before their last ReLU" if preactivations else "stage features"
            raise ValueError(f"{type(self.model).__name__} gives no {kind}: take another net, or a loss without them")
        return given(self.normalize(pixels))

    def normalize(self, pixels: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std, in the parameters' dtype and the pixels' memory format."""
        if pixels.is_cuda or not pixels.is_contiguous(memory_format=torch.channels_last):
            return torch.addcmul(self.shift, pixels.to(self.scale.dtype), self.scale)  # one pass
        # row by row: torch's vector code takes no innermost dimension of 3, and is three times as fast as what does
        batch, channels, height, width = pixels.shape
        rows = pixels.permute(0, 2, 3, 1).reshape(batch * height, width * channels).to(self.scale.dtype)
        shift, scale = (values.flatten().repeat(width) for values in (self.shift, self.scale))
        return torch.addcmul(shift, rows, scale).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
