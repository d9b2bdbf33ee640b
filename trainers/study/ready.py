"""A study made ready: its pairs read, its cells with their options checked, weighed and dealt, before it computes."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.known_weights import file_and_member
from dalikd.kd.losses import DistillationLoss
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import evaluation_view, open_sources, training_view
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter, picks_by_student
from dalikd.trainers.evaluate import EvaluateOptions
from dalikd.trainers.launch import check_compiler, start
from dalikd.trainers.measure import MeasureOptions, check_measuring
from dalikd.trainers.models import TeacherConfig, build_model, build_teacher, check_pretrained
from dalikd.trainers.setup import Setup
from dalikd.trainers.study.gains import choose_reference
from dalikd.trainers.study.options import Net, Pair, StudyOptions
from dalikd.trainers.study.plan import STUDENTS_OF_A_PASS, Axes, Cell, Reading, Study, Work, deal, plan
from dalikd.trainers.study.state import generations
from dalikd.trainers.study.work import Sizes, work
from dalikd.trainers.tasks.base import TrainingOptions
from dalikd.trainers.tasks.distill import OWN, DistillOptions, build_loss, check_views
from dalikd.trainers.tasks.supervised import Supervised, TrainOptions
from dalikd.trainers.trial import try_step

__all__ = [
    "COMMANDS",
    "Opened",
    "check_cell",
    "check_machine",
    "check_teacher",
    "chosen_pairs",
    "make_ready",
    "planned",
    "read_pairs",
    "shared_pass",
]

_OF_A_NET = ("name", "weights", "args", "label")
_SET_BY_THE_STUDY = {
    *("model", "model_args", "weights", "teacher", "augmentation", "epoch_factor", "seed"),
    *("teachers", "teacher_weights", "teacher_ensemble"),
    *("output", "resume", "overwrite", "students", "init_seed"),
}


def _names(options: type) -> set[str]:
    return {option.name for option in fields(options)}


_TRAINED_TEACHER = _names(TrainOptions) - _SET_BY_THE_STUDY
_STUDENT = _names(DistillOptions) - _SET_BY_THE_STUDY
_METHOD = _STUDENT - {"data"} | {"heads"}
_GIVEN_TEACHER = _names(TeacherConfig) - {"name", "weights", "args", "cache"}

#: the commands that cells are calls of
COMMANDS = ("train", "evaluate", "measure", "distill")
_VARIED = ("seed", "epoch_factor", "augmentation")  # what cells of one kind differ in, and where they lie


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


def make_ready(reading: Reading) -> Study:
    """Plan a study and check all of it.

    Raises:
        ValueError, OSError: an option, a net, a weights file or the data are not as they should be.
    """
    options = reading.options
    pairs, axes, folder, every, cells = planned(reading)
    kinds, opened = _Kinds(reading), Opened()
    units = {cell.name: shared_pass(cell) for cell in every if options.share_teacher}
    students = Counter(units.values())
    costs = {}
    for cell in every:
        alike = students[unit] if (unit := units.get(cell.name)) else 1
        passes = ceil(alike / STUDENTS_OF_A_PASS)
        costs[cell.name] = check_cell(cell, kinds.options(cell), opened, passes / alike)
    _check_teachers(pairs, every, kinds, opened, download=not (options.dry_run or options.report))
    shards = deal({cell.name: costs[cell.name].flops for cell in cells}, options.share()[1], units)
    return Study(
        reading, pairs, axes, folder, cells, every, costs, shards, list(kinds.known.values()), opened.described()
    )


def planned(reading: Reading) -> tuple[list[Pair], Axes, Path, list[Cell], list[Cell]]:
    """A study as far as it is known without its data: pairs, axes, folder, all cells, and those of this call's pairs.

    Raises:
        ValueError, OSError: an option is not as it should be.
    """
    options = reading.options
    if options.workers is not None and options.engine_name() not in ("local", "worker"):
        raise ValueError(f"--workers {options.workers}: it is for --engine local")
    pairs = read_pairs(options, reading.trains_teachers)
    chosen = chosen_pairs(pairs, options.pair)
    trained, measured = reading.read("train", {})[0], reading.read("measure", {})[0]
    folder = Path(options.output or f"runs/study-{trained.data.name}")
    axes, stops_early = _axes(options, folder), measured.stop_confidence is not None
    every, cells = (plan(some, axes, folder, trained.ema, stops_early=stops_early) for some in (pairs, chosen))
    for name in options.only:
        if name not in [cell.name for cell in cells]:
            raise ValueError(f"--only {name}: there is no such run; --dry_run true lists them")
    return pairs, axes, folder, every, cells


def shared_pass(cell: Cell) -> str | None:
    """What a cell has in common with others that learn from one teacher pass; None: it has one of its own."""
    if cell.command != "distill" or picks_by_student(cell.settings["augmentation"]):
        return None
    given = cell.settings
    return json.dumps({name: given[name] for name in sorted(given) if name.partition(".")[0] not in OWN})


def _check_teachers(pairs: list[Pair], cells: list[Cell], kinds: "_Kinds", opened: Opened, *, download: bool) -> None:
    asking = {cell.name.split("/")[1]: cell for cell in cells if cell.command == "distill"}
    for index, pair in enumerate(pairs):
        place, trained = f"pairs[{index}].teacher", pair.teacher.weights is None
        options = kinds.options(asking[pair.label])
        check = partial(check_teacher, place, options, opened, trained=trained, download=download)
        opened.once(asdict(pair.teacher), check)


def _axes(options: StudyOptions, folder: Path) -> Axes:
    scored = {name: picks_by_student(name) for name in options.augmentation}
    methods = {name: dict(_dotted(settings)) for name, settings in options.methods.items()} or {"": {}}
    for name, settings in methods.items():
        _check_settings(f"methods.{name}", settings, _METHOD)
    if options.methods or options.reference is not None:
        choose_reference(options.reference, options.methods)
    later = generations(folder, options.augmentation)
    return Axes(scored, tuple(options.seeds), tuple(options.epoch_factor), methods, options.stddev, later)


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


# ------------------------------------------------------------------------------------------------------------ the pairs


def read_pairs(options: StudyOptions, trains_teachers: bool) -> list[Pair]:
    """The pairs, checked.

    Args:
        options: of the study.
        trains_teachers: whether the config says how a teacher without weights is trained.

    Raises:
        ValueError: names the pair, what is wrong and the fix.
    """
    if not options.pairs:
        raise ValueError("a study needs pairs: give a config with `pairs: [{teacher: resnet56, student: resnet20}]`")
    pairs = [_read_pair(f"pairs[{index}]", entry) for index, entry in enumerate(options.pairs)]
    for index, pair in enumerate(pairs):
        if pair.teacher.weights is None and "weights" not in pair.teacher.settings and not trains_teachers:
            raise ValueError(
                f"pairs[{index}]: the teacher {pair.teacher.label} has no weights, and the config no `train:` section "
                "to train it by: give one of them"
            )
        if pair in pairs[:index]:
            raise ValueError(f"pairs[{index}]: {pair.title} is there twice: name it once")
    _check_labels("teacher", [pair.teacher for pair in pairs])
    _check_labels("student", [pair.student for pair in pairs])
    _check_labels("pair", pairs)
    return pairs


def chosen_pairs(pairs: Sequence[Pair], wanted: Sequence[str]) -> list[Pair]:
    """Those pairs that --pair names; all of them where it names none.

    Raises:
        ValueError: there is no such pair.
    """
    for name in wanted:
        if name not in [pair.title for pair in pairs]:
            raise ValueError(f"--pair {name}: there is no such pair, there are {', '.join(p.title for p in pairs)}")
    return [pair for pair in pairs if not wanted or pair.title in wanted]


def _read_pair(place: str, entry: Any) -> Pair:
    if not isinstance(entry, dict) or set(entry) != {"teacher", "student"}:
        raise ValueError(f"{place} is {entry!r}: give {{teacher: NET, student: NET}}")
    teacher = _read_net(f"{place}.teacher", entry["teacher"], _TRAINED_TEACHER)
    student = _read_net(f"{place}.student", entry["student"], _STUDENT)
    if student.weights is not None:
        raise ValueError(f"{place}.student: a student starts from nothing, leave weights out")
    return Pair(teacher, student)


def _read_net(place: str, entry: Any, allowed: set[str]) -> Net:
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or not given["name"]:
        raise ValueError(f"{place} is {entry!r}: give a net's name, or {{name: NET, …}}")
    label, weights = given.get("label", given["name"]), given.get("weights")
    args: Any = given.get("args") or {}
    for key, value, kind in (("label", label, str), ("weights", weights, str | None), ("args", args, dict)):
        if not isinstance(value, kind):
            raise ValueError(f"{place}.{key} is {value!r}: give a {'group of options' if kind is dict else 'text'}")
    settings = dict(_dotted({key: value for key, value in given.items() if key not in _OF_A_NET}))
    started = weights is not None and settings.get("freeze_backbone") is True  # its heads are trained on its weights
    _check_settings(place, settings, allowed if weights is None or started else _GIVEN_TEACHER)
    taken = {
        command: {key: value for key, value in settings.items() if key.split(".")[0] in names}
        for command, names in (("train", _names(TrainOptions)), ("evaluate", _names(EvaluateOptions)))
    }
    if started:
        settings, weights = {**settings, "weights": weights}, None
    return Net(given["name"], re.sub(r"[^\w.+-]+", "-", label), weights, args, settings, taken)


def _check_settings(place: str, settings: dict[str, Any], allowed: set[str]) -> None:
    for key in settings:
        if key.split(".")[0] not in allowed:
            raise ValueError(f"{place}.{key} cannot be set here; {_known(allowed)}")


def _known(allowed: set[str]) -> str:
    if allowed is _METHOD:
        return (
            "a method takes options of distill for the student, such as loss, and heads (true: the student NAME_aux); "
            "nets, augmentations and seeds are axes"
        )
    if allowed is _GIVEN_TEACHER:
        return (
            f"a teacher with weights is not trained, and takes name, weights, args, label, {', '.join(allowed)}; with "
            "freeze_backbone: true its auxiliary heads are, and it takes options of training"
        )
    return "a net takes name, args, label and options of training, such as optimizer.lr"


def _dotted(content: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves by their dotted names; a class with its options stays whole."""
    for key, value in content.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_labels(role: str, things: Sequence[Net] | Sequence[Pair]) -> None:
    """Things of one label must be the same thing: they share a folder."""
    known: dict[str, Net | Pair] = {}
    for thing in things:
        if known.setdefault(thing.label.lower(), thing) != thing:  # some file systems know no capitals
            raise ValueError(f"pairs: two {role}s are called {thing.label}: give each net a `label` of its own")


