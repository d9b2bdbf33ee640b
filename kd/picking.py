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
    # the lowest number instead of the -inf of a masked class, since 0 * inf is NaN
    log_probabilities = functional.log_softmax(full_precision(logits), dim=1).nan_to_num(nan=math.nan)
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
    teacher, student = (
        functional.log_softmax(full_precision(logits) / temperature, dim=1).nan_to_num(nan=math.nan)
        for logits in (teacher_logits, student_logits)
    )
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
    nearest = []
    for first, last, width in _blocks(batch, group):
        own = originals[first:last].unflatten(0, (-1, width))  # [groups, width, C]
        pool = pools[:, first:last].unflatten(1, (-1, width)).transpose(0, 1).flatten(1, 2)  # [groups, runs * width, C]
        distances = torch.cdist(pool, own, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=2).square()
        nearest.append(distances.unflatten(1, (-1, width)).transpose(0, 1).flatten(1))
    return torch.cat(nearest, dim=1).flatten()


# ------------------------------------------------------------------------------------------------------ criteria


class PoolOutputs(NamedTuple):
    """What a criterion may look at: tensors; what it does not need may be None."""

    teacher: Any  # [runs * B, C], on the candidates
    student: Any  # [runs * B, C], on the candidates
    originals: Any  # [B, C], the teacher's, on the originals


class Criterion(NamedTuple):
    """How candidates are ranked: the highest scores are kept."""

    score: Callable[[PoolOutputs, int], Tensor]  # of the outputs, with so many originals a mix group; -> [runs * B]
    needs_teacher: bool
    needs_student: bool


TEACHER_ENTROPY = Criterion(lambda outputs, _: entropy(outputs.teacher), needs_teacher=True, needs_student=False)
STUDENT_ENTROPY = Criterion(lambda outputs, _: entropy(outputs.student), needs_teacher=False, needs_student=True)
DISSIMILARITY = Criterion(
    lambda outputs, group: dissimilarity(outputs.teacher, outputs.originals, group),
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

    return Criterion(
        lambda outputs, _: kl_divergence(outputs.teacher, outputs.student, temperature),
        needs_teacher=True,
        needs_student=True,
    )


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


def pick_rows(scores: Tensor, group: int, n_pick: int | None = None) -> Tensor:
    """Keep the best candidates of each mix group: as many as it has originals, or another number.

    Each of `runs` augmentation runs made one candidate of each of B originals. The originals form groups of `group`
    consecutive columns, the last possibly shorter; a group of w columns keeps `n_pick * w / group`, rounded up, of its
    runs * w candidates.

    Args:
        scores: [runs, B].
        group: originals in a group.
        n_pick: candidates that a whole group keeps; default: as many as it has originals.

    Returns:
        int64 [pick_count(B, group, n_pick)], indices into the flattened [runs * B] pool: groups in order, and inside a
        group the order of the pool (all columns of run 0 first).

    Raises:
        ValueError: scores empty or not of two dimensions, group below 1, or n_pick outside 1 .. runs * group.
    """
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"scores have shape {tuple(scores.shape)}: give [runs, batch], neither of them 0")
    n_pick = group if n_pick is None else n_pick
    (runs, batch), blocks, picks = scores.shape, _blocks(scores.shape[1], group), []
    if not 1 <= n_pick <= runs * group:
        raise ValueError(
            f"--mix.n_pick {n_pick} of a pool of {runs * group}: give 1 to {runs * group}, or a larger pool "
            f"(--mix.n_run {runs} x --mix.group {group})"
        )
    for first, last, width in blocks:
        pools = scores[:, first:last].unflatten(1, (-1, width)).transpose(0, 1)  # [groups, runs, width]
        picked = pick(pools.flatten(), -(-n_pick * width // group), len(pools))  # a shorter group's share, rounded up
        column = first + picked // (runs * width) * width + picked % width
        picks.append(picked // width % runs * batch + column)
    return torch.cat(picks)


def pick_count(batch: int, group: int, n_pick: int | None = None) -> int:
    """How many candidates `pick_rows` keeps of a batch of originals; arguments as there."""
    n_pick = group if n_pick is None else n_pick
    return sum((last - first) // width * -(-n_pick * width // group) for first, last, width in _blocks(batch, group))


def _blocks(batch: int, group: int) -> list[tuple[int, int, int]]:
    """First column, past the last, and columns in a group: of the whole groups, and of a shorter last one."""
    if group < 1:
        raise ValueError(f"group is {group}: give at least 1")
    whole = batch // group * group
    blocks = [(0, whole, group), (whole, batch, batch - whole)]
    return [block for block in blocks if block[0] < block[1]]
