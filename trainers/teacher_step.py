"""The look of a step: augmentation, teacher and choice joined into one function of a batch, compiled on request."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dalikd.kd.mixing import MixDraws
from dalikd.kd.teacher import Look, Teacher, look
from dalikd.pipelines.loader import Batch
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import CompileMode, check_compiler

__all__ = ["Looker"]


class Looker:
    """Lets the teacher look at batches and at what an augmentation makes of them.

    Compiled, all of it is one region: mixing, normalising, the teacher, entropy, choice and gathering, so that pixel
    work fuses into the teacher's first kernels. Where a student scores the candidates only the teacher's forward is
    compiled: the student, whose statistics switch between two looks, is its caller's to compile. A short last batch is
    compiled once more, by itself. In the modes with CUDA graphs the result lives until the next
    `torch.compiler.cudagraph_mark_step_begin()`, which the caller calls once a step.

    Args:
        teacher: frozen.
        augmenter: makes the candidates.
        student: as `look` calls it; for criteria that need it.
        compile_mode: of torch.compile, or off.
        needs: what a loss wants of the teacher beside logits, as `DistillationLoss.needs` names it.

    Raises:
        ValueError: something is to be compiled and there is no compiler.
    """

    def __init__(
        self,
        teacher: Teacher,
        augmenter: Augmenter,
        student: Callable[..., Tensor] | None = None,
        compile_mode: CompileMode = "off",
        needs: Collection[str] = (),
    ) -> None:
        check_compiler(compile_mode)
        self._augmenter, self._student = augmenter, student
        self._teacher: Callable[..., Any] = teacher.__call__
        if needs:
            self._teacher = partial(teacher.outputs, preactivations="preactivations" in needs)
        self._look = self._look_at
        if compile_mode == "off":
            return
        if augmenter.criterion is not None and augmenter.criterion.needs_student:
            self._teacher = torch.compile(self._teacher, mode=compile_mode, dynamic=False)
        else:
            self._look = torch.compile(self._look_at, mode=compile_mode, dynamic=False)

    @torch.no_grad()  # not inference_mode: the task's backward reads the result
    def __call__(self, batch: Batch) -> Look:
        """What the teacher saw and said of a batch, on the batch's device."""
        return self._look(batch.pixels, batch.augmented_pixels, batch.mix)

    def _look_at(self, pixels: Tensor, augmented: tuple[Tensor, ...], draws: tuple[MixDraws, ...]) -> Look:
        return look(
            self._teacher,
            pixels,
            self._augmenter.mix(pixels, augmented, draws),
            criterion=self._augmenter.criterion,
            group=self._augmenter.group,
            keep=self._augmenter.keep,
            student=self._student,
        )
