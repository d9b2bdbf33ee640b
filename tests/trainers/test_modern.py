"""Losses that need more than outputs, in the real task."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.checkpoints import load_weights, read_origin
from dalikd.kd.losses import KD, OFD, DistillationToken, ReusedClassifier, SemCKD, SimKD, WeightedSum, load_simkd
from dalikd.kd.teacher import Teacher
from dalikd.trainers.evaluate import evaluate
from dalikd.trainers.tasks.distill import build_loss

TOKENS = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def net(model: str, seed: int, **options: object) -> Normalized:
    torch.manual_seed(seed)
    return Normalized(create_model(model, 3, **options), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("student", ["resnet8", "MobileNetV2_0_25"])
def test_simkd_trains_evaluates_and_saves_the_completed_student(make_loop, distill_options, student, tmp_path: Path):
    teacher = net("resnet14", 1)
    options = distill_options(loss=SimKD(), ema=0.5)
    loop = make_loop(options=options, student=net(student, 0), teacher=teacher)
    completed, projector, classifier = loop.task.nets["student"], "model.projector.6.weight", "model.classifier.weight"
    assert isinstance(completed.model, ReusedClassifier)
    assert not list(loop.task.loss.parameters())
    before = {key: value.clone() for key, value in completed.state_dict().items()}
    loop.folder.start({}, None)
    loop.task(loop.task.prepare(loop.loader.next(), 0.0))["loss"].backward()
    assert all(values.grad is not None for values in completed.parameters() if values.requires_grad)  # as DDP demands
    results = loop.run()
    after = completed.state_dict()
    assert not torch.equal(after[projector], before[projector])
    assert torch.equal(after[classifier], before[classifier])
    assert torch.equal(after[classifier], teacher.model.fc.weight)
    assert completed.model.classifier.weight.data_ptr() != teacher.model.fc.weight.data_ptr()
    assert not any(values.requires_grad for values in completed.model.student.get_classifier().parameters())
    assert {"ce", "simkd", "top1"} <= results["last"]["train"].keys()

    path = tmp_path / "run" / "last" / "student.safetensors"
    again = load_simkd(create_model(student, 3), path)
    assert all(map(torch.equal, again.state_dict().values(), completed.model.state_dict().values()))
    normalisation = read_origin(path).normalisation
    assert normalisation is not None
    nets = {"again": Normalized(again, *normalisation), "trained": completed}
    found = evaluate(nets, loop.val_loader, loop.accelerator)
    assert found["again"] == pytest.approx(found["trained"], rel=1e-6)
    with pytest.raises(ValueError, match="is not of this model, check the model's name"):
        load_weights(create_model(student, 3), path)
    torch.save(create_model(student, 3).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="holds no student of SimKD: read it with load_weights"):
        load_simkd(create_model(student, 3), tmp_path / "plain.pt")

    resumed = make_loop(
        options=distill_options(loss=SimKD(), ema=0.5), student=net(student, 2), teacher=net("resnet14", 1)
    )
    resumed.load()
    assert all(map(torch.equal, resumed.task.nets["student"].state_dict().values(), completed.state_dict().values()))


def test_a_larger_map_of_the_student_is_pooled_to_the_teachers(make_loop, distill_options):
    loop = make_loop(
        options=distill_options(loss=SimKD(reduction=4)), student=net("resnet8", 0), teacher=net("vgg8", 1)
    )
    assert loop.task.nets["student"].model._size == (1, 1)
    fed = loop.task.prepare(loop.loader.next(), 0.0)
    torch.compiler.reset()
    compiled = torch.compile(loop.task.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(fed), loop.task(fed))
    given = loop.task.nets["student"].outputs(torch.zeros(2, 3, 12, 12), features=True)
    assert [tuple(feature.shape[1:]) for feature in given.features[-2:]] == [(512, 1, 1), (512,)]


def test_simkd_goes_with_losses_on_logits(make_loop, distill_options):
    loss = WeightedSum([SimKD(), KD(ce_weight=0, kd_weight=1)])
    loop = make_loop(options=distill_options(loss=loss, joint_forward=True, augmentation="mixup"),
                     student=net("resnet8", 0), teacher=net("resnet14", 1))  # fmt: skip
    loop.step()
    assert isinstance(loop.task.nets["student"].model, ReusedClassifier)
    loss = WeightedSum([SimKD(), OFD()])
    with pytest.raises(ValueError, match="SimKD changes the student's features, which OFD would compare: sum it with"):
        make_loop("other", options=distill_options(loss=loss), student=net("resnet8", 0), teacher=net("resnet14", 1))


@pytest.mark.parametrize("student", ["resnet8", "ShuffleV2_0_3"])
def test_ofd_takes_the_norms_of_a_folded_teacher(make_loop, distill_options, student):
    teacher = net("resnet14", 1)
    loop = make_loop(options=distill_options(loss=OFD()), student=net(student, 0), teacher=teacher)
    assert loop.task.teacher.folded > 0
    assert [norm.num_features for norm in loop.task.teacher.norms] == [16, 32, 64]
    assert loop.task.loss.margin2.shape == (64, 1, 1)
    loop.step()
    assert Teacher(net("resnet14", 1), fold_bn=False).norms[0].weight.shape == (16,)


def test_semckd_has_the_batch_of_a_process(make_loop, distill_options):
    loop = make_loop(options=distill_options(loss=SemCKD(), accumulation=2), student=net("resnet8", 0),
                     teacher=net("resnet14", 1))  # fmt: skip
    assert loop.task.loss.batch == 16
    loop.step()


def test_tokens_learn_from_a_teacher_whose_features_nobody_asks_for(make_loop, distill_options):
    student = net("timm:deit_tiny_distilled_patch16_224", 0, **TOKENS)
    loop = make_loop(options=distill_options(loss=DistillationToken()), student=student, teacher=net("resnet8", 1))
    fed = loop.task.prepare(loop.loader.next(), 0.0)
    assert not fed.teacher.features
    loop.task(fed)["loss"].backward()
    assert student.model.head_dist.weight.grad is not None
    cache: Any = SimpleNamespace()  # is no teacher, and has no features
    build_loss(DistillationToken(), loop.task.student, cache, loop.task.augmenter, 3, 12, [0] * 96)
    with pytest.raises(ValueError, match="DistillationToken compares the original images alone"):
        make_loop("mixed", options=distill_options(loss=DistillationToken(), augmentation="cutmix"), student=student)
    with pytest.raises(ValueError, match="DistillationToken needs a student with two heads of 3 classes"):
        make_loop("other", options=distill_options(loss=DistillationToken()), student=net("resnet8", 0))
