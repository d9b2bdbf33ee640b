import math
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from dalikd.kd.backbones import create_model
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.run import run
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.supervised import TrainOptions


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"epochs": 3, "epoch_factor": 0.1}, "--epochs 3 x --epoch_factor 0.1 is no whole epoch"),
        ({"optimizer": partial(SGD, lr=0.0)}, "--optimizer.lr 0.0: give a number above 0"),
        ({"optimizer": partial(SGD, lr=-1.0)}, "--optimizer.lr -1.0: give a number above 0"),
        ({"optimizer": partial(SGD, lr=math.nan)}, "--optimizer.lr nan: give a number above 0"),
        ({"optimizer": partial(SGD, lr=0.1, momentum=math.nan)}, "--optimizer.momentum nan: give finite numbers"),
        ({"optimizer": partial(AdamW, betas=(0.9, math.inf))}, "--optimizer.betas (0.9, inf): give finite numbers"),
        ({"optimizer": partial(AdamW, betas=(0.9, 1.0))}, "--optimizer: Invalid beta parameter at index 1: 1.0"),
        ({"sync_bn": True}, "--sync_bn true needs GPUs"),
        ({"accumulation": 3}, "--batch_size 64 cannot be divided evenly over 1 process"),
        ({"batch_size": 100}, "not a multiple of --mix.group 64"),
        ({"batch_size": 192}, "--batch_size 192 is larger than the data set"),
        ({"mix": MixOptions(alpha=-1.0)}, "--mix.alpha -1.0: give a number above 0"),
    ],
)
def test_options_that_make_no_run_are_refused(data, accelerator, tmp_path, option, message):
    def call():
        run(TrainOptions(data=data, model="small", output=str(tmp_path / "run"), **option), accelerator, "train", {})

    with pytest.raises(ValueError, match=re.escape(message)):
        call()
    assert not (tmp_path / "run").exists()


def test_training_data_are_two_splits_with_their_loaders(data, accelerator):
    options = TrainOptions(data=data, model="small", augmentation="cutmix", seed=4)
    setup = open_run(options, accelerator)
    task = options.build(setup)
    loader, val_loader = task.loader(setup), setup.val_loader()
    assert (len(setup.source), len(setup.val)) == (150, 51)
    assert loader.sampler.steps_per_epoch == 2  # the short last step is dropped
    assert loader.spec == task.augmenter.draw_spec
    assert (setup.view.crop, setup.view.size) == ("pad_crop", 32)
    assert val_loader.spec.view.crop == "center_crop"
    ids = [row for batch in val_loader for row in batch.ids.tolist()]
    assert ids == list(range(51))
    val_loader.close()


def test_validation_batches_are_bounded(data, accelerator, monkeypatch):
    monkeypatch.setattr("dalikd.trainers.setup._LARGEST_EVALUATION_BATCH", 20)
    loader = open_run(TrainOptions(data=data), accelerator).val_loader()
    assert [len(batch) for batch in loader] == [20, 20, 11]
    loader.close()


# ---------------------------------------------------------------------------------------------------- students


def _student(options, source):
    nobody_asks: Any = None
    return options.build_student(Setup(options, nobody_asks, source, source))


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(9)
    path = tmp_path / "small.pt"
    torch.save(create_model("small", 3).state_dict(), path)
    return str(path)


def test_a_student_starts_from_its_weights_and_is_trained(make_source, weights):
    student = _student(DistillOptions(model="small", weights=weights), make_source())
    assert torch.equal(student.model.conv.weight, torch.load(weights)["conv.weight"])
    assert all(values.requires_grad for values in student.parameters())


def test_a_student_that_is_made_anew_depends_on_the_seed_and_not_on_its_weights(make_source, weights):
    def weight(**options):
        return _student(TrainOptions(model="small", reinit=True, **options), make_source()).model.conv.weight

    found = weight(weights=weights)
    assert torch.equal(found, weight())
    assert not torch.equal(found, weight(weights=weights, seed=1))
    assert not torch.equal(found, torch.load(weights)["conv.weight"])


def test_a_fixed_student_has_no_gradient_and_its_weights(make_source, weights):
    nobody_asks: Any = None
    source = make_source()
    student = DistillOptions(model="small", weights=weights).build_student(
        Setup(TrainOptions(), nobody_asks, source, source), frozen=True
    )
    assert not any(values.requires_grad for values in student.parameters())
    assert torch.equal(student.model.conv.weight, torch.load(weights)["conv.weight"])


@pytest.mark.parametrize("change", [{}, {"reinit": True}])
def test_a_fixed_student_needs_weights_and_keeps_them(data, accelerator, weights, change):
    teacher = TeacherConfig("small", weights)
    given = {"weights": weights, **change} if change else {}
    options = DistillOptions(data=data, model="small", teacher=teacher, freeze_student=True, **given)
    with pytest.raises(ValueError, match=r"--freeze_student true observes .*: give them with --weights, without"):
        options.build(open_run(options, accelerator))


def test_a_student_normalises_as_told(make_source):
    student = _student(TrainOptions(model="small", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]), make_source())
    assert student.normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(("asked", "threads"), [(None, 4), (2, 2)])
def test_evaluation_on_a_gpu_keeps_few_threads(data, accelerator, monkeypatch, asked, threads):
    setup = open_run(TrainOptions(data=replace(data, threads=asked)), accelerator)
    taken = []
    monkeypatch.setattr("dalikd.trainers.setup.Loader", lambda *_, **options: taken.append(options["threads"]))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1, process_index=0)
    replace(setup, accelerator=on_gpu).val_loader()
    setup.val_loader()
    assert taken == [threads, asked]
