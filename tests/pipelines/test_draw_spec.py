import zlib
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from scipy import stats

from dalikd.pipelines.draw_spec import AugmentedView, Draws, DrawSpec, MixRun, View, ViewRun
from dalikd.pipelines.draws import Microbatch, Stream, erasing_boxes, uniforms
from dalikd.pipelines.policies import auto_augment_draws, rand_augment_draws, trivial_augment_draws
from dalikd.pipelines.sampler import Sampler

CIFAR_VIEW = View(32, "pad_crop")
PHOTO_VIEW = View(224, "random_resized_crop")
EVERY_VIEW = tuple(map(ViewRun, get_args(AugmentedView)))  # flip, crop_flip, autoaugment, randaugment, trivialaugment
EVERY_MIX = (
    MixRun("permutation"),
    MixRun("derangement", 1, alpha=0.3),
    MixRun("first", 2, cells=6, box=True, layers=3),
)


def _micro(rows: np.ndarray, epoch: int = 0, start: int = 0) -> Microbatch:
    return Microbatch(0, epoch, start, rows, len(rows), len(rows))


def _all_draws(spec: DrawSpec, size: int, batch_size: int) -> tuple[list[Draws], np.ndarray]:
    """Draws of a whole epoch, and its order."""
    sampler = Sampler(size, batch_size, spec.seed, drop_last=False)
    return [spec.draw(sampler[index]) for index in range(len(sampler.order(0)[::batch_size]))], sampler.order(0)


def _mix_parts(draws: list[Draws], run: int) -> dict[str, list[np.ndarray]]:
    names = [name for name, array in draws[0].mix[run]._asdict().items() if array is not None]
    return {name: [getattr(draw.mix[run], name) for draw in draws] for name in names}


