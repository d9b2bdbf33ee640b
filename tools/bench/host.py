"""`dalikd bench host`: what the main thread does in a training step, with nets that cost nothing.

    dalikd bench host                        on images drawn for it
    dalikd bench host --data.root PHOTOS     class folders of photos

Python that prepares a batch and launches kernels runs on one thread. Where that thread is busy for longer than the GPU
is, it is the limit: at small images, small batches and small nets. So its CPU time is taken here part by part, on CPU
tensors: both nets answer with a constant, images have 8 pixels a side, and DALI decodes in threads of its own (what
they do shows in the wall time alone). Operators are those that torch dispatches, views left out: on a GPU a kernel or
an allocation each, beside those of the nets; compiled, fewer are left.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dalikd.kd.normalize import Normalized
from dalikd.pipelines.backends import GatherBackend
from dalikd.pipelines.data import DataConfig, open_split
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.resident import ResidentViews
from dalikd.pipelines.sources import Source
from dalikd.pipelines.windows import WindowViews
from dalikd.tools.bench.common import free_loop
from dalikd.tools.bench.images import describe, draw_images
from dalikd.tools.bench.record import RESULTS, Record, alternate, begin, finish, number, summary
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.options import DATA_RANGES, FROM_1, check_numbers

__all__ = ["LOADER", "HostOptions", "Watch", "loader_microseconds", "run"]

#: What the loader does on the main thread, by part. Their sum is what it costs there. DALI takes the inputs in its
#: _prep_data_for_feed_input and by a copy into its own memory; hand over: labels, rows and draws packed and copied,
#: headers checked, the batch made.
LOADER = ("rows and draws", "feed", "DALI takes the inputs", "DALI runs", "hand over")
_AHEAD = "next batch: rows, draws, feed, in a thread"  # in no sum
_STEP = ("look: mixing, teacher, picking, metric", "rest of the step: student, loss, optimizer, meters")
_PIXELS = "pixels on the CPU"  # a GPU makes them itself; in no sum
_WANTED = 5.0  # microseconds an image, of the whole loader


@dataclass
class HostOptions:
    """Measure CPU time of the main thread in a training step whose nets cost nothing.

    Args:
        data: the images; default: small ones drawn for it. Where they are not given, --data.crop is
            random_resized_crop and --data.image_size 8, so that pixels cost next to nothing.
        augmentations: names as for `dalikd distill`.
        batch_size: images of a step.
        steps: in a round.
        rounds: that count, after one of warm-up.
        output: folder of the results, or a path that ends in .json.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augmentations: list[str] = field(default_factory=lambda: ["identity", "cutmixpick_teacher"])
    batch_size: int = 384
    steps: int = 20
    rounds: int = 5
    output: Path = RESULTS

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be measured with."""
        check_numbers(self, {**DATA_RANGES, "batch_size": FROM_1, "steps": FROM_1})
        self.augmentations = augmentation_names(self.augmentations)


class Watch(TorchDispatchMode):
    """Adds up the seconds of CPU time of the main thread, and the operators that torch dispatches while this is
    entered, by the innermost part that runs. What runs in another thread is one part."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.operators: Counter[str] = Counter()
        self._parts: list[str] = []
        self._since = 0.0
        self._main = threading.get_ident()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._parts and not func.is_view:
            self.operators[self._parts[-1]] += 1
        return func(*args, **(kwargs or {}))

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, charged to a part."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._main:
                before = time.thread_time()
                result = function(*args, **kwargs)
                self.seconds[_AHEAD] += time.thread_time() - before
                return result
            self._charge()
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._parts.pop()

        return watched

    def _charge(self) -> None:
        now = time.thread_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = time.thread_time()


@contextmanager
def _watching(loader: Loader, loop: Loop | None = None) -> Iterator[Watch]:
    """Charge what a loader does to LOADER's parts, and what else a loop's step does to _STEP's."""
    watch, backend = Watch(), loader._backend
    places: list[tuple[Any, str, str]] = [
        (backend, "plan", LOADER[0]),
        (backend, "feed", LOADER[1]),
        (loader, "next", LOADER[4]),
        (WindowViews, "__call__", _PIXELS),
        (ResidentViews, "__call__", _PIXELS),
    ]
    if not isinstance(backend, GatherBackend):
        from nvidia.dali.pipeline import Pipeline

        # _feed_input holds _prep_data_for_feed_input and the copy into DALI's own memory
        places += [(Pipeline, "_feed_input", LOADER[2]), (Pipeline, "run", LOADER[3])]
    if loop is not None:
        places += [(loop.task, "prepare", _STEP[0]), (loop, "step", _STEP[1])]
    with ExitStack() as patches:
        for owner, name, part in places:
            patches.enter_context(patch.object(owner, name, watch.of(part, getattr(owner, name))))
        yield watch


