"""A study as cells: plain calls of train, evaluate, measure and distill, each with a place for its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from dalikd.trainers.study.options import Net, Pair, StudyOptions

__all__ = [
    "ONE_CALL",
    "STUDENTS_OF_A_PASS",
    "Axes",
    "Cell",
    "Reading",
    "Study",
    "Work",
    "alone_name",
    "deal",
    "distill_name",
    "measure_name",
    "plan",
    "teacher_name",
]


#: options of the study that do not change what comes out
ONE_CALL = (
    *("pair", "reference", "shard", "share_teacher", "engine", "workers", "only", "dry_run", "report", "status"),
    *("poll_seconds", "output", "json"),
)


#: the most that learn from one teacher pass
STUDENTS_OF_A_PASS = 12


@dataclass(frozen=True)
class Axes:
    """What each pair is tried with.

    Attributes:
        augmentations: their names, and of each whether a student scores its candidates.
        seeds: of the students; the student that scores candidates has the first.
        factors: of the students' epochs; the student that scores candidates has the first.
        methods: their names, and of each the options of distill, by their dotted names; "heads" is none of them, and
            says whether the student has auxiliary heads.
        stddev: whether T. stddev is measured.
        generations: names of augmentations that are measured together; default: all of them. Those after the first
            have come to a study that had begun.
    """

    augmentations: dict[str, bool]
    seeds: tuple[int, ...]
    factors: tuple[float, ...]
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    stddev: bool = True
    generations: Sequence[Sequence[str]] = ()

    def measured(self) -> Sequence[Sequence[str]]:
        """Names of augmentations that are measured together, one measurement after the other."""
        return self.generations or [list(self.augmentations)]


@dataclass(frozen=True)
class Cell:
    """One call.

    Attributes:
        name: where it lies below the study's folder: a run folder, or a JSON file.
        command: train, evaluate, measure or distill.
        settings: its options beyond those that all cells share, by their dotted names.
        needs: names of the cells whose results it reads.
    """

    name: str
    command: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        """Whether it leaves a run folder, which can be resumed."""
        return self.command in ("train", "distill")

    @property
    def checkpoint(self) -> str:
        """The file that measuring goes on from; not needed any more when it is done."""
        return self.name.removesuffix(".json") + ".pt"

    @property
    def result(self) -> str:
        """The file that holds its result."""
        return f"{self.name}/results.json" if self.is_run else self.name

    def options(self, folder: Path) -> dict[str, Any]:
        """The settings with the place of the result: options by their dotted names, over those that all cells share."""
        place = {"output" if self.is_run else "json": str(folder / self.name)}
        saved = {"checkpoint": str(folder / self.checkpoint)} if self.command == "measure" else {}
        return {**place, **saved, **self.settings}


@dataclass(frozen=True)
class Work:
    """Images that go through nets.

    Attributes:
        trained: forward and backward through the net that is trained; each quarter turn counts.
        turned: of these, quarter turns, whose auxiliary heads are computed, in the teacher too.
        asked: through the teacher.
        scored: through a student that ranks candidates.
        evaluated: through the net that is evaluated.
        flops: of all of these, floating-point operations.
    """

    trained: int = 0
    asked: int = 0
    scored: int = 0
    evaluated: int = 0
    flops: float = 0.0
    turned: int = 0

    def __add__(self, other: Self) -> "Work":
        """Both."""
        names = ("trained", "asked", "scored", "evaluated", "flops", "turned")
        return Work(*(getattr(self, name) + getattr(other, name) for name in names))


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
        images: what results say of the data that it reads.
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
    images: list[dict[str, Any]]

    @property
    def kept(self) -> Path:
        """The file that keeps its config."""
        return self.folder / "config.yaml"


def plan(pairs: Sequence[Pair], axes: Axes, folder: Path, ema: float = 0.0, *, stops_early: bool = False) -> list[Cell]:
    """All cells, each after those that it needs: teachers, students alone, T. stddev, students.

    Args:
        pairs: teachers and students; what several pairs share is done once.
        axes: what they are tried with.
        folder: of the study.
        ema: decay of the average that training keeps by default; where there is one, its weights are used.
        stops_early: whether measuring ends as soon as a ranking is settled; not where there is nothing to rank.
    """
    cells = [_teacher(pair.teacher) for pair in pairs]
    runs = [(factor, seed) for factor in axes.factors for seed in axes.seeds]
    cells += [_alone(pair.student, *run) for run in runs for pair in pairs]
    if axes.stddev:
        cells += [
            _measure(pair, axes, folder, ema, scored, number)
            for number in range(len(axes.measured()))
            for pair in pairs
            for scored in (False, True)
        ]
    cells += [
        _distill(pair, factor, name, seed, folder, ema, method, settings)
        for factor, seed in runs
        for pair in pairs
        for name in axes.augmentations
        for method, settings in axes.methods.items()
    ]
    cells = [cell for cell in cells if cell.settings.get("augmentation") != []]
    cells = [_without_stop(cell) if stops_early else cell for cell in cells]
    return list({cell.name: cell for cell in cells}.values())


def deal(
    costs: Mapping[str, float], shards: int, units: Mapping[str, str | None] = MappingProxyType({})
) -> dict[str, int]:
    """Deal cells over shards, the dearest first, each to the shard that has least to do.

    Args:
        costs: of the cells, by their names.
        shards: how many there are.
        units: what cells have in common that are to be in one shard; None: nothing.

    Returns:
        the shard of each cell, from 1.
    """
    together: dict[str, list[str]] = {}
    for name in sorted(costs):
        together.setdefault(units.get(name) or name, []).append(name)
    loads, dealt = [0.0] * shards, {}
    for cost, names in sorted((-sum(map(costs.__getitem__, names)), names) for names in together.values()):
        shard = loads.index(min(loads))
        loads[shard] -= cost
        dealt |= dict.fromkeys(names, shard + 1)
    return dealt


def teacher_name(net: Net) -> str:
    """Where a teacher lies: its run folder, or what evaluating its weights gave."""
    return f"teachers/{net.label}" + (".json" if net.weights else "")


def alone_name(net: Net, factor: float, seed: int) -> str:
    """Where a student that learns from labels alone lies."""
    return f"students/{net.label}/x{factor:g}/seed{seed}"


def measure_name(pair: Pair, scored: bool, generation: int = 0) -> str:
    """Where T. stddev lies, of those augmentations that a student scores, or of all others, by the teacher alone; of
    those that have come later in a folder of their own."""
    later = f"{generation + 1}/" if generation else ""
    return f"measure/{later}{pair.label if scored else pair.teacher.label}.json"


def distill_name(pair: Pair, factor: float, augmentation: str, seed: int, method: str = "") -> str:
    """Where a distilled student lies."""
    return f"distill/{pair.label}/x{factor:g}/{augmentation}/{f'{method}/' if method else ''}seed{seed}"


def _teacher(net: Net) -> Cell:
    if net.weights is not None:
        return Cell(teacher_name(net), "evaluate", {**_model(net), "weights": net.weights, **net.taken["evaluate"]})
    return Cell(teacher_name(net), "train", {**_model(net), **net.settings})


def _alone(net: Net, factor: float, seed: int) -> Cell:
    length = {"epoch_factor": factor, "seed": seed}
    return Cell(alone_name(net, factor, seed), "train", {**_model(net), **net.taken["train"], **length})


def _measure(pair: Pair, axes: Axes, folder: Path, ema: float, scored: bool, generation: int) -> Cell:
    settings, needs = _asked(pair.teacher, folder, ema)
    if scored:
        scorer = alone_name(pair.student, axes.factors[0], axes.seeds[0])
        settings |= {**_model(pair.student), "weights": _weights(folder / scorer, pair.student, ema)}
        needs = (*needs, scorer)
    settings["augmentation"] = [name for name in axes.measured()[generation] if axes.augmentations[name] == scored]
    return Cell(measure_name(pair, scored, generation), "measure", settings, needs)


def _without_stop(cell: Cell) -> Cell:
    """The rule to stop needs two augmentations."""
    if cell.command != "measure" or len(cell.settings["augmentation"]) > 1:
        return cell
    return replace(cell, settings={**cell.settings, "stop_confidence": None})


def _distill(
    pair: Pair,
    factor: float,
    augmentation: str,
    seed: int,
    folder: Path,
    ema: float,
    method: str,
    of_it: dict[str, Any],
) -> Cell:
    asked, needs = _asked(pair.teacher, folder, ema)
    settings = {**_model(pair.student), **asked, **pair.student.settings, **of_it}
    if settings.pop("heads", False):
        settings["model"] = pair.student.name.removesuffix("_aux") + "_aux"  # the same net without them: a fair row
    settings |= {"augmentation": augmentation, "epoch_factor": factor, "seed": seed}
    return Cell(distill_name(pair, factor, augmentation, seed, method), "distill", settings, needs)


def _model(net: Net) -> dict[str, Any]:
    return {"model": net.name, **({"model_args": net.args} if net.args else {})}


def _asked(net: Net, folder: Path, ema: float) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options that name a teacher, and the cell that trains it, if one does."""
    weights = net.weights or _weights(folder / teacher_name(net), net, ema)
    settings = {"teacher.name": net.name, "teacher.weights": weights}
    settings |= {"teacher.args": net.args} if net.args else {}
    if net.weights:
        settings |= {f"teacher.{key}": value for key, value in net.settings.items()}
    return settings, () if net.weights else (teacher_name(net),)


def _weights(run: Path, net: Net, ema: float) -> str:
    averaged = net.settings.get("ema", ema) > 0
    return str(run / "last" / ("ema.safetensors" if averaged else "student.safetensors"))
