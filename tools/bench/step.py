"""`dalikd bench step`: what a training step of a distillation costs, and what its data cost it.

    dalikd bench step --config configs/….yaml --data.root DATA

Four sides take turns in one process, with one and the same step:

    a  on batches that stay on the device, the loader stopped
    b  on the same batches, with the loader running: one batch is taken for each and thrown away
    c  on real data, as in training
    d  the loader alone

c/a is what data really cost. b/a is what they cost without anybody waiting for them: cores, memory, and the GPU that
decodes. The time that a step waits for data hides that part: on a GPU what it does and waits from the end of a step to
the first work on the next batch, on a CPU the time inside the loader. What each part of a step takes comes from a fifth
side that waits for the device between the parts, so together they may take longer than a step: teacher is mixing,
teacher, picking and metric; student forwards, loss, backward, exchange and clipping; optimizer its step, gradients to
zero and moving average. Memory is the peak of what torch took of the GPU, or what the process held at a round's end.

`dalikd bench scaling` compares one process with several, with the same work for each (scaling.py).
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dalikd.tools.bench import rounds
from dalikd.tools.bench.common import StepOptions, open_loop
from dalikd.tools.bench.images import cached, describe
from dalikd.tools.bench.record import Record, alternate, begin, finish, ratio, summary, timed
from dalikd.tools.bench.rounds import PARTS, Round
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop

__all__ = ["SIDES", "Measured", "bound", "measure", "run", "setting", "unquiet", "variant"]

#: The sides whose images are counted, and what they are called.
SIDES = {
    "a": "a: step on kept batches, loader stopped",
    "b": "b: step on kept batches, loader running",
    "c": "c: step on real data",
    "d": "d: loader alone",
}
_LOADER_LIMITS = 1.1  # a loader that is not so much faster than the step makes it wait now and then
_CONTENDED = 0.95
_QUIET = 1.2  # the highest rate over the lowest


class Measured(NamedTuple):
    """What was found."""

    rates: dict[str, list[float]]  # images a second of each side, round by round
    rounds: dict[str, list[Round]]  # the same rounds, with all that they have shown
    parts: list[dict[str, float]]  # seconds a step of each part, round by round
    flops: dict[str, float]  # operations an image, of "teacher" and "student"
    warm_up: float  # seconds that the first steps took, in which torch compiles, tunes and allocates


def run(options: StepOptions, config: dict[str, Any]) -> Record:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    options.check_warm_up()
    accelerator = start(options.device, options.precision)
    on_gpu, processes = accelerator.device.type == "cuda", accelerator.num_processes
    record = begin("step", options, accelerator, config, alone=False)
    loop, setup = open_loop(options, accelerator)
    record.page_cache, record.pictures = cached(setup.source), describe(setup.source)
    found = measure(loop, options)
    loop.loader.close()
    several = "1 process" if processes == 1 else f"{processes} processes"
    record.title = f"Distillation step: {setting(options, setup.view.size)}, {several}"
    record.warm_up = (
        f"{options.warmup} steps before everything ({found.warm_up:.1f} s) and as many before each round; the first "
        "round of each side."
    )
    record.labels, record.plotted = ("measured",), "ms a step"
    record.variant = variant(options, setup.view.size, processes)
    record.rows = rows(found, options.steps, processes, on_gpu=on_gpu)
    record.notes = notes(found, options)
    return finish(record, options) if accelerator.is_main_process else record


def measure(loop: Loop, options: StepOptions) -> Measured:
    """Let all sides of a loop that is at its start take turns."""
    steps, warmup, loader = options.steps, options.warmup, loop.loader
    seconds = timed(lambda: [loop.step() for _ in range(warmup)], loop.accelerator.device)
    batches = rounds.keep_batches(loader)
    kept = rounds.replayed(batches)

    def alone() -> Round:
        loader.close()
        return rounds.step_round(loop, kept, steps, warmup)

    def kept_beside_real() -> Any:
        loader.next()
        return kept()

    takes: dict[str, Callable[[], Round]] = {
        "a": alone,
        "b": lambda: rounds.step_round(loop, kept_beside_real, steps, warmup),
        "c": lambda: rounds.step_round(loop, loader.next, steps, warmup),
        "d": lambda: rounds.loader_round(loop, steps, warmup),
    }
    shown: dict[str, list[Round]] = {side: [] for side in SIDES}
    parts: list[dict[str, float]] = []

    def rate(side: str) -> float:
        shown[side].append(takes[side]())
        return shown[side][-1].rate

    def part_rate() -> float:
        parts.append(rounds.parts_round(loop, steps, warmup))
        return loader.sampler.batch_size / sum(parts[-1].values())

    flops = rounds.step_flops(loop, batches[0])
    rates = alternate({**{side: partial(rate, side) for side in SIDES}, "parts": part_rate}, options.rounds)
    del rates["parts"]
    later = {side: found[1:] for side, found in shown.items()}  # the first warms up
    return Measured(rates, later, parts[1:], flops, seconds)


def bound(contention: float, loader: float) -> str:
    """Name what limits training, in one sentence: by b/a, the share of its images/s that the loader, running beside it,
    leaves the step, and d/a, the loader's images/s as a multiple of the step's."""
    gives = f"alone the loader gives {loader:.2f} of what the step takes on kept batches"
    leaves = f"running beside the step it leaves it {contention:.2f} of its images/s"
    if loader < _LOADER_LIMITS:
        return f"Bound by the loader: {gives}; dalikd bench loader --sweep true looks for better settings of it."
    if contention < _CONTENDED:
        return f"Bound by contention: {gives}, but {leaves}; fewer --data.threads may help."
    return f"Bound by compute: {gives} and, {leaves}."


def setting(options: StepOptions, side: int) -> str:
    """Nets, augmentation, sizes and precision in a few words."""
    compiled = "" if options.compile == "off" else f", compiled ({options.compile})"
    return (
        f"{_teacher(options)} → {options.model}, {options.augmentation}, {side} px, batch {options.batch_size}, "
        f"{options.precision}{compiled}"
    )


def variant(options: StepOptions, side: int, processes: int = 1) -> str:
    """The same as a part of file names."""
    parts = [_teacher(options), options.model, str(side), options.augmentation, options.precision]
    parts += [] if options.compile == "off" else ["compiled", options.compile]
    parts += [] if processes == 1 else [f"{processes}p"]
    return "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", str(part)) for part in parts)


def unquiet(what: str, rates: Sequence[float]) -> list[str]:
    """A sentence about rates that should have been alike, if they were not."""
    factor = max(rates) / min(rates)
    if factor <= _QUIET:
        return []
    return [f"Not to be relied on: {what} varied by a factor of {factor:.1f}, so the machine had other work to do."]


def _teacher(options: StepOptions) -> str:
    return "cached answers" if options.teacher.cache is not None else str(options.teacher.name)


def rows(found: Measured, steps: int, processes: int, *, on_gpu: bool) -> list[dict[str, Any]]:
    """A row for each side and each part. p50 and p99 are of all single steps."""
    operations, table = sum(found.flops.values()) / processes / 1e12, []
    for side, label in SIDES.items():
        shown, rates = found.rounds[side], found.rates[side]
        single, trains = 1000 * np.concatenate([one.steps for one in shown]), side != "d"
        timed = trains or not on_gpu  # there the loader's calls return before its work is done
        table.append(
            {
                "measured": label,
                "images/s": summary(rates),
                "of a": ratio(rates, found.rates["a"]),
                "ms a step": summary([1000 * one.seconds / steps for one in shown]),
                "p50 ms": float(np.quantile(single, 0.5)) if timed else None,
                "p99 ms": float(np.quantile(single, 0.99)) if timed else None,
                "data wait %": summary([100 * one.wait_share for one in shown]) if trains else None,
                "TFLOP/s": summary([rate * operations for rate in rates]) if side == "a" else None,
                "memory MiB": max(one.memory for one in shown) / 2**20 if trains else None,
            }
        )
    for part in PARTS:
        share = summary([100 * one[part] / sum(one.values()) for one in found.parts])
        time = summary([1000 * one[part] for one in found.parts])
        table.append({"measured": f"part of c: {part}", "ms a step": time, "part of the step %": share})
    return table


def notes(found: Measured, options: StepOptions) -> list[str]:
    """What limits the step, and what its figures do not show."""
    of_a = {side: ratio(rates, found.rates["a"])["median"] for side, rates in found.rates.items()}
    gflops = {name: flops / 1e9 for name, flops in found.flops.items()}
    fresh = options.teacher.weights is None and options.teacher.cache is None
    return [
        bound(of_a["b"], of_a["d"]),
        f"c/a, what data cost: {of_a['c']:.3f}; b/a, contention: {of_a['b']:.3f} (medians of the rounds' own ratios).",
        *unquiet("the step on kept batches", found.rates["a"]),
        f"An image takes {gflops['teacher']:.2f} GFLOP of the teacher and {gflops['student']:.2f} of the student "
        "(convolutions and matrix products, forward and backward, as torch counts them); TFLOP/s are of one process.",
        *(["The teacher's weights are fresh: its answers mean nothing, and take as long."] if fresh else []),
    ]
