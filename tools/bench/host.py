"""`dalikd bench host`: what the main thread does in a training step, with nets that cost nothing.

    dalikd bench host                        on pictures drawn for it
    dalikd bench host --data.root PHOTOS     class folders of photos

Python that prepares a batch and launches kernels runs on one thread. Where that thread is busy for longer than the GPU
is, it is the limit: at small images, small batches and small nets. So its CPU time is taken here part by part, on CPU
tensors: both nets answer with a constant, images have 8 pixels a side, and DALI decodes in threads of its own.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import gcd
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dalikd.kd.normalize import Normalized
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.backends import GatherBackend
from dalikd.pipelines.data import DataConfig, open_split, training_view
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.resident import ResidentViews
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.pipelines.windows import WindowViews
from dalikd.tools.bench.dispatch import Planned
from dalikd.tools.bench.images import describe, draw_pictures
from dalikd.tools.bench.machine import device_slug, environment
from dalikd.tools.bench.options import RESULTS, check_rounds
from dalikd.tools.bench.record import Record, alternate, check_output, markdown, number, summary, write
from dalikd.tools.cli import run_function
from dalikd.trainers.augmentation import Augmenter, augmentation_names
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.options import DATA_RANGES, FROM_1, check_numbers
from dalikd.trainers.setup import reading
from dalikd.trainers.tasks.distill import Distillation, DistillOptions
from dalikd.trainers.tracking import RunFolder

__all__ = ["HostOptions", "Watch", "loader_microseconds", "main", "plan", "run", "watching"]

#: What the loader does on the main thread, by part. Their sum is what it costs there.
LOADER = ("rows and draws", "feed", "DALI takes the inputs", "DALI runs", "hand over")
_AHEAD = "next batch: rows, draws, feed, in a thread"
_STEP = ("look: mixing, teacher, picking, metric", "rest of the step: student, loss, optimizer, meters")
_PIXELS = "pixels on the CPU"  # a GPU makes them itself
_WANTED = 5.0  # microseconds an image, of the whole loader
_SIDE = 8


@dataclass
class HostOptions:
    """Measure CPU time of the main thread in a training step whose nets cost nothing.

    Args:
        data: the pictures; default: small ones drawn for it. Where they are not given, --data.crop is
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
        check_rounds(self.rounds)
        check_numbers(self, {**DATA_RANGES, "batch_size": FROM_1, "steps": FROM_1})
        self.augmentations = augmentation_names(self.augmentations)


class Watch(TorchDispatchMode):
    """Adds up CPU time of the main thread, and operators that torch dispatches, by the innermost part that runs. What
    runs in another thread is one part.

    Operators are counted while it is entered, which takes time of its own.

    Attributes:
        seconds: of each part.
        operators: of each part, views left out.
    """

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
                try:
                    return function(*args, **kwargs)
                finally:
                    self.seconds[_AHEAD] += time.thread_time() - before
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
def watching(loader: Loader) -> Iterator[Watch]:
    """Charge what a loader does to LOADER's parts; what the CPU does in place of a GPU stands apart."""
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
    with ExitStack() as patches:
        for owner, name, part in places:
            patches.enter_context(patch.object(owner, name, watch.of(part, getattr(owner, name))))
        yield watch


def loader_microseconds(loader: Loader, batches: int = 40) -> float:
    """CPU time of the main thread that a loader takes for an image: the median over batches, after two of warm-up."""
    found = []
    with watching(loader) as watch:
        for _ in range(2 + batches):
            watch.seconds.clear()
            size = len(loader.next())
            found.append(sum(watch.seconds[part] for part in LOADER) / size * 1e6)
    return median(found[2:])


def run(options: HostOptions) -> Record:
    """Measure, print the table, write the results.

    Raises:
        ValueError, OSError: options that do not fit the data.
    """
    check_output(options.output)
    accelerator = start("cpu", "fp32")
    before = environment(accelerator.device)
    with TemporaryDirectory(prefix="dalikd-bench-") as folder:
        data = _data(options, Path(folder))
        source = open_split(data, "train", seed=0)
        pictures = describe(source)
        sides = {name: _Side(name, options, data, source, accelerator) for name in options.augmentations}
        try:
            rates = alternate(dict(sides), options.rounds)
        finally:
            for side in sides.values():
                side.loop.loader.close()
    record = Record(
        benchmark="host",
        title=f"The main thread in a training step, nets that cost nothing, batch {options.batch_size}",
        environment=before,
        device=device_slug(accelerator.device),
        config={**asdict(options), "output": str(options.output)},
        warm_up=f"a round of {options.steps} steps.",
        page_cache="warm; the first round reads." if source.files is not None else "no files.",
        rows=[row for name, side in sides.items() for row in side.rows(rates[name])],
        labels=("augmentation", "part"),
        plotted="µs an image",
        variant=source.name,
        pictures=pictures,
        notes=_notes(sides),
    )
    print(markdown(record))
    print("written:", *write(record, options.output))
    return record


def plan(root: Path) -> list[Planned]:
    """What `dalikd bench all` runs."""
    return [Planned(("--data.root", str(root), "--data.train_split", "."))]


