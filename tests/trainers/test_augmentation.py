from dataclasses import replace

import pytest
import torch

from dalikd.kd.manifold import manifold_mixup
from dalikd.kd.mixing import cutmix, cutout, masking, mixup, patchmix, random_erasing, same
from dalikd.kd.picking import CRITERIA
from dalikd.pipelines.draw_spec import MixRun, View, ViewRun
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.trainers.augmentation import (
    AUGMENTATIONS,
    PUBLISHED,
    Augmenter,
    MixOptions,
    augmentation_names,
)
from dalikd.trainers.teacher_step import Branches

VIEW = View(12, "pad_crop", padding=1)
CUTMIX = MixRun("derangement")
# name: views in the loader, draws of mixing, criterion, whether labels are mixed
TABLE = {
    "identity": ((), (), None, False),
    "flip": ((ViewRun("flip"),), (), None, False),
    "crop_flip": ((ViewRun("crop_flip"),), (), None, False),
    "cutout": ((), (MixRun(),), None, False),
    "autoaugment": ((ViewRun("autoaugment"),), (), None, False),
    "mixup": ((), (MixRun("permutation"),), None, True),
    "cutmix": ((), (CUTMIX,), None, True),
    "cutmixpick_student": ((), (CUTMIX, replace(CUTMIX, run=1)), "student_entropy", True),
    "cutmixpick_teacher": ((), (CUTMIX, replace(CUTMIX, run=1)), "teacher_entropy", True),
    "manifold_mixup": ((), (MixRun("permutation", alpha=2.0, layers=3),), None, True),
    "patchmix": ((), (replace(CUTMIX, cells=9),), None, True),
    "masking": ((), (MixRun(cells=16),), None, False),
    "same": ((), (MixRun("first"),), None, True),
    "randaugment": ((ViewRun("randaugment"),), (), None, False),
    "trivialaugment": ((ViewRun("trivialaugment"),), (), None, False),
    "random_erasing": ((), (MixRun(box=True),), None, False),
}
PICKED = ["mixup+kld", "crop_flip+dissimilarity", "manifold_mixup+teacher_entropy", "randaugment+student_entropy"]


def _augmenter(name, source, **options):
    return Augmenter(name, MixOptions(**{"group": 8, **options}), source, VIEW, seed=3)


def _batch(maker, source):
    loader = Loader(source, Sampler(len(source), 32, 3, group=8), maker.draw_spec, threads=1)
    batch = loader.next()
    loader.close()
    return batch


def test_the_table_is_complete():
    assert list(TABLE) == list(AUGMENTATIONS)
    assert list(TABLE)[:9] == list(PUBLISHED)


@pytest.mark.parametrize("name", TABLE)
def test_each_augmentation_is_its_row(make_source, name):
    views, mixes, criterion, mixed = TABLE[name]
    augmenter = _augmenter(name, make_source())
    spec = augmenter.draw_spec
    assert (spec.views, spec.mixes) == (views, mixes)
    assert (spec.view, spec.mix_group, spec.mode, spec.seed) == (VIEW, 8, "per_sample", 3)
    assert augmenter.criterion == (CRITERIA[criterion] if criterion else None)
    assert augmenter.runs == len(views) + len(mixes)
    assert augmenter.labels_are_mixed == mixed
    assert augmenter.makes_candidates == (name != "identity")
    assert augmenter.mixes_hidden == (name == "manifold_mixup")


