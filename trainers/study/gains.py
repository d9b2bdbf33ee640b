"""Where the gains of a study come from: of each student's gain over plain distillation, the shares of method,
augmentation and length of training.

A share is a Shapley value (Shapley, "A Value for n-Person Games", 1953): what changing one thing adds, averaged over
all orders in which the three can be changed, so that no order is preferred and the shares sum to the gain.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, combinations, pairwise, permutations
from statistics import mean, stdev
from typing import Any

from dalikd.kd.correlation import FEWEST_POINTS

__all__ = ["FACTORS", "choose_reference", "compare", "gains", "holm", "regression", "shapley"]

#: what a student's gain is split over, in the order of a cell's parts
FACTORS = ("method", "augmentation", "length")

_EQUAL = 1e-12  # differences of accuracies that spread less are equal but for rounding

_Cell = tuple[str, str, float]  # method, augmentation, epoch_factor
_Top1 = Mapping[_Cell, Mapping[int, float]]  # of each seed that is done
_Shares = Mapping[int, Mapping[str, float]]  # of each seed whose runs are all done


def gains(
    groups: Sequence[Mapping[str, Any]], reference: str | None = None, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Split each cell's gain in top1 of the last epoch over the reference method, with the reference augmentation
    (identity, or the first) and the shortest length.

    Args:
        groups: of a study, as `collect` gives them.
        reference: the method that the others are compared with; None: kd, or the only one that there is.
        confidence: of intervals and of what is told apart.

    Returns:
        of each pair: the "reference", the "factors" that have several levels, the "cells" with their gains, "methods"
        with each share's mean over the cells that it is changed in, "rankings" and the "regression" on T. stddev. All
        figures are shares of 1, paired by seed; "stderr" is over the seeds, None where there is one.

    Raises:
        ValueError: the reference is no method of the study, or the confidence lies not between 0 and 1.
    """
    chosen = choose_reference(reference, dict.fromkeys(group["method"] for group in groups))
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
    pairs = dict.fromkeys((group["teacher"], group["student"]) for group in groups)
    return [
        _of_pair([group for group in groups if (group["teacher"], group["student"]) == pair], chosen, confidence)
        for pair in pairs
    ]


def choose_reference(reference: str | None, methods: Collection[str]) -> str:
    """The method that the others are compared with: the one named, or kd, or the only one that there is.

    Raises:
        ValueError: the study has no such method.
    """
    name = next(iter(methods)) if reference is None and len(methods) == 1 else reference or "kd"
    if name not in methods:
        fix = f"name one with --reference, of {', '.join(methods)}" if methods else "leave it out"
        raise ValueError(f"reference: the study has no method {name!r} to compare with: {fix}")
    return name


def shapley(values: Mapping[frozenset[str], float]) -> dict[str, float]:
    """What each factor adds, averaged over all orders in which they can be changed.

    Args:
        values: of every set of changed factors, the empty one too.

    Returns:
        the shares, which sum to the value of all factors less that of none.
    """
    orders = list(permutations(sorted(max(values, key=len))))
    shares = dict.fromkeys(orders[0], 0.0)
    for order in orders:
        for number, factor in enumerate(order, start=1):
            shares[factor] += values[frozenset(order[:number])] - values[frozenset(order[: number - 1])]
    return {factor: share / len(orders) for factor, share in shares.items()}


