"""Distillation: the student learns from labels and from what the teacher gives for originals and augmented images."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.layers import NetOutput, Normalized
from dalikd.kd.entropy_log import EntropyLog, plot_entropies
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.losses import KD, DistillationLoss, LossContext, MixedOutputs, StepOutputs, WeightedSum
from dalikd.kd.manifold import mixed_forward
from dalikd.kd.mixing import HiddenMix
from dalikd.kd.rotation import TURNS, rotations
from dalikd.kd.teacher import Teacher, TeacherPass, Teachers, entropies
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.loader import Loader
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import CompileMode
from dalikd.trainers.models import describe_teacher
from dalikd.trainers.options import NumberRange, check_numbers
from dalikd.trainers.setup import Setup, SeveralTeachers
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.teacher_cache.read import CachedTeacher, open_cached
from dalikd.trainers.teacher_step import Branches, StudentScores, TeacherStep, gather_outputs
from dalikd.trainers.trial import check_finite

__all__ = [
    "OWN",
    "DistillOptions",
    "Distillation",
    "DistillationInputs",
    "build_loss",
    "check_unlabelled",
    "check_views",
    "share_pass",
]


@dataclass
class DistillOptions(SeveralTeachers, TrainingOptions):
    """Distil a teacher into a student.

    Args:
        students: YAML file of a list of students, each {name, model, seed of its weights, loss, optimizer, …}, that are
            distilled together: the teacher is asked once a step for all of them, and each ends as it would alone. Their
            run folders are OUTPUT/NAME, their weights OUTPUT/last/NAME.safetensors.
        freeze_student: leave the student as its weights are: losses, T. stddev and evaluation are observed, and nothing
            of it is trained.
        loss: class of the distillation loss, with its options as --loss.temperature and so on.
        joint_forward: one student forward over originals and augmented images instead of two; faster, but batch
            normalisation then sees both at once.
        metric: also stream the teacher's T. stddev and entropy over the training images.
        entropy_log_every: batches between two records of the entropies of originals, candidates and picks, by the net
            that picks; they go to entropies.npz and entropies.png in the run folder. 0: none.
    """

    learns_from_labels: ClassVar[bool] = False

    students: FilePath | None = None
    freeze_student: bool = False
    loss: DistillationLoss = field(default_factory=KD)
    joint_forward: bool = False
    metric: bool = True
    entropy_log_every: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with, and for teachers that do not go together."""
        super().__post_init__()
        check_numbers(self, {"entropy_log_every": NumberRange(lambda value: value >= 0, "at least 1, or 0 for no log")})
        if self.data.name == "images":
            check_unlabelled(self.loss)
        self.check_teachers()

    def build_student(self, setup: Setup, *, frozen: bool = False) -> Normalized:
        """The net that is trained, or observed as its weights are."""
        if self.freeze_student and (self.weights is None or self.reinit):
            raise ValueError(
                "--freeze_student true observes a student as its weights are: give them with --weights, without "
                "--reinit"
            )
        return super().build_student(setup, frozen=frozen or self.freeze_student)

    def build(self, setup: Setup) -> "Distillation":
        """The nets, joined. Where a cache holds what the teacher says, no teacher is opened."""
        augmenter = setup.augmenter(self.augmentation)
        teacher, header, digest, answers = (
            self._several_teachers(setup) if self.teachers else self._teacher(setup, augmenter)
        )
        student = self.build_student(setup)
        asked = teacher.model if isinstance(teacher, Teacher) else None
        named = zip(teacher.names, teacher.model, strict=True) if isinstance(teacher, Teachers) else ()
        several = [(f"the teacher {name}", net) for name, net in named]
        augmenter.check_nets(self.compile, ("the teacher", asked), *several, ("the student", student))
        task = Distillation(
            student,
            teacher,
            self.loss,
            augmenter,
            setup.accelerator,
            len(setup.source.classes),
            joint_forward=self.joint_forward,
            metric=self.metric,
            entropy_log=EntropyLog(self.entropy_log_every) if self.entropy_log_every else None,
            compile_mode=self.compile,
            side=setup.view.size,
            labels=setup.source.labels,
            labelled=setup.source.labelled,
            batch=setup.sampler(accumulation=self.accumulation).microbatch,
        )
        task.header, task.contents = header, {"the_teacher's_weights_or_normalisation": digest}
        task.title = f"{self.augmentation}, {self.model}"
        task.told = {"the teacher's answers come": answers}
        return task

    def _teacher(self, setup: Setup, augmenter: Augmenter) -> tuple[Teacher | CachedTeacher, dict[str, Any], str, str]:
        """The teacher or what a cache holds of it, what results say of it, the digest of what its outputs depend on,
        and where they come from."""
        config = self.teacher
        if config.cache is None:
            asked = setup.teacher(config)
            assert isinstance(asked.model, Normalized)
            header = {"teacher": describe_teacher(config, asked.model)}
            return asked, header, _digest(asked.digest, *asked.model.normalisation), "from the teacher itself"
        if self.entropy_log_every and augmenter.criterion is not None:
            raise ValueError(
                "--entropy_log_every: a teacher cache holds no outputs on candidates that were not picked; distil "
                "without --teacher.cache, or without the log"
            )
        cached = open_cached(self, config, setup, augmenter)
        layout, described = cached.cache.layout, cached.describe(self.length)
        setup.accelerator.print(described["summary"], flush=True)
        weights, mean, std = (layout.fingerprint[f"teacher.{name}"] for name in ("weights", "mean", "std"))
        source = f"from a cache of {layout.epochs} epochs ({layout.storage})"
        return cached, {"teacher_cache": described}, _digest(weights, mean, std), source

    def _several_teachers(self, setup: Setup) -> tuple[Teachers, dict[str, Any], str, str]:
        """The same of several teachers."""
        teachers = setup.teachers(self)
        described, digests = [], []
        for config, asked in zip(self.teachers, teachers.teachers, strict=True):
            assert isinstance(asked.model, Normalized)
            described.append(describe_teacher(config, asked.model))
            digests.append(_digest(asked.digest, *asked.model.normalisation))
        header = {"teachers": described, "teacher_weights": list(teachers.weights)}
        return teachers, header, f"{len(described)} of them: {'; '.join(digests)}", "from the teachers themselves"


