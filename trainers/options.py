"""The options of the commands, a class for each: a field is an option, its text here the help."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import SGD, Optimizer

from dalikd.kd.losses import KD, DistillationLoss
from dalikd.pipelines.data import DataConfig, FilePath
from dalikd.trainers.augmentation import MixOptions, augmentation_names
from dalikd.trainers.launch import Device, Precision
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.schedules import ScheduleConfig
from dalikd.trainers.teacher_cache.layout import Storage
from dalikd.trainers.teacher_step import CompileMode, automatic_mode

__all__ = [
    "DATA_RANGES",
    "FROM_0",
    "FROM_1",
    "CacheOptions",
    "DistillOptions",
    "EvaluateOptions",
    "MeasureOptions",
    "MetricName",
    "RunOptions",
    "TrainOptions",
    "TrainingOptions",
    "check_numbers",
]

MetricName = Literal["probability_covariance", "cross_entropy_covariance"]
OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]


class _Range(NamedTuple):
    """Which numbers an option takes, and that in words."""

    fits: Callable[[Any], bool]
    words: str


FROM_1 = _Range(lambda value: value >= 1, "at least 1")
FROM_0 = _Range(lambda value: value >= 0, "0 or more")
_ABOVE_0 = _Range(lambda value: 0 < value < math.inf, "a number above 0")
_SHARE = _Range(lambda value: 0 < value < 1, "a share between 0 and 1, such as 0.95")
# NaN fits nowhere
DATA_RANGES = {
    **dict.fromkeys(
        [f"data.{name}" for name in ("image_size", "limit", "val_limit", "val_resize", "threads", "prefetch")], FROM_1
    ),
    "data.class_seed": FROM_0,
    "data.hw_decoder_load": _Range(lambda value: 0 <= value <= 1, "a share from 0 to 1"),
}
_RUN = {
    "batch_size": FROM_1,
    "seed": _Range(lambda value: 0 <= value < 1 << 63, "a whole number from 0 to 2^63 - 1"),
    **DATA_RANGES,
    "data.hw_decoder_load": _Range(
        lambda value: value in (0, 1),
        "0 or 1: with a share between, an image's pixels depend on the others of its batch",
    ),
}
_TRAINING = {
    "epochs": FROM_1,
    "epoch_factor": _ABOVE_0,
    "accumulation": FROM_1,
    "clip": _Range(lambda value: 0 < value < math.inf, "a norm above 0, or leave it out"),
    "ema": _Range(lambda value: 0 <= value < 1, "a decay below 1, such as 0.999, or 0 for none"),
    "log_every": FROM_1,
    "eval_every": FROM_1,
    "checkpoint_every": _Range(lambda value: value >= 0, "at least 1, or 0 for none"),
    "schedule.milestones": _Range(
        lambda values: all(map(math.isfinite, values)) and all(a < b for a, b in pairwise([-1e-9, *values])),
        "epochs from 0 on, each later than the one before",
    ),
    "schedule.gamma": _Range(lambda value: 0 < value <= 1, "a factor above 0, up to 1"),
    "schedule.warmup_epochs": _Range(lambda value: 0 <= value < math.inf, "0 or more epochs"),
    "schedule.final": _Range(lambda value: 0 <= value <= 1, "a share of the base rate, from 0 to 1"),
}
_MEASURING = {
    "epochs": FROM_1,
    "window": _Range(lambda value: value >= 2 and value % 2 == 0, "a positive even number (published: 640)"),
    "confidence": _SHARE,
    "stop_confidence": _SHARE,
    "images_per_call": FROM_1,
    "entropy_log_every": FROM_1,
    "checkpoint_every": FROM_1,
}
_CACHING = {
    "epochs": FROM_1,
    "share": _Range(lambda value: 0 < value <= 1, "a share of the images above 0, up to 1"),
    "tolerance": _Range(lambda value: 0 <= value < math.inf, "0 or more"),
}


def check_numbers(options: Any, ranges: Mapping[str, _Range]) -> None:
    """Raise ValueError for the first option, of those that are named and given, whose number is out of its range."""
    for name, allowed in ranges.items():
        value = attrgetter(name)(options)
        if value is not None and not allowed.fits(value):
            raise ValueError(f"--{name} {value}: give {allowed.words}")


def _settled_mode(options: "TrainingOptions | MeasureOptions | CacheOptions") -> CompileMode:
    """The mode asked for; what auto means on this machine, for these augmentations: manifold_mixup needs hooks."""
    if options.compile != "auto":
        return options.compile
    names = [options.augmentation] if isinstance(options.augmentation, str) else options.augmentation
    if any("manifold_mixup" in name for name in augmentation_names(names)):
        return "off"
    return automatic_mode(options.device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))


def _sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


@dataclass
class RunOptions:
    """What every command has.

    Args:
        data: which images, and how they are read.
        batch_size: images of one optimizer step, over all processes and accumulated microbatches.
        seed: of everything random.
        device: auto takes the GPU where there is one.
        precision: fp32 (true float32), tf32, bf16 and fp16 (mixed precision), fp64.
    """

    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 64
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no command can work with."""
        check_numbers(self, _RUN)


