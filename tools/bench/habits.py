"""The published CutMixPick loop, written anew from its description, with each of its habits as a switch.

What the published code of Wang et al. (NeurIPS 2022, arXiv 2012.02909) does in a step of N images: a DataLoader over
Pillow decodes and normalises. The student sees the N originals, then the teacher does. Two runs of CutMix, drawn on the
host, make a pool of 2 N candidates, which the teacher sees in a call of its own. The N of highest entropy are kept; the
teacher sees these again, then the student. The host reads each term of the loss before the backward pass. That makes
4 N teacher images a step. Left out is what the published code computes and never reads: interpolated labels and logits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.losses import DistillationLoss, MixedOutputs, StepOutputs
from dalikd.kd.mixing import MixDraws, Mixed
from dalikd.kd.picking import TEACHER_ENTROPY, entropy, pick_rows
from dalikd.kd.teacher import Branch, BranchOutputs, TeacherPass, teacher_pass
from dalikd.trainers.augmentation import Augmenter, Branches
from dalikd.trainers.tracking import Meter

__all__ = ["RUNGS", "HabitLoop", "Habits", "HostMeters", "Input", "host_cutmix"]

_TOP = 5  # the published loop counts the five best classes


@dataclass(frozen=True)
class Habits:
    """What a loop does as the published one does. All false: as dalikd does.

    Attributes:
        pil_loader: pictures come from a DataLoader over Pillow.
        host_waits: CutMix is drawn on the host, and the host reads each term of the loss in each step.
        looks_again: the teacher sees the picks a second time.
        separate_calls: the teacher sees originals and candidates in calls of their own.
        float_images: images are normalised float32 from the loader on, and are mixed so.
        channels_first: images and weights lie in memory channel by channel.
        batch_norms: the teacher computes its batch norms.
    """

    pil_loader: bool = True
    host_waits: bool = True
    looks_again: bool = True
    separate_calls: bool = True
    float_images: bool = True
    channels_first: bool = True
    batch_norms: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and weights lie in memory."""
        return torch.contiguous_format if self.channels_first else torch.channels_last


def _ladder() -> dict[str, Habits]:
    given_up = {
        "dalikd's loader": "pil_loader",
        "no host waits": "host_waits",
        "picked logits gathered": "looks_again",
        "one teacher call": "separate_calls",
        "uint8 until the net": "float_images",
        "channels_last": "channels_first",
        "batch norms folded": "batch_norms",
    }
    rungs = {"published": Habits()}
    for name, habit in given_up.items():
        rungs[name] = replace(list(rungs.values())[-1], **{habit: False})
    return rungs


#: The rungs below `dalikd distill`'s own step, lowest first.
RUNGS: dict[str, Habits] = _ladder()


class Input(NamedTuple):
    """A batch as a loop takes it."""

    images: Tensor  # [N, 3, S, S], normalised float or pixels
    labels: Tensor  # int64 [N]
    draws: Sequence[MixDraws] = ()  # of each CutMix run; none where the loop draws itself


class HostMeters:
    """Running means, each term read by the host in each step."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.count = 0

    def add(self, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its terms, and how many of its labels are among the best and the five best classes."""
        size = len(labels)
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.item() * size  # waits for the device, as published
        ranked = logits.detach().topk(min(_TOP, logits.shape[1]), dim=1).indices.t()
        hits = ranked.eq(labels.expand_as(ranked))
        for name, depth in (("top1", 1), ("top5", _TOP)):
            self.sums[name] = self.sums.get(name, 0.0) + hits[:depth].flatten().float().sum() / size * size
        self.count += size


