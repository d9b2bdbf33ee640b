import numpy as np
import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import cross_entropy, mixed_cross_entropy
from dalikd.kd.manifold import manifold_mixup, mixed_forward
from dalikd.pipelines.draw_spec import MixDraws
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.tasks.supervised import Supervised, SupervisedInputs, TrainOptions


def _options(augmentation):
    return TrainOptions(batch_size=32, mix=MixOptions(group=8), epochs=1, augmentation=augmentation)


def test_plain_images_have_plain_labels(make_loop):
    loop = make_loop(options=_options("identity"))
    batch = loop.loader.next()
    inputs = loop.task.prepare(batch, 0.0)
    assert inputs[2:] == (None, None, None, None)
    assert torch.equal(inputs.pixels, batch.pixels)
    assert torch.equal(inputs.labels, batch.labels)


@pytest.mark.parametrize("augmentation", ["flip", "crop_flip", "cutout"])
def test_unmixed_augmentations_keep_the_labels(make_loop, augmentation):
    loop = make_loop(options=_options(augmentation))
    batch = loop.loader.next()
    pixels, labels, *_ = loop.task.prepare(batch, 0.0)
    assert torch.equal(labels, batch.labels)
    assert pixels.shape == batch.pixels.shape
    assert not torch.equal(pixels.float(), batch.pixels.float())


@pytest.mark.parametrize("augmentation", ["mixup", "cutmix"])
def test_mixed_images_have_both_labels(make_loop, augmentation):
    loop = make_loop(options=_options(augmentation))
    batch = loop.loader.next()
    fed = loop.task.prepare(batch, 0.0)
    pixels, labels, partner_labels, lam, *_ = fed
    draws = batch.mix[0]
    assert torch.equal(labels, batch.labels)
    assert torch.equal(partner_labels, batch.labels[draws.partner])
    assert not torch.equal(partner_labels, labels)
    originals, partners = batch.pixels.double(), batch.pixels[draws.partner].double()
    if augmentation == "mixup":
        share = lam[:, None, None, None].double()
        torch.testing.assert_close(pixels.double(), share * originals + (1 - share) * partners, rtol=0, atol=1e-3)
    else:
        pasted = (pixels.double() != originals).any(dim=1)
        assert torch.equal(torch.where(pasted[:, None], partners, originals), pixels.double())
        share = pasted.double().mean(dim=(1, 2))
        assert ((1 - lam) >= share - 1e-6).all()  # a pasted pixel may equal the one before
        assert np.corrcoef(1 - lam, share)[0, 1] > 0.99

    terms = loop.model(fed)
    logits = loop.task.student(pixels)
    torch.testing.assert_close(terms["loss"], mixed_cross_entropy(logits, labels, partner_labels, lam))
    assert terms["top1"] == (logits.argmax(1) == labels).float().mean()


def test_hidden_states_are_mixed_with_those_of_the_originals(make_loop):
    student = Normalized(create_model("resnet8", 3), (0.5,) * 3, (0.5,) * 3).double()
    task = make_loop(options=_options("mixup"), student=student).task
    pixels, labels = torch.randint(0, 256, (6, 3, 12, 12)).double(), torch.arange(6) % 3
    draws = MixDraws(torch.arange(6).flip(0), torch.rand(6), torch.zeros(6, 2), layer=(torch.arange(6) % 3).int())
    mixed = manifold_mixup(pixels, draws)
    terms = task(SupervisedInputs(mixed.images, labels, labels.flip(0), mixed.lam, pixels, mixed.hidden))
    logits = mixed_forward(student, pixels, mixed.images, mixed.hidden, joint=False)[1]
    torch.testing.assert_close(terms["loss"], mixed_cross_entropy(logits, labels, labels.flip(0), mixed.lam))
    assert not torch.equal(logits, student(mixed.images))


def test_a_loop_gives_hidden_states_to_the_task(make_loop):
    loop = make_loop(options=_options("mixup"))
    branches, layer = loop.task._branches, torch.arange(32).int() % 3
    candidates = branches.candidates
    branches.candidates = lambda batch: candidates(batch)._replace(layer=layer)
    batch = loop.loader.next()
    pixels, *_, originals, hidden = loop.task.prepare(batch, 0.0)
    assert torch.equal(originals, batch.pixels)
    assert not torch.equal(pixels, batch.pixels)
    assert torch.equal(hidden.layer, layer)
    assert torch.equal(hidden.partner, batch.mix[0].partner)


def test_label_smoothing_reaches_the_loss(make_loop, make_net):
    pixels, labels = torch.randint(0, 256, (6, 3, 12, 12)).byte(), torch.arange(6) % 3
    net = make_net(norm=False)
    augmenter = make_loop(options=_options("identity")).task.augmenter
    plain, smooth = Supervised(net, augmenter), Supervised(net, augmenter, label_smoothing=0.2)
    fed = SupervisedInputs(pixels, labels)
    torch.testing.assert_close(plain(fed)["loss"], cross_entropy(net(pixels), labels))
    torch.testing.assert_close(smooth(fed)["loss"], cross_entropy(net(pixels), labels, 0.2))
    mixed = smooth(SupervisedInputs(pixels, labels, labels.flip(0), torch.full((6,), 0.7)))["loss"]
    expected = mixed_cross_entropy(net(pixels), labels, labels.flip(0), torch.full((6,), 0.7), 0.2)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("augmentation", ["cutmixpick_teacher", "cutmixpick_student"])
def test_picks_belong_to_distillation(make_loop, augmentation):
    with pytest.raises(ValueError, match=f"--augmentation {augmentation} picks images for distillation: use cutmix"):
        make_loop(options=_options(augmentation))
