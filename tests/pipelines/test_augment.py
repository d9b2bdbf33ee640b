from typing import Any

import numpy as np
import pytest
from scipy import stats
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from dalikd.pipelines.augment import Draws, DrawSpec, View, policy_name, policy_table
from dalikd.pipelines.sampler import Microbatch, Sampler

CIFAR_VIEW = View(32, "pad_crop")
PHOTO_VIEW = View(224, "random_resized_crop")


def _micro(rows: np.ndarray, epoch: int = 0, start: int = 0) -> Microbatch:
    return Microbatch(0, epoch, start, rows, len(rows), len(rows))


def _all_draws(spec: DrawSpec, size: int, batch_size: int) -> tuple[list[Draws], np.ndarray]:
    """Draws of a whole epoch, and its order."""
    sampler = Sampler(size, batch_size, spec.seed, drop_last=False)
    return [spec.draw(sampler[index]) for index in range(len(sampler.order(0)[::batch_size]))], sampler.order(0)


def _lam(draws: list[Draws], run: int = 0) -> np.ndarray:
    return np.concatenate([draw.mix[run].lam for draw in draws])


# --------------------------------------------------------------------------------------------- base view


def test_base_draws_are_those_of_the_row_wherever_it_stands():
    for view in (CIFAR_VIEW, PHOTO_VIEW):
        spec = DrawSpec(view, 3, "crop_flip", "none", runs=1)
        rows = np.arange(100)[::-1]
        batch = spec.draw(_micro(rows, start=640))
        alone = spec.draw(_micro(np.array([40]), start=12))
        for name in alone.views:
            assert np.array_equal(batch.views[name][59], alone.views[name][0]), name
        assert batch.mix[0].lam[59] == alone.mix[0].lam[0]


def test_crop_positions_and_flips_are_uniform():
    views = DrawSpec(CIFAR_VIEW, 3, "crop_flip").draw(_micro(np.arange(30_000))).views
    for name in ("crop", "augmented_crop"):
        assert views[name].dtype == np.int32
        for axis in (0, 1):
            assert stats.chisquare(np.bincount(views[name][:, axis], minlength=9)).pvalue > 0.001  # 0 to 2 x 4
    for name in ("flip", "augmented_flip"):
        assert stats.binomtest(int(views[name].sum()), 30_000).pvalue > 0.001
    augmented_too = np.corrcoef(np.concatenate([views["crop"], views["augmented_crop"]], axis=1).T)
    assert np.abs(augmented_too - np.eye(4)).max() < 0.03


def test_the_flip_of_a_photo_does_not_depend_on_its_window():
    views = DrawSpec(PHOTO_VIEW, 3).draw(_micro(np.arange(20_000))).views
    columns = np.concatenate([views["tries"].reshape(-1, 20), views["offsets"]], axis=1)
    correlations = np.corrcoef(columns.T, views["flip"])[-1, :-1]
    assert np.abs(correlations).max() < 4.5 * 20_000**-0.5
    assert stats.binomtest(int(views["flip"].sum()), 20_000).pvalue > 0.001


def test_evaluation_draws_nothing():
    draws = DrawSpec(View(224, "center_crop", resize=256), 3).draw(_micro(np.arange(4)))
    assert draws.views == {}
    assert draws.mix == ()


# ------------------------------------------------------------------------------------------------ mixing


def test_lam_is_uniform_for_alpha_1_and_beta_else():
    for alpha in (1.0, 0.2, 5.0):
        spec = DrawSpec(CIFAR_VIEW, 3, runs=2, alpha=alpha)
        draws = spec.draw(_micro(np.arange(5000)))
        for mix in draws.mix:
            assert mix.lam.dtype == np.float32
            assert stats.kstest(mix.lam.astype(float), stats.beta(alpha, alpha).cdf).pvalue > 0.01
        assert abs(np.corrcoef(draws.mix[0].lam, draws.mix[1].lam)[0, 1]) < 0.06


def test_centers_are_uniform_and_below_one():
    centers = DrawSpec(CIFAR_VIEW, 3, runs=1).draw(_micro(np.arange(5000))).mix[0].center
    assert centers.dtype == np.float32
    assert centers.min() >= 0
    assert centers.max() < 1
    for axis in (0, 1):
        assert stats.kstest(centers[:, axis].astype(float), "uniform").pvalue > 0.01


def test_a_center_that_would_round_to_one_stays_below(monkeypatch):
    largest = 1 - 2.0**-32  # the largest number that Philox gives; float32 would make it 1

    def draw_largest(_seed, _epoch, addresses, streams):
        return {stream: np.full((len(addresses), count), largest) for stream, count in streams.items()}

    monkeypatch.setattr("dalikd.pipelines.augment.uniforms", draw_largest)
    draws = DrawSpec(CIFAR_VIEW, 0, "autoaugment", runs=1).draw(_micro(np.arange(3)))
    assert draws.mix[0].center.max() < 1
    assert np.floor(draws.mix[0].center * np.float32(32)).max() == 31
    assert draws.views["crop"].max() == 8


