"""What a benchmark writes, how its candidates take turns, and the table of what docs/benchmarks holds."""

import json
import math
import shlex
import statistics
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.progress import progress
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.machine import describe, device_slug, environment, synchronize
from dalikd.tools.summary import give_json
from dalikd.trainers.tracking import check_writable, write_json

LEAST_ROUNDS = 5
RESULTS = Path("runs/bench")  #: where benchmarks write unless told otherwise
_ROOT = Path(__file__).parents[2]
#: the benchmarks of the repository's README.md, by name and variant, and what they are there
_HEADLINES = {
    "loader imagefolder-224": "photos decoded, cropped to 224 pixels, flipped",
    "loader random-32": "images of 32 pixels in memory, cropped, flipped",
    "published resnet56-option-a-resnet8-32-fp32": "a training step with CutMixPick",
    "published resnet56-aux-resnet20-aux-32-fp32": "a training step of HSAKD",
}
_BEGIN, _END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def _command() -> str:
    program, words = Path(sys.argv[0]), sys.argv[1:]
    if program.name == "__main__.py":  # the package's, whose first word is the command, or the benchmarks'
        return shlex.join(["python", "-m", "dalikd" if words[:1] == ["bench"] else "dalikd.tools.bench", *words])
    return shlex.join([program.name, *words])


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
    warm_up: str = "one round of every side."  # what was run and left out of the numbers
    page_cache: str = "no files."  # whether files came from memory
    rows: list[dict[str, Any]] = field(default_factory=list)
    labels: tuple[str, ...] = ()  # the columns that name a row
    plotted: str = ""  # the column that the plot shows
    variant: str = ""  # sets apart records of one benchmark and device, as a part of file names
    images: dict[str, Any] | None = None  # `machine.describe`, where there are any
    notes: list[str] = field(default_factory=list)  # sentences under the table
    command: str = field(default_factory=_command)  # as a user would type it

    @property
    def shown(self) -> dict[str, dict[str, Any]]:
        """The summaries that the plot shows, by the labels of their rows."""
        rows = [row for row in self.rows if isinstance(row.get(self.plotted), Mapping)]
        return {", ".join(str(row[label]) for label in self.labels): row[self.plotted] for row in rows}

    @property
    def medians(self) -> str:
        """The same in a line."""
        found = [f"{name}: {number(cell['median'])}" for name, cell in self.shown.items()]
        return f"{'; '.join(found)} {self.plotted}"

    @property
    def ends(self) -> str:
        """The same of at most five rows; of more, the first and the last, which a list of changes is read by."""
        found = [f"{name}: {number(cell['median'])}" for name, cell in self.shown.items()]
        kept = found if len(found) <= 5 else [found[0], found[-1]]
        return f"{'; '.join(kept)} {self.plotted}"

    def reads(self, source: Source) -> None:
        """Tell of the images that it reads."""
        self.images = describe(source)
        self.page_cache = "no files." if source.arrays is not None else "warm; the first round reads."


