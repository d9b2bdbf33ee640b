import json
import math
import random
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from dalikd.trainers.study.gains import choose_reference, compare, gains, holm, regression, shapley

NOISE = {3: 0.004, 4: -0.01, 5: 0.02}  # of a seed, equal in all its runs
BASE = ("kd", "identity", 1.0)


def _steps(method: str, augmentation: str, factor: float, seed: int) -> float:
    """AT adds 2 points, cutmix 3, length 1; AT and cutmix together lose 1, all three gain 6; twice as much each with
    every further seed."""
    changed = (method == "at", augmentation == "cutmix", factor == 2.0)
    added = 2 * changed[0] + 3 * changed[1] + changed[2] - (changed[0] and changed[1]) + 6 * all(changed)
    return 0.5 + NOISE[seed] + 0.01 * added * 2 ** (seed - 3)


def _cell(pair, *wanted):
    return next(
        cell for cell in pair["cells"] if (cell["method"], cell["augmentation"], cell["epoch_factor"]) == wanted
    )


def _mean_and_error(*values):
    stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": pytest.approx(np.mean(values)), "stderr": pytest.approx(stderr)}


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_shares_by_hand():
    none, left, right = frozenset[str](), frozenset(["left"]), frozenset(["right"])
    shares = shapley({none: 1.0, left: 3.0, right: 4.0, left | right: 10.0})
    assert shares == {"left": 4.0, "right": 5.0}  # 2 and 3 alone, and half each of the 4 that arise together


def test_shares_are_those_of_the_formula_over_sets():
    """Shapley's sum over the sets without a factor, each weighted with the share of orders that begin with it."""
    factors, draw = ("method", "augmentation", "length"), random.Random(0)
    sets = [frozenset(chosen) for count in range(4) for chosen in combinations(factors, count)]
    values = {chosen: draw.random() for chosen in sets}
    shares = shapley(values)
    for factor in factors:
        weights = {s: math.factorial(len(s)) * math.factorial(2 - len(s)) / 6 for s in sets if factor not in s}
        expected = sum(weight * (values[s | {factor}] - values[s]) for s, weight in weights.items())
        assert shares[factor] == pytest.approx(expected, abs=1e-14)
    assert sum(shares.values()) == pytest.approx(values[frozenset(factors)] - values[frozenset()], abs=1e-14)


def test_paired_differences_are_compared_as_scipy_does():
    left, right = [0.71, 0.74, 0.705, 0.73], [0.70, 0.72, 0.71, 0.70]
    found = compare([a - b for a, b in zip(left, right, strict=True)], 0.9)
    expected = stats.ttest_rel(left, right)
    low, high = expected.confidence_interval(0.9)
    assert found == {
        **{"mean": pytest.approx(0.01375), "stderr": pytest.approx(0.01375 / expected.statistic)},
        **{"low": pytest.approx(low), "high": pytest.approx(high), "p": pytest.approx(expected.pvalue)},
    }


@pytest.mark.parametrize(
    ("differences", "center", "stderr"),
    [([], None, None), ([0.1], 0.1, None), ([0.3 - 0.2, 0.4 - 0.3], pytest.approx(0.1), pytest.approx(0, abs=1e-15))],
)
def test_differences_without_spread_tell_nothing_apart(differences, center, stderr):
    assert compare(differences) == {"mean": center, "stderr": stderr, "low": None, "high": None, "p": None}


def test_p_values_are_corrected_by_holm():
    assert holm([0.04, None, 0.01, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_regression_on_one_group_is_a_straight_line():
    x, y = [0.01, 0.02, 0.04, 0.05], [0.7, 0.72, 0.69, 0.66]
    line = stats.linregress(x, y)
    assert regression(x, y, ["a"] * 4) == {
        **{"slope": pytest.approx(line.slope), "stderr": pytest.approx(line.stderr), "n": 4},
        **{"partial": pytest.approx(line.rvalue), "p": pytest.approx(line.pvalue)},
    }


def test_regression_with_a_group_each_is_least_squares_with_their_columns():
    draw = random.Random(1)
    x, y = [draw.random() for _ in range(9)], [draw.random() for _ in range(9)]
    groups = ["a", "b", "c"] * 3
    columns = np.array([[value, *(group == name for name in "abc")] for value, group in zip(x, groups, strict=True)])
    weights, (left,), *_ = np.linalg.lstsq(columns, np.array(y), rcond=None)
    stderr = math.sqrt(left / 5 * np.linalg.inv(columns.T @ columns)[0, 0])
    off = [np.array(v) - columns[:, 1:] @ np.linalg.lstsq(columns[:, 1:], np.array(v), rcond=None)[0] for v in (x, y)]
    found = regression(x, y, groups)
    assert (found["slope"], found["stderr"]) == (pytest.approx(weights[0]), pytest.approx(stderr))
    assert found["partial"] == pytest.approx(np.corrcoef(*off)[0, 1])
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(weights[0]) / stderr, 5))


