"""`dalikd cache`: the teacher's outputs of whole epochs, written in one pass each; and a check of a share of them."""

import math
import os
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from dalikd.kd.teacher import Teacher, TeacherPass
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.draws import Microbatch, permutation
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.loader import BadFileError
from dalikd.pipelines.lock import FolderLock
from dalikd.pipelines.sampler import Sampler
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import autocast_type
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.options import FROM_1, AugmentingOptions, NumberRange, check_numbers
from dalikd.trainers.progress import progress
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.stopping import Interrupted, StopSignals, save_after
from dalikd.trainers.teacher_cache.layout import (
    CacheLayout,
    Storage,
    TeacherCache,
    from_group_picks,
    pack_logits,
    to_group_picks,
    unpack_logits,
)
from dalikd.trainers.teacher_cache.read import check_cacheable, logits_of, run_fingerprint, teacher_fingerprint
from dalikd.trainers.teacher_step import Branches, TeacherStep
from dalikd.trainers.tracking import LOCK, alone
from dalikd.trainers.trial import check_finite

__all__ = ["CacheOptions", "Comparison", "fill_cache", "verify_cache"]

#: Largest difference that verifying lets pass, of logits, with topk of probabilities; by storage, and by precision
#: where another run, whose kernels may be others, rounds more than the storage does.
_TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "topk": 1e-3}
_ROUNDED = {"fp32": (1e-3, 1e-3), "tf32": (1e-2, 1e-3), "bf16": (1e-1, 1e-2), "fp16": (1e-1, 1e-2)}


_CACHING = {
    "epochs": FROM_1,
    "share": NumberRange(lambda value: 0 < value <= 1, "a share of the images above 0, up to 1"),
    "tolerance": NumberRange(lambda value: 0 <= value < math.inf, "0 or more"),
}