@dataclass
class TrainingOptions(RunOptions, MixOptions):
    """What training commands have.

    Args:
        model: architecture of the net that is trained, such as resnet20, wrn_16_2 or timm:resnet18.
        model_args: options of that architecture.
        weights: weights the net starts from: a file, or "pretrained" for timm's own.
        reinit: after that, make its convolutions, linear layers and batch norms anew, as torch does, from the seed.
        mean: that its images are normalised by: three numbers, of pixels scaled to 0..1; default: as its weights were
            trained, where they or dalikd's list of published files say it, else as the data set is.
        std: as mean; give both or none.
        augmentation: identity, flip, crop_flip, cutout, autoaugment, mixup, cutmix, cutmixpick_student,
            cutmixpick_teacher, manifold_mixup, patchmix, masking, same, randaugment, trivialaugment or random_erasing,
            on top of the training view; BASE+CRITERION picks out of several runs of another one, such as
            mixup+teacher_entropy (student_entropy, kld, dissimilarity).
        optimizer: its class path, with its options as --optimizer.lr and so on; SGD, AdamW or any other.
            --optimizer.fused true updates all weights in one kernel, where the class can; SGD, Adam and AdamW do so on
            a GPU unless it is false.
        schedule: the learning rate over time.
        epochs: passes over the training data.
        epoch_factor: multiplies epochs and milestones (prolonged training).
        accumulation: microbatches whose gradients make one optimizer step.
        clip: largest norm of the gradient, or none.
        no_decay_norms: no weight decay for biases and normalisation.
        ema: decay of an exponential moving average of the weights, such as 0.999; 0: none. The average is what is
            evaluated then, and lies beside student.safetensors as ema.safetensors.
        sync_bn: batch statistics over all processes (GPU only).
        compile: torch.compile's mode for teacher and task; auto: default on a GPU, off on a CPU, where something to
            compile with is missing, and for manifold_mixup. The first steps then take minutes; losses are the same up
            to rounding, except that dropout draws otherwise.
        output: the run folder; default: runs/COMMAND-DATA-MODEL.
        resume: go on with this run folder; its config.yaml is read first.
        overwrite: replace a run that lies in the run folder.
        log_every: steps between log lines.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every: steps between checkpoints, besides the one after each epoch; 0: none.
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    reinit: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    augmentation: str = "identity"
    optimizer: OptimizerFactory = _sgd
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    epochs: int = 240
    epoch_factor: float = 1.0
    accumulation: int = 1
    clip: float | None = None
    no_decay_norms: bool = False
    ema: float = 0.0
    sync_bn: bool = False
    compile: CompileMode = "auto"
    output: FilePath | None = None
    resume: FilePath | None = None
    overwrite: bool = False
    log_every: int = 50
    eval_every: int = 1
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, _TRAINING)
        self.compile = _settled_mode(self)
        length, warmup = round(self.epochs * self.epoch_factor), self.schedule.warmup_epochs
        if length < 1:
            raise ValueError(f"--epochs {self.epochs} x --epoch_factor {self.epoch_factor} is no whole epoch")
        if warmup > length:
            raise ValueError(f"--schedule.warmup_epochs {warmup}: give at most as many as are trained, {length}")


@dataclass
class TrainOptions(TrainingOptions):
    """Train a net on labels: a teacher, or a baseline.

    Args:
        label_smoothing: share of each label spread evenly over the classes.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, {"label_smoothing": _Range(lambda value: 0 <= value < 1, "a share from 0 to below 1")})


