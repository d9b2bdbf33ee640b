"""The command line of every command: a class of options in, one call, one-line errors out."""

import atexit
import json
import os
import re
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from inspect import Parameter, signature
from io import TextIOWrapper
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings  # pyright: ignore[reportPrivateImportUsage]
from torch import distributed

from dalikd.pipelines.doctor import printable
from dalikd.pipelines.objects import Unavailable
from dalikd.tools import choose_threads
from dalikd.tools.classes import Chosen, check_values
from dalikd.tools.layers import (
    OPTIONS,
    WITH_TASK,
    Grammar,
    Layer,
    grammar,
    named_task,
    options_class,
    read_layers,
    take_apart,
)
from dalikd.tools.restarts import RESTARTED, after_launcher, supervise
from dalikd.tools.signature import expand_paths, option_types
from dalikd.tools.summary import json_asked
from dalikd.trainers.launch import leave
from dalikd.trainers.signals import Asked, obeying, quiet_without_reader, stop_words
from dalikd.trainers.stopping import Interrupted, Watch, lack_of_memory

__all__ = ["build_parser", "guarded", "parse", "resolve", "run_command", "run_function"]

#: Groups of options in the help, in the order of importance. A group without names is one of the options class itself;
#: those that are not here come after them.
_GROUPS: dict[str, tuple[str, ...]] = {
    "data": (),
    "model": (
        *("run", "model", "model_args", "weights", "mean", "std", "reinit"),
        *("freeze_student", "freeze_backbone", "peers"),
    ),
    "teacher": (),
    "method": (
        *("task", "teachers", "teacher_weights", "teacher_ensemble"),
        *("augmentation", "loss", "joint_forward", "label_smoothing", "knn", "metric", "entropy_log_every"),
        *("window", "metrics", "confidence", "stop_confidence", "per_class"),
    ),
    "mix": (),
    "training": (
        *("epochs", "epoch_factor", "batch_size", "accumulation", "optimizer"),
        *("clip_grad_norm", "no_decay_norms", "ema", "sync_bn", "seed"),
    ),
    "schedule": (),
}
#: options of one call, not of the run: later calls that read its config give them themselves
_OF_ONE_CALL = ("import", "resume", "overwrite", "json", "restarts", "verify")
#: how a process has ended, for those that wait for it; which line gives the cause, the user sees
_LEFT = "has ended, as its own line tells"


def run_command(command: str, function: Callable[[Any, dict[str, Any]], Any], argv: Sequence[str] | None = None) -> Any:
    """Parse a command line and call the command; a user's mistake ends the process with one line and exit code 2.

    Args:
        command: a name in `layers.OPTIONS`.
        function: takes the options and the resolved config.
        argv: the arguments; default: sys.argv's.
    """
    with guarded(command):
        words = sys.argv[1:] if argv is None else argv
        options = parse(command, words)
        if command in RESTARTED:
            if options[0].restarts:
                sys.exit(supervise(command, words, options[0]))
            if extra := after_launcher(command, options[0]):
                options = parse(command, [*words, *extra])
        with json_asked(getattr(options[0], "json", None)):
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
    parameters = signature(component).parameters.values() if positional else ()
    places = [parameter.name for parameter in parameters if parameter.default is Parameter.empty]
    form = Grammar(name, option_types(component), lists)
    with guarded(name):
        words = sys.argv[1:] if argv is None else argv
        parser = build_parser(name, component, positional=positional)
        _show_help(parser, words)
        made, _ = _resolved(parser, form, read_layers(words, form, places), options or dict)
        with json_asked(made.get("json") if options is None else getattr(made, "json", None)):
            function(**made) if options is None else function(made)


