from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dalikd.kd.backbones import NetOutput, create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.entropy_log import EntropyLog
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.losses import KD, MixedOutputs, StepOutputs, kd_loss
from dalikd.kd.manifold import manifold_mixup, mixed_forward
from dalikd.kd.mixing import Mixed, cutmix
from dalikd.kd.picking import entropy, pick_rows
from dalikd.kd.teacher import Branch, batch_statistics, teacher_pass
from dalikd.pipelines.draw_spec import MixDraws
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.tasks.distill import DistillationInputs, SharedPass
from dalikd.trainers.teacher_step import StudentScores, gather_outputs, score_groups, score_groups_at_once

GROUP = 8


def _count_teacher_rows(loop):
    rows, net = [], loop.task.teacher.model
    net.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize(
    ("augmentation", "seen"),
    [
        ("identity", 32),
        ("flip", 64),
        ("cutout", 64),
        ("mixup", 64),
        ("cutmixpick_teacher", 32 + 3 * 32),
        ("cutmixpick_student", 64),
    ],
)
def test_the_teacher_is_asked_once(make_loop, distill_options, augmentation, seen):
    loop = make_loop(options=distill_options(augmentation=augmentation, mix=MixOptions(group=8, n_run=3)))
    rows = _count_teacher_rows(loop)
    loop.step()
    loop.step()
    assert rows == [seen, seen]


@pytest.mark.parametrize("augmentation", ["identity", "cutmix", "cutmixpick_teacher"])
def test_the_task_is_fed_with_what_the_teacher_gives(make_loop, distill_options, augmentation):
    loop = make_loop(options=distill_options(augmentation=augmentation))
    batch = loop.loader.next()
    pixels, (logits, *_), labels, ids, epoch, augmented, augmented_logits, own_labels, partner_labels, lam, hidden = (
        loop.task.prepare(batch, 1.5)
    )
    teacher = loop.task.teacher
    assert torch.equal(ids, batch.ids)
    assert (epoch.item(), hidden) == (1.5, None)
    assert torch.equal(pixels, batch.pixels)
    assert torch.equal(labels, batch.labels)
    torch.testing.assert_close(logits, teacher(pixels))
    if augmentation == "identity":
        assert augmented is None
        assert augmented_logits is logits
        assert torch.equal(own_labels, labels)
        assert torch.equal(partner_labels, labels)
        return
    torch.testing.assert_close(augmented_logits, teacher(augmented))
    assert ((lam >= 0) & (lam <= 1)).all()
    if augmentation == "cutmix":
        assert torch.equal(own_labels, labels)
        assert torch.equal(partner_labels, labels[batch.mix[0].partner])
    else:
        pool = torch.cat([cutmix(batch.pixels, draws).images for draws in batch.mix])
        picks = pick_rows(entropy(teacher(pool)).reshape(2, 32), GROUP)
        assert torch.equal(augmented, pool[picks])
        assert torch.equal(own_labels, labels.repeat(2)[picks])
        assert not torch.equal(own_labels, labels)
        assert torch.equal(partner_labels, labels[torch.cat([draws.partner for draws in batch.mix])[picks]])


def test_the_student_scores_each_group_by_its_own_statistics(make_loop, distill_options, make_net):
    """Picks of the student: brute force over groups, each pool normalised by itself, running statistics untouched."""
    student = make_net()
    loop = make_loop(options=distill_options(augmentation="cutmixpick_student"), student=student)
    loop.model.train()
    batch, state = loop.loader.next(), {key: value.clone() for key, value in student.state_dict().items()}
    augmented = loop.task.prepare(batch, 0.0).augmented
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
    pool = torch.stack([cutmix(batch.pixels, draws).images for draws in batch.mix])
    expected = []
    with torch.no_grad():
        for start in range(0, 32, GROUP):
            candidates = pool[:, start : start + GROUP].flatten(0, 1)
            kept = entropy(student.train()(candidates)).argsort(stable=True)[-GROUP:].sort().values
            expected.append(candidates[kept])
    assert torch.equal(augmented, torch.cat(expected))


def test_a_fixed_student_scores_by_its_running_statistics(make_net, accelerator):
    student, images = make_net().double().eval(), torch.rand(2 * 16, 3, 12, 12).double() * 255
    found = StudentScores(student, accelerator, GROUP, runs=2)(images)
    with torch.no_grad():
        torch.testing.assert_close(found, student(images), rtol=0, atol=1e-12)
        torch.testing.assert_close(score_groups(student, images, 16, GROUP), found, rtol=0, atol=1e-12)
    assert not student.training