# -------------------------------------------------------------------------------- what would go wrong, each after hours


def check_cell(cell: Cell, options: Any, opened: Opened, share: float = 1.0) -> Work:
    """What a cell will compute, with its share of the teacher's work.

    Raises:
        ValueError, OSError: the call would find its options, the data or a net wrong.
    """
    sizes = opened.sizes(options)
    evaluation_view(options.data, opened.sources(options)[1])
    try:
        augmenters = _check_options(options, opened)
        return work(options, sizes, augmenters, share)
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
    if not (trained or pretrained or file_and_member(teacher.weights)[0].is_file()):
        raise FileNotFoundError(f"{place}: there is no weights file {teacher.weights}")
    try:
        if pretrained:
            check_pretrained(teacher.name, len(source.classes))
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
            options.check_machine(accelerator)
        if isinstance(options, TrainingOptions | MeasureOptions):
            check_compiler(options.compile)


def _check_options(options: Any, opened: Opened) -> list[Augmenter]:
    if not isinstance(options, TrainingOptions | MeasureOptions):
        return []
    names = options.augmentation if isinstance(options, MeasureOptions) else [options.augmentation]
    if isinstance(options, MeasureOptions):
        check_measuring(replace(options, checkpoint=None), names)  # the study says where it lies
    else:
        options.check_machine(cast(Accelerator, _AnyMachine()))
        weights = torch.nn.Parameter(torch.zeros(2, 2))
        weights.grad = torch.zeros(2, 2)
        try_step(options.optimizer([weights]))
    augmenters = [opened.augmenter(name, options) for name in names]
    _check_batches(options, opened.sizes(options))
    parts = ("model", "model_args", "weights", "mean", "std", "reinit", "freeze_backbone", "freeze_student", "compile")
    key = [type(options).__name__, names, asdict(options.data), *(getattr(options, part, None) for part in parts)]
    if isinstance(options, DistillOptions):
        key += [type(options.loss).__name__, sorted(options.loss.needs), str(vars(options.loss)), options.teacher.name]
    opened.once(key, lambda: _check_nets(options, opened, augmenters))
    return augmenters


