"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ScheduleConfig", "learning_rate_factor"]


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


def learning_rate_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The factor on the base learning rate at a step.

    Args:
        config: the schedule.
        step: optimizer steps done so far.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps in the whole training.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    return _SHAPES[config.name](config, step, steps_per_epoch, total_steps, warmup)


def _multistep(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int, warmup: int) -> float:
    del total_steps, warmup
    passed = sum(step >= round(milestone * steps_per_epoch) for milestone in config.milestones)
    return config.gamma**passed


def _cosine(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int, warmup: int) -> float:
    del steps_per_epoch
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _constant(*_: object) -> float:
    return 1.0


_SHAPES: dict[str, Callable[..., float]] = {"multistep": _multistep, "cosine": _cosine, "constant": _constant}
