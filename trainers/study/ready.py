"""A study made ready: its cells with their options, checked, weighed and dealt before anything is computed."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.study.checks import Opened, check_cell, check_teacher
from dalikd.trainers.study.options import Pair, StudyOptions, chosen_pairs, read_pairs
from dalikd.trainers.study.plan import Axes, Cell, deal, plan
from dalikd.trainers.study.work import Work

__all__ = ["COMMANDS", "ONE_CALL", "Reading", "Study", "make_ready"]

#: the commands that cells are calls of
COMMANDS = ("train", "evaluate", "measure", "distill")
#: options of the study that do not change what comes out
ONE_CALL = ("pair", "shard", "dry_run", "report", "poll_seconds", "output")
_VARIED = ("seed", "epoch_factor", "augmentation")  # what cells of one kind differ in, and where they lie


class Reading(NamedTuple):
    """A study as it was asked for.

    Attributes:
        options: its own, with each augmentation by its name.
        shared: what all its cells share, of each command: what is not as it would be without a word, as plain values.
        read: gives the options of a command for a cell, and the same as plain values: what all cells share, under
            some options by their dotted names.
        reread: gives the config of a study, in its present form, from the file that keeps it.
        trains_teachers: whether it says how a teacher without weights is trained.
    """

    options: StudyOptions
    shared: dict[str, dict[str, Any]]
    read: Callable[[str, Mapping[str, Any]], tuple[Any, dict[str, Any]]]
    reread: Callable[[Path], dict[str, Any]]
    trains_teachers: bool

    @property
    def config(self) -> dict[str, Any]:
        """What makes it this study and no other: a config file that every command of a cell reads."""
        own = {name: value for name, value in asdict(self.options).items() if name not in ONE_CALL}
        return {**self.shared, "study": own}


class Study(NamedTuple):
    """A study that can be run.

    Attributes:
        reading: what it was made of.
        pairs: all of them.
        axes: what they are tried with.
        folder: where it is written.
        cells: those of this call's pairs.
        every: those of all pairs.
        work: what each cell computes.
        shards: the shard of each cell of this call.
        kinds: options of cells, one of each kind.
        opened: the data.
    """

    reading: Reading
    pairs: list[Pair]
    axes: Axes
    folder: Path
    cells: list[Cell]
    every: list[Cell]
    work: dict[str, Work]
    shards: dict[str, int]
    kinds: list[Any]
    opened: Opened

    @property
    def kept(self) -> Path:
        """The file that keeps its config."""
        return self.folder / "config.yaml"


def make_ready(reading: Reading) -> Study:
    """Plan a study and check all of it.

    Raises:
        ValueError, OSError: an option, a net, a weights file or the data are not as they should be.
    """
    options = reading.options
    pairs = read_pairs(options, reading.trains_teachers)
    chosen = chosen_pairs(pairs, options.pair)
    kinds, opened = _Kinds(reading), Opened()
    trained, measured = reading.read("train", {})[0], reading.read("measure", {})[0]
    folder = Path(options.output or f"runs/study-{trained.data.name}")
    axes, stops_early = _axes(options, measured, opened), measured.stop_confidence is not None
    every = plan(pairs, axes, folder, trained.ema, stops_early=stops_early)
    costs = {cell.name: check_cell(cell, kinds.options(cell), opened) for cell in every}
    _check_teachers(pairs, every, kinds, opened, download=not (options.dry_run or options.report))
    cells = plan(chosen, axes, folder, trained.ema, stops_early=stops_early)
    shards = deal({cell.name: costs[cell.name].flops for cell in cells}, options.share()[1])
    return Study(reading, pairs, axes, folder, cells, every, costs, shards, list(kinds.known.values()), opened)


def _check_teachers(pairs: list[Pair], cells: list[Cell], kinds: "_Kinds", opened: Opened, *, download: bool) -> None:
    asking = {cell.name.split("/")[1]: cell for cell in cells if cell.command == "distill"}
    for index, pair in enumerate(pairs):
        place, trained = f"pairs[{index}].teacher", pair.teacher.weights is None
        options = kinds.options(asking[pair.label])
        check = partial(check_teacher, place, options, opened, trained=trained, download=download)
        opened.once(asdict(pair.teacher), check)


def _axes(options: StudyOptions, measured: MeasureOptions, opened: Opened) -> Axes:
    augmenters = [opened.augmenter(name, measured) for name in options.augmentation]
    scored = {made.name: made.criterion is not None and made.criterion.needs_student for made in augmenters}
    return Axes(scored, tuple(options.seeds), tuple(options.epoch_factor))


class _Kinds:
    """Options of cells. Cells that differ in seed, length and augmentation alone are read once."""

    def __init__(self, reading: Reading) -> None:
        self._read = reading.read
        self.known: dict[str, Any] = {}

    def options(self, cell: Cell) -> Any:
        """Of a cell, but for the place of its result."""
        varied = {key: value for key, value in cell.settings.items() if key in _VARIED}
        if "manifold_mixup" in str(varied.get("augmentation")):
            del varied["augmentation"]  # of its own kind: --compile auto is settled by it
        shared = {key: value for key, value in cell.settings.items() if key not in varied}
        key = json.dumps([cell.command, shared])
        if key not in self.known:
            self.known[key], _ = self._read(cell.command, shared)
        try:
            return replace(self.known[key], **varied)
        except ValueError as error:
            raise ValueError(f"{cell.name}: {error}") from error
