"""The command line of every command: a class of options in, one call, one-line errors out."""

import json
import os
import sys
from argparse import ArgumentError
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, auto_cli, set_parsing_settings  # pyright: ignore[reportPrivateImportUsage]

from dalikd.pipelines.doctor import printable
from dalikd.tools.bench.teacher_options import PublishedOptions, TeacherOptions
from dalikd.tools.bench.training import ScalingOptions, StepOptions
from dalikd.trainers.options import CacheOptions, DistillOptions, EvaluateOptions, MeasureOptions, TrainOptions
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.study.options import StudyOptions

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
_DEFAULTS = {
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
    "loss": {"class_path": "dalikd.kd.losses.KD"},
}
# options that take several words
_LISTS = {"measure": ("augmentation", "metrics"), "study": ("augmentation", "seeds", "epoch_factor", "pair")}


class _Piece(NamedTuple):
    """Words of a command line, and the config file they come from."""

    words: list[str]
    path: Path | None = None


def run_command(command: str, function: Callable[[Any, dict[str, Any]], Any], argv: Sequence[str] | None = None) -> Any:
    """Parse a command line and call the command; a user's mistake ends the process with one line and exit code 2.

    Args:
        command: a name in OPTIONS.
        function: takes the options and the resolved config.
        argv: the arguments; default: sys.argv's.
    """
    with guarded(command):
        return function(*parse(command, sys.argv[1:] if argv is None else argv))


def run_function(
    name: str, function: Callable[..., Any], argv: Sequence[str] | None = None, *, positional: bool = False
) -> None:
    """Call a function whose signature is its command line, with the same one-line errors.

    Args:
        name: what comes after `dalikd` in messages.
        function: its parameters are the options.
        argv: the arguments; default: sys.argv's.
        positional: parameters without a default are given without their name.
    """
    arguments = None if argv is None else list(argv)
    with guarded(name):
        auto_cli(function, args=arguments, prog=f"dalikd {name}", exit_on_error=False, as_positional=positional)


@contextmanager
def guarded(command: str) -> Iterator[None]:
    """End the process with one line where a user can mend things; DALIKD_TRACEBACK=1 shows where it came from."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no name of a file may end a run by being printed
    try:
        yield
    except (ArgumentError, ValueError, OSError) as error:
        if os.environ.get("DALIKD_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"dalikd {command}: error: {printable(message)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        after = " (what torch.distributed.elastic prints next is its report of that, no failure)" if launched else ""
        print(f"dalikd {command}: {printable(str(stop))}{after}", file=sys.stderr)
        sys.exit(128 + stop.signal)


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
    parser = build_parser(command)
    pieces = [] if content is None else _config_pieces(command, path, content)
    pieces += _expand(command, list(argv))
    optimizer = _named_optimizer([word for piece in pieces if piece.path is None for word in piece.words])
    if optimizer not in (None, "SGD", "torch.optim.SGD"):  # its own defaults, not SGD's learning rate and weight decay
        parser.set_defaults({"optimizer": {"class_path": optimizer}})
    config = _parse_pieces(parser, pieces)
    del config["config"]
    plain = yaml.safe_load(parser.dump(config))
    for name in ("resume", "overwrite", "verify"):  # of one call: later ones that read this config say them themselves
        plain.pop(name, None)
    return _as_options(command, parser.instantiate(config)), plain


def build_parser(command: str) -> ArgumentParser:
    """The parser of a command, made from its options class."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    options = OPTIONS[command]
    description = (options.__doc__ or "").partition("Args:")[0].strip()
    parser = ArgumentParser(prog=f"dalikd {command}", description=description, exit_on_error=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of options; may be repeated, later ones win"
    )
    parser.add_class_arguments(options)
    names = option_names(command)
    parser.set_defaults({name: value for name, value in _DEFAULTS.items() if name in names})
    return parser


def _named_optimizer(words: list[str]) -> str | None:
    named = [after for word, after in pairwise(words) if word == "--optimizer"]
    named += [word.partition("=")[2] for word in words if word.startswith("--optimizer=")]
    return named[-1] if named else None


def _as_options(command: str, namespace: Any) -> Any:
    return OPTIONS[command](**{name: namespace[name] for name in option_names(command)})


def option_names(command: str) -> set[str]:
    """The options of a command."""
    return {field.name for field in fields(OPTIONS[command]) if field.init}


def _parse_pieces(parser: ArgumentParser, pieces: list[_Piece]) -> Any:
    try:
        return parser.parse_args([word for piece in pieces for word in piece.words])
    except ArgumentError as error:
        raise ValueError(_culprit(parser, pieces) + str(error)) from error


def _culprit(parser: ArgumentParser, pieces: list[_Piece]) -> str:
    """The config file, of those that were given, that cannot be parsed after the ones before it."""
    words: list[str] = []
    for piece in pieces:
        if piece.path is None:
            continue
        words += piece.words
        try:
            parser.parse_args(words)
        except ArgumentError:
            return f"{piece.path}: "
    return ""


