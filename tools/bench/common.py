"""What the benchmarks take from the commands that they measure: loops, teacher passes, loaders. Nowhere else."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from dalikd.kd.backbones import create_model
from dalikd.kd.mixing import Mixed
from dalikd.kd.normalize import Normalized
from dalikd.kd.picking import TEACHER_ENTROPY
from dalikd.kd.teacher import Branch, Teacher, teacher_pass
from dalikd.pipelines.data import DataConfig, FilePath, open_split, training_view
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.images import mixing
from dalikd.trainers.augmentation import Augmenter, Branches, MixOptions, augmentation_names
from dalikd.trainers.launch import autocast_type, check_compiler, model_type
from dalikd.trainers.loop import Loop
from dalikd.trainers.measure import MeasureOptions, build_scorer, measure_branches
from dalikd.trainers.models import build_teacher
from dalikd.trainers.options import FROM_0, FROM_1, check_numbers
from dalikd.trainers.setup import Setup, open_run, reading
from dalikd.trainers.tasks.base import Task
from dalikd.trainers.tasks.distill import Distillation, DistillOptions
from dalikd.trainers.tracking import RunFolder

__all__ = [
    "Measuring",
    "PublishedOptions",
    "ScalingOptions",
    "Seen",
    "StepOptions",
    "TeacherOptions",
    "Training",
    "ask_once",
    "distillation_loop",
    "free_loop",
    "open_loop",
    "open_measuring",
    "open_training",
    "with_weights",
]


@dataclass
class StepOptions(DistillOptions):
    """Measure the training step of a distillation: no run folder is written, nothing is evaluated.

    Takes the configs of `dalikd distill`, their `distill` section too, and every option that a step depends on. A
    teacher without weights gets fresh ones: its answers mean nothing then, and take as long.

    Args:
        output: folder of the results, or a path that ends in .json; default: runs/bench.
        steps: optimizer steps in a round.
        rounds: repetitions of each measurement, in turn.
        warmup: steps before each round that do not count; as many come before everything, with what torch compiles.
    """

    output: FilePath | None = None
    steps: int = 50
    rounds: int = 5
    warmup: int = 10
    # of a run that is written and gone on with
    resume: FilePath | None = field(default=None, init=False)
    overwrite: bool = field(default=False, init=False)
    log_every: int = field(default=50, init=False)
    eval_every: int = field(default=1, init=False)
    checkpoint_every: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be measured with."""
        super().__post_init__()
        check_numbers(self, {"steps": FROM_1, "warmup": FROM_0})

    def check_warm_up(self) -> None:
        """Raises ValueError for a warm-up that leaves to the count what was made ahead of it."""
        if self.warmup * self.accumulation < self.data.prefetch:
            raise ValueError(
                f"--warmup {self.warmup} counts batches that were made ahead of the round: give at least "
                f"{-(-self.data.prefetch // self.accumulation)}, or a smaller --data.prefetch"
            )


@dataclass
class ScalingOptions(StepOptions):
    """Measure the training step on several processes against one, with the same work for each process.

    Takes the configs of `dalikd distill`. --batch_size is that of one process: n processes take n times as much.

    Args:
        processes: how many processes are measured, 1 among them; on GPUs each takes one.
    """

    processes: list[int] = field(default_factory=lambda: [1, 2])
    steps: int = 20


@dataclass
class PublishedOptions(StepOptions):
    """Compare the training step with that of the published CutMixPick loop, one ablation at a time.

    Takes the configs of `dalikd distill`, their `distill` section too. The augmentation is always cutmixpick_teacher.
    A teacher without weights is a fresh one from the seed: its speed is the same.

    Args:
        warmup: steps before each round that do not count; more where more batches may lie ready.
        metric: also measure the step that streams T. stddev, which the published loop does not.
    """

    warmup: int = 1
    augmentation: str = field(default="cutmixpick_teacher", init=False)