def loader_microseconds(loader: Loader, batches: int = 40) -> float:
    """CPU time of the main thread that a loader takes for an image: the median over batches, after two of warm-up."""
    found = []
    with _watching(loader) as watch:
        for _ in range(2 + batches):
            watch.seconds.clear()
            size = len(loader.next())
            found.append(sum(watch.seconds[part] for part in LOADER) / size * 1e6)
    return median(found[2:])


def run(options: HostOptions) -> Record:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    accelerator = start("cpu", "fp32")
    record = begin("host", options, accelerator, asdict(options))
    data = replace(options.data, image_size=options.data.image_size or 8)
    if data.crop == "auto":
        data = replace(data, crop="random_resized_crop")
    with TemporaryDirectory(prefix="dalikd-bench-") as folder:
        if data.root is None and data.name == "imagefolder":
            draw_images(Path(folder), count=4 * options.batch_size, width=64, height=48)
            data = replace(data, root=folder, train_split=".")
        source = open_split(data, "train", seed=0)
        record.pictures = describe(source)
        sides: dict[str, _Side] = {}
        try:
            for name in options.augmentations:
                loop = free_loop(name, source, data, options.batch_size, accelerator, lambda: _Constant(source))
                sides[name] = _Side(loop, options)
            rates = alternate(sides, options.rounds)
        finally:
            for side in sides.values():
                side.loop.loader.close()
    record.title = f"The main thread in a training step, nets that cost nothing, batch {options.batch_size}"
    record.warm_up = f"a round of {options.steps} steps."
    record.page_cache = "warm; the first round reads." if source.files is not None else "no files."
    record.labels, record.plotted, record.variant = ("augmentation", "part"), "µs an image", source.name
    record.rows = [{"augmentation": name, **row} for name, side in sides.items() for row in side.rows(rates[name])]
    found = {name: median(side.sums(LOADER)) for name, side in sides.items()}
    over = [name for name, value in found.items() if value > _WANTED]
    record.notes = [
        f"All of the loader, µs an image: {', '.join(f'{name} {number(value)}' for name, value in found.items())}. "
        f"Wanted: at most {number(_WANTED)}; {'above it: ' + ', '.join(over) if over else 'all are'}."
    ]
    return finish(record, options)


class _Constant(Normalized):
    """Answers every image with the same logits, one parameter for each class."""

    def __init__(self, source: Source) -> None:
        super().__init__(nn.Identity(), source.mean, source.std)
        self.logits = nn.Parameter(torch.linspace(0, 1, len(source.classes)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits.expand(len(pixels), -1)


class _Side:
    """One augmentation's loop. Called, it takes a round of steps and returns images a second."""

    def __init__(self, loop: Loop, options: HostOptions) -> None:
        self.loop, self._steps, self._batch_size = loop, options.steps, options.batch_size
        self._parts: list[dict[str, float]] = []  # microseconds an image, round by round; the first warms up
        self._wall: list[float] = []  # milliseconds a step
        with _watching(loop.loader, loop) as watch:
            loop.step()  # builds, and checks what the first step does
            with watch:
                loop.step()
        self._operators = watch.operators

    def __call__(self) -> float:
        with _watching(self.loop.loader, self.loop) as watch:
            started = time.perf_counter()
            for _ in range(self._steps):
                self.loop.step()
            seconds = time.perf_counter() - started
        images = self._steps * self._batch_size
        self._parts.append({part: 1e6 * watch.seconds[part] / images for part in (*LOADER, _AHEAD, _PIXELS, *_STEP)})
        self._wall.append(1000 * seconds / self._steps)
        return images / seconds

    def sums(self, parts: Sequence[str]) -> list[float]:
        """Microseconds an image of some parts together, round by round."""
        return [sum(found[part] for part in parts) for found in self._parts[1:]]

    def rows(self, rates: Sequence[float]) -> list[dict[str, Any]]:
        """One for each part, and sums."""
        named = {part: (part,) for part in (*LOADER, *_STEP, _AHEAD, _PIXELS)}
        rows: list[dict[str, Any]] = []
        for name, parts in {**named, "all of the loader": LOADER, "all of the step": _STEP}.items():
            values = self.sums(parts)
            row = {"part": name, "µs an image": summary(values)}
            row["ms a step"] = summary([value * self._batch_size / 1000 for value in values])
            rows.append({**row, "operators a step": sum(self._operators[part] for part in parts)})
        return [*rows, {"part": "wall time", "ms a step": summary(self._wall[1:]), "images/s": summary(rates)}]
