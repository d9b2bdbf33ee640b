"""What the benchmarks' command lines share: where they write, and checks."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

__all__ = ["LEAST_ROUNDS", "ON_GPU", "RESULTS", "check_alone", "check_names", "check_rounds"]

LEAST_ROUNDS = 5
#: of the plans' rows on a GPU: there a step of fewer images, or in eager code, is as long as its launches take
ON_GPU = ("--device", "cuda", "--precision", "bf16", "--batch_size", "384", "--compile", "default")
RESULTS = Path("runs/bench")  #: where benchmarks write unless told otherwise


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
