"""The test that settles a ranking: exact values, and its errors and power in simulated streams."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.separation import check_alpha, separation, windows_at

CLASSES = 4
PAIRS = 5  # in a window


def streams(generator: torch.Generator, windows: int, likeness: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Originals, the same for all, and augmented rows: the more they are like the originals the higher T. stddev."""
    originals = torch.randn(windows * PAIRS, CLASSES, generator=generator) * 2
    noise = [torch.randn(originals.shape, generator=generator) * 2 for _ in likeness]
    return [
        (originals, share * originals + math.sqrt(1 - share**2) * other)
        for share, other in zip(likeness, noise, strict=True)
    ]


def measured(parts: list[tuple[Tensor, Tensor]]) -> dict[str, TeacherStddev]:
    metrics = {f"da{index}": TeacherStddev(CLASSES, window=2 * PAIRS) for index in range(len(parts))}
    for metric, part in zip(metrics.values(), parts, strict=True):
        metric.update(*part)
    return metrics


def window_means(part: tuple[Tensor, Tensor]) -> np.ndarray:
    """[windows, C]."""
    probabilities = (torch.softmax(part[0].double(), dim=1) + torch.softmax(part[1].double(), dim=1)) / 2
    return probabilities.reshape(-1, PAIRS, CLASSES).mean(dim=1).numpy()