def _expand(command: str, argv: list[str]) -> list[_Piece]:
    """Replace each `--config FILE` by its content for this command; that of a folder gone on with in front."""
    of_folders = {"--resume", "--verify"} & {f"--{name}" for name in option_names(command)}
    several = {f"--{name}" for name in _lists(command)}
    expanded: list[_Piece] = []
    resumed: list[_Piece] = []
    words = deque(split_equals(argv))
    while words:
        option = words.popleft()
        if option == "--config":
            expanded += _read_config(command, value_of(option, words))
        elif option in of_folders:
            folder = value_of(option, words)
            resumed = _read_config(command, str(_folder_config(option, folder)))
            expanded.append(_Piece([option, folder, "--output", folder]))
        elif option in several:
            expanded.append(_Piece([option, json.dumps(values_of(option, words))]))
        else:
            expanded.append(_Piece([option]))
    return resumed + expanded


def split_equals(argv: Sequence[str]) -> list[str]:
    """Take `--option=value` apart, where the option is read here and not by the parser."""
    lists = {name for names in _LISTS.values() for name in names}
    special = ("--config=", "--resume=", "--verify=", *(f"--{name}=" for name in lists))
    pieces = (argument.split("=", 1) if argument.startswith(special) else [argument] for argument in argv)
    return [piece for split in pieces for piece in split]


def value_of(option: str, words: deque[str]) -> str:
    """Take the word after an option."""
    if not words:
        raise ValueError(f"{option} needs a value")
    return words.popleft()


def values_of(option: str, words: deque[str]) -> list[str]:
    """Take all words up to the next option; commas divide too."""
    values: list[str] = []
    while words and not words[0].startswith("--"):
        values += words.popleft().replace(",", " ").split()
    if not values:
        raise ValueError(f"{option} needs at least one value")
    return values


def _folder_config(option: str, folder: str) -> Path:
    path, kind = Path(folder) / "config.yaml", "run" if option == "--resume" else "teacher cache"
    if not path.exists():
        raise FileNotFoundError(f"{option} {folder}: there is no {kind} ({path} is missing); name a {kind} folder")
    return path


def _read_config(command: str, name: str) -> list[_Piece]:
    """A config file's options for one command, then its section for it. Options of sibling commands are left out."""
    return _config_pieces(command, Path(name), read_config(name))


def read_config(name: str) -> dict[str, Any]:
    """What a config file holds: options, and sections named after commands. All keys are known.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, or a key that no command has.
    """
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--config {name}: no such file")
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines")
    content = {key: content[key] or {} if key in OPTIONS else content[key] for key in content}
    check_keys(path, {key: value for key, value in content.items() if key not in OPTIONS}, _all_names())
    for section in OPTIONS.keys() & content.keys():
        if not isinstance(content[section], dict):
            raise ValueError(f"{path}: {section} must hold options as `name: value` lines")
        check_keys(path, content[section], option_names(section), f"{section}.")
    return content


def _config_pieces(command: str, path: Path, content: dict[str, Any]) -> list[_Piece]:
    sections = {key: content[key] for key in OPTIONS if key in content}
    shared = {key: value for key, value in content.items() if key not in OPTIONS}
    layers = [_known(command, shared), sections.get(command, {})]
    if command in _BENCHMARKS_OF:
        layers.insert(1, _known(command, sections.get(_BENCHMARKS_OF[command], {})))
    return [_config_piece(command, path, layer) for layer in layers if layer]


def _all_names() -> set[str]:
    return {name for command in OPTIONS for name in option_names(command)}


def _known(command: str, content: dict[str, Any]) -> dict[str, Any]:
    """Those options of several commands that one takes."""
    names = option_names(command) - ({"output"} if command in _BENCHMARKS_OF else set())
    return {key: value for key, value in content.items() if key.split(".")[0] in names}


def _lists(command: str) -> tuple[str, ...]:
    """Those options of a command that take several words."""
    return _LISTS.get(_BENCHMARKS_OF.get(command, command), ())


def _config_piece(command: str, path: Path, layer: dict[str, Any]) -> _Piece:
    layer = layer | {key: [layer[key]] for key in _lists(command) if isinstance(layer.get(key), str | int | float)}
    return _Piece(["--config", yaml.safe_dump(layer, default_flow_style=True, width=1 << 30)], path)


def check_keys(path: Path | str, content: dict[str, Any], known: set[str], prefix: str = "") -> None:
    """Raise ValueError for the first key that is not known, with those that are spelled alike."""
    for key in content:
        if str(key).split(".")[0] not in known:
            close = get_close_matches(str(key), known | set(OPTIONS), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"{path}: unknown key {prefix}{key}{hint}")
