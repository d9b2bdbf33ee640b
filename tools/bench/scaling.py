"""`dalikd bench scaling`: one process against several, with the same work for each.

    dalikd bench scaling --config configs/….yaml --data.root DATA --processes 1 2 4

Every measurement is a launch of its own, and the numbers of processes take turns. n processes share a step of n times
--batch_size; the efficiency is their images a second over n times those of one process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from dalikd.pipelines.data import open_split
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench.dispatch import Planned
from dalikd.tools.bench.images import describe
from dalikd.tools.bench.machine import cores, device_slug, environment
from dalikd.tools.bench.options import ON_GPU, check_rounds
from dalikd.tools.bench.record import Record, alternate, check_output, ratio, summary, table, write
from dalikd.tools.bench.step import cached, setting, unquiet, variant
from dalikd.tools.bench.training import ScalingOptions
from dalikd.tools.cli import run_command
from dalikd.trainers.launch import start

__all__ = ["Launches", "bound", "main", "plan", "run"]

_GOOD = 0.9  # efficiency
_NOTICEABLE = 0.05  # share of a step
_LONGEST = 3600  # seconds of a launch


@dataclass
class Launches:
    """Starts so many processes, again and again, and keeps what they found.

    Args:
        processes: of each launch.
        options: of the benchmark.
        config: the same as plain values.
        device: cpu or cuda.
        folder: for scratch files.
    """

    processes: int
    options: ScalingOptions
    config: Mapping[str, Any]
    device: str
    folder: Path

    def __post_init__(self) -> None:
        """Share out the cores."""
        self.cores = max(1, cores() // self.processes)
        self.threads = self.options.data.threads or self.cores
        self.found: list[dict[str, Any]] = []

    def __call__(self) -> float:
        """Launch once; images a second of all processes together.

        Raises:
            ValueError: the processes failed; with what they said.
        """
        file = self.folder / f"{self.processes}.json"
        file.unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.cores)}
        ended = subprocess.run(
            self._command(file), env=environment, capture_output=True, text=True, check=False, timeout=_LONGEST
        )
        if ended.returncode or not file.exists():
            raise ValueError(f"{self.processes} processes failed: {_reason(ended.stderr)}")
        self.found.append(json.loads(file.read_text("utf-8")))
        assert self.found[-1]["processes"] == self.processes
        return self.found[-1]["images_per_second"]

    def _command(self, file: Path) -> list[str]:
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(dict(self.config)), "utf-8")
        own = {
            "--config": config,
            "--batch_size": self.processes * self.options.batch_size,
            "--data.threads": self.threads,
            "--device": self.device,
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        worker = ["-m", "dalikd.tools.bench.scaling_worker", str(file)]
        return [sys.executable, *launcher, *worker, *(str(word) for pair in own.items() for word in pair)]


def run(options: ScalingOptions, config: dict[str, Any]) -> Record:
    """Measure, print the table and write the record.

    Raises:
        ValueError, OSError: the options or the data are not as they should be, or a launch failed.
    """
    check_rounds(options.rounds)
    options.check_warm_up()
    check_output(options.folder)
    accelerator = start(options.device, options.precision)
    device = accelerator.device
    _check_processes(options.processes, device, accelerator.num_processes)
    source = open_split(options.data, "train", options.seed)
    for count in options.processes:
        _check_size(options, len(source), count)
    before, page_cache = environment(device), cached(source)
    with TemporaryDirectory() as folder:
        launches = {
            count: Launches(count, options, config, device.type, Path(folder)) for count in sorted(options.processes)
        }
        sides: dict[str, Callable[[], float]] = {str(count): launch for count, launch in launches.items()}
        rates = alternate(sides, options.rounds)
    rows = [_row(launch, rates[str(count)], rates["1"]) for count, launch in launches.items()]
    side = options.data.image_size or source.image_size
    record = Record(
        benchmark="scaling",
        title=f"Several processes: {setting(options, side)} for each process",
        environment=before,
        device=device_slug(device),
        config=config,
        warm_up=(
            f"{options.warmup} steps at the start of each launch and before each round of {options.steps} steps; the "
            "first launch of each number of processes is left out."
        ),
        page_cache=page_cache,
        rows=rows,
        labels=("processes",),
        plotted="images/s",
        variant=variant(options, side),
        pictures=describe(source),
        notes=_notes(rows, device),
    )
    print("\n".join([record.title, "", table(record.rows), "", *record.notes]))
    print("written:", *write(record, options.folder))
    return record


def bound(
    processes: int, efficiency: float, *, exchange: float, wait: float, cores_each: int, cores_alone: int, gpu: bool
) -> str:
    """Name what limits several processes, in one sentence.

    Args:
        processes: how many.
        efficiency: their images a second over as many times those of one process.
        exchange: share of a step, 0 to 1, that goes into exchanging gradients.
        wait: share of a step on real data that waits for them.
        cores_each: cores of each process.
        cores_alone: cores of a process that runs alone.
        gpu: whether the nets run on GPUs.
    """
    reached = f"{processes} processes reach {efficiency:.2f} of {processes} times one process"
    if efficiency >= _GOOD:
        return f"Nothing bounds it: {reached}." if gpu else f"{reached}, on the same cores: one alone leaves them idle."
    if not gpu:
        return (
            f"Bound by the cores: {reached}, as each has {cores_each} where one alone has {cores_alone}; "
            f"{1 / processes:.2f} is what sharing them leaves. Exchanging gradients takes {exchange:.0%} of a step."
        )
    if wait >= max(_NOTICEABLE, exchange):
        return (
            f"Bound by the loader: {reached}, and {wait:.0%} of a step waits for data; each process has {cores_each} "
            f"cores for it where one alone has {cores_alone}."
        )
    if exchange >= _NOTICEABLE:
        return f"Bound by the exchange of gradients: {reached}, and it takes {exchange:.0%} of a step."
    return (
        f"Bound by what the processes share: {reached}, though exchanging gradients takes {exchange:.0%} of a step and "
        f"waiting for data {wait:.0%}; that leaves power, clocks, memory and the host's {cores_alone} cores."
    )


def plan(root: Path) -> list[Planned]:
    """What `dalikd bench all` runs: small nets, as two processes on a CPU have half of it each; large ones on GPUs."""
    data = ("--data.root", str(root), "--data.train_split", ".", "--data.val_split", ".")
    small = ("--data.image_size", "32", "--teacher.name", "resnet56", "--model", "resnet8")
    large = ("--data.image_size", "224", "--teacher.name", "timm:resnet34", "--model", "timm:resnet18")
    picks = ("--augmentation", "cutmixpick_teacher")
    return [
        Planned((*data, *small, *picks, "--device", "cpu", "--processes", "1", "2", "--steps", "10", "--warmup", "2")),
        Planned((*data, *large, *picks, *ON_GPU, "--processes", "1", "2"), gpus=2),
    ]


def _check_processes(processes: Sequence[int], device: torch.device, running: int) -> None:
    if running > 1:
        raise ValueError("bench scaling starts its processes itself: call it without torchrun or accelerate launch")
    if 1 not in processes or min(processes) < 1 or len(set(processes)) < 2:
        raise ValueError(
            f"--processes {' '.join(map(str, processes))}: give 1, which the others are compared with, and more"
        )
    gpus = torch.cuda.device_count() if device.type == "cuda" else None
    if gpus is not None and max(processes) > gpus:
        raise ValueError(f"--processes {max(processes)}: this machine has {gpus} GPU(s), and each process takes one")


def _check_size(options: ScalingOptions, size: int, count: int) -> None:
    try:
        Sampler(
            size, count * options.batch_size, world=count, accumulation=options.accumulation, group=options.mix.group
        )
    except ValueError as error:
        raise ValueError(f"--processes {count} with --batch_size {options.batch_size} for each: {error}") from error


def _row(launch: Launches, rates: Sequence[float], alone: Sequence[float]) -> dict[str, Any]:
    count, found = launch.processes, launch.found[1:]  # the first launch warms up
    efficiency = ratio(rates, [count * rate for rate in alone])
    several = count > 1
    exchange = [100 * (1 - one["without_exchange"] / one["with_exchange"]) for one in found]
    return {
        "processes": count,
        "cores each": launch.cores,
        "torch threads": found[0]["torch_threads"],
        "DALI threads": launch.threads,
        "images/s": summary(rates),
        "efficiency": efficiency,
        "gradient exchange %": summary(exchange) if several else None,
        "data wait %": summary([100 * one["wait_share"] for one in found]),
    }


def _notes(rows: Sequence[Mapping[str, Any]], device: torch.device) -> list[str]:
    alone, most = rows[0], rows[-1]
    on_gpu = device.type == "cuda"
    sentence = bound(
        most["processes"],
        most["efficiency"]["median"],
        exchange=most["gradient exchange %"]["median"] / 100,
        wait=most["data wait %"]["median"] / 100,
        cores_each=most["cores each"],
        cores_alone=alone["cores each"],
        gpu=on_gpu,
    )
    return [
        sentence,
        *unquiet("one process", alone["images/s"]["values"]),
        "Each process has its share of the cores: OMP_NUM_THREADS, and DALI's threads unless --data.threads says "
        f"otherwise. {'One GPU a process.' if on_gpu else 'No GPU: nets and loader share the cores.'}",
        "Gradient exchange: what steps on kept batches save without it (and without sharing running statistics); the "
        "metric's exchange of teacher outputs stays.",
    ]


def _reason(errors: str) -> str:
    """The command's own line of what torchrun wrote, or its last words."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    own = [line.partition("error: ")[2] for line in lines if line.startswith("dalikd bench scaling: error: ")]
    return own[0] if own else " ".join(lines[-5:])[-500:]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("bench scaling", run, argv)


if __name__ == "__main__":
    main()
