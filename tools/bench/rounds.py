"""Rounds of training steps on kept or on real batches: what `bench step` and `bench scaling` share.

A round measures the loop's own step. The host waits for the device at a round's two ends and nowhere between; single
steps and waits for data are timed by events of the device, or on the CPU by the clock. Only `parts_round` waits more
often, and so stands apart.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dalikd.kd.backbones import create_model
from dalikd.pipelines.data import open_split
from dalikd.pipelines.draw_spec import Batch, MixDraws
from dalikd.pipelines.loader import Loader
from dalikd.tools.bench.machine import synchronize
from dalikd.tools.bench.training import StepOptions
from dalikd.trainers.loop import Loop
from dalikd.trainers.setup import TrainingData
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.tracking import RunFolder

__all__ = [
    "PARTS",
    "Round",
    "keep_batches",
    "loader_round",
    "parts_round",
    "replayed",
    "step_flops",
    "step_round",
    "training_loop",
    "warm_up",
    "with_weights",
]

PARTS: tuple[str, ...] = ("data", "teacher", "student", "optimizer")  #: of a step, in their order
_KEPT = 8  # batches that are replayed: more than caches hold, few enough for a small GPU

Take = Callable[[], Batch]
_Moment = Any  # torch.cuda.Event, or seconds of the host's clock


@dataclass(frozen=True)
class Round:
    """What a round has shown.

    Attributes:
        seconds: from start to end, the device having finished at both.
        images: over all processes.
        steps: seconds of each step.
        waited: seconds in which the step stood still for want of a batch.
        memory: bytes: the peak of what torch has taken of the GPU, or what the process holds on the CPU.
    """

    seconds: float
    images: int
    steps: list[float]
    waited: float
    memory: int

    @property
    def rate(self) -> float:
        """Images a second, over all processes."""
        return self.images / self.seconds

    @property
    def wait_share(self) -> float:
        """Share of the time, 0 to 1, in which the step waited for data."""
        return self.waited / self.seconds


def training_loop(task: Task, data: TrainingData, options: TrainingOptions, accelerator: Accelerator) -> Loop:
    """The loop of a run that is never written, ready to step."""
    folder = RunFolder(Path("bench"), writes=False)
    loop = Loop(task, data.loader, data.val_loader, options, accelerator, folder, {})
    loop.model.train()
    return loop


def with_weights(options: StepOptions, folder: Path) -> StepOptions:
    """Options whose teacher has weights: fresh ones, written into the folder, where none are named.

    Raises:
        ValueError, OSError: there is no such architecture, or the data are not as they should be.
    """
    teacher = options.teacher
    if teacher.name is None or teacher.weights is not None or teacher.cache is not None:
        return options
    classes = len(open_split(options.data, "train", options.seed).classes)
    torch.manual_seed(options.seed)  # the same for every process
    path = folder / "teacher.pt"
    torch.save(create_model(teacher.name, classes, **teacher.args).state_dict(), path)
    return replace(options, teacher=replace(teacher, weights=str(path)))


def warm_up(loop: Loop, steps: int) -> float:
    """Take real steps, in which torch compiles, tunes and allocates.

    Returns:
        how many seconds they took.
    """
    started = time.perf_counter()
    for _ in range(steps):
        loop.step()
    synchronize(loop.accelerator.device)
    return time.perf_counter() - started


def keep_batches(loader: Loader, count: int = _KEPT) -> list[Batch]:
    """Copies of the next batches, on the device: a loader's own buffers come round again."""
    return [_copy(loader.next()) for _ in range(count)]


def replayed(batches: Sequence[Batch]) -> Take:
    """Gives the same batches again and again."""
    endless = cycle(batches)
    return lambda: next(endless)


def step_round(loop: Loop, take: Take, steps: int, warmup: int) -> Round:
    """Take steps on batches from anywhere.

    Args:
        loop: whose step is measured.
        take: gives the batches, in place of the loop's loader.
        steps: that count.
        warmup: steps before them, so that queues are as full as they stay.
    """
    device, feed = loop.accelerator.device, _Feed(loop.loader, take)
    with _replaced(loop, "loader", feed):
        for _ in range(warmup):
            loop.step()
        feed.waits.clear()
        _align(loop)
        _forget_peak(device)
        started, moments = time.perf_counter(), [_moment(device)]
        for _ in range(steps):
            loop.step()
            moments.append(_moment(device))
        _align(loop)
        seconds = time.perf_counter() - started
    waited = sum(_seconds(before, after) for before, after in feed.waits)
    times = [_seconds(before, after) for before, after in pairwise(moments)]
    return Round(seconds, steps * feed.sampler.batch_size, times, waited, _memory(device))


