"""The command line of every command: a class of options in, one call, one-line errors out."""

import json
import os
import signal
import sys
import threading
from argparse import ArgumentError
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings  # pyright: ignore[reportPrivateImportUsage]

from dalikd.pipelines.doctor import printable
from dalikd.tools import choose_threads
from dalikd.tools.bench.options import PublishedOptions, ScalingOptions, StepOptions, TeacherOptions
from dalikd.tools.classes import CLASSES, find_class, same_class, say_what_goes, settings_of, whole
from dalikd.tools.signature import check_words, check_yaml, element, expand_path, expand_paths, is_word, option_types
from dalikd.trainers.evaluate import EvaluateOptions
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.stopping import Interrupted, lack_of_memory
from dalikd.trainers.study.options import StudyOptions
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.supervised import TrainOptions
from dalikd.trainers.teacher_cache.fill import CacheOptions

__all__ = [
    "OPTIONS",
    "build_parser",
    "check_keys",
    "guarded",
    "option_names",
    "parse",
    "read_config",
    "run_command",
    "run_function",
    "split_equals",
    "value_of",
    "values_of",
]

#: The commands that read config files, and their options. A config may hold options of any of them.
OPTIONS: dict[str, type] = {
    "train": TrainOptions,
    "distill": DistillOptions,
    "measure": MeasureOptions,
    "cache": CacheOptions,
    "evaluate": EvaluateOptions,
    "study": StudyOptions,
    "bench step": StepOptions,
    "bench scaling": ScalingOptions,
    "bench teacher": TeacherOptions,
    "bench passes": TeacherOptions,
    "bench published": PublishedOptions,
}
# benchmarks of a command: from a config they take its section too, and leave its run folder alone
_BENCHMARKS_OF = {
    "bench step": "distill",
    "bench scaling": "distill",
    "bench teacher": "measure",
    "bench passes": "measure",
    "bench published": "distill",
}
# options that take several words
_LISTS = {
    "measure": ("augmentation", "metrics"),
    "study": ("augmentation", "seeds", "epoch_factor", "pair"),
    "bench scaling": ("processes",),
}


class _Piece(NamedTuple):
    """A part of a command line: an option with its value, or what a config file holds for the command."""

    words: list[str]
    path: Path | None = None
    content: Mapping[str, Any] = {}

    def to_words(self) -> list[str]:
        """What the parser reads."""
        if self.path is None:
            return self.words
        return ["--config", yaml.safe_dump(dict(self.content), default_flow_style=True, width=1 << 30)]

    def get(self, option: str) -> Any:
        """What is said of a class option in it: a class, options of one, or both; None: nothing."""
        if self.path is None:
            name, value = self.words[0].removeprefix("--"), self.words[-1]
            if name in (option, f"{option}.class_path") and len(self.words) > 1:
                return yaml.safe_load(value) if value.startswith("{") else value
            inner = name.removeprefix(f"{option}.").removeprefix("init_args.")
            return {"init_args": {inner: value}} if name.startswith(f"{option}.") and inner != "help" else None
        dotted = {
            key.removeprefix(f"{option}."): self.content[key] for key in self.content if key.startswith(f"{option}.")
        }
        given = whole(self.content.get(option))
        return {**given, "init_args": {**(given.get("init_args") or {}), **dotted}} if dotted else given or None

    def without(self, option: str) -> "_Piece":
        """The same without it."""
        kept = {key: value for key, value in self.content.items() if key.split(".")[0] != option}
        return self._replace(words=[], content=kept)


def run_command(command: str, function: Callable[[Any, dict[str, Any]], Any], argv: Sequence[str] | None = None) -> Any:
    """Parse a command line and call the command; a user's mistake ends the process with one line and exit code 2.

    Args:
        command: a name in OPTIONS.
        function: takes the options and the resolved config.
        argv: the arguments; default: sys.argv's.
    """
    with guarded(command):
        options = parse(command, sys.argv[1:] if argv is None else argv)
        choose_threads()
        return function(*options)


def run_function(
    name: str,
    function: Callable[..., Any],
    argv: Sequence[str] | None = None,
    *,
    options: type | None = None,
    lists: Collection[str] = (),
    positional: bool = False,
) -> None:
    """Call a function whose signature is its command line, with the same one-line errors.

    Args:
        name: what comes after `dalikd` in messages.
        function: its parameters are the options.
        argv: the arguments; default: sys.argv's.
        options: a dataclass whose fields are the options, if the function takes one of them in their place.
        lists: names of the options that take several words.
        positional: parameters without a default are given without their name.
    """
    component = options or function
    types = option_types(component)
    with guarded(name):
        parser = _new_parser(f"dalikd {name}", component, positional=positional)
        words = sys.argv[1:] if argv is None else argv
        pieces = _expand(words, types, lists, partial(_own_config, types=types, lists=lists), positional=positional)
        if options is not None:
            function(_read(parser, pieces, types, options)[0])
        else:
            _, values = _read(parser, pieces, types, dict)
            function(**values.as_dict())