def compare(differences: Sequence[float], confidence: float = 0.95) -> dict[str, float | None]:
    """Mean of paired differences, its standard error, Student's t interval and two-sided p-value.

    There is no interval and no p-value where the differences do not spread: one alone, or some that are equal, which
    accuracies on few images are now and then by chance.
    """
    from scipy import stats

    found = {**_mean(differences), "low": None, "high": None, "p": None}
    center, stderr, degrees = found["mean"], found["stderr"], len(differences) - 1
    if center is not None and stderr is not None and stderr > _EQUAL:
        half = float(stats.t.ppf((1 + confidence) / 2, degrees)) * stderr
        p_value = 2 * float(stats.t.sf(abs(center) / stderr, degrees))
        found |= {"low": center - half, "high": center + half, "p": p_value}
    return found


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979).

    None stays, and does not count.
    """
    order = sorted((p_value, index) for index, p_value in enumerate(p_values) if p_value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p_value, index) in enumerate(order):
        least = min(1.0, max(least, (len(order) - rank) * p_value))
        corrected[index] = least
    return corrected


def regression(x: Sequence[float], y: Sequence[float], groups: Sequence[Any]) -> dict[str, Any]:
    """Least squares of y on x with an intercept for each group (fixed effects).

    Returns:
        "slope", its "stderr", "partial": the correlation of x and y beside the groups, "n" and the two-sided "p" of
        both; None is what the points are too few or too equal for.
    """
    from scipy import stats

    found: dict[str, Any] = {"slope": None, "stderr": None, "partial": None, "n": len(x), "p": None}
    of_x, of_y = _centered(x, groups), _centered(y, groups)
    xx, yy = (sum(value * value for value in values) for values in (of_x, of_y))
    xy = sum(left * right for left, right in zip(of_x, of_y, strict=True))
    if xx <= _EQUAL**2 * len(x):
        return found
    found["slope"] = xy / xx
    degrees = len(x) - len(set(groups)) - 1
    if yy <= _EQUAL**2 * len(x) or degrees < 1:
        return found
    partial = max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))
    stderr = math.sqrt((1 - partial**2) * yy / xx / degrees)
    t = abs(found["slope"]) / stderr if stderr else math.inf
    return found | {"stderr": stderr, "partial": partial, "p": 2 * float(stats.t.sf(t, degrees))}


def _centered(values: Sequence[float], groups: Sequence[Any]) -> list[float]:
    centers = {
        group: mean(value for value, own in zip(values, groups, strict=True) if own == group) for group in set(groups)
    }
    return [value - centers[group] for value, group in zip(values, groups, strict=True)]


def _mean(values: Iterable[float]) -> dict[str, float | None]:
    values = list(values)
    return {
        "mean": mean(values) if values else None,
        "stderr": stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
    }


# ---------------------------------------------------------------------------------------------------------- one pair


def _of_pair(groups: Sequence[Mapping[str, Any]], reference: str, confidence: float) -> dict[str, Any]:
    top1: _Top1 = {
        (group["method"], row["augmentation"], group["epoch_factor"]): {
            run["seed"]: run["last"]["top1"] for run in row["runs"]
        }
        for group in groups
        for row in group["augmentations"]
    }
    methods, augmentations, lengths = (list(dict.fromkeys(levels)) for levels in zip(*top1, strict=True))
    base = (reference, "identity" if "identity" in augmentations else augmentations[0], min(lengths))
    shares = {cell: _split(top1, cell, base) for cell in top1}
    levels = dict(zip(FACTORS, (methods, augmentations, lengths), strict=True))
    cells = [_cell(top1, cell, shares[cell], reference, confidence) for cell in top1]
    settings = [(augmentation, length) for length in lengths for augmentation in augmentations]
    for setting in settings:
        _correct([one["beside"] for one in cells if _setting(one) == setting and one["beside"]], confidence)
    return {
        **{name: groups[0][name] for name in ("teacher", "student")},
        "reference": {
            **dict(zip(("method", "augmentation", "epoch_factor"), base, strict=True)),
            "top1": _over_seeds(top1[base]),
        },
        "factors": [factor for factor in FACTORS if len(levels[factor]) > 1],
        "seeds": len({seed for runs in top1.values() for seed in runs}),
        "confidence": confidence,
        "cells": cells,
        "methods": [_over_cells(shares, method, base) for method in methods],
        "rankings": [_ranking(top1, setting, confidence) for setting in settings],
        "regression": _on_stddev(groups),
    }


def _split(top1: _Top1, cell: _Cell, base: _Cell) -> _Shares:
    """Of each seed with which all runs between the reference and a cell are done."""
    changed = chain.from_iterable(combinations(FACTORS, count) for count in range(len(FACTORS) + 1))
    corners: dict[frozenset[str], Any] = {
        frozenset(those): tuple(
            own if factor in those else of_base for factor, own, of_base in zip(FACTORS, cell, base, strict=True)
        )
        for those in changed
    }
    seeds = set.intersection(*(set(top1[corner]) for corner in corners.values()))
    return {seed: shapley({those: top1[corner][seed] for those, corner in corners.items()}) for seed in sorted(seeds)}


def _cell(top1: _Top1, cell: _Cell, shares: _Shares, reference: str, confidence: float) -> dict[str, Any]:
    method, augmentation, length = cell
    beside = None
    if method != reference:
        differences = _differences(top1[cell], top1[reference, augmentation, length])
        beside = {**compare(differences, confidence), "seeds": len(differences)}
    return {
        **{"method": method, "augmentation": augmentation, "epoch_factor": length},
        "top1": _over_seeds(top1[cell]),
        "seeds": len(shares),
        "gain": _mean(sum(split.values()) for split in shares.values()),
        "shares": {factor: _mean(split[factor] for split in shares.values()) for factor in FACTORS},
        "beside": beside,
    }


def _over_seeds(runs: Mapping[int, float]) -> dict[str, Any]:
    return {**_mean(runs.values()), "seeds": len(runs)}


def _setting(cell: Mapping[str, Any]) -> tuple[str, float]:
    return cell["augmentation"], cell["epoch_factor"]


def _differences(runs: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    return [runs[seed] - others[seed] for seed in runs if seed in others]


def _correct(compared: Sequence[dict[str, Any]], confidence: float) -> None:
    """Add the p-value corrected for the number of comparisons, and whether it tells the two apart."""
    for one, p_value in zip(compared, holm([one["p"] for one in compared]), strict=True):
        one |= {"p_holm": p_value, "told_apart": p_value is not None and p_value < 1 - confidence}


def _over_cells(shares: Mapping[_Cell, _Shares], method: str, base: _Cell) -> dict[str, Any]:
    """A method's shares, each the mean over the cells in which its factor is changed, paired by seed."""
    found: dict[str, Any] = {}
    for number, factor in enumerate(FACTORS):
        changed = [
            split for cell, split in shares.items() if cell[0] == method and cell[number] != base[number] and split
        ]
        seeds = set.intersection(*map(set, changed)) if changed else set()
        means = [mean(split[seed][factor] for split in changed) for seed in sorted(seeds)]
        found[factor] = {**_mean(means), "cells": len(changed), "seeds": len(seeds)}
    return {"method": method, "shares": found}


