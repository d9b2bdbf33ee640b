"""SIGTERM and SIGINT: noted at once, obeyed by all processes at one place, where the state is saved."""

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

__all__ = ["Interrupted", "StopSignals"]

_AGAIN = 2.0  # seconds: a launcher hands a signal on that its processes have had from the terminal already


class Interrupted(Exception):
    """A signal asked for an end; what there is, is saved.

    Args:
        message: how to go on.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """Inside of this context the first SIGTERM or SIGINT is only noted; the next one, later than two seconds after it,
    ends the work at once.

    Args:
        accelerator: whose processes stop together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._number, self._since = 0, 0.0
        self._previous: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int:
        """The signal that this process had, or 0."""
        return self._number

    def agreed(self, step: int, every: int = 1) -> int:
        """A signal that any process had, the same on all of them, or 0.

        All of them call this at the same steps. One alone knows at once. Several ask each other: on a CPU, where steps
        are slow and nothing runs ahead, at each step; on GPUs, which they wait for then, at every `every`-th.
        """
        if self._accelerator.num_processes == 1:
            return self._number
        if step % every and self._accelerator.device.type != "cpu":
            return 0
        own = torch.tensor([self._number], device=self._accelerator.device)
        return int(self._accelerator.gather(own).max())  # type: ignore[union-attr]

    def _note(self, number: int, _frame: object) -> None:
        if self._number and time.monotonic() - self._since > _AGAIN:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        if not self._number:
            self._number, self._since = number, time.monotonic()