def loader_round(loop: Loop, steps: int, warmup: int) -> Round:
    """Take the batches of so many steps from the loader, and do nothing with them.

    Its single `steps` are of the host's clock: on a GPU a call returns before its work is done, and they mean nothing.
    """
    loader, parts = loop.loader, loop.options.accumulation
    for _ in range(warmup * parts):
        loader.next()
    _align(loop)
    started, times = time.perf_counter(), []
    for _ in range(steps):
        before = time.perf_counter()
        for _ in range(parts):
            loader.next()
        times.append(time.perf_counter() - before)
    _align(loop)
    seconds = time.perf_counter() - started
    return Round(seconds, steps * loader.sampler.batch_size, times, seconds, _memory(loader.device))


def parts_round(loop: Loop, steps: int, warmup: int) -> dict[str, float]:
    """Split steps on real data into their parts, waiting for the device at the end of each part.

    Returns:
        seconds a step: "data"; "teacher" (mixing, teacher, picking and metric); "student" (forwards, loss, backward,
        exchange and clipping); "optimizer" (and moving average).
    """
    watch = _Stopwatch(loop.accelerator.device)
    take, inputs = loop.loader.next, loop.task.prepare

    def timed_take() -> Batch:
        batch = take()
        watch.lap("data")
        return batch

    def timed_inputs(batch: Batch, epoch: float) -> Any:
        watch.lap("student")  # of the microbatch before, where there is one
        result = inputs(batch, epoch)
        watch.lap("teacher")
        return result

    hook = loop.optimizer.optimizer.register_step_pre_hook(lambda *_: watch.lap("student"))
    with _replaced(loop, "loader", _Feed(loop.loader, timed_take)), _replaced(loop.task, "prepare", timed_inputs):
        for number in range(warmup + steps):
            if number == warmup:
                watch.restart()
            loop.step()
            watch.lap("optimizer")
    hook.remove()
    return {part: watch.seconds[part] / steps for part in PARTS}


def step_flops(loop: Loop, batch: Batch) -> dict[str, float]:
    """Floating-point operations an image, by torch's own count: a multiplication and its addition are two.

    Only what is a matrix product or a convolution counts. The step is run once without compilation.

    Returns:
        "teacher" (all of its forwards) and "student" (forwards and backward; a student that scores counts as teacher).
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as looked, torch.no_grad():
            inputs = loop.task.prepare(batch, 0.0)
        with FlopCounterMode(display=False) as learned, loop.accelerator.no_sync(loop.model):
            loop.accelerator.backward(loop.model(inputs)["loss"])
    loop.optimizer.zero_grad()
    counted = {"teacher": looked.get_total_flops(), "student": learned.get_total_flops()}
    return {name: flops / len(batch) for name, flops in counted.items()}


class _Feed:
    """Stands in for a loop's loader and notes when the step waits for it.

    Args:
        loader: the loop's own.
        take: gives the batches.
    """

    def __init__(self, loader: Loader, take: Take) -> None:
        self.sampler, self.source = loader.sampler, loader.source
        self.waits: list[tuple[_Moment, _Moment]] = []
        self._device, self._take = loader.device, take

    def next(self) -> Batch:
        """The next batch.

        On a GPU the two events enclose what the device does between the last work of a step and the first on the
        new batch: copies, and standing still until the host has the batch.
        """
        before = _moment(self._device)
        batch = self._take()
        self.waits.append((before, _moment(self._device)))
        return batch


class _Stopwatch:
    """Adds up the time of parts, waiting for the device at each reading."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Start anew."""
        synchronize(self._device)
        self.seconds, self._last = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last reading to a part."""
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while. What the class gives is seen again afterwards."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(before)


def _copy(batch: Batch) -> Batch:
    return replace(
        batch,
        images=batch.images.clone(),
        augmented=tuple(view.clone() for view in batch.augmented),
        labels=batch.labels.clone(),
        ids=batch.ids.clone(),
        mix=tuple(_copy_draws(draws) for draws in batch.mix),
        extras={name: tensor.clone() for name, tensor in batch.extras.items()},
    )


def _copy_draws(draws: MixDraws) -> MixDraws:
    return draws._replace(**{name: part.clone() for name, part in draws._asdict().items() if part is not None})


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


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
