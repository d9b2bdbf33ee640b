"""What options are, read off the signature of their class or function: which are words, which lists, which paths."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from inspect import signature
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from dalikd import configs
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.files import Refused, load_yaml

__all__ = [
    "RECIPES",
    "RECIPE_PREFIX",
    "check_words",
    "check_yaml",
    "element",
    "expand_path",
    "expand_paths",
    "is_path",
    "is_word",
    "option_types",
]

#: where the packaged recipes lie, and what a path in there begins with: it needs no repository
RECIPES = Path(configs.__file__).parent
RECIPE_PREFIX = "dalikd:"

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)
_NUMBERS = re.compile(r"[-+.e\d]+( *, *[-+.e\d]+)+")

# 1e5 is a number for jsonargparse and a word for PyYAML; it is one thing in a config, whoever reads or writes it
for _part in (yaml.SafeLoader, yaml.SafeDumper):
    _part.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def option_types(component: Callable[..., Any], prefix: str = "") -> dict[str, Any]:
    """The type of each option of a class or function, by its dotted name; groups of options are taken apart."""
    hints = get_type_hints(component.__init__ if isinstance(component, type) else component)
    found: dict[str, Any] = {}
    for name in signature(component).parameters:
        hint = hints[name]
        group = isinstance(hint, type) and is_dataclass(hint)
        found |= option_types(hint, f"{prefix}{name}.") if group else {prefix + name: hint}
    return found


def is_path(hint: Any) -> bool:
    """Whether an option is the path of a file or folder."""
    return any(kind in (FilePath, Path) for kind in _kinds(hint))


def is_word(hint: Any) -> bool:
    """Whether an option is a text, a path, or a name out of several."""
    kinds = [get_args(kind)[0] if get_origin(kind) is Literal else kind for kind in _kinds(hint)]
    return bool(kinds) and all(kind in (str, FilePath, Path) or isinstance(kind, str) for kind in kinds)


def _is_list(hint: Any) -> bool:
    kinds = _kinds(hint)
    return bool(kinds) and all(get_origin(kind) in (list, tuple) for kind in kinds)


def _kinds(hint: Any) -> list[Any]:
    """The types that a value may have, without None."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [] if hint in (None, type(None)) else [hint]


# ----------------------------------------------------------------------------------------------------- paths


def expand_path(option: str, path: str) -> str:
    """A path with ~, $VAR and ${VAR} replaced; a relative one stays relative to the working directory. dalikd:NAME is a
    packaged recipe, whose .yaml may be left out.

    Raises:
        ValueError: the variable is not set, or there is no such home folder or recipe; names the option.
    """
    if path.startswith(RECIPE_PREFIX):
        return str(_recipe(option, path.removeprefix(RECIPE_PREFIX)))

    def value(match: re.Match[str]) -> str:
        name = match[1].strip("{}")
        if name not in os.environ:
            raise ValueError(f"{option} {path}: the environment variable {name} is not set")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))  # noqa: PTH111 (Path has another word for each failure)
    if expanded.startswith("~"):
        raise ValueError(f"{option} {path}: there is no such home folder; a file of that name is ./{path}")
    return expanded


def _recipe(option: str, name: str) -> Path:
    files = {path.relative_to(RECIPES).as_posix(): path for path in RECIPES.rglob("*.*") if path.suffix != ".py"}
    found = files.get(name) or files.get(f"{name}.yaml")
    if found is None:
        close = get_close_matches(name, [known.removesuffix(".yaml") for known in files], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(RECIPE_PREFIX + known for known in close)}? " if close else ""
        raise ValueError(f"{option} {RECIPE_PREFIX}{name}: there is no such recipe; {hint}`dalikd recipes` lists them")
    return found


def expand_paths(values: dict[str, Any], types: Mapping[str, Any], prefix: str = "", place: str = "--") -> None:
    """Expand the paths among options, in place; in lists of groups too, which may still be the text of a command line.

    Args:
        values: of options, as nested dictionaries; names may be dotted.
        types: of the options, by their dotted names.
        prefix: of their names.
        place: what comes before their names in messages.

    Raises:
        ValueError: as `expand_path`; or a list of groups holds something else.
    """
    for key, value in values.items():
        name = f"{prefix}{key}".removesuffix("+")
        group = element(types.get(name))
        if isinstance(group, type) and is_dataclass(group):
            values[key] = _expanded_groups(value, group, f"{place}{name}")
        elif isinstance(value, dict):
            expand_paths(value, types, f"{prefix}{key}.", place)
        elif isinstance(value, str | Path) and is_path(types.get(name)):
            values[key] = type(value)(expand_path(f"{place}{prefix}{key}", str(value)))


