"""Choosing the most informative of several augmented candidates (CutMixPick).

Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909.
A criterion is a function from outputs on the candidates to one score a candidate, the higher the better; `pick` and
`pick_rows` know nothing of where scores come from. Teacher and student entropy are both `entropy`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import full_precision

__all__ = ["entropy", "pick", "pick_rows"]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) at temperature 1, in nats.

    Args:
        logits: [B, C].

    Returns:
        [B] in float32 (float64 stays). A probability of 0 contributes 0: finite logits never give NaN.
    """
    log_probabilities = functional.log_softmax(full_precision(logits), dim=1)
    lowest = torch.finfo(log_probabilities.dtype).min  # instead of the -inf of a masked class, since 0 * inf is NaN
    return -(log_probabilities.exp() * log_probabilities.clamp(min=lowest)).sum(dim=1)


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


def pick_rows(scores: Tensor, group: int) -> Tensor:
    """Keep as many candidates as there are originals, group by group.

    Each of `runs` augmentation runs made one candidate of each of B originals. The originals form groups of `group`
    consecutive columns, the last possibly shorter; a group of w columns keeps the w best of its runs * w candidates.

    Args:
        scores: [runs, B].
        group: originals in a group.

    Returns:
        int64 [B], indices into the flattened [runs * B] pool: groups in order, and inside a group the order of the pool
        (all columns of run 0 first).

    Raises:
        ValueError: scores empty or not of two dimensions, or group below 1.
    """
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"scores have shape {tuple(scores.shape)}: give [runs, batch], neither of them 0")
    if group < 1:
        raise ValueError(f"group is {group}: give at least 1")
    batch = scores.shape[1]
    whole = batch // group * group
    blocks = [(0, whole, group), (whole, batch, batch - whole)]  # (first column, past the last, columns in a group)
    picks = [_pick_block(scores, *block) for block in blocks if block[0] < block[1]]
    return torch.cat(picks)


def _pick_block(scores: Tensor, first: int, last: int, group: int) -> Tensor:
    """Pick in columns first .. last, a whole number of groups; indices as in `pick_rows`."""
    runs, batch = scores.shape
    groups = (last - first) // group
    pools = scores[:, first:last].reshape(runs, groups, group).transpose(0, 1)  # [groups, runs, group]
    picked = pick(pools.flatten(), group, groups)
    run = picked // group % runs
    column = first + picked // (runs * group) * group + picked % group
    return run * batch + column
