"""`dalikd bench scaling`: the step of `bench step` on one process against several, with the same work for each.

Every measurement is a launch of its own, and the numbers of processes take turns. n processes share a step of n times
--batch_size; the efficiency is their images a second over n times those of one process. Each has its share of the
cores: OMP_NUM_THREADS, and DALI's threads unless --data.threads is given. Gradient exchange: what steps on kept batches
save without it (and without sharing running statistics); the metric's exchange of teacher outputs stays.
"""

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from dalikd.pipelines.data import open_split
from dalikd.pipelines.files import write_atomically
from dalikd.tools.bench.common import ScalingOptions, open_loop
from dalikd.tools.bench.machine import cores, run_process
from dalikd.tools.bench.record import alternate, begin, finish, ratio, summary
from dalikd.tools.bench.step import keep_batches, setting, step_round
from dalikd.trainers.launch import start
from dalikd.trainers.tracking import write_json

_FILE = "DALIKD_BENCH_SCALING"  # where a launch writes what it found


def run(options: ScalingOptions, config: dict[str, Any]) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    if 1 not in options.processes or min(options.processes) < 1 or len(set(options.processes)) < 2:
        words = " ".join(map(str, options.processes))
        raise ValueError(f"--processes {words}: give 1, which the others are compared with, and more")
    accelerator = start(options.device, options.precision)
    record = begin("scaling", options, accelerator, config, labels=("processes",), plotted="images/s")
    source = open_split(options.data, "train", options.seed)
    record.reads(source)
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in sorted(options.processes)}
    with TemporaryDirectory() as folder:
        given = {**config, "device": accelerator.device.type}
        sides = {str(n): partial(launch, n, options, given, Path(folder), them) for n, them in found.items()}
        rates = alternate(sides, options.rounds)
    title, record.variant = setting(options, options.data.image_size or source.image_size)
    record.title = f"Several processes: {title} for each process"
    steps, warmup = options.counts
    record.warm_up = f"{warmup} steps before each round of {steps} steps; the first launch of each number of processes."
    for count, launches in found.items():
        later, own = launches[1:], rates[str(count)]  # the first launch warms up
        exchange = [100 * (1 - one["without_exchange"] / one["with_exchange"]) for one in later]
        row = {"processes": count, "cores each": _share(count), "torch threads": later[0]["torch_threads"]}
        row |= {"DALI threads": options.data.threads or _share(count), "images/s": summary(own)}
        row["efficiency"] = ratio(own, [count * rate for rate in rates["1"]])
        row["gradient exchange %"] = summary(exchange) if count > 1 else None
        record.rows.append({**row, "data wait %": summary([100 * one["wait_share"] for one in later])})
    (one, *_, most), counts = record.rows, sorted(options.processes)
    shares = [most[f"{name} %"]["median"] for name in ("gradient exchange", "data wait")]
    record.notes = [
        f"{counts[-1]} processes reach {most['efficiency']['median']:.2f} of {counts[-1]} times one process; each has "
        f"{most['cores each']} cores where one alone has {one['cores each']}; exchanging gradients takes "
        f"{shares[0]:.0f} % of a step and waiting for data {shares[1]:.0f} %."
    ]
    finish(record, options)


def _share(processes: int) -> int:
    return max(1, cores() // processes)


def launch(
    processes: int, options: ScalingOptions, config: Mapping[str, Any], folder: Path, found: list[dict[str, Any]]
) -> float:
    """Start so many processes once; images a second of all of them together. What they found is added to `found`."""
    file, written, share = folder / f"{processes}.json", folder / "config.yaml", _share(processes)
    write_atomically(written, yaml.safe_dump(dict(config)).encode(), sync=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "dalikd.tools.bench", "scaling-worker", "--config", str(written), "--data.threads"]
    command += [str(options.data.threads or share), "--batch_size", str(processes * options.batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(share), _FILE: str(file)}
    with (folder / "log").open("w+b") as log:
        code = run_process(command, 3600, env=environment, stdout=log, stderr=log)
    if code != 0:  # the command's own line of what torchrun wrote, or its last words
        text = (folder / "log").read_text("utf-8", errors="replace")
        own = [words for line in text.splitlines() if (words := line.partition("scaling: error: ")[2])]
        raise ValueError(f"{processes} processes failed: {(own or [text[-500:]])[0]}")
    found.append(json.loads(file.read_text("utf-8")))
    return found[-1]["images_per_second"]


def work(options: ScalingOptions, _: Any) -> None:
    """What one of the processes does: a round of steps on real data, one on kept batches, and one on kept batches
    without exchanging gradients. The main process writes what all of them found."""
    accelerator = start(options.device, options.precision)
    loop, _ = open_loop(options, accelerator)
    for _ in range(options.counts[1]):
        loop.step()
    kept = keep_batches(loop.loader)
    real = step_round(loop, loop.loader.next, *options.counts)
    loop.loader.close()
    exchanging = step_round(loop, kept, *options.counts)
    with accelerator.no_sync(loop.model):  # the processes' weights part here, so nothing may follow
        silent = step_round(loop, kept, *options.counts)
    if accelerator.is_main_process:
        found = {"processes": accelerator.num_processes, "torch_threads": torch.get_num_threads()}
        found |= {"images_per_second": real.rate, "wait_share": real.waited / real.seconds}
        write_json(
            Path(os.environ[_FILE]), {**found, "with_exchange": exchanging.seconds, "without_exchange": silent.seconds}
        )
    accelerator.end_training()