@pytest.mark.parametrize("batch", [24, 20])
def test_scores_do_not_depend_on_the_batch_size(make_net, batch):
    """A batch with a whole or a short last group, against its groups one by one."""
    student = make_net().double()
    images = torch.randint(0, 256, (2, batch, 3, 12, 12), generator=torch.Generator().manual_seed(0)).byte()
    whole = score_groups(student, images.flatten(0, 1), batch, GROUP).reshape(2, batch, 3)
    for start in range(0, batch, GROUP):
        piece = images[:, start : start + GROUP]
        alone = score_groups(student, piece.flatten(0, 1), piece.shape[1], GROUP).reshape(2, -1, 3)
        torch.testing.assert_close(whole[:, start : start + GROUP], alone, rtol=0, atol=1e-12)


def test_synchronised_norms_score_by_their_own_group_and_keep_the_activation(make_loop, distill_options, monkeypatch):
    """One of several processes asks no other one; torch's own conversion would drop timm's activations."""
    torch.manual_seed(0)
    student = Normalized(create_model("timm:mobilenetv3_small_050", 3), (0.5,) * 3, (0.5,) * 3).double()
    images = torch.randint(0, 256, (2 * 16, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    scores = score_groups(student.train(), images, 16, GROUP)
    expected = student.eval()(images)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    student = make_loop(options=distill_options(sync_bn=True), student=student).task.student
    torch.testing.assert_close(student.eval()(images), expected)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input"):  # it would ask the others
        student.train()(images)
    torch.testing.assert_close(score_groups(student, images, 16, GROUP), scores)


@pytest.mark.parametrize("name", ["resnet8", "timm:mobilenetv3_small_050"])
@pytest.mark.parametrize("training", [True, False])
def test_one_forward_over_all_groups_scores_as_one_by_one(name, training):
    torch.manual_seed(0)
    student = Normalized(create_model(name, 3), (0.5,) * 3, (0.5,) * 3).double().train(training)
    images = torch.randint(0, 256, (2 * 24, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    expected, state = score_groups(student, images, 24, GROUP), deepcopy(student.state_dict())
    with torch.no_grad(), batch_statistics(student) if training else nullcontext():
        found = score_groups_at_once(student, images, 24, GROUP)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())


def _resnet(seed):
    torch.manual_seed(seed)
    return Normalized(create_model("resnet8", 3), (0.5,) * 3, (0.5,) * 3).double()


def _mixed_pool(batch, runs=2):
    """Candidates whose hidden states are mixed, with partners inside of their groups."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, 12, 12), generator=generator).double()
    pool = []
    for _ in range(runs):
        partner = [
            start + torch.randperm(min(GROUP, batch - start), generator=generator) for start in range(0, batch, GROUP)
        ]
        lam, center = torch.rand(batch, generator=generator), torch.zeros(batch, 2)
        layer = torch.randint(0, 3, (batch,), generator=generator).int()
        pool.append(manifold_mixup(pixels, MixDraws(torch.cat(partner), lam, center, layer=layer)))
    return pixels, Mixed.join(pool)


def test_candidates_mixed_inside_are_scored_group_by_group_too():
    student, (pixels, pool) = _resnet(0), _mixed_pool(20)
    state = {key: value.clone() for key, value in student.state_dict().items()}
    found = score_groups(student, torch.cat((pixels, pool.images)), 20, GROUP, pool.hidden)
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
    places = torch.arange(40).reshape(2, 20)
    expected = torch.empty(60, 3, dtype=torch.float64)
    student.train()
    for start in range(0, 20, GROUP):
        rows = torch.arange(start, min(start + GROUP, 20))
        part = pool.take(places[:, rows].flatten())
        mixing = part.hidden._replace(partner=part.partner - start)
        with torch.no_grad():
            first, second = mixed_forward(student, pixels[rows], part.images, mixing, joint=False)
        expected[rows], expected[20 + places[:, rows].flatten()] = first.logits, second
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_pick", [5, 12])
@pytest.mark.parametrize("augmentation", ["cutmixpick_teacher", "cutmixpick_student"])
def test_a_group_may_keep_another_number_of_picks(make_loop, distill_options, augmentation, n_pick):
    """More or fewer augmented images than originals: labels, loss, metric and step go along."""
    loss = KD(ce_mix_share=1.0)
    mix = MixOptions(group=8, n_pick=n_pick)
    loop = make_loop(options=distill_options(augmentation=augmentation, loss=loss, mix=mix))
    batch = loop.loader.next()
    fed = loop.task.prepare(batch, 0.0)
    pixels, _, labels, _, _, augmented, augmented_logits, own_labels, partner_labels, lam, _ = fed
    assert len(pixels) == 32
    assert {len(rows) for rows in (augmented, augmented_logits, own_labels, partner_labels, lam)} == {4 * n_pick}
    runs = [cutmix(batch.pixels, draws) for draws in batch.mix]
    pool, partner = torch.cat([run.images for run in runs]), torch.cat([run.partner for run in runs])
    places = [
        next(place for place, candidate in enumerate(pool) if torch.equal(candidate, image)) for image in augmented
    ]
    assert torch.equal(own_labels, labels[torch.tensor(places) % 32])
    assert torch.equal(partner_labels, labels[partner[places]])
    torch.testing.assert_close(augmented_logits, loop.task.teacher(augmented))
    loop.step()
    assert loop.task.goodness.originals == 2 * 32
    assert loop.task.goodness.compute().images == 2 * (32 + 4 * n_pick)


@pytest.mark.parametrize("joint", [False, True])
def test_hidden_states_are_mixed_in_both_nets(make_loop, distill_options, joint):
    student, teacher = _resnet(0), _resnet(1)
    loop = make_loop(
        options=distill_options(augmentation="mixup", joint_forward=joint), student=student, teacher=teacher
    )
    pixels, mixed = _mixed_pool(32, runs=1)
    batch = loop.loader.next()
    loop.task._pass = SharedPass(lambda _: teacher_pass(loop.task.teacher, pixels, [mixed], [Branch((0,))]))
    fed = loop.task.prepare(batch, 0.0)._replace(pixels=pixels)
    expected = mixed_forward(teacher, pixels, mixed.images, mixed.hidden, joint=True)
    expected = expected[0].logits, expected[1]
    torch.testing.assert_close((fed.teacher.logits, fed.augmented_logits), expected, rtol=0, atol=1e-10)
    assert torch.equal(fed.augmented_labels, fed.labels)
    assert torch.equal(fed.partner_labels, fed.labels[mixed.partner])
    terms = loop.model(fed)
    found, augmented = mixed_forward(student, pixels, mixed.images, mixed.hidden, joint=joint)
    for name, output, target in zip(("kd", "kd_mix"), (found.logits, augmented), expected, strict=True):
        torch.testing.assert_close(terms[name], kd_loss(output, target, 4.0), rtol=0, atol=1e-10)
    terms["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


# --------------------------------------------------------------------------------------------------- the task


def _task_inputs() -> DistillationInputs:
    generator = torch.Generator().manual_seed(0)
    pixels, augmented = torch.randint(0, 256, (2, 16, 3, 12, 12), generator=generator).byte()
    logits, augmented_logits = torch.randn(2, 16, 3, generator=generator)
    labels, lam, ids = torch.arange(16) % 3, torch.rand(16, generator=generator), torch.arange(16)
    return DistillationInputs(
        pixels, NetOutput(logits), labels, ids, torch.zeros(()), augmented, augmented_logits, labels.roll(1),
        labels.flip(0), lam,
    )  # fmt: skip


@pytest.fixture
def make_task(make_loop, distill_options):
    def make(student, loss, joint):
        return make_loop(options=distill_options(loss=loss, joint_forward=joint), student=student).task

    return make


def _expected(student, loss, fed):
    mixed = MixedOutputs(
        student(fed.augmented), fed.augmented_logits, fed.augmented_labels, fed.partner_labels, fed.lam
    )
    return loss(StepOutputs(NetOutput(student(fed.pixels)), fed.teacher, fed.labels, fed.ids, fed.epoch, mixed))


@pytest.mark.parametrize("joint", [False, True])
def test_the_terms_are_those_of_the_loss(make_net, make_task, joint):
    """Both ways agree where no batch statistics are involved."""
    student, loss, fed = make_net(norm=False), KD(ce_mix_share=0.5, kd_mix_share=2.0), _task_inputs()
    terms, expected = make_task(student, loss, joint)(fed), _expected(student, loss, fed)
    assert list(terms) == [*expected, "top1"]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("count", [5, 40])
def test_there_may_be_another_number_of_augmented_images(make_net, make_task, joint, count):
    student, loss, fed = make_net(norm=False), KD(ce_mix_share=0.5, kd_mix_share=2.0), _task_inputs()
    rows = torch.arange(count) * 3 % 16
    fed = DistillationInputs(*fed[:5], *(part[rows] for part in fed[5:10]))
    terms = make_task(student, loss, joint)(fed)
    for name, value in _expected(student, loss, fed).items():
        torch.testing.assert_close(terms[name], value)


@pytest.mark.parametrize(("joint", "calls"), [(False, [16, 16]), (True, [32])])
def test_joint_forward_is_one_forward(make_net, make_task, joint, calls):
    student, rows = make_net(), []
    student.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    make_task(student, KD(), joint)(_task_inputs())
    assert rows == calls


@pytest.mark.parametrize("joint", [False, True])
def test_identity_needs_one_student_forward(make_net, make_task, joint):
    student, rows = make_net(), []
    student.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    fed = _task_inputs()
    fed = fed._replace(augmented=None, augmented_logits=fed.teacher.logits, lam=torch.ones(16))
    terms = make_task(student, KD(), joint)(fed)
    assert rows == [16]
    torch.testing.assert_close(terms["kd_mix"], terms["kd"])


def test_parameters_of_the_loss_are_trained_along(make_net, make_loop, distill_options):
    class Weighted(KD):
        def __init__(self):
            super().__init__()
            self.bonus = torch.nn.Parameter(torch.ones(()))

        def forward(self, *args, **kwargs):
            terms = super().forward(*args, **kwargs)
            return {**terms, "loss": terms["loss"] * self.bonus}

    loop = make_loop(options=distill_options(loss=Weighted()), student=make_net())
    loop.step()
    assert loop.model.loss.bonus != 1
    assert not any("bonus" in key for key in loop.task.student.state_dict())
    assert not any("teacher" in key for key in loop.state_dict()["task"])


# -------------------------------------------------------------------------------------------------- the metric


@pytest.mark.parametrize("augmentation", ["identity", "cutmixpick_teacher"])
def test_the_metric_streams_the_same_pass(make_loop, distill_options, augmentation):
    loop = make_loop(options=distill_options(augmentation=augmentation))
    loop.task.goodness = TeacherStddev(3, window=20)
    expected, inputs = TeacherStddev(3, window=20), loop.task.prepare

    def listening(batch, epoch):
        fed = inputs(batch, epoch)
        expected.update(fed.teacher.logits, fed.augmented_logits)
        return fed

    loop.task.prepare = listening
    for _ in range(3):
        loop.step()
    result = expected.compute()
    assert result.windows == 9
    assert loop.task.metrics() == {"t_stddev": result.stddev, "t_entropy": result.entropy, "windows": 9}


def test_the_metric_can_be_left_out(make_loop, distill_options):
    loop = make_loop(options=distill_options(metric=False))
    loop.step()
    assert loop.task.metrics() == loop.task.get_extra_state() == {}


@pytest.mark.parametrize("augmentation", ["cutmixpick_teacher", "cutmixpick_student", "mixup", "identity"])
def test_entropies_are_logged_by_the_net_that_picks(make_loop, distill_options, augmentation):
    """The student's are those of its own batch statistics, before the step; the log goes on with a resumed run."""
    loop = make_loop(options=distill_options(augmentation=augmentation))
    task = loop.task
    task.entropy_log = EntropyLog(2)
    batch = loop.loader.next()
    logits = task._pass(batch, 0, turned=False)[0].originals.logits
    by_student = augmentation == "cutmixpick_student"
    expected = score_groups(task.student, batch.pixels, 32, 8) if by_student else logits
    task.prepare(batch, 0.0)
    for _ in range(3):
        task.prepare(loop.loader.next(), 0.0)
    found = task.entropy_log.arrays()
    assert found["steps"].tolist() == [0, 2]
    runs = {"mixup": 1, "identity": 1}.get(augmentation, 2)
    assert found["sizes"].tolist() == [[32, 32 * runs, 32]] * 2
    np.testing.assert_allclose(found["originals"][0], entropy(expected), rtol=1e-5)
    assert (found["picks"].mean() > found["candidates"].mean()) == (runs == 2)

    resumed = make_loop("resumed", options=distill_options(augmentation=augmentation)).task
    resumed.entropy_log = EntropyLog(2)
    resumed.load_state_dict(task.state_dict())
    resumed.prepare(batch, 0.0)
    assert resumed.entropy_log.arrays()["steps"].tolist() == [0, 2, 4]


def test_one_process_gathers_nothing(accelerator):
    logits, augmented = torch.randn(2, 4, 3)
    found = gather_outputs(accelerator, [(logits, None), (augmented, None)], 4, 4, GROUP)
    assert found[0] is logits
    assert found[1] is augmented


@pytest.mark.parametrize(("total", "count", "n_pick", "picked"), [(7, 4, None, 7), (7, 2, 1, 4), (5, 6, 3, 8)])
def test_rows_of_all_processes_without_fillers(total, count, n_pick, picked):
    """Of two processes with two groups of two each, the second with fillers; picks may be more or fewer."""

    class TwoProcesses:
        num_processes = 2

        @staticmethod
        def gather(rows):
            return torch.cat((rows, rows + 100))

    logits, augmented = torch.randn(4, 3), torch.randn(count, 3)
    outputs = [(logits, None), (augmented, n_pick)]
    found = gather_outputs(TwoProcesses(), outputs, 4, total, 2)
    assert torch.equal(found[0], torch.cat((logits, logits + 100))[:total])
    assert torch.equal(found[1], torch.cat((augmented, augmented + 100))[:picked])
    short = gather_outputs(TwoProcesses(), [(logits[:0], None), (augmented[:0], n_pick)], 4, 4, 2)
    assert [len(rows) for rows in short] == [4, len(augmented)]  # of a process without rows
