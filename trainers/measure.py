"""T. stddev of augmentations: the teacher is asked about originals and augmented images, nothing is trained.

All augmentations asked for are measured in one pass over the data: a batch is read and decoded once, each augmentation
is a branch of it, and the teacher is asked about everything in few calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.covariance import CrossEntropyCovariance, ProbabilityCovariance
from dalikd.kd.entropy_log import EntropyLog, plot_entropies
from dalikd.kd.goodness import FEWEST_GROUPS, TeacherStddev
from dalikd.kd.known_weights import weights_digest
from dalikd.kd.rotation import TURNS
from dalikd.kd.separation import Separation, separation, windows_at
from dalikd.kd.teacher import StudentPart, Teacher, TeacherPass, entropies
from dalikd.pipelines.data import FilePath, as_used
from dalikd.pipelines.draw_spec import Batch, View
from dalikd.pipelines.files import remove_litter, write_atomically
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter, augmentation_names
from dalikd.trainers.checkpoint import read_state, reading, save_state
from dalikd.trainers.evaluate import replaced_files
from dalikd.trainers.launch import model_type
from dalikd.trainers.models import TeacherConfig, build_model, describe_teacher
from dalikd.trainers.options import FROM_1, SHARE, AugmentingOptions, NumberRange, check_numbers
from dalikd.trainers.progress import progress
from dalikd.trainers.renamed import renamed
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.stopping import Interrupted, StopSignals, save_after
from dalikd.trainers.teacher_step import Branches, StudentScores, TeacherStep, gather_outputs
from dalikd.trainers.tracking import alone, check_writable, versions
from dalikd.trainers.trial import check_finite

__all__ = [
    "MeasureOptions",
    "Measurement",
    "MetricName",
    "build_scorer",
    "check_measuring",
    "measure_all",
    "measure_branches",
    "results_table",
]

MetricName = Literal["probability_covariance", "cross_entropy_covariance"]

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

    All of them are measured in one pass over the data: images are decoded once, and the teacher sees the originals
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
        heads: also measure each auxiliary head of a teacher NAME_aux, on what HSAKD's students imitate: its joint
            probabilities of class and turn, of originals and augmented images in all four quarter turns. An image
            counts with the mean of its four, so that windows hold the same images as those of the logits, and T. stddev
            is the mean over joint labels. Compare augmentations within a head: one that is certain, and right, has a
            quarter of what such logits have. The teacher sees four times as many images. Not with manifold_mixup.
        confidence: of the intervals, and of the comparison of neighbours in the ranking.
        stop_confidence: stop as soon as all neighbours in the ranking are told apart at this confidence; the epochs are
            the most that are passed.
        per_class: also write the T. stddev of each class.
        images_per_call: images that a net sees at once at most, if the batch is not larger; with --heads each turn of
            an image counts.
        entropy_log: a folder for the entropies of originals, candidates and picks, as arrays and as a plot, of every
            --entropy_log_every-th batch; the main process's share of it.
        entropy_log_every: batches from one to the next.
        checkpoint: file that the measurement is saved in, and gone on from when called again.
        checkpoint_every: batches between two savings.
        json: file the results are written to, - for stdout.
    """

    augmentation: list[str] = field(default_factory=lambda: ["published"])
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    epochs: int = 10
    window: int = 640
    metrics: list[MetricName] = field(default_factory=list)
    heads: bool = False
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
    check_measuring(options, augmentation_names(options.augmentation))
    if options.checkpoint is None:
        return _measure_all(options, accelerator)
    path = Path(options.checkpoint)
    with alone([(str(path), path.with_name(f".{path.name}.lock"))], accelerator, "--checkpoint"):
        if accelerator.is_main_process:
            remove_litter(path.parent)
        return _measure_all(options, accelerator)


def _measure_all(options: MeasureOptions, accelerator: Accelerator) -> dict[str, Any]:
    names = augmentation_names(options.augmentation)
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


