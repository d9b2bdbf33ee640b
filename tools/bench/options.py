"""What the benchmarks' command lines share: lists of words, and checks."""

import json
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

__all__ = ["LEAST_ROUNDS", "RESULTS", "check_alone", "check_names", "check_rounds", "listed", "run_options"]

LEAST_ROUNDS = 5
RESULTS = Path("runs/bench")  #: where benchmarks write unless told otherwise


def run_options(
    name: str,
    options: type,
    function: Callable[[Any], Any],
    argv: Sequence[str] | None = None,
    lists: Collection[str] = (),
) -> None:
    """Fill a dataclass of options from the command line and call the benchmark; mistakes end in one line.

    Args:
        name: of the benchmark.
        options: a dataclass whose fields are the options.
        function: takes the options.
        argv: the arguments; default: sys.argv's.
        lists: names of the options that take several words.
    """
    from dalikd.tools.cli import guarded  # not above: it reads the options of other benchmarks, which use this file

    with guarded(f"bench {name}"):
        words = listed(sys.argv[1:] if argv is None else argv, lists)
        function(auto_cli(options, args=words, prog=f"dalikd bench {name}", exit_on_error=False))


def listed(argv: Sequence[str], options: Collection[str]) -> list[str]:
    """Let options take several words: `--backends a b` and `--backends a,b` become `--backends ["a", "b"]`.

    Args:
        argv: the arguments.
        options: names of the options, without dashes, that take a list.

    Raises:
        ValueError: one of them has no word.
    """
    words = deque(argv)
    result: list[str] = []
    while words:
        option, equals, value = words.popleft().partition("=")
        if option.removeprefix("--") not in options or not option.startswith("--"):
            result.append(option + equals + value)
            continue
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.popleft())
        result += [option, _as_list(option, values)]
    return result


def check_names(option: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    """The names, each once; "all" stands for every known one.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = [name for entry in names for name in (known if entry == "all" else [entry])]
    for name in wanted:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{option} {name} is unknown: {hint}there are {', '.join(known)}")
    return list(dict.fromkeys(wanted))


def check_alone(benchmark: str, processes: int) -> None:
    """Some benchmarks are of one process.

    Raises:
        ValueError: there are several.
    """
    if processes > 1:
        raise ValueError(f"bench {benchmark} measures one process: start it without a launcher")


def check_rounds(rounds: int) -> None:
    """A median with its range needs repetitions.

    Raises:
        ValueError: there are too few.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"--rounds {rounds}: give at least {LEAST_ROUNDS}, a spread needs repetitions")


def _as_list(option: str, values: Sequence[str]) -> str:
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    words = [word for value in values for word in value.replace(",", " ").split()]
    if not words:
        raise ValueError(f"{option} needs at least one value")
    return json.dumps([int(word) if word.isdecimal() else word for word in words])
