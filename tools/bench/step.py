"""`dalikd bench step`: what a training step of a distillation costs, and what its data cost it.

    dalikd bench step --config configs/….yaml --data.root DATA

Four sides take turns in one process, with one and the same step:

    a  on batches that stay on the device, the loader stopped
    b  on the same batches, with the loader running: one batch is taken for each and thrown away
    c  on real data, as in training
    d  the loader alone

c/a is what data really cost. b/a is what they cost without anybody waiting for them: cores, memory, and the GPU that
decodes. The time that a step waits for data hides that part. What each part of a step takes comes from a fifth side
that waits for the device between the parts.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from accelerate import Accelerator

from dalikd.pipelines.sources import Source
from dalikd.tools.bench.dispatch import Planned
from dalikd.tools.bench.images import cached_share, describe, sample_rows
from dalikd.tools.bench.machine import device_slug, environment
from dalikd.tools.bench.options import ON_GPU, check_rounds
from dalikd.tools.bench.record import Record, alternate, check_output, ratio, summary, table, write
from dalikd.tools.bench.rounds import (
    PARTS,
    Round,
    keep_batches,
    loader_round,
    parts_round,
    replayed,
    step_flops,
    step_round,
    training_loop,
    warm_up,
    with_weights,
)
from dalikd.tools.bench.training import StepOptions
from dalikd.tools.cli import run_command
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.setup import build_distillation

__all__ = ["SIDES", "Measured", "bound", "cached", "main", "measure", "plan", "run", "setting", "unquiet", "variant"]

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


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        rates: images a second of each side, round by round.
        rounds: the same rounds, with all that they have shown.
        parts: seconds a step of each part, round by round.
        flops: operations an image, of "teacher" and "student".
        warm_up: seconds that the first steps took.
    """

    rates: dict[str, list[float]]
    rounds: dict[str, list[Round]]
    parts: dict[str, list[float]]
    flops: dict[str, float]
    warm_up: float


def run(options: StepOptions, config: dict[str, Any]) -> Record:
    """Measure, print the table and write the record.

    Raises:
        ValueError, OSError: the options, the data or the nets are not as they should be.
    """
    check_rounds(options.rounds)
    options.check_warm_up()
    check_output(options.folder)
    accelerator = start(options.device, options.precision)
    before = environment(accelerator.device)
    with TemporaryDirectory() as folder:
        task, data = build_distillation(with_weights(options, Path(folder)), accelerator)
    page_cache = cached(data.train)
    found = measure(training_loop(task, data, options, accelerator), options)
    data.loader.close()
    record = Record(
        benchmark="step",
        title=f"Distillation step: {setting(options, data.view.size)}, {_processes(accelerator.num_processes)}",
        environment=before,
        device=device_slug(accelerator.device),
        config=config,
        warm_up=_warm_up(options, found.warm_up),
        page_cache=page_cache,
        rows=_rows(found, options, accelerator),
        labels=("measured",),
        plotted="ms a step",
        variant=variant(options, data.view.size, accelerator.num_processes),
        pictures=describe(data.train),
        notes=_notes(found, options, on_gpu=accelerator.device.type == "cuda"),
    )
    if accelerator.is_main_process:
        print("\n".join([record.title, "", table(record.rows), "", *record.notes]))
        print("written:", *write(record, options.folder))
    return record


def measure(loop: Loop, options: StepOptions) -> Measured:
    """Let all sides take turns.

    Args:
        loop: at its start.
        options: steps, rounds and warm-up.
    """
    seconds = warm_up(loop, options.warmup)
    batches = keep_batches(loop.loader)
    flops = step_flops(loop, batches[0])
    rounds: dict[str, list[Round]] = {side: [] for side in SIDES}
    parts: list[dict[str, float]] = []

    def counted(side: str, take_round: Callable[[], Round]) -> Callable[[], float]:
        def rate() -> float:
            rounds[side].append(take_round())
            return rounds[side][-1].rate

        return rate

    def part_rate() -> float:
        parts.append(parts_round(loop, options.steps, options.warmup))
        return loop.loader.sampler.batch_size / sum(parts[-1].values())

    sides = {side: counted(side, take_round) for side, take_round in _rounds(loop, batches, options).items()}
    rates = alternate({**sides, "parts": part_rate}, options.rounds)
    by_part = {part: [found[part] for found in parts[1:]] for part in PARTS}  # the first round warms up
    return Measured(
        {side: rates[side] for side in SIDES},
        {side: found[1:] for side, found in rounds.items()},
        by_part,
        flops,
        seconds,
    )