def measure_branches(
    branches: Branches,
    loader: Loader,
    teacher: Teacher,
    accelerator: Accelerator,
    options: MeasureOptions,
    student: Normalized | None = None,
) -> dict[str, Any]:
    """Measure augmentations in one pass over the data, epoch after epoch; windows run on across epochs.

    Args:
        branches: the augmentations.
        loader: over every row once an epoch (drop_last=False), with the draws of the branches.
        teacher: frozen.
        accelerator: whose processes share each batch; the result is that of one process.
        options: epochs, window and what else is to be done; they name no data and no nets here.
        student: in eval mode; for augmentations and metrics that need it.

    Returns:
        "results": of each augmentation "augmentation", "stddev", "stderr", "interval", "entropy", "windows", "images"
        (originals), "window", "per_class" by the class's name, and, where the options say so, "heads", from the
        shallowest on: "stddev", "stderr", "interval" and "entropy" of each; "separation", "stopped", "entropy_plots"
        and "replaced_files".

    Raises:
        ValueError: heads are to be measured, and the teacher has none.
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
        self.augmenters, classes = branches.augmenters, len(loader.source.classes)
        scores: StudentScores | None = None
        part: StudentPart = "candidates"
        if student is not None:
            student.to(accelerator.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            scores = StudentScores(student, accelerator, self.augmenters[0].group, learns=False)
        for augmenter in self.augmenters:
            augmenter.check_nets(options.compile, ("the teacher", teacher.model), ("the student", student))
        if options.entropy_log is not None and any(augmenter.picked_by_student for augmenter in self.augmenters):
            part = "originals"
        if student is not None and "cross_entropy_covariance" in options.metrics:
            part = "everything"
        self.teacher_step = TeacherStep(
            teacher, branches, scores, options.compile, student_part=part, images_per_call=options.images_per_call,
            num_classes=classes, heads=options.heads,
        )  # fmt: skip
        self.measurement = Measurement(
            branches, classes, accelerator, options, student=part == "everything", heads=options.heads * teacher.heads
        )
        self.logs: dict[str, EntropyLog] = {}  # by augmentation, where this process logs
        if options.entropy_log is not None and accelerator.is_main_process:
            self.logs = {augmenter.name: EntropyLog(options.entropy_log_every) for augmenter in self.augmenters}
        self.batches = 0
        self.checks = 0
        self.settled: Separation | None = None
        self._checkpoint: tuple[Path, dict[str, Any]] | None = None

    @torch.no_grad()
    def go(self) -> None:
        """Measure to the end.

        Raises:
            BadFileError, Interrupted: as `StopSignals.together`; the state is saved if it is kept.
        """
        total = self.options.epochs * len(self.loader)
        images = self.options.epochs * len(self.loader.source)
        title = "measure" if len(self.augmenters) > 1 else next(iter(self.measurement.stddev))
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

    def _step(self, batch: Batch) -> None:
        options = self.options
        if options.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()  # the last batch's outputs may be overwritten
        found = self.teacher_step(batch)
        if self.batches == 0:  # at the cost of a wait
            check_finite(torch.cat([found.originals.logits, *(of.logits for of in found.branches)]), "the teacher")
            for number, rows in enumerate(found.originals.heads, start=1):
                check_finite(rows.flatten(1), f"the teacher's head {number}")
        self.measurement.update(found, batch, self.loader.sampler.microbatch)
        for log, augmenter, branch in zip(self.logs.values(), self.augmenters, found.branches, strict=False):
            if log.due(self.batches) and len(batch):
                scored = found.student_logits if augmenter.picked_by_student else found.originals.logits
                assert scored is not None
                log.add(self.batches, *entropies(scored, branch))
        self.batches += 1
        due = windows_at(self.checks + 1, _FIRST_CHECK)  # every check is at a number of windows that is known before
        if options.stop_confidence is not None and self.measurement.windows >= due:
            self.checks += 1
            ranking = separation(self.measurement.stddev, options.stop_confidence, self.checks)
            self.settled = ranking if ranking.separated else None
        if self.batches % options.checkpoint_every == 0:
            self._save()

    def report(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """What was found, as `measure_branches` returns it. Every process must ask."""
        options, stddev, ranking, stopped = self.options, self.measurement.stddev, self.settled, None
        if ranking is None and len(stddev) > 1 and self.measurement.windows >= FEWEST_GROUPS:
            # the one planned check, or the next one of the stop rule
            confidence = options.confidence if options.stop_confidence is None else options.stop_confidence
            ranking = separation(stddev, confidence, self.checks + 1)
        if options.stop_confidence is not None:
            stopped = {
                "confidence": options.stop_confidence,
                "settled": self.settled is not None,
                "images": self.measurement.images,
                "windows": self.measurement.windows,
                "checks": self.checks,
            }
        return {
            "results": self.measurement.results(options.confidence, class_names),
            "confidence": options.confidence,
            "separation": None if ranking is None else asdict(ranking),
            "stopped": stopped,
            "entropy_plots": self._plot(),
            "replaced_files": replaced_files((self.loader,), self.accelerator),
        }

    def _plot(self) -> list[str]:
        """Write the logs' arrays and plots, and return the paths of the plots."""
        folder = Path(self.options.entropy_log or ".")
        for name, log in self.logs.items():
            write_atomically(folder / f"{name}.npz", log.save)
            plot_entropies(log, folder / f"{name}.png", name)
        return [str(folder / f"{name}.png") for name in self.logs]

    def keep_state(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on where the file says that an earlier call stopped, and keep it up to date.

        Raises:
            ValueError: it was saved by a measurement with other options.
        """
        self._checkpoint = path, identity
        if not path.exists():
            return
        state = read_state(path)
        with reading(path):
            self._take(state, path, identity)

    def _take(self, state: dict[str, Any], path: Path, identity: dict[str, Any]) -> None:
        saved = renamed(state.get("identity", {}))
        for name, value in identity.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"--checkpoint {path} was saved with {name} {saved.get(name)}, now it is {value}: measure "
                    "with the same options, or name another file"
                )
        self.batches, self.checks = state["step"], state["checks"]
        if self.batches > self.options.epochs * len(self.loader):
            raise ValueError(
                f"--checkpoint {path} is of more than --epochs {self.options.epochs}: give as many as it has, or "
                "name another file"
            )
        self.loader.load_state_dict(state["loader"])
        self.measurement.load_state_dict(state["measurement"])
        if state["settled"]:
            assert self.options.stop_confidence is not None
            self.settled = separation(self.measurement.stddev, self.options.stop_confidence, self.checks)
        for name, log in self.logs.items():
            if name in state["logs"]:
                log.load_state_dict(state["logs"][name])

    def _save(self) -> None:
        """Keep the state, if it is kept: all processes together; it is the same on each, so that one writes."""
        if self._checkpoint is None:
            return
        replaced_files((self.loader,), self.accelerator)  # all processes' in the loader's state
        path, identity = self._checkpoint
        state = {
            "step": self.batches,
            "checks": self.checks,
            "settled": self.settled is not None,
            "loader": {**self.loader.state_dict(), "position": self.batches},  # one may be fetched and unused
            "measurement": self.measurement.state_dict(),
            "logs": {name: log.state_dict() for name, log in self.logs.items()},
            "identity": identity,
        }
        if self.accelerator.is_main_process:
            save_state(path, state)


class Measurement:
    """The metrics of several augmentations over one stream of batches, the same for every number of processes.

    Args:
        branches: the augmentations.
        num_classes: of the nets.
        accelerator: whose processes share each batch.
        options: the window of T. stddev, and what is measured beside it and entropy.
        student: whether there are a student's outputs.
        heads: how many auxiliary heads of the teacher there are outputs of.

    Attributes:
        images: originals so far.
        stddev: T. stddev of each augmentation.
    """

    def __init__(
        self,
        branches: Branches,
        num_classes: int,
        accelerator: Accelerator,
        options: MeasureOptions,
        *,
        student: bool,
        heads: int = 0,
    ) -> None:
        device, names = accelerator.device, [augmenter.name for augmenter in branches.augmenters]
        self._accelerator, self._student, self.images = accelerator, student, 0
        self._group, self._n_picks = branches.augmenters[0].group, [branch.n_pick for branch in branches.branches]
        self.stddev = {name: TeacherStddev(num_classes, options.window, device) for name in names}
        self._probabilities: dict[str, ProbabilityCovariance] = {}
        self._cross_entropies: dict[str, CrossEntropyCovariance] = {}
        if "probability_covariance" in options.metrics:
            self._probabilities = {name: ProbabilityCovariance(num_classes, self._group, device) for name in names}
        if "cross_entropy_covariance" in options.metrics:
            self._cross_entropies = {
                name: CrossEntropyCovariance(group=self._group, student=student, device=device) for name in names
            }
        self._metrics: dict[str, dict[str, Any]] = {
            "stddev": self.stddev,
            "probability_covariance": self._probabilities,
            "cross_entropy_covariance": self._cross_entropies,
        }
        self._heads = [  # of each head by augmentation
            {name: TeacherStddev(TURNS * num_classes, options.window, device, TURNS) for name in names}
            for _ in range(heads)
        ]
        self._metrics |= {f"head{number}": metrics for number, metrics in enumerate(self._heads, start=1)}

    @property
    def windows(self) -> int:
        """Complete windows so far, the same of every augmentation; reading it does not wait for the device."""
        return min(metric.windows for metric in self.stddev.values())

    def update(self, found: TeacherPass, batch: Batch, microbatch: int) -> None:
        """Add a batch. Every process calls this, also one that has no rows left of a short last batch.

        Args:
            found: what the nets give for this process's rows.
            batch: those rows.
            microbatch: rows of a whole batch and process.
        """
        n_picks, count = [None, *self._n_picks], 1 + len(self._n_picks)
        outputs: list[Any] = [found.originals.logits, *(of.logits for of in found.branches)]
        if self._student:
            outputs += [found.student_logits, *(of.student_logits for of in found.branches)]
            n_picks *= 2
        every = gather_outputs(
            self._accelerator, list(zip(outputs, n_picks, strict=True)), microbatch, batch.total, self._group
        )
        logits, *augmented = every[:count]
        student, *of_students = every[count:] or [None] * count
        for name, of, of_student in zip(self.stddev, augmented, of_students, strict=True):
            self.stddev[name].update(logits, of, self._group)
            if name in self._probabilities:
                self._probabilities[name].update(logits, of)
            if name in self._cross_entropies and not self._cross_entropies[name].complete:  # as published, and bounded
                self._cross_entropies[name].update(logits, of, student, of_student)
        self._update_heads(found, batch, microbatch)
        self.images += batch.total

    def _update_heads(self, found: TeacherPass, batch: Batch, microbatch: int) -> None:
        outputs = list(zip((found.originals, *found.branches), (None, *self._n_picks), strict=True))
        for number, metrics in enumerate(self._heads):
            rows = [(of.heads[number].flatten(1), n_pick) for of, n_pick in outputs]
            every = gather_outputs(self._accelerator, rows, microbatch, batch.total, self._group)
            logits, *augmented = (images.unflatten(1, (TURNS, -1)).flatten(0, 1) for images in every)
            for metric, of in zip(metrics.values(), augmented, strict=True):
                metric.update(logits, of, self._group)

    def results(self, confidence: float, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The figures of each augmentation. Waits for the device.

        Args:
            confidence: of the intervals.
            class_names: to have the figure of each class as well.
        """
        results = []
        for name, metric in self.stddev.items():
            found = metric.compute()
            figures = {**asdict(found), "interval": found.interval(confidence), "images": self.images}
            del figures["per_class"]
            if class_names is not None:
                figures["per_class"] = dict(zip(class_names, found.per_class, strict=True)) if found.per_class else None
            for kind in ("probability_covariance", "cross_entropy_covariance"):
                if self._metrics[kind]:
                    figures[kind] = asdict(self._metrics[kind][name].compute())
            if self._heads:
                heads = [metrics[name].compute() for metrics in self._heads]
                figures["heads"] = [
                    {
                        "stddev": head.stddev,
                        "stderr": head.stderr,
                        "interval": head.interval(confidence),
                        "entropy": head.entropy,
                    }
                    for head in heads
                ]
            results.append({"augmentation": name, **figures})
        return results

    def state_dict(self) -> dict[str, Any]:
        """Everything that a measurement needs to go on."""
        kinds = {kind: {name: one.state_dict() for name, one in of.items()} for kind, of in self._metrics.items()}
        return {"images": self.images, **kinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.images = state["images"]
        for kind, metrics in self._metrics.items():
            for name, metric in metrics.items():
                metric.load_state_dict(state[kind][name])


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
    rows = [
        {**result, **{f"head {number}": head for number, head in enumerate(result.get("heads", ()), start=1)}}
        for result in sorted(results, key=lambda result: (result["stddev"] is None, result["stddev"]))
    ]
    columns = [*_COLUMNS, *(column for column in _MORE_COLUMNS if column.keys[0] in rows[0])]
    columns += [_Column(f"T. stddev of {key}", (key, "stddev"), ".6f") for key in rows[0] if key.startswith("head ")]
    lines = [
        f"| augmentation | {' | '.join(column.title for column in columns)} |",
        "|:--|" + "--:|" * len(columns),
    ]
    lines += [f"| {row['augmentation']} | {' | '.join(column.text(row) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def check_measuring(options: MeasureOptions, names: Sequence[str]) -> None:
    """Check what the options say beyond their own numbers.

    Raises:
        ValueError: there is no ranking to stop by, there are no heads or no images to turn for them, or the checkpoint
            cannot be written.
    """
    if options.stop_confidence is not None and len(names) < 2:
        raise ValueError("--stop_confidence: there is no ranking of one augmentation; name at least two")
    teacher = options.teacher.name
    if options.heads and teacher is not None and not teacher.endswith("_aux"):
        raise ValueError(
            f"--heads true measures auxiliary heads, and {teacher} has none: take {teacher}_aux with weights of "
            "its heads too, as dalikd train makes them"
        )
    hidden = [name for name in names if name.partition("+")[0] == "manifold_mixup"]
    if options.heads and hidden:
        raise ValueError(
            f"--heads true: {hidden[0]} mixes hidden states, not images that could be turned: leave it out of "
            "--augmentation, where all means it too"
        )
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
        "heads": options.heads,
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
        "heads": options.heads or None,  # what was saved before there were heads has none
    }