@contextmanager
def guarded(command: str) -> Iterator[None]:
    """End the process with one line where a user can mend things; DALIKD_TRACEBACK=1 shows where it came from.

    Exit codes: 2 for a mistake, 128 and the signal's number for a signal. SIGTERM unwinds the stack, so that temporary
    folders go.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no name of a file may end a run by being printed
    alone = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if alone else None
    try:
        yield
    except (ArgumentError, ValueError, OSError, yaml.YAMLError, RuntimeError, MemoryError) as error:
        lack = lack_of_memory(error)
        if os.environ.get("DALIKD_TRACEBACK") or (isinstance(error, RuntimeError) and lack is None):
            raise
        message = " ".join((lack or str(error)).split()) or type(error).__name__
        print(f"dalikd {command}: error: {printable(message)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        after = " (what torch.distributed.elastic prints next is its report of that, no failure)" if launched else ""
        _say_stopped(f"dalikd {command}: {printable(str(stop))}{after}")
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        _say_stopped(f"dalikd {command}: stopped (Ctrl-C)")
        sys.exit(128 + signal.SIGINT)
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminate(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _say_stopped(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # a launcher's processes are stopped together
        print(line, file=sys.stderr)


def parse(
    command: str, argv: Sequence[str], content: dict[str, Any] | None = None, path: Path = Path("config")
) -> tuple[Any, dict[str, Any]]:
    """Read config files and arguments, later ones winning.

    Args:
        command: a name in OPTIONS.
        argv: the arguments.
        content: what a config file would hold, read before the arguments.
        path: its name in messages.

    Returns:
        the options, and the same as plain values (what config.yaml holds).

    Raises:
        ValueError, ArgumentError: an unknown key, a wrong value.
        FileNotFoundError: no such config file.
    """
    parser, types = build_parser(command), option_types(OPTIONS[command])
    folders = {"--resume", "--verify"} & {f"--{name}" for name in types}
    pieces = [] if content is None else _config_pieces(command, path, content)
    pieces += _expand(argv, types, _lists(command), partial(_read_config, command), folders)
    # a run is not gone on with as another class: that is an error, and no note
    resumes = any(piece.words[:1] == ["--resume"] for piece in pieces)
    for name in CLASSES.keys() & types.keys():
        pieces, default = _settle(name, pieces, silent=resumes)
        parser.set_defaults({name: default})
    options, config = _read(parser, pieces, types, OPTIONS[command])
    plain = yaml.safe_load(parser.dump(config))
    for name in ("resume", "overwrite", "verify"):  # of one call: later ones that read this config say them themselves
        plain.pop(name, None)
    return options, plain


def build_parser(command: str) -> ArgumentParser:
    """The parser of a command, made from its options class."""
    parser = _new_parser(f"dalikd {command}", OPTIONS[command])
    names = option_names(command)
    parser.set_defaults({name: default for name, (default, _) in CLASSES.items() if name in names})
    return parser


def _new_parser(prog: str, component: Callable[..., Any], *, positional: bool = False) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (component.__doc__ or "").partition("Args:")[0].strip()
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of options; may be repeated, later ones win"
    )
    if isinstance(component, type):
        parser.add_class_arguments(component)
    else:
        parser.add_function_arguments(component, as_group=False, as_positional=positional)
    return parser


def _settle(option: str, pieces: list[_Piece], *, silent: bool) -> tuple[list[_Piece], dict[str, Any]]:
    """Take out what was given for another class than the one that is named last, and say so unless silent.

    On one command line all options are of the class that it names, whatever their order.

    Returns:
        the pieces, and what the option is before they are read.
    """
    default, _ = CLASSES[option]
    pieces, former, current = list(pieces), [], default["class_path"]
    for index, piece in enumerate(pieces):
        given = piece.get(option)
        if given is None:
            continue
        named = str(whole(given).get("class_path", current))
        if not same_class(option, named, current):
            gone = [i for i in former if piece.path or pieces[i].path or "class_path" in whole(pieces[i].get(option))]
            lost = {name: value for i in gone for name, value in settings_of(pieces[i].get(option)).items()}
            places = dict.fromkeys(str(pieces[i].path or "the command line") for i in gone)
            where = f"--{option} {named}" if piece.path is None else f"{piece.path}: {option} {named}"
            if "." not in named and find_class(option, named) is None:
                raise ValueError(f"{where}: there is no such class; give its whole path, such as {current}")
            if not silent and find_class(option, named) is not None:  # else the parser says what is wrong with it
                say_what_goes(where, named, current, lost, ", ".join(places))
            for i in gone:
                pieces[i] = pieces[i].without(option)
            former, current = [i for i in former if i not in gone], named
        former.append(index)
    pieces = [piece for piece in pieces if piece.words or piece.content]
    own = same_class(option, current, default["class_path"]) or find_class(option, current) is None
    return pieces, default if own else {"class_path": current}


def option_names(command: str) -> set[str]:
    """The options of a command."""
    return {field.name for field in fields(OPTIONS[command]) if field.init}


def _read(
    parser: ArgumentParser, pieces: Sequence[_Piece], types: Mapping[str, Any], make: Callable[..., Any]
) -> tuple[Any, Any]:
    """The options that pieces give, made of their values, and these values.

    Raises:
        ValueError: a piece is wrong; a config file is named, if it is one that cannot be read after what precedes it.
    """

    def read(count: int) -> tuple[Any, Any]:
        config = parser.parse_args([word for piece in pieces[:count] for word in piece.to_words()])
        del config["config"]
        expand_paths(config, types)
        try:
            values = parser.instantiate(config)
        except ValueError as error:
            raise ValueError(f"--loss: {error}") from error  # of all options it alone is made here
        return make(**vars(values)), config

    try:
        return read(len(pieces))
    except (ArgumentError, ValueError) as error:
        for count, piece in enumerate(pieces, start=1):
            try:
                read(count)
            except (ArgumentError, ValueError) as same:
                if str(same) == str(error):
                    place = "" if piece.path is None else f"{piece.path}: "
                    raise ValueError(f"{place}{error}") from error
        raise ValueError(str(error)) from error


def _expand(
    argv: Sequence[str],
    types: Mapping[str, Any],
    lists: Collection[str],
    read: Callable[[str], list[_Piece]],
    folders: Collection[str] = (),
    *,
    positional: bool = False,
) -> list[_Piece]:
    """Take a command line apart. The content of config files takes their place; that of a folder goes in front.

    Args:
        argv: the arguments.
        types: of the options, by their dotted names.
        lists: names of the options that take several words.
        read: makes pieces of a config file.
        folders: options that name a folder whose config.yaml is read.
        positional: words may stand without an option.
    """
    expanded: list[_Piece] = []
    resumed: list[_Piece] = []
    words = deque(split_equals(argv))
    while words:
        option = words.popleft()
        if option == "--config":
            expanded += read(value_of(option, words))
        elif option in folders:
            folder = expand_path(option, value_of(option, words))
            resumed = [*read(str(_folder_config(option, folder))), _Piece(["--output", folder])]
            expanded.append(_Piece([option, folder]))
        elif option.startswith("--") and option.removeprefix("--") in lists:
            values = values_of(option, words)
            expanded.append(_Piece([option, _as_list(values, types[option.removeprefix("--")])]))
        else:
            values = []
            while option.startswith("--") and words and not words[0].startswith("--") and not (positional and values):
                values.append(words.popleft())
            check_words(option, values, types)
            # a value may begin with a dash
            expanded.append(
                _Piece([f"{option}={values[0]}"] if len(values) == 1 and values[0][:1] == "-" else [option, *values])
            )
    return resumed + expanded


def split_equals(argv: Sequence[str]) -> list[str]:
    """Take `--option=value` apart, but for what the parser alone reads."""
    whole = ("--print_config", "--help")
    pieces = (
        word.split("=", 1) if word.startswith("--") and not word.startswith(whole) and ".help=" not in word else [word]
        for word in argv
    )
    return [piece for split in pieces for piece in split]


def value_of(option: str, words: deque[str]) -> str:
    """Take the word after an option."""
    if not words:
        raise ValueError(f"{option} needs a value")
    return words.popleft()


def values_of(option: str, words: deque[str]) -> list[str]:
    """Take all words up to the next option; commas and brackets divide too."""
    values: list[str] = []
    while words and not words[0].startswith("--"):
        values += words.popleft().strip("[]").replace(",", " ").replace('"', " ").replace("'", " ").split()
    if not values:
        raise ValueError(f"{option} needs at least one value")
    return values


def _as_list(values: Sequence[str], hint: Any) -> str:
    return json.dumps(values) if is_word(element(hint)) else f"[{', '.join(values)}]"


def _folder_config(option: str, folder: str) -> Path:
    path, kind = Path(folder) / "config.yaml", "run" if option == "--resume" else "teacher cache"
    if not path.exists():
        raise FileNotFoundError(f"{option} {folder}: there is no {kind} ({path} is missing); name a {kind} folder")
    return path


def _read_config(command: str, name: str) -> list[_Piece]:
    """A config file's options for one command, then its section for it. Options of sibling commands are left out."""
    path, content = read_config(name)
    return _config_pieces(command, path, content)


