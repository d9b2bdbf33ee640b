"""`dalikd bench all`: the benchmarks of this machine, one after the other, into one folder."""

import importlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dalikd.tools.bench.dispatch import BENCHMARKS, Planned
from dalikd.tools.bench.options import RESULTS
from dalikd.tools.cli import run_function
from dalikd.trainers.tracking import check_writable

__all__ = ["main", "planned", "run"]


def run(root: Path, output: Path = RESULTS, only: list[str] | None = None, dry: bool = False) -> None:
    """Run every benchmark's plan for this machine, each command in a process of its own.

    A command that needs more GPUs than there are is named and not run. One that fails does not stop the others.

    Args:
        root: class folders of photos; on a GPU at least 512 of them, better more than the page cache holds (copy them
            with python -m dalikd.tools.bench.images).
        output: folder of all that is written.
        only: benchmarks to run; default: every one.
        dry: list the commands and run nothing.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is not a folder: name one that holds class folders with photos")
    check_writable("--output", output / "x.json")
    gpus = torch.cuda.device_count()
    failed = []
    for name, step in planned(root, only):
        command = ["-m", f"dalikd.tools.bench.{name}", *step.arguments, "--output", str(output)]
        line = f"python {shlex.join(command)}"
        if step.gpus > gpus:
            print(f"not run, as it needs {step.gpus} GPU(s) and this machine has {gpus}: {line}", flush=True)
            continue
        print(line, flush=True)
        if not dry and subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(line)
    if failed:
        raise ValueError(f"{len(failed)} of the benchmarks failed: {'; '.join(failed)}")


def planned(root: Path, only: Sequence[str] | None = None) -> list[tuple[str, Planned]]:
    """Every command of every benchmark that has a plan.

    Raises:
        ValueError: a name in `only` is no benchmark.
    """
    names = [name for name in BENCHMARKS if name not in ("first-hour", "all")]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise ValueError(f"--only {unknown[0]} is no benchmark: there are {', '.join(names)}")
    commands = []
    for name in only or names:
        module = importlib.import_module(f"dalikd.tools.bench.{name}")
        commands += [(name, step) for step in module.plan(root)]
    return commands


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("bench all", run, argv, lists=("only",))


if __name__ == "__main__":
    main()
