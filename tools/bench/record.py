"""What a benchmark writes, and how its repetitions are taken."""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dalikd.pipelines.progress import progress
from dalikd.tools.bench.plots import bars
from dalikd.trainers.tracking import check_writable, write_json

__all__ = [
    "Record",
    "alternate",
    "check_output",
    "is_summary",
    "load",
    "markdown",
    "number",
    "ratio",
    "summary",
    "table",
    "write",
]


@dataclass
class Record:
    """What a benchmark has found, and what that depends on.

    The keys of a row are the columns' heads, with their units. A cell is a word, a number, a `summary`, or None where
    there is nothing to say; a row that this machine cannot run says so in words.

    Attributes:
        benchmark: its name, e.g. "loader".
        title: one line that says what was measured.
        environment: `machine.environment`, taken before the work.
        device: `machine.device_slug`: where it ran, as a part of file names.
        config: the options, as plain values.
        warm_up: one sentence: what was run and left out of the numbers.
        page_cache: one sentence: whether files came from memory; "no files" where none are read.
        rows: of the table, top first.
        labels: the columns that name a row.
        plotted: the column that the plot shows.
        variant: sets apart benchmarks of one name and device, e.g. "photos-224"; part of file names.
        pictures: `images.describe`, where there are any.
        notes: sentences under the table.
        command: the command line.
    """

    benchmark: str
    title: str
    environment: dict[str, Any]
    device: str
    config: dict[str, Any]
    warm_up: str
    page_cache: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    plotted: str = ""
    variant: str = ""
    pictures: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    command: str = field(default_factory=lambda: _command())

    @property
    def stem(self) -> str:
        """Name of its files: date, benchmark, variant, device."""
        return "-".join(part for part in (self.environment["date"], self.benchmark, self.variant, self.device) if part)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of repetitions: {"median", "low", "high", "repetitions", "values"}.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    numbers = [float(value) for value in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a benchmark's repetitions must be finite numbers, not {numbers}")
    return {
        "median": statistics.median(numbers),
        "low": min(numbers),
        "high": max(numbers),
        "repetitions": len(numbers),
        "values": numbers,
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The `summary` of ours / theirs, round by round: what disturbs a round disturbs both."""
    return summary([one / other for one, other in zip(ours, theirs, strict=True)])


def is_summary(cell: Any) -> bool:
    """Whether a cell holds repetitions."""
    return isinstance(cell, Mapping) and {"median", "low", "high"} <= set(cell)


def alternate(
    sides: Mapping[str, Callable[[], float]], rounds: int, before: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Measure sides in turn, so that a noisy neighbour hits all of them.

    A warm-up round comes first and is left out. In each round every side runs once; who begins rotates.

    Args:
        sides: name -> measures once and returns the number (a rate or a time; the device must have finished).
        rounds: that count.
        before: called before each measurement, e.g. `machine.settle`.

    Returns:
        name -> the measured numbers, one a round.
    """
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    turns = [names[first:] + names[:first] for first in (number % len(names) for number in range(rounds + 1))]
    with progress("rounds", total=len(names) * (rounds + 1), unit=" runs", leave=False) as bar:
        for number, order in enumerate(turns):
            for name in order:
                bar.set_description(name if number else f"{name} (warm-up)")
                if before is not None:
                    before()
                value = sides[name]()
                if number:
                    values[name].append(value)
                bar.update()
    return values


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [any(not isinstance(row.get(key), str | None) for row in rows) for key in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("--:" if right else ":--" for right in numeric) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows)])


def markdown(record: Record) -> str:
    """A record as a document: title, machine, table, notes, command."""
    environment = record.environment
    facts = [
        f"{_machine(environment)}. {_versions(environment)}. Commit {environment['commit']}, {environment['date']}.",
        f"Median of the repetitions; lowest and highest in brackets. Warm-up: {record.warm_up} "
        f"Page cache: {record.page_cache}",
    ]
    if record.pictures:
        facts.append(_pictures(record.pictures))
    parts = [f"# {record.title}", "\n".join(facts), table(record.rows)]
    parts += ["\n".join(f"- {note}" for note in record.notes)] if record.notes else []
    return "\n\n".join([*parts, f"```bash\n{record.command}\n```"]) + "\n"


def check_output(output: Path) -> None:
    """Find out before the work whether `write` will be able to.

    Raises:
        ValueError: the path can be neither the folder nor the JSON file.
    """
    check_writable("--output", output if output.suffix == ".json" else output / "x.json")


def write(record: Record, output: Path) -> list[Path]:
    """Write JSON, Markdown and, where a column is plotted, a PNG.

    Args:
        record: what to write.
        output: a folder, in which the files are named after date, benchmark, variant and device; or a path that ends
            in .json, beside which the others lie.

    Returns:
        the paths.
    """
    path = output if output.suffix == ".json" else output / f"{record.stem}.json"
    write_json(path, asdict(record))
    path.with_suffix(".md").write_text(markdown(record), "utf-8")
    shown = [row for row in record.rows if is_summary(row.get(record.plotted))]
    if not shown:
        return [path, path.with_suffix(".md")]
    labels = [" · ".join(str(row[label]) for label in record.labels) for row in shown]
    series = [str(row[record.labels[-1]]) for row in shown]
    bars(path.with_suffix(".png"), labels, [row[record.plotted] for row in shown], record.title, record.plotted, series)
    return [path, path.with_suffix(".md"), path.with_suffix(".png")]


def load(path: Path) -> Record | None:
    """Read a record's JSON; None for a file of another kind.

    Raises:
        ValueError: the file is no JSON, or a record of a form that this version does not know.
    """
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


def _command() -> str:
    """The command line as a user would type it."""
    program, *arguments = sys.argv
    parts = Path(program).parts
    if program.endswith(".py") and "tools" in parts:  # python -m
        below = parts[parts.index("tools") :]
        name = ".".join(("dalikd", *below)).removesuffix(".py").removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *arguments])
    return shlex.join([Path(program).name, *arguments])


def _cell(cell: Any) -> str:
    if cell is None:
        return ""
    if is_summary(cell):
        return f"{number(cell['median'])} ({number(cell['low'])} to {number(cell['high'])})"
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return number(cell)
    return str(cell).replace("|", "\\|")


def number(value: float) -> str:
    """Three or four digits that mean something; whole numbers stay whole."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _machine(environment: Mapping[str, Any]) -> str:
    where = "" if environment["device"].startswith("CPU") else f"{environment['device']}; "
    load = environment["load_average"][0]
    return (
        f"{where}{environment['cpu']}, {environment['cores_available']} cores available, "
        f"{environment['memory_gib']:.0f} GiB, load average {load} at the start"
    )


def _versions(environment: Mapping[str, Any]) -> str:
    names = {"python": "Python", "torch": "torch", "torchvision": "torchvision", "dali": "DALI"}
    known = {"dali": environment.get("nvidia-dali-cuda120"), **environment}  # as records of before 2026-12 call it
    parts = [f"{name} {known[key]}" for key, name in names.items()]
    return ", ".join([*parts, *([f"CUDA {environment['cuda']}"] if environment.get("cuda") else [])])


def _pictures(pictures: Mapping[str, Any]) -> str:
    size = pictures.get("encoded_bytes")
    encoded = f", {size['median'] / 1000:.0f} kB (95 % below {size['p95'] / 1000:.0f} kB)" if size else ""
    return (
        f"Pictures: {pictures['number']:,}, median {pictures['width']['median']:.0f} x "
        f"{pictures['height']['median']:.0f} pixels{encoded}."
    )