def _ranking(top1: _Top1, setting: tuple[str, float], confidence: float) -> dict[str, Any]:
    """Methods at one augmentation and length, the most accurate first, and neighbours that are not told apart."""
    there = {cell[0]: runs for cell, runs in top1.items() if cell[1:] == setting and runs}
    ranked = sorted(there, key=lambda method: -mean(there[method].values()))
    compared = [compare(_differences(there[a], there[b]), confidence) for a, b in pairwise(ranked)]
    _correct(compared, confidence)
    told = zip(pairwise(ranked), compared, strict=True)
    return {
        **{"augmentation": setting[0], "epoch_factor": setting[1], "methods": ranked},
        "not_told_apart": [list(pair) for pair, one in told if not one["told_apart"]],
    }


# -------------------------------------------------------------------------------------------------------- T. stddev


def _on_stddev(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Regression of the cells' gain on their augmentations' T. stddev; None: it was not measured.

    Intercepts of each method and length take up what the gain is counted from: top1 itself gives the same slope.
    """
    cells = [
        ((group["method"], group["epoch_factor"]), row["augmentation"], row["t_stddev"], row["last"]["top1"]["mean"])
        for group in groups
        for row in group["augmentations"]
        if row["t_stddev"] is not None and row["last"] is not None
    ]
    names = {name for _, name, _, _ in cells}
    if len(names) < FEWEST_POINTS:
        return {"augmentations": len(names), "rows": []} if cells else None
    runs, methods = dict.fromkeys(cell[0] for cell in cells), dict.fromkeys(cell[0][0] for cell in cells)
    chosen = {method: [cell for cell in cells if cell[0][0] == method] for method in methods}
    chosen |= {"*all*": cells} if len(methods) > 1 else {}
    whole = [cell for cell in cells if sum(other[0] == cell[0] for other in cells) == len(names)]
    chosen |= {"*averaged*": _averaged(whole)} if len(runs) > 1 and whole else {}
    return {"augmentations": len(names), "rows": [{"method": name, **_fit(those)} for name, those in chosen.items()]}


def _fit(cells: Sequence[tuple[Any, str, float, float]]) -> dict[str, Any]:
    return regression([cell[2] for cell in cells], [cell[3] for cell in cells], [cell[0] for cell in cells])


def _averaged(cells: Sequence[tuple[Any, str, float, float]]) -> list[tuple[Any, str, float, float]]:
    """One point an augmentation: its mean top1 over methods and lengths that have all augmentations."""
    by_name = {name: [cell for cell in cells if cell[1] == name] for name in dict.fromkeys(cell[1] for cell in cells)}
    return [(None, name, own[0][2], mean(cell[3] for cell in own)) for name, own in by_name.items()]
