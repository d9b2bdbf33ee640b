import math
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW

from dalikd.kd.backbones import create_model
from dalikd.trainers import setup as assembly
from dalikd.trainers.options import DistillOptions, TrainOptions
from dalikd.trainers.setup import build_student, open_training_data, validation_loader


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
        ({"batch_size": 100}, "not a multiple of --mix_group 64"),
        ({"batch_size": 192}, "--batch_size 192 is larger than the data set"),
        ({"alpha": -1.0}, "--alpha -1.0: give a number above 0"),
    ],
)
def test_options_that_make_no_run_are_refused(data, accelerator, option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_training_data(TrainOptions(data=data, **option), accelerator)


def test_training_data_are_two_splits_with_their_loaders(data, accelerator):
    opened = open_training_data(TrainOptions(data=data, augmentation="cutmix", seed=4), accelerator)
    assert (len(opened.train), len(opened.val)) == (150, 51)
    assert opened.loader.sampler.steps_per_epoch == 2  # the short last step is dropped
    assert opened.loader.spec == opened.augmenter.draw_spec
    assert (opened.view.crop, opened.view.size) == ("pad_crop", 32)
    assert opened.val_loader.spec.view.crop == "center_crop"
    ids = [row for batch in opened.val_loader for row in batch.ids.tolist()]
    assert ids == list(range(51))
    opened.val_loader.close()


def test_validation_batches_are_bounded(data, accelerator, monkeypatch):
    opened = open_training_data(TrainOptions(data=data), accelerator)
    monkeypatch.setattr("dalikd.trainers.setup._LARGEST_EVALUATION_BATCH", 20)
    loader = validation_loader(opened.val, TrainOptions(data=data), accelerator)
    assert [len(batch) for batch in loader] == [20, 20, 11]
    loader.close()


# ---------------------------------------------------------------------------------------------------- students


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(9)
    path = tmp_path / "small.pt"
    torch.save(create_model("small", 3).state_dict(), path)
    return str(path)


def test_a_student_starts_from_its_weights_and_is_trained(make_source, weights):
    student = build_student(DistillOptions(model="small", weights=weights), make_source())
    assert torch.equal(student.model.conv.weight, torch.load(weights)["conv.weight"])
    assert all(values.requires_grad for values in student.parameters())


def test_a_student_that_is_made_anew_depends_on_the_seed_and_not_on_its_weights(make_source, weights):
    def weight(**options):
        return build_student(TrainOptions(model="small", reinit=True, **options), make_source()).model.conv.weight

    found = weight(weights=weights)
    assert torch.equal(found, weight())
    assert not torch.equal(found, weight(weights=weights, seed=1))
    assert not torch.equal(found, torch.load(weights)["conv.weight"])


def test_a_fixed_student_has_no_gradient_and_its_weights(make_source, weights):
    student = build_student(DistillOptions(model="small", weights=weights, fix_student=True), make_source())
    assert not any(values.requires_grad for values in student.parameters())
    assert torch.equal(student.model.conv.weight, torch.load(weights)["conv.weight"])


@pytest.mark.parametrize("options", [{}, {"weights": "small.pt", "reinit": True}])
def test_a_fixed_student_needs_weights_and_keeps_them(make_source, options):
    with pytest.raises(ValueError, match=r"--fix_student true observes .*: give them with --weights, without --reinit"):
        build_student(DistillOptions(model="small", fix_student=True, **options), make_source())


def test_a_student_normalises_as_told(make_source):
    student = build_student(TrainOptions(model="small", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]), make_source())
    assert student.normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(("asked", "threads"), [(None, 4), (2, 2)])
def test_evaluation_on_a_gpu_keeps_few_threads(data, accelerator, monkeypatch, asked, threads):
    val = open_training_data(TrainOptions(data=data), accelerator).val
    taken = []
    monkeypatch.setattr(assembly, "Loader", lambda *_, **options: taken.append(options["threads"]))
    options = TrainOptions(data=replace(data, threads=asked))
    validation_loader(val, options, SimpleNamespace(device=torch.device("cuda"), num_processes=1, process_index=0))
    validation_loader(val, options, accelerator)
    assert taken == [threads, asked]
