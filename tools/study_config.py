"""Reads a study: config files and arguments become one config, of which every cell takes its part."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dalikd.tools.cli import OPTIONS, check_keys, option_names, parse, read_config, value_of, values_of
from dalikd.trainers.study.options import StudyOptions

__all__ = ["ONE_CALL", "SECTIONS", "Reading", "merged", "read_study"]

#: the commands that cells are calls of
SECTIONS = ("train", "evaluate", "measure", "distill")
_STUDY = option_names("study")
_LISTS = {"augmentation", "seeds", "epoch_factor", "pair"}
#: options of the study that do not change what comes out
ONE_CALL = ("pair", "shard", "dry_run", "report", "poll_seconds", "output")
_IN_PAIRS = ("model", "model_args", "weights")
_FOR_CELLS = ("output", "json", "resume", "overwrite")


class Reading(NamedTuple):
    """A study as it was asked for.

    Attributes:
        options: the study's own.
        shared: what its cells share, as a config file would hold it.
        path: the config file that messages name.
    """

    options: StudyOptions
    shared: dict[str, Any]
    path: Path


def read_study(argv: Sequence[str]) -> Reading:
    """Read config files and arguments, later ones winning. Options of the cells may be among the arguments.

    Raises:
        ValueError, ArgumentError: an unknown key, a wrong value.
        FileNotFoundError: no such config file.
    """
    content: dict[str, Any] = {}
    arguments: dict[str, Any] = {}  # those between two configs count as one, in which sections win
    path, words = Path("command line"), deque(_split(argv))
    while words:
        option = words.popleft()
        if option in ("-h", "--help", "--print_config"):
            parse("study", ["--help"])
        elif option == "--config":
            path = Path(value_of(option, words))
            content = merged(merged(content, arguments), _sorted(read_config(str(path)), path))
            arguments = {}
        else:
            arguments = _over(arguments, _sorted(_argument(option, words), "command line"))
    content = merged(content, arguments)
    own = content.pop("study", {})
    pairs = _pairs(own.pop("pairs", []), path)  # the parser would make objects of the classes in them
    options, _ = parse("study", [], own, path)
    _check_shared(content, path)
    return Reading(replace(options, pairs=pairs), content, path)


def _pairs(given: Any, path: Path) -> list[dict[str, Any]]:
    """What stands under `pairs`; its entries are checked by `read_pairs`."""
    pairs = yaml.safe_load(given) if isinstance(given, str) else given
    if not isinstance(pairs, list):
        raise ValueError(f"{path}: pairs is {pairs!r}: give a list of {{teacher: NET, student: NET}}")
    return pairs


def _split(argv: Sequence[str]) -> list[str]:
    pieces = (word.split("=", 1) if word.startswith("--") else [word] for word in argv)
    return [piece for split in pieces for piece in split]


def _argument(option: str, words: deque[str]) -> dict[str, Any]:
    """An option of the command line, as a config file would hold it."""
    name = option.removeprefix("--")
    head, _, rest = name.partition(".")
    known = {option for section in SECTIONS for option in option_names(section)} | _STUDY
    if not option.startswith("--") or (head in SECTIONS and not rest):
        raise ValueError(f"{option}: options begin with --, and have a value")
    check_keys("command line", {rest if head in SECTIONS else name: None}, known)
    if name in _LISTS:
        return {name: [yaml.safe_load(value) for value in values_of(option, words)]}
    value = value_of(option, words)
    return {name: value if name in _STUDY - {"dry_run", "report", "poll_seconds"} else yaml.safe_load(value)}


def _sorted(content: dict[str, Any], place: Path | str) -> dict[str, Any]:
    """One layer: nested, the study's own options in its section, without those of other commands."""
    nested: dict[str, Any] = {}
    for key, value in content.items():
        nested = merged(nested, _nested(str(key).split("."), value))
    for section in set(nested) & set(SECTIONS):
        check_keys(place, nested[section], option_names(section), f"{section}.")
    own = {key: nested.pop(key) for key in _STUDY & nested.keys()} | nested.pop("study", {})
    kept = {name for section in SECTIONS for name in option_names(section)} | set(SECTIONS)
    return {key: value for key, value in nested.items() if key in kept} | ({"study": own} if own else {})


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two layers, the later one winning: what it says at the top also wins over what a section said before."""
    top = {key: value for key, value in new.items() if key not in OPTIONS}
    old = {key: _without(value, top) if key in SECTIONS else value for key, value in old.items()}
    return _over(old, new)


def _without(section: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in section.items():
        if key not in top:
            kept[key] = value
        elif isinstance(value, dict) and isinstance(top[key], dict) and "class_path" not in top[key]:
            kept[key] = _without(value, top[key])
    return kept


def _over(old: Any, new: Any) -> Any:
    if not isinstance(new, dict):
        return new
    if "class_path" in new:
        return _over_class(old, new)
    if isinstance(old, str) and new:
        old = {"class_path": old}  # a class by its name alone
    if not isinstance(old, dict):
        return new
    if "class_path" in old and not {"init_args", "dict_kwargs"} & new.keys():
        return {**old, "init_args": _over(old.get("init_args", {}), new)}
    return {**old, **{key: _over(old.get(key), value) for key, value in new.items()}}


def _over_class(old: Any, new: dict[str, Any]) -> dict[str, Any]:
    """Another class brings its own options; the same class keeps those not named."""
    if not isinstance(old, dict) or old.get("class_path") != new["class_path"]:
        return new
    return {**old, **{key: _over(old.get(key), value) for key, value in new.items()}}


def _check_shared(content: dict[str, Any], path: Path) -> None:
    for section in ("", *SECTIONS):
        place = f"{section}." if section else ""
        values = content.get(section, {}) if section else content
        for name in _IN_PAIRS:
            if name in values:
                raise ValueError(f"{path}: {place}{name} is no option of a study: nets are named in `pairs`")
        for name in ("name", "weights", "args", "sha256", "cache"):
            if name in (values.get("teacher") or {}):
                raise ValueError(f"{path}: {place}teacher.{name} is no option of a study: teachers stand in `pairs`")
        for name in _FOR_CELLS:
            if name in values:
                raise ValueError(f"{path}: {place}{name} is no option of a study: it has a folder, --output")
        for name in ("augmentation",) if section in ("measure", "distill") else ():
            if name in values:
                raise ValueError(f"{path}: {place}{name} is no option of a study: name them under `study:`")