def test_regression_says_what_the_points_are_too_few_or_too_equal_for():
    nothing = {"slope": None, "stderr": None, "partial": None, "p": None}
    assert regression([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "aaa") == {**nothing, "n": 3}
    assert regression([1.0, 2.0], [1.0, 3.0], "aa") == {**nothing, "slope": 2.0, "n": 2}
    assert regression([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], "aaa") == {**nothing, "slope": 0.0, "n": 3}


# ------------------------------------------------------------------------------------------------------------ gains


def test_gains_are_split_seed_by_seed(groups):
    (pair,) = gains(groups(_steps))
    assert pair["reference"] == {
        **{"method": "kd", "augmentation": "identity", "epoch_factor": 1.0},
        "top1": {**_mean_and_error(0.504, 0.49), "seeds": 2},
    }
    assert pair["factors"] == ["method", "augmentation", "length"]
    whole = _cell(pair, "at", "cutmix", 2.0)
    assert whole["gain"] == _mean_and_error(0.11, 0.22)  # the seeds' own noise falls out
    assert whole["shares"] == {  # half of -1 to each of two, a third of 6 to each
        "method": _mean_and_error(0.035, 0.07),
        "augmentation": _mean_and_error(0.045, 0.09),
        "length": _mean_and_error(0.03, 0.06),
    }
    assert whole["top1"] == {**_mean_and_error(0.614, 0.71), "seeds": 2}
    two = _cell(pair, "at", "cutmix", 1.0)
    assert two["shares"]["augmentation"] == _mean_and_error(0.025, 0.05)
    assert two["shares"]["length"] == {"mean": 0.0, "stderr": 0.0}
    json.dumps(pair, allow_nan=False)


def test_the_methods_shares_are_means_over_the_cells_that_change_the_factor(groups):
    (pair,) = gains(groups(_steps))
    at, kd = pair["methods"]
    assert (at["method"], kd["method"]) == ("at", "kd")
    # of the seed 3: 2 with identity at both lengths, 1.5 with cutmix, 3.5 with both
    assert at["shares"]["method"] == {**_mean_and_error(0.0225, 0.045), "cells": 4, "seeds": 2}
    assert at["shares"]["length"] == {**_mean_and_error(0.02, 0.04), "cells": 2, "seeds": 2}
    assert kd["shares"]["augmentation"] == {**_mean_and_error(0.03, 0.06), "cells": 2, "seeds": 2}
    assert kd["shares"]["method"] == {"mean": None, "stderr": None, "cells": 0, "seeds": 0}


def test_methods_are_compared_at_the_same_augmentation_and_length(groups):
    values = {"kd": (0.1, 0.2, 0.3), "a": (0.2, 0.301, 0.4), "b": (0.11, 0.23, 0.31), "c": (0.3, 0.1, 0.3)}
    made = groups(lambda *run: values[run[0]][run[3]], tuple(values), ("mixup",), (1.0,), (0, 1, 2))
    (pair,) = gains(made)
    assert (pair["factors"], pair["reference"]["augmentation"]) == (["method"], "mixup")
    found = {cell["method"]: cell["beside"] for cell in pair["cells"]}
    assert found["kd"] is None
    p_values = {name: stats.ttest_rel(values[name], values["kd"]).pvalue for name in "abc"}
    assert {name: found[name]["p"] for name in "abc"} == pytest.approx(p_values)
    assert found["a"]["p_holm"] == pytest.approx(3 * p_values["a"])
    assert [found[name]["told_apart"] for name in "abc"] == [True, False, False]
    (ranking,) = pair["rankings"]
    assert ranking["methods"] == ["a", "c", "b", "kd"]
    assert ranking["not_told_apart"] == [["a", "c"], ["c", "b"], ["b", "kd"]]
    assert not any((cell["beside"] or {}).get("told_apart") for cell in gains(made, confidence=0.99999)[0]["cells"])


def test_neighbours_that_are_told_apart_are_not_listed(groups):
    values = {"kd": (0.1, 0.2, 0.3), "a": (0.2, 0.301, 0.4)}
    made = groups(lambda *run: values[run[0]][run[3]], tuple(values), ("mixup",), (1.0,), (0, 1, 2))
    assert gains(made)[0]["rankings"] == [
        {"augmentation": "mixup", "epoch_factor": 1.0, "methods": ["a", "kd"], "not_told_apart": []}
    ]


def test_seeds_whose_runs_are_not_all_there_do_not_count(groups):
    gaps = {("kd", "cutmix", 1.0, 4), *(("at", "identity", 2.0, seed) for seed in NOISE)}
    made = groups(lambda *run: None if run in gaps else _steps(*run), seeds=(3, 4, 5))
    (pair,) = gains(made)
    there = _cell(pair, "at", "cutmix", 1.0)
    assert (there["seeds"], there["top1"]["seeds"], there["beside"]["seeds"]) == (2, 3, 2)
    assert there["gain"] == _mean_and_error(0.04, 0.16)
    gone = _cell(pair, "at", "cutmix", 2.0)
    assert (gone["seeds"], gone["gain"], gone["beside"]["seeds"]) == (0, {"mean": None, "stderr": None}, 3)
    assert _cell(pair, "at", "identity", 2.0)["top1"] == {"mean": None, "stderr": None, "seeds": 0}
    assert pair["methods"][0]["shares"]["length"]["cells"] == 0
    assert pair["methods"][1]["shares"]["augmentation"] == {**_mean_and_error(0.03, 0.12), "cells": 2, "seeds": 2}
    assert all(ranking["methods"] == ["kd"] for ranking in pair["rankings"] if _setting(ranking) == ("identity", 2.0))
    json.dumps(pair, allow_nan=False)
    nothing = gains(groups(lambda *_: None))[0]
    assert (nothing["seeds"], nothing["reference"]["top1"]["mean"]) == (0, None)


def _setting(ranking):
    return ranking["augmentation"], ranking["epoch_factor"]


def test_one_seed_has_no_errors_and_one_level_no_factor(groups):
    (pair,) = gains(groups(_steps, factors=(2.0,), seeds=(3,)))
    assert (pair["factors"], pair["seeds"]) == (["method", "augmentation"], 1)
    cell = _cell(pair, "at", "cutmix", 2.0)
    assert cell["gain"] == {"mean": pytest.approx(0.10), "stderr": None}
    assert (cell["beside"]["p_holm"], cell["beside"]["told_apart"]) == (None, False)
    assert pair["rankings"][0]["not_told_apart"] == [["at", "kd"]]
    (alone,) = gains(groups(_steps, methods=("at",)))
    assert alone["factors"] == ["augmentation", "length"]
    assert {cell["beside"] for cell in alone["cells"]} == {None}


def test_each_pair_has_its_own(groups):
    both = [*groups(_steps), *groups(lambda *run: 2 * _steps(*run), student="wrn")]
    first, second = gains(both)
    assert (first["student"], second["student"]) == ("vgg8", "wrn")
    for cell, twice in zip(first["cells"], second["cells"], strict=True):
        assert twice["gain"]["mean"] == pytest.approx(2 * cell["gain"]["mean"])


def test_another_reference_can_be_named(groups):
    (pair,) = gains(groups(_steps), "at")
    assert pair["reference"]["method"] == "at"
    assert _cell(pair, "kd", "identity", 1.0)["gain"] == _mean_and_error(-0.02, -0.04)


@pytest.mark.parametrize(
    ("reference", "methods", "message"),
    [
        (None, ["at", "crd"], "no method 'kd' to compare with: name one with --reference, of at, crd"),
        ("dkd", ["at"], "no method 'dkd' to compare with: name one with --reference, of at"),
        ("kd", [], "reference: the study has no method 'kd' to compare with: leave it out"),
    ],
)
def test_a_reference_that_is_not_there_is_named(reference, methods, message):
    with pytest.raises(ValueError, match=message):
        choose_reference(reference, methods)


def test_the_only_method_is_the_reference(groups):
    assert choose_reference(None, ["at"]) == "at"
    assert choose_reference(None, ["at", "kd"]) == "kd"
    with pytest.raises(ValueError, match=r"confidence is 95: give a share"):
        gains(groups(_steps), confidence=95)


# --------------------------------------------------------------------------------------------------------- T. stddev


def test_gains_are_regressed_on_t_stddev(groups):
    stddev = {"identity": 0.03, "cutmix": 0.02, "mixup": 0.025, "cutout": 0.04}
    values = {(m, a, f): random.Random(f"{m}{a}{f}").random() for m, a, f in product(("at", "kd"), stddev, (1.0, 2.0))}
    made = groups(lambda m, a, f, _: values[m, a, f], augmentations=tuple(stddev), stddev=stddev)
    rows = {row.pop("method"): row for row in gains(made)[0]["regression"]["rows"]}
    points = [(stddev[cell[1]], value, cell[::2]) for cell, value in values.items()]
    assert rows["*all*"] == pytest.approx(regression(*zip(*points, strict=True)))
    assert rows["at"] == pytest.approx(regression(*zip(*(p for p in points if p[2][0] == "at"), strict=True)))
    means = [np.mean([value for cell, value in values.items() if cell[1] == name]) for name in stddev]
    assert rows["*averaged*"] == pytest.approx(regression(list(stddev.values()), means, "aaaa"))
    assert [row["n"] for row in rows.values()] == [8, 8, 16, 4]


def test_a_regression_takes_three_augmentations_with_t_stddev(groups):
    assert gains(groups(_steps))[0]["regression"] is None
    few = groups(_steps, stddev={"identity": 0.03, "cutmix": 0.02})
    assert gains(few)[0]["regression"] == {"augmentations": 2, "rows": []}
    stddev = {"identity": 0.03, "cutmix": 0.02, "mixup": 0.01}
    one = groups(_steps, ("kd",), tuple(stddev), (1.0,), stddev=stddev)
    assert [row["method"] for row in gains(one)[0]["regression"]["rows"]] == ["kd"]