def _digest(weights: object, mean: Iterable[float], std: Iterable[float]) -> str:
    """What a teacher's outputs depend on in the teacher; the same whether it is asked or read from a cache."""
    return " ".join([str(weights), *(f"{value:.6g}" for value in (*mean, *std))])


#: options that students of one teacher pass may have for themselves; in all others they are alike
OWN = frozenset(
    {"model", "model_args", "weights", "reinit", "init_seed", "mean", "std", "freeze_student", "loss", "optimizer"}
    | {"clip_grad_norm", "no_decay_norms", "ema", "schedule", "joint_forward", "output", "resume", "overwrite"}
)

#: what a loss may need that brings the features of both nets along
FEATURE_NEEDS = frozenset(
    {"features", "preactivations", "teacher_classifier", "student_classifier", "teacher_norms", "turned"}
)


class DistillationInputs(NamedTuple):
    """Images, and what the teacher gives for them. There may be more or fewer augmented images than originals, and in
    another order. Where the loss needs them, the originals come in all four quarter turns, 4B of them."""

    pixels: Tensor  # originals [B, 3, S, S]
    teacher: NetOutput  # on the originals
    labels: Tensor  # int64 [B]
    ids: Tensor  # rows of the data set, int64 [B]
    epoch: Tensor  # epochs done, a float32 scalar
    augmented: Tensor | None  # augmented images [n, 3, S, S]; None where they are the originals (identity)
    augmented_logits: Tensor  # the teacher's on them [n, C]
    augmented_labels: Tensor  # labels of the images that they stem from, int64 [n]
    partner_labels: Tensor  # labels of the images mixed in, int64 [n]
    lam: Tensor  # share of the image itself [n]
    hidden: HiddenMix | None = None  # how the student mixes hidden states of augmented images and originals


