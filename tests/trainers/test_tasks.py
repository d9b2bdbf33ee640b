"""Ways to train and losses from outside of the package; frozen parts; several nets in one loop."""

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.checkpoints import load_weights
from dalikd.kd.losses import CRD, DKD, KD, MLKD, DistillationLoss, StepOutputs
from dalikd.kd.teacher import Teacher
from dalikd.tools.distill import main as distill
from dalikd.tools.train import main as train
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.loop import Loop
from dalikd.trainers.tasks.base import Task
from dalikd.trainers.tasks.distill import build_loss
from dalikd.trainers.tasks.supervised import TrainOptions
from dalikd.trainers.tracking import RunFolder

OUTSIDE = """
from torch.nn import functional

from dalikd.kd.losses import DistillationLoss, cross_entropy
from dalikd.trainers.tasks.mutual import Mutual, MutualOptions


class Attention(DistillationLoss):
    \"\"\"Attention transfer.

    Args:
        weight: Of the maps.
    \"\"\"

    needs = frozenset({"features"})

    def __init__(self, weight: float = 1000.0) -> None:
        super().__init__()
        self.weight = weight

    def build(self, context) -> None:
        self.seen = [tuple(feature.shape[1:]) for feature in context.student.features]

    def forward(self, outputs):
        def attention(feature):
            return functional.normalize(feature.float().square().mean(1).flatten(1), dim=1)

        pairs = zip(outputs.student.features[1:-1], outputs.teacher.features[1:-1], strict=True)
        at = sum((attention(own) - attention(other)).square().mean() for own, other in pairs)
        ce = cross_entropy(outputs.student.logits, outputs.labels)
        return {"loss": ce + self.weight * at, "ce": ce, "at": at}


class Asked(Mutual):
    \"\"\"Nets that teach each other, with a state beside their weights.\"\"\"

    def get_extra_state(self):
        return {"asked": 7}

    def set_extra_state(self, state):
        self.read = state["asked"]


class AskedOptions(MutualOptions):
    \"\"\"Train nets that teach each other.\"\"\"

    def build(self, setup):
        task = super().build(setup)
        return Asked([*task.nets.values()], task.augmenter)
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "outside_of_dalikd.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "outside_of_dalikd.Attention"
    sys.modules.pop("outside_of_dalikd", None)


def _resnet(seed: int, classes: int = 3) -> Normalized:
    torch.manual_seed(seed)
    return Normalized(create_model("resnet8", classes), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("augmentation", ["identity", "cutmixpick_teacher", "manifold_mixup"])
def test_a_loss_on_features_comes_from_a_file_of_the_users(outside, tree, tmp_path, augmentation):
    torch.manual_seed(0)
    torch.save(create_model("resnet14", 3).state_dict(), tmp_path / "teacher.pt")
    words = ["--data.root", str(tree), "--data.image_size", "32", "--data.threads", "1", "--device", "cpu"]
    words += ["--model", "resnet8", "--teacher.name", "resnet14", "--teacher.weights", str(tmp_path / "teacher.pt")]
    words += [
        "--import",
        "outside_of_dalikd",
        "--loss",
        outside,
        "--loss.weight",
        "10",
        "--augmentation",
        augmentation,
        "--epochs",
        "1",
    ]
    distill([*words, "--batch_size", "72", "--mix.group", "8", "--output", str(tmp_path / "run")])
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"at":' in log
    load_weights(create_model("resnet8", 3), tmp_path / "run" / "last" / "student.safetensors")


def test_the_teachers_features_are_those_of_the_originals(outside, make_loop, distill_options):
    module, _, name = outside.rpartition(".")
    loss = getattr(import_module(module), name)()
    teacher, student = _resnet(1), _resnet(0)
    for augmentation, joint in (("identity", False), ("mixup", True), ("cutmixpick_student", False)):
        options = distill_options(augmentation=augmentation, loss=loss, joint_forward=joint)
        loop = make_loop(augmentation, options=options, student=student, teacher=deepcopy(teacher))
        batch = loop.loader.next()
        fed = loop.task.prepare(batch, 0.0)
        expected = teacher.eval().outputs(batch.pixels, features=True)
        for found, wanted in zip(fed.teacher.features, expected.features, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert list(loop.task(fed)) == ["loss", "ce", "at", "top1"]
        assert loss.seen[-1] == (64,)
        loop.step()


class _Hint(DistillationLoss):
    """A connector made from the nets' shapes, a memory of its own, and the teacher's classifier."""

    needs = frozenset({"preactivations", "teacher_classifier"})
    local_buffers = ("memory",)

    def build(self, context):
        (_, own, *_), (_, other, *_) = (net.preactivations[1].shape for net in (context.student, context.teacher))
        self.connector = nn.Conv2d(own, other, 1)
        self.register_buffer("memory", torch.zeros(context.images, context.classes))
        self.classifier = [context.teacher_classifier]

    def forward(self, outputs: StepOutputs):
        hint = functional.mse_loss(self.connector(outputs.student.preactivations[1]), outputs.teacher.preactivations[1])
        with torch.no_grad():
            self.memory[outputs.ids] = outputs.student.logits + outputs.epoch
        reused = self.classifier[0](outputs.student.features[-1])
        return {"loss": hint + functional.cross_entropy(reused, outputs.labels), "hint": hint}


def test_a_loss_is_built_from_the_nets_and_trained_along(make_loop, distill_options):
    torch.manual_seed(1)
    teacher = Normalized(create_model("resnet8", 3), (0.5,) * 3, (0.25,) * 3)
    loop = make_loop(options=distill_options(loss=_Hint()), student=_resnet(0), teacher=teacher)
    before = loop.task.loss.connector.weight.clone()
    assert loop.task.local_buffers == ["loss.memory"]
    assert loop.task.loss.classifier[0] is loop.task.teacher.model.model.fc
    loop.step()
    assert not torch.equal(loop.task.loss.connector.weight, before)
    assert (loop.task.loss.memory != 0).any(dim=1).sum() == 32
    assert not any("connector" in key for key in loop.task.nets["student"].state_dict())


def test_memories_are_saved_with_the_run_and_never_with_the_student(make_loop, distill_options):
    def start(name: str) -> Loop:
        options = distill_options(loss=CRD(nce_k=7, feat_dim=4), ema=0.5)
        return make_loop(name, options=options, student=_resnet(0), teacher=_resnet(1))

    straight, first = start("straight"), start("first")
    assert first.task.local_buffers[:2] == ["loss.student_memory", "loss.teacher_memory"]
    for _ in range(2):
        straight.step()
        first.step()
    first.save()
    resumed = start("first")
    resumed.load()
    assert not any("memory" in key for key in load_file(first.folder.path / "last" / "student.safetensors"))
    for _ in range(2):
        straight.step()
        resumed.step()
    assert resumed.task.loss.steps == 4
    for key, value in resumed.task.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, straight.task.state_dict()[key], rtol=0, atol=1e-6, msg=key)


def test_a_connector_has_the_type_of_the_student(make_loop, distill_options):
    loop = make_loop(options=distill_options(loss=_Hint()), student=_resnet(0).double(), teacher=_resnet(1).double())
    loop.step()
    assert loop.task.loss.connector.weight.dtype == torch.float64


def test_the_teachers_features_do_not_keep_the_pool(make_loop, distill_options):
    options = distill_options(loss=_Hint(), augmentation="cutmixpick_teacher")
    task = (loop := make_loop(options=options, student=_resnet(0), teacher=_resnet(1))).task
    fed = task.prepare(loop.loader.next(), 0.0)
    kept = (fed.teacher.features[0], fed.teacher.preactivations[1])
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept)


def test_what_a_loss_needs_and_cannot_have_is_named(make_loop, distill_options):
    options = distill_options(loss=_Hint(), augmentation="manifold_mixup")
    with pytest.raises(
        ValueError, match=r"_Hint compares what comes before the stages' last ReLU, where manifold_mixup"
    ):
        make_loop(options=options, student=_resnet(0), teacher=_resnet(1))
    with pytest.raises(ValueError, match="SmallNet gives no features before their last ReLU: take another net"):
        make_loop(options=distill_options(loss=_Hint()))
    task = make_loop("plain", options=distill_options(), student=_resnet(0), teacher=_resnet(1)).task
    cache: Any = SimpleNamespace()
    with pytest.raises(ValueError, match=r"_Hint needs the teacher's preactivations, teacher_classifier, and a cache"):
        build_loss(_Hint(), task.student, cache, task.augmenter, 3, 12, [0] * 96)


def test_augmented_images_that_a_loss_would_not_look_at_are_refused(make_loop, distill_options):
    with pytest.raises(ValueError, match=r"DKD compares the original images alone, .* from what cutmix makes"):
        make_loop(options=distill_options(loss=DKD(), augmentation="cutmix"))
    make_loop("both", options=distill_options(loss=DKD(kd_mix_share=1.0), augmentation="cutmix"))
    with pytest.raises(ValueError, match="MLKD compares two views of each image: give the second with --augmentation"):
        make_loop("one", options=distill_options(loss=MLKD(), augmentation="identity"))
    with pytest.raises(ValueError, match=r"needs one augmented image for each original, and cutmixpick_teacher picks"):
        make_loop("picks", options=distill_options(loss=MLKD(), augmentation="cutmixpick_teacher"))


# ------------------------------------------------------------------------------------------------ other ways


def _loop_of(task: Task, like: Loop, folder: Path, **options) -> Loop:
    options = TrainOptions(**{"batch_size": 32, "mix": MixOptions(group=8), "epochs": 2, "ema": 0.5, **options})
    return Loop(task, like.loader, like.val_loader, options, like.accelerator, RunFolder(folder, True), {})


def test_a_way_to_train_comes_from_a_file_of_the_users(outside, tree, tmp_path):
    """By the class path of its options, whose fields are options; no file of the package knows of it."""
    words = ["--task", outside.replace("Attention", "AskedOptions"), "--peers", "[resnet14]", "--model", "resnet8"]
    words += ["--epochs", "2", "--import", "outside_of_dalikd"]
    words += ["--data.root", str(tree), "--data.image_size", "32", "--data.threads", "1", "--device", "cpu"]
    folder = tmp_path / "run"
    train([*words, "--batch_size", "72", "--mix.group", "8", "--ema", "0.5", "--output", str(folder)])
    results = json.loads((folder / "results.json").read_text())
    assert results["finished"]
    assert results["last"]["epoch"] == 2
    for name, model in (("net0", "resnet8"), ("net1", "resnet14")):
        load_weights(create_model(model, 3), folder / "last" / f"{name}.safetensors")
    first = (folder / "last" / "net0.safetensors").read_bytes()
    train(
        ["--resume", str(folder), "--epochs", "3", "--import", "outside_of_dalikd"]
    )  # the task is named in the folder's config
    assert json.loads((folder / "results.json").read_text())["last"]["epoch"] == 3
    assert (folder / "last" / "net0.safetensors").read_bytes() != first


def test_several_nets_are_averaged_evaluated_saved_and_resumed(outside, make_loop, make_net, tmp_path):
    asked, like = import_module(outside.partition(".")[0]).Asked, make_loop()
    loop = _loop_of(asked((make_net(0), make_net(1)), like.task.augmenter), like, tmp_path / "mutual")
    loop.folder.start({}, None)
    results = loop.run()
    files = ["net0-ema.safetensors", "net0.safetensors", "net1-ema.safetensors", "net1.safetensors"]
    assert sorted(path.name for path in (tmp_path / "mutual" / "last").glob("*.safetensors")) == files
    val = results["last"]["val"]
    assert val["nets"]["net0"]["loss"] == val["loss"] != val["nets"]["net1"]["loss"]
    assert results["evaluated"] == "net0-ema.safetensors"
    assert {"ce0", "ce1", "kl0", "kl1"} < results["last"]["train"].keys()

    again = _loop_of(asked((make_net(2), make_net(3)), like.task.augmenter), make_loop(), tmp_path / "mutual", epochs=3)
    again.load()
    assert again.task.read == 7
    for name, net in again.task.nets.items():
        assert all(map(torch.equal, net.state_dict().values(), loop.task.nets[name].state_dict().values()))
        pairs = zip(again.averages[name].module.parameters(), loop.averages[name].module.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_a_frozen_part_stays_as_it_is(make_loop):
    """Only the classifier has gradients; running statistics of what is before it stay, bit for bit."""
    student = _resnet(0)
    student.requires_grad_(False)
    student.model.fc.requires_grad_(True)
    loop = make_loop(student=student)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    loop.folder.start({}, None)
    loop.run()
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"model.fc.weight", "model.fc.bias"}
    assert student.training
    assert not student.model.layer1.training


def test_a_compiler_sees_one_graph_of_a_task(make_loop, distill_options):
    for options in (
        distill_options(augmentation="cutmixpick_teacher"),
        TrainOptions(batch_size=32, mix=MixOptions(group=8)),
    ):
        loop = make_loop(type(options).__name__, options=options)
        fed = loop.task.prepare(loop.loader.next(), 0.5)
        compiled = torch.compile(loop.task.forward, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(fed), loop.task(fed))
        torch.compiler.reset()


@pytest.mark.parametrize("kind", ["distillation", "without metric", "supervised"])
def test_a_state_of_an_earlier_form_is_taken(make_loop, distill_options, kind):
    """It kept one average, and the metric's state beside the task."""
    options = distill_options(ema=0.5, metric=kind == "distillation")
    if kind == "supervised":
        options = TrainOptions(batch_size=32, mix=MixOptions(group=8), ema=0.5)
    loop = make_loop(options=options)
    loop.step()
    loop.save()
    state = torch.load(loop.folder.state_file, weights_only=True)
    state["method"], state["average"] = state["task"].pop("_extra_state"), state.pop("averages")["student"]
    torch.save(state, loop.folder.state_file)
    again = make_loop(options=options)
    again.load()
    assert again.task.metrics() == loop.task.metrics()
    pairs = zip(
        again.averages["student"].module.parameters(), loop.averages["student"].module.parameters(), strict=True
    )
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_teacher_is_no_part_of_a_task(make_loop, distill_options):
    task = make_loop(options=distill_options(loss=KD())).task
    assert isinstance(task.teacher, Teacher)
    assert {key.split(".")[0] for key in task.state_dict()} == {"student", "_extra_state"}
