"""T. stddev of augmentations: the teacher looks at originals and augmented images, nothing is trained.

All augmentations asked for are measured in one pass over the data: a batch is read and decoded once, each augmentation
is a branch of it, and the teacher is asked about everything in few calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dalikd.kd.goodness import FEWEST_GROUPS
from dalikd.kd.known_weights import weights_digest
from dalikd.kd.losses.base import full_precision
from dalikd.kd.manifold import hidden_mixing
from dalikd.kd.mixing import HiddenMix
from dalikd.kd.normalize import Normalized
from dalikd.kd.separation import Separation, separation, windows_at
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import FilePath, as_used
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.loader import BadFileError, Batch, Loader
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import (
    Augmenter,
    Branches,
    augmentation_names,
    is_picked_by_student,
)
from dalikd.trainers.checkpoint import read_state, save_state
from dalikd.trainers.evaluate import replaced_files
from dalikd.trainers.launch import CompileMode, model_type
from dalikd.trainers.measurement import EntropyLogs, Measurement, MetricName, Surveyor
from dalikd.trainers.models import TeacherConfig, build_model, describe_teacher
from dalikd.trainers.options import FROM_1, SHARE, AugmentingOptions, NumberRange, check_numbers, renamed
from dalikd.trainers.progress import progress
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.stopping import Interrupted, StopSignals, save_after
from dalikd.trainers.tracking import check_writable, versions
from dalikd.trainers.trial import check_finite

__all__ = [
    "MeasureOptions",
    "build_scorer",
    "check_measuring",
    "measure",
    "measure_all",
    "measure_branches",
    "results_table",
]

_FIRST_CHECK = 40  # windows, two for each group of the jackknife; then half as many again from check to check


_MEASURING = {
    "epochs": FROM_1,
    "window": NumberRange(lambda value: value >= 2 and value % 2 == 0, "a positive even number (published: 640)"),
    "confidence": SHARE,
    "stop_confidence": SHARE,
    "images_per_call": FROM_1,
    "entropy_log_every": FROM_1,
    "checkpoint_every": FROM_1,
}


@dataclass
class MeasureOptions(AugmentingOptions):
    """Measure how good augmentations are for distillation, by the teacher alone (T. stddev; lower is better).

    All of them are measured in one pass over the data: pictures are decoded once, and the teacher sees the originals
    and whatever augmentations have in common once.

    Args:
        augmentation: one or several names, "published" for the paper's nine or "all"; BASE+CRITERION picks out of
            several runs of another augmentation, by teacher_entropy, student_entropy, kld or dissimilarity.
        teacher: the net that is asked.
        model: architecture of the student that scores candidates (student_entropy, kld), or whose cross-entropy is
            measured.
        model_args: options of that architecture.
        weights: its weights; without them it is a fresh one made from the seed (the published figures used a trained
            student).
        epochs: passes over the training data; published: 10.
        window: teacher outputs in a window; published: 640.
        metrics: what is measured beside T. stddev and entropy: probability_covariance (of the teacher's outputs, over
            samples and classes), cross_entropy_covariance (between samples, of teacher and --model, and its
            approximation by the teacher alone; without --model that alone).
        confidence: of the intervals, and of the comparison of neighbours in the ranking.
        stop_confidence: stop as soon as all neighbours in the ranking are told apart at this confidence; the epochs are
            the most that are passed.
        per_class: also write the T. stddev of each class.
        images_per_call: images that a net sees at once at most, if the batch is not larger.
        entropy_log: a folder for the entropies of originals, candidates and picks, as arrays and as a plot, of every
            --entropy_log_every-th batch; the main process's share of it.
        entropy_log_every: batches from one to the next.
        checkpoint: file that the measurement is saved in, and gone on from when called again.
        checkpoint_every: batches between two savings.
        json: file the results are written to.
    """

    augmentation: list[str] = field(default_factory=lambda: ["published"])
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    epochs: int = 10
    window: int = 640
    metrics: list[MetricName] = field(default_factory=list)
    confidence: float = 0.95
    stop_confidence: float | None = None
    per_class: bool = False
    images_per_call: int = 1024
    entropy_log: FilePath | None = None
    entropy_log_every: int = 100
    checkpoint: FilePath | None = None
    checkpoint_every: int = 500
    json: FilePath | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be measured with."""
        super().__post_init__()
        check_numbers(self, _MEASURING)


