"""Rounds of training steps on kept or on real batches.

A round measures the loop's own step. The host waits for the device at a round's two ends and nowhere between; single
steps and waits for data are timed by events of the device, or on the CPU by the clock. Only `parts_round` waits more
often, and so stands apart.
"""

import time
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import Loader
from dalikd.tools.bench.images import each_tensor
from dalikd.tools.bench.machine import synchronize
from dalikd.trainers.loop import Loop

__all__ = ["PARTS", "Round", "keep_batches", "loader_round", "parts_round", "replayed", "step_flops", "step_round"]

PARTS: tuple[str, ...] = ("data", "teacher", "student", "optimizer")  #: of a step, in their order
_KEPT = 8  # batches that are replayed: more than caches hold, few enough for a small GPU

Take = Callable[[], Batch]
_Moment = Any  # torch.cuda.Event, or seconds of the host's clock


class Round(NamedTuple):
    """What a round has shown."""

    seconds: float  # from start to end, the device having finished at both
    images: int  # over all processes
    steps: list[float]  # seconds of each step
    waited: float = 0.0  # seconds in which the step stood still for want of a batch
    memory: int = 0  # bytes: the peak of what torch has taken of the GPU, or what the process holds on the CPU

    @property
    def rate(self) -> float:
        """Images a second, over all processes."""
        return self.images / self.seconds

    @property
    def wait_share(self) -> float:
        """Share of the time, 0 to 1, in which the step waited for data."""
        return self.waited / self.seconds


def keep_batches(loader: Loader, count: int = _KEPT) -> list[Batch]:
    """Copies of the next batches, on the device: a loader's own buffers come round again."""
    return [each_tensor(loader.next(), torch.clone) for _ in range(count)]


def replayed(batches: Sequence[Batch]) -> Take:
    """Gives the same batches again and again."""
    endless = cycle(batches)
    return lambda: next(endless)


def step_round(loop: Loop, take: Take, steps: int, warmup: int) -> Round:
    """Take steps that count, after others that fill the queues, on batches that `take` gives instead of the loader.

    On a GPU the two events of a wait enclose what the device does between the last work of a step and the first on the
    new batch: copies, and standing still until the host has the batch.
    """
    device, waits = loop.accelerator.device, []

    def waiting() -> Batch:
        before, batch = _moment(device), take()
        waits.append((before, _moment(device)))
        return batch

    with patch.object(loop, "loader", _Feed(loop.loader, waiting)):
        for _ in range(warmup):
            loop.step()
        waits.clear()
        _align(loop)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started, moments = time.perf_counter(), [_moment(device)]
        for _ in range(steps):
            loop.step()
            moments.append(_moment(device))
        _align(loop)
        seconds = time.perf_counter() - started
    waited = sum(_seconds(before, after) for before, after in waits)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    images, times = steps * loop.loader.sampler.batch_size, [_seconds(*pair) for pair in pairwise(moments)]
    return Round(seconds, images, times, waited, memory)


def loader_round(loop: Loop, steps: int, warmup: int) -> Round:
    """Take the batches of so many steps from the loader, and do nothing with them. Its single `steps` are of the host's
    clock: on a GPU a call returns before its work is done, and they mean nothing."""

    def take() -> None:
        for _ in range(loop.options.accumulation):
            loop.loader.next()

    for _ in range(warmup):
        take()
    _align(loop)
    moments = [time.perf_counter()]
    for _ in range(steps):
        take()
        moments.append(time.perf_counter())
    _align(loop)
    seconds = time.perf_counter() - moments[0]
    images, times = steps * loop.loader.sampler.batch_size, [_seconds(*pair) for pair in pairwise(moments)]
    return Round(seconds, images, times)


def parts_round(loop: Loop, steps: int, warmup: int) -> dict[str, float]:
    """Seconds a step of each of PARTS, on real data, waiting for the device at the end of each: teacher is mixing,
    teacher, picking and metric; student forwards, loss, backward, exchange and clipping."""
    found, last = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        synchronize(loop.accelerator.device)
        now = time.perf_counter()
        found[part] += now - last
        last = now

    def ending(part: str, function: Callable[..., Any], before: str | None = None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if before is not None:
                lap(before)
            result = function(*arguments)
            lap(part)
            return result

        return call

    hook = loop.optimizer.optimizer.register_step_pre_hook(lambda *_: lap("student"))
    feed = _Feed(loop.loader, ending("data", loop.loader.next))
    # what comes before the teacher is the student's of the microbatch before, where there is one
    teacher = ending("teacher", loop.task.prepare, before="student")
    with patch.object(loop, "loader", feed), patch.object(loop.task, "prepare", teacher):
        for number in range(warmup + steps):
            if number == warmup:
                lap("optimizer")
                found = dict.fromkeys(PARTS, 0.0)
            loop.step()
            lap("optimizer")
    hook.remove()
    return {part: seconds / steps for part, seconds in found.items()}


def step_flops(loop: Loop, batch: Batch) -> dict[str, float]:
    """Floating-point operations an image of "teacher" (all forwards) and "student" (forwards and backward; one that
    scores counts as teacher): of matrix products and convolutions, a multiplication and its addition being two."""
    with torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as looked, torch.no_grad():
            inputs = loop.task.prepare(batch, 0.0)
        with FlopCounterMode(display=False) as learned, loop.accelerator.no_sync(loop.model):
            loop.accelerator.backward(loop.model(inputs)["loss"])
    loop.optimizer.zero_grad()
    counted = {"teacher": looked.get_total_flops(), "student": learned.get_total_flops()}
    return {name: flops / len(batch) for name, flops in counted.items()}


class _Feed:
    """Stands in for a loop's loader."""

    def __init__(self, loader: Loader, take: Take) -> None:
        self.sampler, self.source, self.next = loader.sampler, loader.source, take


def _align(loop: Loop) -> None:
    """Wait for the device and for the other processes."""
    synchronize(loop.accelerator.device)
    loop.accelerator.wait_for_everyone()
    synchronize(loop.accelerator.device)


def _moment(device: torch.device) -> _Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(before: _Moment, after: _Moment) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000