@pytest.mark.parametrize("windows", [12, 40])  # groups of one window, of two
def test_the_error_is_that_of_leaving_out_the_same_windows_in_both(windows: int):
    parts = streams(torch.Generator().manual_seed(windows), windows, (0.9, 0.2))
    first, second = (window_means(part) for part in parts)
    groups = min(windows, 20)
    kept = [np.arange(windows) % groups != group for group in range(groups)]
    left = np.array([first[k].std(axis=0, ddof=1).mean() - second[k].std(axis=0, ddof=1).mean() for k in kept])
    pair = separation(measured(parts)).pairs[0]
    assert (pair.a, pair.b) == ("da1", "da0")
    assert pair.difference == pytest.approx(first.std(axis=0, ddof=1).mean() - second.std(axis=0, ddof=1).mean())
    assert pair.stderr == pytest.approx(math.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    assert pair.t == pytest.approx(pair.difference / pair.stderr)


def test_the_p_value_is_students_with_one_degree_less_than_groups():
    parts = streams(torch.Generator().manual_seed(3), 5, (0.9, 0.1))  # 4 degrees of freedom
    pair = separation(measured(parts)).pairs[0]
    share = pair.t**2 / (4 + pair.t**2)  # the closed form of its distribution function at 4 degrees
    assert pair.p == pytest.approx(1 - math.sqrt(share) * (1 + (1 - share) / 2), rel=1e-9)


def test_a_ranking_of_clearly_different_augmentations_is_settled():
    parts = streams(torch.Generator().manual_seed(4), 200, (0.5, 1.0, 0.0))
    result = separation(measured(parts))
    assert result.order == ("da2", "da0", "da1")
    assert [(pair.a, pair.b) for pair in result.pairs] == [("da2", "da0"), ("da0", "da1")]
    assert result.separated
    assert all(pair.separated and pair.p < result.alpha and pair.difference > 0 for pair in result.pairs)
    assert result.open == ()
    assert (result.windows, result.check) == (200, 1)
    assert result.alpha == pytest.approx(0.05 * 6 / math.pi**2 / 2)


def test_ties_stay_open():
    parts = streams(torch.Generator().manual_seed(5), 200, (0.0, 1.0))
    originals, augmented = parts[1]
    nearly = originals, augmented * (1 + 1e-8 * torch.rand(augmented.shape, dtype=torch.float64))
    result = separation(measured([*parts, parts[0], nearly]), confidence=0.5)
    assert not result.separated
    assert result.order[:2] == ("da0", "da2")
    assert result.open == (result.order[:2], result.order[2:])
    assert [(pair.t, pair.p, pair.separated) for pair in result.pairs[::2]] == [(0.0, 1.0, False)] * 2
    assert result.pairs[1].separated


def test_looks_share_the_error():
    assert check_alpha(0.95, 1) == pytest.approx(0.05 * 6 / math.pi**2)
    assert check_alpha(0.95, 3) == pytest.approx(check_alpha(0.95, 1) / 9)
    assert sum(check_alpha(0.9, check) for check in range(1, 20001)) == pytest.approx(0.1, abs=1e-5)
    metrics = measured(streams(torch.Generator().manual_seed(6), 30, (0.9, 0.5, 0.1)))
    assert separation(metrics, 0.9, check=4).alpha == pytest.approx(check_alpha(0.9, 4) / 2)


def test_looks_grow_apart():
    assert [windows_at(check) for check in range(1, 7)] == [20, 30, 45, 68, 102, 152]
    assert [windows_at(check, first=4, growth=2) for check in (1, 2, 5)] == [4, 8, 64]


def test_equal_augmentations_are_told_apart_less_often_than_allowed():
    generator = torch.Generator().manual_seed(7)
    wrong = 0
    for _ in range(150):
        parts = streams(generator, windows_at(3), (0.5, 0.5))
        claims = []
        for check in (1, 2, 3):
            rows = slice(windows_at(check) * PAIRS)
            metrics = measured([(originals[rows], augmented[rows]) for originals, augmented in parts])
            claims.append(separation(metrics, confidence=0.8, check=check).separated)
        wrong += any(claims)
    assert 0.05 < wrong / 150 < 0.2  # 0.165 is spent in three looks


def test_few_windows_tell_clear_differences():
    generator = torch.Generator().manual_seed(8)
    parts = [streams(generator, 60, (0.0, 1.0)) for _ in range(40)]
    results = [separation(measured(part)) for part in parts]
    assert all(result.order == ("da0", "da1") for result in results if result.separated)
    assert np.mean([result.separated for result in results]) > 0.9


def test_the_paired_error_is_the_spread_of_differences_and_far_below_the_unpaired():
    generator = torch.Generator().manual_seed(9)
    differences, paired, unpaired = [], [], []
    for _ in range(200):
        metrics = measured(streams(generator, 40, (0.95, 0.9)))
        first, second = (metric.compute() for metric in metrics.values())
        assert first.stddev is not None
        assert second.stddev is not None
        assert first.stderr is not None
        assert second.stderr is not None
        differences.append(first.stddev - second.stddev)
        paired.append(separation(metrics).pairs[0].stderr ** 2)
        unpaired.append(first.stderr**2 + second.stderr**2)
    spread = np.std(differences, ddof=1)
    assert np.sqrt(np.mean(paired)) == pytest.approx(spread, rel=0.15)
    assert np.sqrt(np.mean(unpaired)) > 2 * spread


def test_unusable_metrics_are_refused():
    def metric(windows: int, classes: int = CLASSES, window: int = 4, rest: int = 0) -> TeacherStddev:
        made = TeacherStddev(classes, window)
        made.update(torch.randn(window * windows + rest, classes))
        return made

    with pytest.raises(ValueError, match="nothing to rank among 1"):
        separation({"flip": metric(10)})
    for what, other in [
        ("num_classes of cutout is 3, of flip 4", metric(10, classes=3)),
        ("window of cutout is 8, of flip 4", metric(10, window=8)),
        ("windows of cutout is 9, of flip 10", metric(9)),
        ("originals of cutout is 42, of flip 40", metric(10, rest=2)),
    ]:
        with pytest.raises(ValueError, match=what):
            separation({"flip": metric(10), "cutout": other})
    with pytest.raises(ValueError, match="3 windows are too few"):
        separation({"flip": metric(3), "cutout": metric(3)})
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"confidence is {confidence}"):
            separation({"flip": metric(10), "cutout": metric(10)}, confidence)
    with pytest.raises(ValueError, match="check is 0"):
        separation({"flip": metric(10), "cutout": metric(10)}, check=0)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "check is 0"), ((1, 3), "first is 3"), ((1, 20, 1.0), "growth is 1.0")]
)
def test_unusable_plans_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        windows_at(*arguments)