@contextmanager
def guarded(command: str) -> Iterator[None]:
    """End the process with one line where a user can mend things; DALIKD_TRACEBACK=1 shows where it came from.

    Exit codes are those of `signals.EXIT_CODES`. A signal unwinds the stack, so that temporary folders go.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no name of a file may end a run by being printed
    with obeying("unwind") as asked:
        try:
            with quiet_without_reader():
                yield
        except BaseException as error:
            code = _ending(command, error, asked)
            Watch.leave("well" if isinstance(error, SystemExit) and not error.code else _LEFT)
            if code is None:
                raise
            sys.exit(code)
        Watch.leave()
    atexit.register(leave)  # after an error others may still wait for this process, and it would wait for them


def _ending(command: str, error: BaseException, asked: Asked) -> int | None:
    """Tell in one line how a command ends. Returns its exit code; None: the error goes up as it is."""
    first = os.environ.get("RANK", "0") == "0"  # a launcher's processes are stopped together
    if isinstance(error, SystemExit):
        return None
    if isinstance(error, Interrupted):
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        after = " (what torch.distributed.elastic prints next is its report of that, no failure)" if launched else ""
        code, line, speaks = 128 + error.signal, f"{printable(str(error))}{after}", first
    elif isinstance(error, KeyboardInterrupt) or asked.raised or (asked.number and isinstance(error, RuntimeError)):
        number = asked.number or signal.SIGINT
        code, line, speaks = 128 + number, asked.why or stop_words(number), first
    elif (watch := Watch.one) and isinstance(error, RuntimeError) and (gone := watch.gone(60 * _is_of_group(error))):
        code, line, speaks = 1, gone, watch.speaks
    else:
        lack = lack_of_memory(error) if isinstance(error, Exception) else None
        mendable = isinstance(error, (ArgumentError, ValueError, OSError, yaml.YAMLError, MemoryError)) or lack
        if os.environ.get("DALIKD_TRACEBACK") or not mendable:
            return None
        words = " ".join((lack or str(error)).split()) or type(error).__name__
        passes = isinstance(error, Unavailable) and error.answered
        code, line, speaks = os.EX_TEMPFAIL if passes else 2, f"error: {printable(words)}", True
    asked.said = True
    if speaks:
        with suppress(OSError):  # a closed terminal
            print(f"dalikd {command}: {line}", file=sys.stderr)
    return code


def _is_of_group(error: RuntimeError) -> bool:
    """Whether it may come from another process that is gone: torch has no class for what gloo raises."""
    return isinstance(error, distributed.DistError) or bool(
        re.search(r"gloo|peer|NCCL|[Ss]ocket|timed out", str(error))
    )


def parse(command: str, argv: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Read config files and arguments, later ones winning.

    Args:
        command: a name in `layers.OPTIONS`.
        argv: the arguments.

    Returns:
        the options, and the same as plain values (what config.yaml holds).

    Raises:
        ValueError: an unknown key, a wrong value; names the config file, if it is not on the command line.
        FileNotFoundError: no such config file.
    """
    component = options_class(command, named_task(command, argv))
    parser = build_parser(command, component)
    _show_help(parser, argv)
    options, plain = resolve(command, read_layers(argv, grammar(command, component)))
    for option, values in take_apart(argv):
        if option == "--print_config":  # ends the process
            parser.parse_args(["=".join([option, *values])], namespace=parser.parse_object(plain))
    return options, plain


@cache
def build_parser(
    command: str, component: Callable[..., Any] | None = None, *, positional: bool = False
) -> ArgumentParser:
    """The parser of a command, made from its options class or from a function.

    Args:
        command: what comes after `dalikd`.
        component: the class or function; default: the options class of the command.
        positional: parameters of a function without a default are given without their name.
    """
    component = component or options_class(command)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (component.__doc__ or "").partition("Args:")[0].strip()
    usage = None if positional else f"dalikd {command} [--config FILE] [--OPTION VALUE] …"
    parser = ArgumentParser(prog=f"dalikd {command}", usage=usage, description=description, exit_on_error=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of options; may be repeated, later ones win"
    )
    if command in WITH_TASK:
        text = "class path of an options class of your own, whose task is trained; its fields are options then"
        parser.add_argument("--task", type=str | None, metavar="CLASS_PATH", help=text)
    if command in OPTIONS:
        text = "module whose classes may be named, such as a loss or a task of your own; repeatable. Its code is run"
        parser.add_argument("--import", type=str | None, metavar="MODULE", help=text)
    if isinstance(component, type):
        parser.add_class_arguments(component)
    else:
        parser.add_function_arguments(component, as_group=False, as_positional=positional)
    for action in parser._get_positional_actions():
        if str(action.metavar).startswith("["):  # a list, which the command line takes as words
            action.metavar = f"{action.dest.upper()} …"
    if any(action.dest == "batch_size" for action in parser._actions):
        _order_groups(parser)
    return parser


