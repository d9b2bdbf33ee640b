"""An exponential moving average of a net."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """Averages a net's weights and running statistics over training, without waiting for the device.

    The first update copies the net; every later one moves each value by (1 - decay) towards the net's. Counters
    (integer buffers) are copied.

    Args:
        model: the net that is averaged; `module` becomes a frozen copy of it.
        decay: share of the average that an update keeps, in (0, 1).

    Attributes:
        module: the averaged net, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the net as it stands after a step."""
        averages = [*self.module.parameters(), *self.module.buffers()]
        values = [*model.parameters(), *model.buffers()]
        pairs = [(average, value) for average, value in zip(averages, values, strict=True)]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        share = 1.0 - self._decay if self._updates else 1.0
        torch._foreach_lerp_([average for average, _ in floats], [value for _, value in floats], share)  # pyright: ignore[reportPrivateImportUsage]
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged net and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average."""
        self.module.load_state_dict(state["module"])
        self._updates = state["updates"]
