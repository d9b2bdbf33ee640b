"""Batches on the device, from images on disk or in memory; resumable at any batch."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from dalikd.pipelines.backends import (
    Backend,
    Context,
    DaliBackend,
    DaliOptions,
    DeviceTransfer,
    GatherBackend,
    ObjectBackend,
    Output,
    ShardBackend,
    UnfitError,
    can_gather,
)
from dalikd.pipelines.doctor import BadFile, Decoder, find_bad_files, known_bad_files, printable
from dalikd.pipelines.draw_spec import Batch, BatchPlan, DrawSpec, MixDraws, View
from dalikd.pipelines.hardware import BadFileError, Decode, dali_words, decoding_on, is_decode_failure
from dalikd.pipelines.resident import Resident
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source, why_fingerprints_differ

__all__ = ["BadFileError", "Loader", "can_be_resident", "decode_source", "default_threads"]

_ASKED_TOO_MUCH = "std::bad_alloc"  # the machine has no memory left, or a damaged header asks for more than there is
_NAMED = 3  # files of many
_PATIENCE = 60  # s, after which it is told which batch is waited for
_DECODED_AT_ONCE = 512  # images
_MOST_NAMED = 5  # bad files that were known before
_BY_ROW = "by row"  # of orders that the sampler makes


class Loader:
    """Yields `Batch`es for ever over the sampler's steps; iterating stops at the end of the current epoch.

    Args:
        source: the images.
        sampler: their order and this process's share of it.
        spec: views and draws.
        device: where batches go. On "cuda" images are decoded by DALI's mixed backend, else on the CPU.
        threads: DALI's CPU threads; default: this process's share of the cores, 16 at most.
        prefetch: batches made ahead.
        hw_decoder_load: share of the images that a GPU's JPEG engine decodes; default: 1 where it has one.
        decode: on a GPU, decode windows of the images, or whole ones; as `hardware.decoding_on`.
        bad_files: at an image that cannot be decoded "stop" with BadFileError, or "replace" it by the next row of the
            data set, for the rest of the run, and say so once.
        bad_files_limit: rows that may be replaced; default: 1 % of the source's, but at least 10 and at most 1000.
        resident: the decoded images of the source, where they are kept on the device.
        buffers: 0: every batch owns its memory. n: batches on a GPU lie in n sets of fixed buffers used in turn, and
            each holds until n - 1 further ones have been taken; nothing is allocated in a step.
        attach: plan -> arrays [B, ...] by name that go along with the batch, as its `extras`.

    Raises:
        BadFileError: `dalikd doctor` has found files that cannot be decoded, and `bad_files` is "stop".

    Attributes:
        position: microbatches consumed since the start of training.
        wait_seconds: host time spent waiting for batches, since the start.
        replaced: row that cannot be decoded -> row used in its place.
        damaged: row that could not be decoded -> size of its file, which may be mended.

    Raises:
        BadFileError: something in the list of files is known to be no file, and `bad_files` is "stop".
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        spec: DrawSpec,
        *,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        prefetch: int = 2,
        hw_decoder_load: float | None = None,
        decode: Decode = "auto",
        bad_files: Literal["stop", "replace"] = "stop",
        bad_files_limit: int | None = None,
        resident: Resident | None = None,
        buffers: int = 0,
        attach: Callable[[BatchPlan], dict[str, np.ndarray]] | None = None,
    ) -> None:
        assert len(source) == sampler.size
        _check_groups(sampler, spec)
        self.source, self.sampler, self.spec = source, sampler, spec
        self.device = torch.device(device)
        self.bad_files = bad_files
        self.position = 0
        self.wait_seconds = 0.0
        self.replaced: dict[int, int] = dict(resident.replaced) if resident is not None else {}
        self.damaged: dict[int, int] = {}
        self.note_damaged(self.replaced)
        self._attach = attach
        self._transfer = DeviceTransfer(self.device, buffers)
        self._threads = threads or default_threads()
        self._decoding = decoding_on(source, self.device, decode, hw_decoder_load)
        self._limit = min(max(len(source) // 100, 10), 1000) if bad_files_limit is None else bad_files_limit
        self._waits: tuple[int, float] | None = None  # for which batch, since when
        self._watch: threading.Event | None = None  # ends the thread that watches this
        decoder = partial(Decoder, max_pixels=source.max_pixels)
        context = Context(source, sampler, spec, self.device, self._transfer, decoder, self.replaced)
        self._backend = _backend(context, DaliOptions(self._threads, prefetch, self._decoding), resident)
        no_files = [row for row in source.no_files().tolist() if row not in self.replaced]
        if no_files:  # found while they were listed; DALI would wait for what a pipe brings
            self._drop(find_bad_files(source, no_files), tell=os.environ.get("RANK", "0") == "0")
        if resident is None:
            self._pass_over_known()

    def __len__(self) -> int:
        """Microbatches of this process in an epoch."""
        return self.sampler.microbatches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.position // len(self)
        while self.position // len(self) == epoch:
            yield self.next()

    def next(self) -> Batch:
        """The next batch, across epochs.

        Raises:
            BadFileError: an image cannot be decoded and `bad_files` is "stop", or more had to be replaced than
                `bad_files_limit`; the position stays before the batch.
        """
        started = time.perf_counter()
        if self._watch is None and isinstance(self._backend, DaliBackend):
            self._watch = threading.Event()
            threading.Thread(target=_watch, args=(weakref.ref(self), self._watch), daemon=True).start()
        self._waits = self.position, started
        self._transfer.turn += 1
        try:
            plan, images, augmented = self._fetch()
        finally:
            self._waits = None
        extras = {} if self._attach is None else self._attach(plan)
        mixes = {
            (number, name): array
            for number, draws in enumerate(plan.draws.mix)
            for name, array in draws._asdict().items()
            if array is not None
        }
        arrays = {"labels": self.source.labels[plan.rows], "ids": plan.rows, **extras, **mixes}
        valid = plan.micro.valid
        sent = {name: tensor[:valid] for name, tensor in self._transfer.arrays(arrays).items()}
        batch = Batch(
            images[:valid],
            tuple(view[:valid] for view in augmented),
            sent["labels"],
            sent["ids"],
            tuple(
                MixDraws(*(sent.get((number, name)) for name in MixDraws._fields))
                for number in range(len(plan.draws.mix))
            ),
            plan.micro.total,
            {name: sent[name] for name in extras},
        )
        self.position += 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what it must be fed with to go on from there."""
        replaced, damaged = dict(self.replaced), dict(self.damaged)
        return {"position": self.position, "replaced": replaced, "damaged": damaged, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the following batches are those of the saved run, bit for bit. Files that could not
        be decoded then may have been mended.

        Raises:
            ValueError: the state belongs to other data, another seed or another batch size, or has replaced more images
                than `bad_files_limit`.
        """
        self.check_images(state)
        saved = {"order": _BY_ROW, **state}
        for key, value in self._identity().items():
            if key != "fingerprint" and saved.get(key) != value:
                raise ValueError(
                    f"cannot resume the data loader: {key} was {saved.get(key)}, now it is {value}; "
                    "resume with the same data, --seed and --batch_size, from shards also on as many processes"
                )
        self.replaced.clear()  # the backend has the same dictionary
        self.replaced.update(state["replaced"])
        self._check_limit(list(self.replaced))
        self.note_damaged(state.get("damaged", {}))
        self.seek(state["position"])

    def check_images(self, state: dict[str, Any]) -> None:
        """Check that the images are those of a saved state. Files that could not be decoded may have been mended.

        Raises:
            ValueError: they are others.
        """
        saved, own = state.get("fingerprint", ""), self.source.fingerprint
        if saved != own and not self._is_mended(state):
            raise ValueError(
                f"cannot resume with other images ({self.source.name}, {self.source.split}): their fingerprint was "
                f"{saved}, now it is {own} ({why_fingerprints_differ(saved, own)}); resume with the same data"
            )

    def _is_mended(self, state: dict[str, Any]) -> bool:
        """Whether the data are those of a saved state but for files that could not be decoded then."""
        damaged, files = state.get("damaged", {}), self.source.files
        if not damaged or files is None or max(damaged) >= len(files):
            return False
        sizes = files.measure().copy()
        sizes[list(damaged)] = list(damaged.values())
        return replace(self.source, files=replace(files, sizes=sizes)).fingerprint == state["fingerprint"]

    def note_damaged(self, rows: Collection[int]) -> None:
        """Remember that these rows could not be decoded: their files may be mended before a resumed run."""
        if rows and self.source.files is not None:
            sizes = self.source.files.measure()
            self.damaged |= {row: int(sizes[row]) for row in rows}

    def seek(self, position: int) -> None:
        """Continue at microbatch number `position`."""
        self._backend.close()
        self.position = position

    def replace(self, rows: Iterable[int]) -> None:
        """Use the next row of the data set in the place of each of these from now on.

        Raises:
            BadFileError: none is left, or with these there are more than `bad_files_limit`.
        """
        new = [row for row in rows if row not in self.replaced]
        bad = {*new, *self.replaced}
        self.note_damaged(bad)
        for row in sorted(bad):
            self.replaced[row] = self._substitute(row, bad)
        if new:
            self._check_limit(new)

    def _check_limit(self, last: list[int]) -> None:
        if len(self.replaced) > self._limit:
            names = ", ".join(printable(self.source.path(row)) for row in last[-_NAMED:])
            raise BadFileError(
                f"{len(self.replaced)} of {len(self.source)} images cannot be decoded, more than "
                f"--data.bad_files_limit {self._limit} allows; the last ones are {names}: repair or remove them, or "
                "raise the limit"
            )

    def close(self) -> None:
        """Free the pipeline's threads and memory. The loader can be used again."""
        if self._watch is not None:
            self._watch.set()
            self._watch = None
        self._backend.close()

    def feed(self, index: int) -> tuple[Any, ...]:
        """All that Python does for microbatch number `index`: the inputs of its views. For benchmarks."""
        return self._backend.feed(index)[1]

    def _pass_over_known(self) -> None:
        """Treat the files that `dalikd doctor` could not decode, unchanged since, before the first batch meets them.

        Raises:
            BadFileError: there are some, and they are not to be replaced.
        """
        bad = known_bad_files(self.source)
        if not bad:
            return
        names = ", ".join(f"{item.path} ({item.reason})" for item in bad[:_MOST_NAMED])
        more = f" and {len(bad) - _MOST_NAMED:,} more" if len(bad) > _MOST_NAMED else ""
        found = f"dalikd doctor could not decode {names}{more}"
        if self.bad_files == "stop":
            raise BadFileError(f"{found}; repair or remove them, or go on without them by --data.bad_files replace")
        self.replace(item.row for item in bad)
        if os.environ.get("RANK", "0") == "0":
            print(f"dalikd: {found}; using the next image in the place of each", flush=True)

    def _identity(self) -> dict[str, Any]:
        sampler = self.sampler
        # world size and accumulation do not matter to what a step holds: the trainer keeps the position in steps
        order = _BY_ROW
        if self.source.shards is not None and not isinstance(self._backend, GatherBackend):
            share = f" in {sampler.world} share(s)" if sampler.reads_shares else ""  # that each process shuffles
            order = f"containers {self.source.shards.digest}{share}"
        return {
            "fingerprint": self.source.fingerprint,
            "seed": sampler.seed,
            "batch_size": sampler.batch_size,
            "order": order,
        }

    def _fetch(self) -> Output:
        while True:
            try:
                return self._backend.fetch(self.position)
            except RuntimeError as error:
                damaged = isinstance(error, UnfitError) or is_decode_failure(error) or _ASKED_TOO_MUCH in str(error)
                if not damaged:
                    raise
                self._handle_bad_files(error)

    def _handle_bad_files(self, error: RuntimeError) -> None:
        """After a failed decode: name the images, then stop or replace them and start again at the same batch."""
        self._backend.restart()
        plan = self._backend.plan(self.position)
        bad = find_bad_files(
            self.source, np.unique(plan.rows), device=self.device, decoding=self._decoding, threads=self._threads
        )
        if not bad and _ASKED_TOO_MUCH in str(error):
            raise error
        if not bad:
            raise BadFileError(
                f"DALI fails on the batch that starts with {printable(self.source.path(int(plan.rows[0])))}, though it "
                f"decodes each image of it alone; DALI says: {dali_words(error)}"
            ) from error
        self._drop(bad)

    def _drop(self, bad: Sequence[BadFile], *, tell: bool = True) -> None:
        """Stop, or replace them and say so."""
        self.note_damaged([item.row for item in bad])
        names = ", ".join(f"{item.path} ({item.reason})" for item in bad)
        if self.bad_files == "stop" and bad:
            raise BadFileError(
                f"cannot decode {names}; repair or remove it, or go on without it by --data.bad_files replace"
            )
        if bad and tell:
            print(f"dalikd: cannot decode {names}; using the next image in its place from now on", flush=True)
        self.replace(item.row for item in bad)

    def _first_files(self, position: int) -> str:
        """Which files a batch starts with, and one of it that cannot be read, for a message."""
        if self.source.files is None:  # what is read ahead of shards is another thread's
            return f"it is read from {self.source.name} {self.source.split}"
        rows = np.unique(self._backend.plan(position).rows).tolist()
        words = f"it holds {', '.join(printable(self.source.path(row)) for row in rows[:_NAMED])}, …"
        for row in rows:
            try:
                self.source.read(row, _PATIENCE / 10)
            except OSError as error:
                return f"{words}; {printable(self.source.path(row))} cannot be read: {error.strerror}"
        return words

    def _substitute(self, row: int, bad: set[int]) -> int:
        for step in range(1, len(self.source)):
            other = (row + step) % len(self.source)
            if other not in bad:
                return other
        raise BadFileError("no image of the data set can be decoded")


def _watch(loader: "weakref.ref[Loader]", ended: threading.Event) -> None:
    """Tell once of each batch that does not come which files it waits for: DALI reads them by itself, and from a disk
    that does not answer it reads for ever."""
    told: int | None = None
    while not ended.wait(_PATIENCE / 10):
        own = loader()
        if own is None:
            return
        waits = own._waits
        if waits is not None and waits[0] != told and time.perf_counter() - waits[1] > _PATIENCE:
            told = waits[0]
            print(f"dalikd: batch {told} has not come within {_PATIENCE} s; {own._first_files(told)}", flush=True)
        del own


def _backend(context: Context, options: DaliOptions, resident: Resident | None) -> Backend:
    source = context.source
    if not can_gather(source, context.spec, resident):
        if source.store is not None:
            return ObjectBackend(context, options)
        return DaliBackend(context, options) if source.shards is None else ShardBackend(context, options)
    if resident is None:
        assert source.arrays is not None
        resident = Resident.from_arrays(source.arrays, context.device)
    return GatherBackend(context, resident)


def _check_groups(sampler: Sampler, spec: DrawSpec) -> None:
    if spec.grouped and sampler.microbatch % spec.mix_group:
        raise ValueError(
            f"microbatches of {sampler.microbatch} images are not a multiple of the mix group {spec.mix_group}: "
            "give the Sampler group=spec.mix_group and a batch size that fits"
        )


def default_threads() -> int:
    """This process's share of the cores, of which torchrun says how many processes of this machine have one. More than
    16 threads wait for each other, and each holds memory of the host and of the GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 16))


# ---------------------------------------------------------------------------------------- kept on the device


def can_be_resident(view: View) -> bool:
    """Whether every batch of a view starts from the same square of each image."""
    return view.crop in ("pad_crop", "square") or (view.crop == "center_crop" and view.resize == view.size)


def decode_source(source: Source, view: View, *, device: torch.device, **options) -> Resident:
    """Decode every image to the square that a view starts from.

    Args:
        source: the images.
        view: pad_crop, or center_crop without resizing.
        device: where the images are kept.
        options: of the Loader: threads, prefetch, bad_files and others.

    Raises:
        ValueError: a view that cuts another window each time, or images that do not fit into the device's memory.
        BadFileError: an image cannot be decoded, and they are not to be replaced.
    """
    if not can_be_resident(view):
        raise ValueError(
            "--data.resident true keeps squares of one size, but this view cuts another window of the whole image "
            "each time: set --data.crop pad_crop, or leave it out"
        )
    square = view if view.crop == "center_crop" else replace(view, crop="square")
    resident = Resident.empty(len(source), view.size, device)
    sampler = Sampler(len(source), min(_DECODED_AT_ONCE, len(source)), shuffle=False, drop_last=False)
    loader = Loader(source, sampler, DrawSpec(square), device=device, **options)
    for batch in loader:
        resident.put(batch.ids, batch.images)  # by row: shards have an order of their own
    loader.close()
    for row, other in loader.replaced.items():
        resident.pixels[row] = resident.pixels[other]
    resident.replaced.update(loader.replaced)
    return resident
