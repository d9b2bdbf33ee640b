"""What every way to train has: a batch becomes inputs, inputs become named terms; what is evaluated and saved."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from dalikd.kd.normalize import Normalized
from dalikd.pipelines.transfer import Batch
from dalikd.trainers.evaluate import accuracy_sums

__all__ = ["Task"]


class Task(nn.Module, ABC):
    """A way to train. It holds all that is trained, and nothing else as a sub-module: a teacher is none.

    It alone is compiled, and then prepared for several processes. State beside weights and buffers goes through
    `get_extra_state` and `set_extra_state`.
    """

    @property
    @abstractmethod
    def nets(self) -> dict[str, Normalized]:
        """The nets that are averaged, evaluated and saved, by name; the first one's accuracy picks the best epoch."""

    @abstractmethod
    def prepare(self, batch: Batch, epoch: float) -> Any:
        """What `forward` takes of a batch: a NamedTuple. Called without gradient, and free of host syncs.

        Args:
            batch: on the device.
            epoch: epochs done, in fractions too.
        """

    @abstractmethod
    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Named scalar terms; "loss", which is minimised, among them."""

    def evaluate(self, net: Normalized, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch's images, float64 scalars; figures are the sums over "images".

        "images", "loss" and "top1" must be among them: a run is watched and its best epoch chosen by these.
        """
        return accuracy_sums(net(batch.pixels), batch.labels)

    def get_extra_state(self) -> dict[str, Any]:
        """State beside weights and buffers."""
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it from a saved run."""

    def metrics(self) -> dict[str, float | int | None]:
        """Running figures beside the terms. May wait for the device."""
        return {}

    @property
    def local_buffers(self) -> list[str]:
        """Names of buffers that processes do not share: what holds them keeps them equal itself."""
        return []

    def train(self, mode: bool = True) -> "Task":
        """Set the mode. A part none of whose parameters is trained stays in eval mode: its running statistics stay."""
        super().train(mode)
        for module in self.modules():
            trained = [values.requires_grad for values in module.parameters()]
            if module is not self and trained and not any(trained):
                module.eval()
        return self
