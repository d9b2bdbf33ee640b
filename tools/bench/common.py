"""The options of benchmarks that measure other commands, and the loops and nets that these open. Nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.pipelines.data import FilePath, open_split
from dalikd.pipelines.draw_spec import Batch, View
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.record import Record
from dalikd.trainers.augmentation import Augmenter, MixOptions
from dalikd.trainers.launch import model_type
from dalikd.trainers.loop import Loop
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.models import TeacherConfig, build_teacher
from dalikd.trainers.options import FROM_0, FROM_1, check_numbers
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.tasks.base import Task
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tracking import RunFolder


@dataclass
class StepOptions(DistillOptions):
    """Measure the training step of a distillation: no run folder is written, nothing is evaluated.

    Takes the configs of `dalikd distill`, their `distill` section too, and every option that a step depends on. A
    teacher without weights gets fresh ones: its answers mean nothing then, and take as long.

    Args:
        output: folder of the results, or a path that ends in .json; default: runs/bench.
        steps: optimizer steps in a round.
        rounds: repetitions of each measurement, in turn.
        warmup: steps before each round that do not count, more where more batches may lie ready; as many come before
            everything, with what torch compiles.
        checkpoint_every: steps between checkpoints of one more side, which checks, logs and saves as a run does, into
            the folder for temporary files. 0: no such side.
    """

    output: FilePath | None = None
    steps: int = 50
    rounds: int = 5
    warmup: int = 10
    students: FilePath | None = field(default=None, init=False)
    teachers: list[TeacherConfig] = field(default_factory=list, init=False)
    teacher_weights: list[float] | None = field(default=None, init=False)
    teacher_ensemble: Literal["mean", "entropy"] = field(default="mean", init=False)
    resume: FilePath | None = field(default=None, init=False)
    overwrite: bool = field(default=False, init=False)
    restarts: int = field(default=0, init=False)
    log_every: int = field(default=50, init=False)
    eval_every: int = field(default=1, init=False)
    checkpoint_minutes: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, {"steps": FROM_1, "warmup": FROM_0})

    @property
    def counts(self) -> tuple[int, int]:
        """Steps of a round, and of its warm-up: at least as many as batches may have been made ahead for."""
        return self.steps, max(self.warmup, -(-self.data.prefetch // self.accumulation))


@dataclass
class ScalingOptions(StepOptions):
    """Measure the training step on several processes against one, with the same work for each process.

    Takes the configs of `dalikd distill`. --batch_size is that of one process: n processes take n times as much.

    Args:
        processes: how many processes are measured, 1 among them; on GPUs each takes one.
    """

    processes: list[int] = field(default_factory=lambda: [1, 2])
    steps: int = 20
    checkpoint_every: int = field(default=0, init=False)


@dataclass
class PublishedOptions(StepOptions):
    """Compare the training step with that of a published loop, one ablation at a time: HSAKD's where the loss turns
    images, else CutMixPick's.

    Takes the configs of `dalikd distill`, their `distill` section too. The augmentation is always that of the published
    loop: none, or cutmixpick_teacher. A teacher without weights is a fresh one from the seed: its speed is the same.

    Args:
        metric: also measure the step that streams T. stddev, which the published loop does not.
    """

    warmup: int = 1
    augmentation: str = field(default="cutmixpick_teacher", init=False)
    checkpoint_every: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augmentation = "identity" if self.turned else "cutmixpick_teacher"

    @property
    def turned(self) -> bool:
        """Whether images are turned, as in HSAKD's loop."""
        return "turned" in self.loss.needs


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
    epochs: int = field(default=1, init=False)
    confidence: float = field(default=0.95, init=False)
    stop_confidence: float | None = field(default=None, init=False)
    heads: bool = field(default=False, init=False)
    per_class: bool = field(default=False, init=False)
    entropy_log: FilePath | None = field(default=None, init=False)
    entropy_log_every: int = field(default=100, init=False)
    checkpoint: FilePath | None = field(default=None, init=False)
    checkpoint_every: int = field(default=500, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, {"images": FROM_1})


Options = TypeVar("Options", bound=StepOptions | TeacherOptions)


def describe_run(record: Record, options: StepOptions | TeacherOptions, setup: Setup, *nets: object) -> None:
    """What a record of these nets says of images, sizes, precision and compiling."""
    given = {options.compile: options.compile != "off", "resident": options.data.resident}
    words, size = [options.precision, *(word for word, is_given in given.items() if is_given)], setup.view.size
    names = [str(name).replace(":", "-").replace("_", "-") for name in nets]
    record.reads(setup.source)
    record.variant = "-".join([*names, str(size), *words])
    record.title += f"{' to '.join(map(str, nets))}, {size} pixels, batch {options.batch_size}, {', '.join(words)}"


def with_weights(options: Options, folder: Path) -> Options:
    """Options whose teacher has weights: fresh ones from the seed, written into the folder, where none are named."""
    teacher = options.teacher
    if teacher.name is None or teacher.weights is not None or teacher.cache is not None:
        return options
    classes = len(open_split(options.data, "train", options.seed).classes)
    torch.manual_seed(options.seed)  # the same for every process
    weights = create_model(teacher.name, classes, **teacher.args).state_dict()
    write_atomically(folder / "teacher.pt", lambda file: torch.save(weights, file), sync=False)
    return replace(options, teacher=replace(teacher, weights=str(folder / "teacher.pt"), verify=False))


def teacher_net(options: StepOptions | TeacherOptions, setup: Setup) -> Normalized:
    """The teacher, on the CPU, not folded."""
    with TemporaryDirectory() as folder:
        config = with_weights(options, Path(folder)).teacher
        return build_teacher(config, setup.source, setup.val_view).to(model_type(options.precision))


def open_loop(options: StepOptions, accelerator: Accelerator) -> tuple[Loop, Setup]:
    """The loop of `dalikd distill`. Raises ValueError, OSError: options, data or nets that do not fit."""
    setup = open_run(options, accelerator)
    with TemporaryDirectory() as folder:
        task = with_weights(options, Path(folder)).build(setup)
    return training_loop(task, task.loader(setup, options.accumulation), options, accelerator), setup


def training_loop(task: Task, loader: Loader, options: DistillOptions, accelerator: Accelerator) -> Loop:
    """Never written and never evaluated, ready to step."""
    loop = Loop(task, loader, loader, options, accelerator, RunFolder(Path("bench"), writes=False), {})
    loop.model.train()
    return loop


def mixing(name: str, source: Source, view: View, batch_size: int) -> Augmenter:
    """An augmentation by its defaults, in mix groups that fit the batch."""
    return Augmenter(name, MixOptions(group=gcd(batch_size, 64)), source, view, seed=0)


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch of changed tensors."""
    return Batch(**tree_map_only(Tensor, change, vars(batch)))
