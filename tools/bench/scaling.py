"""`dalikd bench scaling`: the step of `bench step` on one process against several, with the same work for each.

    dalikd bench scaling --config configs/….yaml --data.root DATA --processes 1 2 4

Every measurement is a launch of its own, and the numbers of processes take turns. n processes share a step of n times
--batch_size; the efficiency is their images a second over n times those of one process. Each has its share of the
cores: OMP_NUM_THREADS, and DALI's threads unless --data.threads is given. Gradient exchange: what steps on kept batches
save without it (and without sharing running statistics); the metric's exchange of teacher outputs stays.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from dalikd.pipelines.data import open_split
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench.common import ScalingOptions, open_loop
from dalikd.tools.bench.images import cached, describe
from dalikd.tools.bench.machine import cores
from dalikd.tools.bench.record import Record, alternate, begin, finish, ratio, summary
from dalikd.tools.bench.rounds import keep_batches, replayed, step_round
from dalikd.tools.bench.step import setting, unquiet, variant
from dalikd.trainers.launch import start
from dalikd.trainers.tracking import write_json

__all__ = ["Launches", "bound", "run", "work"]

_GOOD = 0.9  # efficiency
_NOTICEABLE = 0.05  # share of a step
_LONGEST = 3600  # seconds of a launch


def run(options: ScalingOptions, config: dict[str, Any]) -> Record:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    options.check_warm_up()
    accelerator = start(options.device, options.precision)
    device = accelerator.device
    record = begin("scaling", options, accelerator, config, alone=False)
    source = open_split(options.data, "train", options.seed)
    check_processes(options, len(source), device, accelerator.num_processes)
    record.page_cache, record.pictures = cached(source), describe(source)
    with TemporaryDirectory() as folder:
        launches = [Launches(count, options, config, device.type, Path(folder)) for count in sorted(options.processes)]
        sides: dict[str, Callable[[], float]] = {str(one.processes): one for one in launches}
        rates = alternate(sides, options.rounds)
    side = options.data.image_size or source.image_size
    record.title = f"Several processes: {setting(options, side)} for each process"
    record.warm_up = (
        f"{options.warmup} steps at the start of each launch and before each round of {options.steps} steps; the first "
        "launch of each number of processes."
    )
    record.labels, record.plotted, record.variant = ("processes",), "images/s", variant(options, side)
    record.rows = [one.row(rates[str(one.processes)], rates["1"]) for one in launches]
    sentence = bound(record.rows[0], record.rows[-1], gpu=device.type == "cuda")
    record.notes = [sentence, *unquiet("one process", rates["1"])]
    return finish(record, options)


class Launches:
    """Starts so many processes, again and again, and keeps what they found; scratch files lie in the folder."""

    def __init__(
        self, processes: int, options: ScalingOptions, config: Mapping[str, Any], device: str, folder: Path
    ) -> None:
        self.processes, self.cores = processes, max(1, cores() // processes)
        self.threads = options.data.threads or self.cores
        self.found: list[dict[str, Any]] = []
        self._file, file = folder / f"{processes}.json", folder / "config.yaml"
        file.write_text(yaml.safe_dump(dict(config)), "utf-8")
        batch_size = processes * options.batch_size
        own = {"--config": file, "--batch_size": batch_size, "--data.threads": self.threads, "--device": device}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        worker = ["-m", "dalikd.tools.bench", "scaling-worker", str(self._file)]
        self._command = [sys.executable, *launcher, *worker, *(str(word) for pair in own.items() for word in pair)]

    def __call__(self) -> float:
        """Launch once; images a second of all processes together. Raises ValueError with what failed ones printed."""
        self._file.unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.cores)}
        ended = subprocess.run(
            self._command, env=environment, capture_output=True, text=True, check=False, timeout=_LONGEST
        )
        if ended.returncode or not self._file.exists():
            # the command's own line of what torchrun wrote, or its last words
            lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
            own = [line.partition("error: ")[2] for line in lines if line.startswith("dalikd bench scaling: error: ")]
            raise ValueError(f"{self.processes} processes failed: {own[0] if own else ' '.join(lines[-5:])[-500:]}")
        self.found.append(json.loads(self._file.read_text("utf-8")))
        assert self.found[-1]["processes"] == self.processes
        return self.found[-1]["images_per_second"]

    def row(self, rates: Sequence[float], alone: Sequence[float]) -> dict[str, Any]:
        """What they found, beside the rates of one process."""
        found = self.found[1:]  # the first launch warms up
        exchange = [100 * (1 - one["without_exchange"] / one["with_exchange"]) for one in found]
        return {
            "processes": self.processes,
            "cores each": self.cores,
            "torch threads": found[0]["torch_threads"],
            "DALI threads": self.threads,
            "images/s": summary(rates),
            "efficiency": ratio(rates, [self.processes * rate for rate in alone]),
            "gradient exchange %": summary(exchange) if self.processes > 1 else None,
            "data wait %": summary([100 * one["wait_share"] for one in found]),
        }


def work(options: ScalingOptions, file: Path) -> dict[str, Any]:
    """What one of the processes does: a round of steps on real data, one on kept batches, and one on kept batches
    without exchanging gradients. The main process writes what all of them found."""
    accelerator = start(options.device, options.precision)
    loop, _ = open_loop(options, accelerator)
    counts = options.steps, options.warmup
    for _ in range(options.warmup):
        loop.step()
    kept = replayed(keep_batches(loop.loader))
    real = step_round(loop, loop.loader.next, *counts)
    loop.loader.close()
    exchanging = step_round(loop, kept, *counts)
    with accelerator.no_sync(loop.model):  # the processes' weights part here, so nothing may follow
        silent = step_round(loop, kept, *counts)
    found = {
        "processes": accelerator.num_processes,
        "torch_threads": torch.get_num_threads(),
        "images_per_second": real.rate,
        "wait_share": real.wait_share,
        "with_exchange": exchanging.seconds / options.steps,
        "without_exchange": silent.seconds / options.steps,
    }
    if accelerator.is_main_process:
        write_json(file, found)
    accelerator.end_training()
    return found


def bound(alone: Mapping[str, Any], most: Mapping[str, Any], *, gpu: bool) -> str:
    """Name what limits the most processes, in one sentence, from their row and that of one process."""
    processes, efficiency = most["processes"], most["efficiency"]["median"]
    exchange, wait = most["gradient exchange %"]["median"] / 100, most["data wait %"]["median"] / 100
    each = f"each has {most['cores each']} cores where one alone has {alone['cores each']}"
    reached = f"{processes} processes reach {efficiency:.2f} of {processes} times one process"
    shares = f"exchanging gradients takes {exchange:.0%} of a step and waiting for data {wait:.0%}"
    if efficiency >= _GOOD:
        return f"Nothing bounds it: {reached}." if gpu else f"{reached}, on the same cores: one alone leaves them idle."
    if not gpu:
        return f"Bound by the cores: {reached}, as {each} ({1 / processes:.2f} is what sharing them leaves); {shares}."
    if wait >= max(_NOTICEABLE, exchange):
        return f"Bound by the loader: {reached}; {shares}; {each}."
    if exchange >= _NOTICEABLE:
        return f"Bound by the exchange of gradients: {reached}; {shares}."
    return f"Bound by what the processes share (power, clocks, memory, the host's cores): {reached}; {shares}."


def check_processes(options: ScalingOptions, size: int, device: torch.device, running: int) -> None:
    """Raises ValueError for numbers of processes that cannot be compared here, on a data set of so many images."""
    processes, group = options.processes, options.mix.group
    if running > 1:
        raise ValueError("bench scaling starts its processes itself: call it without torchrun or accelerate launch")
    if 1 not in processes or min(processes) < 1 or len(set(processes)) < 2:
        words = " ".join(map(str, processes))
        raise ValueError(f"--processes {words}: give 1, which the others are compared with, and more")
    if device.type == "cuda" and max(processes) > (gpus := torch.cuda.device_count()):
        raise ValueError(f"--processes {max(processes)}: this machine has {gpus} GPU(s), and each process takes one")
    for count in processes:
        try:
            Sampler(size, count * options.batch_size, world=count, accumulation=options.accumulation, group=group)
        except ValueError as error:
            raise ValueError(f"--processes {count} with --batch_size {options.batch_size} for each: {error}") from error