class _Constant(Normalized):
    """Answers every image with the same logits, one parameter for each class."""

    def __init__(self, source: Source) -> None:
        super().__init__(nn.Identity(), source.mean, source.std)
        self.logits = nn.Parameter(torch.linspace(0, 1, len(source.classes)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits.expand(len(pixels), -1)


class _Side:
    """One augmentation's loop. Called, it takes a round of steps and returns images a second."""

    def __init__(
        self, name: str, options: HostOptions, data: DataConfig, source: Source, accelerator: Accelerator
    ) -> None:
        self._name, self._options = name, options
        group = gcd(options.batch_size, 64)
        training = DistillOptions(
            augmentation=name, batch_size=options.batch_size, mix_group=group, device="cpu", compile="off"
        )
        augmenter = Augmenter(name, training, source, training_view(data, source), seed=0)
        loader = Loader(
            source,
            Sampler(len(source), options.batch_size, group=group),
            augmenter.draw_spec,
            buffers=2,  # as on a GPU: packed and handed over
            **reading(data),
        )
        teacher = Teacher(_Constant(source))
        task = Distillation(_Constant(source), teacher, training.loss, augmenter, accelerator, len(source.classes))
        self.loop = Loop(task, loader, loader, training, accelerator, RunFolder(Path("bench"), writes=False), {})
        self.loop.model.train()
        self.parts: list[dict[str, float]] = []  # microseconds an image, round by round
        self.wall: list[float] = []  # milliseconds a step
        self.operators = self._count()

    def __call__(self) -> float:
        with self._watching() as watch:
            started = time.perf_counter()
            for _ in range(self._options.steps):
                self.loop.step()
            seconds = time.perf_counter() - started
        images = self._options.steps * self._options.batch_size
        self.parts.append({part: 1e6 * watch.seconds[part] / images for part in (*LOADER, _AHEAD, _PIXELS, *_STEP)})
        self.wall.append(1000 * seconds / self._options.steps)
        return images / seconds

    def loader(self) -> list[float]:
        """Microseconds an image of the whole loader, round by round; the first warms up."""
        return [sum(found[part] for part in LOADER) for found in self.parts[1:]]

    def rows(self, rates: Sequence[float]) -> list[dict[str, Any]]:
        """One for each part, and sums."""
        steps = [sum(found[part] for part in _STEP) for found in self.parts[1:]]
        of_parts = {part: [found[part] for found in self.parts[1:]] for part in (*LOADER, *_STEP, _AHEAD, _PIXELS)}
        groups = {"loader": LOADER, "step": _STEP}
        rows = []
        for part, values in {**of_parts, "loader": self.loader(), "step": steps}.items():
            within = groups.get(part, (part,))
            rows.append(
                {
                    "augmentation": self._name,
                    "part": f"all of the {part}" if part in groups else part,
                    "µs an image": summary(values),
                    "ms a step": summary([value * self._options.batch_size / 1000 for value in values]),
                    "operators a step": sum(self.operators[one] for one in within),
                }
            )
        wall = {"part": "wall time", "ms a step": summary(self.wall[1:]), "images/s": summary(rates)}
        return [*rows, {"augmentation": self._name, **wall}]

    @contextmanager
    def _watching(self) -> Iterator[Watch]:
        loop = self.loop
        with watching(loop.loader) as watch, ExitStack() as patches:
            for owner, name, part in ((loop.task, "prepare", _STEP[0]), (loop, "step", _STEP[1])):
                patches.enter_context(patch.object(owner, name, watch.of(part, getattr(owner, name))))
            yield watch

    def _count(self) -> Counter[str]:
        """Operators of a step, after one that builds and checks what the first step does."""
        with self._watching() as watch:
            self.loop.step()
            with watch:
                self.loop.step()
        return watch.operators


def _data(options: HostOptions, folder: Path) -> DataConfig:
    data = replace(options.data, image_size=options.data.image_size or _SIDE)
    if data.crop == "auto":
        data = replace(data, crop="random_resized_crop")
    if data.root is not None or data.name != "imagefolder":
        return data
    draw_pictures(folder, count=4 * options.batch_size, width=64, height=48)
    return replace(data, root=str(folder), train_split=".")


def _notes(sides: dict[str, _Side]) -> list[str]:
    found = {name: median(side.loader()) for name, side in sides.items()}
    over = [name for name, value in found.items() if value > _WANTED]
    figures = ", ".join(f"{name} {number(value)}" for name, value in found.items())
    return [
        f"All of the loader, µs an image: {figures}. Wanted: at most {number(_WANTED)}; "
        + (f"above it: {', '.join(over)}." if over else "all are."),
        f"CPU time of the main thread alone (a thread that waits uses none). {_AHEAD}: it is in no sum; what DALI's "
        "threads do shows in the wall time.",
        f"{LOADER[2]}: its _prep_data_for_feed_input, and the copy into its own memory. {LOADER[4]}: labels, rows and "
        f"draws packed and copied, headers checked, the batch made. {_PIXELS}: what a GPU does itself; in no sum.",
        "Operators: those that torch dispatches in a step, views left out; on a GPU a kernel or an allocation each, "
        "beside those of the nets. Compiled, fewer are left.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("bench host", run, argv, options=HostOptions, lists=("augmentations",))


if __name__ == "__main__":
    main()
