"""The frozen teacher, and its one pass over originals and augmented images, for training, caching and measuring alike.

Augmentations share runs: what CutMix makes is also the first candidate of CutMixPick. So the teacher is asked about the
originals and about each run in one call, or a few large ones, and what it gives for each pool and pick is gathered.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput, Normalized
from dalikd.kd.folding import fold_batch_norms
from dalikd.kd.known_weights import weights_digest
from dalikd.kd.losses.base import full_precision
from dalikd.kd.manifold import hidden_mixing
from dalikd.kd.mixing import HiddenMix, Mixed
from dalikd.kd.picking import Criterion, PoolOutputs, entropy, pick_rows
from dalikd.kd.rotation import TURNS, rotations

__all__ = [
    "Branch",
    "BranchOutputs",
    "Teacher",
    "TeacherPass",
    "Teachers",
    "batch_statistics",
    "entropies",
    "teacher_pass",
]

Net = Callable[..., Any]  # pixels [n, 3, S, S] -> logits [n, C], or NetOutput; perhaps with a HiddenMix
StudentPart = Literal["candidates", "originals", "everything"]
_ORIGINALS = -1  # where other images have the number of their run

#: the layers whose weights mixed precision casts, whoever calls them; subclasses may read their weights otherwise
_CAST = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}


class Teacher:
    """A net that only answers: eval mode, no gradient, out of reach of train() and of every optimizer.

    Deliberately no nn.Module: as a submodule it would be wrapped, copied and checkpointed along with the student.

    Args:
        model: takes pixels [B, 3, H, W], gives logits. It is frozen and moved to `device`.
        device: where it runs.
        autocast: compute type of mixed precision, or None for the parameters' own.
        fold_bn: fold batch norms into convolutions; the model is then nobody else's to save or train.
        digest: of the weights as they were loaded, where a run is to know them again.

    Attributes:
        norms: batch norms before the last ReLU of its stages, as they were before they were folded; none where the net
            does not name them.
        folded: how many batch norms were folded.
        heads: how many auxiliary heads it has.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        *,
        fold_bn: bool = False,
        digest: str = "",
    ) -> None:
        self.digest = digest
        self.model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
        net = model.model if isinstance(model, Normalized) else model
        named = getattr(net, "norms_before_last_relu", None)
        self.norms: tuple[nn.BatchNorm2d, ...] = () if named is None else tuple(named())
        self.folded = fold_batch_norms(net) if fold_bn else 0
        self.heads = len(getattr(net, "auxiliary_classifier", ()))
        self._device_type = torch.device(device).type
        self._autocast = autocast
        self._digest = ""  # of the weights in use, before they were cast

    @property
    def digest_in_use(self) -> str:
        """Of the weights as they are asked, folded, but not as they are cast."""
        return self._digest or weights_digest(self.model)

    @torch.no_grad()
    def cast_weights(self, pixels: Tensor) -> bool:
        """Keep the weights that mixed precision casts at each call in the compute type.

        Args:
            pixels: [n, 3, H, W]. The answers on them must stay the same, bit for bit; else the weights stay.

        Returns:
            whether the weights are in the compute type now; not where there is none.
        """
        if self._autocast is None:
            return False
        self._digest, expected = weights_digest(self.model), self(pixels)
        cast = [
            (module, name, values)
            for module in self.model.modules()
            for name, values in module._parameters.items()
            if type(module) in _CAST and values is not None and values.dtype == torch.float32
        ]
        for module, name, values in cast:
            setattr(module, name, nn.Parameter(values.to(self._autocast), requires_grad=False))
        try:
            same = torch.equal(self(pixels), expected)
        except RuntimeError:  # the net's own code brings two types together
            same = False
        if not same:
            for module, name, values in cast:
                setattr(module, name, values)
        return same

    @torch.no_grad()
    def __call__(self, pixels: Tensor, hidden: HiddenMix | None = None, net: Net | None = None) -> Any:
        """Logits [n, C] in at least float32.

        Args:
            pixels: [n, 3, H, W].
            hidden: how the last of them are mixed inside the net with the first, which are originals.
            net: asked in place of the model's forward.
        """
        enabled = self._autocast is not None
        mixing = nullcontext() if hidden is None else hidden_mixing(self.model, hidden)
        with torch.autocast(self._device_type, self._autocast, enabled=enabled), mixing:
            found = (net or self.model)(pixels)
        if not enabled:
            return found
        return found.float() if isinstance(found, Tensor) else found._replace(logits=found.logits.float())

    def outputs(self, pixels: Tensor, hidden: HiddenMix | None = None, **wanted: bool) -> NetOutput:
        """The same with the features of the stages, and with what else of `Normalized.outputs` is wanted."""
        assert isinstance(self.model, Normalized)
        return self(pixels, hidden, partial(self.model.outputs, features=True, **wanted))

    def turned_heads(self, pixels: Tensor) -> NetOutput:
        """Logits [n, C], and those of each auxiliary head on the images in all four quarter turns, [n, 4, 4C]: one call
        about 4n images, of which those that are not turned give the logits.

        Raises:
            ValueError: it has no heads.
        """
        assert isinstance(self.model, Normalized)
        found = self(rotations(pixels), net=partial(self.model.outputs, heads=True))
        heads = (full_precision(head).unflatten(0, (-1, TURNS)) for head in found.heads)
        return NetOutput(found.logits[::TURNS], heads=tuple(heads))


