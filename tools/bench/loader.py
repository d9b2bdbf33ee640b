"""`dalikd bench loader`: decode and augment, images a second, dalikd against other loaders that do the same work.

    dalikd bench loader --data.root PHOTOS --data.train_split .       photos in class folders, 224-pixel training views
    dalikd bench loader --data.name tinyimagenet --data.root ROOT     64-pixel images
    dalikd bench loader --random 50000 --data.image_size 32           random pixels in memory

Before its turn a loader waits until all processes rest; what it has made in advance is taken off before the clock
starts. decode: DALI decodes the same windows with as many threads, and nothing else is done: the limit of any loader
with this decoder (decode-mixed: on the GPU).
"""

import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from dalikd.pipelines.data import DataConfig, open_split, training_view
from dalikd.pipelines.draw_spec import DrawSpec
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench import images
from dalikd.tools.bench.host import loader_microseconds
from dalikd.tools.bench.machine import cores, cpu_seconds, settle, synchronize
from dalikd.tools.bench.record import RESULTS, Record, alternate, begin, check_names, finish, ratio, summary
from dalikd.tools.bench.sides import Job, Side, cannot, open_side, runnable
from dalikd.tools.bench.startup import measure_orders, measure_startup
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.launch import Device, start
from dalikd.trainers.options import DATA_RANGES, check_numbers

__all__ = ["LoaderOptions", "Meter", "choose", "run"]

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WARM_UP = "one round of every side; in each measurement, the batches that may lie ready when it begins."
_LOOKED_AT = 200  # files whose share in the page cache is measured
_PREFETCH = (1, 2, 3, 5)
_HARDWARE_LOADS = (0.0, 1.0)  # at a share between, which decoder an image meets depends on its batch
_AS_GOOD = 0.98  # of the best median: then the smaller setting is taken


@dataclass
class LoaderOptions:
    """Measure images a second of dalikd's loader and of others, from the encoded image to the normalised batch.

    Args:
        data: the images, of which the training split is read; threads, prefetch, hw_decoder_load and decode are
            dalikd's.
        random: measure so many images of random pixels in memory instead; --data.image_size is their side.
        backends: dalikd (decodes on the CPU), dalikd-mixed (on the GPU), torchvision-pil, torchvision-io, timm, and as
            the limit decode and decode-mixed (dalikd's windows are decoded and dropped); default: all that run here.
        augmentations: names as for `dalikd distill`, or all; augmented images come beside those of the base view.
        sources: where the same images are read from: files, resident (decoded, in memory), webdataset, tfrecord, or
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
        check_numbers(self, DATA_RANGES)
        numbers = {name: getattr(self, name) for name in ("random", "batch_size", "seconds", "images", "startup")}
        for name, value in {**numbers, "orders": min(self.orders or [1])}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} {value}: give a number above 0")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers {self.workers}: give 0 (the main process alone) or more")
        if (self.sweep, self.startup is not None, self.orders is not None).count(True) > 1:
            raise ValueError("--sweep, --startup and --orders measure different things: give one of them at a time")


def run(options: LoaderOptions) -> Record:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    accelerator = start(options.device, "fp32")
    record = begin("loader", options, accelerator, asdict(options))
    record.warm_up = _WARM_UP
    names = runnable(options.backends, accelerator.device)
    if options.orders is not None:
        measure_orders(record, options.orders, options.rounds)
        return finish(record, options)
    job = _job(options, accelerator.device)
    record.pictures = images.describe(job.source)
    if options.startup is not None:
        measure_startup(record, options.startup, job, options.rounds)
    elif options.sweep:
        _sweep(record, "dalikd-mixed" if "dalikd-mixed" in names else "dalikd", job, options)
    else:
        _compare(record, names, job, options)
    return finish(record, options)


def _job(options: LoaderOptions, device: torch.device) -> Job:
    data, threads = options.data, options.data.threads or cores()
    if options.random is not None and data.root is not None:
        raise ValueError("--random takes the place of a data set: leave out --data.root")
    source = open_split(data, "train", 0) if options.random is None else _random(options.random, data.image_size or 32)
    view = training_view(data, source)
    batch_size = options.batch_size or (64 if view.size > 96 else 512)
    workers = threads if options.workers is None else options.workers
    made = {"prefetch": data.prefetch, "hw_decoder_load": data.hw_decoder_load, "decode": data.decode}
    return Job(source, view, "identity", batch_size, device, _TYPES[options.precision], threads, workers, **made)


def _random(count: int, side: int) -> Source:
    """Random pixels in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Source(
        name="random",
        split="train",
        classes=("0", "1"),
        labels=np.arange(count) % 2,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=side,
        arrays=pixels,
    )