@dataclass
class DistillOptions(TrainingOptions):
    """Distil a teacher into a student.

    Args:
        teacher: the net that is imitated.
        fix_student: leave the student as its weights are: losses, T. stddev and evaluation are observed, and nothing
            of it is trained.
        loss: class of the distillation loss, with its options as --loss.temperature and so on.
        joint_forward: one student forward over originals and augmented images instead of two; faster, but batch
            normalisation then sees both at once.
        metric: also stream the teacher's T. stddev and entropy over the training images.
        entropy_log_every: batches between two records of the entropies of originals, candidates and picks, by the net
            that picks; they go to entropies.npz and entropies.png in the run folder. 0: none.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fix_student: bool = False
    loss: DistillationLoss = field(default_factory=KD)
    joint_forward: bool = False
    metric: bool = True
    entropy_log_every: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, {"entropy_log_every": _Range(lambda value: value >= 0, "at least 1, or 0 for no log")})


@dataclass
class MeasureOptions(RunOptions, MixOptions):
    """Measure how good augmentations are for distillation, by the teacher alone (T. stddev; lower is better).

    All of them are measured in one pass over the data: pictures are decoded once, and the teacher sees the originals
    and whatever augmentations have in common once.

    Args:
        augmentation: one or several names, "published" for the paper's nine or "all"; BASE+CRITERION picks out of
            several runs of another augmentation, by teacher_entropy, student_entropy, kld or dissimilarity.
        teacher: the net that is asked.
        model: architecture of the student that scores candidates (student_entropy, kld), or whose cross-entropy is
            measured.
        model_args: options of that architecture.
        weights: its weights; without them it is a fresh one made from the seed (the published figures used a trained
            student).
        epochs: passes over the training data; published: 10.
        window: teacher outputs in a window; published: 640.
        metrics: what is measured beside T. stddev and entropy: probability_covariance (of the teacher's outputs, over
            samples and classes), cross_entropy_covariance (between samples, of teacher and --model, and its
            approximation by the teacher alone; without --model that alone).
        confidence: of the intervals, and of the comparison of neighbours in the ranking.
        stop_confidence: stop as soon as all neighbours in the ranking are told apart at this confidence; the epochs are
            the most that are passed.
        per_class: also write the T. stddev of each class.
        images_per_call: images that a net sees at once at most, if the batch is not larger.
        entropy_log: a folder for the entropies of originals, candidates and picks, as arrays and as a plot, of every
            --entropy_log_every-th batch; the main process's share of it.
        entropy_log_every: batches from one to the next.
        checkpoint: file that the measurement is saved in, and gone on from when called again.
        checkpoint_every: batches between two savings.
        compile: torch.compile's mode for the look at a batch, auto as for training; the first batches then take
            minutes.
        json: file the results are written to.
    """

    augmentation: list[str] = field(default_factory=lambda: ["published"])
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    epochs: int = 10
    window: int = 640
    metrics: list[MetricName] = field(default_factory=list)
    confidence: float = 0.95
    stop_confidence: float | None = None
    per_class: bool = False
    images_per_call: int = 1024
    entropy_log: FilePath | None = None
    entropy_log_every: int = 100
    checkpoint: FilePath | None = None
    checkpoint_every: int = 500
    compile: CompileMode = "auto"
    json: FilePath | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be measured with."""
        super().__post_init__()
        check_numbers(self, _MEASURING)
        self.compile = _settled_mode(self)


@dataclass
class CacheOptions(RunOptions, MixOptions):
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
        compile: torch.compile's mode for the teacher, auto as for training; the first batches then take minutes.
        verify: instead of writing, ask the teacher again about a share of this cache and compare; the options are those
            it was made with, unless others are given.
        share: of the batches of each epoch that are verified, at least one; they are those that it was made in.
        tolerance: largest difference of logits that passes (topk: of probabilities, as the k-th class may change
            places); default: 0.001, and 0.05 for float16, whose steps are 0.03 at logits of 32 to 64; at --precision
            tf32 0.01 at least, at bf16 and fp16 0.1 (of probabilities 0.01). Other machines round otherwise.
    """

    augmentation: str = "identity"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    epochs: int = 1
    output: FilePath | None = None
    storage: Storage = "float32"
    k: int = 16
    compile: CompileMode = "auto"
    verify: FilePath | None = None
    share: float = 0.01
    tolerance: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no cache can have."""
        super().__post_init__()
        check_numbers(self, _CACHING)
        self.compile = _settled_mode(self)


@dataclass
class EvaluateOptions(RunOptions):
    """Evaluate a net on the validation split: every image exactly once.

    Args:
        model: its architecture.
        model_args: options of that architecture.
        weights: its weights: a file, or "pretrained" for timm's own.
        mean: that its images are normalised by: three numbers, of pixels scaled to 0..1; default: as its weights were
            trained, where they or dalikd's list of published files say it, else as the data set is.
        std: as mean; give both or none.
        json: file the results are written to.
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    json: FilePath | None = None