def _check_nets(options: TrainingOptions | MeasureOptions, opened: Opened, augmenters: Sequence[Augmenter]) -> None:
    """The net that is trained can be built, and nets can do what the augmentations ask of them; nothing is computed."""
    source, _ = opened.sources(options)
    hidden = [augmenter for augmenter in augmenters if augmenter.mixes_hidden]
    nets = [(options.model, options.model_args)]
    if isinstance(options, DistillOptions | MeasureOptions):
        nets.append((options.teacher.name, options.teacher.args))
    starts = isinstance(options, TrainingOptions) and options.weights is not None  # a file is read to see if it fits
    with torch.device("cpu" if starts else "meta"):
        if isinstance(options, TrainingOptions):
            student = options.build_student(Setup(options, cast(Accelerator, _AnyMachine()), *opened.sources(options)))
            if isinstance(options, TrainOptions):
                Supervised(student, augmenters[0], options.label_smoothing)
        for name, args in nets if hidden else []:
            if name is not None:
                hidden[0].check_nets(options.compile, (name, create_model(name, len(source.classes), **args)))
    if isinstance(options, DistillOptions) and options.model is not None and options.teacher.name is not None:
        _check_loss(options, options.model, options.teacher.name, source, augmenters[0])


def _check_loss(options: DistillOptions, model: str, teacher: str, source: Source, augmenter: Augmenter) -> None:
    """The nets give what the loss needs, and go together in it; and it goes with the augmentation."""
    built = deepcopy(options.loss)
    check_views(built, augmenter)
    if not built.needs and type(built).build is DistillationLoss.build and not model.endswith("_aux"):
        return
    student, asked = (
        Normalized(create_model(name, len(source.classes), **args), (0.5,) * 3, (0.5,) * 3)
        for name, args in ((model, options.model_args), (teacher, options.teacher.args))
    )
    side, batch = training_view(options.data, source).size, options.batch_size // options.accumulation
    build_loss(built, student, Teacher(asked), augmenter, len(source.classes), side, source.labels, batch)


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
