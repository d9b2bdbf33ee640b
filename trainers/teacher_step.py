"""What comes before a student's step: augmentation, teacher and picking, joined into one function of a batch."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import NetOutput, Normalized
from dalikd.kd.losses.base import full_precision
from dalikd.kd.manifold import hidden_mixing, mixed_forward
from dalikd.kd.mixing import HiddenMix, Mixed
from dalikd.kd.picking import pick_count
from dalikd.kd.rotation import TURNS
from dalikd.kd.teacher import (
    Branch,
    BranchOutputs,
    StudentPart,
    Teacher,
    TeacherPass,
    Teachers,
    batch_statistics,
    teacher_pass,
)
from dalikd.pipelines.draw_spec import Batch, MixDraws
from dalikd.trainers.augmentation import Augmenter, joint_draws
from dalikd.trainers.launch import CompileMode, check_compiler

__all__ = [
    "Branches",
    "StudentScores",
    "TeacherStep",
    "gather_outputs",
    "score_groups",
    "score_groups_at_once",
]


class Branches:
    """Several augmentations of the same batches. What two of them have in common is drawn and made once.

    Args:
        augmenters: of one data set, view and seed, at least one.

    Attributes:
        parts: the runs of all of them, each once.
        branches: what `teacher_pass` takes of each of them.
        draw_spec: what the loader must draw.
    """

    def __init__(self, augmenters: Sequence[Augmenter]) -> None:
        self.augmenters = tuple(augmenters)
        makers = {part: augmenter.mix_images for augmenter in augmenters for part in augmenter.parts}
        self.parts = parts = tuple(makers)
        self.draw_spec = spec = joint_draws(parts, augmenters[0].draw_spec)
        self.branches = tuple(
            Branch(tuple(map(parts.index, augmenter.parts)), augmenter.criterion, augmenter.n_pick)
            for augmenter in augmenters
        )
        places = [spec.views.index(part.view) if part.view else spec.mixes.index(part.mix) for part in parts]  # type: ignore[arg-type]
        self._recipes = list(zip(makers.values(), places, strict=True))

    def make(self, pixels: Tensor, augmented: Sequence[Tensor], draws: Sequence[MixDraws]) -> list[Mixed]:
        """The augmented images of each run, B each, from a batch's tensors: originals and augmented views
        [B, 3, S, S], and the draws of each mixing run."""
        own = torch.arange(len(pixels), device=pixels.device)
        whole = torch.ones(len(pixels), device=pixels.device)
        return [
            Mixed(augmented[place], own, whole) if mix_images is None else mix_images(pixels, draws[place])
            for mix_images, place in self._recipes
        ]

    def candidates(self, batch: Batch) -> Mixed | None:
        """The images of all runs, run after run; None where there are none: the originals are meant (identity)."""
        runs = self.make(batch.pixels, batch.augmented_pixels, batch.mix)
        return Mixed.join(runs) if len(runs) > 1 else next(iter(runs), None)


class TeacherStep:
    """Asks the teacher about batches and about what augmentations make of them; for training, caching and measuring.

    Compiled, all of it is one region: mixing, normalising, the teacher, entropy, picking and gathering, so that pixel
    work fuses into the teacher's first kernels. Where a student that learns scores the candidates, only the teacher's
    forward is compiled: the student's norms switch between two kinds of statistics, and `StudentScores` compiles it. A
    short last batch is compiled once more, by itself. In the modes with CUDA graphs the result lives until the next
    `torch.compiler.cudagraph_mark_step_begin()`, which the caller calls once a step.

    Args:
        teacher: frozen; or several, which are asked for logits alone.
        branches: the augmentations; training has one.
        student: as `teacher_pass` calls it; for criteria that need it, and for `student_part`.
        compile_mode: of torch.compile, or off.
        needs: what a loss wants of the teacher beside logits, as `DistillationLoss.needs` names it.
        student_part: as of `teacher_pass`.
        images_per_call: how many images a net is asked about at once at most; None for all of a batch's. With `heads`
            each turn of an image counts.
        num_classes: of the nets, where batches may have no rows on this process.
        heads: also ask for the teacher's auxiliary heads on all turns of originals and augmented images, as
            `Teacher.turned_heads` gives them. No image may be mixed inside the nets then.

    Raises:
        ValueError: something is to be compiled and there is no compiler.
    """

    def __init__(
        self,
        teacher: Teacher | Teachers,
        branches: Branches,
        student: "StudentScores | None" = None,
        compile_mode: CompileMode = "off",
        needs: Collection[str] = (),
        *,
        student_part: StudentPart = "candidates",
        images_per_call: int | None = None,
        num_classes: int = 0,
        heads: bool = False,
    ) -> None:
        check_compiler(compile_mode)
        self._branches, self._student, self._images_per_call = branches, student, images_per_call
        self._student_part: StudentPart = student_part
        self._heads = 0
        self._model, self._num_classes = teacher.model, num_classes
        self._teacher: Callable[..., Any] = teacher.__call__
        self._outputs: Callable[..., NetOutput] = teacher.__call__
        if isinstance(teacher, Teacher):
            wanted = {"preactivations": "preactivations" in needs, "heads": "turned" in needs}
            self._outputs = partial(teacher.outputs, **wanted)
            if needs and "turned" not in needs:
                self._teacher = self._outputs
            if heads:
                self._heads, self._teacher = teacher.heads, teacher.turned_heads
                self._images_per_call = None if images_per_call is None else images_per_call // TURNS
        self._pass = self._pass_of_tensors
        if compile_mode == "off":
            return
        scores = any(branch.criterion is not None and branch.criterion.needs_student for branch in branches.branches)
        if scores and student is not None and student.learns:
            self._teacher = torch.compile(self._teacher, mode=compile_mode, dynamic=False)
            self._outputs = torch.compile(self._outputs, mode=compile_mode, dynamic=False)
        else:
            self._pass = torch.compile(self._pass_of_tensors, mode=compile_mode, dynamic=False)

    @torch.no_grad()  # not inference_mode: the task's backward reads the result
    def __call__(self, batch: Batch, turned: Tensor | None = None) -> TeacherPass:
        """What the nets give for a batch, on its device; nothing for one that has no rows here.

        Args:
            batch: on the device.
            turned: its originals in all quarter turns, [4B, 3, S, S], where what the teacher gives for them is needed.
        """
        if len(batch.labels):
            return self._pass(batch.pixels, batch.augmented_pixels, batch.mix, turned)
        dtype = torch.promote_types(next(self._model.parameters()).dtype, torch.float32)
        none, rows = torch.zeros(0, self._num_classes, dtype=dtype, device=batch.images.device), batch.labels
        of_student = none if self._student_part == "everything" else None
        heads = (none.new_zeros(0, TURNS, TURNS * self._num_classes),) * self._heads
        nothing = BranchOutputs(Mixed(batch.pixels, rows, rows), rows, none, of_student, heads=heads)
        originals = NetOutput(none, heads=heads)
        return TeacherPass(originals, tuple(nothing for _ in self._branches.branches), of_student)

    def _pass_of_tensors(
        self,
        pixels: Tensor,
        augmented: tuple[Tensor, ...],
        draws: tuple[MixDraws, ...],
        turned: Tensor | None = None,
    ) -> TeacherPass:
        return teacher_pass(
            self._teacher,
            pixels,
            self._branches.make(pixels, augmented, draws),
            self._branches.branches,
            group=self._branches.augmenters[0].group,
            student=self._student,
            student_part=self._student_part,
            images_per_call=self._images_per_call,
            turned=None if turned is None else self._outputs(turned),
        )


# ---------------------------------------------------------------------------------------------- scores of a student


class StudentScores:
    """A student's logits on candidates, to pick by, without gradient.

    In train mode each mix group's pool is normalised by its own statistics, as in the published loop, so that picks do
    not depend on the batch size; the running statistics stay. In eval mode a student is normalised by these.

    Args:
        student: takes pixels.
        accelerator: gives the precision.
        group: originals in a mix group.
        runs: candidates of each original.
        compile_mode: of torch.compile, or off; for a student that learns.
        learns: whether it is trained between two batches.
    """

    def __init__(
        self,
        student: Normalized,
        accelerator: Accelerator,
        group: int,
        runs: int = 1,
        compile_mode: CompileMode = "off",
        *,
        learns: bool = True,
    ) -> None:
        self.student, self.learns = student, learns
        self._accelerator, self._group, self._runs = accelerator, group, runs
        self._at_once: Callable[..., Tensor] | None = None
        if compile_mode != "off":
            self._at_once = torch.compile(score_groups_at_once, mode=compile_mode, dynamic=False)
        self._tried = False

    def __call__(self, images: Tensor, hidden: HiddenMix | None = None) -> Tensor:
        """Logits [n, C] of candidates, run after run; with `hidden` the originals come before them."""
        training, batch = self.student.training, (len(images) if hidden is None else len(hidden.lam)) // self._runs
        at_once = self._at_once is not None and hidden is None and batch % self._group == 0
        with torch.no_grad(), self._accelerator.autocast():
            if at_once and not self._tried:
                self._try_at_once(images, batch)
            if at_once and self._at_once is not None:
                with batch_statistics(self.student) if training else nullcontext():
                    return self._at_once(self.student, images, batch, self._group)
            if training:
                return score_groups(self.student, images, batch, self._group, hidden)
            with nullcontext() if hidden is None else hidden_mixing(self.student, hidden):
                return full_precision(self.student(images))

    def originals(self, pixels: Tensor) -> Tensor:
        """Logits on the originals [B, C], normalised as candidates are; no random number is used up. For a log."""
        devices = [pixels.device] if pixels.is_cuda else []
        with torch.random.fork_rng(devices), self._accelerator.autocast():
            return score_groups(self.student, pixels, len(pixels), self._group)

    def _try_at_once(self, images: Tensor, batch: int) -> None:
        """Before the first step: not every net can have its groups side by side."""
        self._tried = True
        devices = [images.device] if images.is_cuda else []
        try:
            with torch.random.fork_rng(devices), batch_statistics(self.student):
                score_groups_at_once(self.student, images, batch, self._group)
        except RuntimeError as error:
            self._at_once = None
            reason = str(error).partition("\n")[0]
            self._accelerator.print(f"dalikd: the student scores group by group, uncompiled: {reason}", flush=True)


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
    logits = torch.vmap(lambda pool: student.logits_of(pool), randomness="different")(pools.flatten(1, 2))
    return logits.unflatten(1, (-1, group)).transpose(0, 1).flatten(0, 2)


# ----------------------------------------------------------------------------------------------- several processes


def gather_outputs(
    accelerator: Accelerator, outputs: Sequence[tuple[Tensor, int | None]], microbatch: int, total: int, group: int
) -> list[Tensor]:
    """Outputs of all processes in the epoch's order, without fillers, by one exchange.

    Args:
        accelerator: the processes.
        outputs: of this process, the same list on each: [n, C], and how many picks of a whole mix group they are of;
            None for one row an original.
        microbatch: originals of a whole batch and process.
        total: originals that count over all processes.
        group: originals in a mix group.
    """
    if accelerator.num_processes == 1:
        return [rows for rows, _ in outputs]

    def count(originals: int, n_pick: int | None) -> int:
        return originals if n_pick is None or not originals else pick_count(originals, group, n_pick)

    most = [count(microbatch, n_pick) for _, n_pick in outputs]  # all processes exchange the same shape
    padded = [functional.pad(rows, (0, 0, 0, size - len(rows))) for (rows, _), size in zip(outputs, most, strict=True)]
    gathered: Tensor = accelerator.gather(torch.cat(padded))  # pyright: ignore[reportAssignmentType]
    pieces = gathered.unflatten(0, (accelerator.num_processes, -1)).split(most, dim=1)
    return [piece.flatten(0, 1)[: count(total, n_pick)] for piece, (_, n_pick) in zip(pieces, outputs, strict=True)]
