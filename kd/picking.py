"""Choosing the most informative of several augmented candidates (CutMixPick, and picks of any augmentation).

Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909.
A criterion is a function from outputs on the candidates to one score a candidate, the higher the better; `pick` and
`pick_rows` know nothing of where scores come from. Teacher and student entropy are both `entropy`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import full_precision

__all__ = [
    "CRITERIA",
    "DISSIMILARITY",
    "PICK_TEMPERATURE",
    "STUDENT_ENTROPY",
    "TEACHER_ENTROPY",
    "Criterion",
    "PoolOutputs",
    "criterion_by_name",
    "dissimilarity",
    "divergence",
    "entropy",
    "kl_divergence",
    "pick",
    "pick_count",
    "pick_rows",
    "score_and_pick",
]

PICK_TEMPERATURE = 4.0  # published, of the divergence


# -------------------------------------------------------------------------------------------------------- scores


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) at temperature 1, in nats.

    Args:
        logits: [B, C].

    Returns:
        [B] in float32 (float64 stays). A probability of 0 contributes 0: finite logits never give NaN.
    """
    log_probabilities = _finite(functional.log_softmax(full_precision(logits), dim=1))
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1)


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float = PICK_TEMPERATURE) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of each row, in nats, without a factor of T^2.

    Args:
        teacher_logits: [B, C].
        student_logits: [B, C].
        temperature: T > 0.

    Returns:
        [B] in float32 (float64 stays). A class that the teacher rules out contributes 0.
    """
    teacher = _finite(functional.log_softmax(full_precision(teacher_logits) / temperature, dim=1))
    student = _finite(functional.log_softmax(full_precision(student_logits) / temperature, dim=1))
    return (teacher.exp() * (teacher - student)).sum(dim=1)


def dissimilarity(candidate_logits: Tensor, original_logits: Tensor, group: int) -> Tensor:
    """Squared distance of a candidate's probabilities to those of the nearest original of its mix group.

    Distances are sums of squared differences and not inner products, whose cancellation would bury those between
    confident outputs; of the memory only one number for each candidate and original of a group is taken.

    Args:
        candidate_logits: the teacher's [runs * B, C], run after run.
        original_logits: the teacher's [B, C], on the originals.
        group: originals in a mix group; the last may be shorter.

    Returns:
        [runs * B] in float32 (float64 stays), from 0 to 2.

    Raises:
        ValueError: the candidates are no whole runs, or group is below 1.
    """
    batch = len(original_logits)
    if not batch or len(candidate_logits) % batch:
        raise ValueError(f"{len(candidate_logits)} candidates are no whole runs over {batch} originals")
    pools = functional.softmax(full_precision(candidate_logits), dim=1).unflatten(0, (-1, batch))  # [runs, B, C]
    originals = functional.softmax(full_precision(original_logits), dim=1)
    blocks = [
        _nearest(pools[:, first:last], originals[first:last], width) for first, last, width in _blocks(batch, group)
    ]
    return torch.cat(blocks, dim=1).flatten()


# ------------------------------------------------------------------------------------------------------ criteria


class PoolOutputs(NamedTuple):
    """What a criterion may look at."""

    teacher: Tensor | None  # [runs * B, C], on the candidates
    student: Tensor | None  # [runs * B, C], on the candidates
    originals: Tensor | None  # [B, C], the teacher's, on the originals


class Criterion(NamedTuple):
    """How candidates are ranked: the highest scores are kept."""

    score: Callable[[PoolOutputs, int], Tensor]  # of the outputs, with so many originals a mix group; -> [runs * B]
    needs_teacher: bool
    needs_student: bool


TEACHER_ENTROPY = Criterion(
    lambda outputs, _: entropy(_given(outputs.teacher)), needs_teacher=True, needs_student=False
)
STUDENT_ENTROPY = Criterion(
    lambda outputs, _: entropy(_given(outputs.student)), needs_teacher=False, needs_student=True
)
DISSIMILARITY = Criterion(
    lambda outputs, group: dissimilarity(_given(outputs.teacher), _given(outputs.originals), group),
    needs_teacher=True,
    needs_student=False,
)


def divergence(temperature: float = PICK_TEMPERATURE) -> Criterion:
    """The criterion of `kl_divergence`: candidates on which the nets disagree.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"--mix.pick_temperature {temperature}: give a number above 0 (published: {PICK_TEMPERATURE:g})"
        )

    def score(outputs: PoolOutputs, group: int) -> Tensor:  # noqa: ARG001
        return kl_divergence(_given(outputs.teacher), _given(outputs.student), temperature)

    return Criterion(score, needs_teacher=True, needs_student=True)


CRITERIA: dict[str, Criterion] = {
    "teacher_entropy": TEACHER_ENTROPY,
    "student_entropy": STUDENT_ENTROPY,
    "kld": divergence(),
    "dissimilarity": DISSIMILARITY,
}


def criterion_by_name(name: str, temperature: float = PICK_TEMPERATURE) -> Criterion:
    """A criterion of `CRITERIA`.

    Args:
        name: of the criterion.
        temperature: of kld; the others have none.

    Raises:
        ValueError: an unknown name, or a temperature that is not above 0.
    """
    if name not in CRITERIA:
        raise ValueError(f'unknown criterion "{name}": there are {", ".join(CRITERIA)}')
    return divergence(temperature) if name == "kld" else CRITERIA[name]


# --------------------------------------------------------------------------------------------------------- picks