@pytest.mark.parametrize("name", [*TABLE, *PICKED])
def test_candidates_are_whole_batches_of_each_run(make_source, name):
    source = make_source()
    augmenter = _augmenter(name, source, n_run=3)
    batch = _batch(augmenter, source)
    candidates = Branches([augmenter]).candidates(batch)
    if name == "identity":
        assert candidates is None
        return
    assert candidates is not None
    count = 96 if augmenter.criterion else 32
    assert candidates.images.shape == (count, 3, 12, 12)
    assert candidates.partner.shape == candidates.lam.shape == (count,)
    own = torch.arange(32).repeat(count // 32)
    if augmenter.labels_are_mixed:
        assert torch.equal(candidates.partner // 8, own // 8)  # inside the mix group
        assert not torch.equal(candidates.partner, own)
    else:
        assert torch.equal(candidates.partner, own)
        assert (candidates.lam == 1).all()
    assert not torch.equal(candidates.images[:32].float(), batch.pixels.float())
    if count > 32:
        assert not torch.equal(candidates.images[:32], candidates.images[32:64])


def test_candidates_are_those_of_the_mixing_functions(make_source):
    source = make_source()
    grey = [127.5, 127.5, 127.5]
    functions = {
        "mixup": mixup,
        "cutmix": cutmix,
        "cutmixpick_teacher": cutmix,
        "manifold_mixup": manifold_mixup,
        "patchmix": lambda images, draws: patchmix(images, draws, side=2),
        "masking": lambda images, draws: masking(images, draws, cells_a_side=3, ratio=0.4, fill=grey),
        "same": same,
        "random_erasing": lambda images, draws: random_erasing(images, draws, fill=grey),
        "same+teacher_entropy": same,
    }
    for name, function in functions.items():
        augmenter = _augmenter(name, source, patch_side=2, mask_cells=3, mask_ratio=0.4)
        batch = _batch(augmenter, source)
        found = Branches([augmenter]).candidates(batch)
        expected = [function(batch.pixels, draws) for draws in batch.mix]
        assert found is not None
        for part, pieces in zip(found, zip(*expected, strict=True), strict=True):
            assert part is None if pieces[0] is None else torch.equal(part, torch.cat(pieces))


def test_options_reach_the_draws(make_source):
    source = make_source()
    cut = _augmenter("cutmix", source, alpha=0.5, lam_max={30: 1, 0: 0.75}, lam_min={0: 0.25}, mode="per_batch")
    assert cut.draw_spec.mode == "per_batch"
    assert cut.draw_spec.mixes == (MixRun("derangement", 0, 0.5, ((0, 0.25),), ((0, 0.75), (30, 1))),)
    shares = _batch(cut, source).mix[0].lam
    assert shares.min() >= 0.25
    assert shares.max() <= 0.75
    hidden = _augmenter("manifold_mixup", source, manifold_alpha=3.0, alpha=0.5)
    assert hidden.draw_spec.mixes[0].alpha == 3.0
    policy = _augmenter("randaugment+kld", source, randaugment_ops=3, randaugment_magnitude=5, n_run=2)
    assert policy.draw_spec.views == (ViewRun("randaugment", 0, 3, 5), ViewRun("randaugment", 1, 3, 5))


@pytest.mark.parametrize(("options", "side"), [({}, 3), ({"cutout_side": 5}, 5)])
def test_cutout_fills_with_the_mean_of_the_data(make_source, options, side):
    source = make_source()
    augmenter = _augmenter("cutout", source, **options)
    batch = _batch(augmenter, source)
    found = Branches([augmenter]).candidates(batch)
    expected = cutout(batch.pixels, batch.mix[0], side, [127.5, 127.5, 127.5])
    assert found is not None
    assert torch.equal(found.images, expected.images)


def test_cutout_on_cifar10_is_the_published_square(make_source):
    source = replace(make_source(32, 10, 32), name="cifar10")
    augmenter = Augmenter("cutout", MixOptions(group=8), source, View(32, "pad_crop"), 0)
    loader = Loader(source, Sampler(32, 32), augmenter.draw_spec)
    batch = loader.next()
    found = Branches([augmenter]).candidates(batch)
    assert found is not None
    assert torch.equal(found.images, cutout(batch.pixels, batch.mix[0], 16, [127.5] * 3).images)


# ------------------------------------------------------------------------------------------------------ branches


@pytest.mark.parametrize("names", [["published"], ["all", *PICKED], ["identity"], ["cutmix", "cutmix+kld"]])
def test_branches_make_what_each_augmentation_makes_alone(make_source, names):
    source = make_source()
    augmenters = [_augmenter(name, source) for name in augmentation_names(names)]
    branches = Branches(augmenters)
    batch = _batch(branches, source)
    made = branches.make(batch.pixels, batch.augmented_pixels, batch.mix)
    assert len(made) == len(branches.parts) == len(set(branches.parts))
    for augmenter, (pool, *_) in zip(augmenters, branches.branches, strict=True):
        expected = Branches([augmenter]).candidates(_batch(augmenter, source))
        if expected is None:
            assert pool == ()
            continue
        found = type(expected).join([made[part] for part in pool])
        for ours, theirs in zip(found, expected, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


def test_branches_draw_and_make_what_is_common_once(make_source):
    source = make_source()
    names = ["cutmix", "cutmixpick_student", "cutmixpick_teacher", "flip", "flip+kld"]
    branches = Branches([_augmenter(name, source) for name in names])
    assert [branch.runs for branch in branches.branches] == [(0,), (0, 1), (0, 1), (2,), (2, 3)]
    assert branches.draw_spec.mixes == (CUTMIX, replace(CUTMIX, run=1))
    assert branches.draw_spec.views == (ViewRun("flip"), ViewRun("flip", 1))


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cutmixpick", 'unknown --augmentation "cutmixpick": did you mean cutmix'),
        ("xyz", "did you mean identity, flip, crop_flip"),
        ("mixup+entropy", 'unknown criterion in --augmentation "mixup[+]entropy": there are teacher_entropy, student'),
        ("mixap+kld", 'unknown --augmentation "mixap[+]kld": did you mean mixup'),
        ("identity+kld", '"identity[+]kld": identity gives nothing to pick from'),
        ("cutmixpick_teacher+kld", "cutmixpick_teacher gives nothing to pick from"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        augmentation_names(["identity", name])


@pytest.mark.parametrize("name", ["all", "published"])
def test_names_of_several_are_for_measure_alone(make_source, name):
    with pytest.raises(ValueError, match=f'--augmentation "{name}" stands for several, which measure alone takes'):
        _augmenter(name, make_source())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("patchmix", {"patch_side": 5}, "--mix.patch_side 5: images of 12 pixels need a divisor of 12"),
        ("masking+kld", {"mask_cells": 24}, "--mix.mask_cells 24: images of 12 pixels need a divisor of 12"),
        ("cutmix", {"alpha": float("inf")}, "--mix.alpha inf: give a number above 0"),
        ("cutmix", {"n_run": 241}, "--mix.n_run 241: give at most 240"),
        (
            "cutmix",
            {"group": 1},
            "--mix.group 1: cutmix mixes an image with another one of its group; give at least",
        ),
        (
            "mixup+kld",
            {"n_pick": 17},
            r"--mix.n_pick 17: the pool of mixup\+kld holds 16 images \(--mix.n_run 2 x --mix.gro",
        ),
        ("cutmixpick_teacher", {"n_pick": 0}, "--mix.n_pick 0: the pool of cutmixpick_teacher holds 16 images"),
        ("patchmix", {"patch_side": 0}, "--mix.patch_side 0: give at least 1"),
        ("masking", {"mask_cells": 0}, "--mix.mask_cells 0: give at least 1"),
        ("masking", {"mask_ratio": 1.5}, "--mix.mask_ratio 1.5: give a share from 0 to 1"),
        ("manifold_mixup", {"manifold_alpha": 0.0}, "--mix.manifold_alpha 0.0: give a number above 0"),
        ("mixup+kld", {"pick_temperature": -1.0}, "--mix.pick_temperature -1.0: give a number above 0"),
        (
            "cutmix",
            {"lam_max": {5: 0.5}},
            r"--mix.lam_max \{5: 0.5\}: give shares from 0 to 1 by epoch, from epoch 0 on",
        ),
        ("cutmix", {"lam_min": {0: 1.5}}, r"--mix.lam_min \{0: 1.5\}: give shares from 0 to 1"),
        (
            "cutmix",
            {"lam_min": {0: 0.2, 30: 0.8}, "lam_max": {0: 0.5}},
            "--mix.lam_min 0.8 is above --mix.lam_max 0.5 in epoch 30",
        ),
        ("randaugment", {"randaugment_ops": 0}, "--mix.randaugment_ops 0: give at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make_source, name, options, message):
    with pytest.raises(ValueError, match=message):
        _augmenter(name, make_source(), **options)


def test_picking_all_of_the_pool_but_one_is_possible(make_source):
    assert _augmenter("cutmixpick_teacher", make_source(), n_pick=15).n_pick == 15
    assert _augmenter("cutmixpick_teacher", make_source(), n_pick=8).n_pick is None  # as many as originals
    assert _augmenter("cutmix", make_source(), n_pick=15).n_pick is None  # picks nothing