def _digest(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"


# --------------------------------------------------------------------------------------------- base view


def test_base_draws_are_those_of_the_row_wherever_it_stands():
    for view in (CIFAR_VIEW, PHOTO_VIEW):
        spec = DrawSpec(view, 3, (ViewRun("crop_flip"),), (MixRun(),))
        rows = np.arange(100)[::-1]
        batch = spec.draw(_micro(rows, start=640))
        alone = spec.draw(_micro(np.array([40]), start=12))
        for name in alone.views:
            assert np.array_equal(batch.views[name][59], alone.views[name][0]), name
        assert batch.mix[0].lam[59] == alone.mix[0].lam[0]


def test_crop_positions_and_flips_are_uniform():
    views = DrawSpec(CIFAR_VIEW, 3, (ViewRun("crop_flip"),)).draw(_micro(np.arange(30_000))).views
    for name in ("crop", "augmented_crop0"):
        assert views[name].dtype == np.int32
        for axis in (0, 1):
            assert stats.chisquare(np.bincount(views[name][:, axis], minlength=9)).pvalue > 0.001  # 0 to 2 x 4
    for name in ("flip", "augmented_flip0"):
        assert stats.binomtest(int(views[name].sum()), 30_000).pvalue > 0.001
    augmented_too = np.corrcoef(np.concatenate([views["crop"], views["augmented_crop0"]], axis=1).T)
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
        spec = DrawSpec(CIFAR_VIEW, 3, mixes=(MixRun(alpha=alpha), MixRun(run=1, alpha=alpha)))
        draws = spec.draw(_micro(np.arange(5000)))
        for mix in draws.mix:
            assert mix.lam.dtype == np.float32
            assert stats.kstest(mix.lam.astype(float), stats.beta(alpha, alpha).cdf).pvalue > 0.01
        assert abs(np.corrcoef(draws.mix[0].lam, draws.mix[1].lam)[0, 1]) < 0.06


def test_centers_are_uniform_and_below_one():
    centers = DrawSpec(CIFAR_VIEW, 3, mixes=(MixRun(),)).draw(_micro(np.arange(5000))).mix[0].center
    assert centers.dtype == np.float32
    assert centers.min() >= 0
    assert centers.max() < 1
    for axis in (0, 1):
        assert stats.kstest(centers[:, axis].astype(float), "uniform").pvalue > 0.01


def test_a_center_that_would_round_to_one_stays_below(monkeypatch):
    largest = 1 - 2.0**-32  # the largest number that Philox gives; float32 would make it 1

    def draw_largest(_seed, _epoch, addresses, streams):
        return {stream: np.full((len(addresses), count), largest) for stream, count in streams.items()}

    monkeypatch.setattr("dalikd.pipelines.draw_spec.uniforms", draw_largest)
    everything = MixRun(cells=3, box=True, layers=4)
    draws = DrawSpec(CIFAR_VIEW, 0, EVERY_VIEW, (everything,)).draw(_micro(np.arange(3)))
    assert draws.mix[0].center.max() < 1
    assert np.floor(draws.mix[0].center * np.float32(32)).max() == 31
    assert draws.views["crop"].max() == draws.views["augmented_crop1"].max() == 8
    assert draws.views["operation3"].max() == draws.views["operation4"].max() == 13
    assert draws.views["magnitude4"].max() == 30
    mix = draws.mix[0]
    assert mix.cells is not None
    assert mix.layer is not None
    assert mix.cells.max() < 1
    assert mix.layer.max() == 3


@pytest.mark.parametrize("partner", ["permutation", "derangement"])
def test_partners_are_a_permutation_of_each_group(partner):
    spec = DrawSpec(CIFAR_VIEW, 3, mixes=tuple(MixRun(partner, run) for run in range(3)), mix_group=16)
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
    mix = DrawSpec(CIFAR_VIEW, 3, mixes=(MixRun(),)).draw(_micro(np.arange(70))).mix[0]
    assert np.array_equal(mix.partner, np.arange(70))
    assert mix.cells is mix.box is mix.layer is None


def test_the_first_of_a_group_is_everyones_partner():
    spec = DrawSpec(CIFAR_VIEW, 3, mixes=(MixRun("first"),), mix_group=16)
    partner = spec.draw(_micro(np.arange(500, 540), start=160)).mix[0].partner
    assert partner.dtype == np.int64
    assert partner.tolist() == [0] * 16 + [16] * 16 + [32] * 8


@pytest.mark.parametrize("size", [64 + 1, 64 + 2, 64 + 7, 40, 1])
def test_a_partial_last_group_mixes_within_itself(size):
    spec = DrawSpec(CIFAR_VIEW, 3, mixes=(MixRun("derangement"),))
    partner = spec.draw(_micro(np.arange(size), start=128)).mix[0].partner
    whole = size // 64 * 64
    assert np.array_equal(np.sort(partner[:whole]), np.arange(whole))
    assert np.array_equal(np.sort(partner[whole:]), np.arange(whole, size))
    assert (partner != np.arange(size))[: size if size - whole > 1 else whole].all()


# ------------------------------------------------------------------------------- per_sample and per_batch


def test_per_batch_gives_one_draw_to_each_group_for_every_batch_size():
    spec = DrawSpec(CIFAR_VIEW, 3, EVERY_VIEW, EVERY_MIX, mode="per_batch")
    base_names = {"crop", "flip"}
    expected = None
    for batch_size in (64, 128, 512):
        draws, order = _all_draws(spec, 1000, batch_size)
        names = set(draws[0].views) - base_names
        assert names
        arrays = {name: np.concatenate([draw.views[name] for draw in draws]) for name in names}
        for run in range(len(EVERY_MIX)):
            arrays |= {f"{name}{run}": np.concatenate(parts) for name, parts in _mix_parts(draws, run).items()}
            partners = [draw.mix[run].partner + batch_size * index for index, draw in enumerate(draws)]
            arrays[f"partner{run}"] = order[np.concatenate(partners)]
        assert {"lam0", "center1", "cells2", "box2", "layer2", "operation3", "magnitude4"} < arrays.keys()
        for name, array in arrays.items():
            assert len(array) == 1000
            for start in range(0, 1000, 64):  # the last group has 40
                if not name.startswith("partner"):
                    assert (array[start : start + 64] == array[start]).all(), name
        assert len(np.unique(arrays["lam0"])) == 16  # and each group its own
        expected = expected or arrays
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


def test_per_batch_leaves_the_base_view_per_sample():
    views = DrawSpec(CIFAR_VIEW, 3, (ViewRun("crop_flip"),), mode="per_batch").draw(_micro(np.arange(64))).views
    assert len(np.unique(views["augmented_crop0"], axis=0)) == 1
    assert len(np.unique(views["crop"], axis=0)) > 20


def test_per_batch_groups_draw_anew_each_epoch():
    spec = DrawSpec(CIFAR_VIEW, 3, mixes=(MixRun(),), mode="per_batch")
    first, second = (spec.draw(_micro(np.arange(64), epoch)).mix[0].lam[0] for epoch in (0, 1))
    assert first != second


def _per_image(spec: DrawSpec, images: int) -> dict[str, np.ndarray]:
    """One column of numbers for each thing that is drawn, float64 [images]."""
    draws = spec.draw(_micro(np.arange(images)))
    arrays = {name: array for name, array in draws.views.items() if name not in ("crop", "flip")}
    for run, mix in enumerate(draws.mix):
        arrays |= {f"{name}{run}": array for name, array in mix._asdict().items() if array is not None}
        arrays[f"partner{run}"] = (mix.partner - np.arange(images)) % spec.mix_group  # how far away
    columns = {name: array.reshape(images, -1).astype(float) for name, array in arrays.items()}
    return {f"{name}[{k}]": column[:, k] for name, column in columns.items() for k in range(column.shape[1])}


def _same_distribution(one: np.ndarray, two: np.ndarray) -> float:
    """p: of a chi-square test over the values where there are few of them, of Kolmogorov and Smirnov's else."""
    values, codes = np.unique(np.concatenate((one, two)), return_inverse=True)
    if len(values) == 1:
        return 1.0
    if len(values) > 60:
        return float(stats.ks_2samp(one, two).pvalue)  # type: ignore[attr-defined]
    counts = np.stack([np.bincount(part, minlength=len(values)) for part in np.split(codes, [len(one)])])
    frequent = counts.sum(0) >= 20
    pooled = np.concatenate((counts[:, frequent], counts[:, ~frequent].sum(1, keepdims=True)), axis=1)
    return float(stats.chi2_contingency(pooled[:, pooled.sum(0) > 0]).pvalue)  # type: ignore[attr-defined]


GROUP, GROUPS = 4, 3000
BY_IMAGE = DrawSpec(CIFAR_VIEW, 3, EVERY_VIEW, EVERY_MIX, mix_group=GROUP)
BY_GROUP = replace(BY_IMAGE, mode="per_batch")


def test_both_modes_have_the_same_distribution_for_each_image():
    """Flips, crops, operations, magnitudes, signs, lam, centres, cells, boxes, layers and how far away partners are:
    of a group, which repeats itself, one image counts, each of its four in turn."""
    per_sample = _per_image(BY_IMAGE, GROUP * GROUPS)
    per_batch = _per_image(BY_GROUP, GROUP * GROUPS)
    assert per_sample.keys() == per_batch.keys()
    assert len(per_sample) == 42
    places = GROUP * np.arange(GROUPS) + np.arange(GROUPS) % GROUP
    p_values = {name: _same_distribution(per_sample[name], per_batch[name][places]) for name in per_sample}
    assert min(p_values.values()) > 1e-4, min(p_values.items(), key=lambda item: item[1])
    different = [name for name in per_sample if not np.array_equal(per_sample[name], per_batch[name])]
    assert len(different) == 42 - 5  # partners are drawn by the group anyway, and randaugment has one magnitude


def test_per_batch_groups_are_independent_of_each_other():
    columns = _per_image(BY_GROUP, GROUP * GROUPS)
    for name, column in columns.items():
        groups = column.reshape(GROUPS, GROUP)
        if name.startswith("partner"):
            continue
        assert (groups == groups[:, :1]).all(), name
        of_group = groups[:, 0]
        if of_group.std() == 0:
            assert name.startswith("magnitude3"), name  # randaugment's, which is not drawn
            continue
        for distance in (1, 2, 7):
            correlation = np.corrcoef(of_group[distance:], of_group[:-distance])[0, 1]
            assert abs(correlation) < 4.5 * GROUPS**-0.5, (name, distance)
    assert len(np.unique(columns["lam0[0]"])) > GROUPS - 3  # float32: two groups may meet


def test_per_sample_images_of_a_group_are_independent_of_each_other():
    for name, column in _per_image(BY_IMAGE, GROUP * GROUPS).items():
        if name.startswith(("partner", "magnitude3")):
            continue
        groups = column.reshape(GROUPS, GROUP)
        assert abs(np.corrcoef(groups.T) - np.eye(GROUP)).max() < 4.5 * GROUPS**-0.5, name


# -------------------------------------------------------------------------------------- several views and mixes


@pytest.mark.parametrize("mode", ["per_sample", "per_batch"])
@pytest.mark.parametrize("view", [CIFAR_VIEW, PHOTO_VIEW], ids=lambda view: view.crop)
def test_each_run_draws_what_it_draws_alone(view, mode):
    views = (*EVERY_VIEW, *(ViewRun(run.kind, 3) for run in EVERY_VIEW), ViewRun("randaugment", ops=4, magnitude=30))
    views += (ViewRun("randaugment", ops=1),)
    mixes = (*EVERY_MIX, MixRun("derangement", cells=30), MixRun("permutation", 2, box=True, box_probability=0.9))
    mixes += (MixRun(cells=3),)
    spec = DrawSpec(view, 3, views, mixes, mode, mix_group=16)
    micro = _micro(np.random.default_rng(0).permutation(500)[:72], epoch=2, start=160)
    together = spec.draw(micro)
    base = set(DrawSpec(view, 3).draw(micro).views)
    for index, run in enumerate(views):
        alone = replace(spec, views=(run,), mixes=()).draw(micro).views
        assert len(alone) > len(base)
        for name, array in alone.items():
            other = together.views[name if name in base else f"{name.removesuffix('0')}{index}"]
            assert array.dtype == other.dtype
            assert np.array_equal(array, other), (run, name)
    for run, mix in zip(mixes, together.mix, strict=True):
        alone = replace(spec, views=(), mixes=(run,)).draw(micro).mix[0]
        for name, array in alone._asdict().items():
            assert np.array_equal(array, getattr(mix, name)), (run, name)


def test_runs_differ():
    views = tuple(ViewRun(kind, run) for kind in get_args(AugmentedView) for run in (0, 1, 239))
    mixes = tuple(MixRun("derangement", run, cells=2, box=True, layers=1000) for run in (0, 1, 239))
    draws = DrawSpec(CIFAR_VIEW, 3, views, mixes).draw(_micro(np.arange(256)))
    for name in ("augmented_flip", "augmented_crop", "operation", "sign"):
        found = {index: draws.views[f"{name}{index}"] for index in range(15) if f"{name}{index}" in draws.views}
        same_kind = [(a, b) for a in found for b in found if a < b and a // 3 == b // 3]
        assert same_kind
        assert not any(np.array_equal(found[a], found[b]) for a, b in same_kind), name
    for name in draws.mix[0]._fields:
        one, two, three = (getattr(mix, name) for mix in draws.mix)
        assert not np.array_equal(one, two), name
        assert not np.array_equal(one, three), name


# of 130 rows of epoch 3 with seed 11, from position 640 on: checksums of the draws' bytes
RECORDED = {
    "per_sample": {
        "crop": "a47717f3", "flip": "884a3b17", "augmented_flip": "afcd1ce7", "augmented_crop": "b79e367f",
        "operation": "4ca5b981", "magnitude": "fcf98e72", "sign": "93f6ea17",
        "lam0": "e4092815", "center0": "cb4fde90", "lam1": "186224bf", "center1": "0bf411e6",
    },
    "per_batch": {
        "crop": "a47717f3", "flip": "884a3b17", "augmented_flip": "7647c33c", "augmented_crop": "01881fbe",
        "operation": "2e998d39", "magnitude": "46e25b25", "sign": "9984d754",
        "lam0": "d15ed145", "center0": "461d93d8", "lam1": "db740d76", "center1": "72879861",
    },
}  # fmt: skip
RECORDED_PARTNERS = {
    "none": ("6315cd50", "6315cd50"),
    "permutation": ("4496bde3", "aaf869ff"),
    "derangement": ("3e0627e1", "6aa18599"),
}


@pytest.mark.parametrize("mode", ["per_sample", "per_batch"])
def test_draws_are_those_that_runs_and_caches_were_made_with(mode):
    """They are part of every run's identity: a change makes teacher caches and resumed runs wrong without a word."""
    micro = _micro((np.arange(130) * 37) % 1000, epoch=3, start=640)
    recorded = RECORDED[mode]
    views = tuple(map(ViewRun, ("flip", "crop_flip", "autoaugment")))
    found = DrawSpec(CIFAR_VIEW, 11, views, mode=mode).draw(micro).views
    for name, array in found.items():
        assert _digest(array) == recorded[name.rstrip("012")], name
    for partner in ("none", "permutation", "derangement"):
        mixes = DrawSpec(CIFAR_VIEW, 11, (), (MixRun(partner), MixRun(partner, 1)), mode).draw(micro).mix
        for run, mix in enumerate(mixes):
            assert _digest(mix.partner) == RECORDED_PARTNERS[partner][run]
            assert _digest(mix.lam) == recorded[f"lam{run}"]
            assert _digest(mix.center) == recorded[f"center{run}"]


# ----------------------------------------------------------------------------------- schedules, cells, boxes, layers


@pytest.mark.parametrize(
    ("epoch", "low", "high"), [(0, 0.0, 0.5), (1, 0.25, 0.5), (9, 0.25, 0.5), (10, 0.25, 1.0), (30, 0.75, 0.75)]
)
def test_lam_is_between_floor_and_ceiling_of_the_epoch(epoch, low, high):
    run = MixRun(alpha=0.5, floor=((0, 0.0), (1, 0.25), (30, 0.75)), ceiling=((0, 0.5), (10, 1.0), (30, 0.75)))
    assert run.bounds(epoch) == (low, high)
    micro = _micro(np.arange(500), epoch)
    found = DrawSpec(CIFAR_VIEW, 3, mixes=(run,)).draw(micro).mix[0].lam
    plain = DrawSpec(CIFAR_VIEW, 3, mixes=(MixRun(alpha=0.5),)).draw(micro).mix[0].lam
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, low + (high - low) * plain, rtol=0, atol=1e-7)


def test_a_floor_or_a_ceiling_may_stand_alone():
    assert MixRun(floor=((0, 0.5),)).bounds(7) == (0.5, 1.0)
    assert MixRun(ceiling=((0, 0.5),)).bounds(7) == (0.0, 0.5)
    assert MixRun().bounds(7) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": ((1, 0.5),)}, r"--mix.lam_min has epochs \[1\]: start with epoch 0"),
        ({"ceiling": ((0, 0.5), (5, 0.6), (2, 0.7))}, "--mix.lam_max has epochs .* in ascending order"),
        ({"ceiling": ((0, 0.5), (0, 0.6))}, "give each once"),
        ({"ceiling": ((0, 1.5),)}, "--mix.lam_max 1.5 from epoch 0 on: give a share of 0 to 1"),
        ({"floor": ((0, 0.0), (4, float("nan")))}, "--mix.lam_min nan from epoch 4 on"),
        (
            {"floor": ((0, 0.2), (3, 0.9)), "ceiling": ((0, 0.5),)},
            "--mix.lam_min 0.9 is above --mix.lam_max 0.5 from epoch 3 on",
        ),
        ({"run": 240}, "run 240 of an augmentation: there is room for runs 0 to 239"),
        ({"run": -1}, "run -1"),
        ({"box_probability": 1.1}, "probability 1.1: give 0 to 1"),
        ({"box_scale": (0.5, 0.1)}, "the smaller one first"),
        ({"box_ratio": (0.0, 1.0)}, "ratios of .* above 0"),
    ],
)
def test_mixing_runs_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixRun(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": 0}, "--mix.randaugment_ops 0: give at least 1"),
        ({"magnitude": 31}, "--mix.randaugment_magnitude 31: give 0 to 30"),
        ({"magnitude": -1}, "--mix.randaugment_magnitude -1"),
        ({"run": 240}, "run 240"),
    ],
)
def test_views_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViewRun("randaugment", **options)


