from dataclasses import replace

import pytest

from dalikd.kd.losses import HSAKD
from dalikd.pipelines.draw_spec import View
from dalikd.trainers.augmentation import Augmenter, MixOptions
from dalikd.trainers.evaluate import EvaluateOptions
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.study.plan import Work
from dalikd.trainers.study.work import Sizes, forward_flops, heads_flops, work
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.supervised import TrainOptions

SIZES = Sizes(train_images=100, val_images=30, classes=10, side=32)


@pytest.fixture
def augmenters(make_source):
    def make(options, *names):
        return [Augmenter(name, options.mix, make_source(), View(12, "pad_crop", padding=1), 0) for name in names]

    return make


def _counts(done):
    return done.trained, done.asked, done.scored, done.evaluated


def test_operations_grow_with_the_image():
    """resnet8's first layer alone: 3 -> 16 channels, 3x3, at 32x32; a product and a sum are two operations."""
    assert forward_flops("resnet8", {}, SIZES) > 2 * 32 * 32 * 3 * 16 * 9
    larger = forward_flops("resnet8", {}, Sizes(100, 30, 10, 64))
    assert larger == pytest.approx(4 * forward_flops("resnet8", {}, SIZES), rel=0.01)


def test_training_drops_the_short_last_step_and_evaluates_the_last_epoch():
    options = TrainOptions(model="resnet8", batch_size=32, epochs=5, epoch_factor=1.5, eval_every=3)
    done = work(options, SIZES)  # round(7.5) = 8 epochs of 96 images, evaluated after 3, 6 and 8
    assert _counts(done) == (8 * 96, 0, 0, 3 * 30)
    assert done.flops == (3 * 8 * 96 + 90) * forward_flops("resnet8", {}, SIZES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", (1, 1, 0)),
        ("flip", (2, 2, 0)),
        ("mixup", (2, 2, 0)),
        ("cutmixpick_teacher", (2, 3, 0)),
        ("cutmixpick_student", (2, 2, 2)),
    ],
)
def test_distilling_shows_images_and_asks_the_teacher(augmenters, name, expected):
    options = DistillOptions(
        model="resnet8",
        teacher=TeacherConfig("resnet14"),
        augmentation=name,
        batch_size=32,
        mix=MixOptions(group=8),
        epochs=1,
    )
    done = work(options, SIZES, augmenters(options, name))
    assert _counts(done) == (*(96 * count for count in expected), 30)
    own, asked = forward_flops("resnet8", {}, SIZES), forward_flops("resnet14", {}, SIZES)
    assert done.flops == pytest.approx((3 * done.trained + done.scored + 30) * own + done.asked * asked)


def test_heads_are_the_stages_behind_them_over_again():
    def conv(given, made, kernel, side):
        return 2 * given * made * kernel**2 * side**2

    second = conv(16, 32, 3, 16) + conv(32, 32, 3, 16) + conv(16, 32, 1, 16)
    third = conv(32, 64, 3, 8) + conv(64, 64, 3, 8) + conv(32, 64, 1, 8)
    deepest, linear = 2 * conv(64, 64, 3, 8), 2 * 64 * 4 * 10
    assert heads_flops("resnet8_aux", {}, SIZES) == second + 2 * third + deepest + 3 * linear
    assert forward_flops("resnet8_aux", {}, SIZES) == forward_flops("resnet8", {}, SIZES)


@pytest.mark.parametrize(("name", "augmented"), [("identity", 0), ("cutmix", 1)])
def test_quarter_turns_count_fourfold_and_go_through_the_heads(augmenters, name, augmented):
    options = DistillOptions(
        model="resnet8_aux",
        teacher=TeacherConfig("resnet14_aux"),
        loss=HSAKD(kd_mix_share=1.0),
        augmentation=name,
        batch_size=32,
        mix=MixOptions(group=8),
        epochs=1,
    )
    done = work(options, SIZES, augmenters(options, name))
    assert _counts(done) == (96 * (4 + augmented), 96 * (4 + augmented), 0, 4 * 30)
    (own, own_heads), (asked, asked_heads) = (
        (forward_flops(net, {}, SIZES), heads_flops(net, {}, SIZES)) for net in ("resnet8_aux", "resnet14_aux")
    )
    turned = 4 * 96
    expected = (3 * done.trained + 120) * own + (3 * turned + 120) * own_heads
    assert done.flops == pytest.approx(expected + done.asked * asked + turned * asked_heads)


@pytest.mark.parametrize("frozen", [False, True])
def test_teachers_with_heads_train_all_or_these_alone(frozen):
    options = TrainOptions(model="resnet8_aux", batch_size=32, epochs=1, freeze_backbone=frozen)
    done = work(options, SIZES)
    assert _counts(done) == (4 * 96, 0, 0, 4 * 30)
    own, heads = forward_flops("resnet8", {}, SIZES), heads_flops("resnet8_aux", {}, SIZES)
    assert done.flops == pytest.approx(((1 if frozen else 3) * 384 + 120) * own + (3 * 384 + 120) * heads)


def test_measuring_asks_about_the_originals_once(augmenters):
    options = MeasureOptions(teacher=TeacherConfig("resnet14"), batch_size=32, mix=MixOptions(group=8), epochs=2)
    assert _counts(work(options, SIZES, augmenters(options, "identity"))) == (0, 200, 0, 0)
    several = augmenters(options, "identity", "flip", "mixup")
    assert _counts(work(options, SIZES, several)) == (0, 200 * 3, 0, 0)
    assert _counts(work(replace(options, heads=True), SIZES, several)) == (0, 4 * 200 * 3, 0, 0)
    options.model = "resnet8"
    assert _counts(work(options, SIZES, augmenters(options, "cutmixpick_student"))) == (0, 200 * 2, 200 * 2, 0)


def test_evaluating_sees_every_image_once():
    done = work(EvaluateOptions(model="resnet8"), SIZES)
    assert _counts(done) == (0, 0, 0, 30)
    assert done.flops == 30 * forward_flops("resnet8", {}, SIZES)


def test_work_adds_up():
    assert Work(1, 2, 3, 4, 5.0, 6) + Work(10, 20, 30, 40, 50.0, 60) == Work(11, 22, 33, 44, 55.0, 66)


def test_an_unknown_net_is_named():
    with pytest.raises(ValueError, match='unknown model "resnet9"'):
        work(EvaluateOptions(model="resnet9"), SIZES)
