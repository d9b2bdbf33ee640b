"""The options of `dalikd study`, and the nets that its pairs name."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dalikd.pipelines.data import FilePath

__all__ = ["ENGINES", "OF_SLURM", "Net", "Pair", "StudyOptions"]

#: what starts the runs of a study; worker: a call that one of the others has started
ENGINES = ("local", "slurm", "list", "worker")
#: options of engine slurm and their types; all others go to sbatch as they are
OF_SLURM: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("gpus", "cpus", "timeout_min", "parallel", "signal_delay_s"), (int,)),
    **{"mem_gb": (int, float), "partition": (str,), "cluster": (str,), "setup": (list,), "wait": (bool,)},
}


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
        engine: what starts the runs: local (one worker a GPU of this machine, or --workers on a CPU), slurm (jobs, by
            submitit), list (prints a command for each run, for other engines); default: this call does them itself. In
            a config its options too, as {partition: gpu, timeout_min: 600}. worker is what these start.
        workers: how many runs engine local does at once; default: one for each GPU.
        only: these runs alone, by their folders in the study.
        dry_run: print what would be done, and do nothing.
        report: write the tables and plots of what there is, and do nothing else.
        status: print what is done, running where, waiting and failed, and the time left; from any machine.
        poll_seconds: how often a shard looks for what another shard makes.
        output: the study's folder; default: runs/study-DATA.
        json: file for the content of results.json, or for what --dry_run or --status tells; - for stdout.
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
    engine: str | dict[str, Any] | None = None
    workers: int | None = None
    only: list[str] = field(default_factory=list)
    dry_run: bool = False
    report: bool = False
    status: bool = False
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
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: give a whole number above 0")
        self.share()
        _check_engine(self.engine_options(), "--only" if self.only else f"--shard {self.shard}" * (self.share()[1] > 1))

    def engine_options(self) -> dict[str, Any]:
        """What was given of the engine; "name" is its name."""
        return {"name": self.engine} if isinstance(self.engine, str) else dict(self.engine or {})

    def engine_name(self) -> str | None:
        """The engine; None: this call does the runs itself."""
        return self.engine_options().get("name")

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


def _check_engine(given: dict[str, Any], part: str) -> None:
    name = given.get("name")
    if name is not None and name not in ENGINES:
        raise ValueError(f"--engine {name}: there are {', '.join(ENGINES)}")
    if part and name not in (None, "worker"):
        raise ValueError(f"--engine {name} deals all runs itself: leave {part} out")
    for key, value in given.items():
        kinds = OF_SLURM.get(key)
        if kinds is not None and (not isinstance(value, kinds) or isinstance(value, bool) != (kinds == (bool,))):
            raise ValueError(f"engine.{key} is {value!r}: give {' or '.join(kind.__name__ for kind in kinds)}")
        if key in ("gpus", "cpus", "timeout_min", "parallel", "signal_delay_s", "mem_gb") and value < (key != "gpus"):
            raise ValueError(f"engine.{key} is {value}: give a number above 0")
    if given.get("cluster", "slurm") not in ("slurm", "local"):
        raise ValueError(f"engine.cluster is {given['cluster']}: give slurm, or local (without SLURM, to try it)")


def _check_list(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name} is empty: give at least one")
    double = [value for index, value in enumerate(values) if value in values[:index]]
    if double:
        raise ValueError(f"{name}: {double[0]} is there twice, give each value once")