def test_only_randaugment_has_settings():
    for kind in ("flip", "crop_flip", "autoaugment", "trivialaugment"):
        assert ViewRun(kind, ops=7, magnitude=3) == ViewRun(kind)
    assert ViewRun("randaugment", ops=7) != ViewRun("randaugment")


def test_cells_layers_and_boxes_are_uniform_numbers_of_their_own():
    mix = DrawSpec(CIFAR_VIEW, 3, mixes=(EVERY_MIX[2],)).draw(_micro(np.arange(6000))).mix[0]
    assert mix.cells is not None
    assert mix.layer is not None
    assert mix.box is not None
    assert mix.cells.shape == (6000, 6)
    assert (mix.cells.dtype, mix.layer.dtype, mix.box.dtype) == (np.float32, np.int32, np.int32)
    for column in mix.cells.T:
        assert stats.kstest(column.astype(float), "uniform").pvalue > 0.001
    assert stats.chisquare(np.bincount(mix.layer, minlength=3)).pvalue > 0.001
    columns = np.column_stack((mix.lam, mix.center, mix.cells, mix.layer, mix.box[:, 2] > 0))
    assert abs(np.corrcoef(columns.T) - np.eye(columns.shape[1])).max() < 4.5 * 6000**-0.5


def test_boxes_have_the_side_of_the_view():
    numbers = uniforms(3, 0, np.arange(400), {Stream.BOX: 23})[Stream.BOX]
    for size in (32, 224):
        run = MixRun(box=True, box_probability=0.75, box_scale=(0.1, 0.2), box_ratio=(0.5, 1.0))
        mix = DrawSpec(View(size, "pad_crop"), 3, mixes=(run,)).draw(_micro(np.arange(400))).mix[0]
        assert mix.box is not None
        assert np.array_equal(mix.box, erasing_boxes(numbers, size, 0.75, (0.1, 0.2), (0.5, 1.0)))


