"""What is measured of many augmentations in one pass, batch by batch: the nets' answers in, figures out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from dalikd.kd.covariance import CrossEntropyCovariance, ProbabilityCovariance
from dalikd.kd.entropy_log import EntropyLog, plot_entropies
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.mixing import MixDraws
from dalikd.kd.picking import entropy, pick_count
from dalikd.kd.survey import Branch, BranchOutputs, Survey, survey
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.loader import Batch
from dalikd.trainers.augmentation import Augmenter, Branches, is_picked_by_student
from dalikd.trainers.launch import CompileMode, check_compiler

__all__ = ["EntropyLogs", "Measurement", "Surveyor"]

MetricName = Literal["probability_covariance", "cross_entropy_covariance"]


class Surveyor:
    """Lets the nets look at batches and at what several augmentations make of them.

    Compiled, all of it is one region, as in `Looker`; a short last batch is compiled once more, by itself.

    Args:
        teacher: frozen.
        branches: the augmentations.
        num_classes: of the nets.
        student: pixels -> logits in at least float32, without gradient; for criteria and metrics that need it.
        student_sees_all: whether its logits are wanted of everything that the teacher's are.
        student_sees_originals: whether they are wanted of the originals.
        images_per_call: how many images a net sees at once at most; None for all of a batch's.
        compile_mode: of torch.compile, or off.

    Raises:
        ValueError: something is to be compiled and there is no compiler.
    """

    def __init__(
        self,
        teacher: Teacher,
        branches: Branches,
        num_classes: int,
        student: Callable[..., Tensor] | None = None,
        *,
        student_sees_all: bool = False,
        student_sees_originals: bool = False,
        images_per_call: int | None = None,
        compile_mode: CompileMode = "off",
    ) -> None:
        check_compiler(compile_mode)
        self._teacher, self._branches, self._student, self._num_classes = teacher, branches, student, num_classes
        self._student_sees_all, self._student_sees_originals = student_sees_all, student_sees_originals
        self._images_per_call = images_per_call
        self._wanted = [
            Branch(pool, augmenter.criterion, augmenter.keep)
            for pool, augmenter in zip(branches.pools, branches.augmenters, strict=True)
        ]
        self._survey = self._survey_tensors
        if compile_mode != "off":
            self._survey = torch.compile(self._survey_tensors, mode=compile_mode, dynamic=False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Survey:
        """What the nets said of a batch, on the batch's device; nothing of one that has no rows here."""
        if not len(batch):
            return self._nothing(batch)
        return self._survey(batch.pixels, batch.augmented_pixels, batch.mix)

    def _nothing(self, batch: Batch) -> Survey:
        """What this process contributes to an exchange when a short last batch leaves it no rows."""
        dtype = torch.promote_types(next(self._teacher.model.parameters()).dtype, torch.float32)
        none = torch.zeros(0, self._num_classes, dtype=dtype, device=batch.images.device)
        of_student = none if self._student_sees_all else None
        return Survey(none, of_student, tuple(BranchOutputs(none, of_student, None, None) for _ in self._wanted))

    def _survey_tensors(self, pixels: Tensor, augmented: tuple[Tensor, ...], draws: tuple[MixDraws, ...]) -> Survey:
        return survey(
            self._teacher,
            pixels,
            self._branches.make(pixels, augmented, draws),
            self._wanted,
            group=self._branches.augmenters[0].group,
            student=self._student,
            student_sees_all=self._student_sees_all,
            student_sees_originals=self._student_sees_originals,
            images_per_call=self._images_per_call,
        )


