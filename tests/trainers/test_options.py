import math
from typing import Any

import pytest

from dalikd.pipelines.data import DataConfig
from dalikd.trainers.evaluate import EvaluateOptions
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.options import ScheduleConfig
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.supervised import TrainOptions
from dalikd.trainers.teacher_cache.fill import CacheOptions

EVERY = (TrainOptions, DistillOptions, MeasureOptions, CacheOptions, EvaluateOptions)
TRAINING = (TrainOptions, DistillOptions)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_are_whole_numbers_from_zero(options, seed):
    options(seed=0)
    options(seed=(1 << 63) - 1)
    with pytest.raises(ValueError, match=f"--seed {seed}: give a whole number from 0 to 2"):
        options(seed=seed)


def _with(options: type, name: str, value: Any) -> Any:
    group, _, rest = name.rpartition(".")
    made = {"data": DataConfig, "schedule": ScheduleConfig}.get(group)
    return options(**({rest: value} if made is None else {group: made(**{rest: value})}))


@pytest.mark.parametrize(
    ("kinds", "name", "within", "outside", "words"),
    [
        (EVERY, "batch_size", [1], [0, -1], "at least 1"),
        (EVERY, "data.threads", [1, None], [0], "at least 1"),
        (EVERY, "data.prefetch", [1], [0], "at least 1"),
        (EVERY, "data.limit", [1, None], [0, -3], "at least 1"),
        (EVERY, "data.val_limit", [1, None], [0], "at least 1"),
        (EVERY, "data.share", [0.01, 1], [0, -0.1, 1.1, NAN], "a share of the training images above 0, up to 1"),
        (EVERY, "data.image_size", [1, None], [0], "at least 1"),
        (EVERY, "data.val_resize", [1, None], [0], "at least 1"),
        (EVERY, "data.class_seed", [0, None], [-1], "0 or more"),
        (EVERY, "data.hw_decoder_load", [0, 1, None], [-0.1, 0.5, 1.1, NAN], "0 or 1"),
        ((*TRAINING, MeasureOptions, CacheOptions), "epochs", [1], [0, -1], "at least 1"),
        (TRAINING, "epoch_factor", [0.5, 4], [0, -1, NAN, INF], "a number above 0"),
        (TRAINING, "accumulation", [1], [0], "at least 1"),
        (TRAINING, "log_every", [1], [0], "at least 1"),
        (TRAINING, "eval_every", [1], [0], "at least 1"),
        (TRAINING, "checkpoint_every", [0, 1], [-1], "at least 1, or 0 for none"),
        (TRAINING, "clip_grad_norm", [0.1, None], [0, -1, NAN, INF], "a norm above 0"),
        (TRAINING, "ema", [0, 0.99], [1, -0.1, NAN], "a decay below 1"),
        (TRAINING, "schedule.gamma", [0.1, 1], [0, -1, 2, NAN], "a factor above 0, up to 1"),
        (TRAINING, "schedule.final", [0, 1], [-0.1, 1.1, NAN], "a share of the base rate, from 0 to 1"),
        (TRAINING, "schedule.warmup_epochs", [0, 2.5], [-1, NAN, INF], "0 or more epochs"),
        (TRAINING, "schedule.milestones", [[], [0, 1.5]], [[-1], [2, 1], [1, 1], [1, NAN], [INF]], "epochs from 0 on"),
        ((TrainOptions,), "label_smoothing", [0, 0.9], [1, -0.1, NAN], "a share from 0 to below 1"),
        ((DistillOptions,), "entropy_log_every", [0, 1], [-1], "at least 1, or 0 for no log"),
        ((MeasureOptions,), "window", [2], [0, -2, 3], "a positive even number"),
        ((MeasureOptions,), "confidence", [0.5], [0, 1, NAN], "a share between 0 and 1"),
        ((MeasureOptions,), "stop_confidence", [0.5, None], [0, 1, NAN], "a share between 0 and 1"),
        ((MeasureOptions,), "images_per_call", [1], [0], "at least 1"),
        ((MeasureOptions,), "entropy_log_every", [1], [0], "at least 1"),
        ((MeasureOptions,), "checkpoint_every", [1], [0, -1], "at least 1"),
        ((CacheOptions,), "share", [0.1, 1], [0, 1.1, NAN], "a share of the images above 0"),
        ((CacheOptions,), "tolerance", [0, 1, None], [-1, NAN, INF], "0 or more"),
    ],
)
def test_numbers_are_in_range(kinds, name, within, outside, words):
    for options in kinds:
        for value in within:
            _with(options, name, value)
        for value in outside:
            with pytest.raises(ValueError, match=rf"^--{name} .*: give {words}"):
                _with(options, name, value)


def test_a_warmup_ends_within_the_training():
    TrainOptions(epochs=2, epoch_factor=1.5, schedule=ScheduleConfig(warmup_epochs=3))
    with pytest.raises(ValueError, match=r"--schedule.warmup_epochs 4: give at most as many as are trained, 3"):
        TrainOptions(epochs=2, epoch_factor=1.5, schedule=ScheduleConfig(warmup_epochs=4))


def test_auto_settles_by_the_device_and_the_augmentations(monkeypatch):
    monkeypatch.setattr("dalikd.trainers.options.automatic_mode", lambda on_cpu: "off" if on_cpu else "default")
    for options in (TrainOptions, DistillOptions, MeasureOptions, CacheOptions):
        assert options().compile == "default"
        assert options(device="cpu").compile == "off"
        assert options(device="cpu", compile="max-autotune").compile == "max-autotune"
    assert DistillOptions(augmentation="manifold_mixup").compile == "off"  # which cannot be compiled
    assert MeasureOptions(augmentation=["cutmix", "all"]).compile == "off"