class Distillation(Task):
    """The student learns from one teacher pass a batch, and T. stddev is streamed from the same pass; with several
    teachers, that of each too.

    Args:
        student: takes pixels.
        teacher: frozen; or several of them, or what a cache holds of one.
        loss: of the outputs; parameters of its own are trained along.
        augmenter: makes the candidates.
        accelerator: processes that share each step.
        num_classes: of both nets.
        joint_forward: one student forward over originals and augmented images.
        metric: whether to stream T. stddev.
        entropy_log: where the entropies of this process's images go, by the net that picks.
        compile_mode: of the teacher's pass; the task is the loop's to compile.
        side: of the images in pixels,
        labels: of all that are trained on, and
        batch: images of a batch on this process, for a loss that is built from the nets.
        labelled: whether there are labels; else the student's agreement with the teacher is counted for its accuracy.

    Raises:
        ValueError: the loss needs what there is not.
    """

    def __init__(
        self,
        student: Normalized,
        teacher: Teacher | Teachers | CachedTeacher,
        loss: DistillationLoss,
        augmenter: Augmenter,
        accelerator: Accelerator,
        num_classes: int,
        *,
        joint_forward: bool = False,
        metric: bool = True,
        entropy_log: EntropyLog | None = None,
        compile_mode: CompileMode = "off",
        side: int = 32,
        labels: Sequence[int] | np.ndarray = (),
        batch: int = 0,
        labelled: bool = True,
    ) -> None:
        super().__init__()
        self._labelled = labelled
        self.student, self.loss, self.teacher = student, loss, teacher
        self.joint_forward = joint_forward
        self.augmenter, self._accelerator = augmenter, accelerator
        build_loss(loss, student, teacher, augmenter, num_classes, side, labels, batch)
        self._features = bool(loss.needs & FEATURE_NEEDS) or "heads" in loss.needs
        self.student = student = loss.complete(student)
        self._scores = StudentScores(student, accelerator, augmenter.group, augmenter.runs, compile_mode)
        self._turned = "turned" in loss.needs
        self._compile_mode: CompileMode = compile_mode
        ask: Callable[..., TeacherPass] = teacher  # type: ignore[assignment]
        if not isinstance(teacher, CachedTeacher):
            ask = TeacherStep(teacher, Branches([augmenter]), self._scores, compile_mode, loss.needs & FEATURE_NEEDS)
        self._pass = SharedPass(ask)
        self._branch = 0  # of the pass
        self.draw_spec = augmenter.draw_spec
        self._names = teacher.names if isinstance(teacher, Teachers) and metric else ()
        self.goodness = TeacherStddev(num_classes, device=accelerator.device) if metric else None
        self.goodness_of_each = [TeacherStddev(num_classes, device=accelerator.device) for _ in self._names]
        self.entropy_log, self._batches = entropy_log, 0
        self.title = augmenter.name  # of its plots
        self._asked = False

    @property
    def nets(self) -> dict[str, Normalized]:
        """The student alone."""
        return {"student": self.student}

    def remember(self, batches: int) -> None:
        """Keep what the teacher gives for so many batches, those of a step, for tasks that share the pass; 0: none."""
        self._pass.keep(batches)

    def loader(self, setup: Setup, accumulation: int = 1) -> Loader:
        """The batches, with what a cache holds of the teacher; after its last epoch the first comes again."""
        spec, cached = self.draw_spec, self.teacher
        if not isinstance(cached, CachedTeacher):
            return setup.loader(spec, accumulation=accumulation)
        repeat = cached.cache.layout.epochs
        return setup.loader(spec, accumulation=accumulation, repeat=repeat, attach=cached.attach)

    def own_draws(self, batch: Batch) -> Batch:
        """Without what the augmentations of other tasks, which share the pass, have drawn."""
        own, joint = self.augmenter.draw_spec, self.draw_spec
        views, mixes = map(joint.views.index, own.views), map(joint.mixes.index, own.mixes)
        return replace(
            batch,
            augmented=tuple(batch.augmented[place] for place in views),
            mix=tuple(batch.mix[place] for place in mixes),
        )

    def finish(self, folder: Path) -> None:
        """Write the entropies, and draw them."""
        if self.entropy_log:
            write_atomically(folder / "entropies.npz", self.entropy_log.save)
            plot_entropies(self.entropy_log, folder / "entropies.png", self.title)

    @property
    def local_buffers(self) -> list[str]:
        """The loss's own."""
        return [f"loss.{name}" for name in self.loss.local_buffers]

    def prepare(self, batch: Batch, epoch: float) -> DistillationInputs:
        """Pixels, labels and what the teacher gives; T. stddev and the log see the same."""
        found, pixels, fresh = self._pass(batch, self._branch, turned=self._turned)
        branch = found.branches[self._branch]
        if not self._asked:
            self._asked = True  # the first time, at the cost of a wait
            check_finite(torch.cat((found.originals.logits, branch.logits)), "the teacher")
        group = self.augmenter.group
        if self.goodness is not None and fresh:
            outputs = [(rows, None) for rows in (found.originals.logits, *found.originals.each)]
            outputs += [(rows, self.augmenter.n_pick) for rows in (branch.logits, *branch.each)]
            rows = gather_outputs(self._accelerator, outputs, len(batch.labels), batch.total, group)
            metrics = [self.goodness, *self.goodness_of_each]
            for number, metric in enumerate(metrics):
                metric.update(rows[number], rows[len(metrics) + number], group)
        if self.entropy_log is not None:
            if fresh and self.entropy_log.due(self._batches):
                by_student = self.augmenter.picked_by_student and branch.pool_logits is not None
                scored = self._scores.originals(batch.pixels) if by_student else found.originals.logits
                self.entropy_log.add(self._batches, *entropies(scored, branch))
            self._batches += 1
        mixed = branch.mixed
        return DistillationInputs(
            pixels,
            found.originals if found.turned is None else found.turned,
            batch.labels,
            batch.ids,
            torch.full((), epoch, device=batch.labels.device),
            mixed.images if self.augmenter.parts else None,
            branch.logits,
            batch.labels[branch.rows],
            batch.labels[mixed.partner],
            mixed.lam,
            mixed.hidden,
        )

    def forward(self, inputs: DistillationInputs) -> dict[str, Tensor]:
        """Named terms: the loss's, and "top1", the accuracy on the originals; without labels "agreement", the share of
        them to which the student gives the teacher's class."""
        pixels, augmented, joint = inputs.pixels, inputs.augmented, self.joint_forward
        wanted = {"features": self._features, "preactivations": "preactivations" in self.loss.needs}
        wanted["heads"] = self._turned
        if inputs.hidden is not None and augmented is not None:
            student, mixed_logits = mixed_forward(
                self.student, pixels, augmented, inputs.hidden, joint=joint, features=self._features
            )
        elif augmented is not None and joint:
            both = self.student.outputs(torch.cat((pixels, augmented)), **wanted)
            student, mixed_logits = both.first(len(pixels)), both.logits[len(pixels) :]
        else:
            student = self.student.outputs(pixels, **wanted)
            mixed_logits = student.logits if augmented is None else self.student(augmented)
        teacher, turned = inputs.teacher, None
        if self._turned:
            turned = student, teacher
            student, teacher = (net.map(lambda rows: rows[::TURNS]) for net in turned)
            mixed_logits = student.logits if augmented is None else mixed_logits
        mixed = MixedOutputs(
            mixed_logits, inputs.augmented_logits, inputs.augmented_labels, inputs.partner_labels, inputs.lam
        )
        outputs = StepOutputs(student, teacher, inputs.labels, inputs.ids, inputs.epoch, mixed, turned, self._labelled)
        given = student.logits.argmax(1)
        if not self._labelled:
            return {**self.loss(outputs), "agreement": (given == teacher.logits.argmax(1)).float().mean()}
        return {**self.loss(outputs), "top1": (given == inputs.labels).float().mean()}

    def metrics(self) -> dict[str, Any]:
        """T. stddev and entropy so far; of several teachers, what they give together, and "teachers", a list of name
        and figures of each."""
        if self.goodness is None:
            return {}
        result, each = self.goodness.compute(), []
        for name, metric in zip(self._names, self.goodness_of_each, strict=True):
            own = metric.compute()
            each.append({"name": name, "t_stddev": own.stddev, "t_entropy": own.entropy})
        figures = {"t_stddev": result.stddev, "t_entropy": result.entropy, "windows": result.windows}
        return {**figures, "teachers": each} if each else figures

    def get_extra_state(self) -> dict[str, Any]:
        """The state of metric and log."""
        return {
            **({} if self.goodness is None else {"goodness": self.goodness.state_dict()}),
            **{f"goodness{number}": metric.state_dict() for number, metric in enumerate(self.goodness_of_each)},
            **({} if self.entropy_log is None else {"entropy_log": self.entropy_log.state_dict()}),
            **({} if self.entropy_log is None else {"batches": self._batches}),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the state of metric and log."""
        self._batches = state.get("batches", 0)
        if self.entropy_log is not None and "entropy_log" in state:
            self.entropy_log.load_state_dict(state["entropy_log"])
        if self.goodness is not None and "goodness" in state:
            self.goodness.load_state_dict(state["goodness"])
            for number, metric in enumerate(self.goodness_of_each):
                metric.load_state_dict(state[f"goodness{number}"])


class SharedPass:
    """What the teacher gives for a batch, asked once for all tasks that learn from it.

    Args:
        ask: a batch, and its originals in all quarter turns where they are wanted, -> what the teacher gives.
    """

    def __init__(self, ask: Callable[..., TeacherPass]) -> None:
        self._ask = ask
        self._known: deque[tuple[Batch, TeacherPass, Tensor, set[int]]] = deque()
        self._kept = 0

    def keep(self, batches: int) -> None:
        """Remember so many batches, those of a step; none where nobody else asks."""
        self._kept = batches
        self._known.clear()

    def __call__(self, batch: Batch, branch: int, *, turned: bool) -> tuple[TeacherPass, Tensor, bool]:
        """What the teacher gives, the originals' pixels, all four turns of them where wanted, and whether nobody has
        had this branch of the batch yet."""
        for known, found, pixels, given in self._known:
            if known is batch:
                fresh = branch not in given
                given.add(branch)
                return found, pixels, fresh
        if self._known and len(self._known) == self._kept:
            self._known.popleft()  # the device needs its memory now
        pixels = rotations(batch.pixels) if turned else batch.pixels
        found = self._ask(batch, pixels) if turned else self._ask(batch)
        if self._kept:
            self._known.append((batch, found, pixels, {branch}))
        return found, pixels, True


def share_pass(tasks: Sequence[Distillation], accumulation: int) -> None:
    """Ask the teacher once a batch for several tasks, which have the same teacher and images; each augmentation is a
    branch of the pass.

    Those whose losses turn the originals share a pass of their own. T. stddev and the log of entropies are then one's
    of those with the same augmentation.

    Args:
        tasks: each with a student and a loss of its own.
        accumulation: batches of a step.

    Raises:
        ValueError: students pick for themselves.
    """
    augmenters = {task.augmenter.name: task.augmenter for task in tasks}
    for augmenter in augmenters.values():
        if augmenter.criterion is not None and augmenter.criterion.needs_student:
            raise ValueError(
                f"--augmentation {augmenter.name} lets each student pick its own images, so that they have no "
                "teacher pass in common: take cutmixpick_teacher, or distil the students one by one"
            )
    branches, names = Branches(list(augmenters.values())), list(augmenters)
    for turned in (False, True):
        alike = [task for task in tasks if task._turned is turned]
        if not alike:
            continue
        first = alike[0]
        if not isinstance(first.teacher, CachedTeacher):
            needs = frozenset().union(*(task.loss.needs for task in alike)) & FEATURE_NEEDS
            first._pass = SharedPass(TeacherStep(first.teacher, branches, None, first._compile_mode, needs))
        first.remember(accumulation)
        firsts = dict[str, Distillation]()  # by their augmentation
        for task in alike:
            one = firsts.setdefault(task.augmenter.name, task)
            task._pass, task._branch = first._pass, names.index(task.augmenter.name)
            task.draw_spec, task.entropy_log = branches.draw_spec, one.entropy_log
            task.goodness, task.goodness_of_each = one.goodness, one.goodness_of_each


def build_loss(
    loss: DistillationLoss,
    student: Normalized,
    teacher: Teacher | Teachers | CachedTeacher,
    augmenter: Augmenter,
    num_classes: int,
    side: int,
    labels: Sequence[int] | np.ndarray,
    batch: int = 0,
) -> None:
    """Show a loss what both nets give, if it wants to see it.

    Args:
        loss: to be built.
        student: takes pixels.
        teacher: frozen; or several of them, or what a cache holds of one.
        augmenter: makes the augmented images.
        num_classes: of both nets.
        side: of the images in pixels.
        labels: of all that are trained on.
        batch: originals that a process gives at once; 0: not known.

    Raises:
        ValueError: the loss needs what there is not, or the nets do not go together.
    """
    name, needs = f"--loss {type(loss).__name__}", loss.needs
    of_teacher, before = needs & FEATURE_NEEDS, "preactivations" in needs
    check_views(loss, augmenter)
    trained = any(values.requires_grad for values in student.parameters())
    if isinstance(student.model, AuxiliaryNet) and trained and "turned" not in needs:
        raise ValueError(
            f"{name} leaves the student's auxiliary heads without training: take --loss HSAKD or a sum with it, or the "
            "net without _aux"
        )
    if not needs and type(loss).build is DistillationLoss.build:
        return
    if of_teacher and isinstance(teacher, Teachers):
        raise ValueError(
            f"{name} needs the teacher's {', '.join(sorted(of_teacher))}, and several teachers have their logits alone "
            "in common: take a loss on logits, such as KD, or one teacher with --teacher.name"
        )
    if of_teacher and not isinstance(teacher, Teacher):
        raise ValueError(
            f"{name} needs the teacher's {', '.join(sorted(of_teacher))}, and a cache holds its logits alone: distil "
            "without --teacher.cache"
        )
    if before and augmenter.mixes_hidden:
        raise ValueError(
            f"{name} compares what comes before the stages' last ReLU, where {augmenter.name} does not mix: take "
            "another augmentation or loss"
        )
    if "turned" in needs and augmenter.mixes_hidden:
        raise ValueError(
            f"{name} turns the original images, whose hidden states {augmenter.name} mixes in unturned: take another "
            "augmentation or loss"
        )

    def black(net: nn.Module) -> Tensor:
        return torch.zeros(2, 3, side, side, device=next(net.parameters()).device)

    modes = {part: part.training for part in student.modules()}
    with torch.no_grad():
        featured = bool(of_teacher) or "heads" in needs
        wanted = {"features": featured, "preactivations": before}
        heads = "turned" in needs and isinstance(student.model, AuxiliaryNet)
        own = student.eval().outputs(black(student), **wanted, heads=heads)
        given, classifier, norms = NetOutput(torch.zeros(2, num_classes)), None, ()
        if isinstance(teacher, Teacher) and of_teacher:
            heads = "turned" in needs and isinstance(teacher.model.model, AuxiliaryNet)
            given = teacher.outputs(black(teacher.model), preactivations=before, heads=heads)
            classifier = _classifier(teacher.model) if "teacher_classifier" in needs else None
            norms = teacher.norms if "teacher_norms" in needs else ()
    for part, training in modes.items():
        part.training = training
    last = _classifier(student) if "student_classifier" in needs else None
    rows = torch.as_tensor(np.asarray(labels, np.int64)) if "all_labels" in needs else None
    loss.build(LossContext(own, given, num_classes, len(labels), rows, classifier, last, norms, batch, side))
    loss.to(next(student.parameters()).dtype)


def check_unlabelled(loss: DistillationLoss) -> None:
    """Raises ValueError where a loss learns from labels, and there are none."""
    name, options = f"--loss {type(loss).__name__}", loss.label_options
    if options is None:
        raise ValueError(
            f"{name} learns from labels, and --data.name images has none: take one that can compare the nets alone, "
            "such as --loss KD --loss.ce_weight 0"
        )
    if options:
        remedy = " ".join(f"--loss.{option} 0" for option in options)
        if isinstance(loss, WeightedSum):
            remedy = f"{', '.join(options)}: 0, in the config"
        raise ValueError(f"{name} learns from labels, and --data.name images has none: give {remedy}")


def check_views(loss: DistillationLoss, augmenter: Augmenter) -> None:
    """Raises ValueError where a loss does not go with the augmented images that an augmentation makes."""
    name, needs = f"--loss {type(loss).__name__}", loss.needs
    if "augmented" in needs and not augmenter.parts:
        raise ValueError(
            f"{name} compares two views of each image: give the second with --augmentation, such as randaugment"
        )
    if "augmented" in needs and augmenter.criterion is not None:
        raise ValueError(
            f"{name} needs one augmented image for each original, and {augmenter.name} picks some of them: take an "
            "augmentation that does not pick"
        )
    if augmenter.parts and not loss.uses_augmented:
        raise ValueError(
            f"{name} compares the original images alone, and would learn nothing from what {augmenter.name} makes: "
            "take --augmentation identity, a share for augmented images (--loss.kd_mix_share) or a sum with KD"
        )


def _classifier(model: nn.Module) -> nn.Module:
    net = model.model if isinstance(model, Normalized) else model
    found = net.get_classifier() if hasattr(net, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(net).__name__} names no classifier, which the loss needs: take another net or loss")
    return found
