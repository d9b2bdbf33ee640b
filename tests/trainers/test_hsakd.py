"""HSAKD's teacher, student and nets that learn together: each step against a plain one, and what is left out of it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import AT, HSAKD, KD, WeightedSum
from dalikd.pipelines.draw_spec import Batch
from dalikd.tools import evaluate, train
from dalikd.tools.cli import parse
from dalikd.tools.summary import print_training
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.evaluate import net_sums
from dalikd.trainers.launch import start
from dalikd.trainers.setup import open_run
from dalikd.trainers.tasks import distill as distill_file
from dalikd.trainers.tasks import supervised as supervised_file
from dalikd.trainers.tasks.mutual import HsakdMutual, MutualOptions
from dalikd.trainers.tasks.supervised import HsakdTeacher, SupervisedInputs, TrainOptions


def aux(seed: int = 0, name: str = "resnet8_aux") -> Normalized:
    torch.manual_seed(seed)
    return Normalized(create_model(name, 3), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def make_student_loop(make_loop, distill_options):
    """A loop of HSAKD's student; nets of its own, and the loss, may be given."""

    def make(augmentation="identity", loss=None, student=None, teacher=None, metric=False):
        options = distill_options(loss=loss or HSAKD(), augmentation=augmentation, metric=metric)
        return make_loop(options=options, student=student or aux(), teacher=teacher or aux(1))

    return make


def plainly_turned(pixels):
    return torch.stack([torch.rot90(pixels, turn, (2, 3)) for turn in range(4)], dim=1).flatten(0, 1)


def plain_kl(student, teacher, temperature=3.0):
    student, teacher = ((logits / temperature).softmax(1).log() for logits in (student, teacher))
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1).mean()


# -------------------------------------------------------------------------------------------------- the student


def test_a_students_step_is_the_plain_one(make_student_loop):
    loop = make_student_loop()
    task, batch = loop.task.double(), loop.loader.next()
    teacher = task.teacher.model.double()
    task.train()
    terms = task(task.prepare(batch, 0.0))
    turned = plainly_turned(batch.pixels)
    own, given = (net.outputs(turned, heads=True) for net in (task.student, teacher))
    expected = {
        "ce": functional.cross_entropy(own.logits[::4], batch.labels),
        "kd": plain_kl(own.logits, given.logits),
        "kd_heads": sum(plain_kl(*pair) for pair in zip(own.heads, given.heads, strict=True)),
    }
    expected["loss"] = sum(expected.values())
    expected["top1"] = (own.logits[::4].argmax(1) == batch.labels).double().mean()
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-6), name  # the teacher's batch norms are folded


@pytest.mark.parametrize(("augmentation", "rows"), [("identity", []), ("cutmix", [32]), ("cutmixpick_teacher", [64])])
def test_nothing_is_turned_asked_or_computed_twice(make_student_loop, monkeypatch, augmentation, rows):
    loop = make_student_loop(augmentation, HSAKD(kd_mix_share=1.0))
    teacher, seen, heads, turns = loop.task.teacher.model, [], [], []
    teacher.model.backbone.conv1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    teacher.model.auxiliary_classifier.register_forward_pre_hook(lambda _, args: heads.append(len(args[0][0])))
    turn = distill_file.rotations
    monkeypatch.setattr(distill_file, "rotations", lambda images: turns.append(len(images)) or turn(images))
    loop.step()
    assert (seen, heads, turns) == ([128, *rows], [128], [32])


@pytest.mark.parametrize("augmentation", ["cutmix", "cutmixpick_teacher", "cutmixpick_student"])
def test_augmented_images_are_compared_unturned(make_student_loop, augmentation):
    loop = make_student_loop(augmentation, HSAKD(kd_mix_share=1.0))
    task, batch = loop.task, loop.loader.next()
    fed = task.prepare(batch, 0.0)
    assert torch.equal(fed.pixels, plainly_turned(batch.pixels))
    torch.testing.assert_close(fed.augmented_logits, task.teacher(fed.augmented))
    terms = task(fed)
    assert list(terms) == ["loss", "ce", "kd", "kd_heads", "kd_mix", "top1"]
    terms["loss"].backward()
    assert all(values.grad is not None for values in task.student.parameters())


