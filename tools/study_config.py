"""Reads a study: config files and arguments become one config, of which every cell takes its part."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dalikd.tools.classes import CLASSES, same_class, say_what_goes, settings_of, whole
from dalikd.tools.cli import OPTIONS, check_keys, option_names, parse, read_config, value_of, values_of
from dalikd.tools.signature import check_words, element, expand_paths, is_word, option_types
from dalikd.trainers.study.options import StudyOptions

__all__ = ["ONE_CALL", "SECTIONS", "Reading", "merged", "read_study"]

#: the commands that cells are calls of
SECTIONS = ("train", "evaluate", "measure", "distill")
_STUDY = option_names("study")
#: of the options of all cells, of those of one command after its name, and of the study's own
_TYPES: dict[str, Any] = {
    **{name: hint for section in SECTIONS for name, hint in option_types(OPTIONS[section]).items()},
    **{f"{section}.{name}": hint for section in SECTIONS for name, hint in option_types(OPTIONS[section]).items()},
    **option_types(OPTIONS["study"]),
}
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
            content = merged(content, arguments)
            path, read = read_config(value_of(option, words))
            content, arguments = merged(content, _sorted(read, path), str(path)), {}
        else:
            arguments = _over(arguments, _sorted(_argument(option, words), "command line"), None)
    content = merged(content, arguments)
    expand_paths(content, _TYPES)
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
    for index, pair in enumerate(pairs):
        for role, net in pair.items() if isinstance(pair, dict) else ():
            if isinstance(net, dict):
                expand_paths(net, _TYPES, place=f"{path}: pairs[{index}].{role}.")
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
    hint = _TYPES.get(name)
    if name in _LISTS:
        values = values_of(option, words)
        return {name: values if is_word(element(hint)) else [yaml.safe_load(value) for value in values]}
    values = [value_of(option, words)]
    while words and not words[0].startswith("--"):
        values.append(words.popleft())
    check_words(option, values, _TYPES)
    return {name: values[0] if is_word(hint) and values[0] != "null" else yaml.safe_load(values[0])}


def _sorted(content: dict[str, Any], place: Path | str) -> dict[str, Any]:
    """One layer: nested, the study's own options in its section, without those of other commands."""
    nested: dict[str, Any] = {}
    for key, value in content.items():
        nested = merged(nested, _nested(str(key).split("."), value), None)
    for section in set(nested) & set(SECTIONS):
        check_keys(place, nested[section], option_names(section), f"{section}.")
    own = {key: nested.pop(key) for key in _STUDY & nested.keys()} | nested.pop("study", {})
    kept = {name for section in SECTIONS for name in option_names(section)} | set(SECTIONS)
    return {key: value for key, value in nested.items() if key in kept} | ({"study": own} if own else {})


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def merged(old: dict[str, Any], new: dict[str, Any], place: str | None = "command line") -> dict[str, Any]:
    """Two layers, the later one winning: what it says at the top also wins over what a section said before.

    Args:
        old: the earlier layer.
        new: the later one.
        place: of the later one, in messages; None: both are parts of one layer.
    """
    top = {key: value for key, value in new.items() if key not in OPTIONS}
    old = {key: _without(value, top, place) if key in SECTIONS else value for key, value in old.items()}
    return _over(old, new, place)


def _without(section: dict[str, Any], top: dict[str, Any], place: str | None) -> dict[str, Any]:
    kept = {}
    for key, value in section.items():
        if key not in top:
            kept[key] = value
        elif key in CLASSES and "class_path" in whole(top[key]):
            former, named = _class_of(key, value), _class_of(key, top[key])
            if same_class(key, former, named):
                kept[key] = _without(whole(value), whole(top[key]), place)
            else:
                say_what_goes(f"{place}: {key} {named}", named, former, settings_of(value), "given before")
        elif isinstance(value, dict) and isinstance(top[key], dict):
            kept[key] = _without(value, top[key], place)
    return kept


def _over(old: Any, new: Any, place: str | None) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    over = {
        key: _over_class(key, old[key], value, place)
        if key in CLASSES and old.get(key)
        else _over(old.get(key), value, place)
        for key, value in new.items()
    }
    return {**old, **over}


def _over_class(option: str, old: Any, new: Any, place: str | None) -> Any:
    """Another class brings its own options; the same class, and one that is named in the same layer, keeps them."""
    before, after = whole(old), whole(new)
    if before == {"init_args": old} and after == {"init_args": new}:
        return {**old, **new}
    former = _class_of(option, old)
    named = after.get("class_path", former)
    if place is not None and not same_class(option, named, former):
        say_what_goes(f"{place}: {option} {named}", named, former, settings_of(before), "given before")
        return new
    parts = {part for part in ("init_args", "dict_kwargs") if part in {**before, **after}}
    return {**before, **after, **{part: {**(before.get(part) or {}), **(after.get(part) or {})} for part in parts}}


def _class_of(option: str, value: Any) -> str:
    return whole(value).get("class_path", CLASSES[option][0]["class_path"])


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
