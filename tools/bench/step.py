"""`dalikd bench step`: what a training step of a distillation costs, and what its data cost it.

Four sides take turns with one and the same step: a on batches that stay on the device, the loader stopped; b on the
same, with the loader running: one batch is taken for each and thrown away; c on real data; d the loader alone.

c/a is what data really cost. b/a is what they cost without anybody waiting for them: cores, memory, and the GPU that
decodes. The time that a step waits for data hides that part: on a GPU what it does and waits from the end of a step to
the first work on the next batch, on a CPU the time inside the loader. What each part of a step takes comes from a fifth
side that waits for the device between the parts, so together they may take longer than a step: teacher is mixing,
teacher, picking and metric; student forwards, loss, backward, exchange and clipping; optimizer its step, gradients to
zero and moving average. With --checkpoint_every one more side, e, is c with what a run does besides: every 50 steps it
reads and checks the loss and logs, and every so many it checks all weights and saves. Memory is the peak of what torch
took of the GPU, or what the process held at a round's end.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import Loader
from dalikd.tools.bench.common import StepOptions, each_tensor, open_loop
from dalikd.tools.bench.machine import synchronize
from dalikd.tools.bench.record import Watch, alternate, begin, finish, ratio, summary, timed
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.tracking import RunFolder

#: The sides whose images are counted, and what they are called.
SIDES = {
    "a": "a: step on kept batches, loader stopped",
    "b": "b: step on kept batches, loader running",
    "c": "c: step on real data",
    "d": "d: loader alone",
    "e": "e: c, checked, logged and saved",
}
PARTS = ("data", "teacher", "student", "optimizer")  #: of a step, in their order


class Round(NamedTuple):
    """What a round has shown."""

    seconds: float  # from start to end, the device having finished at both
    images: int  # over all processes
    steps: list[float]  # seconds of each step
    waited: float  # seconds in which the step stood still for want of a batch
    memory: int  # bytes: the peak of what torch has taken of the GPU, or what the process holds on the CPU

    @property
    def rate(self) -> float:
        """Images a second, over all processes."""
        return self.images / self.seconds


def keep_batches(loader: Loader, count: int = 8) -> Callable[[], Batch]:
    """Gives copies of the next batches, on the device, again and again: a loader's own buffers come round. By default
    more than caches hold, few enough for a small GPU."""
    return partial(next, cycle([each_tensor(loader.next(), torch.clone) for _ in range(count)]))


def step_round(
    loop: Loop, take: Callable[[], Batch], steps: int, warmup: int, step: Callable[[], object] | None = None
) -> Round:
    """Take `steps` that count, after others that fill the queues, on batches that `take` gives instead of the loader;
    `step` stands in for the loop's own.

    The host waits for the device at the round's two ends and nowhere between; single steps and waits for data are timed
    by events of the device, or on the CPU by the clock. On a GPU the two events of a wait enclose what the device does
    between the last work of a step and the first on the new batch: copies, and standing still for the batch.
    """
    device, waits = loop.accelerator.device, []
    on_gpu, step = device.type == "cuda", step or loop.step

    def moment() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def between(before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1000 if on_gpu else after - before

    def align() -> float:
        """Wait for the device and for the other processes."""
        synchronize(device)
        loop.accelerator.wait_for_everyone()
        synchronize(device)
        return time.perf_counter()

    def waiting() -> Batch:
        before, batch = moment(), take()
        waits.append((before, moment()))
        return batch

    with patch.object(loop.loader, "next", waiting):
        for _ in range(warmup):
            step()
        waits.clear()
        started = align()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        moments = [moment()]
        for _ in range(steps):
            step()
            moments.append(moment())
        seconds = align() - started
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    images, times = steps * loop.loader.sampler.batch_size, [between(*pair) for pair in pairwise(moments)]
    return Round(seconds, images, times, sum(between(*pair) for pair in waits), memory)


def parts_round(loop: Loop, steps: int, warmup: int) -> dict[str, float]:
    """Seconds a step of each of PARTS, on real data, waiting for the device at the end of each."""
    watch = Watch(lambda: (synchronize(loop.accelerator.device), time.perf_counter())[1])
    places = [(loop.loader, "next", "data"), (loop.task, "prepare", "teacher"), (loop, "step", "student")]
    places += [(loop.optimizer, name, "optimizer") for name in ("step", "zero_grad")]
    with watch.over([*places, *((average, "update", "optimizer") for average in loop.averages.values())]):
        for number in range(warmup + steps):
            if number == warmup:
                watch.seconds.clear()
            loop.step()
    return {part: watch.seconds[part] / steps for part in PARTS}


def step_flops(loop: Loop, batch: Batch) -> dict[str, float]:
    """Floating-point operations an image of "teacher" (all forwards) and "student" (forwards and backward; one that
    scores counts as teacher): of matrix products and convolutions, a multiplication and its addition being two."""
    with torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as looked, torch.no_grad():
            inputs = loop.task.prepare(batch, 0.0)
        with FlopCounterMode(display=False) as learned, loop.accelerator.no_sync(loop.model):
            loop.accelerator.backward(loop.model(inputs)["loss"])
    loop.optimizer.zero_grad()
    return {"teacher": looked.get_total_flops() / len(batch), "student": learned.get_total_flops() / len(batch)}


def run(options: StepOptions, config: dict[str, Any]) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    accelerator = start(options.device, options.precision)
    record = begin("step", options, accelerator, config, labels=("measured",), plotted="ms a step")
    loop, setup = open_loop(options, accelerator)
    record.reads(setup.source)
    steps, processes = options.counts[1], accelerator.num_processes
    seconds = timed(lambda: [loop.step() for _ in range(steps)], accelerator.device)
    flops, rounds, parts, saves = measure(loop, options)
    loop.loader.close()
    title, record.variant = setting(options, setup.view.size)
    record.title = f"Distillation step: {title}, {processes} process{'es' if processes > 1 else ''}"
    record.variant += f"-{processes}p" if processes > 1 else ""
    record.warm_up = f"{steps} steps first ({seconds:.1f} s) and before each round; the first round of each side."
    record.rows = rows(rounds, parts, sum(flops.values()) / processes, on_gpu=accelerator.device.type == "cuda")
    of_a = {row["measured"][0]: row["of a"]["median"] for row in record.rows[: len(rounds)]}
    fresh = options.teacher.weights is None and options.teacher.cache is None
    record.notes = [
        bound(of_a["b"], of_a["d"]),
        f"c/a, what data cost: {of_a['c']:.3f}; b/a, contention: {of_a['b']:.3f} (medians of the rounds' own ratios).",
        f"An image takes {flops['teacher'] / 1e9:.2f} GFLOP of the teacher and {flops['student'] / 1e9:.2f} of the "
        "student (of convolutions and matrix products, forward and backward); TFLOP/s are of one process.",
        *([kept_safe(rounds, saves, options.checkpoint_every)] if saves else []),
        *(["The teacher's weights are fresh: its answers mean nothing, and take as long."] if fresh else []),
    ]
    if accelerator.is_main_process:
        finish(record, options)


def measure(
    loop: Loop, options: StepOptions
) -> tuple[dict[str, float], dict[str, list[Round]], list[dict[str, float]], list[float]]:
    """Let all sides take turns. Returns operations an image, and all rounds but the first: of sides, and of parts; and
    the seconds for which each checkpoint stopped the training."""
    loader, take, every = loop.loader, loop.loader.next, options.checkpoint_every
    kept, saves = keep_batches(loader), list[float]()
    flops, parts = step_flops(loop, kept()), list[dict[str, float]]()
    rounds: dict[str, list[Round]] = {side: [] for side in SIDES if side != "e" or every}
    takes = {"a": kept, "b": lambda: (take(), kept())[1]}
    works = {"d": lambda: [loader.next() for _ in range(options.accumulation)], "e": lambda: safe_step(loop, saves)}

    def rate(side: str) -> float:
        if side == "a":
            loader.close()
        rounds[side].append(step_round(loop, takes.get(side, take), *options.counts, works.get(side)))
        loop.checkpoints.wait()
        return rounds[side][-1].rate

    def part_rate() -> float:
        parts.append(parts_round(loop, *options.counts))
        return loader.sampler.batch_size / sum(parts[-1].values())

    with TemporaryDirectory() as folder:
        if every:
            loop.folder = RunFolder(Path(folder), writes=loop.accelerator.is_main_process)
            loop.folder.start({}, None)
        alternate({**{side: partial(rate, side) for side in rounds}, "parts": part_rate}, options.rounds)
        loop.checkpoints.close()
        loop.folder.close()
    return flops, {side: them[1:] for side, them in rounds.items()}, parts[1:], saves[1:]


def safe_step(loop: Loop, saves: list[float]) -> None:
    """A step as of a run: checked and logged, and saved halfway between two checkpoints, so that the next one does not
    wait for this one's file. Appends the seconds for which that stopped the training."""
    loop.step()
    if loop.progress.step % loop.options.log_every == 0:
        loop._log_interval(tqdm(disable=True))
        loop.checkpoints.check()
    if loop.progress.step % loop.options.checkpoint_every == loop.options.checkpoint_every // 2:
        synchronize(loop.accelerator.device)
        started = time.perf_counter()
        loop.save(wait=False)
        saves.append(time.perf_counter() - started)


