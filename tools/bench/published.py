"""dalikd against the published CutMixPick loop, at equal work: a ladder that gives up one habit at a time.

The first rung is the published loop, as `habits.py` describes it. Every further rung changes one thing and keeps what
the rungs before it changed, up to `dalikd distill`'s own step. All train. From the third on, where the draws come along
with the batch, all have the same losses up to rounding. Up to dalikd's own step the learning rate is constant, as it is
inside an epoch of the published loop.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalikd.kd.normalize import Normalized
from dalikd.kd.teacher import Teacher
from dalikd.tools.bench.dispatch import Planned
from dalikd.tools.bench.habits import RUNGS, HabitLoop, Habits, Input
from dalikd.tools.bench.machine import cores, device_slug, environment, settle, synchronize
from dalikd.tools.bench.options import ON_GPU, check_alone, check_rounds
from dalikd.tools.bench.record import Record, alternate, check_output, markdown, ratio, summary, write
from dalikd.tools.bench.rounds import training_loop
from dalikd.tools.bench.sides import Job, cannot, endless, pil_batches
from dalikd.tools.bench.teacher_options import PublishedOptions, teacher_net
from dalikd.tools.cli import run_command
from dalikd.trainers.launch import autocast_type, model_type, start
from dalikd.trainers.setup import TrainingData, build_student, open_training_data
from dalikd.trainers.tasks.distill import Distillation

__all__ = ["Costs", "Nets", "Rung", "main", "open_ladder", "plan", "run"]

_RATE = "images/s"
_PUBLISHED, _ASKED_AGAIN, _GATHERED = "published", "no host waits", "picked logits gathered"
_FOLDED, _OWN = "batch norms folded", "dalikd distill's step"


class Nets(NamedTuple):
    """Both nets, never trained or folded themselves: each rung has copies."""

    student: Normalized
    teacher: Normalized


class Rung(NamedTuple):
    """A way to train that can be stepped."""

    step: Callable[[], Any]
    teacher: Teacher
    ahead: int  # batches that may lie ready before a step
    compiled: bool = False


class Costs(NamedTuple):
    """Floating-point operations an image, of convolutions and matrix products; a multiply-add is two."""

    teacher: float  # a forward
    student: float  # a forward and a backward

    def of_step(self, teacher_images: float) -> float:
        """For each original: so many teacher images; the student sees the original and a pick."""
        return teacher_images * self.teacher + 2 * self.student

    @property
    def reuse_ceiling(self) -> float:
        """How much faster a step would be with 3 N instead of 4 N teacher images, if operations were all."""
        return self.of_step(4) / self.of_step(3)


def run(options: PublishedOptions, config: dict[str, Any]) -> Record:
    """Time the ladder, print it, write it, and return the record.

    Raises:
        ValueError, OSError: options that the published loop has not, or data and nets that are not as they should be;
            nothing has run then.
    """
    _check(options)
    check_output(options.folder)
    accelerator = start(options.device, options.precision)
    check_alone("published", accelerator.num_processes)
    data = open_training_data(options, accelerator)
    nets = _build_nets(options, data, accelerator.device)
    before = environment(accelerator.device)
    torch.backends.cudnn.benchmark = True  # as published, and for every rung
    rungs = open_ladder(options, data, nets, accelerator)
    try:
        counts = {name: _count_teacher(rung) for name, rung in rungs.items()}
        timers = {name: _timer(rung, options, accelerator.device) for name, rung in rungs.items()}
        rates = alternate(timers, options.rounds, settle)
    finally:
        data.loader.close()
    costs = _costs(nets, data.view.size, accelerator.device)
    ahead = max(rung.ahead for rung in rungs.values())
    record = Record(
        benchmark="published",
        title=f"dalikd against the published CutMixPick loop: {options.teacher.name} to {options.model}, "
        f"{data.view.size} pixels, batch {options.batch_size}, {options.precision}"
        + (", resident" if options.data.resident else ""),
        environment=before,
        device=device_slug(accelerator.device),
        config=config,
        warm_up=f"a round, and before each round {options.warmup} step(s), or as many as batches may lie ready "
        f"(up to {ahead}).",
        page_cache="warm; the first round reads." if data.train.files is not None else "no files.",
        rows=_rows(rates, counts, costs, options.batch_size),
        labels=("rung", "loop"),
        plotted=_RATE,
        variant=_variant(options, data),
        notes=_notes(rates, costs),
    )
    print(markdown(record))
    print("written:", *write(record, options.folder))
    return record


# ------------------------------------------------------------------------------------------------ the ladder


def open_ladder(options: PublishedOptions, data: TrainingData, nets: Nets, accelerator: Accelerator) -> dict[str, Rung]:
    """Every rung, lowest first, with nets of its own. All but the first take turns at one loader."""
    folds = options.teacher.fold_bn
    kept = {name: habits for name, habits in RUNGS.items() if folds or name != _FOLDED}
    rungs = {name: _habit_rung(habits, options, data, nets, accelerator.device) for name, habits in kept.items()}
    rungs[_OWN] = _own_rung(replace(options, compile="off"), data, nets, accelerator, metric=False)
    if options.compile != "off":
        rungs[f"compiled, {options.compile}"] = _own_rung(options, data, nets, accelerator, metric=False)
    if options.metric:
        rungs["T. stddev streamed too"] = _own_rung(options, data, nets, accelerator, metric=True)
    return rungs


def _habit_rung(
    habits: Habits, options: PublishedOptions, data: TrainingData, nets: Nets, device: torch.device
) -> Rung:
    student, teacher_net = deepcopy(nets.student), deepcopy(nets.teacher)
    batches, ahead = _batches(habits, options, data, student)
    autocast = autocast_type(options.precision)
    # images that are normalised already do without the nets' own normalisation
    seen_by, trained = (teacher_net.model, student.model) if habits.float_images else (teacher_net, student)
    teacher = Teacher(seen_by, device, autocast, fold_bn=not habits.batch_norms)
    for net in (teacher.model, trained):
        net.to(memory_format=habits.memory_format)  # type: ignore[call-overload]
    loss = deepcopy(options.loss).to(device)
    loop = HabitLoop(habits, batches, trained, teacher, loss, options.optimizer, data.augmenter, autocast, options.seed)
    return Rung(loop.step, teacher, ahead)


def _own_rung(
    options: PublishedOptions, data: TrainingData, nets: Nets, accelerator: Accelerator, *, metric: bool
) -> Rung:
    autocast = autocast_type(options.precision)
    teacher = Teacher(deepcopy(nets.teacher), accelerator.device, autocast, fold_bn=options.teacher.fold_bn)
    task = Distillation(
        deepcopy(nets.student),
        teacher,
        deepcopy(options.loss),
        data.augmenter,
        accelerator,
        len(data.train.classes),
        metric=metric,
        compile_mode=options.compile,
    )
    loop = training_loop(task, data, options, accelerator)
    return Rung(loop.step, teacher, _ahead(options), options.compile != "off")


def _batches(
    habits: Habits, options: PublishedOptions, data: TrainingData, student: Normalized
) -> tuple[Callable[[], Input], int]:
    """What gives the next batch each time it is called, and how many lie ready in advance."""
    if habits.pil_loader:
        return _pil_batches(options, data, student.scale)

    def following() -> Input:
        batch = data.loader.next()
        pixels = batch.pixels.contiguous(memory_format=habits.memory_format)
        images = student.normalize(pixels) if habits.float_images else pixels
        return Input(images, batch.labels, batch.mix)

    return following, _ahead(options)


def _pil_batches(options: PublishedOptions, data: TrainingData, like: Tensor) -> tuple[Callable[[], Input], int]:
    """The same of the DataLoader, in the type and on the device of a tensor."""
    workers = cores()
    ahead = workers * 2 + 1  # torch's workers fetch two batches each
    steps = (options.steps + max(ahead, options.warmup)) * (options.rounds + 1) + 1
    images = steps * options.batch_size
    job = Job(data.train, data.view, "identity", options.batch_size, like.device, workers=workers, images=images)
    if reason := cannot("torchvision-pil", job):
        raise ValueError(f"--data.name {options.data.name}: the published loop's DataLoader {reason}; name a folder")
    batches = endless(pil_batches(job))

    def following() -> Input:
        images, labels = next(batches)
        # to the device first: images.to(like) converts on the CPU
        return Input(images.to(like.device).to(like.dtype), labels.to(like.device))

    return following, ahead


def _ahead(options: PublishedOptions) -> int:
    return options.data.prefetch + 1


def _build_nets(options: PublishedOptions, data: TrainingData, device: torch.device) -> Nets:
    teacher = teacher_net(options, data.train, data.val_loader.spec.view).to(device)
    student = build_student(options, data.train).to(device, model_type(options.precision))
    if not (torch.equal(student.scale, teacher.scale) and torch.equal(student.shift, teacher.shift)):
        raise ValueError(
            f"{options.model} and {options.teacher.name} normalise by different means, and the published loop does it "
            "once for both: choose two timm models, or none"
        )
    return Nets(student, teacher)


# ------------------------------------------------------------------------------------------------ the numbers


def _timer(rung: Rung, options: PublishedOptions, device: torch.device) -> Callable[[], float]:
    """Measures images a second over the steps of a round."""

    def timed() -> float:
        for _ in range(max(rung.ahead, options.warmup)):  # what lies ready must not count
            rung.step()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(options.steps):
            rung.step()
        synchronize(device)
        return options.steps * options.batch_size / (time.perf_counter() - started)

    return timed


def _count_teacher(rung: Rung) -> list[int] | None:
    """Sizes of the batches that the teacher sees in a step; None where compiled code would not tell."""
    if rung.compiled:
        return None
    with _noted_sizes(rung.teacher.model) as sizes:
        rung.step()
    return sizes


@contextmanager
def _noted_sizes(model: nn.Module) -> Iterator[list[int]]:
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def _costs(nets: Nets, size: int, device: torch.device) -> Costs:
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)  # batch norms train on no single image
    student, teacher = deepcopy(nets.student).train(), deepcopy(nets.teacher).eval()
    with FlopCounterMode(display=False) as looked, torch.no_grad():
        teacher(pixels)
    with FlopCounterMode(display=False) as learned:
        student(pixels).sum().backward()
    return Costs(looked.get_total_flops() / len(pixels), learned.get_total_flops() / len(pixels))


def _rows(
    rates: Mapping[str, list[float]], counts: Mapping[str, list[int] | None], costs: Costs, batch_size: int
) -> list[dict[str, Any]]:
    rows, before = [], None
    for number, (name, values) in enumerate(rates.items(), start=1):
        sizes = counts[name]
        seen = None if sizes is None else sum(sizes) / batch_size
        row = {
            "rung": number,
            "loop": name,
            _RATE: summary(values),
            "to the published": None if before is None else ratio(values, rates[_PUBLISHED]),
            "to the rung before": None if before is None else ratio(values, rates[before]),
            "teacher images an original": seen,
            "teacher calls a step": None if sizes is None else len(sizes),
            "GFLOP an original": None if seen is None else costs.of_step(seen) / 1e9,
        }
        rows.append(row)
        before = name
    return rows


def _notes(rates: Mapping[str, list[float]], costs: Costs) -> list[str]:
    reuse, whole = ratio(rates[_GATHERED], rates[_ASKED_AGAIN]), ratio(rates[_OWN], rates[_PUBLISHED])
    return [
        "Each loop changes what its name says and keeps what those above it changed. Nets, loss, optimizer, batch size "
        "and precision are the same.",
        f"Logits of the picks gathered against asked for again, all else equal: {_spread(reuse)}. If operations were "
        f"all, {costs.reuse_ceiling:.3f}: (4 T + 2 S) / (3 T + 2 S), with T = {costs.teacher / 1e9:.4f} GFLOP an image "
        f"for the teacher's forward and S = {costs.student / 1e9:.4f} for the student's forward and backward.",
        f"dalikd distill's step against the published loop: {_spread(whole)}.",
    ]


def _spread(found: Mapping[str, Any]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _variant(options: PublishedOptions, data: TrainingData) -> str:
    names = (str(name).replace(":", "-").replace("_", "-") for name in (options.teacher.name, options.model))
    settings = {options.compile: options.compile != "off", "resident": options.data.resident}
    added = (name for name, given in settings.items() if given)
    return "-".join((*names, str(data.view.size), options.precision, *added))


def _check(options: PublishedOptions) -> None:
    check_rounds(options.rounds)
    plain = {"accumulation": 1, "clip": None, "ema": 0.0, "joint_forward": False, "no_decay_norms": False}
    for name, value in plain.items():
        if getattr(options, name) != value:
            raise ValueError(
                f"--{name} {getattr(options, name)}: the published loop has no such thing, and the work must be "
                f"equal; give --{name} {json.dumps(value)}"
            )
    if options.precision == "fp16":
        raise ValueError("--precision fp16: the ladder scales no losses; give fp32, tf32, bf16 or fp64")


def plan(root: Path) -> list[Planned]:
    """What `dalikd bench all` runs."""
    data = ("--data.root", str(root), "--data.train_split", ".", "--data.val_split", ".")
    small = ("--teacher.name", "resnet56", "--model", "resnet20", "--data.image_size", "32", "--steps", "10")
    large = ("--teacher.name", "timm:resnet34", "--model", "timm:resnet18", *ON_GPU)
    return [Planned((*data, *small)), Planned((*data, *large), gpus=1)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("bench published", run, argv)


if __name__ == "__main__":
    main()
