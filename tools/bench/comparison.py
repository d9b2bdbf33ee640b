"""Loaders in turn: the table of `bench loader`."""

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dalikd.pipelines.draw_spec import DrawSpec
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.host import loader_microseconds
from dalikd.tools.bench.images import bring_into_page_cache, cached_share, describe, drop_from_page_cache, sample_rows
from dalikd.tools.bench.machine import cpu_seconds, settle, synchronize
from dalikd.tools.bench.record import Record, alternate, ratio, summary
from dalikd.tools.bench.sides import Job, Side, cannot, open_side
from dalikd.tools.bench.stores import open_store, stored_files

__all__ = ["WARM_UP", "Clock", "Comparison", "Meter", "compare", "describe_job"]

WARM_UP = (
    "one round of every side; in each measurement, the batches that may lie ready when it begins. "
    "Before each, all processes rest."
)
_DECODE_NOTE = (
    "decode: DALI decodes the same windows with as many threads and drops them; nothing is resized, normalised or "
    "handed over. It is the limit of any loader with this decoder (decode-mixed: on the GPU)."
)
_HOST_BATCH = 256
_LOOKED_AT = 200  # files whose share in the page cache is measured


@dataclass(frozen=True)
class Clock:
    """How long a measurement takes: `seconds`, or `images` where they are given; `rounds` count."""

    rounds: int
    seconds: float = 3.0
    images: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What is compared: names of loaders, augmentations, stores, and states of the page cache ("warm", "cold")."""

    loaders: Sequence[str]
    augmentations: Sequence[str]
    stores: Sequence[str]
    caches: Sequence[str]


@dataclass
class Meter:
    """Measures one side; called once, it takes one measurement and returns images a second.

    Attributes:
        cpu: CPU milliseconds an image, of this process and its workers, one for each call.
    """

    side: Side
    job: Job
    clock: Clock
    cpu: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        """Take off what lies ready, then count batches until the time is up or the images are made."""
        for _ in range(self.side.ahead):
            self.side.next()
        synchronize(self.job.device)
        batches, used, started = 0, cpu_seconds(), time.perf_counter()
        while self._goes_on(batches, time.perf_counter() - started):
            self.side.next()
            batches += 1
        synchronize(self.job.device)
        seconds, images = time.perf_counter() - started, batches * self.job.batch_size
        self.cpu.append(1000 * (cpu_seconds() - used) / images)
        return images / seconds

    def _goes_on(self, batches: int, seconds: float) -> bool:
        if self.clock.images is not None:
            return batches * self.job.batch_size < self.clock.images
        return not batches or seconds < self.clock.seconds


def compare(comparison: Comparison, job: Job, clock: Clock, header: Mapping[str, Any]) -> Record:
    """Measure every combination that there is; what a loader cannot do is named in the notes.

    Raises:
        ValueError: nothing can be measured, or there are too few pictures for cold measurements.
    """
    record = Record(
        benchmark="loader",
        title=describe_job(job),
        warm_up=WARM_UP,
        page_cache="no files",
        pictures=describe(job.source),
        labels=("source", "page cache", "augmentation", "loader"),
        plotted="images/s",
        variant=_variant(comparison, job),
        **header,
    )
    lacks: dict[str, dict[str, None]] = {}
    with tempfile.TemporaryDirectory(prefix="dalikd-bench-") as folder:
        sources = {store: open_store(store, job.source, job.view, Path(folder)) for store in comparison.stores}
        caches = [_PageCache(state, sources.values()) for state in comparison.caches]
        for page_cache in caches:
            record.rows += _rows(comparison, job, sources, page_cache, clock, lacks)
    record.notes += [
        f"{loader} is left out where it has none of these: {', '.join(names)}." for loader, names in lacks.items()
    ]
    if not record.rows:
        raise ValueError(f"nothing to measure: {' '.join(record.notes)}")
    record.page_cache = " ".join(page_cache.sentence for page_cache in caches)
    if any(row["loader"].startswith("decode") for row in record.rows):
        record.notes.append(_DECODE_NOTE)
    _move_constants(record)
    record.notes.append(_host_note(job))
    return record


def _variant(comparison: Comparison, job: Job) -> str:
    """The data, and whatever there are several of: runs that vary different things have files of their own."""
    varied = {
        "sources": comparison.stores,
        "cache": comparison.caches,
        "augmentations": comparison.augmentations,
    }
    return "-".join([job.source.name, str(job.view.size), *(name for name, them in varied.items() if len(them) > 1)])


def _rows(
    comparison: Comparison,
    job: Job,
    sources: Mapping[str, Source],
    page_cache: "_PageCache",
    clock: Clock,
    lacks: dict[str, dict[str, None]],
) -> list[dict[str, Any]]:
    """The rows of one state of the page cache; what loaders lack is noted in `lacks`."""
    clock = page_cache.limit(clock, job)
    rows = []
    for augmentation in comparison.augmentations:
        jobs = {store: replace(job, source=source, augmentation=augmentation) for store, source in sources.items()}
        sides = _possible(comparison.loaders, jobs, page_cache.state, lacks)
        rows += _measure(sides, clock, page_cache) if sides else []
    return rows


def describe_job(job: Job) -> str:
    """What every side makes, in a line."""
    crop = {"random_resized_crop": "random resized crop", "pad_crop": "padded, cropped"}[job.view.crop]
    dtype, side = str(job.dtype).removeprefix("torch."), job.view.size
    return f"{side}-pixel training views ({crop}, flip), normalised {dtype}, batches of {job.batch_size}"


class _PageCache:
    """Keeps files in the page cache, or out of it, and finds out whether that worked."""

    def __init__(self, state: str, sources: Iterable[Source]) -> None:
        self.state = state
        self._paths = [path for source in sources for path in stored_files(source)]
        rows = sample_rows(len(self._paths), _LOOKED_AT)
        self._sample = [self._paths[row] for row in rows]
        self._shares: list[float] = []
        if state == "warm":
            bring_into_page_cache(self._paths)

    @property
    def sentence(self) -> str:
        """What was done, and the share of the pages that lay in memory."""
        if not self._shares:
            return "no files."
        low, high = (f"{100 * share:.0f}" for share in (min(self._shares), max(self._shares)))
        share = low if low == high else f"{low} to {high}"
        return f"{self.state}; {share} % of the files' pages lay in memory before a measurement."

    def limit(self, clock: Clock, job: Job) -> Clock:
        """A clock whose measurements meet no picture twice, if the cache is to be cold."""
        if self.state == "warm" or not self._paths:
            return clock
        ahead = job.batch_size * (max(job.prefetch, 2 * job.workers) + 1)
        most = (len(job.source) // 2 - ahead) // job.batch_size * job.batch_size
        if most < job.batch_size:
            raise ValueError(
                f"--cache cold needs more than {2 * (ahead + job.batch_size)} pictures at --batch_size "
                f"{job.batch_size}, as none may come twice in a measurement; there are {len(job.source)}"
            )
        return replace(clock, images=min(most, clock.images or most))

    def prepare(self) -> None:
        """Before a measurement: wait until all rest, then drop the files if they are to be cold."""
        settle()
        if self.state == "cold":
            drop_from_page_cache(self._paths)
        if self._paths:
            self._shares.append(cached_share(self._sample))


def _possible(
    loaders: Sequence[str], jobs: Mapping[str, Job], cache: str, lacks: dict[str, dict[str, None]]
) -> dict[tuple[str, str], Job]:
    """The sides by store and loader; notes in `lacks` what the others lack."""
    sides: dict[tuple[str, str], Job] = {}
    for store, job in jobs.items():
        for loader in loaders:
            missing = cannot(loader, job, cache)
            if missing is None:
                sides[store, loader] = job
            else:
                lacks.setdefault(loader, {})[missing] = None
    return sides


def _measure(jobs: Mapping[tuple[str, str], Job], clock: Clock, page_cache: _PageCache) -> list[dict[str, Any]]:
    """One row a side; the first is what the others are compared with."""
    meters: dict[tuple[str, str], Meter] = {}
    try:
        for key, job in jobs.items():
            meters[key] = Meter(open_side(key[1], job), job, clock)
        named = {" · ".join((*key, jobs[key].augmentation)): meter for key, meter in meters.items()}
        rates = list(alternate(named, clock.rounds, page_cache.prepare).values())
    finally:
        for meter in meters.values():
            meter.side.close()
    first = next(iter(jobs))
    rows = []
    for (store, loader), meter, measured in zip(meters, meters.values(), rates, strict=True):
        rows.append(
            {
                "source": store,
                "page cache": page_cache.state if stored_files(meter.job.source) else "no files",
                "augmentation": meter.job.augmentation,
                "loader": loader,
                "images/s": summary(measured),
                "CPU ms/image": summary(meter.cpu[1:]),  # the first is the warm-up
                f"{first[1]} / this": None if (store, loader) == first else ratio(rates[0], measured),
            }
        )
    return rows


def _move_constants(record: Record) -> None:
    """Move columns that say the same in every row into the title, but for the loader's."""
    kept = []
    for label in record.labels:
        found = {row[label] for row in record.rows}
        if len(found) > 1 or label == "loader":
            kept.append(label)
            continue
        record.title += f"; {label}: {found.pop()}"
        for row in record.rows:
            del row[label]
    record.labels = tuple(kept)


def _host_note(job: Job) -> str:
    batch_size = min(_HOST_BATCH, len(job.source))
    loader = Loader(job.source, Sampler(len(job.source), batch_size), DrawSpec(job.view), threads=job.threads)
    cost = loader_microseconds(loader, batches=6)
    loader.close()
    return (
        f"What dalikd's loader does on the main thread for an image (order, draws, feeding, what DALI does to take it, "
        f"handing over, which dalikd bench host takes apart; batches of {batch_size}): {cost:.1f} µs."
    )
