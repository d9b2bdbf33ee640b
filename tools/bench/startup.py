"""`bench loader --startup N`: how long a data set of many files takes to open, and until its first batch."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets.file_list import list_folder, manifest_folder, open_tree, scan
from dalikd.pipelines.draw_spec import DrawSpec
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.images import describe
from dalikd.tools.bench.record import Record, alternate, summary
from dalikd.tools.bench.sides import Job

__all__ = ["grow_tree", "measure_startup"]

_CLASSES = 1000
_MOST_LINKS = 60_000  # to one file; ext4 allows 65,000
_SETTLED_SECONDS = 2.5  # a folder changed within the last two seconds is not remembered


def measure_startup(count: int, job: Job, rounds: int, header: Mapping[str, Any]) -> Record:
    """Scan a tree of `count` files, open it from the cache, hash it, take the first batch.

    Raises:
        ValueError: the pictures are no files, or `count` is below the batch size.
    """
    if job.source.files is None:
        raise ValueError("--startup makes a tree out of files, and these pictures are none: give --data.root")
    if count < job.batch_size:
        raise ValueError(f"--startup {count}: give at least --batch_size ({job.batch_size}) files")
    record = Record(
        benchmark="loader",
        title=f"Start of a data set of {count:,} files",
        warm_up="one pass of everything.",
        page_cache="warm, as the tree has just been written.",
        labels=("what",),
        plotted="seconds",
        variant="startup",
        pictures=describe(job.source),
        **header,
    )
    with tempfile.TemporaryDirectory(prefix="dalikd-bench-") as folder, _own_cache(Path(folder) / "cache"):
        root = Path(folder).resolve() / "tree"
        paths = [Path(job.source.path(row)) for row in range(len(job.source))]
        record.notes.append(grow_tree(paths, root, count))
        time.sleep(_SETTLED_SECONDS)
        open_tree(root, list_folder(root).folders, remember_above=0)
        values = alternate(_steps(root, job), rounds)
        record.rows = [{"what": what, "seconds": summary(seconds)} for what, seconds in values.items()]
        record.notes.append(_cache_note(root))
    return record


def grow_tree(paths: Sequence[Path], root: Path, count: int) -> str:
    """Make class folders with `count` files out of some pictures, by hard links where the file system has them.

    The links lead to copies beside `root`, never to the pictures themselves; a copy that has 60,000 links is followed
    by the next one.

    Returns:
        a sentence that says what was done.
    """
    originals = root.parent / "pictures"
    originals.mkdir(parents=True)
    classes = min(_CLASSES, count)
    linked = True
    for number in range(count):
        used, links = divmod(number, _MOST_LINKS)
        path = paths[used % len(paths)]
        original = originals / f"{used}{path.suffix}"
        if not links:
            shutil.copyfile(path, original)
        folder = root / f"class{number * classes // count:04d}"
        target = folder / f"{number:08d}{path.suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        linked = linked and _link(original, target)
        if not linked:
            shutil.copyfile(original, target)
    how = f"{'hard links to' if linked else 'copies of'} {used + 1} of the pictures"
    return f"The tree: {count:,} files in {classes:,} class folders, {how}."


def _link(original: Path, target: Path) -> bool:
    try:
        os.link(original, target)
    except OSError:  # a file system without hard links
        return False
    return True


def _steps(root: Path, job: Job) -> dict[str, Callable[[], float]]:
    def first_batch() -> None:
        source = _open(root)
        loader = Loader(source, Sampler(len(source), job.batch_size), DrawSpec(job.view), **_reading(job))
        loader.next()
        loader.close()

    return {
        "scan (first start)": lambda: _seconds(lambda: scan(root, list_folder(root).folders)),
        "open from the cached list": lambda: _seconds(lambda: _open(root)),
        "open and hash (for checkpoints)": lambda: _seconds(lambda: _open(root).fingerprint),
        f"open, build, first batch of {job.batch_size}": lambda: _seconds(first_batch),
    }


def _reading(job: Job) -> dict[str, Any]:
    return {"device": job.device, "threads": job.threads, "prefetch": job.prefetch}


def _open(root: Path) -> Source:
    return open_source("imagefolder", root, "train", split=".")


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Keep lists of files in a folder of this benchmark, which goes with it."""
    before = os.environ.get("DALIKD_CACHE")
    os.environ["DALIKD_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["DALIKD_CACHE"]
        if before is not None:
            os.environ["DALIKD_CACHE"] = before


def _cache_note(root: Path) -> str:
    sizes = [path.stat().st_size for path in manifest_folder(root).iterdir()]
    return f"The cached list takes {sum(sizes) / 1e6:.1f} MB and is mapped into memory."
