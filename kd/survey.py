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
        images_per_call: how many images a net sees at once at most, but never less than one run; None for all. Runs
            that are mixed inside of the nets are asked about one by one, each together with the originals.
    """
    whole = {run for branch in branches for run in branch.pool if _teacher_sees_pool(branch)}
    students = None if student is None else _Answers(student, pixels, runs, images_per_call)
    if students is not None:
        scored = {run for branch in branches for run in branch.pool if _student_scores(branch)}
        originals = [_ORIGINALS] if student_sees_all or student_sees_originals else []
        students.ask([*originals, *sorted(whole | scored if student_sees_all else scored)])
    teachers = _Answers(teacher, pixels, runs, images_per_call)
    alone = {  # branches whose picks the teacher sees without the rest of their pool: these are made first
        number: _pick(branch, None, students, len(pixels), group)
        for number, branch in enumerate(branches)
        if not (_teacher_sees_pool(branch) or whole.issuperset(branch.pool))
    }
    images = {number: teachers.add(teachers.join(branches[number].pool).take(picks)) for number, picks in alone.items()}
    teachers.ask([_ORIGINALS, *sorted(whole), *images.values()])
    outputs = []
    for number, branch in enumerate(branches):
        picks = alone.get(number)
        if picks is None and branch.criterion is not None:
            picks = _pick(branch, teachers, students, len(pixels), group)
        pool = branch.pool or (_ORIGINALS,)
        logits = teachers[(images[number],)] if number in alone else _of(teachers[pool], picks)
        of_student = _picked(students, pool, picks) if students is not None and student_sees_all else None
        scoring = None if picks is None else _given(teachers if _teacher_sees_pool(branch) else students)[pool]
        outputs.append(BranchOutputs(logits, of_student, scoring, picks))
    on_originals = students[(_ORIGINALS,)] if students is not None and (_ORIGINALS,) in students else None
    return Survey(teachers[(_ORIGINALS,)], on_originals, tuple(outputs))


class _Answers:
    """A net's logits on the originals and on numbered images: each is asked about once."""

    def __init__(self, net: Net, pixels: Tensor, runs: Sequence[Mixed], images_per_call: int | None) -> None:
        self._net, self._pixels, self._mixed = net, pixels, list(runs)
        self._most = images_per_call
        self._logits: dict[int, Tensor] = {}

    def __getitem__(self, numbers: tuple[int, ...]) -> Tensor:
        """Logits of several runs, run after run."""
        if len(numbers) == 1:
            return self._logits[numbers[0]]
        return torch.cat([self._logits[number] for number in numbers])

    def __contains__(self, numbers: tuple[int, ...]) -> bool:
        return all(number in self._logits for number in numbers)

    def add(self, mixed: Mixed) -> int:
        """Number further images."""
        self._mixed.append(mixed)
        return len(self._mixed) - 1

    def join(self, numbers: tuple[int, ...]) -> Mixed:
        """The images of several runs, run after run."""
        return Mixed.join([self._mixed[number] for number in numbers])

    def ask(self, numbers: Sequence[int]) -> None:
        """Ask about those, as many at once as a call may hold."""
        for number in numbers:
            if number != _ORIGINALS and self._mixed[number].hidden is not None:
                self._ask_hidden(number)
        call: list[int] = []
        for number in [number for number in numbers if number not in self._logits]:
            rows = sum(len(self._images(one)) for one in (*call, number))
            if call and self._most is not None and rows > self._most:
                self._ask_together(call)
                call = []
            call.append(number)
        if call:
            self._ask_together(call)

    def _ask_together(self, numbers: list[int]) -> None:
        images = [self._images(number) for number in numbers]
        logits = self._net(torch.cat(images))  # uint8 and float promote to float
        self._logits |= dict(zip(numbers, logits.split([len(part) for part in images]), strict=True))

    def _ask_hidden(self, number: int) -> None:
        """Ask about images that are mixed inside of the net with the originals, which are answered along."""
        mixed, batch = self._mixed[number], len(self._pixels)
        logits = self._net(torch.cat((self._pixels, mixed.images)), mixed.hidden)
        self._logits.setdefault(_ORIGINALS, logits[:batch])
        self._logits[number] = logits[batch:]

    def _images(self, number: int) -> Tensor:
        return self._pixels if number == _ORIGINALS else self._mixed[number].images


def _teacher_sees_pool(branch: Branch) -> bool:
    return branch.criterion is None or branch.criterion.needs_teacher


def _student_scores(branch: Branch) -> bool:
    return branch.criterion is not None and branch.criterion.needs_student


def _pick(branch: Branch, teachers: _Answers | None, students: _Answers | None, batch: int, group: int) -> Tensor:
    """Places of a branch's picks in its pool; the teacher's answers where they are needed."""
    criterion = branch.criterion
    assert criterion is not None
    pool, sees_pool = branch.pool, _teacher_sees_pool(branch)
    of_teacher = _given(teachers)[pool] if sees_pool else None
    originals = _given(teachers)[(_ORIGINALS,)] if sees_pool else None
    of_student = _given(students)[pool] if criterion.needs_student else None
    return score_and_pick(criterion, PoolOutputs(of_teacher, of_student, originals), batch, group, branch.keep)[0]


def _of(logits: Tensor, picks: Tensor | None) -> Tensor:
    return logits if picks is None else logits[picks]


def _picked(answers: _Answers, pool: tuple[int, ...], picks: Tensor | None) -> Tensor:
    """Logits of the picks: gathered, where the net has seen the whole pool."""
    if pool not in answers:
        assert picks is not None
        number = answers.add(answers.join(pool).take(picks))
        answers.ask([number])
        return answers[(number,)]
    return _of(answers[pool], picks)


def _given(answers: _Answers | None) -> _Answers:
    assert answers is not None, "a criterion needs a student"
    return answers
