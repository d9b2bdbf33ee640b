"""A study made ready: its cells with their options, checked, weighed and dealt before anything is computed."""

import json
import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dalikd.tools.cli import parse
from dalikd.tools.study_checks import Opened, check_cell, check_teacher
from dalikd.tools.study_config import ONE_CALL, Reading
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.study.options import Pair, StudyOptions, chosen_pairs, read_pairs
from dalikd.trainers.study.plan import Axes, Cell, deal, plan
from dalikd.trainers.study.work import Work

__all__ = ["Study", "cell_command", "make_ready"]

_VARIED = ("seed", "epoch_factor", "augmentation")  # what cells of one kind differ in, and where they lie


class Study(NamedTuple):
    """A study that can be run.

    Attributes:
        options: its own.
        shared: what all cells share, as a config file would hold it.
        path: the config file that messages name.
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

    options: StudyOptions
    shared: dict[str, Any]
    path: Path
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

    @property
    def config(self) -> dict[str, Any]:
        """What makes it this study and no other: a config file that every command of a cell reads."""
        own = {name: value for name, value in asdict(self.options).items() if name not in ONE_CALL}
        return {**self.shared, "study": own}


def make_ready(reading: Reading) -> Study:
    """Plan a study and check all of it.

    Raises:
        ValueError, OSError: an option, a net, a weights file or the data are not as they should be.
    """
    options = replace(reading.options, augmentation=augmentation_names(reading.options.augmentation))
    pairs = read_pairs(options, "train" in reading.shared)
    chosen = chosen_pairs(pairs, options.pair)
    kinds, opened = _Kinds(reading), Opened()
    trained = kinds.parse("train", [])
    folder = Path(options.output or f"runs/study-{trained.data.name}")
    measured = kinds.parse("measure", [])
    axes, stops_early = _axes(options, measured, opened), measured.stop_confidence is not None
    every = plan(pairs, axes, folder, trained.ema, stops_early=stops_early)
    costs = {cell.name: check_cell(cell, kinds.options(cell), opened) for cell in every}
    _check_teachers(pairs, every, kinds, opened, download=not (options.dry_run or options.report))
    cells = plan(chosen, axes, folder, trained.ema, stops_early=stops_early)
    shards = deal({cell.name: costs[cell.name].flops for cell in cells}, options.share()[1])
    return Study(
        options, reading.shared, reading.path, pairs, axes, folder, cells, every, costs, shards, kinds.all(), opened
    )


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


def cell_command(study: Study, cell: Cell) -> str:
    """The command line that does the same as a cell."""
    words = ["dalikd", cell.command, "--config", str(study.kept), *cell.words(study.folder)]
    return shlex.join(words)


class _Kinds:
    """Options of cells. Cells that differ in seed, length and augmentation alone are parsed once."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parsed: dict[str, Any] = {}

    def parse(self, command: str, words: list[str]) -> Any:
        return parse(command, words, self._reading.shared, self._reading.path)[0]

    def all(self) -> list[Any]:
        """Of cells, one of each kind."""
        return list(self._parsed.values())

    def options(self, cell: Cell) -> Any:
        varied = {key: value for key, value in cell.settings.items() if key in _VARIED}
        if "manifold_mixup" in str(varied.get("augmentation")):
            del varied["augmentation"]  # of its own kind: --compile auto is settled by it
        kind = replace(cell, name="", settings={k: v for k, v in cell.settings.items() if k not in varied})
        key = json.dumps([kind.command, kind.settings])
        if key not in self._parsed:
            self._parsed[key] = self.parse(kind.command, kind.words(Path()))
        try:
            return replace(self._parsed[key], **varied)
        except ValueError as error:
            raise ValueError(f"{cell.name}: {error}") from error
