"""`dalikd bench loader`: decode and augment, images a second, dalikd against other loaders that do the same work.

Before its turn a loader waits until all processes rest; what it has made in advance is taken off before the clock
starts. decode: DALI decodes the same windows with as many threads, and nothing else is done: the limit of any loader
with this decoder (decode-mixed: on the GPU). The loaders themselves are in sides.py.
"""

import os
import shutil
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import yaml

from dalikd.pipelines.data import DataConfig, open_source, open_split, training_view
from dalikd.pipelines.datasets.file_list import list_folder, manifest_folder, open_tree, scan
from dalikd.pipelines.draws import permutation
from dalikd.pipelines.objects import is_object_url
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.host import loader_microseconds
from dalikd.tools.bench.machine import cores, cpu_seconds, read_ahead, settle, synchronize
from dalikd.tools.bench.record import RESULTS, Record, alternate, begin, check_names, finish, ratio, summary, timed
from dalikd.tools.bench.sides import Job, Side, cannot, open_side, runnable, store_of
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.launch import Device, start
from dalikd.trainers.options import ABOVE_0, DATA_RANGES, FROM_0, FROM_1, check_numbers

_CPU, _TYPES = torch.device("cpu"), {"fp32": torch.float32, "bf16": torch.bfloat16}
_AS_GOOD = 0.98  # of the best median: then the smaller setting is taken
_CLASSES = 1000
_MOST_LINKS = 60_000  # to one file; ext4 allows 65,000
_SETTLED_SECONDS = 2.5  # a folder changed within the last two seconds is not remembered


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
        sources: where the same images are read from: files, webdataset, tfrecord; default: what the data set is. Shards
            are written into a temporary folder.
        batch_size: default: 64 for views above 96 pixels, else 512.
        workers: processes of the other loaders; default: as many as dalikd has threads.
        rounds: that count, after one of warm-up.
        seconds: length of a measurement.
        images: of a measurement, in place of seconds.
        precision: of the normalised batch.
        device: where batches end; auto takes the GPU where there is one.
        sweep: try dalikd's threads (unless --data.threads is given), prefetch and, on a GPU, hw_decoder_load; print
            the best as config lines.
        startup: make a tree of so many files in a temporary folder; measure scan, opening and the first batch. 0: of
            images in object storage, as they are.
        orders: measure the sampler for data sets of so many images: time and memory.
        output: folder of the results, or a path that ends in .json.
        json: file for the record, - for stdout.
    """

    data: DataConfig = field(default_factory=DataConfig)
    random: int | None = None
    backends: list[str] = field(default_factory=lambda: ["all"])
    augmentations: list[str] = field(default_factory=lambda: ["identity"])
    sources: list[str] | None = None
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
    json: Path | None = None

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("random", "batch_size", "images"), FROM_1)
        counts |= {"workers": FROM_0, "startup": FROM_0}
        check_numbers(self, {**DATA_RANGES, **counts, "seconds": ABOVE_0})
        if (self.sweep, self.startup is not None, self.orders is not None).count(True) > 1:
            raise ValueError("--sweep, --startup and --orders measure different things: give one of them at a time")


def run(options: LoaderOptions) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    accelerator = start(options.device, "fp32")
    record = begin("loader", options, accelerator, asdict(options), plotted="images/s")
    names = runnable(options.backends, accelerator.device)
    if options.orders is not None:
        _orders(record, options.orders, options.rounds)
    else:
        job = _job(options, accelerator.device)
        record.reads(job.source)
        if options.startup is not None:
            start_of = partial(_startup, count=options.startup) if options.startup else _startup_of_objects
            start_of(record, job=job, rounds=options.rounds)
        elif options.sweep:
            _sweep(record, "dalikd-mixed" if "dalikd-mixed" in names else "dalikd", job, options)
        else:
            _compare(record, names, job, options)
    finish(record, options)


def _job(options: LoaderOptions, device: torch.device) -> Job:
    data = replace(options.data, threads=options.data.threads or cores())
    if options.random is None:
        source = open_split(data, "train", 0)
    elif data.root is not None:
        raise ValueError("--random takes the place of a data set: leave out --data.root")
    else:
        count, side = options.random, data.image_size or 32
        about: Any = {"name": "random", "split": "train", "classes": ("0", "1"), "labels": np.arange(count) % 2}
        about |= {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "image_size": side}
        pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        source = Source(**about, arrays=pixels)
    view = training_view(data, source)
    batch_size, workers = options.batch_size or (64 if view.size > 96 else 512), options.workers
    made: Any = {"dtype": _TYPES[options.precision], "workers": data.threads if workers is None else workers}
    return Job(source, view, batch_size, device, data, **made)


def _title(job: Job) -> str:
    crop = {"random_resized_crop": "random resized crop", "pad_crop": "padded, cropped"}[job.view.crop]
    dtype = str(job.dtype).removeprefix("torch.")
    return f"{job.view.size}-pixel training views ({crop}, flip), normalised {dtype}, batches of {job.batch_size}"


def measure(side: Side, job: Job, options: LoaderOptions, cpu: list[float]) -> float:
    """Images a second: take off what lies ready, then count batches until the time is up or the images are made.
    CPU ms an image, of this process and its workers, go to `cpu`."""
    for _ in range(side.ahead):
        next(side.batches)
    synchronize(job.device)
    made, used, started = 0, cpu_seconds(), time.perf_counter()
    while made < options.images if options.images else not made or time.perf_counter() - started < options.seconds:
        next(side.batches)
        made += job.batch_size
    synchronize(job.device)
    seconds = time.perf_counter() - started
    cpu.append(1000 * (cpu_seconds() - used) / made)
    return made / seconds


def _compare(record: Record, names: Sequence[str], job: Job, options: LoaderOptions) -> None:
    """Measure every combination that there is; what a loader cannot do is named in the notes. Raises ValueError where
    nothing can be measured."""
    augmentations, own = augmentation_names(options.augmentations), store_of(job.source)
    stores = check_names("--sources", options.sources or [own], dict.fromkeys((own, "webdataset", "tfrecord")))
    lacks: dict[str, dict[str, None]] = {}
    with TemporaryDirectory(prefix="dalikd-bench-") as folder:
        sources = {store: _written(job.source, store, Path(folder)) for store in stores}
        record.page_cache = " ".join(dict.fromkeys(map(read_ahead, sources.values())))
        for augmentation in augmentations:
            jobs: dict[tuple[str, str], Job] = {}
            for store, name in product(stores, names):
                one = replace(job, source=sources[store], augmentation=augmentation)
                if lack := cannot(name, one):
                    lacks.setdefault(name, {})[lack] = None
                else:
                    jobs[store, name] = one
            record.rows += _rows(jobs, options) if jobs else []
    record.notes += [f"{name} is left out where it has none of these: {', '.join(lacks[name])}." for name in lacks]
    if not record.rows:
        raise ValueError(f"nothing to measure: {' '.join(record.notes)}")
    varied = {"source": len(stores) > 1, "page cache": False, "augmentation": len(augmentations) > 1}
    record.labels = (*(label for label, varies in varied.items() if varies), "loader")
    record.variant = "-".join([job.source.name, str(job.view.size), *(f"{label}s" for label in record.labels[:-1])])
    record.title = _title(job)
    for label in (label for label in varied if label not in record.labels):  # the same in every row
        record.title += f"; {label}: {record.rows[0][label]}"
        record.rows = [{name: cell for name, cell in row.items() if name != label} for row in record.rows]
    loader = replace(job, batch_size=min(256, len(job.source))).loader()
    cost = loader_microseconds(loader, batches=6)
    loader.close()
    record.notes.append(f"dalikd's loader on the main thread, an image (see dalikd bench host): {cost:.1f} µs.")


def _written(source: Source, store: str, folder: Path) -> Source:
    """The images of a source, or the same from shards that are written into the folder."""
    if store == store_of(source):
        return source
    kind = "webdataset" if store == "webdataset" else "tfrecord"
    write_shards(source, folder / store / "train", WriteOptions(format=kind))  # shuffled, as `dalikd prepare` does
    return open_source(store, folder / store, "train")


def _rows(jobs: Mapping[tuple[str, str], Job], options: LoaderOptions) -> list[dict[str, Any]]:
    """One row a side, named by store and loader; the first is what the others are compared with."""
    sides: dict[str, Side] = {}
    cpu: dict[str, list[float]] = {}
    candidates: dict[str, Callable[[], float]] = {}
    try:
        for (store, name), job in jobs.items():
            one = f"{store} · {name}"
            sides[one], cpu[one] = open_side(name, job), []
            candidates[one] = partial(measure, sides[one], job, options, cpu[one])
        rates = alternate(candidates, options.rounds, settle)
    finally:
        for side in sides.values():
            side.batches.close()
    rows, (first, *_) = [], rates.values()
    for ((store, name), job), used, rate in zip(jobs.items(), cpu.values(), rates.values(), strict=True):
        state = "no files" if job.source.arrays is not None else "warm"
        labels = {"source": store, "page cache": state, "augmentation": job.augmentation, "loader": name}
        against = {f"{next(iter(jobs))[1]} / this": None if rate is first else ratio(first, rate)}
        rows.append({**labels, **_speed(rate, used), **against})
    return rows


def _speed(rates: Sequence[float], cpu: Sequence[float]) -> dict[str, Any]:
    return {"images/s": summary(rates), "CPU ms/image": summary(cpu[1:])}  # the first is the warm-up


def _sweep(record: Record, loader: str, job: Job, options: LoaderOptions) -> None:
    """Try one setting after the other, each with the best of those before, and print the best as config lines."""
    if job.source.arrays is not None:
        raise ValueError("--sweep tries how files are decoded, and these images lie in memory: give --data.root")
    threads = options.data.threads
    best: dict[str, Any] = {} if threads is None else {"threads": threads}
    for setting, values in settings(loader).items():
        if setting in best:
            continue
        cpu: dict[str, list[float]] = {str(value): [] for value in values}

        def rate(value: Any, setting: str = setting, cpu: dict[str, list[float]] = cpu) -> float:
            """One pipeline is open at a time: each keeps memory and threads of its own."""
            changed = replace(job, data=replace(job.data, **best, **{setting: value}))
            side = open_side(loader, changed)
            try:
                return measure(side, changed, options, cpu[str(value)])
            finally:
                side.batches.close()

        rates = alternate({str(value): partial(rate, value) for value in values}, options.rounds, settle)
        tried = [{"setting": setting, "value": one, **_speed(rates[str(one)], cpu[str(one)])} for one in values]
        best[setting] = choose({row["value"]: row["images/s"]["median"] for row in tried})
        record.rows += tried
    record.title, record.labels = f"{loader}: {_title(job)}", ("setting", "value")
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


def settings(loader: str) -> dict[str, tuple[Any, ...]]:
    """What is tried, in this order; at a share of hw_decoder_load between, a decoder depends on an image's batch."""
    most = cores()
    threads = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, most // 2, most, most + most // 2, 2 * most} - {0})
    found = {"threads": tuple(count for count in threads if count <= 2 * most), "prefetch": (1, 2, 3, 5)}
    return {**found, "hw_decoder_load": (0.0, 1.0)} if loader == "dalikd-mixed" else found