class Teachers:
    """Several teachers that answer as one: with a weighted mean of their logits.

    softmax(sum_k w_k z_k / T) is the weighted geometric mean of the teachers' softened distributions, renormalised, by
    the same weights at every temperature T. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv
    1503.02531, take the arithmetic or the geometric mean of an ensemble's distributions as targets.

    By entropy, the weights are of each image: w_k exp(-H_k), renormalised, where H_k in nats is the entropy of the
    teacher's distribution at temperature 1, so that a teacher which is sure counts more. Kwon et al., "Adaptive
    Knowledge Distillation Based on Entropy", ICASSP 2020, give teachers of lower entropy a larger share; this form of
    it is dalikd's own.

    Args:
        teachers: at least one, for the same classes, on one device.
        names: of them, for people.
        weights: one above 0 for each; what counts is their ratio. Default: equal.
        by_entropy: whether the weights are multiplied by exp(-H) for each image.

    Attributes:
        teachers: all of them.
        weights: theirs; their sum is 1.
        model: their nets.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        by_entropy: bool = False,
    ) -> None:
        weights = weights or [1.0] * len(teachers)
        self.teachers, self.names, self.by_entropy = tuple(teachers), tuple(names), by_entropy
        self.weights = tuple(weight / math.fsum(weights) for weight in weights)
        self.model = nn.ModuleList([teacher.model for teacher in teachers])

    def __call__(self, pixels: Tensor, hidden: HiddenMix | None = None) -> NetOutput:
        """Their logits as one [n, C], and those of each; arguments as of a Teacher, asked once each."""
        each = tuple(teacher(pixels, hidden) for teacher in self.teachers)
        return NetOutput(self.combine(each), each=each)

    def combine(self, each: Sequence[Tensor]) -> Tensor:
        """One logits [n, C] of those of each teacher, [n, C]."""
        shares: Iterable[Any] = self.weights
        if self.by_entropy:
            pairs = zip(self.weights, each, strict=True)
            sure = torch.stack([math.log(weight) - entropy(logits) for weight, logits in pairs])
            shares = sure.softmax(dim=0).unsqueeze(2)  # [teachers, n, 1]
        parts = [share * logits for share, logits in zip(shares, each, strict=True)]
        return torch.stack(parts).sum(dim=0)


class Branch(NamedTuple):
    """One augmentation: the runs it is made of, and how candidates are picked out of several."""

    runs: tuple[int, ...]  # their numbers; () for the originals themselves (identity)
    criterion: Criterion | None = None  # None keeps all of a single run
    n_pick: int | None = None  # picks from the pool of a mix group; None: as many as it has originals


class BranchOutputs(NamedTuple):
    """The augmented images of one augmentation, and what the nets give for them. n is B, unless a mix group keeps more
    or fewer picks."""

    mixed: Mixed  # n of them: all of a run, or those picked
    rows: Tensor  # int64 [n], row of the batch that each stems from
    logits: Tensor  # [n, C], the teacher's
    student_logits: Tensor | None = None  # [n, C], where the student is asked about everything
    picks: Tensor | None = None  # int64 [n], where something is picked: places in the pool
    pool_logits: Tensor | None = None  # [runs * B, C], then; of the net that scores: the teacher, or the student alone
    heads: tuple[Tensor, ...] = ()  # [n, ...] each, the teacher's, where it is asked for them
    each: tuple[Tensor, ...] = ()  # [n, C] each, of several teachers, whose combination `logits` are


class TeacherPass(NamedTuple):
    """What the nets give for a batch and for its augmentations."""

    originals: NetOutput  # the teacher's
    branches: tuple[BranchOutputs, ...]
    student_logits: Tensor | None = None  # [B, C], on the originals, where the student is asked about them
    turned: NetOutput | None = None  # the teacher's on the originals in all quarter turns, 4B rows, where wanted


def teacher_pass(
    teacher: Net,
    pixels: Tensor,
    runs: Sequence[Mixed],
    branches: Sequence[Branch],
    *,
    group: int = 64,
    student: Net | None = None,
    student_part: StudentPart = "candidates",
    images_per_call: int | None = None,
    turned: NetOutput | None = None,
) -> TeacherPass:
    """Ask the teacher about originals and augmented images, and pick candidates. Training has one branch.

    With teacher scores the pool's logits are gathered for the picks, not computed again: exact, as the teacher is in
    eval mode. With student scores alone the picks are made first, and the teacher is asked about them alone, unless
    another branch has it asked about all of their pool.

    Args:
        teacher: pixels [n, 3, S, S] -> logits [n, C], or a NetOutput where features of the originals are wanted. Where
            images are mixed inside the nets it takes a HiddenMix too, and the originals come before them.
        pixels: originals [B, 3, S, S].
        runs: the augmented images of each run, B each.
        branches: the augmentations, which name their runs by number.
        group: originals that share a pool.
        student: like the teacher, without gradient; for criteria that need it, and for `student_part`.
        student_part: what the student is asked about: the candidates that it scores; the originals too; or everything
            that the teacher's logits are given of.
        images_per_call: how many images a net is asked about at once at most, but never fewer than one run; default:
            all. Images that are mixed inside the nets need the originals in their call.
        turned: what the teacher gives for the originals in all quarter turns, 4B rows in the order of `rotations`: it
            is then not asked about the originals again.

    Raises:
        ValueError: more is picked than the pool holds.
    """
    own, originals = torch.arange(len(pixels), device=pixels.device), (_ORIGINALS,)
    shown: dict[tuple[int, ...], Mixed] = {(number,): run for number, run in enumerate(runs)}
    shown[originals] = Mixed(pixels, own, torch.ones(len(pixels), device=pixels.device))
    pools = [branch.runs or originals for branch in branches]
    by_teacher = [branch.criterion is None or branch.criterion.needs_teacher for branch in branches]
    whole = {run for branch, asked in zip(branches, by_teacher, strict=True) if asked for run in branch.runs}
    scored = {run for branch in branches if branch.criterion and branch.criterion.needs_student for run in branch.runs}
    teachers, students = (_Answers(net, shown, pools, images_per_call) for net in (teacher, student))

    everything, picks, alone = student_part == "everything", {}, {}
    if turned is not None:
        teachers.outputs = turned.map(lambda rows: rows[::TURNS])
        teachers.given[originals] = teachers.outputs
    students.ask(sorted(scored | whole if everything else scored), originals=student_part != "candidates")
    for asked in (False, True):  # first what a student picks by itself
        if asked:
            teachers.ask([*sorted(whole), *alone.values()], originals=turned is None)
        for number, (branch, pool) in enumerate(zip(branches, pools, strict=True)):
            if branch.criterion is None or branch.criterion.needs_teacher != asked:
                continue
            outputs = PoolOutputs(teachers.logits(pool), students.logits(pool), teachers.logits(originals))
            scores = branch.criterion.score(outputs, group).reshape(-1, len(pixels))
            picks[number] = pick_rows(scores, group, branch.n_pick)
            if not asked and not whole.issuperset(pool):  # the teacher is asked about the picks alone
                alone[number] = len(runs) + number
                shown[(alone[number],)] = shown[pool].take(picks[number])

    found = []
    for number, (branch, pool, asked) in enumerate(zip(branches, pools, by_teacher, strict=True)):
        mixed, of_student = shown[pool], students.logits(pool) if everything and student is not None else None
        if branch.criterion is None:
            assert len(pool) == 1
            given = teachers.given[pool]
            found.append(BranchOutputs(mixed, own, given.logits, of_student, heads=given.heads, each=given.each))
            continue
        chosen, images, rows = picks[number], pool, picks[number]
        if number in alone:  # what was asked about is all of it picks
            images, rows = (alone[number],), slice(None)
        mixed = shown[images] if number in alone else mixed.take(chosen)
        given, scoring = teachers.given[images].take(rows), (teachers if asked else students).logits(pool)
        of_student = None if of_student is None else of_student[chosen]
        stems, beside = chosen % len(pixels), (given.heads, given.each)
        found.append(BranchOutputs(mixed, stems, given.logits, of_student, chosen, scoring, *beside))
    return TeacherPass(teachers.outputs, tuple(found), students.logits(originals), turned)


def entropies(originals: Tensor, outputs: BranchOutputs) -> tuple[Tensor, Tensor, Tensor]:
    """How uncertain the net that scores is about originals [B], candidates [runs * B] and picks [n]; in nats, to be
    logged. Where nothing is picked, the candidates are all of them picks, and the teacher's outputs count.

    Args:
        originals: that net's logits on the originals [B, C].
        outputs: of an augmentation.
    """
    candidates = entropy(outputs.logits if outputs.pool_logits is None else outputs.pool_logits)
    return entropy(originals), candidates, candidates if outputs.picks is None else candidates[outputs.picks]


@contextmanager
def batch_statistics(model: nn.Module):
    """In here a net normalises by its batch, as in training, but its running statistics stay as they are.

    By this process's batch alone: a norm in eval mode without running statistics asks no other process for its own,
    synchronised or not.
    """
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()  # else a part that is frozen stays in eval mode
    norms = [norm for norm in modes if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.eval()
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, running, strict=True):
            norm.running_mean, norm.running_var = mean, variance
        for module, training in modes.items():
            module.training = training


@dataclass
class _Answers:
    """What a net gives for originals and for numbered images, which it is asked about once."""

    net: Net | None  # None where it will not be asked
    shown: dict[tuple[int, ...], Mixed]  # the images of each number; pools are added, joined
    pools: Sequence[tuple[int, ...]]  # numbers whose images and logits are wanted together
    most: int | None  # images in a call; None for all
    outputs: Any = None  # on the originals
    given: dict[tuple[int, ...], NetOutput] = field(default_factory=dict)  # by number, and for whole pools; no features

    def logits(self, pool: tuple[int, ...]) -> Tensor | None:
        """On the images of these numbers; None where it was not asked about them."""
        return self.given[pool].logits if pool in self.given else None

    def ask(self, numbers: Iterable[int], *, originals: bool) -> None:
        """Ask about those, as many at once as a call may hold; first about what is not mixed inside the net."""
        shown, calls = self.shown, [[_ORIGINALS] if originals else []]
        for number in sorted(numbers, key=lambda number: shown[(number,)].layer is not None):
            rows = sum(len(shown[(one,)].images) for one in (*calls[-1], number))
            if calls[-1] and self.most is not None and rows > self.most:
                calls.append([])
            if shown[(number,)].layer is not None and _ORIGINALS not in calls[-1]:
                calls[-1].insert(0, _ORIGINALS)
            calls[-1].append(number)
        for call in filter(None, calls):
            self._call(call)
        for pool in self.pools:
            if pool not in self.given and all((run,) in self.given for run in pool):
                self.given[pool] = NetOutput.join([self.given[(run,)] for run in pool])
                if pool not in shown:
                    shown[pool] = Mixed.join([shown[(run,)] for run in pool])

    def _call(self, call: list[int]) -> None:
        """Ask about the images of these numbers at once; the originals come first."""
        assert self.net is not None, "a criterion needs a student"
        parts = [self.shown[(number,)] for number in call]
        images = parts[0].images if len(parts) == 1 else torch.cat([part.images for part in parts])  # may become float
        hidden = [part.hidden for part in parts if part.layer is not None]
        found = self.net(images, *([HiddenMix(*map(torch.cat, zip(*hidden, strict=True)))] if hidden else []))
        outputs = NetOutput(found) if isinstance(found, Tensor) else found
        given, stop, batch = _without_features(outputs), 0, 0
        for number, part in zip(call, parts, strict=True):
            start, stop = stop, stop + len(part.images)
            self.given[(number,)] = given.take(slice(start, stop))
        if call[0] == _ORIGINALS:
            batch = len(parts[0].images)
            self.outputs = outputs if len(call) == 1 else outputs.first(batch)
            if len(call) > 1 and outputs.features:  # a part would keep those of the whole pool through a student's step
                self.outputs = self.outputs.map(torch.clone)
            self.given[(_ORIGINALS,)] = _without_features(self.outputs)
        rest = tuple(call[1:] if batch else call)
        if len(rest) > 1 and rest in self.pools:  # joined already
            self.given[rest] = given.take(slice(batch, None))
            self.shown[rest] = Mixed.join(parts[len(call) - len(rest) :], images[batch:])


def _without_features(outputs: NetOutput) -> NetOutput:
    return outputs._replace(features=(), preactivations=())
