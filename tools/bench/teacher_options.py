"""The options of the benchmarks that ask a teacher: those of the commands they measure, and how it is done."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from dalikd.kd.normalize import Normalized
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.options import RESULTS
from dalikd.tools.bench.training import StepOptions
from dalikd.trainers.launch import model_type
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.models import build_model, build_teacher
from dalikd.trainers.options import FROM_1, check_numbers

__all__ = ["PublishedOptions", "TeacherOptions", "teacher_net"]


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

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.output or RESULTS)


@dataclass
class PublishedOptions(StepOptions):
    """Compare the training step with that of the published CutMixPick loop, one habit at a time.

    Takes the configs of `dalikd distill`, their `distill` section too. The augmentation is always cutmixpick_teacher.
    A teacher without weights is a fresh one from the seed: its speed is the same.

    Args:
        warmup: steps before each round that do not count; more where more batches may lie ready.
        metric: also measure the step that streams T. stddev, which the published loop does not.
    """

    warmup: int = 1
    augmentation: str = field(default="cutmixpick_teacher", init=False)


def teacher_net(options: TeacherOptions | PublishedOptions, source: Source, view: View) -> Normalized:
    """The teacher's net in the precision of the run, on the CPU: with its weights, or fresh from the seed.

    Args:
        options: name the teacher.
        source: the data set it is asked about.
        view: what it will see.

    Raises:
        ValueError: no name is given, or the weights do not fit.
    """
    config = options.teacher
    if config.name is None or config.weights is not None or config.cache is not None:
        return build_teacher(config, source, view).to(model_type(options.precision))
    torch.manual_seed(options.seed)
    return build_model(config.name, source, args=config.args).to(model_type(options.precision))
