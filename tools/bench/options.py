"""The options of the benchmarks that train or ask a teacher: those of the commands they measure, and how it is done."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from dalikd.pipelines.data import FilePath
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.options import FROM_0, FROM_1, check_numbers
from dalikd.trainers.tasks.distill import DistillOptions

__all__ = ["PublishedOptions", "ScalingOptions", "StepOptions", "TeacherOptions", "check_names"]


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


def check_names(option: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    """The names, each once; "all" stands for every known one.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = [name for entry in names for name in (known if entry == "all" else [entry])]
    for name in wanted:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{option} {name} is unknown: {hint}there are {', '.join(known)}")
    return list(dict.fromkeys(wanted))