@dataclass
class CacheOptions(AugmentingOptions):
    """Write down what the teacher says of every image in every epoch; `dalikd distill --teacher.cache` reads it.

    Called again it goes on where it stopped, or adds epochs. A run may read it with any batch size and any number of
    processes, for as many epochs as it likes: after the last one written they come again.

    Args:
        augmentation: as for distill; not cutmixpick_student, whose picks depend on the student.
        teacher: the net that is asked.
        epochs: passes over the training data.
        output: folder of the cache.
        storage: float32; float16; or topk (the k largest logits, and the probability that all others share equally:
            exact at temperature 1 for those k, an approximation at any other).
        k: logits of an image that topk keeps.
        verify: instead of writing, ask the teacher again about a share of this cache and compare; the options are those
            it was made with, unless others are given.
        share: of the batches of each epoch that are verified, at least one; they are those that it was made in.
        tolerance: largest difference of logits that passes (topk: of probabilities, as the k-th class may change
            places); default: 0.001, and 0.05 for float16, whose steps are 0.03 at logits of 32 to 64; at --precision
            tf32 0.01 at least, at bf16 and fp16 0.1 (of probabilities 0.01). Other machines round otherwise.
        json: JSON file for what was written or found, - for stdout.
    """

    augmentation: str = "identity"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    epochs: int = 1
    output: FilePath | None = None
    storage: Storage = "float32"
    k: int = 16
    verify: FilePath | None = None
    share: float = 0.01
    tolerance: float | None = None
    json: FilePath | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no cache can have."""
        super().__post_init__()
        check_numbers(self, _CACHING)


class _Work(NamedTuple):
    """What filling and verifying share."""

    options: CacheOptions
    setup: Setup
    augmenter: Augmenter
    teacher: Teacher
    layout: CacheLayout

    def teacher_step(self) -> TeacherStep:
        return TeacherStep(self.teacher, Branches([self.augmenter]), compile_mode=self.options.compile)


# ------------------------------------------------------------------------------------------------------- filling


def fill_cache(options: CacheOptions, accelerator: Accelerator, config: dict[str, Any]) -> TeacherCache:
    """Write the teacher's outputs of every epoch, or those that a stopped call has left out.

    Args:
        options: of the command.
        accelerator: whose processes share the work; only their hosts meet, so that they stop together.
        config: the same options as plain values; kept beside the cache, for verifying.

    Raises:
        ValueError, OSError: data, teacher, folder or disk are not as they should be; nothing is written then.
        BadFileError, Interrupted: as `StopSignals.together`; what was asked is written.
    """
    _check_options(options, accelerator)
    assert options.output is not None
    folder = Path(options.output)
    with alone([(str(folder), folder / LOCK)], accelerator) as locks:
        return _fill_locked(folder, options, accelerator, config, *locks)


def _fill_locked(
    folder: Path, options: CacheOptions, accelerator: Accelerator, config: dict[str, Any], *locks: FolderLock
) -> TeacherCache:
    work = _open_work(options, accelerator)
    sampler = work.setup.sampler(drop_last=False)
    needed, free = TeacherCache.check_target(folder, work.layout)
    accelerator.wait_for_everyone()  # nobody looks at the folder once the main process writes there
    if accelerator.is_main_process:
        print(_announcement(folder, work.layout, needed, free, accelerator.num_processes), flush=True)
        TeacherCache.create(folder, work.layout)
        write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    accelerator.wait_for_everyone()
    cache = TeacherCache(folder, writable=True)
    _fill(cache, work, sampler, locks)
    accelerator.wait_for_everyone()
    cache.check_filled()
    if accelerator.is_main_process:
        cache.seal()
    return cache


def _fill(cache: TeacherCache, work: _Work, sampler: Sampler, locks: Sequence[FolderLock]) -> None:
    options, accelerator = work.options, work.setup.accelerator
    loader = work.setup.loader(work.augmenter.draw_spec, sampler)
    ask, writer = work.teacher_step(), _Writer(cache, options.mix.group)
    bar = progress(accelerator, "teacher cache", total=options.epochs * sampler.size, unit="image")
    epoch = 0

    def fetch(index: int) -> tuple[Microbatch, np.ndarray, Batch | None]:
        micro = sampler[index]
        rows = micro.rows[: micro.valid]
        if not len(rows) or cache.filled(micro.epoch, rows):
            return micro, rows, None
        if loader.position != index:  # past what an earlier call has written
            loader.seek(index)
        if options.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()  # the last outputs may be overwritten
        return micro, rows, loader.next()

    def flush() -> None:
        writer.finish()
        deque(map(FolderLock.check, locks), 0)
        cache.flush(epoch)

    with bar, closing(loader), StopSignals(accelerator) as stops:
        try:
            for index in range(options.epochs * len(loader)):
                micro, rows, batch = stops.together(partial(fetch, index))
                epoch = micro.epoch
                if batch is not None:
                    writer.put(epoch, rows, ask(batch))
                bar.update(micro.total)
                if (index + 1) % len(loader) == 0:
                    flush()
        except (BadFileError, Interrupted) as stop:
            save_after(stop, flush, "the same command goes on")
            accelerator.wait_for_everyone()  # a launcher ends the others with the first that ends
            raise


class _Writer:
    """Writes what the teacher gave for a batch while the device works on the next one.

    Args:
        cache: where to.
        group: originals in a mix group.
    """

    def __init__(self, cache: TeacherCache, group: int) -> None:
        self._cache, self._group, self._checked = cache, group, False
        self._waiting: tuple[int, np.ndarray, dict[str, Tensor], torch.cuda.Event | None] | None = None

    def put(self, epoch: int, rows: np.ndarray, found: TeacherPass) -> None:
        """Send a pass's outputs to the host, and write those of the pass before."""
        if not self._checked:
            self._checked = True  # the first time, at the cost of a wait
            check_finite(torch.cat((found.originals.logits, found.branches[0].logits)), "the teacher")
        columns = _columns(self._cache.layout, found)
        on_host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in columns.items()}
        sent = None
        if found.originals.logits.is_cuda:
            sent = torch.cuda.Event()
            sent.record()
        self.finish()
        self._waiting = epoch, rows, on_host, sent

    def finish(self) -> None:
        """Write what waits."""
        if self._waiting is None:
            return
        epoch, rows, tensors, sent = self._waiting
        if sent is not None:
            sent.synchronize()
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        if "picks" in arrays:
            arrays["picks"] = to_group_picks(arrays["picks"], len(rows), self._group)
        self._cache.write(epoch, rows, arrays)
        self._waiting = None


def _columns(layout: CacheLayout, found: TeacherPass) -> dict[str, Tensor]:
    """A pass as the cache's columns."""
    (branch,) = found.branches
    outputs = {"logits": found.originals.logits, "augmented": branch.logits}
    columns = {
        f"{output}{part}": tensor
        for output in layout.outputs
        for part, tensor in pack_logits(outputs[output], layout.storage, layout.k).items()
    }
    if layout.pool:
        assert branch.picks is not None
        columns["picks"] = branch.picks
    return columns


