"""What ends a run before its end: signals and bad files, obeyed by all processes at one step; too little memory."""

import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from dalikd.pipelines.hardware import LACK, dali_words
from dalikd.pipelines.loader import BadFileError

__all__ = ["Interrupted", "StopSignals", "lack_of_memory", "save_after"]

Result = TypeVar("Result")

_AGAIN = 2.0  # seconds: a launcher hands a signal on that its processes have had from the terminal already
_BAD_FILE = 1 << 8  # above all signals


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
    """Inside of this context the first SIGTERM or SIGINT is only noted, until `together`; the next one, later than two
    seconds after it, ends the work at once.

    Args:
        accelerator: whose processes stop together, and enter and leave this context together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._several = accelerator.num_processes > 1
        self._group: Any = None  # of hosts, which run ahead of their devices
        self._number, self._since = 0, 0.0
        self._previous: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        if self._several:
            self._group = distributed.new_group(backend="gloo")
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    @property
    def number(self) -> int:
        """The signal that this process had, or 0."""
        return self._number

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of what each process does by itself, once it has gone well on all of them and none is to stop.

        All processes call this at the same steps, between two of what they do together. Their hosts meet, and wait for
        no device.

        Raises:
            BadFileError: a file cannot be decoded: the process's own, or else the first one that another one has met.
            Interrupted: one of them had a signal.
        """
        bad: BadFileError | None = None
        result: Any = None
        try:
            result = work()
        except BadFileError as error:
            bad = error
        if self._group is not None:
            highest = torch.tensor(self._number if bad is None else _BAD_FILE, dtype=torch.int32)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX, self._group)
            if not highest:
                return result
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, (self._number, bad), self._group)
            self._number = max(number for number, _ in found)
            bad = bad or next(filter(None, (error for _, error in found)), None)
        if bad is not None:
            raise bad
        if self._number:
            raise Interrupted(f"stopped by signal {self._number}", self._number)
        return result

    def _note(self, number: int, _frame: object) -> None:
        if self._number and time.monotonic() - self._since > _AGAIN:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        if not self._number:
            self._number, self._since = number, time.monotonic()


def save_after(error: Exception, save: Callable[[], object], how_to_go_on: str) -> None:
    """Save after an error, whose text then says how to go on. A second error, such as a full disk, does not hide it."""
    try:
        save()
    except Exception as second:
        how_to_go_on = f"the state could not be saved ({type(second).__name__}: {second})"
    error.args = (f"{error}; {how_to_go_on}",)


def lack_of_memory(error: Exception) -> str | None:
    """One line that says what ran out of memory, and what helps; None for any other error."""
    if isinstance(error, MemoryError):
        words = str(error) or "the machine ran out of memory"
        return words if ": try " in words else f"{words}: try fewer --data.threads or a smaller --batch_size"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if not LACK.search(text):
        return None
    if "in pipeline" in text:
        helps = "--data.prefetch 1, fewer --data.threads, --data.resident false or a smaller --batch_size"
        return f"DALI ran out of memory ({dali_words(error)}): try {helps}"
    # torch goes on with what its allocator holds
    words = " ".join(re.split(r"\n| Including non-PyTorch| Process \d| Of the allocated", text)[0].split())
    helps = "--accumulation 2 or more, a smaller --batch_size, --precision bf16, with measure --images_per_call"
    return f"{words.rstrip('.')}: try {helps}"