def _order_groups(parser: ArgumentParser) -> None:
    """Divide the options of a class by what they are for, and put groups in the order of importance."""
    positional, general, *others = parser._action_groups
    flat = next(group for group in others if all("." not in action.dest for action in group._group_actions[:2]))
    groups = {group._group_actions[0].dest: group for group in others if group is not flat}
    left = list(flat._group_actions)
    for title, names in _GROUPS.items():
        if names:
            taken = [action for name in names for action in left if action.dest.removesuffix(".help") == name]
            groups[title] = parser.add_argument_group(title)
            groups[title]._group_actions += taken
            left = [action for action in left if action not in taken]
    flat.title, flat._group_actions[:] = "run", left
    for name, group in groups.items():
        group.title = name if group.title in (None, name) else f"{name}: {group.title}"
    known = [groups.pop(name) for name in _GROUPS if name in groups]
    parser._action_groups = [positional, general, *known, *groups.values(), flat]


def _show_help(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Print the help that is asked for, of the command or of a class, and end the process."""
    for number, word in enumerate(argv):
        option, alone, _ = word.partition("=")
        if option in ("-h", "--help"):
            parser.parse_args([option])
        if option.startswith("--") and option.endswith(".help"):
            parser.parse_args([word] if alone else [word, *argv[number + 1 : number + 2]])


def resolve(command: str, layers: Sequence[Layer]) -> tuple[Any, dict[str, Any]]:
    """The options of a command, and the same as plain values, from layers that were read. Raises ValueError."""
    for layer in layers:
        check_values(layer.content, layer.place)
    tasks = [part["task"] for layer in layers for part in layer.parts(command, ("task",)) if part.get("task")]
    component = options_class(command, tasks[-1] if tasks else None)
    parser = build_parser(command, component)
    options, config = _resolved(parser, grammar(command, component), layers, component)
    plain = json.loads(parser.dump(config, skip_validation=True, format="json"))  # it was checked as it was read
    return options, {
        name: plain[name] for name in plain if name not in _OF_ONE_CALL and (name, plain[name]) != ("task", None)
    }


def _resolved(
    parser: ArgumentParser, form: Grammar, layers: Sequence[Layer], make: Callable[..., Any]
) -> tuple[Any, Namespace]:
    """What layers give, made of their values, and these values."""

    def made(config: Namespace) -> Any:
        try:
            values = vars(parser.instantiate(config))
        except ValueError as error:
            raise ValueError(f"--loss: {error}") from error  # of all options it alone is made here
        return make(**{name: value for name, value in values.items() if name not in ("config", "import", "task")})

    # a run is not gone on with as another class: that is an error, and no note
    parts = [(layer.place, part) for layer in layers for part in layer.parts(form.command, form.names)] or [("", {})]
    model = next((part["model"] for _, part in reversed(parts) if "model" in part), None)
    resumes = any("resume" in layer.content for layer in layers if not layer.place)
    chosen = Chosen(parser, form.names, make, model, silent=resumes)
    config, states = parser.get_defaults(), []
    for number, (place, part) in enumerate(parts, start=1):
        try:
            part, config = deepcopy(part), config.clone()
            expand_paths(part, form.types)
            single = {key: [part[key]] for key in form.lists if isinstance(part.get(key), str | int | float)}
            chosen.settle(part, config, place)
            config = parser.parse_object(part | single, namespace=config, defaults=number == len(parts))
        except (ArgumentError, ValueError, TypeError) as error:  # the last of classes that are not of their kind
            raise _named(error, place) from error
        states.append((place, config))
    del config["config"]
    try:
        return made(config), config
    except ValueError as error:
        for place, state in states:
            try:
                made(state)
            except ValueError as same:
                if str(same) == str(error):
                    raise _named(error, place) from error
        raise


def _named(error: Exception, place: str) -> ValueError:
    return ValueError(f"{place}: {error}" if place else str(error))