def bound(contention: float, loader: float) -> str:
    """Name what limits training, in one sentence.

    Args:
        contention: b/a, the share of its images/s that the loader, running beside it, leaves the step.
        loader: d/a, the loader's images/s as a multiple of the step's.
    """
    if loader < _LOADER_LIMITS:
        return (
            f"Bound by the loader: alone it gives {loader:.2f} of what the step takes on kept batches; "
            "dalikd bench loader --sweep true looks for better settings of it."
        )
    if contention < _CONTENDED:
        return (
            f"Bound by contention: the loader is fast enough ({loader:.2f} of what the step takes), but running beside "
            f"the step it leaves it {contention:.2f} of its images/s; fewer --data.threads may help."
        )
    return (
        f"Bound by compute: the loader gives {loader:.2f} of what the step takes on kept batches and, running beside "
        f"it, leaves it {contention:.2f} of its images/s."
    )


def setting(options: StepOptions, side: int) -> str:
    """Nets, augmentation, sizes and precision in a few words."""
    compiled = "" if options.compile == "off" else f", compiled ({options.compile})"
    return (
        f"{_teacher(options)} → {options.model}, {options.augmentation}, {side} px, batch {options.batch_size}, "
        f"{options.precision}{compiled}"
    )


def unquiet(what: str, rates: Sequence[float]) -> list[str]:
    """A sentence about rates that should have been alike, if they were not."""
    factor = max(rates) / min(rates)
    if factor <= _QUIET:
        return []
    return [f"Not to be relied on: {what} varied by a factor of {factor:.1f}, so the machine had other work to do."]


def variant(options: StepOptions, side: int, processes: int = 1) -> str:
    """The same as a part of file names."""
    parts = [_teacher(options), options.model, str(side), options.augmentation, options.precision]
    parts += [] if options.compile == "off" else ["compiled", options.compile]
    parts += [] if processes == 1 else [f"{processes}p"]
    return "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", str(part)) for part in parts)


def cached(source: Source, sample: int = 500) -> str:
    """One sentence on where the pictures come from."""
    if source.files is None:
        return "no files, the pictures lie in memory."
    share = cached_share(source.path(int(row)) for row in sample_rows(len(source), sample))
    return f"{share:.0%} of a sample of {min(sample, len(source))} files lay in memory at the start."


def plan(root: Path) -> list[Planned]:
    """What `dalikd bench all` runs: nets of ImageNet's size on photos, and of CIFAR's on pictures kept in memory."""
    data = ("--data.root", str(root), "--data.train_split", ".", "--data.val_split", ".", "--data.image_size")
    small = ("--teacher.name", "timm:resnet18", "--model", "timm:resnet10t", "--batch_size", "16", "--mix.group", "16")
    large = ("--teacher.name", "timm:resnet34", "--model", "timm:resnet18", *ON_GPU)
    wide = (
        "--teacher.name",
        "wrn_40_2",
        "--model",
        "wrn_16_2",
        *ON_GPU,
        "--batch_size",
        "512",
        "--data.resident",
        "true",
    )
    picks = ("--augmentation", "cutmixpick_teacher")
    tuned = ("--compile", "max-autotune-no-cudagraphs")
    plain = ("--loss.lw_mix", "[1, 0, 0]")  # each image once: Hinton's distillation
    return [
        Planned((*data, "224", *small, "--device", "cpu", "--steps", "4", "--warmup", "2")),
        Planned((*data, "224", *large, *picks, "--compile", "off"), gpus=1),
        Planned((*data, "224", *large, *picks, *tuned), gpus=1),
        Planned((*data, "224", *large, *plain, *tuned), gpus=1),
        *(Planned((*data, side, *wide, *picks, "--compile", "reduce-overhead"), gpus=1) for side in ("32", "64")),
    ]


def _rounds(loop: Loop, batches: Sequence[Any], options: StepOptions) -> dict[str, Callable[[], Round]]:
    """Side -> measures one round."""
    loader, kept = loop.loader, replayed(batches)
    counts = (options.steps, options.warmup)

    def alone() -> Round:
        loader.close()
        return step_round(loop, kept, *counts)

    def kept_beside_real() -> Any:
        loader.next()
        return kept()

    return {
        "a": alone,
        "b": lambda: step_round(loop, kept_beside_real, *counts),
        "c": lambda: step_round(loop, loader.next, *counts),
        "d": lambda: loader_round(loop, *counts),
    }


