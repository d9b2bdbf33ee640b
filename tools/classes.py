"""Options that are classes. Another class has its own defaults: what was given for the former one goes, with a word."""

import os
import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace  # pyright: ignore[reportPrivateImportUsage]
from jsonargparse._typehints import resolve_class_path_by_name
from jsonargparse._util import import_object
from torch.optim import Optimizer

from dalikd.kd.losses import DistillationLoss

__all__ = ["CLASSES", "Chosen", "whole"]

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
        return yaml.safe_load(value) if value.startswith("{") else {"class_path": value}
    if not isinstance(value, dict):
        return {}
    return value if {"class_path", "init_args", "dict_kwargs"} & value.keys() else {"init_args": value}


class Chosen:
    """The classes of a command's class options, and what was given to them, layer by layer.

    Args:
        parser: of the command; its defaults are set to those of the chosen classes.
        names: of its options.
        options: its options class, whose own defaults come before those of CLASSES.
        model: that is trained; one with auxiliary heads has another loss by default.
        silent: whether nothing is said where another class is named.
    """

    def __init__(
        self, parser: ArgumentParser, names: Collection[str], options: Callable[..., Any], model: Any, *, silent: bool
    ) -> None:
        self._parser, self._silent = parser, silent
        self._defaults = {option: _default(option, options) for option in CLASSES if option in names}
        if "loss" in self._defaults and str(model).endswith("_aux"):
            self._defaults["loss"] = {"class_path": "dalikd.kd.losses.HSAKD"}
        self._class = {option: default["class_path"] for option, default in self._defaults.items()}
        self._given: dict[str, dict[str, tuple[Any, str]]] = {option: {} for option in self._class}
        parser.set_defaults(self._defaults)

    def settle(self, part: dict[str, Any], config: Namespace, place: str) -> None:
        """Leave out what was given to another class than the one that is named now, and say so once.

        Args:
            part: the options of a layer, with classes in their long form.
            config: what layers before it gave; changed in place.
            place: of the layer, a config file; empty: the command line.

        Raises:
            ValueError: there is no such class.
        """
        for option, former in self._class.items():
            given = part.get(option)
            if not isinstance(given, dict):
                continue
            named = str(given.get("class_path", former))
            if not _same_class(option, named, former):
                self._change(option, named, config, f"{place}: {option} {named}" if place else f"--{option} {named}")
            settings = {**(given.get("init_args") or {}), **(given.get("dict_kwargs") or {})}
            self._given[option] |= {name: (value, place or "the command line") for name, value in settings.items()}

    def _change(self, option: str, named: str, config: Namespace, where: str) -> None:
        former, lost = self._class[option], self._given[option]
        found = _find_class(option, named)
        if "." not in named and found is None:
            raise ValueError(f"{where}: there is no such class; give its whole path, such as {former}")
        if lost and not self._silent and found is not None:  # else the parser says what is wrong with it
            values = ", ".join(f"{name} {value}" for name, (value, _) in lost.items())
            places = ", ".join(dict.fromkeys(place for _, place in lost.values()))
            _say(f"dalikd: {where}: {values} of {former} ({places}) no longer hold, {named} has its own defaults")
        default = self._defaults[option]
        own = found is None or _same_class(option, named, default["class_path"])
        self._parser.set_defaults({option: default if own else {"class_path": named}})
        self._class[option], self._given[option] = named, {}
        config[option] = self._parser.get_defaults()[option]


def _default(option: str, options: Callable[..., Any]) -> dict[str, Any]:
    """What a class option is without a word: an options class may have another `partial` of the same class."""
    default, own = CLASSES[option][0], getattr(options, option, None)
    return {**default, "init_args": dict(own.keywords)} if isinstance(own, partial) else default


def _same_class(option: str, one: str, other: str) -> bool:
    """Whether two names, each short or with its module, are of one class."""
    found = _find_class(option, one)
    return one == other or (found is not None and found is _find_class(option, other))


def _find_class(option: str, name: str) -> Any:
    """The class of a name, short or with its module; None: there is none, and the parser says what is wrong."""
    try:
        return import_object(resolve_class_path_by_name(CLASSES[option][1], name))
    except (ValueError, ImportError, AttributeError):
        return None


def _say(line: str) -> None:
    if line not in _SAID and os.environ.get("RANK", "0") == "0":
        _SAID.add(line)
        print(line, file=sys.stderr, flush=True)
