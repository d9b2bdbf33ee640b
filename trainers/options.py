"""What the options of all commands share, and which numbers they take. A field is an option, its text the help.

The options of a command stand beside what they are for: those of training with its tasks, of measuring in `measure`.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from dalikd.pipelines.data import DataConfig
from dalikd.trainers.augmentation import MixOptions, augmentation_names
from dalikd.trainers.launch import CompileMode, Device, Precision, automatic_mode

__all__ = [
    "ABOVE_0",
    "DATA_RANGES",
    "FROM_0",
    "FROM_1",
    "SHARE",
    "AugmentingOptions",
    "NumberRange",
    "RunOptions",
    "ScheduleConfig",
    "check_numbers",
]


class NumberRange(NamedTuple):
    """Which numbers an option takes, and that in words."""

    fits: Callable[[Any], bool]
    words: str


FROM_1 = NumberRange(lambda value: value >= 1, "at least 1")
FROM_0 = NumberRange(lambda value: value >= 0, "0 or more")
ABOVE_0 = NumberRange(lambda value: 0 < value < math.inf, "a number above 0")
SHARE = NumberRange(lambda value: 0 < value < 1, "a share between 0 and 1, such as 0.95")
# NaN fits nowhere
DATA_RANGES = {
    **dict.fromkeys(
        [
            f"data.{name}"
            for name in ("image_size", "limit", "val_limit", "val_resize", "threads", "prefetch", "max_pixels")
        ],
        FROM_1,
    ),
    "data.share": NumberRange(lambda value: 0 < value <= 1, "a share of the training images above 0, up to 1"),
    "data.class_seed": FROM_0,
    "data.bad_files_limit": FROM_0,
    "data.hw_decoder_load": NumberRange(lambda value: 0 <= value <= 1, "a share from 0 to 1"),
}
_RUN = {
    "batch_size": FROM_1,
    "seed": NumberRange(lambda value: 0 <= value < 1 << 63, "a whole number from 0 to 2^63 - 1"),
    **DATA_RANGES,
    "data.hw_decoder_load": NumberRange(
        lambda value: value in (0, 1),
        "0 or 1: with a share between, an image's pixels depend on the others of its batch",
    ),
}


def check_numbers(options: Any, ranges: Mapping[str, NumberRange]) -> None:
    """Raise ValueError for the first option, of those that are named and given, whose number is out of its range."""
    for name, allowed in ranges.items():
        value = attrgetter(name)(options)
        if value is not None and not allowed.fits(value):
            raise ValueError(f"--{name} {value}: give {allowed.words}")


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
class AugmentingOptions(RunOptions):
    """What commands have that augment images and ask nets about them.

    Args:
        mix: how augmentations are drawn.
        compile: torch.compile's mode for teacher and task; auto: default on a GPU, off on a CPU, where something to
            compile with is missing, and for manifold_mixup. The first steps then take minutes; losses are the same up
            to rounding, except that dropout draws otherwise.
    """

    mix: MixOptions = field(default_factory=MixOptions)
    compile: CompileMode = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no command can work with, and for unknown augmentations."""
        super().__post_init__()
        if self.compile == "auto":
            self.compile = self._automatic_mode()

    def _automatic_mode(self) -> CompileMode:
        """What auto means on this machine, for these augmentations: manifold_mixup needs hooks."""
        named: str | list[str] = getattr(self, "augmentation", [])
        names = augmentation_names([named] if isinstance(named, str) else named)
        if any("manifold_mixup" in name for name in names):
            return "off"
        on_cpu = self.device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        return automatic_mode(on_cpu)


@dataclass
class ScheduleConfig:
    """How the learning rate changes over training.

    Args:
        name: multistep (multiplied by gamma at each milestone), cosine (to final at the end), or constant.
        milestones: epochs at which multistep decays, counted from 0.
        gamma: factor at each milestone.
        warmup_epochs: the rate rises linearly over so many epochs first.
        final: where cosine ends, as a share of the base rate.
    """

    name: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: list[float] = field(default_factory=lambda: [150.0, 180.0, 210.0])
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    final: float = 0.0
