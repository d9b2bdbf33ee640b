"""`dalikd bench host`: what the main thread does in a training step, with nets that cost nothing.

Python that prepares a batch and launches kernels runs on one thread. Where that thread is busy for longer than the GPU
is, it is the limit: at small images, small batches and small nets. So its CPU time is taken here part by part, on CPU
tensors: both nets answer with a constant, images have 8 pixels a side, and DALI decodes in threads of its own (what
they do shows in the wall time alone). Operators are those that torch dispatches, views left out: on a GPU a kernel or
an allocation each, beside those of the nets; compiled, fewer are left.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import KD
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.backends import GatherBackend
from dalikd.pipelines.data import DataConfig, open_split, training_view
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.resident import ResidentViews
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.pipelines.windows import WindowViews
from dalikd.tools.bench.common import mixing, training_loop
from dalikd.tools.bench.machine import draw_images
from dalikd.tools.bench.record import RESULTS, Watch, alternate, begin, finish, number, summary
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.launch import start
from dalikd.trainers.options import DATA_RANGES, FROM_1, check_numbers
from dalikd.trainers.setup import reading
from dalikd.trainers.tasks.distill import Distillation, DistillOptions

#: What the loader does on the main thread, by part. Their sum is what it costs there. DALI takes the inputs in its
#: _prep_data_for_feed_input and by a copy into its own memory; hand over: labels, rows and draws packed and copied,
#: headers checked, the batch made.
LOADER = ("rows and draws", "feed", "DALI takes the inputs", "DALI runs", "hand over")
AHEAD = Watch.AHEAD
_STEP = ("look: mixing, teacher, picking, metric", "rest of the step: student, loss, optimizer, meters")
_PIXELS = "pixels on the CPU"  # a GPU makes them itself; in no sum
_PARTS = {part: (part,) for part in (*LOADER, *_STEP, AHEAD, _PIXELS)}
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
        json: file for the record, - for stdout.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augmentations: list[str] = field(default_factory=lambda: ["identity", "cutmixpick_teacher"])
    batch_size: int = 384
    steps: int = 20
    rounds: int = 5
    output: Path = RESULTS
    json: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, {**DATA_RANGES, "batch_size": FROM_1, "steps": FROM_1})
        self.augmentations = augmentation_names(self.augmentations)


def _places(loader: Loader) -> list[tuple[Any, str, str]]:
    backend: Any = loader._backend
    views = [(kind, "__call__", _PIXELS) for kind in (WindowViews, ResidentViews)]
    places = [(backend, "plan", LOADER[0]), (backend, "feed", LOADER[1]), (loader, "next", LOADER[4]), *views]
    if isinstance(backend, GatherBackend):
        return places
    from nvidia.dali.pipeline import Pipeline

    # _feed_input holds _prep_data_for_feed_input and the copy into DALI's own memory
    return [*places, (Pipeline, "_feed_input", LOADER[2]), (Pipeline, "run", LOADER[3])]


def loader_microseconds(loader: Loader, batches: int) -> float:
    """CPU time of the main thread that a loader takes for an image: the median over batches, after two of warm-up."""
    found, watch = [], Watch()
    with watch.over(_places(loader)):
        for _ in range(2 + batches):
            watch.seconds.clear()
            size = len(loader.next())
            found.append(sum(watch.seconds[part] for part in LOADER) / size * 1e6)
    return median(found[2:])


def run(options: HostOptions) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    accelerator, size, sides = start("cpu", "fp32"), options.batch_size, {}
    labels, plotted = ("augmentation", "part"), "µs an image"
    record = begin("host", options, accelerator, asdict(options), labels=labels, plotted=plotted)
    data = replace(options.data, image_size=options.data.image_size or 8)
    data = replace(data, crop="random_resized_crop") if data.crop == "auto" else data
    with TemporaryDirectory(prefix="dalikd-bench-") as folder:
        if data.root is None and data.name == "imagefolder":
            draw_images(Path(folder), count=4 * size, width=64, height=48)
            data = replace(data, root=folder, train_split=".")
        source = open_split(data, "train", seed=0)
        record.reads(source)
        try:
            for name in options.augmentations:
                sides[name] = _Side(name, source, data, options, accelerator)
            rates = alternate(sides, options.rounds)
        finally:
            for side in sides.values():
                side.loop.loader.close()
    record.title = f"The main thread in a training step, nets that cost nothing, batch {size}"
    record.warm_up, record.variant = f"a round of {options.steps} steps.", source.name
    found: dict[str, float] = {}
    for name, side in sides.items():
        for part, parts in {**_PARTS, "all of the loader": LOADER, "all of the step": _STEP}.items():
            values = [sum(one[each] for each in parts) for one in side.parts[1:]]  # the first warms up
            row = {"augmentation": name, "part": part, plotted: summary(values)}
            row["ms a step"] = summary([value * size / 1000 for value in values])
            record.rows.append({**row, "operators a step": sum(side.operators[each] for each in parts)})
            found |= {name: median(values)} if parts is LOADER else {}
        wall, images = summary([1000 * size / rate for rate in rates[name]]), summary(rates[name])
        record.rows.append({"augmentation": name, "part": "wall time", "ms a step": wall, "images/s": images})
    over = [name for name, value in found.items() if value > _WANTED]
    record.notes = [
        f"All of the loader, µs an image: {', '.join(f'{name} {number(value)}' for name, value in found.items())}. "
        f"Wanted: at most {number(_WANTED)}; {'above it: ' + ', '.join(over) if over else 'all are'}."
    ]
    finish(record, options)


class _Constant(Normalized):
    """Answers every image with the same logits, one parameter for each class."""

    def __init__(self, source: Source) -> None:
        super().__init__(nn.Identity(), source.mean, source.std)
        self.logits = nn.Parameter(torch.linspace(0, 1, len(source.classes)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits.expand(len(pixels), -1)


class _Side:
    """One augmentation's loop. Called, it takes a round of steps and returns images a second."""

    def __init__(self, name: str, source: Source, data: DataConfig, options: HostOptions, where: Accelerator) -> None:
        self._steps, size = options.steps, options.batch_size
        augmenter, self._images = mixing(name, source, training_view(data, source), size), options.steps * size
        # buffers: as on a GPU, packed and handed over
        sampler = Sampler(len(source), size, group=augmenter.group)
        loader = Loader(source, sampler, augmenter.draw_spec, buffers=2, **reading(data))
        nets = _Constant(source), Teacher(_Constant(source))
        task = Distillation(*nets, KD(), augmenter, where, len(source.classes))
        self.loop = loop = training_loop(task, loader, DistillOptions(batch_size=size, compile="off"), where)
        self.parts: list[dict[str, float]] = []  # microseconds an image, round by round
        with (watch := Watch()).over(self._places()):
            loop.step()  # builds, and checks what the first step does
            with watch:
                loop.step()
        self.operators = watch.operators

    def _places(self) -> list[tuple[Any, str, str]]:
        return [*_places(self.loop.loader), (self.loop.task, "prepare", _STEP[0]), (self.loop, "step", _STEP[1])]

    def __call__(self) -> float:
        with (watch := Watch()).over(self._places()):
            started = time.perf_counter()
            for _ in range(self._steps):
                self.loop.step()
            seconds = time.perf_counter() - started
        self.parts.append({part: 1e6 * watch.seconds[part] / self._images for part in _PARTS})
        return self._images / seconds