def _title(job: Job) -> str:
    """What every side makes, in a line."""
    crop = {"random_resized_crop": "random resized crop", "pad_crop": "padded, cropped"}[job.view.crop]
    dtype = str(job.dtype).removeprefix("torch.")
    return f"{job.view.size}-pixel training views ({crop}, flip), normalised {dtype}, batches of {job.batch_size}"


@dataclass
class Meter:
    """Measures one side; called once, it takes one measurement and returns images a second."""

    side: Side
    job: Job
    seconds: float
    images: int | None = None  # of a measurement, in place of seconds
    cpu: list[float] = field(default_factory=list)  # CPU ms an image, of this process and its workers, one a call

    def __call__(self) -> float:
        """Take off what lies ready, then count batches until the time is up or the images are made."""
        for _ in range(self.side.ahead):
            next(self.side.batches)
        synchronize(self.job.device)
        made, used, started = 0, cpu_seconds(), time.perf_counter()
        while made < self.images if self.images else not made or time.perf_counter() - started < self.seconds:
            next(self.side.batches)
            made += self.job.batch_size
        synchronize(self.job.device)
        seconds = time.perf_counter() - started
        self.cpu.append(1000 * (cpu_seconds() - used) / made)
        return made / seconds


# --------------------------------------------------------------------------------------------- the comparison


def _compare(record: Record, names: Sequence[str], job: Job, options: LoaderOptions) -> None:
    """Measure every combination that there is; what a loader cannot do is named in the notes. Raises ValueError where
    nothing can be measured, or there are too few images for cold measurements."""
    augmentations = augmentation_names(options.augmentations)
    stores = check_names("--sources", options.sources or [images.own_store(job.source)], images.STORES)
    states = ("warm", "cold") if options.cache == "both" else (options.cache,)
    lacks: dict[str, dict[str, None]] = {}
    with tempfile.TemporaryDirectory(prefix="dalikd-bench-") as folder:
        sources = {store: images.open_store(store, job.source, job.view, Path(folder)) for store in stores}
        caches = [_PageCache(state, sources.values()) for state in states]
        for page_cache, augmentation in product(caches, augmentations):
            jobs: dict[tuple[str, str], Job] = {}
            for store, name in product(stores, names):
                one = replace(job, source=sources[store], augmentation=augmentation)
                lack = cannot(name, one, page_cache.state)
                if lack is None:
                    jobs[store, name] = one
                else:
                    lacks.setdefault(name, {})[lack] = None
            record.rows += _measure(jobs, page_cache, options) if jobs else []
    record.notes += [f"{name} is left out where it has none of these: {', '.join(lacks[name])}." for name in lacks]
    if not record.rows:
        raise ValueError(f"nothing to measure: {' '.join(record.notes)}")
    varied = {"sources": stores, "cache": states, "augmentations": augmentations}
    several = (name for name, them in varied.items() if len(them) > 1)
    record.variant = "-".join([job.source.name, str(job.view.size), *several])
    record.page_cache = " ".join(page_cache.sentence for page_cache in caches)
    record.title, record.plotted = _title(job), "images/s"
    _move_constants(record, ("source", "page cache", "augmentation"), "loader")
    batch_size = min(256, len(job.source))
    loader = Loader(job.source, Sampler(len(job.source), batch_size), DrawSpec(job.view), threads=job.threads)
    cost = loader_microseconds(loader, batches=6)
    loader.close()
    record.notes.append(f"dalikd's loader on the main thread, an image (see dalikd bench host): {cost:.1f} µs.")


def _measure(
    jobs: Mapping[tuple[str, str], Job], page_cache: "_PageCache", options: LoaderOptions
) -> list[dict[str, Any]]:
    """One row a side, named by store and loader; the first is what the others are compared with."""
    most = page_cache.most_images(options.images, next(iter(jobs.values())))
    meters: dict[str, Meter] = {}
    try:
        for (store, name), job in jobs.items():
            meters[f"{store} · {name}"] = Meter(open_side(name, job), job, options.seconds, most)
        rates = alternate(meters, options.rounds, page_cache.prepare)
    finally:
        for meter in meters.values():
            meter.side.batches.close()
    rows, first = [], next(iter(rates.values()))
    for ((store, name), job), meter, rate in zip(jobs.items(), meters.values(), rates.values(), strict=True):
        state = page_cache.state if images.stored_files(job.source) else "no files"
        labels = {"source": store, "page cache": state, "augmentation": job.augmentation, "loader": name}
        against = {f"{next(iter(jobs))[1]} / this": None if rate is first else ratio(first, rate)}
        rows.append({**labels, **_speed(rate, meter.cpu), **against})
    return rows


def _speed(rates: Sequence[float], cpu: Sequence[float]) -> dict[str, Any]:
    return {"images/s": summary(rates), "CPU ms/image": summary(cpu[1:])}  # the first is the warm-up