def _own_config(name: str, types: Mapping[str, Any], lists: Collection[str]) -> list[_Piece]:
    """A config file of a command that shares none with others."""
    path, content, text = _load(name)
    check_yaml(f"{path}: ", content, text, _possible(types, lists))
    return [_config_piece(lists, path, content)]


def read_config(name: str) -> tuple[Path, dict[str, Any]]:
    """What a config file holds: options, and sections named after commands. All keys are known; and the file's path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, a key that no command has, or a number where a word is meant.
    """
    path, content, text = _load(name)
    content = {key: content[key] or {} if key in OPTIONS else content[key] for key in content}
    shared = {key: value for key, value in content.items() if key not in OPTIONS}
    check_keys(path, shared, _all_names())
    possible: dict[str, list[Any]] = {}
    for command in OPTIONS:
        for option, hints in _possible(option_types(OPTIONS[command]), _lists(command)).items():
            possible.setdefault(option, []).extend(hints)
    check_yaml(f"{path}: ", shared, text, possible)
    for section in OPTIONS.keys() & content.keys():
        if not isinstance(content[section], dict):
            raise ValueError(f"{path}: {section} must hold options as `name: value` lines")
        check_keys(path, content[section], option_names(section), f"{section}.")
        types = _possible(option_types(OPTIONS[section]), _lists(section))
        check_yaml(f"{path}: {section}.", content[section], text[section], types)
    return path, content


