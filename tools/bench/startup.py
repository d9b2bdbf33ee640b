"""`bench loader --startup N`: how long a data set of many files takes to open, and until its first batch;
`bench loader --orders N`: what ordering its epochs costs."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets.file_list import list_folder, manifest_folder, open_tree, scan
from dalikd.pipelines.draw_spec import DrawSpec
from dalikd.pipelines.draws import permutation
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.record import Record, alternate, summary, timed
from dalikd.tools.bench.sides import Job

__all__ = ["grow_tree", "measure_orders", "measure_startup"]

_CLASSES = 1000
_MOST_LINKS = 60_000  # to one file; ext4 allows 65,000
_SETTLED_SECONDS = 2.5  # a folder changed within the last two seconds is not remembered


def measure_startup(record: Record, count: int, job: Job, rounds: int) -> None:
    """Scan a tree of `count` files, open it from the cache, hash it, take the first batch.

    Raises ValueError: the images are no files, or `count` is below the batch size.
    """
    if job.source.files is None:
        raise ValueError("--startup makes a tree out of files, and these images are none: give --data.root")
    if count < job.batch_size:
        raise ValueError(f"--startup {count}: give at least --batch_size ({job.batch_size}) files")
    record.title, record.variant = f"Start of a data set of {count:,} files", "startup"
    record.warm_up, record.page_cache = "one pass of everything.", "warm, as the tree has just been written."
    record.labels, record.plotted = ("what",), "seconds"

    with tempfile.TemporaryDirectory(prefix="dalikd-bench-") as folder:
        root = Path(folder).resolve() / "tree"

        def opened() -> Source:
            return open_source("imagefolder", root, "train", split=".")

        def first_batch() -> None:
            source, sampler = opened(), Sampler(count, job.batch_size)
            loader = Loader(source, sampler, DrawSpec(job.view), device=job.device, **job.made)
            loader.next()
            loader.close()

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
            values = alternate(
                {what: lambda step=step: timed(step, job.device) for what, step in steps.items()}, rounds
            )
            size = sum(path.stat().st_size for path in manifest_folder(root).iterdir())
    record.rows = [{"what": what, "seconds": summary(seconds)} for what, seconds in values.items()]
    record.notes.append(f"The cached list takes {size / 1e6:.1f} MB and is mapped into memory.")


def grow_tree(paths: Sequence[Path], root: Path, count: int) -> str:
    """Make class folders with `count` files out of some images, by hard links where the file system has them; to copies
    beside `root`, each with 60,000 links at most. Returns a sentence that tells what was done."""
    originals, classes, linked, used = root.parent / "originals", min(_CLASSES, count), True, 0
    originals.mkdir(parents=True)
    for number in range(count):
        used, links = divmod(number, _MOST_LINKS)
        path = paths[used % len(paths)]
        original = originals / f"{used}{path.suffix}"
        if not links:
            shutil.copyfile(path, original)
        target = root / f"class{number * classes // count:04d}" / f"{number:08d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(original, target)
            linked = False
    how = f"{'hard links to' if linked else 'copies of'} {used + 1} of the images"
    return f"The tree: {count:,} files in {classes:,} class folders, {how}."


def measure_orders(record: Record, sizes: Sequence[int], rounds: int) -> None:
    """Time and memory of the sampler for data sets of many images, each size in a process of its own."""
    record.title = "The sampler: an epoch's order, and the memory of the two orders that it holds"
    record.warm_up, record.variant = "one order of 1000 rows in each process.", "orders"
    record.labels, record.plotted = ("images",), "order of an epoch, s"
    for size in sizes:
        with get_context("spawn").Pool(1) as pool:
            seconds, held, peak = pool.apply(order_cost, (size, rounds))
        found = {"two orders, MB": held / 1e6, "peak while ordering, MB": peak / 1e6}
        record.rows.append({"images": f"{size:,}", "order of an epoch, s": summary(seconds), **found})
    record.notes.append(
        "The next epoch's order is made in a thread while an epoch runs; memory is the process's growth."
    )


def order_cost(size: int, rounds: int) -> tuple[list[float], int, int]:
    """Seconds of each order; growth of the resident memory, and of its peak, in bytes."""
    import resource

    import psutil

    permutation(0, 0, 1000)
    process = psutil.Process()
    before = process.memory_info().rss
    sampler = Sampler(size, 1)
    sampler.order(0)
    for order in list(sampler._orders.values()):  # the next epoch's is made in a thread
        order.result()
    held = process.memory_info().rss - before
    seconds = [timed(lambda epoch=epoch: permutation(0, epoch, size), torch.device("cpu")) for epoch in range(rounds)]
    return seconds, held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