def test_t_stddev_and_other_losses_see_unturned_images(make_student_loop, make_loop, distill_options, monkeypatch):
    loop = make_student_loop(loss=WeightedSum([HSAKD(), AT(weight=1000.0, ce_weight=0.0)]), metric=True)
    loop.model.eval()
    batch, seen = loop.loader.next(), []
    monkeypatch.setattr(loop.task.goodness, "update", lambda *rows: seen.append(rows[0]))
    terms = loop.task(loop.task.prepare(batch, 0.0))
    torch.testing.assert_close(seen, [loop.task.teacher(batch.pixels)])
    nets = {"student": aux().requires_grad_(False), "teacher": aux(1)}
    plain = make_loop(options=distill_options(loss=AT(), mix=MixOptions(group=8), freeze_student=True), **nets)
    alone = plain.task.eval()(plain.task.prepare(batch, 0.0))
    assert terms["at"].item() == pytest.approx(alone["at"].item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(
        sum(terms[name].item() for name in ("ce", "kd", "kd_heads")) + 1000 * terms["at"].item(), rel=1e-6
    )


def test_a_compiler_sees_one_graph(make_student_loop):
    task = make_student_loop("cutmix", HSAKD(kd_mix_share=1.0)).task.eval()
    inputs = task.prepare(make_student_loop("cutmix", HSAKD(kd_mix_share=1.0)).loader.next(), 0.0)
    torch.testing.assert_close(torch.compile(task.forward, fullgraph=True, backend="eager")(inputs), task(inputs))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": aux(name="resnet8")}, "the student has no auxiliary heads, the teacher 3"),
        ({"teacher": aux(name="resnet8")}, "the student has 3 auxiliary heads, the teacher none"),
        ({"teacher": aux(name="vgg8_bn_aux")}, "the student has 3 auxiliary heads, the teacher 4: heads are compared"),
        ({"loss": KD()}, "--loss KD leaves the student's auxiliary heads without training: take --loss HSAKD"),
        ({"augmentation": "cutmix"}, "HSAKD compares the original images alone"),
        (
            {"augmentation": "manifold_mixup", "loss": HSAKD(kd_mix_share=1.0)},
            "HSAKD turns the original images, whose hidden states manifold_mixup mixes in unturned",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make_student_loop, options, message):
    with pytest.raises(ValueError, match=message):
        make_student_loop(**options)


# -------------------------------------------------------------------------------------------------- teachers


def test_a_teachers_heads_learn_class_and_turn_of_what_the_augmentation_gives(make_loop):
    loop = make_loop(options=TrainOptions(batch_size=32, mix=MixOptions(group=8), augmentation="mixup"), student=aux())
    assert isinstance(loop.task, HsakdTeacher)
    batch = loop.loader.next()
    fed = loop.task.prepare(batch, 0.0)
    assert isinstance(fed, SupervisedInputs)
    plain = supervised_file.Supervised(aux(name="resnet8"), loop.task.augmenter).prepare(batch, 0.0)
    torch.testing.assert_close(fed.pixels, plainly_turned(plain.pixels), rtol=0, atol=0)
    terms = loop.task(fed)
    assert list(terms) == ["loss", "ce", "ce_heads", "top1"]
    terms["ce_heads"].backward()
    first = loop.task.student.model.backbone.conv1.weight
    assert first.grad.abs().sum() > 0  # the heads teach the backbone


def test_a_frozen_backbone_stays_bit_for_bit(tree, tmp_path):
    """Two epochs with evaluations, from the weights of a net without heads; and its heads do learn."""
    torch.manual_seed(5)
    plain = create_model("resnet8", 3)
    torch.save({"net": plain.state_dict()}, tmp_path / "plain.pt")
    words = ["--data.root", str(tree), "--data.image_size", "32", "--device", "cpu", "--model", "resnet8_aux"]
    words += [
        "--weights",
        str(tmp_path / "plain.pt"),
        "--freeze_backbone",
        "true",
        "--batch_size",
        "32",
        "--mix.group",
        "8",
    ]
    words += ["--epochs", "2", "--schedule.milestones", "[]", "--output", str(tmp_path / "run"), "--ema", "0.5"]
    train.main(words)
    kept = plain.state_dict()
    for name in ("student", "ema"):
        backbone = load_file(tmp_path / "run" / "last" / f"{name}-backbone.safetensors")
        assert backbone.keys() == kept.keys()
        assert all(torch.equal(values, kept[key]) for key, values in backbone.items()), name
    torch.manual_seed(0)
    fresh = create_model("resnet8_aux", 3).auxiliary_classifier.state_dict()
    learned = load_file(tmp_path / "run" / "last" / "student.safetensors")
    assert not torch.equal(learned["auxiliary_classifier.fc1.weight"], fresh["fc1.weight"])
    # the backbone is a net of its own, and `evaluate` takes it, or the whole
    common = ["--data.root", str(tree), "--data.image_size", "32", "--device", "cpu", "--json"]
    figures = []
    for model, file in (("resnet8", "student-backbone"), ("resnet8", "student"), ("resnet8_aux", "student")):
        weights = str(tmp_path / "run" / "last" / f"{file}.safetensors")
        options, config = parse(
            "evaluate", [*common, str(tmp_path / "found.json"), "--model", model, "--weights", weights]
        )
        figures.append(evaluate.evaluate_net(options, config))
    assert len({round(figure["loss"], 5) for figure in figures}) == 1
    assert [name for name in figures[2] if name.startswith("head")] == [
        f"head{number}_{kind}" for number in (1, 2, 3) for kind in ("joint", "class")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet8_aux"], "--freeze_backbone true keeps a backbone as its weights are: give them with --we"),
        (
            ["--model", "resnet8", "--weights", "FILE"],
            "trains auxiliary heads alone, and resnet8 has none: take",
        ),
        (["--model", "resnet8_aux", "--weights", "FILE", "--reinit", "true"], "with --weights, without --reinit"),
        (["--model", "resnet14_aux", "--weights", "FILE"], "not of this model, check the model's name"),
    ],
)
def test_a_frozen_backbone_needs_weights_and_heads(tree, tmp_path, words, message):
    torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "plain.pt")
    words = [str(tmp_path / "plain.pt") if word == "FILE" else word for word in words]
    common = ["--data.root", str(tree), "--data.image_size", "32", "--device", "cpu", "--freeze_backbone", "true"]
    options, _ = parse("train", [*words, *common])
    with pytest.raises(ValueError, match=message):
        options.build(open_run(options, start("cpu", "fp32")))


