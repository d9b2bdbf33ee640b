import pytest
import torch

from dalikd.kd.mixing import cutmix, cutout, mixup
from dalikd.kd.teacher import STUDENT_ENTROPY, TEACHER_ENTROPY
from dalikd.pipelines.augment import View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.trainers.augmentation import AUGMENTATIONS, Augmenter, MixOptions, augmentation_names

VIEW = View(12, "pad_crop", padding=1)
# name: view in the loader, partner, runs, criterion, whether labels are mixed
TABLE = {
    "identity": ("none", "none", 0, None, False),
    "flip": ("flip", "none", 0, None, False),
    "crop_flip": ("crop_flip", "none", 0, None, False),
    "cutout": ("none", "none", 1, None, False),
    "autoaugment": ("autoaugment", "none", 0, None, False),
    "mixup": ("none", "permutation", 1, None, True),
    "cutmix": ("none", "derangement", 1, None, True),
    "cutmixpick_student": ("none", "derangement", 2, STUDENT_ENTROPY, True),
    "cutmixpick_teacher": ("none", "derangement", 2, TEACHER_ENTROPY, True),
}


def _augmenter(name, source, **options):
    return Augmenter(name, MixOptions(**{"mix_group": 8, **options}), source, VIEW, seed=3)


def _batch(augmenter, source):
    loader = Loader(source, Sampler(len(source), 32, 3, group=8), augmenter.draw_spec, threads=1)
    batch = loader.next()
    loader.close()
    return batch


def test_the_table_is_complete():
    assert list(TABLE) == list(AUGMENTATIONS)


@pytest.mark.parametrize("name", TABLE)
def test_each_augmentation_is_its_row(make_source, name):
    view, partner, runs, criterion, mixed = TABLE[name]
    augmenter = _augmenter(name, make_source())
    spec = augmenter.draw_spec
    assert (spec.augmented, spec.partner, spec.runs, augmenter.runs) == (view, partner, runs, runs)
    assert (spec.mix_group, spec.mode, spec.alpha, spec.seed) == (8, "per_sample", 1.0, 3)
    assert augmenter.criterion is criterion
    assert augmenter.labels_are_mixed == mixed


@pytest.mark.parametrize("name", TABLE)
def test_candidates_are_whole_batches_of_each_run(make_source, name):
    source = make_source()
    augmenter = _augmenter(name, source, mix_n_run=3)
    batch = _batch(augmenter, source)
    candidates = augmenter.candidates(batch)
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


def test_candidates_are_those_of_the_mixing_functions(make_source):
    source = make_source()
    for name, function in (("mixup", mixup), ("cutmix", cutmix), ("cutmixpick_teacher", cutmix)):
        augmenter = _augmenter(name, source)
        batch = _batch(augmenter, source)
        found = augmenter.candidates(batch)
        expected = [function(batch.pixels, draws) for draws in batch.mix]
        assert found is not None
        for part, pieces in zip(found, zip(*expected, strict=True), strict=True):
            assert torch.equal(part, torch.cat(pieces))


@pytest.mark.parametrize(("options", "side"), [({}, 3), ({"cutout_side": 5}, 5)])
def test_cutout_fills_with_the_mean_of_the_data(make_source, options, side):
    source = make_source()
    augmenter = _augmenter("cutout", source, **options)
    batch = _batch(augmenter, source)
    found = augmenter.candidates(batch)
    expected = cutout(batch.pixels, batch.mix[0], side, [127.5, 127.5, 127.5])
    assert found is not None
    assert torch.equal(found.images, expected.images)


def test_cutout_on_cifar10_is_the_published_square(make_source):
    from dataclasses import replace

    source = replace(make_source(32, 10, 32), name="cifar10")
    augmenter = Augmenter("cutout", MixOptions(mix_group=8), source, View(32, "pad_crop"), 0)
    loader = Loader(source, Sampler(32, 32), augmenter.draw_spec)
    batch = loader.next()
    found = augmenter.candidates(batch)
    assert found is not None
    assert torch.equal(found.images, cutout(batch.pixels, batch.mix[0], 16, [127.5] * 3).images)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match='unknown --augmentation "cutmixpick": did you mean cutmix'):
        augmentation_names(["identity", "cutmixpick"])
    with pytest.raises(ValueError, match="did you mean identity, flip, crop_flip"):
        augmentation_names(["xyz"])