def measure_all(options: MeasureOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Measure every augmentation asked for in one pass over the data, epoch after epoch.

    Returns:
        "results", a dictionary for each augmentation, the "separation" of their ranking, and what they depend on.

    Raises:
        ValueError, OSError: the data, the teacher or the sizes are not as they should be; nothing has run then.
    """
    names = augmentation_names(options.augmentation)
    check_measuring(options, names)
    setup = open_run(options, accelerator, "train")
    augmenters = [setup.augmenter(name) for name in names]
    branches = Branches(augmenters)
    student = build_scorer(options, setup.source, augmenters)
    teacher = setup.teacher(options.teacher)
    loader = setup.loader(branches.draw_spec, setup.sampler(drop_last=False))
    run = _Pass(branches, loader, teacher, accelerator, student, options)
    if student is not None:
        setup.check_net(student, f"--model {options.model}", options.weights, setup.view)
    if options.checkpoint is not None:
        run.keep_state(Path(options.checkpoint), _identity(options, setup.view, teacher, student))
    run.go()
    loader.close()
    return {
        **run.report(setup.source.classes if options.per_class else None),
        **_header(options, setup, teacher, student),
    }


def measure(
    augmenter: Augmenter,
    loader: Loader,
    teacher: Teacher,
    accelerator: Accelerator,
    *,
    epochs: int,
    window: int,
    student: Normalized | None = None,
    compile_mode: CompileMode = "off",
) -> dict[str, Any]:
    """Measure one augmentation over whole epochs; windows run on across them.

    Args:
        augmenter: the augmentation.
        loader: over every row once an epoch (drop_last=False), with the augmenter's draws.
        teacher: frozen.
        accelerator: whose processes share each batch; the result is that of one process.
        epochs: passes over the data.
        window: teacher outputs in a window (originals and augmented together).
        student: scores candidates, in eval mode; for augmentations that need it.
        compile_mode: of the look.

    Returns:
        "augmentation", "stddev", "stderr", "interval", "entropy", "windows", "images" (originals), "window", and
        "per_class" by the class's name.
    """
    options = MeasureOptions(epochs=epochs, window=window, compile=compile_mode)
    report = measure_branches(Branches([augmenter]), loader, teacher, accelerator, options, student)
    return report["results"][0]


def measure_branches(
    branches: Branches,
    loader: Loader,
    teacher: Teacher,
    accelerator: Accelerator,
    options: MeasureOptions,
    student: Normalized | None = None,
) -> dict[str, Any]:
    """Measure several augmentations in one pass over the data, epoch after epoch.

    Args:
        branches: the augmentations.
        loader: over every row once an epoch (drop_last=False), with the draws of the branches.
        teacher: frozen.
        accelerator: whose processes share each batch; the result is that of one process.
        options: epochs, window and what else is to be done; they name no data and no nets here.
        student: in eval mode; for augmentations and metrics that need it.

    Returns:
        "results", what `measure` returns of each; "separation", "stopped", "entropy_plots" and "replaced_files".
    """
    run = _Pass(branches, loader, teacher, accelerator, student, options)
    run.go()
    return run.report(loader.source.classes)


class _Pass:
    """One pass over the data, epoch after epoch, up to the last epoch or until the ranking is settled."""

    def __init__(
        self,
        branches: Branches,
        loader: Loader,
        teacher: Teacher,
        accelerator: Accelerator,
        student: Normalized | None,
        options: MeasureOptions,
    ) -> None:
        self.loader, self.accelerator, self.options = loader, accelerator, options
        classes = len(loader.source.classes)
        augmenters = branches.augmenters
        for augmenter in augmenters:
            augmenter.check_nets(options.compile, ("the teacher", teacher.model), ("the student", student))
        sees_all = student is not None and "cross_entropy_covariance" in options.metrics
        self.look = Surveyor(
            teacher,
            branches,
            classes,
            _scorer(student, accelerator),
            student_sees_all=sees_all,
            student_sees_originals=options.entropy_log is not None and any(map(is_picked_by_student, augmenters)),
            images_per_call=options.images_per_call,
            compile_mode=options.compile,
        )
        self.measurement = Measurement(
            [augmenter.name for augmenter in augmenters],
            classes,
            accelerator,
            window=options.window,
            group=augmenters[0].group,
            keep=[augmenter.keep for augmenter in augmenters],
            metrics=options.metrics,
            student=sees_all,
        )
        folder = None if options.entropy_log is None else Path(options.entropy_log)
        self.logs = EntropyLogs(folder, options.entropy_log_every, augmenters, accelerator.is_main_process)
        self.batches = 0
        self.checks = 0
        self.settled: Separation | None = None
        self._checkpoint: _Checkpoint | None = None

    @torch.no_grad()
    def go(self) -> None:
        """Measure to the end.

        Raises:
            BadFileError, Interrupted: as `StopSignals.together`; the state is saved if it is kept.
        """
        total = self.options.epochs * len(self.loader)
        images = self.options.epochs * len(self.loader.source)
        title = "measure" if len(self.measurement.stddev) > 1 else next(iter(self.measurement.stddev))
        bar = progress(
            self.accelerator, title, total=images, initial=self.measurement.images, unit="image", leave=False
        )
        with bar, StopSignals(self.accelerator) as stops:
            try:
                while self.batches < total and self.settled is None:
                    batch = stops.together(self.loader.next)
                    self._step(batch)
                    bar.update(batch.total)
            except (BadFileError, Interrupted) as stop:
                kept = "the same command goes on" if self._checkpoint else "nothing is kept without --checkpoint"
                save_after(stop, self._save, f"{kept}, after {self.measurement.images} images")
                self.accelerator.wait_for_everyone()  # a launcher ends the others with the first that ends
                raise
        if self.options.compile != "off":
            torch.compiler.reset()  # what many passes of one process leave behind would pass torch's limit
        self._save()

    def report(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """What was found, as `measure_branches` returns it. Every process must ask."""
        confidence = self.options.confidence
        results = self.measurement.results(confidence, class_names)
        final = self.settled or self._separation()
        return {
            "results": results,
            "confidence": confidence,
            "separation": None if final is None else asdict(final),
            "stopped": self._stopped(),
            "entropy_plots": [str(path) for path in self.logs.save()],
            "replaced_files": replaced_files((self.loader,), self.accelerator),
        }

    def keep_state(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on where the file says an earlier call stopped, and keep it up to date."""
        self._checkpoint = _Checkpoint(path, identity, self.accelerator.is_main_process)
        state = self._checkpoint.read()
        if state is not None:
            self.batches, self.checks = state["step"], state["checks"]
            if self.batches > self.options.epochs * len(self.loader):
                raise ValueError(
                    f"--checkpoint {path} is of more than --epochs {self.options.epochs}: give as many as it has, or "
                    "name another file"
                )
            self.loader.load_state_dict(state["loader"])
            self.measurement.load_state_dict(state["measurement"])
            if state["settled"]:
                self.settled = self._look_at_ranking()
            self.logs.load_state_dict(state["logs"])

    def _step(self, batch: Batch) -> None:
        if self.options.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()  # the last batch's look may be overwritten
        seen = self.look(batch)
        if self.batches == 0:  # at the cost of a wait
            check_finite(torch.cat([seen.logits, *(of.logits for of in seen.branches)]), "the teacher")
        self.measurement.update(seen, batch, self.loader.sampler.microbatch)
        self.logs.add(self.batches, seen)
        self.batches += 1
        self._check()
        if self.batches % self.options.checkpoint_every == 0:
            self._save()

    def _check(self) -> None:
        """The stop rule: every check is at a number of windows that is known beforehand."""
        if self.options.stop_confidence is None:
            return
        if self.measurement.windows < windows_at(self.checks + 1, _FIRST_CHECK):
            return
        self.checks += 1
        found = self._look_at_ranking()
        if found.separated:
            self.settled = found

    def _look_at_ranking(self) -> Separation:
        """The look of the stop rule that was the last."""
        assert self.options.stop_confidence is not None
        return separation(self.measurement.stddev, self.options.stop_confidence, self.checks)

    def _separation(self) -> Separation | None:
        """The ranking at the end; one planned look, or the next one of the stop rule."""
        if len(self.measurement.stddev) < 2 or self.measurement.windows < FEWEST_GROUPS:
            return None
        if self.options.stop_confidence is None:
            return separation(self.measurement.stddev, self.options.confidence)
        return separation(self.measurement.stddev, self.options.stop_confidence, self.checks + 1)

    def _stopped(self) -> dict[str, Any] | None:
        """What the stop rule did; None where there was none."""
        if self.options.stop_confidence is None:
            return None
        return {
            "confidence": self.options.stop_confidence,
            "settled": self.settled is not None,
            "images": self.measurement.images,
            "windows": self.measurement.windows,
            "checks": self.checks,
        }

    def _save(self) -> None:
        """Keep the state, if it is kept: all processes together."""
        if self._checkpoint is not None:
            replaced_files((self.loader,), self.accelerator)  # all processes' in the loader's state
            self._checkpoint.write(
                {
                    "step": self.batches,
                    "checks": self.checks,
                    "settled": self.settled is not None,
                    "loader": {**self.loader.state_dict(), "position": self.batches},  # one may be fetched and unused
                    "measurement": self.measurement.state_dict(),
                    "logs": self.logs.state_dict(),
                },
            )


class _Checkpoint:
    """A file that a measurement goes on from. Metrics are the same on every process, so one writes and all read."""

    def __init__(self, path: Path, identity: dict[str, Any], writes: bool) -> None:
        self._path, self._identity, self._writes = path, identity, writes

    def read(self) -> dict[str, Any] | None:
        """The saved state, or None where there is no file yet.

        Raises:
            ValueError: it was saved by a measurement with other options.
        """
        if not self._path.exists():
            return None
        state = read_state(self._path)
        saved = renamed(state.get("identity", {}))
        for name, value in self._identity.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"--checkpoint {self._path} was saved with {name} {saved.get(name)}, now it is {value}: measure "
                    "with the same options, or name another file"
                )
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Save, whole or not at all; one process for all."""
        if self._writes:
            save_state(self._path, {**state, "identity": self._identity})


class _Column(NamedTuple):
    """A column of the table: its title, where its number lies in a result, and the digits it is shown with."""

    title: str
    keys: tuple[str, ...]
    digits: str

    def text(self, result: dict[str, Any]) -> str:
        """The number as shown."""
        value: Any = result
        for key in self.keys:
            value = None if value is None else value.get(key)
        if value is None:
            return "too few windows" if self.keys == ("stddev",) else "-"
        return format(value, self.digits)


_COLUMNS = (
    _Column("T. stddev", ("stddev",), ".6f"),
    _Column("std. error", ("stderr",), ".6f"),
    _Column("entropy", ("entropy",), ".4f"),
    _Column("windows", ("windows",), "d"),
)
_MORE_COLUMNS = (
    _Column("cov. of samples", ("probability_covariance", "covariance_samples"), ".3e"),
    _Column("corr. of samples", ("probability_covariance", "correlation_samples"), ".4f"),
    _Column("corr. of classes", ("probability_covariance", "correlation_classes"), ".4f"),
    _Column("cov. of CE", ("cross_entropy_covariance", "covariance"), ".3e"),
    _Column("its approximation", ("cross_entropy_covariance", "approximation"), ".3e"),
)


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table, best (lowest T. stddev) first."""
    rows = sorted(results, key=lambda result: (result["stddev"] is None, result["stddev"]))
    columns = [*_COLUMNS, *(column for column in _MORE_COLUMNS if column.keys[0] in rows[0])]
    lines = [
        f"| augmentation | {' | '.join(column.title for column in columns)} |",
        "|:--|" + "--:|" * len(columns),
    ]
    lines += [f"| {row['augmentation']} | {' | '.join(column.text(row) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def check_measuring(options: MeasureOptions, names: Sequence[str]) -> None:
    """Check what the options say beyond their own numbers.

    Raises:
        ValueError: there is no ranking to stop by, or the checkpoint cannot be written.
    """
    if options.stop_confidence is not None and len(names) < 2:
        raise ValueError("--stop_confidence: there is no ranking of one augmentation; name at least two")
    if options.checkpoint is not None:
        check_writable("--checkpoint", Path(options.checkpoint))


def build_scorer(options: MeasureOptions, source: Source, augmenters: Sequence[Augmenter]) -> Normalized | None:
    """The student, in eval mode, where one is needed; fresh from the seed unless weights are given.

    Returns:
        None where no augmentation and no metric needs one.

    Raises:
        ValueError: one is needed and not named, or its weights do not fit.
    """
    needing = [
        f"{one.name} is scored by a student" for one in augmenters if one.criterion and one.criterion.needs_student
    ]
    if options.model is None and needing:
        raise ValueError(f"{needing[0]}: name its architecture with --model, and its --weights if it has any")
    if not needing and (options.model is None or "cross_entropy_covariance" not in options.metrics):
        return None
    assert options.model is not None
    torch.manual_seed(options.seed)
    student = build_model(options.model, source, weights=options.weights, args=options.model_args)
    return student.to(model_type(options.precision)).requires_grad_(False)


def _header(options: MeasureOptions, setup: Setup, teacher: Teacher, student: Normalized | None) -> dict[str, Any]:
    source, accelerator = setup.source, setup.accelerator
    assert isinstance(teacher.model, Normalized)
    weights = options.weights or "fresh, from the seed"
    return {
        "mode": options.mix.mode,
        "mix_group": options.mix.group,
        "mix": asdict(options.mix),
        "window": options.window,
        "epochs": options.epochs,
        "seed": options.seed,
        "precision": options.precision,
        "compile": options.compile,
        "teacher": {**describe_teacher(options.teacher, teacher.model), "folded_norms": teacher.folded},
        "student": None if student is None else options.model,
        "student_weights": None if student is None else weights,
        "data": {**as_used(options.data, source, accelerator.device), "images": len(source)},
        "class_names": list(source.classes),  # index = label
        "fingerprint": source.fingerprint,
        "processes": accelerator.num_processes,
        "versions": versions(accelerator.device),
    }


def _identity(options: MeasureOptions, view: View, teacher: Teacher, student: Normalized | None) -> dict[str, Any]:
    """What a saved measurement depends on besides its images, which the loader compares."""
    return {
        "augmentation": augmentation_names(options.augmentation),
        **{f"mix.{name}": value for name, value in asdict(options.mix).items()},
        **{f"view.{name}": value for name, value in asdict(view).items()},
        "teacher": teacher.digest_in_use,
        "student": None if student is None else weights_digest(student),
        **{name: getattr(options, name) for name in ("seed", "window", "precision", "stop_confidence")},
        "metrics": list(options.metrics),
    }


def _scorer(student: Normalized | None, accelerator: Accelerator) -> Callable[..., Tensor] | None:
    if student is None:
        return None
    frozen = student.to(accelerator.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def score(images: Tensor, hidden: HiddenMix | None = None) -> Tensor:
        with accelerator.autocast(), hidden_mixing(frozen, hidden):
            return full_precision(frozen(images))

    return score
