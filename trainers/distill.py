"""Distillation: the student learns from labels and from what the teacher says of originals and augmented images."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.losses import DistillationLoss, MixedOutputs
from dalikd.kd.normalize import Normalized
from dalikd.kd.teacher import Look, Teacher, batch_statistics
from dalikd.pipelines.loader import Batch
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.cached import CachedLooks
from dalikd.trainers.looking import CompileMode, Looker

__all__ = ["Distillation", "DistillationTask", "gather_rows", "score_groups"]


class DistillationTask(nn.Module):
    """The student's forwards and the loss, on pixels and teacher outputs: all that has a gradient.

    Args:
        student: takes pixels.
        loss: of its outputs; parameters of its own are trained along.
        joint_forward: one forward over originals and augmented images.
    """

    def __init__(self, student: Normalized, loss: DistillationLoss, joint_forward: bool = False) -> None:
        super().__init__()
        self.student, self.loss = student, loss
        self.joint_forward = joint_forward

    def forward(
        self, pixels: Tensor, labels: Tensor, logits: Tensor, augmented: Tensor | None, augmented_logits: Tensor,
        partner_labels: Tensor, lam: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Named terms.

        Args:
            pixels: originals [B, 3, S, S].
            labels: int64 [B].
            logits: the teacher's on the originals [B, C].
            augmented: augmented images [B, 3, S, S]; None where they are the originals (identity).
            augmented_logits: the teacher's on them [B, C].
            partner_labels: labels of the images mixed in, int64 [B].
            lam: share of the image itself [B].
        """
        student_logits, mixed_logits = self._student(pixels, augmented)
        mixed = MixedOutputs(mixed_logits, augmented_logits, labels, partner_labels, lam)
        terms = self.loss(student_logits, labels, logits, mixed)
        return {**terms, "top1": (student_logits.argmax(1) == labels).float().mean()}

    def _student(self, pixels: Tensor, augmented: Tensor | None) -> tuple[Tensor, Tensor]:
        if augmented is None:
            logits = self.student(pixels)
            return logits, logits
        if self.joint_forward:
            first, second = self.student(torch.cat((pixels, augmented))).chunk(2)
            return first, second
        return self.student(pixels), self.student(augmented)


class Distillation:
    """Feeds the task with one teacher look a batch, and streams T. stddev from the same look.

    Args:
        student: takes pixels.
        teacher: frozen; or what a cache holds of one.
        loss: of the outputs.
        augmenter: makes the candidates.
        accelerator: processes that share each step.
        num_classes: of both nets.
        joint_forward: one student forward over originals and augmented images.
        metric: whether to stream T. stddev.
        compile_mode: of the look; the task is the loop's to compile.
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
        compile_mode: CompileMode = "off",
    ) -> None:
        self.student, self.teacher = student, teacher
        self.task = DistillationTask(student, loss, joint_forward)
        self._augmenter, self._accelerator = augmenter, accelerator
        self._look = (
            teacher if isinstance(teacher, CachedLooks) else Looker(teacher, augmenter, self._score, compile_mode)
        )
        self.goodness = TeacherStddev(num_classes, device=accelerator.device) if metric else None

    def inputs(self, batch: Batch) -> Sequence[Any]:
        """What the task takes: pixels, labels and what the teacher said."""
        seen = self._look(batch)
        self._measure(seen, batch)
        augmented = seen.augmented if self._augmenter.makes_candidates else None
        partner_labels = batch.labels[seen.partner]
        return batch.pixels, batch.labels, seen.logits, augmented, seen.augmented_logits, partner_labels, seen.lam

    def metrics(self) -> dict[str, float | int | None]:
        """T. stddev and entropy so far."""
        if self.goodness is None:
            return {}
        result = self.goodness.compute()
        return {"t_stddev": result.stddev, "t_entropy": result.entropy, "windows": result.windows}

    def state_dict(self) -> dict[str, Any]:
        """The metric's state."""
        return {} if self.goodness is None else {"goodness": self.goodness.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the metric's state."""
        if self.goodness is not None and "goodness" in state:
            self.goodness.load_state_dict(state["goodness"])

    def _measure(self, seen: Look, batch: Batch) -> None:
        if self.goodness is not None:
            self.goodness.update(*gather_rows(self._accelerator, seen.logits, seen.augmented_logits, batch.total))

    def _score(self, images: Tensor) -> Tensor:
        rows_of_batch = len(images) // self._augmenter.runs
        with self._accelerator.autocast():
            return score_groups(self.student, images, rows_of_batch, self._augmenter.group)


def score_groups(student: nn.Module, images: Tensor, batch: int, group: int) -> Tensor:
    """Student logits of a pool, normalised by the statistics of each mix group's own pool, as in the published loop.

    Group by group, so that picks do not depend on the batch size; the running statistics stay untouched.

    Args:
        student: takes pixels.
        images: candidates [runs * batch, 3, S, S], run after run.
        batch: originals.
        group: originals in a mix group.

    Returns:
        logits [runs * batch, C] in the order of `images`, without gradient.
    """
    runs = len(images) // batch
    pools = images.reshape(runs, batch, *images.shape[1:])
    with torch.no_grad(), batch_statistics(student):
        pieces = []
        for start in range(0, batch, group):
            pool = pools[:, start : start + group]
            pieces.append(student(pool.flatten(0, 1)).reshape(runs, pool.shape[1], -1))
    return torch.cat(pieces, dim=1).flatten(0, 1)


def gather_rows(
    accelerator: Accelerator, logits: Tensor, augmented_logits: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    """Teacher outputs of all processes, in the epoch's order.

    Args:
        accelerator: the processes; each holds the same number of rows, fillers at the end of the last ones included.
        logits: this process's, on originals [B, C].
        augmented_logits: on augmented images [B, C].
        total: rows that count over all processes.
    """
    if accelerator.num_processes == 1:
        return logits, augmented_logits
    rows = accelerator.gather(torch.cat((logits, augmented_logits), dim=1))[:total]
    first, second = rows.chunk(2, dim=1)
    return first, second
