"""Options that are classes. Another class has its own defaults: what was given for the former one goes, with a word."""

import json
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings  # pyright: ignore[reportPrivateImportUsage]
from jsonargparse._typehints import resolve_class_path_by_name
from jsonargparse._util import import_object
from torch.optim import Optimizer

from dalikd.kd.losses import DistillationLoss
from dalikd.pipelines.files import Refused, load_yaml

__all__ = ["CLASSES", "Chosen", "check_class_path", "check_values", "import_words", "trust", "whole"]

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
        value = load_yaml(value, value[:40])[0] if value.startswith("{") else {"class_path": value}
    if not isinstance(value, dict):
        return {}
    return value if {"class_path", "init_args", "dict_kwargs"} & value.keys() else {"init_args": value}


# ------------------------------------------------------------------------------------------ what may be imported

_OF_OURS = ("dalikd", "torch", "torchvision", "timm")
_TRUSTED: dict[str, str] = {}  # modules that --import names, and the top-level module of each


def trust(module: str) -> None:
    """Import a module, and let config files name its classes.

    Args:
        module: on sys.path, or else in the working folder.

    Raises:
        ValueError: it cannot be imported.
    """
    top = module.partition(".")[0]
    try:
        if top not in sys.modules and find_spec(top) is None:
            sys.path.append(str(Path.cwd()))  # last: nothing there stands in for a package
        import_module(module)
    except Exception as error:  # it may do anything
        raise ValueError(f"--import {module}: {type(error).__name__}: {error}") from error
    _TRUSTED[module] = top
    _allow(top)


def import_words() -> list[str]:
    """The words of a command line that imports the modules that this one has named."""
    return [word for module in _TRUSTED for word in ("--import", module)]


def check_class_path(place: str, path: str) -> None:
    """Refuse a class of a module that is neither of an installed package nor named by --import: to import it runs it.

    Args:
        place: where it is named, for messages.
        path: of the class; without a dot it is one that is known.

    Raises:
        ValueError: as said.
    """
    top, dot, _ = path.partition(".")
    if not dot or top in _TRUSTED.values() or top in _OF_OURS:
        return
    if top in sys.stdlib_module_names or top == "jsonargparse":
        raise ValueError(f"{place} {path}: {top} has no class for this place; give another")
    found = find_spec(top) if top.isidentifier() and top != "__main__" else None
    if found is None:
        raise ValueError(f"{place} {path}: there is no such class (No module named {top!r}); give its whole path")
    if not _is_installed(top, found):
        raise ValueError(
            f"{place} {path}: {top} is of no installed package, and to import it runs its code: if you trust it, give "
            f"--import {top}"
        )
    _allow(top)


def check_values(values: Any, place: str, inside: bool = False) -> None:
    """Refuse, among the options of a layer, classes where none is taken, and whatever `check_class_path` refuses.

    Args:
        values: nested, as a layer holds them.
        place: of the layer, for messages; empty: the command line.
        inside: whether they are of an option that is a class.

    Raises:
        ValueError: as said; Refused: a text among them costs too much to read.
    """
    if isinstance(values, str) and values.lstrip()[:1] in ("{", "[", "&"):
        try:
            values = load_yaml(values, f"{place}: {values[:40]}".removeprefix(": "))[0]
        except Refused:
            raise
        except ValueError:
            return  # the parser says what is wrong with it
    if isinstance(values, list):
        for value in values:
            check_values(value, place, inside)
    elif isinstance(values, dict):
        named = values.get("class_path")
        if named is not None and not inside:
            where = place or "the command line"
            raise ValueError(f"{where}: class_path {named} is given to an option that takes no class: leave it out")
        if isinstance(named, str):
            check_class_path(f"{place}: class_path" if place else "class_path", named)
        for name, value in values.items():
            check_values(value, place, inside or name in CLASSES)


def _is_installed(top: str, found: ModuleSpec) -> bool:
    """Whether a module is a part of an installed package, and not a file of the same name elsewhere."""
    places = [Path(place) for place in (found.origin, *(found.submodule_search_locations or ())) if place]
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    folders += site.getsitepackages()
    if not any(place.is_relative_to(folder) for place in places for folder in folders):
        for name in packages_distributions().get(top, ()):  # takes a second: of packages that are worked on alone
            source = json.loads(distribution(name).read_text("direct_url.json") or "{}").get("url", "")
            folders.append(unquote(source.removeprefix("file://")) or "/none")
    return any(place.is_relative_to(folder) for place in places for folder in folders)


def _allow(top: str) -> None:
    set_parsing_settings(import_path_allowlist=[top])


# a class path, wherever a parser meets it, is of what is allowed here, and makes an object only where a class is meant
set_parsing_settings(
    import_path_denylist=["*"], import_path_allowlist=list(_OF_OURS), instantiate_subclass_spec_in_any=False
)


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