@pytest.mark.parametrize("partner", ["permutation", "derangement"])
def test_partners_are_a_permutation_of_each_group(partner):
    spec = DrawSpec(CIFAR_VIEW, 3, partner=partner, runs=3, mix_group=16)
    mixes = spec.draw(_micro(np.arange(1000, 1048), start=160)).mix
    own = 0
    for mix in mixes:
        assert mix.partner.dtype == np.int64
        for start in (0, 16, 32):
            assert np.array_equal(np.sort(mix.partner[start : start + 16]), np.arange(start, start + 16))
        own += (mix.partner == np.arange(48)).sum()
    assert (own == 0) == (partner == "derangement")
    assert not np.array_equal(mixes[0].partner, mixes[1].partner)


def test_without_partners_everyone_is_their_own():
    mix = DrawSpec(CIFAR_VIEW, 3, runs=1).draw(_micro(np.arange(70))).mix[0]
    assert np.array_equal(mix.partner, np.arange(70))


@pytest.mark.parametrize("size", [64 + 1, 64 + 2, 64 + 7, 40, 1])
def test_a_partial_last_group_mixes_within_itself(size):
    spec = DrawSpec(CIFAR_VIEW, 3, partner="derangement", runs=1)
    partner = spec.draw(_micro(np.arange(size), start=128)).mix[0].partner
    whole = size // 64 * 64
    assert np.array_equal(np.sort(partner[:whole]), np.arange(whole))
    assert np.array_equal(np.sort(partner[whole:]), np.arange(whole, size))
    assert (partner != np.arange(size))[: size if size - whole > 1 else whole].all()


# ------------------------------------------------------------------------------- per_sample and per_batch


@pytest.mark.parametrize("augmented", ["crop_flip", "autoaugment"])
def test_per_batch_gives_one_draw_to_each_group_for_every_batch_size(augmented):
    spec = DrawSpec(CIFAR_VIEW, 3, augmented, "derangement", runs=2, alpha=0.3, mode="per_batch")
    base_names = {"crop", "flip"}
    expected = None
    for batch_size in (64, 128, 512):
        draws, order = _all_draws(spec, 1000, batch_size)
        names = set(draws[0].views) - base_names
        assert names
        arrays = {name: np.concatenate([draw.views[name] for draw in draws]) for name in names}
        for run in (0, 1):
            arrays[f"lam{run}"] = _lam(draws, run)
            arrays[f"center{run}"] = np.concatenate([draw.mix[run].center for draw in draws])
            partners = [draw.mix[run].partner + batch_size * index for index, draw in enumerate(draws)]
            arrays[f"partner{run}"] = order[np.concatenate(partners)]
        for name, array in arrays.items():
            assert len(array) == 1000
            for start in range(0, 1000, 64):  # the last group has 40
                if not name.startswith("partner"):
                    assert (array[start : start + 64] == array[start]).all(), name
        assert len(np.unique(arrays["lam0"])) == 16  # and each group its own
        expected = expected or arrays
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


def test_per_batch_leaves_the_base_view_per_sample():
    views = DrawSpec(CIFAR_VIEW, 3, "crop_flip", mode="per_batch").draw(_micro(np.arange(64))).views
    assert len(np.unique(views["augmented_crop"], axis=0)) == 1
    assert len(np.unique(views["crop"], axis=0)) > 20


def test_per_batch_groups_draw_anew_each_epoch():
    spec = DrawSpec(CIFAR_VIEW, 3, runs=1, mode="per_batch")
    first, second = (spec.draw(_micro(np.arange(64), epoch)).mix[0].lam[0] for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_both_modes_have_the_same_marginal_distribution(alpha):
    per_sample = DrawSpec(CIFAR_VIEW, 3, runs=1, alpha=alpha)
    per_batch = DrawSpec(CIFAR_VIEW, 3, runs=1, alpha=alpha, mode="per_batch")
    one_a_group = np.concatenate(
        [per_batch.draw(_micro(np.arange(1), start=64 * group)).mix[0].lam for group in range(2000)]
    )
    one_a_sample = per_sample.draw(_micro(np.arange(2000))).mix[0].lam
    assert len(np.unique(one_a_group)) > 1900
    test: Any = stats.ks_2samp(one_a_sample, one_a_group)
    assert test.pvalue > 0.01


# ------------------------------------------------------------------------------------------- autoaugment


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_policy_table_is_torchvisions(name):
    names, table = policy_table(name)
    assert names[0] == "identity"
    assert table.shape == (25, 2, 3)
    published = AutoAugment(AutoAugmentPolicy(name)).policies
    for row, policy in zip(table, published, strict=True):
        for (operation, share, magnitude), step in zip(row, policy, strict=True):
            assert (names[int(operation)], share, magnitude) == (step[0], step[1], step[2] or 0)


def test_policy_follows_the_size():
    assert [policy_name(size) for size in (32, 64, 224)] == ["cifar10", "imagenet", "imagenet"]


def test_policy_draws_follow_the_table():
    """Every sub-policy as often as the others, every operation as often as its probability says."""
    count = 50_000
    views = DrawSpec(CIFAR_VIEW, 3, "autoaugment").draw(_micro(np.arange(count))).views
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
    views = DrawSpec(PHOTO_VIEW, 3, "autoaugment").draw(_micro(np.arange(2000))).views
    _, table = policy_table("imagenet")
    for operation, magnitude in zip(views["operation"], views["magnitude"], strict=True):
        applied = operation > 0
        fits = ((table[:, :, 0] == operation) | ~applied) & (table[:, :, 2] == magnitude)
        assert fits.all(axis=1).any()
