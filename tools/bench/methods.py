"""`dalikd bench methods`: what each distillation method costs, against the nets alone.

All take turns on the same kept batches. "nets alone" is the teacher's forward, and the student's forward and backward
with the cross-entropy of the labels; a method's step is that of `dalikd distill`, with its loss, the metric and the
optimizer. "one pass" is a step of all methods of one augmentation, as `dalikd distill --students` does it. Kept: what a
step keeps for its backward pass, beside weights. Own: the loss's weights, memories, constants.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import isabstract
from itertools import cycle
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dalikd.kd import losses
from dalikd.kd.losses import DistillationLoss, LogitLoss, WeightedSum, cross_entropy
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.draw_spec import Batch
from dalikd.tools.bench.common import StepOptions, open_loop
from dalikd.tools.bench.record import alternate, begin, finish, ratio, summary
from dalikd.tools.bench.step import keep_batches, setting, step_round
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.tasks import distill
from dalikd.trainers.tasks.distill import Distillation, build_loss, share_pass

_ALONE, _TOGETHER = "nets alone", "one pass"


@dataclass
class MethodsOptions(StepOptions):
    """Compare the training steps of distillation methods with the nets alone, by their default options.

    Takes the configs of `dalikd distill`. Methods that the nets do not suit are named, and left out. Methods that
    compare two views of each image have randaugment, unless --augmentation says otherwise.

    Args:
        methods: names as `dalikd methods` lists them; default: all.
        samples: training images that are simulated, for what a method keeps of each: 1281167 for ImageNet; 0: those of
            the data.
    """

    methods: list[str] = field(default_factory=list)
    samples: int = 0
    steps: int = 10
    checkpoint_every: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for unknown methods."""
        super().__post_init__()
        unknown = [name for name in self.methods if name not in known()]
        if unknown:
            raise ValueError(f"--methods {' '.join(unknown)}: there are {', '.join(known())}")