def kept_safe(rounds: dict[str, list[Round]], saves: list[float], every: int) -> str:
    """What checks, logs and checkpoints cost, in a sentence."""
    shares = [safe.rate / plain.rate for safe, plain in zip(rounds["e"], rounds["c"], strict=True)]
    longest, middle, share = 1000 * max(saves), 1000 * float(np.median(saves)), float(np.median(shares))
    return (
        f"e/c, with a checkpoint every {every} steps: {share:.3f} (median of the rounds' own ratios); a checkpoint "
        f"stops the training for {middle:.0f} ms (median of {len(saves)}), {longest:.0f} ms at most."
    )


def rows(
    rounds: dict[str, list[Round]], parts: list[dict[str, float]], flops: float, *, on_gpu: bool
) -> list[dict[str, Any]]:
    """A row for each side and each part. p50 and p99 are of all single steps; on a GPU the loader's calls return before
    their work is done."""
    rates, found = {side: [one.rate for one in them] for side, them in rounds.items()}, []
    for side, them in rounds.items():
        label, trains = SIDES[side], side != "d"
        single = 1000 * np.array([one.steps for one in them])
        row: dict[str, Any] = {
            "measured": label,
            "images/s": summary(rates[side]),
            "of a": ratio(rates[side], rates["a"]),
        }
        row["ms a step"] = summary([1000 * one.seconds / len(one.steps) for one in them])
        row |= {f"p{p} ms": float(np.quantile(single, p / 100)) if trains or not on_gpu else None for p in (50, 99)}
        row["data wait %"] = summary([100 * one.waited / one.seconds for one in them]) if trains else None
        row["TFLOP/s"] = summary([rate * flops / 1e12 for rate in rates[side]]) if side == "a" else None
        row["memory MiB"] = max(one.memory for one in them) / 2**20 if trains else None
        found.append(row)
    for part in PARTS:
        row = {"measured": f"part of c: {part}", "ms a step": summary([1000 * one[part] for one in parts])}
        found.append({**row, "part of the step %": summary([100 * one[part] / sum(one.values()) for one in parts])})
    return found