@dataclass
class TeacherOptions(MeasureOptions):
    """Compare `dalikd measure` with its teacher alone, for each augmentation.

    Takes the configs of `dalikd measure`, their `measure` section too. A teacher without weights is a fresh one from
    the seed: its speed is the same.

    Args:
        images: training images that a round goes over, class shares kept; fewer if there are not as many.
        rounds: repetitions of each measurement, in turn.
        output: folder of the results, or a path that ends in .json; default: runs/bench.
    """

    images: int = 2000
    rounds: int = 5
    output: FilePath | None = None
    # of results, which a benchmark has none of
    epochs: int = field(default=1, init=False)
    json: FilePath | None = field(default=None, init=False)
    confidence: float = field(default=0.95, init=False)
    stop_confidence: float | None = field(default=None, init=False)
    per_class: bool = field(default=False, init=False)
    entropy_log: FilePath | None = field(default=None, init=False)
    entropy_log_every: int = field(default=100, init=False)
    checkpoint: FilePath | None = field(default=None, init=False)
    checkpoint_every: int = field(default=500, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a number that cannot be measured with."""
        super().__post_init__()
        check_numbers(self, {"images": FROM_1})


Options = TypeVar("Options", bound=StepOptions | TeacherOptions)


def with_weights(options: Options, folder: Path) -> Options:
    """Options whose teacher has weights: fresh ones from the seed, written into the folder, where none are named."""
    teacher = options.teacher
    if teacher.name is None or teacher.weights is not None or teacher.cache is not None:
        return options
    classes = len(open_split(options.data, "train", options.seed).classes)
    torch.manual_seed(options.seed)  # the same for every process
    path = folder / "teacher.pt"
    torch.save(create_model(teacher.name, classes, **teacher.args).state_dict(), path)
    return replace(options, teacher=replace(teacher, weights=str(path)))


def _teacher_net(options: StepOptions | TeacherOptions, setup: Setup) -> Normalized:
    with TemporaryDirectory() as folder:
        config = with_weights(options, Path(folder)).teacher
        return build_teacher(config, setup.source, setup.val_view).to(model_type(options.precision))


# -------------------------------------------------------------------------------------------- training steps


def training_loop(task: Task, loader: Loader, options: DistillOptions, accelerator: Accelerator) -> Loop:
    """The loop of a run that is never written and never evaluated, ready to step."""
    loop = Loop(task, loader, loader, options, accelerator, RunFolder(Path("bench"), writes=False), {})
    loop.model.train()
    return loop


def open_loop(options: StepOptions, accelerator: Accelerator) -> tuple[Loop, Setup]:
    """The loop of `dalikd distill`. Raises ValueError, OSError: options, data or nets that do not fit."""
    setup = open_run(options, accelerator)
    with TemporaryDirectory() as folder:
        task = with_weights(options, Path(folder)).build(setup)
    return training_loop(task, task.loader(setup, options.accumulation), options, accelerator), setup


def distillation_loop(
    student: Normalized,
    teacher: Teacher,
    augmenter: Augmenter,
    loader: Loader,
    options: DistillOptions,
    accelerator: Accelerator,
) -> Loop:
    """A loop like that of `dalikd distill`, of given nets."""
    task = Distillation(
        student,
        teacher,
        deepcopy(options.loss),
        augmenter,
        accelerator,
        len(loader.source.classes),
        metric=options.metric,
        compile_mode=options.compile,
    )
    return training_loop(task, loader, options, accelerator)


def free_loop(
    name: str, source: Source, data: DataConfig, batch_size: int, accelerator: Accelerator, make: Callable[[], Any]
) -> Loop:
    """The loop of an augmentation, on the CPU, with nets that `make` gives."""
    augmenter = mixing(name, source, training_view(data, source), batch_size)
    mix = MixOptions(group=augmenter.group)
    options = DistillOptions(augmentation=name, batch_size=batch_size, mix=mix, device="cpu", compile="off")
    sampler = Sampler(len(source), batch_size, group=augmenter.group)
    # buffers: as on a GPU, packed and handed over
    loader = Loader(source, sampler, augmenter.draw_spec, buffers=2, **reading(data))
    return distillation_loop(make(), Teacher(make()), augmenter, loader, options, accelerator)


class Training(NamedTuple):
    """What `dalikd distill` opens, not yet joined. The nets are never trained or folded themselves."""

    student: Normalized
    teacher: Normalized
    setup: Setup
    augmenter: Augmenter
    loader: Loader


def open_training(options: StepOptions, accelerator: Accelerator) -> Training:
    """The nets and the data. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    setup, device = open_run(options, accelerator), accelerator.device
    augmenter = setup.augmenter(options.augmentation)
    student, teacher = options.build_student(setup).to(device), _teacher_net(options, setup).to(device)
    return Training(student, teacher, setup, augmenter, setup.loader(augmenter.draw_spec))


class Seen(NamedTuple):
    """What a teacher has seen and said of a batch [N] and of n picks."""

    logits: Tensor  # [N, C]
    images: Tensor  # [n, 3, S, S], the picks
    picked_logits: Tensor  # [n, C]
    rows: Tensor  # int64 [n], which rows of the batch the picks stem from
    partner: Tensor  # int64 [n], which rows are mixed into them
    lam: Tensor  # [n], share of the image itself


def ask_once(teacher: Callable[[Tensor], Tensor], images: Tensor, runs: Sequence[Mixed], group: int) -> Seen:
    """dalikd's own teacher pass: originals and candidates in one call, picks by teacher entropy."""
    branch = Branch(tuple(range(len(runs))), TEACHER_ENTROPY)
    asked = teacher_pass(teacher, images, runs, [branch], group=group)
    (found,) = asked.branches
    picked = found.mixed
    return Seen(asked.originals.logits, picked.images, found.logits, found.rows, picked.partner, picked.lam)


# ------------------------------------------------------------------------------------------------- measuring


class Measuring(NamedTuple):
    """What `dalikd measure` opens."""

    options: TeacherOptions
    setup: Setup
    augmenters: list[Augmenter]
    teacher: Teacher
    student: Normalized | None

    def loader(self, branches: Branches) -> Loader:
        """Over every image once an epoch, with the branches' draws."""
        return self.setup.loader(branches.draw_spec, self.setup.sampler(drop_last=False))

    def measure(self, branches: Branches, loader: Loader) -> dict[str, Any]:
        """One pass over the images."""
        return measure_branches(branches, loader, self.teacher, self.setup.accelerator, self.options, self.student)


def open_measuring(options: TeacherOptions, accelerator: Accelerator) -> Measuring:
    """The images that a round goes over, the augmentations and the nets. Raises ValueError, OSError: options, data or
    nets that are not as they should be."""
    check_compiler(options.compile)
    names = augmentation_names(options.augmentation)
    source = open_split(options.data, "train", options.seed)
    if options.images < len(source.classes):
        raise ValueError(f"--images {options.images}: give at least one for each of {len(source.classes)} classes")
    source = source.limit(options.images, options.seed) if options.images < len(source) else source
    setup = Setup(options, accelerator, source, source)
    augmenters = [setup.augmenter(name) for name in names]
    student, net = build_scorer(options, source, augmenters), _teacher_net(options, setup)
    teacher = Teacher(net, accelerator.device, autocast_type(options.precision), fold_bn=options.teacher.fold_bn)
    return Measuring(options, setup, augmenters, teacher, student)