# -------------------------------------------------------------------------------------------------- together


@pytest.fixture
def pair(make_loop):
    loop = make_loop()
    return HsakdMutual([aux(0), aux(1)], loop.task.augmenter), loop.loader.next()


def test_nets_that_learn_together_take_no_gradient_from_each_other(pair):
    task, batch = pair
    terms = task(task.prepare(batch, 0.0))
    assert list(terms) == ["loss", "ce", "ce_heads", "kd", "kd_heads", "top1"]
    alone = [HsakdTeacher(net, task.augmenter)(task.prepare(batch, 0.0)) for net in task.nets.values()]
    for name in ("ce", "ce_heads"):
        assert terms[name].item() == pytest.approx(sum(one[name].item() for one in alone), rel=1e-6)
    terms["loss"].backward()
    gradient = task.student.model.auxiliary_classifier.fc1.weight.grad.clone()
    for values in task.peers.parameters():
        values.requires_grad_(False)
    task.student.zero_grad()
    task(task.prepare(batch, 0.0))["loss"].backward()
    torch.testing.assert_close(task.student.model.auxiliary_classifier.fc1.weight.grad, gradient, rtol=1e-4, atol=1e-7)


def test_all_nets_need_equally_many_heads(make_loop):
    augmenter = make_loop().task.augmenter
    with pytest.raises(ValueError, match="the first net has 3 auxiliary heads, net1 4"):
        HsakdMutual([aux(), aux(name="vgg8_bn_aux")], augmenter)
    with pytest.raises(ValueError, match="the first net has 3 auxiliary heads, net1 none"):
        HsakdMutual([aux(), aux(name="resnet8")], augmenter)