# ----------------------------------------------------------------------------------------------------- verifying


@dataclass
class Comparison:
    """How far what a teacher gives now is from what a cache holds; both in the form of its storage.

    Attributes:
        tolerance: largest difference that passes.
        storage: of the cache.
        most_picks: largest share of picks that may be others: candidates of nearly equal entropy change places by
            rounding.
        rows: of the data set that were looked at, in all epochs.
        logits: largest and mean difference of logits.
        probabilities: largest and mean difference of probabilities at temperature 1.
        picks: rows whose pick is another one now.
    """

    tolerance: float
    storage: str
    most_picks: float = 0.01
    rows: int = 0
    logits: tuple[float, float] = (0.0, 0.0)
    probabilities: tuple[float, float] = (0.0, 0.0)
    picks: int = 0
    _values: int = field(default=0, repr=False)

    @property
    def passes(self) -> bool:
        """Whether the cache may be used."""
        largest = (self.probabilities if self.storage == "topk" else self.logits)[0]
        return largest <= self.tolerance and self.picks <= self.most_picks * self.rows  # NaN does not pass

    def add(self, now: Tensor, cached: Tensor) -> None:
        """Compare logits [B, C]."""
        by_probability = functional.softmax(now, 1), functional.softmax(cached, 1)
        self.logits = self._with(self.logits, now - cached)
        self.probabilities = self._with(self.probabilities, by_probability[0] - by_probability[1])
        self._values += now.numel()

    def _with(self, figures: tuple[float, float], difference: Tensor) -> tuple[float, float]:
        largest, mean = figures
        total = mean * self._values + float(difference.abs().double().sum())
        # numpy's maximum keeps a NaN, Python's may lose it
        return float(np.maximum(largest, float(difference.abs().max()))), total / (self._values + difference.numel())


class _SomeBatches(Sampler):
    """A share of each epoch's microbatches, in order.

    Args:
        size: rows in the data set.
        microbatch: whole mix groups.
        seed: of the epochs' orders, and of the choice.
        epochs: then they come again.
        share: of the microbatches, at least one.
    """

    def __init__(self, size: int, microbatch: int, seed: int, epochs: int, share: float) -> None:
        super().__init__(size, microbatch, seed, drop_last=False, repeat=epochs)
        self._every = Sampler(size, microbatch, seed, drop_last=False, repeat=epochs)
        count = self._every.steps_per_epoch
        self.steps_per_epoch = self.microbatches_per_epoch = max(1, round(share * count))
        chosen = [np.sort(permutation(seed, epoch, count)[: self.steps_per_epoch]) for epoch in range(epochs)]
        self._indices = np.concatenate([epoch * count + picked for epoch, picked in enumerate(chosen)])

    def place(self, index: int) -> Microbatch:
        """Where microbatch number `index` lies, without its rows."""
        return self._every.place(int(self._indices[index % len(self._indices)]))


@torch.no_grad()
def verify_cache(options: CacheOptions, accelerator: Accelerator) -> Comparison:
    """Ask the teacher again about a share of each epoch, in the microbatches that it was asked in, and compare; before
    that, compare all files with their checksums.

    Where images were picked, the images compared are those that the cache says were picked; that the teacher would pick
    others now is counted by itself.

    Raises:
        ValueError, OSError: there is no such cache, it is not filled, or the options are not those it was made with.
    """
    assert options.verify is not None
    _check_options(options, accelerator)
    cache = TeacherCache(Path(options.verify))
    cache.check_filled()
    for epoch in range(cache.layout.epochs):
        cache.check_bytes(epoch)
    work = _open_work(options, accelerator)
    cache.check_made_for(work.layout.fingerprint, "Set the options to those of the cache")
    layout = cache.layout
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = max(_TOLERANCES[layout.storage], _ROUNDED[options.precision][layout.storage == "topk"])
    found = Comparison(tolerance, layout.storage, 0.05 if autocast_type(options.precision) else 0.01)
    microbatch = layout.microbatch or options.batch_size
    sampler = _SomeBatches(layout.rows, microbatch, options.seed, layout.epochs, options.share)
    loader, ask = work.setup.loader(work.augmenter.draw_spec, sampler), work.teacher_step()
    total = layout.epochs * len(loader)
    for index in progress(accelerator, "verify", range(total)):
        batch, micro = loader.next(), sampler[index]
        rows = micro.rows[: micro.valid]
        cached = {name: torch.from_numpy(array) for name, array in cache.read(micro.epoch, rows).items()}
        _compare(found, work, cache.layout, ask(batch), batch, cached)
        found.rows += len(rows)
    loader.close()
    return found


