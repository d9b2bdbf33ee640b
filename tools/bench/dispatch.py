"""`dalikd bench NAME`: finds the benchmark's file and hands over."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BENCHMARKS", "Planned", "main"]

BENCHMARKS = {
    "loader": "decode and augment: images a second of dalikd's loader and of others that do the same work",
    "step": "a training step: real data against resident batches, teacher and student, waits",
    "host": "the main thread in a training step: microseconds of Python an image, operators a step",
    "teacher": "dalikd measure against its teacher alone: what loading, mixing, picking and the metric cost",
    "passes": "dalikd measure: all augmentations in one pass over the data against a pass for each",
    "published": "the training step against the published CutMixPick loop, one habit at a time",
    "scaling": "one process against several: images a second and efficiency",
    "first-hour": "what a new GPU machine is asked first, within nine minutes",
    "all": "those of this machine, one after the other, into one folder",
}


class Planned(NamedTuple):
    """A command that `dalikd bench all` runs.

    A benchmark's `plan(root: Path) -> list[Planned]` names its commands for a folder `root` of class folders with
    photos. `all` adds `--output FOLDER` and starts each in a process of its own.

    Attributes:
        arguments: what comes after `dalikd bench NAME`.
        gpus: how many it needs; on a machine with less the command is listed, and not run.
    """

    arguments: tuple[str, ...]
    gpus: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dalikd bench NAME …`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: dalikd bench NAME [options]\n\nbenchmarks:")
        print("\n".join(f"  {known:<10} {text}" for known, text in BENCHMARKS.items()))
        print("\ndalikd bench NAME --help explains every option of a benchmark.")
        sys.exit(0)
    if name not in BENCHMARKS:
        print(f"dalikd bench: error: unknown benchmark {name}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"dalikd.tools.bench.{name.replace('-', '_')}").main(arguments[1:])