def _startup_of_objects(record: Record, job: Job, rounds: int) -> None:
    """List the images in a store, open them from the remembered list, take the first batch."""
    if not is_object_url(job.data.root):
        raise ValueError("--startup 0 is for images in object storage: give --data.root s3://…, or a number of files")
    record.title, record.variant = f"Start of a data set of {len(job.source):,} objects", "startup-objects"
    record.labels, record.plotted, opened = ("what",), "seconds", partial(open_split, job.data, "train", 0)
    with TemporaryDirectory(prefix="dalikd-bench-") as folder:
        manifests = f"{folder}/manifests"

        def listed() -> None:
            shutil.rmtree(manifests, ignore_errors=True)
            opened()

        def first_batch() -> None:
            with closing(replace(job, source=opened()).loader(job.device)) as loader:
                loader.next()

        steps = {"list (first start)": listed, "open from the remembered list": opened}
        steps |= {f"open, build, first batch of {job.batch_size}": first_batch}
        with patch.dict(os.environ, DALIKD_CACHE=manifests):
            values = alternate({what: partial(timed, step, job.device) for what, step in steps.items()}, rounds)
    record.rows = [{"what": what, "seconds": summary(seconds)} for what, seconds in values.items()]


def _startup(record: Record, count: int, job: Job, rounds: int) -> None:
    """Scan a tree of `count` files, open it from the cache, hash it, take the first batch."""
    if job.source.files is None:
        raise ValueError("--startup makes a tree out of files, and these images are none: give --data.root")
    if count < job.batch_size:
        raise ValueError(f"--startup {count}: give at least --batch_size ({job.batch_size}) files")
    record.title, record.variant = f"Start of a data set of {count:,} files", "startup"
    record.page_cache = "warm, as the tree has just been written."
    record.labels, record.plotted = ("what",), "seconds"
    with TemporaryDirectory(prefix="dalikd-bench-") as folder:
        root = Path(folder).resolve() / "tree"
        opened = partial(open_source, "imagefolder", root, "train", split=".")

        def first_batch() -> None:
            with closing(replace(job, source=opened()).loader(job.device)) as loader:
                loader.next()

        steps: dict[str, Callable[[], object]] = {
            "scan (first start)": lambda: scan(root, list_folder(root).folders),
            "open from the cached list": opened,
            "open and hash (for checkpoints)": lambda: opened().fingerprint,
            f"open, build, first batch of {job.batch_size}": first_batch,
        }
        with patch.dict(os.environ, DALIKD_CACHE=str(Path(folder) / "cache")):  # goes with the tree
            record.notes.append(grow_tree([Path(job.source.path(row)) for row in range(len(job.source))], root, count))
            time.sleep(_SETTLED_SECONDS)
            open_tree(root, list_folder(root).folders, remember_above=0)
            values = alternate({what: partial(timed, step, job.device) for what, step in steps.items()}, rounds)
            size = sum(path.stat().st_size for path in manifest_folder(root).iterdir())
    record.rows = [{"what": what, "seconds": summary(seconds)} for what, seconds in values.items()]
    record.notes.append(f"The cached list takes {size / 1e6:.1f} MB and is mapped into memory.")


