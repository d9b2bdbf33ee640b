"""`dalikd bench loader`: decode and augment, images a second, dalikd against other loaders that do the same work.

    dalikd bench loader --data.root PHOTOS --data.train_split .       photos in class folders, 224-pixel training views
    dalikd bench loader --data.name tinyimagenet --data.root ROOT     64-pixel pictures
    dalikd bench loader --random 50000 --data.image_size 32           random pixels in memory

Rounds alternate between the loaders, so that a noisy neighbour hits all. Before its turn a loader waits until all
processes rest; what it has made in advance is taken off before the clock starts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dalikd.pipelines.data import DataConfig, training_view
from dalikd.tools.bench.comparison import Clock, Comparison, compare
from dalikd.tools.bench.dispatch import Planned
from dalikd.tools.bench.feeding import measure_orders
from dalikd.tools.bench.machine import cores, device_slug, environment
from dalikd.tools.bench.options import RESULTS, check_names, check_rounds
from dalikd.tools.bench.record import Record, check_output, markdown, write
from dalikd.tools.bench.sides import Job, runnable
from dalikd.tools.bench.startup import measure_startup
from dalikd.tools.bench.stores import STORES, open_pictures, own_store
from dalikd.tools.bench.sweep import measure_sweep
from dalikd.tools.cli import run_function
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.launch import Device, start
from dalikd.trainers.options import DATA_RANGES, check_numbers

__all__ = ["LoaderOptions", "main", "plan", "run"]

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class LoaderOptions:
    """Measure images a second of dalikd's loader and of others, from the encoded picture to the normalised batch.

    Args:
        data: the pictures, of which the training split is read; threads, prefetch, hw_decoder_load and decode are
            dalikd's.
        random: measure so many pictures of random pixels in memory instead; --data.image_size is their side.
        backends: dalikd (decodes on the CPU), dalikd-mixed (on the GPU), torchvision-pil, torchvision-io, timm, and as
            the limit decode and decode-mixed (dalikd's windows are decoded and dropped); default: all that run here.
        augmentations: names as for `dalikd distill`, or all; augmented images come beside those of the base view.
        sources: where the same pictures are read from: files, resident (decoded, in memory), webdataset, tfrecord, or
            all; default: what the data set is. The others are made in a temporary folder.
        cache: files lie in the page cache (warm), are dropped from it before each measurement (cold), or both.
        batch_size: default: 64 for views above 96 pixels, else 512.
        workers: processes of the other loaders; default: as many as dalikd has threads.
        rounds: that count, after one of warm-up.
        seconds: length of a measurement.
        images: of a measurement, in place of seconds.
        precision: of the normalised batch.
        device: where batches end; auto takes the GPU where there is one.
        sweep: try dalikd's threads (unless --data.threads is given), prefetch and, on a GPU, hw_decoder_load; print
            the best as config lines.
        startup: make a tree of so many files in a temporary folder; measure scan, opening and the first batch.
        orders: measure the sampler for data sets of so many images: time and memory.
        output: folder of the results, or a path that ends in .json.
    """

    data: DataConfig = field(default_factory=DataConfig)
    random: int | None = None
    backends: list[str] = field(default_factory=lambda: ["all"])
    augmentations: list[str] = field(default_factory=lambda: ["identity"])
    sources: list[str] | None = None
    cache: Literal["warm", "cold", "both"] = "warm"
    batch_size: int | None = None
    workers: int | None = None
    rounds: int = 5
    seconds: float = 3.0
    images: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Device = "auto"
    sweep: bool = False
    startup: int | None = None
    orders: list[int] | None = None
    output: Path = RESULTS

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be measured with."""
        check_rounds(self.rounds)
        check_numbers(self, DATA_RANGES)
        numbers = {name: getattr(self, name) for name in ("random", "batch_size", "seconds", "images", "startup")}
        numbers |= {"orders": min(self.orders or [1])}
        for name, value in numbers.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} {value}: give a number above 0")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers {self.workers}: give 0 (the main process alone) or more")
        if (self.sweep, self.startup is not None, self.orders is not None).count(True) > 1:
            raise ValueError("--sweep, --startup and --orders measure different things: give one of them at a time")


def run(options: LoaderOptions) -> Record:
    """Measure, print the table, write the results.

    Raises:
        ValueError, OSError: options that do not fit this machine or the data.
    """
    check_output(options.output)
    device = start(options.device, "fp32").device
    header = {"environment": environment(device), "device": device_slug(device), "config": _plain(asdict(options))}
    record = _measure(options, device, header)
    print(markdown(record))
    for path in write(record, options.output):
        print(f"written: {path}")
    return record


def plan(root: Path) -> list[Planned]:
    """What `dalikd bench all` runs of this benchmark."""
    photos = ("--data.root", str(root), "--data.train_split", ".")
    on_gpu = ("--device", "cuda", "--precision", "bf16", "--batch_size", "384")
    return [
        Planned(photos),
        Planned((*photos, "--backends", "dalikd", "--augmentations", "all")),
        Planned((*photos, "--backends", "dalikd", "--sources", "files", "webdataset", "tfrecord")),
        Planned((*photos, "--sweep", "true")),
        Planned((*photos, "--startup", "1281167")),
        Planned(("--random", "50000", "--data.image_size", "32")),
        Planned(("--orders", "1281167", "14000000")),
        Planned((*photos, *on_gpu), gpus=1),
        Planned((*photos, *on_gpu, "--backends", "dalikd", "dalikd-mixed", "--augmentations", "all"), gpus=1),
    ]


def _measure(options: LoaderOptions, device: torch.device, header: dict[str, Any]) -> Record:
    names = runnable(options.backends, device)
    if options.orders is not None:
        return measure_orders(options.orders, options.rounds, header)
    clock = Clock(options.rounds, options.seconds, options.images)
    job = _job(options, device)
    if options.startup is not None:
        return measure_startup(options.startup, job, options.rounds, header)
    if options.sweep:
        return measure_sweep(names, job, clock, header, options.data.threads)
    comparison = Comparison(
        tuple(names),
        tuple(augmentation_names(options.augmentations)),
        tuple(check_names("--sources", options.sources or [own_store(job.source)], STORES)),
        ("warm", "cold") if options.cache == "both" else (options.cache,),
    )
    return compare(comparison, job, clock, header)


def _job(options: LoaderOptions, device: torch.device) -> Job:
    pictures = open_pictures(options.data, options.random)
    view = training_view(options.data, pictures)
    threads = options.data.threads or cores()
    return Job(
        source=pictures,
        view=view,
        augmentation="identity",
        batch_size=options.batch_size or (64 if view.size > 96 else 512),
        device=device,
        dtype=_TYPES[options.precision],
        threads=threads,
        workers=threads if options.workers is None else options.workers,
        prefetch=options.data.prefetch,
        hw_decoder_load=options.data.hw_decoder_load,
        decode=options.data.decode,
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    lists = ("backends", "augmentations", "sources", "orders")
    run_function("bench loader", run, argv, options=LoaderOptions, lists=lists)


if __name__ == "__main__":
    main()
