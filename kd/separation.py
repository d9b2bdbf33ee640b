"""When is a ranking by T. stddev settled? A paired test over the windows that all augmentations have in common.

Augmentations that were measured in one pass saw the same originals window by window, so that most of what moves one
T. stddev from stream to stream moves the others with it. The error of a difference is then far below the errors of the
two values, and that of a difference is what a ranking needs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from dalikd.kd.goodness import FEWEST_GROUPS, Jackknife, TeacherStddev

__all__ = ["PairSeparation", "Separation", "check_alpha", "separation", "windows_at"]

_ROUNDING = 1e-6  # of the value: below it lies what float32 makes of equal images in other batches


@dataclass(frozen=True)
class PairSeparation:
    """Two neighbours of a ranking, the better (lower) one first."""

    a: str
    b: str
    difference: float  # T. stddev of b minus that of a, not negative
    stderr: float  # of the difference, by the paired jackknife
    t: float  # difference / stderr; 0 for a tie
    p: float  # two-sided, by Student's t
    separated: bool


@dataclass(frozen=True)
class Separation:
    """One look at a ranking."""

    order: tuple[str, ...]  # by T. stddev, lowest first
    pairs: tuple[PairSeparation, ...]  # neighbours in that order
    separated: bool  # all pairs are
    windows: int
    check: int  # which look it was
    alpha: float  # what a pair's p has to be below: the share of this look and of one pair

    @property
    def open(self) -> tuple[tuple[str, str], ...]:
        """The neighbours that are not separated."""
        return tuple((pair.a, pair.b) for pair in self.pairs if not pair.separated)


def separation(metrics: Mapping[str, TeacherStddev], confidence: float = 0.95, check: int = 1) -> Separation:
    """Whether every two neighbours in the ranking by T. stddev are told apart.

    The windows of all metrics are dealt to the same groups, and the jackknife leaves out the same group in both of a
    pair; its standard error of the difference is compared with Student's t at as many degrees of freedom as groups less
    one. The chance of a wrong claim anywhere, in any look, is meant to stay below 1 - confidence: look k may spend the
    share 6 / (pi k)² of it (the shares of endless looks add up to 1), and each of the n - 1 pairs the same part of that
    (Bonferroni). That neighbours are picked by the values themselves only brings them closer. Looks have to be numbered
    1, 2, 3 … and planned ahead, by `windows_at` for instance. The level is approximate, as the jackknife and the
    t distribution are.

    Augmentations that are the same, or as good as each other, are never told apart but by mistake: set a maximum of
    windows. A difference below a millionth of the value counts as a tie.

    Args:
        metrics: by the augmentation's name; each was fed the same originals in the same order.
        confidence: the chance, at least, that no claim is wrong; between 0 and 1.
        check: which look this is, from 1 on.

    Raises:
        ValueError: fewer than 2 metrics, metrics of different windows or classes, fewer than 4 windows, or confidence
            or check out of range.
    """
    _check(metrics)
    jackknives = {name: metric.jackknife() for name, metric in metrics.items()}
    order = sorted(jackknives, key=lambda name: jackknives[name].whole.item())
    alpha = check_alpha(confidence, check) / (len(order) - 1)
    pairs = tuple(_compare(a, b, jackknives, alpha) for a, b in pairwise(order))
    windows = next(iter(metrics.values())).windows
    return Separation(tuple(order), pairs, all(pair.separated for pair in pairs), windows, check, alpha)


def check_alpha(confidence: float, check: int) -> float:
    """The error that look `check` may spend; over endless looks it adds up to 1 - confidence.

    Raises:
        ValueError: confidence not between 0 and 1, or check below 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
    if check < 1:
        raise ValueError(f"check is {check}: number the looks from 1 on")
    return (1 - confidence) * 6 / (math.pi * check) ** 2


def windows_at(check: int, first: int = 20, growth: float = 1.5) -> int:
    """Windows at which look `check` is due: `first`, then each time `growth` times as many, rounded up.

    Few looks that grow apart cost less error than many: the tenth of them has a hundredth of the first one's share.

    Raises:
        ValueError: check below 1, first below 4 or growth not above 1.
    """
    if check < 1:
        raise ValueError(f"check is {check}: number the looks from 1 on")
    if first < FEWEST_GROUPS:
        raise ValueError(f"first is {first}: a look needs at least {FEWEST_GROUPS} windows")
    if growth <= 1:
        raise ValueError(f"growth is {growth}: give more than 1")
    return math.ceil(first * growth ** (check - 1))


def _compare(a: str, b: str, jackknives: Mapping[str, Jackknife], alpha: float) -> PairSeparation:
    from scipy import stats

    paired = jackknives[b].minus(jackknives[a])
    difference, stderr = paired.whole.item(), paired.stderr()
    if difference <= _ROUNDING * jackknives[b].whole.item():
        return PairSeparation(a, b, difference, stderr, 0.0, 1.0, separated=False)
    t = difference / stderr if stderr else math.inf
    p = 2 * float(stats.t.sf(t, len(paired.counts) - 1))
    return PairSeparation(a, b, difference, stderr, t, p, separated=p < alpha)


def _check(metrics: Mapping[str, TeacherStddev]) -> None:
    if len(metrics) < 2:
        raise ValueError(f"there is nothing to rank among {len(metrics)} augmentations: give at least 2")
    first_name, first = next(iter(metrics.items()))
    for name, metric in metrics.items():
        for what in ("num_classes", "window", "windows", "originals"):
            own, others = getattr(metric, what), getattr(first, what)
            if own != others:
                raise ValueError(f"{what} of {name} is {own}, of {first_name} {others}: feed all the same originals")
