"""Options that are classes. Another class has its own defaults: what was given for the former one goes, with a word."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from jsonargparse._typehints import resolve_class_path_by_name
from jsonargparse._util import import_object
from torch.optim import Optimizer

from dalikd.kd.losses import DistillationLoss

__all__ = ["CLASSES", "find_class", "same_class", "say_what_goes", "settings_of", "whole"]

#: what each of these options is without a word, and the base of what it may be
CLASSES: dict[str, tuple[dict[str, Any], type]] = {
    "optimizer": (
        {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        Optimizer,
    ),
    "loss": ({"class_path": "dalikd.kd.losses.KD"}, DistillationLoss),
}
_SAID: set[str] = set()


def whole(value: Any) -> dict[str, Any]:
    """A class option in its long form, with a `class_path`, `init_args` and `dict_kwargs` as far as they are given."""
    if isinstance(value, str):
        return {"class_path": value}
    if not isinstance(value, dict):
        return {}
    return value if {"class_path", "init_args", "dict_kwargs"} & value.keys() else {"init_args": value}


def settings_of(value: Any) -> dict[str, Any]:
    """The options that are given to the class."""
    given = whole(value)
    return {**(given.get("init_args") or {}), **(given.get("dict_kwargs") or {})}


def same_class(option: str, one: str, other: str) -> bool:
    """Whether two names, each short or with its module, are of one class."""
    return one == other or (
        find_class(option, one) is not None and find_class(option, one) is find_class(option, other)
    )


def find_class(option: str, name: str) -> Any:
    """The class of a name, short or with its module; None: there is none, and the parser says what is wrong."""
    try:
        return import_object(resolve_class_path_by_name(CLASSES[option][1], name))
    except (ValueError, ImportError, AttributeError):
        return None


def say_what_goes(where: str, new: str, old: str, lost: Mapping[str, Any], place: str) -> None:
    """Say, once, that options of the former class do not hold for another one.

    Args:
        where: the option or file that names the other class.
        new: that class.
        old: the former class.
        lost: its options.
        place: where these were given.
    """
    values = ", ".join(f"{name} {value}" for name, value in lost.items())
    line = f"dalikd: {where}: {values} of {old} ({place}) no longer hold, {new} has its own defaults"
    if lost and line not in _SAID and os.environ.get("RANK", "0") == "0":
        _SAID.add(line)
        print(line, file=sys.stderr, flush=True)