def _compare(
    found: Comparison, work: _Work, layout: CacheLayout, asked: TeacherPass, batch: Batch, cached: dict[str, Tensor]
) -> None:
    """Add a microbatch to the comparison."""
    (branch,) = asked.branches
    now = {"logits": asked.originals.logits, "augmented": branch.logits}
    if layout.pool:
        assert branch.picks is not None
        group = work.options.mix.group
        picks = _checked_picks(cached["picks"].numpy(), len(batch), group, layout.pool // group)
        found.picks += int((branch.picks.cpu().numpy() != picks).sum())
        candidates = Branches([work.augmenter]).candidates(batch)
        assert candidates is not None
        now["augmented"] = work.teacher(candidates.images[torch.from_numpy(picks).to(batch.images.device)])
    for output in layout.outputs:
        packed = pack_logits(now[output], layout.storage, layout.k)
        found.add(unpack_logits(packed, layout.classes).cpu(), logits_of(output, cached, layout.classes))


def _checked_picks(picks: np.ndarray, batch: int, group: int, runs: int) -> np.ndarray:
    """A microbatch's picks as indices into its pool.

    Raises:
        ValueError: there are no such candidates.
    """
    first = np.arange(batch) // group * group
    if ((picks < 0) | (picks >= runs * np.minimum(group, batch - first))).any():
        raise ValueError("the cache holds picks outside of the pool: its files are damaged, make it anew")
    return from_group_picks(picks, batch, group)


# -------------------------------------------------------------------------------------------------------- common


def _check_options(options: CacheOptions, accelerator: Accelerator) -> None:
    if options.output is None and options.verify is None:
        raise ValueError("no folder given: name one for the teacher cache with --output")
    if options.teacher.cache is not None:
        raise ValueError("--teacher.cache is read by dalikd distill: name the folder of a new cache with --output")
    if options.precision == "fp64":
        raise ValueError("--precision fp64: a teacher cache holds float32 at most; use fp32")
    if options.verify is not None and accelerator.num_processes > 1:
        raise ValueError("--verify runs in one process: start it without a launcher")
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
    if here != accelerator.num_processes:  # memory maps of one file on two machines overwrite each other
        raise ValueError(f"{accelerator.num_processes} processes, {here} of them here: fill a cache on one machine")


def _open_work(options: CacheOptions, accelerator: Accelerator) -> _Work:
    setup = open_run(options, accelerator, "train")
    augmenter = setup.augmenter(options.augmentation)
    check_cacheable(setup.source, augmenter)
    layout = _layout(options, setup, augmenter)
    return _Work(options, setup, augmenter, setup.teacher(options.teacher), layout)


def _layout(options: CacheOptions, setup: Setup, augmenter: Augmenter) -> CacheLayout:
    source, classes = setup.source, len(setup.source.classes)
    if options.storage == "topk" and not 1 <= options.k <= classes:
        raise ValueError(f"--k {options.k}: the data have {classes} classes; give 1 to {classes}")
    return CacheLayout(
        rows=len(source),
        classes=classes,
        epochs=options.epochs,
        storage=options.storage,
        k=options.k if options.storage == "topk" else 0,
        augmented=augmenter.makes_candidates,
        pool=augmenter.runs * options.mix.group if augmenter.criterion is not None else 0,
        fingerprint={**run_fingerprint(options, setup, augmenter), **teacher_fingerprint(options.teacher, source)},
        microbatch=options.batch_size // setup.accelerator.num_processes,
    )


def _announcement(folder: Path, layout: CacheLayout, needed: int, free: int, processes: int) -> str:
    kept = f"top {layout.k} of {layout.classes} logits" if layout.storage == "topk" else layout.storage
    return (
        f"teacher cache {folder}: {layout.epochs} epoch(s) of {layout.rows} images, {kept}: "
        f"{_size(layout.epochs * layout.epoch_bytes)}, {_size(layout.epoch_bytes)} an epoch; "
        f"{_size(needed)} to be made, {_size(free)} free; {processes} process(es)"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
