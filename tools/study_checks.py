"""What the runs of a study would find wrong, each after hours, found before any of them is started."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from dalikd.kd.backbones import create_model
from dalikd.pipelines.data import evaluation_view, open_sources, training_view
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import check_compiler, start
from dalikd.trainers.measure import MeasureOptions, check_measuring
from dalikd.trainers.models import _check_pretrained, build_model, build_teacher
from dalikd.trainers.run import check_training
from dalikd.trainers.setup import Setup
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.work import Sizes, Work, work
from dalikd.trainers.tasks.base import TrainingOptions
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.supervised import Supervised, TrainOptions
from dalikd.trainers.trial import try_step

__all__ = ["Opened", "check_cell", "check_machine", "check_teacher"]


class _AnyMachine:
    """In place of an accelerator, where options are checked for another machine than this one."""

    device = torch.device("cuda")


class Opened:
    """Sources by the data options, each opened once, and what has been found right."""

    def __init__(self) -> None:
        self._sources: dict[str, tuple[Source, Source]] = {}
        self._seeds: dict[str, int] = {}
        self._checked: set[str] = set()

    def sources(self, options: Any) -> tuple[Source, Source]:
        """The training and the validation split."""
        key = json.dumps(asdict(options.data))
        if key not in self._sources:
            self._sources[key], self._seeds[key] = open_sources(options.data, options.seed), options.seed
        return self._sources[key]

    def described(self) -> list[dict[str, Any]]:
        """What results say of the data."""
        return [
            {
                "seed": self._seeds[key],
                "data": json.loads(key),
                "fingerprint": {"train": train.fingerprint, "val": val.fingerprint},
            }
            for key, (train, val) in self._sources.items()
        ]

    def sizes(self, options: Any) -> Sizes:
        """What work depends on."""
        train, val = self.sources(options)
        return Sizes(len(train), len(val), len(train.classes), training_view(options.data, train).size)

    def augmenter(self, name: str, options: Any) -> Augmenter:
        """An augmentation, bound to the training split."""
        source, _ = self.sources(options)
        return Augmenter(name, options.mix, source, training_view(options.data, source), options.seed)

    def once(self, key: Any, check: Callable[[], object]) -> None:
        """Check what has not been found right before under an equal key."""
        text = json.dumps(key, default=str)
        if text not in self._checked:
            check()
            self._checked.add(text)


def check_cell(cell: Cell, options: Any, opened: Opened) -> Work:
    """What a cell will compute.

    Raises:
        ValueError, OSError: the call would find its options, the data or a net wrong.
    """
    sizes = opened.sizes(options)
    evaluation_view(options.data, opened.sources(options)[1])
    try:
        augmenters = _check_options(options, opened)
        return work(options, sizes, augmenters)
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from error


def check_teacher(place: str, options: DistillOptions, opened: Opened, *, trained: bool, download: bool) -> None:
    """A teacher can be built, and its weights fit.

    Args:
        place: where it stands in the config.
        options: of a cell that asks it.
        opened: the data.
        trained: it has no weights before the study has trained it.
        download: its pretrained weights may be downloaded for that.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: what is wrong.
    """
    teacher, (source, _) = options.teacher, opened.sources(options)
    assert teacher.name is not None
    assert teacher.weights is not None
    pretrained = teacher.weights == "pretrained"
    if not (trained or pretrained or Path(teacher.weights).is_file()):
        raise FileNotFoundError(f"{place}: there is no weights file {teacher.weights}")
    try:
        if pretrained:
            _check_pretrained(teacher.name, len(source.classes))
        if trained or (pretrained and not download):
            with torch.device("meta"):
                build_model(teacher.name, source, args=teacher.args, mean=teacher.mean, std=teacher.std)
        else:
            build_teacher(teacher, source)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def check_machine(kinds: Iterable[Any]) -> None:
    """This machine has what each kind of call asks for: its device, precision and compiler.

    Raises:
        ValueError: names the option and the fix.
    """
    for options in kinds:
        accelerator = start(options.device, options.precision)
        if isinstance(options, TrainingOptions):
            check_training(options, accelerator)
        if isinstance(options, TrainingOptions | MeasureOptions):
            check_compiler(options.compile)


def _check_options(options: Any, opened: Opened) -> list[Augmenter]:
    if not isinstance(options, TrainingOptions | MeasureOptions):
        return []
    names = options.augmentation if isinstance(options, MeasureOptions) else [options.augmentation]
    if isinstance(options, MeasureOptions):
        check_measuring(replace(options, checkpoint=None), names)  # the study says where it lies
    else:
        check_training(options, cast(Accelerator, _AnyMachine()))
        weights = torch.nn.Parameter(torch.zeros(2, 2))
        weights.grad = torch.zeros(2, 2)
        try_step(options.optimizer([weights]))
    augmenters = [opened.augmenter(name, options) for name in names]
    _check_batches(options, opened.sizes(options))
    parts = ("model", "model_args", "mean", "std", "reinit", "freeze_student", "compile")
    key = [type(options).__name__, names, asdict(options.data), *(getattr(options, part, None) for part in parts)]
    opened.once(key, lambda: _check_nets(options, opened, augmenters))
    return augmenters


def _check_nets(options: TrainingOptions | MeasureOptions, opened: Opened, augmenters: Sequence[Augmenter]) -> None:
    """The net that is trained can be built, and nets can do what the augmentations ask of them; nothing is computed."""
    source, _ = opened.sources(options)
    hidden = [augmenter for augmenter in augmenters if augmenter.mixes_hidden]
    nets = [(options.model, options.model_args)]
    if isinstance(options, DistillOptions | MeasureOptions):
        nets.append((options.teacher.name, options.teacher.args))
    with torch.device("meta"):
        if isinstance(options, TrainingOptions):
            student = options.build_student(Setup(options, cast(Accelerator, _AnyMachine()), *opened.sources(options)))
            if isinstance(options, TrainOptions):
                Supervised(student, augmenters[0], options.label_smoothing)
        for name, args in nets if hidden else []:
            if name is not None:
                hidden[0].check_nets(options.compile, (name, create_model(name, len(source.classes), **args)))


def _check_batches(options: TrainingOptions | MeasureOptions, sizes: Sizes) -> None:
    trains = isinstance(options, TrainingOptions)
    Sampler(
        sizes.train_images,
        options.batch_size,
        options.seed,
        world=int(os.environ.get("WORLD_SIZE", "1")),
        accumulation=options.accumulation if trains else 1,
        group=options.mix.group,
        drop_last=trains,
    )
    if not trains and sizes.train_images * options.epochs < options.window:
        raise ValueError(
            f"{options.epochs} epoch(s) of {sizes.train_images} images fill less than two windows of "
            f"{options.window} teacher outputs: raise measure.epochs"
        )