def bound(contention: float, loader: float) -> str:
    """Name what limits training, in one sentence: by b/a, the share of its images/s that the loader, running beside it,
    leaves the step, and d/a, the loader's images/s as a multiple of the step's."""
    gives = f"alone the loader gives {loader:.2f} of what the step takes on kept batches"
    leaves = f"running beside the step it leaves it {contention:.2f} of its images/s"
    if loader < 1.1:  # a loader that is not so much faster than the step makes it wait now and then
        return f"Bound by the loader: {gives}; dalikd bench loader --sweep true looks for better settings of it."
    if contention < 0.95:
        return f"Bound by contention: {gives}, but {leaves}; fewer --data.threads may help."
    return f"Bound by compute: {gives} and, {leaves}."


def setting(options: StepOptions, side: int) -> tuple[str, str]:
    """Nets, augmentation, sizes and precision in a few words, and as a part of file names."""
    teacher = "cached answers" if options.teacher.cache is not None else options.teacher.name
    compiled, names = "", [teacher, options.model, side, options.augmentation, options.precision]
    if options.compile != "off":
        compiled, names = f", compiled ({options.compile})", [*names, "compiled", options.compile]
    words = f"{teacher} → {options.model}, {options.augmentation}, {side} px, batch {options.batch_size}"
    slug = "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", str(name)) for name in names)
    return f"{words}, {options.precision}{compiled}", slug