def _load(name: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A config file's path and content, and the same with every scalar as it is written."""
    path = Path(expand_path("--config", name))
    if not path.is_file():
        raise FileNotFoundError(f"--config {name}: no such file")
    text = path.read_text("utf-8")
    try:
        content, written = yaml.safe_load(text) or {}, yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines")
    return path, content, written


def _possible(types: Mapping[str, Any], lists: Collection[str]) -> dict[str, list[Any]]:
    """The types that options may have in a config: one value is enough for those that take several words."""
    return {name: [hint, element(hint)] if name in lists else [hint] for name, hint in types.items()}


def _config_pieces(command: str, path: Path, content: dict[str, Any]) -> list[_Piece]:
    sections = {key: content[key] for key in OPTIONS if key in content}
    shared = {key: value for key, value in content.items() if key not in OPTIONS}
    layers = [_known(command, shared), sections.get(command, {})]
    if command in _BENCHMARKS_OF:
        layers.insert(1, _known(command, sections.get(_BENCHMARKS_OF[command], {})))
    return [_config_piece(_lists(command), path, layer) for layer in layers if layer]


def _all_names() -> set[str]:
    return {name for command in OPTIONS for name in option_names(command)}


def _known(command: str, content: dict[str, Any]) -> dict[str, Any]:
    """Those options of several commands that one takes."""
    names = option_names(command) - ({"output"} if command in _BENCHMARKS_OF else set())
    return {key: value for key, value in content.items() if key.split(".")[0] in names}


def _lists(command: str) -> tuple[str, ...]:
    """Those options of a command that take several words."""
    return _LISTS.get(command, ()) or _LISTS.get(_BENCHMARKS_OF.get(command, ""), ())


def _config_piece(lists: Collection[str], path: Path, layer: dict[str, Any]) -> _Piece:
    return _Piece(
        [], path, layer | {key: [layer[key]] for key in lists if isinstance(layer.get(key), str | int | float)}
    )


def check_keys(path: Path | str, content: dict[str, Any], known: set[str], prefix: str = "") -> None:
    """Raise ValueError for the first key that is not known, with those that are spelled alike."""
    for key in content:
        if str(key).split(".")[0] not in known:
            close = get_close_matches(str(key), known | set(OPTIONS), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"{path}: unknown key {prefix}{key}{hint}")
