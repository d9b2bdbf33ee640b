from typing import Any

import numpy as np
import pytest
from scipy import stats
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide

from dalikd.pipelines.draws import Stream, uniforms
from dalikd.pipelines.policies import (
    BINS,
    RANDOM_OPERATIONS,
    PolicyKind,
    auto_augment_draws,
    operation_names,
    policy_name,
    policy_table,
    rand_augment_draws,
    trivial_augment_draws,
)


def _numbers(stream: Stream, count: int, images: int = 50_000) -> np.ndarray:
    return uniforms(3, 0, np.arange(images), {stream: count})[stream]


# -------------------------------------------------------------------------------------------------- autoaugment


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_policy_table_is_torchvisions(name: Any):
    names, table = policy_table(name)
    assert names[0] == "identity"
    assert table.shape == (25, 2, 3)
    published = AutoAugment(AutoAugmentPolicy(name)).policies
    for row, policy in zip(table, published, strict=True):
        for (operation, share, magnitude), step in zip(row, policy, strict=True):
            assert (names[int(operation)], share, magnitude) == (step[0], step[1], step[2] or 0)


def test_policy_follows_the_size():
    assert [policy_name(size) for size in (32, 64, 224)] == ["cifar10", "imagenet", "imagenet"]
    assert operation_names("autoaugment", 32) == policy_table("cifar10")[0]
    assert operation_names("autoaugment", 64) == policy_table("imagenet")[0]


def test_policy_draws_follow_the_table():
    """Every sub-policy as often as the others, every operation as often as its probability says."""
    views = auto_augment_draws(_numbers(Stream.POLICY, 5), "cifar10")
    count = len(views["operation"])
    names, table = policy_table("cifar10")
    assert views["operation"].shape == views["magnitude"].shape == views["sign"].shape == (count, 2)
    for step in (0, 1):
        expected = np.zeros(len(names))
        np.add.at(expected, table[:, step, 0].astype(int), table[:, step, 1] / 25)
        expected[0] = 1 - expected.sum()
        found = np.bincount(views["operation"][:, step], minlength=len(names))
        assert (found[expected == 0] == 0).all()
        possible = expected > 0
        assert stats.chisquare(found[possible], expected[possible] * count).pvalue > 0.001
        assert stats.binomtest(int(views["sign"][:, step].sum()), count).pvalue > 0.001
    assert abs(np.corrcoef(views["sign"].T)[0, 1]) < 0.02


def test_policy_draws_are_pairs_of_the_table():
    views = auto_augment_draws(_numbers(Stream.POLICY, 5, 2000), "imagenet")
    _, table = policy_table("imagenet")
    for operation, magnitude in zip(views["operation"], views["magnitude"], strict=True):
        applied = operation > 0
        fits = ((table[:, :, 0] == operation) | ~applied) & (table[:, :, 2] == magnitude)
        assert fits.all(axis=1).any()


# ------------------------------------------------------------------------------- randaugment and trivialaugment


def test_random_operations_are_torchvisions():
    """Names, and how many magnitudes each has; what they do to pixels is tested with the graphs."""
    rand, trivial = RandAugment(), TrivialAugmentWide()
    spaces: dict[PolicyKind, Any] = {
        "randaugment": rand._augmentation_space(rand.num_magnitude_bins, (32, 32)),
        "trivialaugment": trivial._augmentation_space(trivial.num_magnitude_bins),
    }
    for kind, space in spaces.items():
        assert list(space) == ["Identity", *RANDOM_OPERATIONS[1:]]
        assert {len(magnitudes) for magnitudes, _ in space.values() if magnitudes.ndim} == {BINS[kind]}
        assert operation_names(kind, 32) == operation_names(kind, 224) == list(RANDOM_OPERATIONS)
    assert (rand.num_ops, rand.magnitude) == (2, 9)  # the defaults here, too


def test_randaugment_draws_each_operation_as_often_as_the_others():
    draws = rand_augment_draws(_numbers(Stream.RANDAUGMENT, 6), 9)
    assert {array.dtype for array in draws.values()} == {np.dtype(np.int32)}
    assert {array.shape for array in draws.values()} == {(50_000, 3)}
    assert (draws["magnitude"] == 9).all()
    for step in range(3):
        assert stats.chisquare(np.bincount(draws["operation"][:, step], minlength=14)).pvalue > 0.001
        assert stats.binomtest(int(draws["sign"][:, step].sum()), 50_000).pvalue > 0.001
    pairs = np.bincount(draws["operation"][:, 0] * 14 + draws["operation"][:, 1], minlength=196)
    assert stats.chisquare(pairs).pvalue > 0.001  # steps are independent
    signs = stats.chi2_contingency([np.bincount(draws["sign"][draws["operation"][:, 0] == op, 0]) for op in range(14)])
    assert signs.pvalue > 0.001  # type: ignore[attr-defined]


def test_further_operations_leave_the_first_ones_as_they_are():
    numbers = _numbers(Stream.RANDAUGMENT, 8, 100)
    two, four = rand_augment_draws(numbers[:, :4], 9), rand_augment_draws(numbers, 9)
    for name in two:
        assert np.array_equal(two[name], four[name][:, :2])


def test_trivialaugment_draws_operations_magnitudes_and_signs_evenly():
    draws = trivial_augment_draws(_numbers(Stream.TRIVIALAUGMENT, 3))
    assert {array.dtype for array in draws.values()} == {np.dtype(np.int32)}
    assert {array.shape for array in draws.values()} == {(50_000, 1)}
    operation, magnitude, sign = (draws[name][:, 0] for name in ("operation", "magnitude", "sign"))
    both = np.bincount(operation * 31 + magnitude, minlength=14 * 31)
    assert len(both) == 14 * 31
    assert stats.chisquare(both).pvalue > 0.001
    assert stats.binomtest(int(sign.sum()), 50_000).pvalue > 0.001
    assert abs(np.corrcoef(magnitude, sign)[0, 1]) < 0.02