def _rows(found: Measured, options: StepOptions, accelerator: Accelerator) -> list[dict[str, Any]]:
    operations, processes = sum(found.flops.values()), accelerator.num_processes
    rows = []
    for side, label in SIDES.items():
        rounds, rates = found.rounds[side], found.rates[side]
        steps = 1000 * np.concatenate([one.steps for one in rounds])
        trains = side != "d"
        timed = trains or accelerator.device.type != "cuda"  # there the loader's calls return before its work is done
        rows.append(
            {
                "measured": label,
                "images/s": summary(rates),
                "of a": summary([1.0]) if side == "a" else ratio(rates, found.rates["a"]),
                "ms a step": summary([1000 * one.seconds / options.steps for one in rounds]),
                "p50 ms": float(np.quantile(steps, 0.5)) if timed else None,
                "p99 ms": float(np.quantile(steps, 0.99)) if timed else None,
                "data wait %": summary([100 * one.wait_share for one in rounds]) if trains else None,
                "TFLOP/s": summary([rate * operations / processes / 1e12 for rate in rates]) if side == "a" else None,
                "memory MiB": max(one.memory for one in rounds) / 2**20 if trains else None,
            }
        )
    return rows + _part_rows(found.parts)


def _part_rows(parts: dict[str, list[float]]) -> list[dict[str, Any]]:
    whole = [sum(times) for times in zip(*parts.values(), strict=True)]
    return [
        {
            "measured": f"part of c: {part}",
            "ms a step": summary([1000 * seconds for seconds in times]),
            "part of the step %": summary([100 * one / all_parts for one, all_parts in zip(times, whole, strict=True)]),
        }
        for part, times in parts.items()
    ]


def _notes(found: Measured, options: StepOptions, *, on_gpu: bool) -> list[str]:
    of_a = {side: ratio(rates, found.rates["a"])["median"] for side, rates in found.rates.items()}
    gflops = {name: flops / 1e9 for name, flops in found.flops.items()}
    fresh = options.teacher.weights is None and options.teacher.cache is None
    if on_gpu:
        clock = "by events of the GPU (none of the loader alone, whose calls return before the GPU has done its work)"
        waits = "what the GPU does and waits from the end of a step to the first work on the next batch"
        memory = "peak of what torch took of the GPU; what DALI takes comes on top"
    else:
        clock = "by the host's clock"
        waits = "host time inside the loader, its own work on the batch included"
        memory = "what the process held at a round's end"
    return [
        bound(of_a["b"], of_a["d"]),
        f"Real data give {of_a['c']:.3f} of the step on kept batches (c/a: what data cost); the loader running beside "
        f"it leaves {of_a['b']:.3f} (b/a: contention, and waiting where the loader is the slower). Both are medians of "
        "the rounds' own ratios.",
        *unquiet("the step on kept batches", found.rates["a"]),
        f"p50 and p99: all single steps of the rounds, {clock}. Data wait: {waits}. Memory: {memory}.",
        "Parts come from rounds of their own that wait for the device at the end of each part, so together they may "
        "take longer than a step. teacher: mixing, teacher, picking, metric; student: forwards, loss, backward, "
        "exchange, clipping; optimizer: its step, gradients to zero, moving average.",
        f"An image takes {gflops['teacher']:.2f} GFLOP of the teacher and {gflops['student']:.2f} of the student "
        "(convolutions and matrix products, forward and backward, as torch counts them); TFLOP/s are of one process.",
        *(["The teacher's weights are fresh: its answers mean nothing, and take as long."] if fresh else []),
    ]


def _teacher(options: StepOptions) -> str:
    return "cached answers" if options.teacher.cache is not None else str(options.teacher.name)


def _warm_up(options: StepOptions, seconds: float) -> str:
    compiled = "" if options.compile == "off" else ", compilation included"
    return (
        f"{options.warmup} steps before everything ({seconds:.1f} s{compiled}) and as many before each round; "
        "the first round of each side is left out."
    )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("bench step", run, argv)


if __name__ == "__main__":
    main()