class _Meters(Protocol):
    def add(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None: ...


class _DeviceMeters:
    """Running means that stay on the device: those of `dalikd distill`."""

    def __init__(self) -> None:
        self._meter = Meter()

    def add(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        self._meter.add({**terms, "top1": (logits.argmax(1) == labels).float().mean()})


def host_cutmix(images: Tensor, random: np.random.Generator) -> Mixed:
    """CutMix as the published loop does it: one lam, box and order for the whole batch, drawn on the host.

    Args:
        images: float [N, 3, S, S], N at least 2.
        random: draws lam and the box; the order comes from torch's generator of the CPU.
    """
    count, _, height, width = images.shape
    share = np.sqrt(1 - random.beta(1, 1))
    top, bottom = _span(int(height * share), int(random.integers(height)), height)
    left, right = _span(int(width * share), int(random.integers(width)), width)
    own = torch.arange(count, device=images.device)
    partner = torch.randperm(count).to(images.device)
    while (partner == own).any():  # nobody is one's own partner; waits for the device, as published
        partner = torch.randperm(count).to(images.device)
    kept = torch.ones(height, width, dtype=images.dtype).to(images.device)
    kept[top:bottom, left:right] = 0
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixed(images * kept + images[partner] * (1 - kept), partner, images.new_full((count,), lam))


class HabitLoop:
    """Trains a student as the published loop does, or with fewer of its habits.

    Args:
        habits: which of them.
        batches: the next batch, each time it is called.
        student: takes what `batches` gives; it is trained in place.
        teacher: takes the same.
        loss: of the outputs.
        optimizer: over the student's and the loss's parameters -> the optimizer.
        augmenter: mixes where the draws come with the batch.
        autocast: compute type of the student's mixed precision, or None.
        seed: of the draws made here.
    """

    def __init__(
        self,
        habits: Habits,
        batches: Callable[[], Input],
        student: nn.Module,
        teacher: Callable[[Tensor], Tensor],
        loss: DistillationLoss,
        optimizer: Callable[..., torch.optim.Optimizer],
        augmenter: Augmenter,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self._habits, self._batches, self._student, self._teacher = habits, batches, student.train(), teacher
        self._loss, self._augmenter, self._autocast = loss, augmenter, autocast
        self._optimizer = optimizer([*student.parameters(), *loss.parameters()])
        self.meters: _Meters = HostMeters() if habits.host_waits else _DeviceMeters()
        self._random = np.random.default_rng(seed)

    def step(self) -> dict[str, Tensor]:
        """One optimizer step. Returns the terms of the loss."""
        images, labels, draws = self._batches()
        logits = self._answer(images)
        found = self._ask_teacher(images, draws)
        (branch,) = found.branches
        picked_logits, shown = self._answer(branch.mixed.images), branch.mixed
        mixed = MixedOutputs(picked_logits, branch.logits, labels[branch.rows], labels[shown.partner], shown.lam)
        ids, epoch = labels, torch.zeros((), device=labels.device)  # which the published losses do without
        outputs = StepOutputs(NetOutput(logits), found.originals, labels, ids, epoch, mixed)
        terms = self._loss(outputs)
        self.meters.add(terms, logits, labels)
        self._optimizer.zero_grad()
        terms["loss"].backward()
        self._optimizer.step()
        return terms

    def _answer(self, images: Tensor) -> Tensor:
        """The student's logits."""
        with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
            logits = self._student(images)
        return logits.float() if self._autocast is not None else logits

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, draws: Sequence[MixDraws]) -> TeacherPass:
        """In one call, or in the two or three of the published loop."""
        if self._habits.host_waits:
            runs = [host_cutmix(images, self._random) for _ in range(self._augmenter.runs)]
        else:
            runs = Branches([self._augmenter]).make(images, (), draws)
        if not self._habits.separate_calls:
            branch = Branch(tuple(range(len(runs))), TEACHER_ENTROPY)
            return teacher_pass(self._teacher, images, runs, [branch], group=self._augmenter.group)
        logits, pool = self._teacher(images), Mixed.join(runs)
        pool_logits = self._teacher(pool.images)
        group = len(images) if self._habits.host_waits else self._augmenter.group
        picks = pick_rows(entropy(pool_logits).reshape(-1, len(images)), group)
        picked = pool.take(picks)
        again = self._teacher(picked.images) if self._habits.looks_again else pool_logits[picks]
        return TeacherPass(NetOutput(logits), (BranchOutputs(picked, picks % len(images), again),))


def _span(length: int, center: int, side: int) -> tuple[int, int]:
    """First and past-the-last pixel of twice half a length around a pixel, clipped."""
    return max(center - length // 2, 0), min(center + length // 2, side)
