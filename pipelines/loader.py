"""Batches on the device, from images on disk or in memory; resumable at any batch."""

import ctypes
import gc
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dalikd.kd.mixing import MixDraws
from dalikd.pipelines.augment import AUGMENTED_VIEWS_IN_DALI, Draws, DrawSpec
from dalikd.pipelines.doctor import find_bad_files
from dalikd.pipelines.resident import ResidentViews
from dalikd.pipelines.sampler import Microbatch, Sampler
from dalikd.pipelines.sources import Source

__all__ = ["BadFileError", "Batch", "Loader"]


class BadFileError(ValueError):
    """A picture could not be decoded while running."""


@dataclass(frozen=True)
class Batch:
    """One process's microbatch, on the device.

    Attributes:
        images: uint8 [B, S, S, 3], the base view.
        augmented: uint8 [B, S, S, 3], the augmented view, where the augmentation is per image.
        labels: int64 [B].
        ids: rows of the data set, int64 [B].
        mix: draws of each mixing run.
        epoch: of this batch.
        start: position of the first row in the epoch's order.
        total: rows of this microbatch over all processes.
    """

    images: Tensor
    augmented: Tensor | None
    labels: Tensor
    ids: Tensor
    mix: tuple[MixDraws, ...]
    epoch: int
    start: int
    total: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> Tensor:
        """The images as [B, 3, S, S], in channels_last memory, without a copy."""
        return self.images.permute(0, 3, 1, 2)

    @property
    def augmented_pixels(self) -> Tensor | None:
        """The augmented view as [B, 3, S, S], in channels_last memory, without a copy."""
        return None if self.augmented is None else self.augmented.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Plan:
    micro: Microbatch
    rows: np.ndarray  # after replacing quarantined ones
    draws: Draws


