"""How far a reader walks: what one distillation step passes, and how deep imports go. `python -m dalikd.tools.distance`

The step is a warm one of cutmixpick_teacher, over JPEGs of 32 pixels that DALI reads, on the CPU. Threads beside it
(DALI's callback, the planner) count as well. Imports are read from the source, local ones and those for types included.
"""

import ast
import sys
import threading
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any, NamedTuple

__all__ = ["LIMITS", "Distance", "circles", "imports", "longest_chain", "main", "walk_step"]

_ROOT = Path(__file__).resolve().parents[1]
_ROOMS = ("kd", "pipelines", "trainers", "tools")
_WARM, _LAST, _STEPS = 3, 6, 20  # those from _WARM to _LAST count; batches ahead of them lie in the same epoch


class Distance(NamedTuple):
    """A count of each kind."""

    functions: int  # of the project, that one step passes
    files: int  # that these lie in
    chain: int  # files on the longest chain of imports


LIMITS = Distance(65, 17, 12)


# -------------------------------------------------------------------------------------------------------- a step


@cache
def _project_file(name: str) -> str | None:
    """A code object's file, from the project's root; None of any other."""
    path = Path(name).resolve()
    inside = path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _ROOMS
    return path.relative_to(_ROOT).as_posix() if inside and path != Path(__file__).resolve() else None


class _Listener:
    """Notes the project's functions that are called while a warm step runs, and those that other threads call from then
    on: what they make for a step they make before or after it.

    Args:
        step: the step's code.
    """

    def __init__(self, step: CodeType) -> None:
        self._step, self._started, self._inside = step, 0, False
        self.passed: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if code is self._step and event in ("call", "return"):  # not what it calls in C
            self._started += event == "call"
            self._inside = event == "call"
        if event != "call" or not _WARM < self._started <= _LAST:
            return
        if threading.current_thread() is threading.main_thread() and not self._inside:
            return
        file = _project_file(code.co_filename)
        if file is not None and "<" not in code.co_name:  # comprehensions and lambdas belong to what holds them
            self.passed.add((file, code.co_qualname))


def walk_step() -> dict[str, list[str]]:
    """The functions of the project that one distillation step passes, by file."""
    import torch

    from dalikd.kd.backbones import create_model
    from dalikd.pipelines.files import write_atomically
    from dalikd.tools.cli import parse
    from dalikd.tools.distill import distill
    from dalikd.trainers.loop import Loop

    listener = _Listener(Loop.step.__code__)
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = create_model("resnet8", 10).state_dict()
        write_atomically(Path(folder, "teacher.pt"), lambda file: torch.save(weights, file), sync=False)
        arguments = {
            "data.name": "digits", "data.limit": 32 * _STEPS, "data.val_limit": 32, "data.threads": 1,
            "model": "resnet8", "teacher.name": "resnet8", "teacher.weights": f"{folder}/teacher.pt",
            "augmentation": "cutmixpick_teacher", "batch_size": 32, "mix.group": 16, "epochs": 1, "device": "cpu",
            "output": f"{folder}/run",
        }  # fmt: skip
        threading.setprofile(listener)
        sys.setprofile(listener)
        try:
            with redirect_stdout(StringIO()):
                distill(*parse("distill", [f"--{name}={value}" for name, value in arguments.items()]))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    files: defaultdict[str, list[str]] = defaultdict(list)
    for file, function in sorted(listener.passed):
        files[file].append(function)
    return dict(files)


# ------------------------------------------------------------------------------------------------------- imports


def imports(root: Path = _ROOT) -> dict[str, set[str]]:
    """For each file of the project those that it imports, wherever in the file."""
    paths = [path for room in _ROOMS for path in sorted((root / room).rglob("*.py"))]
    modules = {_module(path.relative_to(root)): path.relative_to(root).as_posix() for path in paths}
    return {name: {modules[one] for one in _imported(root / name, modules)} - {name} for name in modules.values()}


def _module(path: Path) -> str:
    return ".".join(("dalikd", *path.with_suffix("").parts)).removesuffix(".__init__")


def _imported(path: Path, modules: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inner & modules.keys()  # a module of a package
            if node.module in modules and not inner <= modules.keys():  # and names that the package itself holds
                yield node.module


def longest_chain(graph: Mapping[str, set[str]]) -> list[str]:
    """The longest path of imports, each file importing the next one; of a graph without a circle."""

    @cache
    def chain(file: str) -> list[str]:
        return [file, *max(map(chain, sorted(graph[file])), key=len, default=[])]

    return max(map(chain, graph), key=len, default=[])


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Files that import each other over any number of steps, one list for each such knot."""

    @cache
    def reached(file: str) -> frozenset[str]:
        found, waiting = set(), [file]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return frozenset(found)

    knots = {frozenset({file, *(other for other in reached(file) if file in reached(other))}) for file in graph}
    return sorted(sorted(knot) for knot in knots if len(knot) > 1)


def climbs(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports that go up: pipelines and kd know nothing of each other and of trainers, and these nothing of tools. How
    files are read and written, all know."""
    above = {"pipelines": ("kd", "trainers", "tools"), "kd": ("pipelines", "trainers", "tools"), "trainers": ("tools",)}
    return [
        f"{file} imports {other}"
        for file, others in graph.items()
        for other in sorted(others)
        if other.partition("/")[0] in above.get(file.partition("/")[0], ()) and other != "pipelines/files.py"
    ]


# ------------------------------------------------------------------------------------------------ the command line


def main(argv: Sequence[str] | None = None) -> int:
    """Print both distances; 1 where one is above its limit."""
    parser = ArgumentParser("python -m dalikd.tools.distance", description="How far a reader walks.")
    parser.add_argument("--list", action="store_true", help="the functions by file, and the chain")
    listed = parser.parse_args(argv).list
    graph = imports()
    knots, upward = circles(graph), climbs(graph)
    chain = [] if knots else longest_chain(graph)
    passed = walk_step()
    found = Distance(sum(map(len, passed.values())), len(passed), len(chain))
    if listed:
        for file, functions in passed.items():
            print(f"{file} ({len(functions)}): {', '.join(functions)}")
        print(" -> ".join(chain))
    print(f"one step passes {found.functions} functions (at most {LIMITS.functions}) in {found.files} files", end=" ")
    print(f"(at most {LIMITS.files}); the longest chain of imports has {found.chain} files (at most {LIMITS.chain})")
    print(
        "\n".join([*(f"a circle of imports: {', '.join(knot)}" for knot in knots), *upward]),
        end="\n" * bool(knots or upward),
    )
    return int(bool(knots or upward) or any(number > limit for number, limit in zip(found, LIMITS, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
