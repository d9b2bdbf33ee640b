"""The frozen teacher, and its one look at originals and candidates."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.folding import fold_batch_norms
from dalikd.kd.known_weights import weights_digest
from dalikd.kd.manifold import hidden_mixing
from dalikd.kd.mixing import HiddenMix, Mixed
from dalikd.kd.normalize import Normalized
from dalikd.kd.picking import STUDENT_ENTROPY, TEACHER_ENTROPY, Criterion, PoolOutputs, entropy, score_and_pick

__all__ = [
    "STUDENT_ENTROPY",
    "TEACHER_ENTROPY",
    "Criterion",
    "Entropies",
    "Look",
    "PoolOutputs",
    "Teacher",
    "batch_statistics",
    "entropies",
    "look",
]


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
        folded: how many batch norms were folded.
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
        self.folded = fold_batch_norms(model.model if isinstance(model, Normalized) else model) if fold_bn else 0
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

    def __call__(self, pixels: Tensor, hidden: HiddenMix | None = None) -> Tensor:
        """Logits [n, C] in at least float32.

        Args:
            pixels: [n, 3, H, W].
            hidden: how the last of them are mixed inside the net with the first, which are originals.
        """
        return self._ask(self.model, pixels, hidden)

    def outputs(self, pixels: Tensor, hidden: HiddenMix | None = None, *, preactivations: bool = False) -> NetOutput:
        """The same with the features of the stages, and with what comes before their last ReLU where that is wanted."""
        assert isinstance(self.model, Normalized)
        return self._ask(partial(self.model.outputs, features=True, preactivations=preactivations), pixels, hidden)

    @torch.no_grad()
    def _ask(self, net: Callable[[Tensor], Any], pixels: Tensor, hidden: HiddenMix | None) -> Any:
        enabled = self._autocast is not None
        with torch.autocast(self._device_type, self._autocast, enabled=enabled), hidden_mixing(self.model, hidden):
            found = net(pixels)
        if not enabled:
            return found
        return found.float() if isinstance(found, Tensor) else found._replace(logits=found.logits.float())


class Look(NamedTuple):
    """What the teacher saw and said in one step. n is B, unless a mix group keeps more or fewer picks."""

    logits: Tensor  # [B, C], on the originals
    augmented: Tensor  # [n, 3, S, S] pixels: the candidates, or those picked
    augmented_logits: Tensor  # [n, C]
    partner: Tensor  # int64 [n], row of the batch mixed into each
    lam: Tensor  # [n], share of the image itself
    rows: Tensor  # int64 [n], row of the batch that each stems from
    picks: Tensor | None = None  # int64 [n], where candidates were picked: their places in the pool
    scores: Tensor | None = None  # [runs * B], of the pool, where candidates were picked
    pool_logits: Tensor | None = None  # [runs * B, C], of the net that scores: the teacher, or the student if it alone
    layer: Tensor | None = None  # int32 [n], where the partner is mixed in inside of the nets
    inner: NetOutput | None = None  # on the originals, where more than logits was asked for

    @property
    def originals(self) -> NetOutput:
        """What the teacher gave on the originals."""
        return NetOutput(self.logits) if self.inner is None else self.inner

    @property
    def hidden(self) -> HiddenMix | None:
        """How a net has to mix the hidden states of the augmented images; None where they are mixed already."""
        return None if self.layer is None else HiddenMix(self.partner, self.lam, self.layer)


def look(
    teacher: Callable[..., Tensor],
    pixels: Tensor,
    candidates: Mixed | None,
    *,
    criterion: Criterion | None = None,
    group: int = 64,
    keep: int | None = None,
    student: Callable[..., Tensor] | None = None,
) -> Look:
    """Let the teacher see originals and candidates in one call, and keep the best candidates.

    With teacher scores the pool's logits are gathered for the picks, not computed again: exact, as the teacher is in
    eval mode. With student scores alone the picks are made first, and the teacher sees only them.

    Args:
        teacher: pixels [n, 3, S, S] -> logits [n, C], or a NetOutput; for candidates mixed inside the nets it takes a
            HiddenMix too, and the originals come before them.
        pixels: originals [B, 3, S, S].
        candidates: runs * B augmented images, run after run; None for the originals themselves (identity).
        criterion: how to pick of several runs; None keeps all of a single run.
        group: originals that share a pool.
        keep: picks of a whole group's pool; default: as many as originals.
        student: the same, pixels of the pool -> logits, without gradient; for criteria that need it.

    Raises:
        ValueError: more is kept than the pool holds.
    """
    own = torch.arange(len(pixels), device=pixels.device)
    if candidates is None:
        logits, inner = _logits(teacher(pixels))
        return Look(logits, pixels, logits, own, torch.ones(len(pixels), device=pixels.device), own, inner=inner)
    if criterion is None:
        assert len(candidates.images) == len(pixels)
        logits, augmented, inner = _ask(teacher, pixels, candidates)
        return Look(
            logits, candidates.images, augmented, candidates.partner, candidates.lam, own, layer=candidates.layer,
            inner=inner,
        )  # fmt: skip
    return _look_and_pick(teacher, pixels, candidates, criterion, group, keep, student)


class Entropies(NamedTuple):
    """Entropies by the net that scores candidates, in nats; to be logged."""

    originals: Tensor  # [B]
    candidates: Tensor  # [runs * B], the whole pool
    picks: Tensor  # [n]


def entropies(seen: Look, originals: Tensor | None = None) -> Entropies:
    """How uncertain the net that scores is about originals, candidates and picks.

    Args:
        seen: a look. Where nothing was picked, the candidates are all of them picks, and the teacher's outputs count.
        originals: the scoring net's logits on the originals [B, C], where a student alone scores; else the teacher's.
    """
    pool = entropy(seen.augmented_logits if seen.pool_logits is None else seen.pool_logits)
    picks = pool if seen.picks is None else pool[seen.picks]
    return Entropies(entropy(seen.logits if originals is None else originals), pool, picks)


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


def _look_and_pick(
    teacher: Callable[..., Tensor],
    pixels: Tensor,
    candidates: Mixed,
    criterion: Criterion,
    group: int,
    keep: int | None,
    student: Callable[..., Tensor] | None,
) -> Look:
    """The look where several candidates of each original compete; arguments as for `look`."""
    batch = len(pixels)
    logits = pool = scored = inner = None
    if criterion.needs_student:
        scored = _score(_given(student), pixels, candidates)
    if criterion.needs_teacher:
        logits, pool, inner = _ask(teacher, pixels, candidates)
    picks, scores = score_and_pick(criterion, PoolOutputs(pool, scored, logits), batch, group, keep)
    picked = candidates.take(picks)
    if pool is None:
        logits, augmented, inner = _ask(teacher, pixels, picked)
    else:
        augmented = pool[picks]
    return Look(
        _given(logits), picked.images, augmented, picked.partner, picked.lam, picks % batch, picks, scores,
        scored if pool is None else pool, picked.layer, inner,
    )  # fmt: skip


def _ask(net: Callable[..., Tensor], pixels: Tensor, candidates: Mixed) -> tuple[Tensor, Tensor, NetOutput | None]:
    """A net's logits on originals and candidates, in one call, and all it gave on the originals."""
    both = torch.cat((pixels, candidates.images))  # uint8 and float promote to float
    logits, inner = _logits(net(both) if candidates.hidden is None else net(both, candidates.hidden))
    batch = len(pixels)
    if inner is not None:  # copied: a part of it would keep the features of the whole pool through the student's step
        inner = inner.first(batch).map(torch.clone)
    return logits[:batch], logits[batch:], inner


def _logits(found: Tensor | NetOutput) -> tuple[Tensor, NetOutput | None]:
    return (found, None) if isinstance(found, Tensor) else (found.logits, found)


def _score(student: Callable[..., Tensor], pixels: Tensor, candidates: Mixed) -> Tensor:
    return student(candidates.images) if candidates.hidden is None else _ask(student, pixels, candidates)[1]


def _given(value: Any) -> Any:
    assert value is not None
    return value
