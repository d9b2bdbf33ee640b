"""The options of `dalikd study`, and the nets that its pairs name."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dalikd.pipelines.data import FilePath

__all__ = ["Net", "Pair", "StudyOptions"]


@dataclass
class StudyOptions:
    """Does T. stddev predict how well students do, and which method distils best? Train, measure and distil pairs of
    nets with every augmentation and method.

    What is missing is trained: teachers without weights, and every student on labels alone. Called again it goes on
    where it stopped. Any option of train, measure, distill and evaluate may be given too, for all of them or for one,
    as --epochs 10 or --measure.epochs 10.

    Args:
        pairs: teachers and students, each a net's name, or {name, args, label} and any option of training for that net
            alone; a teacher may have weights (a file, or "pretrained"), otherwise it is trained; with freeze_backbone
            true its auxiliary heads are, on these weights. Equal names with different settings need a label each.
        augmentation: names as for measure.
        methods: ways to distil by their names, each with options of distill, as {at: {loss: AT}}; with heads: true the
            student has auxiliary heads (NAME_aux), as {hsakd: {heads: true}}. Default: the one that the study's own
            options say.
        reference: the method that the others' gains are counted from; default: kd, or the only one that there is.
        stddev: measure T. stddev; false: compare the students alone.
        seeds: of the students; teacher and measure use --seed.
        epoch_factor: how much longer students are trained than --epochs says, one or several factors.
        pair: only these pairs now, as TEACHER/STUDENT.
        shard: this call's share of the work, as 2/8. The folder is the same for all shards.
        share_teacher: distil students that have teacher, images, seed, augmentation and length in common at once, so
            that the teacher is asked about each image once for all of them; each ends as it would alone.
        dry_run: print what would be done, and do nothing.
        report: write the tables and plots of what there is, and do nothing else.
        poll_seconds: how often a shard looks for what another shard makes.
        output: the study's folder; default: runs/study-DATA.
        json: file for the content of results.json, or for the plan of --dry_run; - for stdout.
    """

    pairs: list[dict[str, Any]] = field(default_factory=list)
    augmentation: list[str] = field(default_factory=lambda: ["published"])
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: str | None = None
    stddev: bool = True
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    epoch_factor: list[float] = field(default_factory=lambda: [1.0])
    pair: list[str] = field(default_factory=list)
    shard: str = "1/1"
    share_teacher: bool = True
    dry_run: bool = False
    report: bool = False
    poll_seconds: float = 30.0
    output: FilePath | None = None
    json: FilePath | None = None

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
        for name, settings in self.methods.items():
            if not re.fullmatch(r"[\w.+-]+", name) or not isinstance(settings, dict):
                raise ValueError(
                    f"methods: {name!r}: {settings!r}: give names of letters and digits, each with options of distill"
                )
            if not isinstance(settings.get("heads", False), bool):
                raise ValueError(f"methods.{name}.heads is {settings['heads']!r}: give true or false")
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
        settings: options of training for this net alone, by their dotted names, weights that it starts from among them;
            where it has weights, of a teacher.
        taken: of each command the settings that it takes too: train, evaluate.
    """

    name: str
    label: str
    weights: str | None
    args: dict[str, Any]
    settings: dict[str, Any]
    taken: dict[str, dict[str, Any]] = field(default_factory=dict)


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


def _check_list(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name} is empty: give at least one")
    double = [value for index, value in enumerate(values) if value in values[:index]]
    if double:
        raise ValueError(f"{name}: {double[0]} is there twice, give each value once")
