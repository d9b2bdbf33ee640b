"""The nets look at many augmentations of the same images: at the originals once, and at every augmented image once.

Augmentations share runs: what CutMix makes is also the first candidate of CutMixPick. So the teacher is asked about the
originals and about each run in few large calls, and the logits of every pool and pick are gathered from its answers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dalikd.kd.mixing import Mixed
from dalikd.kd.picking import Criterion, PoolOutputs, score_and_pick

__all__ = ["Branch", "BranchOutputs", "Survey", "survey"]

Net = Callable[..., Tensor]
_ORIGINALS = -1  # where other images have the number of their run


class Branch(NamedTuple):
    """One augmentation: the runs it is made of, and how candidates are picked out of several."""

    pool: tuple[int, ...]  # numbers of runs; () for the originals themselves (identity)
    criterion: Criterion | None = None
    keep: int | None = None  # picks from the pool of a mix group; None: as many as it has originals


class BranchOutputs(NamedTuple):
    """What the nets said of the images of one augmentation, n of them."""

    logits: Tensor  # [n, C], the teacher's
    student_logits: Tensor | None  # [n, C], where the student was to look at everything
    pool_logits: Tensor | None  # [runs * B, C], of the net that picks, where something is picked
    picks: Tensor | None  # int64 [n], where something is picked: places in the pool


class Survey(NamedTuple):
    """What the nets said of a batch and of its augmentations."""

    logits: Tensor  # [B, C], the teacher's, on the originals
    student_logits: Tensor | None  # [B, C], where the student was to look at the originals
    branches: tuple[BranchOutputs, ...]


def survey(
    teacher: Net,
    pixels: Tensor,
    runs: Sequence[Mixed],
    branches: Sequence[Branch],
    *,
    group: int = 64,
    student: Net | None = None,
    student_sees_all: bool = False,
    student_sees_originals: bool = False,
    images_per_call: int | None = None,
) -> Survey:
    """Ask the teacher about originals and augmented images of several augmentations, and pick candidates.

    The outputs are those of one `look` for each augmentation, up to the rounding of other batch sizes.

    Args:
        teacher: pixels [n, 3, S, S] -> logits [n, C]; with a HiddenMix as second argument where a run mixes hidden
            states.
        pixels: originals [B, 3, S, S].
        runs: the augmented images of each run, B each.
        branches: the augmentations, which name their runs by number.
        group: originals that share a pool.
        student: like the teacher; for criteria that need it, and for `student_sees_all`.
        student_sees_all: whether the student's logits are wanted of everything that the teacher's are.
        student_sees_originals: whether they are wanted of the originals.
        images_per_call: how many images a net sees at once at most, but never less than one run; None for all.
    """
    teachers = _Answers(teacher, pixels, runs, images_per_call)
    students = None if student is None else _Answers(student, pixels, runs, images_per_call)
    whole = {run for branch in branches for run in branch.pool if _teacher_sees_pool(branch)}
    teachers.ask([_ORIGINALS, *sorted(whole)])
    if students is not None:
        scored = {
            run for branch in branches for run in branch.pool if branch.criterion and branch.criterion.needs_student
        }
        originals = [_ORIGINALS] if student_sees_all or student_sees_originals else []
        students.ask([*originals, *sorted(whole | scored if student_sees_all else scored)])
    outputs = [_outputs(branch, teachers, students, group, student_sees_all) for branch in branches]
    on_originals = students[(_ORIGINALS,)] if students is not None and (_ORIGINALS,) in students else None
    return Survey(teachers[(_ORIGINALS,)], on_originals, tuple(outputs))


class _Answers:
    """A net's logits on the originals and on runs: each is asked about once."""

    def __init__(self, net: Net, pixels: Tensor, runs: Sequence[Mixed], images_per_call: int | None) -> None:
        self._net, self._pixels, self._runs = net, pixels, runs
        self._runs_per_call = len(runs) + 1 if images_per_call is None else max(images_per_call // len(pixels), 1)
        self._logits: dict[int, Tensor] = {}

    def __getitem__(self, numbers: tuple[int, ...]) -> Tensor:
        """Logits of several runs, run after run."""
        return (
            self._logits[numbers[0]] if len(numbers) == 1 else torch.cat([self._logits[number] for number in numbers])
        )

    def __contains__(self, numbers: tuple[int, ...]) -> bool:
        return all(number in self._logits for number in numbers)

    def ask(self, numbers: Sequence[int]) -> None:
        """Ask about those, as many at once as a call may hold."""
        plain = [number for number in numbers if number == _ORIGINALS or self._runs[number].hidden is None]
        for start in range(0, len(plain), self._runs_per_call):
            asked = plain[start : start + self._runs_per_call]
            logits = self._net(
                torch.cat([self._images(number) for number in asked])
            )  # uint8 and float promote to float
            self._logits |= dict(zip(asked, logits.split(len(self._pixels)), strict=True))
        for number in set(numbers) - set(plain):
            self._logits[number] = self.of(self._runs[number])

    def of(self, mixed: Mixed) -> Tensor:
        """Logits of further images."""
        if mixed.hidden is None:
            return self._net(mixed.images)
        both = torch.cat((self._pixels, mixed.images))
        return self._net(both, mixed.hidden)[len(self._pixels) :]

    def candidates(self, numbers: tuple[int, ...]) -> Mixed:
        """The images of several runs, run after run."""
        return Mixed.join([self._runs[number] for number in numbers])

    def _images(self, number: int) -> Tensor:
        return self._pixels if number == _ORIGINALS else self._runs[number].images


def _teacher_sees_pool(branch: Branch) -> bool:
    return branch.criterion is None or branch.criterion.needs_teacher


def _outputs(
    branch: Branch, teachers: _Answers, students: _Answers | None, group: int, student_sees_all: bool
) -> BranchOutputs:
    pool = branch.pool or (_ORIGINALS,)
    if branch.criterion is None:
        of_student = students[pool] if students is not None and student_sees_all else None
        return BranchOutputs(teachers[pool], of_student, None, None)
    criterion, originals = branch.criterion, teachers[(_ORIGINALS,)]
    of_teacher = teachers[pool] if criterion.needs_teacher else None
    of_student = _given(students)[pool] if criterion.needs_student else None
    pool_outputs = PoolOutputs(of_teacher, of_student, originals)
    picks, _ = score_and_pick(criterion, pool_outputs, len(originals), group, branch.keep)
    scoring = of_teacher if of_teacher is not None else of_student
    picked_by_student = _picked(students, pool, picks) if students is not None and student_sees_all else None
    return BranchOutputs(_picked(teachers, pool, picks), picked_by_student, scoring, picks)


def _picked(answers: _Answers, pool: tuple[int, ...], picks: Tensor) -> Tensor:
    """Logits of the picks: gathered, where the net has seen the whole pool."""
    return answers[pool][picks] if pool in answers else answers.of(answers.candidates(pool).take(picks))


def _given(students: _Answers | None) -> _Answers:
    assert students is not None, "a criterion needs a student"
    return students
