"""The options of the benchmarks that train: those of `dalikd distill`, and how it is measured."""

from dataclasses import dataclass, field
from pathlib import Path

from dalikd.pipelines.data import FilePath
from dalikd.tools.bench.options import RESULTS
from dalikd.trainers.options import FROM_0, FROM_1, check_numbers
from dalikd.trainers.tasks.distill import DistillOptions

__all__ = ["ScalingOptions", "StepOptions"]


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

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.output or RESULTS)


@dataclass
class ScalingOptions(StepOptions):
    """Measure the training step on several processes against one, with the same work for each process.

    Takes the configs of `dalikd distill`. --batch_size is that of one process: n processes take n times as much.

    Args:
        processes: how many processes are measured, 1 among them; on GPUs each takes one.
    """

    processes: list[int] = field(default_factory=lambda: [1, 2])
    steps: int = 20