class Measurement:
    """The metrics of several augmentations over one stream of batches, the same for every number of processes.

    Args:
        names: of the augmentations, in the order of a survey's branches.
        num_classes: of the nets.
        accelerator: whose processes share each batch.
        window: teacher outputs in a window of T. stddev.
        group: originals in a mix group.
        keep: for each augmentation its picks from a group's pool, or None.
        metrics: what is measured beside T. stddev and entropy.
        student: whether there are a student's outputs.

    Attributes:
        stddev: T. stddev of each augmentation.
        images: originals so far.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_classes: int,
        accelerator: Accelerator,
        *,
        window: int,
        group: int,
        keep: Sequence[int | None],
        metrics: Sequence[MetricName] = (),
        student: bool = False,
    ) -> None:
        device = accelerator.device
        self._accelerator, self._group, self._student = accelerator, group, student
        self._keep = dict(zip(names, keep, strict=True))
        self.images = 0
        self.stddev = {name: TeacherStddev(num_classes, window, device) for name in names}
        self._probabilities: dict[str, ProbabilityCovariance] = {}
        self._cross_entropies: dict[str, CrossEntropyCovariance] = {}
        if "probability_covariance" in metrics:
            self._probabilities = {name: ProbabilityCovariance(num_classes, group, device) for name in names}
        if "cross_entropy_covariance" in metrics:
            self._cross_entropies = {
                name: CrossEntropyCovariance(group=group, student=student, device=device) for name in names
            }

    @property
    def windows(self) -> int:
        """Complete windows so far, the same of every augmentation; reading it does not wait for the device."""
        return min(metric.windows for metric in self.stddev.values())

    def update(self, seen: Survey, batch: Batch, microbatch: int) -> None:
        """Add a batch. Every process calls this, also one that has no rows left of a short last batch.

        Args:
            seen: what the nets said of this process's rows.
            batch: those rows.
            microbatch: rows of a whole batch and process.
        """
        outputs = [_Share(seen.logits, None), *(map(_Share, (of.logits for of in seen.branches), self._keep.values()))]
        if self._student:
            students = [seen.student_logits, *(of.student_logits for of in seen.branches)]
            outputs += [_Share(of, share.keep) for of, share in zip(students, outputs, strict=True) if of is not None]
        logits, *rest = _gather(self._accelerator, outputs, microbatch, batch.total, self._group)
        count = len(self.stddev)
        student, *of_students = rest[count:] or [None] * (count + 1)
        for name, augmented, of_student in zip(self.stddev, rest[:count], of_students, strict=True):
            self._add(name, logits, augmented, student, of_student)
        self.images += batch.total

    def results(self, confidence: float, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The figures of each augmentation. Waits for the device.

        Args:
            confidence: of the intervals.
            class_names: to have the figure of each class as well.
        """
        return [self._result(name, confidence, class_names) for name in self.stddev]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a measurement needs to go on."""
        return {
            "images": self.images,
            **{kind: {name: one.state_dict() for name, one in of.items()} for kind, of in self._metrics().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.images = state["images"]
        for kind, metrics in self._metrics().items():
            for name, metric in metrics.items():
                metric.load_state_dict(state[kind][name])

    def _metrics(self) -> dict[str, dict[str, Any]]:
        return {
            "stddev": self.stddev,
            "probability_covariance": self._probabilities,
            "cross_entropy_covariance": self._cross_entropies,
        }

    def _add(
        self, name: str, logits: Tensor, augmented: Tensor, student: Tensor | None, student_augmented: Tensor | None
    ) -> None:
        self.stddev[name].update(logits, augmented, self._group)
        if name in self._probabilities:
            self._probabilities[name].update(logits, augmented)
        if name in self._cross_entropies and not self._cross_entropies[name].complete:  # as published, and bounded
            self._cross_entropies[name].update(logits, augmented, student, student_augmented)

    def _result(self, name: str, confidence: float, class_names: Sequence[str] | None) -> dict[str, Any]:
        found = self.stddev[name].compute()
        fields = {**asdict(found), "interval": found.interval(confidence), "images": self.images}
        del fields["per_class"]
        if class_names is not None:
            fields["per_class"] = dict(zip(class_names, found.per_class, strict=True)) if found.per_class else None
        for kind in ("probability_covariance", "cross_entropy_covariance"):
            if self._metrics()[kind]:
                fields[kind] = asdict(self._metrics()[kind][name].compute())
        return {"augmentation": name, **fields}


class EntropyLogs:
    """Entropies of originals, candidates and picks of each augmentation, of this process's rows, in nats.

    They are by the net that picks: the student where it alone does, else the teacher. Where nothing is picked, the
    augmented images are candidates and picks.

    Args:
        folder: for a .npz and a .png file of each augmentation; None for no logs.
        every: batches from one record to the next.
        augmenters: the augmentations, in the order of a survey's branches.
        writes: whether this process logs.
    """

    def __init__(self, folder: Path | None, every: int, augmenters: Sequence[Augmenter], writes: bool) -> None:
        self._folder = folder
        self._by_student = [is_picked_by_student(augmenter) for augmenter in augmenters]
        self._logs = {one.name: EntropyLog(every) for one in augmenters} if folder is not None and writes else {}

    @torch.no_grad()
    def add(self, step: int, seen: Survey) -> None:
        """Record a batch, where it is due."""
        for log, of, by_student in zip(self._logs.values(), seen.branches, self._by_student, strict=False):
            if not log.due(step) or not len(seen.logits):
                continue
            originals = seen.student_logits if by_student else seen.logits
            assert originals is not None
            candidates = entropy(of.logits if of.pool_logits is None else of.pool_logits)
            log.add(step, entropy(originals), candidates, candidates if of.picks is None else candidates[of.picks])

    def save(self) -> list[Path]:
        """Write arrays and plots, and return the paths of the plots."""
        plots = []
        for name, log in self._logs.items():
            assert self._folder is not None
            self._folder.mkdir(parents=True, exist_ok=True)
            log.save(self._folder / f"{name}.npz")
            plots.append(self._folder / f"{name}.png")
            plot_entropies(log, plots[-1], name)
        return plots

    def state_dict(self) -> dict[str, Any]:
        """The records so far."""
        return {name: log.state_dict() for name, log in self._logs.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, log in self._logs.items():
            if name in state:
                log.load_state_dict(state[name])


class _Share(NamedTuple):
    """This process's rows of a net's outputs, and how many picks of a mix group they are of (None: one a row)."""

    logits: Tensor
    keep: int | None

    def rows(self, originals: int, group: int) -> int:
        """Rows for so many originals."""
        return pick_count(originals, group, self.keep) if originals and self.keep is not None else originals


def _gather(
    accelerator: Accelerator, shares: Sequence[_Share], microbatch: int, total: int, group: int
) -> list[Tensor]:
    """Outputs of all processes in the epoch's order, by one exchange.

    Args:
        accelerator: the processes.
        shares: of this process, the same list on each.
        microbatch: originals of a whole batch and process.
        total: originals that count over all processes.
        group: originals in a mix group.
    """
    if accelerator.num_processes == 1:
        return [share.logits for share in shares]
    most = [share.rows(microbatch, group) for share in shares]  # all processes exchange the same shape
    padded = [
        functional.pad(share.logits, (0, 0, 0, rows - len(share.logits)))
        for share, rows in zip(shares, most, strict=True)
    ]
    gathered: Tensor = accelerator.gather(torch.cat(padded))  # pyright: ignore[reportAssignmentType]
    every = gathered.unflatten(0, (accelerator.num_processes, -1))
    pieces = every.split(most, dim=1)
    return [piece.flatten(0, 1)[: share.rows(total, group)] for piece, share in zip(pieces, shares, strict=True)]