def known() -> dict[str, type[DistillationLoss]]:
    """The losses that are made without options."""
    kinds = {name: getattr(losses, name) for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    return {
        name: kind
        for name, kind in kinds.items()
        if issubclass(kind, DistillationLoss) and not isabstract(kind) and kind is not WeightedSum
    }


def run(options: MethodsOptions, config: dict[str, Any]) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    accelerator = start(options.device, options.precision)
    record = begin("methods", options, accelerator, config, labels=("method",), plotted="images/s")
    loops: dict[str, Loop] = {}
    with patch.object(distill, "build_loss", partial(_build, options.samples)):
        for name in options.methods or known():
            kind, share = known()[name], float(options.augmentation != "identity")  # of augmented images
            loss = kind(kd_mix_share=share) if issubclass(kind, LogitLoss) else kind()
            two_views = "augmented" in loss.needs and options.augmentation == "identity"
            changed = replace(options, loss=loss, augmentation="randaugment" if two_views else options.augmentation)
            try:
                loops[name], setup = open_loop(changed, accelerator)
            except ValueError as error:
                record.notes.append(f"{name} is left out: {error}.")
    if not loops:
        raise ValueError(f"no method suits these nets: {' '.join(record.notes)}")
    record.reads(setup.source)
    title, record.variant = setting(options, setup.view.size)
    simulated = f", {options.samples:,} simulated images" if options.samples else ""
    record.title = f"Distillation methods: {title}{simulated}"
    record.variant += f"-{options.samples}-images" if options.samples else ""
    takes = {name: _batches(loop, options.samples) for name, loop in loops.items()}
    kept = {name: _kept(loop, takes[name]()) for name, loop in loops.items()}
    first = next(iter(loops))
    steps = {_ALONE: (loops[first], takes[first], partial(_alone, loops[first]))}
    steps |= {name: (loop, takes[name], None) for name, loop in loops.items()}

    shared = [name for name in loops if cast(Distillation, loops[name].task).augmenter.name == options.augmentation]
    tasks = [cast(Distillation, loops[name].task) for name in shared]
    if len(shared) > 1:
        share_pass(tasks, options.accumulation)
        steps[_TOGETHER] = (loops[shared[0]], takes[shared[0]], partial(_together, [loops[name] for name in shared]))

    def rate(name: str) -> float:
        for task in tasks:
            task.remember(options.accumulation if name == _TOGETHER else 0)
        loop, take, step = steps[name]
        return step_round(loop, take, *options.counts, step).rate

    rates = alternate({name: partial(rate, name) for name in steps}, options.rounds)
    record.notes += _of_one_pass(shared, rates)
    for name, (loop, *_) in steps.items():
        row: dict[str, Any] = {"method": name, "images/s": summary(rates[name])}
        row["time of the nets alone"] = ratio(rates[_ALONE], rates[name])
        if name in loops:
            loss = cast(Distillation, loop.task).loss
            own = [*loss.parameters(), *loss.buffers()]
            row |= {"kept MiB": kept[name] / 2**20, "own MiB": sum(part.nbytes for part in own) / 2**20}
        record.rows.append(row)
    record.notes.append("Methods by their default options; those on logits compare augmented images, if there are any.")
    if accelerator.is_main_process:
        finish(record, options)


def _build(samples: int, *given: Any) -> None:
    """Build a loss for more images than there are: their labels come again and again."""
    *others, labels, batch = given
    build: Callable[..., None] = build_loss
    build(*others, np.resize(labels, samples) if samples else labels, batch)


def _batches(loop: Loop, samples: int) -> Callable[[], Batch]:
    """Kept batches; their images are anywhere among the simulated ones, with the labels that they have."""
    take, images = keep_batches(loop.loader), len(loop.loader.source)
    loop.loader.close()
    copies = max(samples // images, 1)
    batches, generator = [take() for _ in range(8)], torch.Generator().manual_seed(0)
    ids = [torch.randint(copies, (len(batch.ids),), generator=generator) * images for batch in batches]
    moved = [
        replace(batch, ids=batch.ids + more.to(batch.ids.device)) for batch, more in zip(batches, ids, strict=True)
    ]
    return partial(next, cycle(moved))


def _alone(loop: Loop) -> None:
    """The teacher's forward, and the student's forward and backward."""
    batch, task = loop.loader.next(), cast(Distillation, loop.task)
    assert isinstance(task.teacher, Teacher)
    with torch.no_grad():
        task.teacher(batch.pixels)
    with loop.accelerator.autocast():
        logits = task.student(batch.pixels)
    loop.accelerator.backward(cross_entropy(logits, batch.labels))
    for values in task.parameters():
        values.grad = None


def _of_one_pass(shared: Sequence[str], rates: Mapping[str, Sequence[float]]) -> list[str]:
    """How much cheaper that is than one after the other, in words; nothing where no two methods share one."""
    if _TOGETHER not in rates:
        return []
    one_by_one = [
        1 / sum(1 / rate for rate in rounds) for rounds in zip(*(rates[name] for name in shared), strict=True)
    ]
    cheaper = ratio(rates[_TOGETHER], one_by_one)["median"]
    return [
        f"{len(shared)} students on one teacher pass ({', '.join(shared)}) are {cheaper:.2f} times as fast as one "
        "after the other (median of the rounds' own ratios; the loader, which they share too, is not counted)."
    ]


def _together(loops: Sequence[Loop]) -> None:
    """A step of each on the same batch."""
    batches = [loops[0].loader.next() for _ in range(loops[0].options.accumulation)]
    for loop in loops:
        loop.step(batches)


def _kept(loop: Loop, batch: Batch) -> int:
    """Bytes that a step keeps for its backward pass, each storage once, beside weights."""
    with torch.no_grad():
        inputs = loop.task.prepare(batch, 0.0)
    weights = {values.untyped_storage().data_ptr() for values in loop.task.parameters()}
    kept: dict[int, int] = {}

    def pack(values: Tensor) -> Tensor:
        storage = values.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return values

    with saved_tensors_hooks(pack, lambda values: values), loop.accelerator.autocast():
        terms = loop.task(inputs)
    del terms
    return sum(size for place, size in kept.items() if place not in weights)
