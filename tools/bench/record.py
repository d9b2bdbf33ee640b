"""What a benchmark writes, and how its candidates take turns."""

import json
import math
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dalikd.pipelines.progress import progress
from dalikd.tools.bench.machine import device_slug, environment, synchronize
from dalikd.trainers.tracking import check_writable, write_json

__all__ = [
    "LEAST_ROUNDS", "RESULTS", "Record", "alternate", "begin", "finish", "load", "markdown", "medians", "number",
    "ratio", "summary", "table", "timed", "write",
]  # fmt: skip

LEAST_ROUNDS = 5
RESULTS = Path("runs/bench")  #: where benchmarks write unless told otherwise
# Okabe and Ito's colours, which stay apart for the colour-blind; the first is ours
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


@dataclass
class Record:
    """What a benchmark has found, and what that depends on.

    The keys of a row are the columns' heads, with their units. A cell is a word, a number, a `summary`, or None.
    """

    benchmark: str  # as in `dalikd bench NAME`
    title: str = ""  # one line: what was measured
    environment: dict[str, Any] = field(default_factory=dict)  # `machine.environment`, taken before the work
    device: str = "cpu"  # where it ran, as a part of file names
    config: dict[str, Any] = field(default_factory=dict)  # the options, as plain values
    warm_up: str = ""  # what was run and left out of the numbers
    page_cache: str = "no files."  # whether files came from memory
    rows: list[dict[str, Any]] = field(default_factory=list)
    labels: tuple[str, ...] = ()  # the columns that name a row
    plotted: str = ""  # the column that the plot shows
    variant: str = ""  # sets apart records of one benchmark and device, as a part of file names
    pictures: dict[str, Any] | None = None  # `images.describe`, where there are any
    notes: list[str] = field(default_factory=list)  # sentences under the table
    command: str = field(default_factory=lambda: _command())

    @property
    def stem(self) -> str:
        """Name of its files: date, benchmark, variant, device."""
        return "-".join(part for part in (self.environment["date"], self.benchmark, self.variant, self.device) if part)

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The rows that the plot shows."""
        return [row for row in self.rows if is_summary(row.get(self.plotted))]


# ------------------------------------------------------------------------------------------------ measuring


def alternate(
    candidates: Mapping[str, Callable[[], float]], rounds: int, before: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Measure candidates in turn, so that a noisy neighbour hits all of them.

    A warm-up round comes first and is left out. In each round every candidate runs once; who begins rotates.

    Args:
        candidates: name -> measures once and returns a rate or a time; the device must have finished.
        rounds: that count: so many numbers are returned by name.
        before: called before each measurement, such as `machine.settle`.
    """
    names = list(candidates)
    values: dict[str, list[float]] = {name: [] for name in names}
    with progress("rounds", total=len(names) * (rounds + 1), unit=" runs", leave=False) as bar:
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                bar.set_description(name if number else f"{name} (warm-up)")
                if before is not None:
                    before()
                value = candidates[name]()
                if number:
                    values[name].append(value)
                bar.update()
    return values


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work, the device having finished before and after."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of repetitions: {"median", "low", "high", "repetitions", "values"}; of finite numbers alone."""
    numbers = [float(value) for value in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a benchmark's repetitions must be finite numbers, not {numbers}")
    median, low, high = statistics.median(numbers), min(numbers), max(numbers)
    return {"median": median, "low": low, "high": high, "repetitions": len(numbers), "values": numbers}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The `summary` of ours / theirs, round by round: what disturbs a round disturbs both."""
    return summary([one / other for one, other in zip(ours, theirs, strict=True)])


def is_summary(cell: Any) -> bool:
    """Whether a cell holds repetitions."""
    return isinstance(cell, Mapping) and {"median", "low", "high"} <= set(cell)


# ------------------------------------------------------------------------------------------------- writing


def begin(
    benchmark: str, options: Any, accelerator: Accelerator, config: dict[str, Any], *, alone: bool = True
) -> Record:
    """The record of a benchmark that is about to run; `options` have rounds and output, `config` holds plain values.

    Raises:
        ValueError: too few rounds, several processes where it runs alone, or an output that can be neither the folder
            nor the JSON file.
    """
    if options.rounds < LEAST_ROUNDS:
        raise ValueError(f"--rounds {options.rounds}: give at least {LEAST_ROUNDS}, a spread needs repetitions")
    if alone and accelerator.num_processes > 1:
        raise ValueError(f"bench {benchmark} measures one process: start it without a launcher")
    output, device = Path(options.output or RESULTS), accelerator.device
    check_writable("--output", output if output.suffix == ".json" else output / "x.json")
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}
    return Record(benchmark, environment=environment(device), device=device_slug(device), config=plain)


def finish(record: Record, options: Any) -> Record:
    """Print and write a record."""
    print(markdown(record))
    print("written:", *write(record, Path(options.output or RESULTS)))
    return record


def write(record: Record, output: Path) -> list[Path]:
    """Write JSON, Markdown and, where a column is plotted, a PNG; into a folder, under the record's own name, or beside
    a path that ends in .json."""
    path = output if output.suffix == ".json" else output / f"{record.stem}.json"
    write_json(path, asdict(record))
    paths = [path, path.with_suffix(".md")]
    paths[1].write_text(markdown(record), "utf-8")
    if record.shown:
        paths.append(path.with_suffix(".png"))
        _plot(record, paths[2])
    return paths


def load(path: Path) -> Record | None:
    """Read a record's JSON; None for a file of another kind. Raises ValueError for one that is broken."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): write it again or remove it") from error
    if "benchmark" not in content:
        return None
    try:
        return Record(**{**content, "labels": tuple(content["labels"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is no record of a benchmark ({error}): write it again or remove it") from error


def markdown(record: Record) -> str:
    """A record as a document: title, machine, table, notes, command."""
    found = record.environment
    gpu = "" if found["device"].startswith("CPU") else f"{found['device']}; "
    dali = {"dali": found.get("nvidia-dali-cuda120")}  # as records of before 2026-12 call it
    names = {"python": "Python", "torch": "torch", "torchvision": "torchvision", "dali": "DALI"}
    versions = [f"{name} {(dali | found)[key]}" for key, name in names.items()]
    versions += [f"CUDA {found['cuda']}"] if found.get("cuda") else []
    facts = [
        f"{gpu}{found['cpu']}, {found['cores_available']} cores available, {found['memory_gib']:.0f} GiB, load average "
        f"{found['load_average'][0]} at the start. {', '.join(versions)}. Commit {found['commit']}, {found['date']}.",
        "Median of the repetitions; lowest and highest in brackets. "
        f"Warm-up: {record.warm_up} Page cache: {record.page_cache}",
    ]
    if images := record.pictures:
        size = images.get("encoded_bytes")
        encoded = f", {size['median'] / 1000:.0f} kB (95 % below {size['p95'] / 1000:.0f} kB)" if size else ""
        sides = f"{images['width']['median']:.0f} x {images['height']['median']:.0f}"
        facts.append(f"Images: {images['number']:,}, median {sides} pixels{encoded}.")
    parts = [f"# {record.title}", "\n".join(facts), table(record.rows)]
    parts += ["\n".join(f"- {note}" for note in record.notes)] if record.notes else []
    return "\n\n".join([*parts, f"```bash\n{record.command}\n```"]) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [any(not isinstance(row.get(key), str | None) for row in rows) for key in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("--:" if right else ":--" for right in numeric) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows)])


def medians(record: Record) -> list[str]:
    """What a record's plot shows, row by row: "NAME: MEDIAN"."""
    names = [", ".join(str(row[label]) for label in record.labels) for row in record.shown]
    values = [number(row[record.plotted]["median"]) for row in record.shown]
    return [f"{name}: {value}" for name, value in zip(names, values, strict=True)]


def number(value: float) -> str:
    """Three or four digits that mean something; whole numbers stay whole."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _cell(cell: Any) -> str:
    if is_summary(cell):
        return "{} ({} to {})".format(*(number(cell[name]) for name in ("median", "low", "high")))
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return number(cell)
    return "" if cell is None else str(cell).replace("|", "\\|")


def _command() -> str:
    """The command line as a user would type it."""
    program, *arguments = sys.argv
    parts = Path(program).parts
    if program.endswith(".py") and "tools" in parts:  # python -m
        name = ".".join(("dalikd", *parts[parts.index("tools") :])).removesuffix(".py").removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *arguments])
    return shlex.join([Path(program).name, *arguments])


def _plot(record: Record, path: Path) -> None:
    """One bar a row, top first, its median beside it; whiskers from the lowest to the highest repetition. Rows with the
    same last label share a colour."""
    from matplotlib.figure import Figure

    values = [row[record.plotted] for row in record.shown]
    series = [row[record.labels[-1]] for row in record.shown]
    names = list(dict.fromkeys(series))
    shared = len(names) < len(series)
    middle, highest, places = [one["median"] for one in values], max(one["high"] for one in values), range(len(values))
    ranges = [[abs(one[end] - one["median"]) for one in values] for end in ("low", "high")]
    figure = Figure(figsize=(9, 1.5 + 0.36 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    colors = [_COLORS[names.index(one) % len(_COLORS) if shared else 0] for one in series]
    axes.barh(places, middle, height=0.72, color=colors)
    axes.errorbar(middle, places, xerr=ranges, fmt="none", ecolor="#333333", elinewidth=1.2, capsize=3)
    for place, one in zip(places, values, strict=True):
        axes.text(one["high"] + 0.01 * highest, place, number(one["median"]), va="center", fontsize=9)
    axes.set_xlim(0, 1.12 * highest)
    axes.set_yticks(places, [" · ".join(str(row[label]) for label in record.labels) for row in record.shown])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    # of the figure, not of the axes: these may be narrow beside long labels
    whiskers = f"median; whiskers: lowest and highest of {values[0]['repetitions']} repetitions"
    figure.supxlabel(f"{record.plotted}  ({whiskers})", fontsize=10)
    figure.suptitle(textwrap.fill(record.title, 110), x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)


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