# ----------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("size", [32, 64])
def test_autoaugment_follows_the_size(size):
    numbers = uniforms(3, 0, np.arange(300), {Stream.POLICY: 5})[Stream.POLICY]
    found = DrawSpec(View(size, "pad_crop"), 3, (ViewRun("autoaugment"),)).draw(_micro(np.arange(300))).views
    for name, array in auto_augment_draws(numbers, "cifar10" if size == 32 else "imagenet").items():
        assert np.array_equal(found[f"{name}0"], array)


def test_policies_draw_from_their_own_streams():
    views = (ViewRun("randaugment", 2, ops=3, magnitude=5), ViewRun("trivialaugment", 1))
    found = DrawSpec(CIFAR_VIEW, 3, views).draw(_micro(np.arange(300))).views
    rand = uniforms(3, 0, np.arange(300), {Stream.RANDAUGMENT + 2: 6})[Stream.RANDAUGMENT + 2]
    trivial = uniforms(3, 0, np.arange(300), {Stream.TRIVIALAUGMENT + 1: 3})[Stream.TRIVIALAUGMENT + 1]
    expected = {f"{name}0": array for name, array in rand_augment_draws(rand, 5).items()}
    expected |= {f"{name}1": array for name, array in trivial_augment_draws(trivial).items()}
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