def grow_tree(paths: Sequence[Path], root: Path, count: int) -> str:
    """Make class folders with `count` files out of some images, by hard links to copies beside `root`, each with 60,000
    links at most. Returns a sentence that tells what was done."""
    originals, classes, used = root.parent / "originals", min(_CLASSES, count), 0
    originals.mkdir(parents=True)
    for number in range(count):
        used, links = divmod(number, _MOST_LINKS)
        path = paths[used % len(paths)]
        if not links:
            shutil.copyfile(path, originals / f"{used}{path.suffix}")
        target = root / f"class{number * classes // count:04d}" / f"{number:08d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(originals / f"{used}{path.suffix}")
    return f"The tree: {count:,} files in {classes:,} class folders, hard links to {used + 1} of the images."


def _orders(record: Record, sizes: Sequence[int], rounds: int) -> None:
    """Time and memory of the sampler for data sets of many images."""
    record.title = "The sampler: an epoch's order, and the memory of the two orders that it holds"
    record.variant, record.labels, record.plotted = "orders", ("images",), "order of an epoch, s"
    for size in sizes:
        seconds = [timed(partial(permutation, 0, epoch, size), _CPU) for epoch in range(rounds + 1)][1:]
        tracemalloc.start()
        sampler = Sampler(size, 1)
        sampler.order(0)
        for order in list(sampler._orders.values()):  # the next epoch's is made in a thread
            order.result()
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        memory = {"two orders, MB": held / 1e6, "peak while ordering, MB": peak / 1e6}
        record.rows.append({"images": f"{size:,}", "order of an epoch, s": summary(seconds), **memory})
    record.notes.append("The next epoch's order is made in a thread while an epoch runs; memory is what numpy holds.")
