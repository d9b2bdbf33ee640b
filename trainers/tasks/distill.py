"""Distillation: the student learns from labels and from what the teacher says of originals and augmented images."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.entropy_log import EntropyLog, plot_entropies
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.losses import KD, DistillationLoss, LossContext, MixedOutputs, StepOutputs
from dalikd.kd.manifold import mixed_forward
from dalikd.kd.mixing import HiddenMix
from dalikd.kd.normalize import Normalized
from dalikd.kd.picking import pick_count
from dalikd.kd.teacher import Look, Teacher, batch_statistics, entropies
from dalikd.pipelines.loader import Batch, Loader
from dalikd.trainers.augmentation import Augmenter, is_picked_by_student
from dalikd.trainers.launch import CompileMode
from dalikd.trainers.models import TeacherConfig, describe_teacher
from dalikd.trainers.options import NumberRange, check_numbers
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.teacher_cache.read import CachedLooks, open_cached
from dalikd.trainers.teacher_step import Looker
from dalikd.trainers.trial import check_finite

__all__ = [
    "DistillOptions",
    "Distillation",
    "DistillationInputs",
    "gather_rows",
    "score_groups",
    "score_groups_at_once",
]


@dataclass
class DistillOptions(TrainingOptions):
    """Distil a teacher into a student.

    Args:
        teacher: the net that is imitated.
        freeze_student: leave the student as its weights are: losses, T. stddev and evaluation are observed, and nothing
            of it is trained.
        loss: class of the distillation loss, with its options as --loss.temperature and so on.
        joint_forward: one student forward over originals and augmented images instead of two; faster, but batch
            normalisation then sees both at once.
        metric: also stream the teacher's T. stddev and entropy over the training images.
        entropy_log_every: batches between two records of the entropies of originals, candidates and picks, by the net
            that picks; they go to entropies.npz and entropies.png in the run folder. 0: none.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    freeze_student: bool = False
    loss: DistillationLoss = field(default_factory=KD)
    joint_forward: bool = False
    metric: bool = True
    entropy_log_every: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, {"entropy_log_every": NumberRange(lambda value: value >= 0, "at least 1, or 0 for no log")})

    def build(self, setup: Setup) -> "Distillation":
        """Both nets, joined. Where a cache holds what the teacher says, none is opened."""
        augmenter = setup.augmenter(self.augmentation)
        teacher, header, digest, answers = self._teacher(setup, augmenter)
        if self.freeze_student and (self.weights is None or self.reinit):
            raise ValueError(
                "--freeze_student true observes a student as its weights are: give them with --weights, without "
                "--reinit"
            )
        student = self.build_student(setup, frozen=self.freeze_student)
        asked = teacher.model if isinstance(teacher, Teacher) else None
        augmenter.check_nets(self.compile, ("the teacher", asked), ("the student", student))
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
            images=len(setup.source),
        )
        task.header, task.contents = header, {"the_teacher's_weights_or_normalisation": digest}
        task.title = f"{self.augmentation}, {self.model}"
        task.told = {"the teacher's answers come": answers}
        return task

    def _teacher(self, setup: Setup, augmenter: Augmenter) -> tuple[Teacher | CachedLooks, dict[str, Any], str, str]:
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


def _digest(weights: object, mean: Iterable[float], std: Iterable[float]) -> str:
    """What a teacher's outputs depend on in the teacher; the same whether it is asked or read from a cache."""
    return " ".join([str(weights), *(f"{value:.6g}" for value in (*mean, *std))])