class Watch(TorchDispatchMode):
    """Adds up seconds of `clock` (default: CPU time) by the innermost part that runs in the main thread; what runs in
    another thread is one part. While this is entered, also the operators that torch dispatches."""

    AHEAD: ClassVar[str] = "next batch: rows, draws, feed, in a thread"  # in no sum

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.operators: Counter[str] = Counter()
        self._parts: list[str] = []
        self._clock, self._since, self._main = clock, 0.0, threading.get_ident()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._parts and not func.is_view:
            self.operators[self._parts[-1]] += 1
        return func(*args, **(kwargs or {}))

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, charged to a part."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._main:
                before = time.thread_time()
                result = function(*args, **kwargs)
                self.seconds[self.AHEAD] += time.thread_time() - before
                return result
            self._charge()
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._parts.pop()

        return watched

    @contextmanager
    def over(self, places: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Charge methods, given as owner, name and part."""
        with ExitStack() as patches:
            for owner, name, part in places:
                patches.enter_context(patch.object(owner, name, self.of(part, getattr(owner, name))))
            yield

    def _charge(self) -> None:
        now = self._clock()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = self._clock()


def alternate(
    candidates: Mapping[str, Callable[[], float]], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Measure candidates in turn, so that a noisy neighbour hits all of them.

    A warm-up round comes first and is left out. In each round every candidate runs once; who begins rotates.

    Args:
        candidates: name -> measures once and returns a rate or a time; the device must have finished.
        rounds: that count: so many numbers are returned by name.
        before: called before each measurement, such as `machine.settle`.
    """
    names, values = list(candidates), {name: [] for name in candidates}
    with progress("rounds", total=len(names) * (rounds + 1), unit=" runs", leave=False) as bar:
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                bar.set_description(name if turn else f"{name} (warm-up)")
                before()
                values[name].append(candidates[name]())
                bar.update()
    return {name: found[1:] for name, found in values.items()}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work, the device having finished before and after."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of repetitions: {"median", "low", "high", "repetitions", "values"}."""
    numbers = [float(value) for value in values]
    spread = {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
    return {**spread, "repetitions": len(numbers), "values": numbers}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The `summary` of ours / theirs, round by round: what disturbs a round disturbs both."""
    return summary([one / other for one, other in zip(ours, theirs, strict=True)])


def begin(benchmark: str, options: Any, accelerator: Accelerator, config: Mapping[str, Any], **known: Any) -> Record:
    """The record of a benchmark that is about to run, with what is `known` of it; `options` have rounds and output.

    Raises ValueError: too few rounds, several processes (but for the step), or an output that cannot be written.
    """
    if options.rounds < LEAST_ROUNDS:
        raise ValueError(f"--rounds {options.rounds}: give at least {LEAST_ROUNDS}, a spread needs repetitions")
    if accelerator.num_processes > 1 and benchmark != "step":
        raise ValueError(f"bench {benchmark} measures one process: start it without a launcher")
    output, device = Path(options.output or RESULTS), accelerator.device
    check_writable("--output", output if output.suffix == ".json" else output / "x.json")
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}
    return Record(benchmark, environment=environment(device), device=device_slug(device), config=plain, **known)


def finish(record: Record, options: Any) -> None:
    """Print and write a record."""
    print(markdown(record))
    print("written:", *write(record, Path(options.output or RESULTS)))
    give_json(options.json, asdict(record))


def write(record: Record, output: Path) -> list[Path]:
    """Write JSON, Markdown and, where a column is plotted, a PNG; into a folder, under a name made of date, benchmark,
    variant and device, or beside a path that ends in .json."""
    parts = record.environment["date"], record.benchmark, record.variant, record.device
    path = output if output.suffix == ".json" else output / f"{'-'.join(part for part in parts if part)}.json"
    write_json(path, asdict(record))
    write_atomically(path.with_suffix(".md"), markdown(record).encode())
    kinds = (".json", ".md", ".png") if record.shown else (".json", ".md")
    if record.shown:
        _plot(record, path.with_suffix(".png"))
    return [path.with_suffix(kind) for kind in kinds]


def load(path: Path) -> Record | None:
    """Read a record's JSON; None for a file of another kind."""
    content = json.loads(path.read_text("utf-8"))
    return Record(**{**content, "labels": tuple(content["labels"])}) if "benchmark" in content else None


def markdown(record: Record) -> str:
    """A record as a document: title, machine, table, notes, command."""
    found = {"dali": record.environment.get("nvidia-dali-cuda120"), **record.environment}  # as called before 2026-12
    names = {"python": "Python", "torch": "torch", "torchvision": "torchvision", "dali": "DALI", "cuda": "CUDA"}
    versions = ", ".join(f"{name} {found[key]}" for key, name in names.items() if key in found)
    facts = [
        f"{_where(found, '; ')} available, {found['memory_gib']:.0f} GiB, load average {found['load_average'][0]} at "
        f"the start. {versions}. Commit {found['commit']}, {found['date']}.",
        "Median of the repetitions; lowest and highest in brackets. "
        f"Warm-up: {record.warm_up} Page cache: {record.page_cache}",
    ]
    if images := record.images:
        size = images.get("encoded_bytes")
        encoded = f", {size['median'] / 1000:.0f} kB (95 % below {size['p95'] / 1000:.0f} kB)" if size else ""
        sides = f"{images['width']['median']:.0f} x {images['height']['median']:.0f}"
        facts.append(f"Images: {images['number']:,}, median {sides} pixels{encoded}.")
    parts = [f"# {record.title}", "\n".join(facts), table(record.rows), "\n".join(f"- {n}" for n in record.notes)]
    return "\n\n".join([*filter(None, parts), f"```bash\n{record.command}\n```"]) + "\n"


def _where(found: Mapping[str, Any], after: str) -> str:
    gpu = "" if found["device"].startswith("CPU") else f"{found['device']}{after}"
    return f"{gpu}{found['cpu']}, {found['cores_available']} cores"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [any(not isinstance(row.get(key), str | None) for row in rows) for key in columns]
    cells = ([_cell(row.get(key)) for key in columns] for row in rows)
    lines = [f"| {' | '.join(line)} |" for line in (columns, *cells)]
    lines.insert(1, f"|{'|'.join('--:' if right else ':--' for right in numeric)}|")
    return "\n".join(lines)


def _cell(cell: Any) -> str:
    if isinstance(cell, Mapping):
        return "{} ({} to {})".format(*(number(cell[name]) for name in ("median", "low", "high")))
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return number(cell)
    return "" if cell is None else str(cell).replace("|", "\\|")


def number(value: float) -> str:
    """Three or four digits that mean something; whole numbers stay whole."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _plot(record: Record, path: Path) -> None:
    """One bar a row, top first, its median beside it; whiskers from the lowest to the highest repetition."""
    from matplotlib.figure import Figure

    names, cells = list(record.shown), list(record.shown.values())
    figure = Figure(figsize=(9, 1.5 + 0.36 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    ranges = [[abs(cell[end] - cell["median"]) for cell in cells] for end in ("low", "high")]
    middle, looks = [cell["median"] for cell in cells], {"color": "#0072B2", "ecolor": "#333333", "capsize": 3}
    bars = axes.barh(names, middle, xerr=ranges, **looks)
    axes.bar_label(bars, [number(cell["median"]) for cell in cells], padding=4, fontsize=9)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    # of the figure, not of the axes: these may be narrow beside long labels
    whiskers = f"median; whiskers: lowest and highest of {cells[0]['repetitions']} repetitions"
    figure.supxlabel(f"{record.plotted}  ({whiskers})", fontsize=10)
    figure.suptitle(textwrap.fill(record.title, 110), x=0.01, ha="left", fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def check_names(option: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    """The names, each once; "all" stands for every known one. Raises ValueError: a name is unknown."""
    wanted = dict.fromkeys(name for entry in names for name in (known if entry == "all" else [entry]))
    for name in (name for name in wanted if name not in known):
        close = [f"did you mean {other}? " for other in get_close_matches(name, known, n=1)]
        raise ValueError(f"{option} {name} is unknown: {''.join(close)}there are {', '.join(known)}")
    return list(wanted)


def write_tables(folder: Path = _ROOT / "docs/benchmarks", check: bool = False, readme: Path | None = None) -> None:
    """Write the newest record of each benchmark and device into a folder's README.md, between its two marks, and the
    headlines among them into the README.md of the repository.

    Args:
        folder: of the records and the README.md.
        check: change nothing, and fail if a README.md is not up to date.
        readme: that of the headlines; default: the repository's, for its own folder.
    """
    records = [(record, path.stem) for path in sorted(folder.glob("*.json")) if (record := load(path)) is not None]
    records.sort(key=lambda pair: pair[0].environment["time"])
    newest = {(record.benchmark, record.variant, record.device): (record, stem) for record, stem in records}
    rows, headlines = [], []
    for record, stem in (newest[key] for key in sorted(newest)):
        where = f"{_where(record.environment, ', ')}, {record.environment['date']}"
        rows.append({"what": f"[{record.title}]({stem}.md)", "medians": record.medians, "where, when": where})
        if what := _HEADLINES.get(f"{record.benchmark} {record.variant}"):
            headlines.append({"what": what, "medians": record.ends, "where, when": where})
    _renew(folder / "README.md", rows, check)
    if readme is None and folder == _ROOT / "docs/benchmarks":
        readme = _ROOT / "README.md"
    if readme is not None:
        _renew(readme, headlines, check)


def _renew(path: Path, rows: Sequence[Mapping[str, Any]], check: bool) -> None:
    """Put a table between the two marks of a file."""
    text = path.read_text("utf-8")
    before, begins, rest = text.partition(_BEGIN)
    _, ends, after = rest.partition(_END)
    if not begins or not ends:
        raise ValueError(f"{path} lacks the marks {_BEGIN} and {_END}: put them where the tables should stand")
    wanted = before + _BEGIN + (f"\n\n{table(rows)}\n\n" if rows else "\n") + _END + after
    if check and wanted != text:
        raise ValueError(f"{path} is not up to date: run dalikd bench tables")
    write_atomically(path, wanted.encode())
