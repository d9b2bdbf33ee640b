"""What the options of all commands share, and which numbers they take. A field is an option, its text the help.

The options of a command stand beside what they are for: those of training with its tasks, of measuring in `measure`.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from dalikd.pipelines.data import DataConfig
from dalikd.trainers.augmentation import MixOptions, augmentation_names
from dalikd.trainers.launch import CompileMode, Device, Precision, automatic_mode

__all__ = [
    "ABOVE_0",
    "DATA_RANGES",
    "FROM_0",
    "FROM_1",
    "RENAMED",
    "SHARE",
    "AugmentingOptions",
    "NumberRange",
    "RunOptions",
    "check_numbers",
    "renamed",
]

#: options that have another name now, by the former one
RENAMED = {
    **{name: f"mix.{name}" for name in ("mode", "alpha", "manifold_alpha", "cutout_side", "patch_side", "mask_cells")},
    **{name: f"mix.{name}" for name in ("mask_ratio", "randaugment_ops", "randaugment_magnitude", "n_pick")},
    "pick_temperature": "mix.pick_temperature",
    "mix_group": "mix.group",
    "mix_n_run": "mix.n_run",
    "ceiling": "mix.lam_max",
    "floor": "mix.lam_min",
    "fix_student": "freeze_student",
    "clip": "clip_grad_norm",
}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the present names of options, where some have the names of an earlier version."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


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
        [f"data.{name}" for name in ("image_size", "limit", "val_limit", "val_resize", "threads", "prefetch")], FROM_1
    ),
    "data.class_seed": FROM_0,
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
