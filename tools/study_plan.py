"""A study made ready: its cells with their options, checked, weighed and dealt before anything is computed."""

import json
import os
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dalikd.kd.backbones import create_model
from dalikd.pipelines.data import open_sources, training_view
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.cli import parse
from dalikd.tools.study_config import ONE_CALL, Reading
from dalikd.trainers.augmentation import Augmenter, augmentation_names
from dalikd.trainers.models import build_model
from dalikd.trainers.options import DistillOptions, MeasureOptions, TrainingOptions
from dalikd.trainers.study.options import Pair, StudyOptions, chosen_pairs, read_pairs
from dalikd.trainers.study.plan import Axes, Cell, deal, plan
from dalikd.trainers.study.work import Sizes, Work, work

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
    kinds, opened = _Kinds(reading), _Opened()
    trained = kinds.parse("train", [])
    folder = Path(options.output or f"runs/study-{trained.data.name}")
    axes = _axes(options, kinds.parse("measure", []), opened)
    every = plan(pairs, axes, folder, trained.ema)
    costs = {cell.name: _check(cell, kinds.options(cell), opened) for cell in every}
    _check_weights(pairs, opened.sources(trained)[0])
    cells = plan(chosen, axes, folder, trained.ema)
    shards = deal({cell.name: costs[cell.name].flops for cell in cells}, options.share()[1])
    return Study(options, reading.shared, reading.path, pairs, axes, folder, cells, every, costs, shards)


def _axes(options: StudyOptions, measured: MeasureOptions, opened: "_Opened") -> Axes:
    augmenters = [opened.augmenter(name, measured) for name in options.augmentation]
    scored = {made.name: made.criterion is not None and made.criterion.needs_student for made in augmenters}
    return Axes(scored, tuple(options.seeds), tuple(options.epoch_factor))


def cell_command(study: Study, cell: Cell) -> str:
    """The command line that does the same as a cell."""
    words = ["dalikd", cell.command, "--config", str(study.folder / "config.yaml"), *cell.words(study.folder)]
    return shlex.join(words)


class _Kinds:
    """Options of cells. Cells that differ in seed, length and augmentation alone are parsed once."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parsed: dict[str, Any] = {}

    def parse(self, command: str, words: list[str]) -> Any:
        return parse(command, words, self._reading.shared, self._reading.path)[0]

    def options(self, cell: Cell) -> Any:
        varied = {key: value for key, value in cell.settings.items() if key in _VARIED}
        kind = replace(cell, name="", settings={k: v for k, v in cell.settings.items() if k not in varied})
        key = json.dumps([kind.command, kind.settings])
        if key not in self._parsed:
            self._parsed[key] = self.parse(kind.command, kind.words(Path()))
        return replace(self._parsed[key], **varied)


class _Opened:
    """Sources by the data options, each opened once."""

    def __init__(self) -> None:
        self._sources: dict[str, tuple[Source, Source]] = {}

    def sources(self, options: Any) -> tuple[Source, Source]:
        key = json.dumps(asdict(options.data))
        if key not in self._sources:
            self._sources[key] = open_sources(options.data, options.seed)
        return self._sources[key]

    def sizes(self, options: Any) -> Sizes:
        train, val = self.sources(options)
        return Sizes(len(train), len(val), len(train.classes), training_view(options.data, train).size)

    def augmenter(self, name: str, options: Any) -> Augmenter:
        source, _ = self.sources(options)
        return Augmenter(name, options, source, training_view(options.data, source), options.seed)


def _check(cell: Cell, options: Any, opened: _Opened) -> Work:
    """What a cell will compute, and what building it would find wrong."""
    sizes, augmenters = opened.sizes(options), []
    if isinstance(options, TrainingOptions | MeasureOptions):
        names = options.augmentation if isinstance(options, MeasureOptions) else [options.augmentation]
        augmenters = [opened.augmenter(name, options) for name in names]
        _check_batches(options, sizes)
        _check_nets(options, sizes, augmenters)
    done = work(options, sizes, augmenters)
    if cell.is_run and done.trained < 1:
        raise ValueError(f"{cell.name} has no step: give more epochs, or batches no larger than the training data")
    return done


def _check_nets(options: TrainingOptions | MeasureOptions, sizes: Sizes, augmenters: list[Augmenter]) -> None:
    """Nets can do what the augmentations ask of them."""
    hidden = [augmenter for augmenter in augmenters if augmenter.mixes_hidden]
    nets = [(options.model, options.model_args)]
    if isinstance(options, DistillOptions | MeasureOptions):
        nets.append((options.teacher.name, options.teacher.args))
    for name, args in nets if hidden else []:
        if name is not None:
            with torch.device("meta"):
                hidden[0].check_nets(options.compile, (name, create_model(name, sizes.classes, **args)))


def _check_batches(options: TrainingOptions | MeasureOptions, sizes: Sizes) -> None:
    trains = isinstance(options, TrainingOptions)
    Sampler(
        sizes.train_images,
        options.batch_size,
        options.seed,
        world=int(os.environ.get("WORLD_SIZE", "1")),
        accumulation=options.accumulation if trains else 1,
        group=options.mix_group,
        drop_last=trains,
    )
    if not trains and sizes.train_images * options.epochs < options.window:
        raise ValueError(
            f"measure: {options.epochs} epoch(s) of {sizes.train_images} images fill less than two windows of "
            f"{options.window} teacher outputs: raise measure.epochs"
        )


def _check_weights(pairs: list[Pair], source: Source) -> None:
    """Weights files are there and fit."""
    for index, pair in enumerate(pairs):
        teacher = pair.teacher
        if teacher.weights in (None, "pretrained"):
            continue
        if not Path(teacher.weights).is_file():
            raise FileNotFoundError(f"pairs[{index}].teacher: there is no weights file {teacher.weights}")
        try:
            build_model(teacher.name, source, weights=teacher.weights, args=teacher.args)
        except ValueError as error:
            raise ValueError(f"pairs[{index}].teacher: {error}") from error
