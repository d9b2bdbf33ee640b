"""The options of `dalikd study`, and the nets that its pairs name."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dalikd.pipelines.data import FilePath
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.supervised import TrainOptions

__all__ = ["Net", "Pair", "StudyOptions", "chosen_pairs", "read_pairs"]

_OF_A_NET = ("name", "weights", "args", "label")
_SET_BY_THE_STUDY = {
    *("model", "model_args", "weights", "teacher", "augmentation", "epoch_factor", "seed"),
    *("output", "resume", "overwrite"),
}


def _names(options: type) -> set[str]:
    return {option.name for option in fields(options)}


_TRAINED_TEACHER = _names(TrainOptions) - _SET_BY_THE_STUDY
_STUDENT = _names(DistillOptions) - _SET_BY_THE_STUDY
_GIVEN_TEACHER = _names(TeacherConfig) - {"name", "weights", "args", "cache"}


@dataclass
class StudyOptions:
    """Does T. stddev foretell the students? Train, measure and distil every pair with every augmentation, and compare.

    What is missing is trained: teachers without weights, and every student on labels alone. Called again it goes on
    where it stopped. Any option of train, measure, distill and evaluate may be given too, for all of them or for one,
    as --epochs 10 or --measure.epochs 10.

    Args:
        pairs: teachers and students, each a net's name, or {name, args, label} and any option of training for that net
            alone; a teacher may have weights (a file, or "pretrained"), otherwise it is trained. Equal names with
            different settings need a label each.
        augmentation: names as for measure.
        seeds: of the students; teacher and measure use --seed.
        epoch_factor: how much longer students are trained than --epochs says, one or several factors.
        pair: only these pairs now, as TEACHER/STUDENT.
        shard: this call's share of the work, as 2/8. The folder is the same for all shards.
        dry_run: print what would be done, and do nothing.
        report: write the tables and plots of what there is, and do nothing else.
        poll_seconds: how often a shard looks for what another shard makes.
        output: the study's folder; default: runs/study-DATA.
    """

    pairs: list[dict[str, Any]] = field(default_factory=list)
    augmentation: list[str] = field(default_factory=lambda: ["published"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    epoch_factor: list[float] = field(default_factory=lambda: [1.0])
    pair: list[str] = field(default_factory=list)
    shard: str = "1/1"
    dry_run: bool = False
    report: bool = False
    poll_seconds: float = 30.0
    output: FilePath | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for values that no study can work with; pairs are read by `read_pairs`."""
        _check_list("augmentation", self.augmentation)
        _check_list("seeds", self.seeds)
        _check_list("epoch_factor", self.epoch_factor)
        for seed in self.seeds:
            if not 0 <= seed < 1 << 63:
                raise ValueError(f"seeds: {seed} is no seed, give whole numbers from 0 to 2^63 - 1")
        for factor in self.epoch_factor:
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"epoch_factor: {factor:g} must be above 0")
        if not (math.isfinite(self.poll_seconds) and self.poll_seconds > 0):
            raise ValueError(f"--poll_seconds {self.poll_seconds:g}: give seconds above 0")
        self.share()

    def share(self) -> tuple[int, int]:
        """Number of this shard, from 1, and how many there are."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if match is None:
            raise ValueError(f"--shard {self.shard}: give number/count, such as 2/8")
        number, count = int(match[1]), int(match[2])
        if not 1 <= number <= count:
            raise ValueError(f"--shard {self.shard}: the number must lie between 1 and {count}")
        return number, count


@dataclass(frozen=True)
class Net:
    """A teacher or a student.

    Attributes:
        name: its architecture.
        label: its name in tables and folders.
        weights: its weights, or None if it is to be trained.
        args: options of the architecture.
        settings: options of training for this net alone, by their dotted names; where it has weights, of a teacher.
    """

    name: str
    label: str
    weights: str | None
    args: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A teacher and its student."""

    teacher: Net
    student: Net

    @property
    def label(self) -> str:
        """Its name in folders."""
        return f"{self.teacher.label}_{self.student.label}"

    @property
    def title(self) -> str:
        """Its name for people, and for --pair."""
        return f"{self.teacher.label}/{self.student.label}"


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
        if pair.teacher.weights is None and not trains_teachers:
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
    _check_settings(place, settings, allowed if weights is None else _GIVEN_TEACHER)
    return Net(given["name"], re.sub(r"[^\w.+-]+", "-", label), weights, args, settings)


def _check_settings(place: str, settings: dict[str, Any], allowed: set[str]) -> None:
    for key in settings:
        if key.split(".")[0] not in allowed:
            raise ValueError(f"{place}.{key} cannot be set here; {_known(allowed)}")


def _known(allowed: set[str]) -> str:
    if allowed is _GIVEN_TEACHER:
        return f"a teacher with weights is not trained, and takes name, weights, args, label, {', '.join(allowed)}"
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


def _check_list(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name} is empty: give at least one")
    double = [value for index, value in enumerate(values) if value in values[:index]]
    if double:
        raise ValueError(f"{name}: {double[0]} is there twice, give each value once")