def pick(scores: Tensor, k: int, groups: int = 1) -> Tensor:
    """Keep the `k` highest scores of each of `groups` equal, consecutive segments.

    Args:
        scores: [n], n a multiple of groups.
        k: how many to keep of each segment.
        groups: number of segments.

    Returns:
        int64 [groups * k], indices into scores, ascending: picks keep the order of the pool. Of equal scores the later
        are kept, as by the last k of a stable ascending sort.

    Raises:
        ValueError: segments of unequal size, or k outside 1 .. size of a segment.
    """
    if groups < 1 or len(scores) % groups:
        raise ValueError(f"{len(scores)} scores do not form {groups} equal groups: give a divisor of their number")
    size = len(scores) // groups
    if not 1 <= k <= size:
        raise ValueError(f"cannot pick {k} of a pool of {size}: give k from 1 to {size}")
    ascending = scores.reshape(groups, size).sort(dim=1, stable=True).indices
    kept = ascending[:, size - k :].sort(dim=1).values
    return (kept + torch.arange(groups, device=scores.device)[:, None] * size).flatten()


def pick_rows(scores: Tensor, group: int, keep: int | None = None) -> Tensor:
    """Keep the best candidates of each mix group: as many as it has originals, or another number.

    Each of `runs` augmentation runs made one candidate of each of B originals. The originals form groups of `group`
    consecutive columns, the last possibly shorter; a group of w columns keeps `keep * w / group`, rounded up, of its
    runs * w candidates.

    Args:
        scores: [runs, B].
        group: originals in a group.
        keep: candidates that a whole group keeps; default: as many as it has originals.

    Returns:
        int64 [pick_count(B, group, keep)], indices into the flattened [runs * B] pool: groups in order, and inside a
        group the order of the pool (all columns of run 0 first).

    Raises:
        ValueError: scores empty or not of two dimensions, group below 1, or keep outside 1 .. runs * group.
    """
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"scores have shape {tuple(scores.shape)}: give [runs, batch], neither of them 0")
    keep = group if keep is None else keep
    blocks = _blocks(scores.shape[1], group)
    if not 1 <= keep <= len(scores) * group:
        raise ValueError(
            f"--mix.n_pick {keep} of a pool of {len(scores) * group}: give 1 to {len(scores) * group}, or a larger "
            f"pool (--mix.n_run {len(scores)} x --mix.group {group})"
        )
    picks = [_pick_block(scores, first, last, width, _share(keep, width, group)) for first, last, width in blocks]
    return torch.cat(picks)


def pick_count(batch: int, group: int, keep: int | None = None) -> int:
    """How many candidates `pick_rows` keeps of a batch of originals; arguments as there."""
    keep = group if keep is None else keep
    return sum((last - first) // width * _share(keep, width, group) for first, last, width in _blocks(batch, group))


def score_and_pick(
    criterion: Criterion, outputs: PoolOutputs, batch: int, group: int, keep: int | None = None
) -> tuple[Tensor, Tensor]:
    """Picks out of a pool whose outputs are there already.

    Args:
        criterion: how candidates are ranked.
        outputs: those that the criterion needs.
        batch: originals.
        group: originals in a mix group.
        keep: as for `pick_rows`.

    Returns:
        Picks as `pick_rows` gives them, and the scores of the whole pool [runs * B].
    """
    scores = criterion.score(outputs, group)
    return pick_rows(scores.reshape(-1, batch), group, keep), scores


def _blocks(batch: int, group: int) -> list[tuple[int, int, int]]:
    """First column, past the last, and columns in a group: of the whole groups, and of a shorter last one."""
    if group < 1:
        raise ValueError(f"group is {group}: give at least 1")
    whole = batch // group * group
    blocks = [(0, whole, group), (whole, batch, batch - whole)]
    return [block for block in blocks if block[0] < block[1]]


def _share(keep: int, width: int, group: int) -> int:
    """What a group of `width` originals keeps where a whole one keeps `keep`, rounded up."""
    return -(-keep * width // group)


def _pick_block(scores: Tensor, first: int, last: int, group: int, keep: int) -> Tensor:
    """Pick in columns first .. last, a whole number of groups; indices as in `pick_rows`."""
    runs, batch = scores.shape
    groups = (last - first) // group
    pools = scores[:, first:last].reshape(runs, groups, group).transpose(0, 1)  # [groups, runs, group]
    picked = pick(pools.flatten(), keep, groups)
    run = picked // group % runs
    column = first + picked // (runs * group) * group + picked % group
    return run * batch + column


def _nearest(pools: Tensor, originals: Tensor, group: int) -> Tensor:
    """Squared distances [runs, n] of probabilities [runs, n, C] to the nearest of their group's originals [n, C]."""
    runs, columns, classes = pools.shape
    candidates = pools.reshape(runs, -1, group, classes).transpose(0, 1).flatten(1, 2)  # [groups, runs * group, C]
    distances = torch.cdist(
        candidates, originals.reshape(-1, group, classes), compute_mode="donot_use_mm_for_euclid_dist"
    )
    nearest = distances.amin(dim=2).square()
    return nearest.unflatten(1, (runs, group)).transpose(0, 1).reshape(runs, columns)


def _finite(log_probabilities: Tensor) -> Tensor:
    """The lowest number instead of the -inf of a masked class, since 0 * inf is NaN."""
    return log_probabilities.clamp(min=torch.finfo(log_probabilities.dtype).min)


def _given(value: Any) -> Any:
    assert value is not None
    return value