def test_the_command_trains_a_pair_and_picks_its_temperature(tree):
    common = ["--data.root", str(tree), "--data.image_size", "32", "--device", "cpu"]
    for model, kind, temperature in (("resnet8_aux", "HsakdMutual", 3.0), ("resnet8", "Mutual", 1.0)):
        options, _ = parse("mutual", [*common, "--model", model])
        task = options.build(open_run(options, start("cpu", "fp32")))
        assert (type(task).__name__, task.temperature) == (kind, temperature)
        assert list(task.nets) == ["net0", "net1"]


# -------------------------------------------------------------------------------------------------- figures


def test_each_head_is_counted_a_quarter_for_each_turn():
    net, random = aux().double().eval(), np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (6, 3, 12, 12), dtype=np.uint8))
    labels = torch.from_numpy(random.integers(0, 3, 6))
    batch = Batch(pixels.permute(0, 2, 3, 1), (), labels, labels, (), 6)
    with torch.no_grad():
        found = net_sums(net, batch)
        heads = net.outputs(plainly_turned(pixels), heads=True).heads
    for number, head in enumerate(heads, start=1):
        joint = of_class = 0
        for row, logits in enumerate(head.numpy()):
            label, turn = labels[row // 4].item(), row % 4
            joint += logits.argmax() == 4 * label + turn
            of_class += logits.reshape(3, 4).sum(1).argmax() == label
        assert found[f"head{number}_joint"].item() == joint / 4
        assert found[f"head{number}_class"].item() == of_class / 4
    assert found["images"] == 6


def test_a_student_with_heads_is_distilled_by_hsakd_unless_another_loss_is_named():
    common = ["--teacher.name", "resnet20_aux", "--device", "cpu"]
    for words, loss in (
        (["--model", "resnet8_aux"], HSAKD),
        (["--model", "resnet8"], KD),
        (["--model", "resnet8_aux", "--loss", "KD"], KD),
    ):
        options, config = parse("distill", [*common, *words])
        assert type(options.loss) is loss
        assert config["loss"]["class_path"].rpartition(".")[2] == loss.__name__
    options, _ = parse("distill", [*common, "--model", "resnet8_aux", "--loss.temperature", "5"])
    assert (type(options.loss), options.loss.temperature) == (HSAKD, 5.0)


def test_each_net_that_learned_together_is_told(capsys, accelerator):
    val = {"top1": 0.5, "top5": 1.0, "loss": 1.25, "images": 4}
    nets = {"net0": val, "net1": {**val, "top1": 0.25}}
    epoch = {"epoch": 2, "val": {**val, "nets": nets}}
    print_training({"last": epoch, "best": epoch, "folder": "out", "evaluated": "net0.safetensors"}, accelerator)
    printed = capsys.readouterr().out
    assert "last epoch (2), net0: top1 50.00 %" in printed
    assert "last epoch (2), net1: top1 25.00 %" in printed


def test_the_heads_of_one_net_alone_are_trained_frozen():
    with pytest.raises(ValueError, match="--freeze_backbone true trains the heads of one net: use dalikd train"):
        MutualOptions(freeze_backbone=True, model="resnet8_aux", weights="some.pt")
