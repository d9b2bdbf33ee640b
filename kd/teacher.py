"""The frozen teacher, and its one look at originals and candidates."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dalikd.kd.folding import fold_batch_norms
from dalikd.kd.mixing import Mixed
from dalikd.kd.normalize import Normalized
from dalikd.kd.picking import entropy, pick_rows

__all__ = [
    "STUDENT_ENTROPY",
    "TEACHER_ENTROPY",
    "Criterion",
    "Look",
    "PoolOutputs",
    "Teacher",
    "batch_statistics",
    "look",
]


class Teacher:
    """A net that only answers: eval mode, no gradient, out of reach of train() and of every optimizer.

    Deliberately no nn.Module: as a submodule it would be wrapped, copied and checkpointed along with the student.

    Args:
        model: takes pixels [B, 3, H, W], gives logits. It is frozen and moved to `device`.
        device: where it runs.
        autocast: compute type of mixed precision, or None for the parameters' own.
        fold_bn: fold batch norms into convolutions; the model is then nobody else's to save or train.

    Attributes:
        folded: how many batch norms were folded.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        *,
        fold_bn: bool = False,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
        self.folded = fold_batch_norms(model.model if isinstance(model, Normalized) else model) if fold_bn else 0
        self._device_type = torch.device(device).type
        self._autocast = autocast

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] in at least float32."""
        enabled = self._autocast is not None
        with torch.autocast(self._device_type, self._autocast, enabled=enabled):
            logits = self.model(pixels)
        return logits.float() if enabled else logits


class PoolOutputs(NamedTuple):
    """What a criterion may look at."""

    teacher: Tensor | None  # [runs * B, C], on the candidates
    student: Tensor | None  # [runs * B, C], on the candidates
    originals: Tensor | None  # [B, C], the teacher's, on the originals


class Criterion(NamedTuple):
    """How candidates are ranked: the highest scores are kept."""

    score: Callable[[PoolOutputs], Tensor]  # -> [runs * B]
    needs_teacher: bool
    needs_student: bool


TEACHER_ENTROPY = Criterion(lambda outputs: entropy(_given(outputs.teacher)), needs_teacher=True, needs_student=False)
STUDENT_ENTROPY = Criterion(lambda outputs: entropy(_given(outputs.student)), needs_teacher=False, needs_student=True)


class Look(NamedTuple):
    """What the teacher saw and said in one step."""

    logits: Tensor  # [B, C], on the originals
    augmented: Tensor  # [B, 3, S, S] pixels: the candidates, or those picked
    augmented_logits: Tensor  # [B, C]
    partner: Tensor  # int64 [B], row of the batch mixed into each
    lam: Tensor  # [B], share of the image itself
    picks: Tensor | None = None  # int64 [B], where candidates were picked: their places in the pool


def look(
    teacher: Callable[[Tensor], Tensor],
    pixels: Tensor,
    candidates: Mixed | None,
    *,
    criterion: Criterion | None = None,
    group: int = 64,
    student: Callable[[Tensor], Tensor] | None = None,
) -> Look:
    """Let the teacher see originals and candidates in one call, and keep the best candidates.

    With teacher scores the pool's logits are gathered for the picks, not computed again: exact, as the teacher is in
    eval mode. With student scores alone the picks are made first, and the teacher sees only them.

    Args:
        teacher: pixels [n, 3, S, S] -> logits [n, C].
        pixels: originals [B, 3, S, S].
        candidates: runs * B augmented images, run after run; None for the originals themselves (identity).
        criterion: how to pick B of several runs; None keeps all of a single run.
        group: originals that share a pool.
        student: pixels of the pool -> logits, without gradient; for criteria that need it.
    """
    batch = len(pixels)
    if candidates is None:
        logits = teacher(pixels)
        own = torch.arange(batch, device=pixels.device)
        return Look(logits, pixels, logits, own, torch.ones(batch, device=pixels.device))
    if criterion is None:
        assert len(candidates.images) == batch
        both = teacher(_join(pixels, candidates.images))
        return Look(both[:batch], candidates.images, both[batch:], candidates.partner, candidates.lam)
    student_logits = _given(student)(candidates.images) if criterion.needs_student else None
    if not criterion.needs_teacher:
        picks = _pick(criterion, PoolOutputs(None, student_logits, None), batch, group)
        return look(teacher, pixels, _take(candidates, picks))._replace(picks=picks)
    every = teacher(_join(pixels, candidates.images))
    logits, pool = every[:batch], every[batch:]
    picks = _pick(criterion, PoolOutputs(pool, student_logits, logits), batch, group)
    picked = _take(candidates, picks)
    return Look(logits, picked.images, pool[picks], picked.partner, picked.lam, picks)


@contextmanager
def batch_statistics(model: nn.Module):
    """In here a net normalises by its batch, as in training, but its running statistics stay as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    training = model.training
    model.train()
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked
        model.train(training)


def _pick(criterion: Criterion, outputs: PoolOutputs, batch: int, group: int) -> Tensor:
    return pick_rows(criterion.score(outputs).reshape(-1, batch), group)


def _take(candidates: Mixed, picks: Tensor) -> Mixed:
    return Mixed(candidates.images[picks], candidates.partner[picks], candidates.lam[picks])


def _join(pixels: Tensor, images: Tensor) -> Tensor:
    return torch.cat((pixels, images))  # uint8 and float promote to float


def _given(value: Any) -> Any:
    assert value is not None
    return value