def _expanded_groups(given: Any, group: type, option: str) -> Any:
    """A list of groups of options, or one of them, with paths expanded; read first if it is text."""
    try:
        found = load_yaml(given, option)[0] if isinstance(given, str) else given
    except Refused:
        raise
    except ValueError:
        return given  # the parser says what is wrong with it
    types = option_types(group)
    for number, entry in enumerate(found if isinstance(found, list) else [found], start=1):
        if entry is not None and not isinstance(entry, dict):
            raise ValueError(
                f"{option}, entry {number} is {entry}: give its options, {{{next(iter(types))}: VALUE, …}}"
            )
        expand_paths(entry or {}, types, place=f"{option}, entry {number}: ")
    return found


# ---------------------------------------------------------------------------------------------- words and lists


def check_words(option: str, words: Sequence[str], types: Mapping[str, Any]) -> None:
    """Check the words after an option of a command line that takes one value; a list is one value, in brackets.

    Raises:
        ValueError: shows how the option is written.
    """
    name, given = option.removeprefix("--"), f"{option} {' '.join(words)}"
    alone = len(words) == 1 and (words[0].startswith("[") or words[0] in ("null", "None"))
    if _is_list(types[name]) and not alone if name in types else len(words) > 1:  # a class checks its options itself
        values = ", ".join(word.strip(",") for word in words)
        raise ValueError(f"{given}: a list is one value, in brackets and quotes: {option} '[{values}]'")
    if len(words) > 1 and not alone:
        raise ValueError(f"{given}: {option} takes one value; put quotes around a value that has spaces")


def check_yaml(place: str, content: Mapping[Any, Any], text: Any, types: Mapping[str, Sequence[Any]]) -> None:
    """Check that a config holds words where words are meant, and lists where lists are.

    Args:
        place: the file, and the name of the group that the content is of.
        content: what the file holds.
        text: the same with every scalar as it is written.
        types: those that each option may have, by its dotted name.

    Raises:
        ValueError: names the option and shows how it is written.
    """
    keys = list(content)
    for number, (key, value) in enumerate(content.items()):
        written = text.get(key, value) if isinstance(text, dict) else value
        name, hints = f"{place}{key}", types.get(str(key), ())
        if isinstance(value, dict):
            inner = {each.removeprefix(f"{key}."): types[each] for each in types if each.startswith(f"{key}.")}
            check_yaml(f"{name}.", value, written, inner)
            continue
        # {milestones: 30, 60} is {milestones: 30, 60: null}
        torn = list(takewhile(lambda after: content[after] is None and not isinstance(after, str), keys[number + 1 :]))
        numbers = place.endswith("init_args.") and isinstance(value, str) and _NUMBERS.fullmatch(value) is not None
        one_for_list = bool(hints) and all(map(_is_list, hints)) and not (value is None or isinstance(value, list))
        if isinstance(key, str) and (torn or numbers or one_for_list):
            values = ", ".join(map(str, (written, *torn)))
            raise ValueError(f"{name} is {values}: a list is written in brackets, {key}: [{values}]")
        if hints and all(is_word(element(hint)) for hint in hints):
            _check_are_words(place, key, value, written, is_a_path=any(map(is_path, hints)))


def element(hint: Any) -> Any:
    """The type of a list's values; that of anything else is its own."""
    return get_args(_kinds(hint)[0])[0] if _is_list(hint) else hint


def _check_are_words(place: str, key: str, value: Any, written: Any, *, is_a_path: bool) -> None:
    values, texts = (value, written) if isinstance(value, list) else ([value], [written])
    for one, text in zip(values, texts, strict=True):
        if isinstance(one, str | list) or (one is None and not (is_a_path and text == "~")):
            continue
        kind = {bool: str(one).lower(), int: "a number", float: "a number", type(None): "nothing"}.get(
            type(one), "a date"
        )
        raise ValueError(f"{place}{key}: YAML reads {text} as {kind}; put it in quotes, {key}: '{text}'")