class DistillationInputs(NamedTuple):
    """Images, and what the teacher said of them. There may be more or fewer augmented images than originals, and in
    another order."""

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
    """The student learns from one teacher look a batch, and T. stddev is streamed from the same look.

    Args:
        student: takes pixels.
        teacher: frozen; or what a cache holds of one.
        loss: of the outputs; parameters of its own are trained along.
        augmenter: makes the candidates.
        accelerator: processes that share each step.
        num_classes: of both nets.
        joint_forward: one student forward over originals and augmented images.
        metric: whether to stream T. stddev.
        entropy_log: where the entropies of this process's images go, by the net that picks.
        compile_mode: of the look; the task is the loop's to compile.
        side: of the images in pixels, and
        images: how many are trained on, for a loss that is built from the nets.

    Raises:
        ValueError: the loss needs what there is not.
    """

    def __init__(
        self,
        student: Normalized,
        teacher: Teacher | CachedLooks,
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
        images: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.loss, self.teacher = student, loss, teacher
        self.joint_forward = joint_forward
        self.augmenter, self._accelerator = augmenter, accelerator
        self._build_loss(num_classes, side, images)
        if isinstance(teacher, CachedLooks):
            self._look: Callable[[Batch], Look] = teacher
        else:
            self._look = Looker(teacher, augmenter, self._score, compile_mode, loss.needs)
        self._score_at_once: Callable[..., Tensor] | None = None
        if compile_mode != "off":
            self._score_at_once = torch.compile(score_groups_at_once, mode=compile_mode, dynamic=False)
        self.goodness = TeacherStddev(num_classes, device=accelerator.device) if metric else None
        self.entropy_log, self._batches = entropy_log, 0
        self.title = augmenter.name  # of its plots
        self._asked = False

    @property
    def nets(self) -> dict[str, Normalized]:
        """The student alone."""
        return {"student": self.student}

    def loader(self, setup: Setup, accumulation: int = 1) -> Loader:
        """The batches, with what a cache holds of the teacher; after its last epoch the first comes again."""
        spec, cached = self.augmenter.draw_spec, self.teacher
        if isinstance(cached, Teacher):
            return setup.loader(spec, accumulation=accumulation)
        repeat = cached.cache.layout.epochs
        return setup.loader(spec, accumulation=accumulation, repeat=repeat, attach=cached.attach)

    def finish(self, folder: Path) -> None:
        """Write the entropies, and draw them."""
        if self.entropy_log:
            self.entropy_log.save(folder / "entropies.npz")
            plot_entropies(self.entropy_log, folder / "entropies.png", self.title)

    @property
    def local_buffers(self) -> list[str]:
        """The loss's own."""
        return [f"loss.{name}" for name in self.loss.local_buffers]

    def prepare(self, batch: Batch, epoch: float) -> DistillationInputs:
        """Pixels, labels and what the teacher said."""
        seen = self._look(batch)
        if not self._asked:
            self._asked = True  # the first time, at the cost of a wait
            check_finite(torch.cat((seen.logits, seen.augmented_logits)), "the teacher")
        self._measure(seen, batch)
        self._log(seen, batch)
        return DistillationInputs(
            batch.pixels,
            seen.originals,
            batch.labels,
            batch.ids,
            torch.full((), epoch, device=batch.labels.device),
            seen.augmented if self.augmenter.makes_candidates else None,
            seen.augmented_logits,
            batch.labels[seen.rows],
            batch.labels[seen.partner],
            seen.lam,
            seen.hidden,
        )

    def forward(self, inputs: DistillationInputs) -> dict[str, Tensor]:
        """Named terms: the loss's, and the accuracy on the originals."""
        student, mixed_logits = self._student(inputs)
        mixed = MixedOutputs(
            mixed_logits, inputs.augmented_logits, inputs.augmented_labels, inputs.partner_labels, inputs.lam
        )
        terms = self.loss(StepOutputs(student, inputs.teacher, inputs.labels, inputs.ids, inputs.epoch, mixed))
        return {**terms, "top1": (student.logits.argmax(1) == inputs.labels).float().mean()}

    def metrics(self) -> dict[str, float | int | None]:
        """T. stddev and entropy so far."""
        if self.goodness is None:
            return {}
        result = self.goodness.compute()
        return {"t_stddev": result.stddev, "t_entropy": result.entropy, "windows": result.windows}

    def get_extra_state(self) -> dict[str, Any]:
        """The state of metric and log."""
        return {
            **({} if self.goodness is None else {"goodness": self.goodness.state_dict()}),
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

    def _student(self, inputs: DistillationInputs) -> tuple[NetOutput, Tensor]:
        """Outputs on the originals, and logits on the augmented images."""
        pixels, augmented, needs = inputs.pixels, inputs.augmented, self.loss.needs
        inner, before = bool(needs), "preactivations" in needs
        if inputs.hidden is not None and augmented is not None:
            joint = self.joint_forward
            return mixed_forward(self.student, pixels, augmented, inputs.hidden, joint=joint, features=inner)
        if augmented is not None and self.joint_forward:
            both = self.student.outputs(torch.cat((pixels, augmented)), features=inner, preactivations=before)
            return both.first(len(pixels)), both.logits[len(pixels) :]
        found = self.student.outputs(pixels, features=inner, preactivations=before)
        return found, found.logits if augmented is None else self.student(augmented)

    def _build_loss(self, num_classes: int, side: int, images: int) -> None:
        """Show the loss what both nets give, if it wants to see it."""
        loss, teacher = self.loss, self.teacher
        if not loss.needs and type(loss).build is DistillationLoss.build:
            return
        if loss.needs and not isinstance(teacher, Teacher):
            raise ValueError(
                f"--loss {type(loss).__name__} needs the teacher's {', '.join(sorted(loss.needs))}, and a cache holds "
                "its logits alone: distil without --teacher.cache"
            )
        before, modes = "preactivations" in loss.needs, {part: part.training for part in self.student.modules()}
        if before and self.augmenter.mixes_hidden:
            raise ValueError(
                f"--loss {type(loss).__name__} compares what comes before the stages' last ReLU, where "
                f"{self.augmenter.name} does not mix: take another augmentation or loss"
            )

        def black(net: nn.Module) -> Tensor:
            return torch.zeros(2, 3, side, side, device=next(net.parameters()).device)

        with torch.no_grad():
            student = self.student.eval().outputs(black(self.student), features=bool(loss.needs), preactivations=before)
            said, classifier = NetOutput(torch.zeros(2, num_classes)), None
            if isinstance(teacher, Teacher) and loss.needs:
                said = teacher.outputs(black(teacher.model), preactivations=before)
                classifier = _classifier(teacher.model) if "teacher_classifier" in loss.needs else None
        for part, training in modes.items():
            part.training = training
        loss.build(LossContext(student, said, num_classes, images, classifier))
        loss.to(next(self.student.parameters()).dtype)

    def _measure(self, seen: Look, batch: Batch) -> None:
        if self.goodness is None:
            return
        group, keep = self.augmenter.group, self.augmenter.keep if seen.picks is not None else None
        picked = pick_count(batch.total, group, keep)
        rows = gather_rows(self._accelerator, seen.logits, seen.augmented_logits, batch.total, picked)
        self.goodness.update(*rows, group)

    def _log(self, seen: Look, batch: Batch) -> None:
        if self.entropy_log is None:
            return
        if self.entropy_log.due(self._batches):
            of_student = is_picked_by_student(self.augmenter) and seen.pool_logits is not None
            originals = self._score_originals(batch.pixels) if of_student else None
            self.entropy_log.add(self._batches, *entropies(seen, originals))
        self._batches += 1

    def _score_originals(self, pixels: Tensor) -> Tensor:
        """For the log alone: no random number is used up."""
        devices = [pixels.device] if pixels.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._accelerator.autocast():
            return score_groups(self.student, pixels, len(pixels), self.augmenter.group)

    def _score(self, images: Tensor, hidden: HiddenMix | None = None) -> Tensor:
        group, runs = self.augmenter.group, self.augmenter.runs
        with self._accelerator.autocast():
            whole = hidden is None and len(images) % (runs * group) == 0
            if self._score_at_once is not None and whole and not self._asked:
                self._try_at_once(images)
            if self._score_at_once is None or not whole:
                candidates = len(images) if hidden is None else len(hidden.lam)
                return score_groups(self.student, images, candidates // runs, group, hidden)
            with torch.no_grad(), batch_statistics(self.student) if self.student.training else nullcontext():
                return self._score_at_once(self.student, images, len(images) // runs, group)

    def _try_at_once(self, images: Tensor) -> None:
        """Before the first step: not every net can have its groups side by side."""
        devices = [images.device] if images.device.type == "cuda" else []
        group = self.augmenter.group
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), batch_statistics(self.student):
                score_groups_at_once(self.student, images, len(images) // self.augmenter.runs, group)
        except RuntimeError as error:
            self._score_at_once = None
            reason = str(error).partition("\n")[0]
            self._accelerator.print(f"dalikd: the student scores group by group, uncompiled: {reason}", flush=True)


def _classifier(model: nn.Module) -> nn.Module:
    net = model.model if isinstance(model, Normalized) else model
    found = net.get_classifier() if hasattr(net, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{type(net).__name__} names no classifier, which the loss needs: take another teacher or loss"
        )
    return found


def score_groups(student: nn.Module, images: Tensor, batch: int, group: int, hidden: HiddenMix | None = None) -> Tensor:
    """Student logits of a pool, normalised by the statistics of each mix group's own pool, as in the published loop.

    Group by group, so that picks do not depend on the batch size; the running statistics stay untouched. A student in
    eval mode, which is fixed, is normalised by them instead.

    Args:
        student: takes pixels.
        images: candidates [runs * batch, 3, S, S], run after run; with `hidden` the originals [batch, 3, S, S] before.
        batch: originals.
        group: originals in a mix group.
        hidden: how hidden states of the candidates are mixed with those of the originals, which then have a forward of
            their own.

    Returns:
        logits of the images in their order, without gradient.
    """
    before = 0 if hidden is None else batch
    originals, candidates = images[:before], images[before:]
    rows = torch.arange(len(candidates), device=images.device).reshape(-1, batch)
    own, pieces = [], []
    with torch.no_grad(), batch_statistics(student) if student.training else nullcontext():
        for start in range(0, batch, group):
            columns = rows[:, start : start + group]
            pool = columns.flatten()
            if hidden is None:
                logits = student(candidates[pool])
            else:
                mixing = HiddenMix(hidden.partner[pool] - start, hidden.lam[pool], hidden.layer[pool])
                first, logits = mixed_forward(
                    student, originals[start : start + group], candidates[pool], mixing, joint=False
                )
                own.append(first.logits)
            pieces.append(logits.unflatten(0, columns.shape))
    return torch.cat((*own, torch.cat(pieces, dim=1).flatten(0, 1)))


def score_groups_at_once(student: Normalized, candidates: Tensor, batch: int, group: int) -> Tensor:
    """What `score_groups` gives, inside of `batch_statistics`, in one forward over all groups; to be compiled.

    The statistics are still of each group. Their sums have another order, so that the last bits differ, and a plain
    call keeps to the groups one by one.

    Args:
        student: takes pixels.
        candidates: [runs * batch, 3, S, S], run after run.
        batch: originals, whole groups.
        group: originals in a mix group.
    """
    pools = student.normalize(candidates).unflatten(0, (-1, batch // group, group)).transpose(0, 1)
    logits = torch.vmap(lambda pool: student.model(pool), randomness="different")(pools.flatten(1, 2))
    return logits.unflatten(1, (-1, group)).transpose(0, 1).flatten(0, 2)


def gather_rows(
    accelerator: Accelerator, logits: Tensor, augmented_logits: Tensor, total: int, picked: int | None = None
) -> tuple[Tensor, Tensor]:
    """Teacher outputs of all processes, in the epoch's order.

    Args:
        accelerator: the processes; each holds the same number of rows, fillers at the end of the last ones included.
        logits: this process's, on originals [B, C].
        augmented_logits: on augmented images [n, C].
        total: originals that count over all processes.
        picked: augmented images that count; default: as many.
    """
    if accelerator.num_processes == 1:
        return logits, augmented_logits
    if len(logits) != len(augmented_logits):
        return accelerator.gather(logits)[:total], accelerator.gather(augmented_logits)[:picked]
    rows = accelerator.gather(torch.cat((logits, augmented_logits), dim=1))[:total]
    first, second = rows.chunk(2, dim=1)
    return first, second