class _PageCache:
    """Keeps files in the page cache, or out of it, and finds out whether that worked."""

    def __init__(self, state: str, sources: Iterable[Source]) -> None:
        self.state = state
        self._paths = [path for source in sources for path in images.stored_files(source)]
        self._sample = [self._paths[row] for row in images.sample_rows(len(self._paths), _LOOKED_AT)]
        self._shares: list[float] = []
        if state == "warm":
            images.bring_into_page_cache(self._paths)

    @property
    def sentence(self) -> str:
        """What was done, and the share of the pages that lay in memory."""
        if not self._shares:
            return "no files."
        low, high = f"{100 * min(self._shares):.0f}", f"{100 * max(self._shares):.0f}"
        share = low if low == high else f"{low} to {high}"
        return f"{self.state}; {share} % of the files' pages lay in memory before a measurement."

    def most_images(self, wanted: int | None, job: Job) -> int | None:
        """Images of a measurement; so few, if the cache is to be cold, that it meets none twice."""
        if self.state == "warm" or not self._paths:
            return wanted
        ahead = job.batch_size * (max(job.prefetch, 2 * job.workers) + 1)
        most = (len(job.source) // 2 - ahead) // job.batch_size * job.batch_size
        if most < job.batch_size:
            raise ValueError(
                f"--cache cold needs more than {2 * (ahead + job.batch_size)} images at --batch_size "
                f"{job.batch_size}, as none may come twice in a measurement; there are {len(job.source)}"
            )
        return min(most, wanted or most)

    def prepare(self) -> None:
        """Before a measurement: wait until all rest, then drop the files if they are to be cold."""
        settle()
        if self.state == "cold":
            images.drop_from_page_cache(self._paths)
        if self._paths:
            self._shares.append(images.cached_share(self._sample))


def _move_constants(record: Record, labels: Sequence[str], last: str) -> None:
    """Move columns that are the same in every row into the title, but for the last."""
    kept = [label for label in labels if len({row[label] for row in record.rows}) > 1]
    for label in (label for label in labels if label not in kept):
        record.title += f"; {label}: {record.rows[0][label]}"
        for row in record.rows:
            del row[label]
    record.labels = (*kept, last)


# -------------------------------------------------------------------------------------------------- the sweep


def _sweep(record: Record, loader: str, job: Job, options: LoaderOptions) -> None:
    """Try one setting after the other, each with the best of those before, and print the best as config lines."""
    if not images.stored_files(job.source):
        raise ValueError("--sweep tries how files are decoded, and these images lie in memory: give --data.root")
    threads = options.data.threads
    best: dict[str, Any] = {} if threads is None else {"threads": threads}
    for setting, values in _settings(loader).items():
        if setting in best:
            continue
        cpu: dict[str, list[float]] = {str(value): [] for value in values}

        def rate(value: Any, setting: str = setting, cpu: dict[str, list[float]] = cpu) -> float:
            """One pipeline is open at a time: each keeps memory and threads of its own."""
            changed = replace(job, **best, **{setting: value})
            side = open_side(loader, changed)
            try:
                return Meter(side, changed, options.seconds, options.images, cpu[str(value)])()
            finally:
                side.batches.close()

        rates = alternate({str(value): partial(rate, value) for value in values}, options.rounds, settle)
        tried = [{"setting": setting, "value": one, **_speed(rates[str(one)], cpu[str(one)])} for one in values]
        best[setting] = choose({row["value"]: row["images/s"]["median"] for row in tried})
        record.rows += tried
    record.title, record.page_cache = f"{loader}: {_title(job)}", "warm."
    record.labels, record.plotted = ("setting", "value"), "images/s"
    record.variant = f"{job.source.name}-{job.view.size}-sweep" + ("" if threads is None else f"-{threads}-threads")
    record.notes = [
        f"Best here: {', '.join(f'{name} {value}' for name, value in best.items())}.",
        f"Taken is the smallest setting that reaches {100 * _AS_GOOD:.0f} % of the best median.",
    ]
    lines = yaml.safe_dump({"data": best}, sort_keys=False).strip()
    print(f"the best settings here, as lines of a config:\n\n{lines}\n")


def choose(medians: Mapping[Any, float]) -> Any:
    """The smallest setting whose images a second come near the best; settings in ascending order."""
    enough = _AS_GOOD * max(medians.values())
    return next(value for value, median in medians.items() if median >= enough)


def _settings(loader: str) -> dict[str, tuple[Any, ...]]:
    most = cores()
    threads = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, most // 2, most, most + most // 2, 2 * most} - {0})
    settings = {"threads": tuple(count for count in threads if count <= 2 * most), "prefetch": _PREFETCH}
    return {**settings, "hw_decoder_load": _HARDWARE_LOADS} if loader == "dalikd-mixed" else settings