class Loader:
    """Yields `Batch`es for ever over the sampler's steps; iterating stops at the end of the current epoch.

    Args:
        source: the pictures.
        sampler: their order and this process's share of it.
        spec: views and draws.
        device: where batches go. On "cuda" pictures are decoded by DALI's mixed backend, else on the CPU.
        threads: DALI's CPU threads; default: the cores this process may use.
        prefetch: batches made ahead.
        bad_files: at a picture that cannot be decoded "stop" with BadFileError, or "replace" it by the next row of the
            data set, for the rest of the run, and say so once.

    Attributes:
        position: microbatches consumed since the start of training.
        wait_seconds: host time spent waiting for batches, since the start.
        replaced: row that cannot be decoded -> row used in its place.
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
        bad_files: Literal["stop", "replace"] = "stop",
    ) -> None:
        assert len(source) == sampler.size
        _check_groups(sampler, spec)
        self.source, self.sampler, self.spec = source, sampler, spec
        self.device = torch.device(device)
        self.bad_files = bad_files
        self.position = 0
        self.wait_seconds = 0.0
        self.replaced: dict[int, int] = {}
        if _can_gather(source, spec):
            self._engine: _Gather | _Dali = _Gather(self)
        else:
            self._engine = _Dali(self, threads or _cores(), prefetch)

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
            BadFileError: a picture cannot be decoded and `bad_files` is "stop"; the position stays before the batch.
        """
        started = time.perf_counter()
        while True:
            try:
                plan, images, augmented = self._engine.fetch()
                break
            except RuntimeError as error:
                if "in pipeline" not in str(error):  # not DALI's: out of memory and others go on up
                    raise
                self._handle_bad_files(error)
        batch = self._batch(plan, images, augmented)
        self.position += 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what it must be fed with to go on from there."""
        return {"position": self.position, "replaced": dict(self.replaced), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the following batches are those of the saved run, bit for bit.

        Raises:
            ValueError: the state belongs to other data, another seed or another batch size.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(
                    f"cannot resume the data loader: {key} was {state.get(key)}, now it is {value}; "
                    "resume with the same data, --seed and --batch_size"
                )
        self.replaced = dict(state["replaced"])
        self.seek(state["position"])

    def seek(self, position: int) -> None:
        """Continue at microbatch number `position`."""
        self._engine.close()
        self.position = position

    def close(self) -> None:
        """Free the pipeline's threads and memory. The loader can be used again."""
        self._engine.close()

    def plan(self, index: int) -> _Plan:
        """Rows and draws of microbatch number `index`: a pure function of it."""
        micro = self.sampler[index]
        rows = micro.rows
        if self.replaced:
            rows = np.array([self.replaced.get(int(row), int(row)) for row in rows])
        return _Plan(micro, rows, self.spec.draw(micro))

    def feed(self, index: int) -> tuple[Any, ...]:
        """All that Python does for microbatch number `index`: its plan, as inputs of the views. For benchmarks."""
        return self._engine.feed(self.plan(index))

    def _identity(self) -> dict[str, Any]:
        sampler = self.sampler
        # world size and accumulation do not matter to what a step holds: the trainer keeps the position in steps
        return {"fingerprint": self.source.fingerprint, "seed": sampler.seed, "batch_size": sampler.batch_size}

    def _batch(self, plan: _Plan, images: Tensor, augmented: Tensor | None) -> Batch:
        micro, valid = plan.micro, plan.micro.valid
        labels = self.source.labels[plan.rows]
        mix = tuple(
            MixDraws(self._send(run.partner)[:valid], self._send(run.lam)[:valid], self._send(run.center)[:valid])
            for run in plan.draws.mix
        )
        return Batch(
            images[:valid],
            None if augmented is None else augmented[:valid],
            self._send(labels)[:valid],
            self._send(plan.rows)[:valid],
            mix,
            micro.epoch,
            micro.start,
            micro.total,
        )

    def _send(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _handle_bad_files(self, error: RuntimeError) -> None:
        """After a failed decode: name the pictures, then stop or replace them and start again at the same batch."""
        self._engine.close()
        plan = self.plan(self.position)
        bad = find_bad_files(self.source, np.unique(plan.rows))
        if not bad:
            raise BadFileError(
                f"DALI cannot decode a picture of the batch that starts with {self.source.path(int(plan.rows[0]))}, "
                f"though Pillow reads them all; DALI says: {' '.join(str(error).split())[:300]}"
            ) from error
        names = ", ".join(f"{item.path} ({item.reason})" for item in bad)
        if self.bad_files == "stop":
            raise BadFileError(
                f"cannot decode {names}; repair or remove it, or go on without it by --data.bad_files replace"
            ) from error
        rows = {item.row for item in bad} | set(self.replaced)
        for row in sorted(rows):
            self.replaced[row] = self._substitute(row, rows)
        print(f"dalikd: cannot decode {names}; using the next picture in its place from now on", flush=True)

    def _substitute(self, row: int, bad: set[int]) -> int:
        for step in range(1, len(self.source)):
            other = (row + step) % len(self.source)
            if other not in bad:
                return other
        raise BadFileError("no picture of the data set can be decoded")


class _Gather:
    """Arrays in memory, gathered by torch."""

    def __init__(self, loader: Loader) -> None:
        assert loader.source.arrays is not None
        self._loader = loader
        self._views = ResidentViews(loader.source.arrays, loader.spec.view, loader.device)

    def fetch(self) -> tuple[_Plan, Tensor, Tensor | None]:
        loader = self._loader
        plan = loader.plan(loader.position)
        rows, draws = self.feed(plan)
        images, augmented = self._views(rows, draws)
        return plan, images, augmented

    def feed(self, plan: _Plan) -> tuple[Any, ...]:
        """A plan as tensors on the device."""
        draws = {name: self._loader._send(value) for name, value in plan.draws.views.items()}
        return self._loader._send(plan.rows), draws

    def close(self) -> None:
        """Nothing runs ahead."""


class _Dali:
    """A DALI pipeline fed by the sampler, built at the loader's position when first needed."""

    def __init__(self, loader: Loader, threads: int, prefetch: int) -> None:
        from dalikd.pipelines.graphs import input_names

        self._loader, self._threads, self._prefetch = loader, threads, prefetch
        self._names = input_names(loader.spec.view, loader.spec.augmented)[1:]
        self._graph: Any = None
        self._first = 0
        self._plans: deque[_Plan] = deque()

    def fetch(self) -> tuple[_Plan, Tensor, Tensor | None]:
        if self._graph is None:
            self._build()
        outputs = [self._to_torch(output) for output in self._run()]
        return self._plans.popleft(), outputs[0], outputs[1] if len(outputs) > 1 else None

    def close(self) -> None:
        if self._graph is None:
            return
        self._graph = None
        self._plans.clear()
        gc.collect()
        with_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # DALI's freed buffers stay in glibc's arenas
        if with_trim is not None:
            with_trim(0)

    def _build(self) -> None:
        from dalikd.pipelines.graphs import build_graph

        loader = self._loader
        self._first = loader.position
        self._graph = build_graph(
            self._inputs,
            loader.spec.view,
            loader.spec.augmented,
            reader="files" if loader.source.files is not None else "arrays",
            batch_size=loader.sampler.microbatch,
            threads=self._threads,
            device_id=(loader.device.index or 0) if loader.device.type == "cuda" else None,
            prefetch=self._prefetch,
        )

    def _inputs(self, info: Any) -> tuple[Any, ...]:
        plan = self._loader.plan(self._first + info.iteration)
        self._plans.append(plan)
        return self.feed(plan)

    def feed(self, plan: _Plan) -> tuple[Any, ...]:
        """A plan as the graph's inputs."""
        source = self._loader.source
        pictures = source.files.encoded(plan.rows) if source.files is not None else list(source.arrays[plan.rows])  # type: ignore[index]
        return (pictures, *(np.ascontiguousarray(plan.draws.views[name]) for name in self._names))

    def _run(self):
        if self._loader.device.type != "cuda":
            return self._graph.run()
        # without a stream run() would wait for the device
        return self._graph.run(torch.cuda.current_stream(self._loader.device))

    def _to_torch(self, output: Any) -> Tensor:
        tensor = torch.from_dlpack(output.as_tensor())
        # on the device: one copy, so that DALI's buffer goes back to its pool in stream order, whoever keeps the batch
        return tensor.clone() if tensor.is_cuda else tensor


def _check_groups(sampler: Sampler, spec: DrawSpec) -> None:
    grouped = spec.partner != "none" or spec.mode == "per_batch"
    if grouped and sampler.microbatch % spec.mix_group:
        raise ValueError(
            f"microbatches of {sampler.microbatch} images are not a multiple of the mix group {spec.mix_group}: "
            "give the Sampler group=spec.mix_group and a batch size that fits"
        )


def _can_gather(source: Source, spec: DrawSpec) -> bool:
    """Whether nothing has to be resized or warped, so that a gather makes the views of arrays in memory."""
    view = spec.view
    if source.arrays is None or source.arrays.shape[1:3] != (view.size, view.size):
        return False
    resizes = view.crop == "random_resized_crop" or (view.crop == "center_crop" and view.resize != view.size)
    return not resizes and spec.augmented not in AUGMENTED_VIEWS_IN_DALI


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
