from dataclasses import replace

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.teacher import Teacher, teacher_pass
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.trainers.augmentation import AUGMENTATIONS, Augmenter, MixOptions
from dalikd.trainers.launch import automatic_mode, check_compiler
from dalikd.trainers.teacher_step import Branches, StudentScores, TeacherStep

GROUP = 8


@pytest.fixture
def batches(make_source):
    """Two batches of augmentations, the second one short, with a short last group."""

    def make(*names):
        source = make_source(44)
        view = View(source.image_size, "pad_crop", padding=1)
        augmenters = [Augmenter(name, MixOptions(group=GROUP), source, view, seed=3) for name in names]
        branches = Branches(augmenters)
        loader = Loader(source, Sampler(44, 24, 3, drop_last=False, group=GROUP), branches.draw_spec, threads=1)
        found = list(loader)
        loader.close()
        assert [len(batch) for batch in found] == [24, 20]
        return branches, found

    return make


@pytest.fixture
def nets(make_net, accelerator):
    """A teacher, and the scores of a student that does not learn."""
    student = make_net(2).double().eval().requires_grad_(False)
    return Teacher(make_net(1).double()), StudentScores(student, accelerator, GROUP, runs=2, learns=False)


def _same(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_step_joins_augmentation_and_teacher(batches, nets, name):
    (branches, found), (teacher, student) = batches(name), nets
    ask, (augmenter,) = TeacherStep(teacher, branches, student), branches.augmenters
    for batch in found:
        given = ask(batch)
        runs = branches.make(batch.pixels, batch.augmented_pixels, batch.mix)
        candidates = branches.candidates(batch)
        assert augmenter.makes_candidates == (candidates is not None) == (len(runs) > 0) == (name != "identity")
        expected = teacher_pass(teacher, batch.pixels, runs, branches.branches, group=GROUP, student=student)
        _same(given, expected)
        assert not given.originals.logits.requires_grad


def test_what_is_given_can_enter_a_backward(batches, nets, make_net):
    """No inference tensors: they could not be saved for the student's backward."""
    (branches, (batch, _)), (teacher, _) = batches("cutmix"), nets
    logits, student = TeacherStep(teacher, branches)(batch).originals.logits, make_net(2).double()
    assert not logits.is_inference()
    (student(batch.pixels) * logits).sum().backward()
    assert student.model.fc.weight.grad is not None


def test_a_batch_without_rows_gives_outputs_without_rows(batches, nets):
    """Of a process that a short last batch leaves nothing."""
    (branches, (batch, _)), (teacher, student) = batches("cutmix", "flip", "cutmixpick_student"), nets
    empty = replace(batch, images=batch.images[:0], labels=batch.labels[:0])
    for part, of_student in (("candidates", False), ("everything", True)):
        found = TeacherStep(teacher, branches, student, student_part=part, num_classes=3)(empty)
        outputs = [found.originals.logits, *(branch.logits for branch in found.branches)]
        assert [tuple(logits.shape) for logits in outputs] == [(0, 3)] * 4
        assert (found.student_logits is not None) == of_student
        assert all((branch.student_logits is not None) == of_student for branch in found.branches)


@pytest.mark.parametrize(
    ("names", "images", "most"),  # how many of each original the teacher sees, and rows at once
    [
        (("identity", "flip", "mixup", "cutmix", "cutmixpick_teacher", "cutmixpick_student"), 5, 100),
        (("flip", "cutmixpick_teacher"), 4, None),
        (("cutmixpick_student",), 2, None),
    ],
)
def test_heads_see_all_turns_of_what_is_asked_about_once(batches, nets, make_net_with_heads, names, images, most):
    (branches, found), (_, student), net = batches(*names), nets, make_net_with_heads().double()
    teacher, calls = Teacher(net), []
    ask = TeacherStep(teacher, branches, student, images_per_call=most, heads=True)
    plain = TeacherStep(teacher, branches, student)
    for batch in found:
        hook = net.model.backbone.conv1.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        given = ask(batch)
        hook.remove()
        assert sum(calls) == 4 * images * len(batch)
        assert len(calls) == (1 if most is None else images)
        calls.clear()
        expected = plain(batch)
        _same(given.originals.logits, expected.originals.logits)
        for branch, logits in zip(given.branches, expected.branches, strict=True):
            _same(branch._replace(heads=()), logits)
        for of, shown in [(given.originals, batch.pixels), *((of, of.mixed.images) for of in given.branches)]:
            turned = torch.stack([torch.rot90(shown, turn, (2, 3)) for turn in range(4)], dim=1)
            heads = net.outputs(turned.flatten(0, 1), heads=True).heads
            _same(of.heads, tuple(head.reshape(-1, 4, 12) for head in heads))


def test_a_batch_without_rows_gives_heads_without_rows(batches, nets, make_net_with_heads):
    (branches, (batch, _)), (_, student) = batches("cutmix", "cutmixpick_student"), nets
    empty = replace(batch, images=batch.images[:0], labels=batch.labels[:0])
    found = TeacherStep(Teacher(make_net_with_heads()), branches, student, num_classes=3, heads=True)(empty)
    for of in (found.originals, *found.branches):
        assert [tuple(head.shape) for head in of.heads] == [(0, 4, 12)] * 3


@pytest.fixture
def compiled_graphs():
    """How many graphs were compiled; none of them is cut."""

    def count():
        assert not torch._dynamo.utils.counters["graph_break"]
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield count
    torch.compiler.reset()


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize(
    ("name", "learns"),  # a student that learns scores by itself; those that need no scores are the same with both
    [
        *[("identity", True), ("autoaugment", False), ("mixup", True), ("cutmixpick_teacher", False)],
        *[("cutmixpick_student", True), ("cutmixpick_student", False)],
    ],
)
def test_a_compiled_step_is_the_same_and_a_short_batch_costs_one_more_graph(
    batches, nets, compiled_graphs, name, learns
):
    (branches, found), (teacher, student) = batches(name), nets
    student.learns = learns
    plain, compiled = (TeacherStep(teacher, branches, student, mode) for mode in ("off", "default"))
    for batch in found * 3:  # several epochs
        _same(compiled(batch), plain(batch), 1e-6)  # mixup's pixels are float32
    assert compiled_graphs() == 2


@pytest.mark.slow
def test_compiled_code_gives_the_same(batches, nets, compiled_graphs):
    """All that a region can hold, in the compiler's own code: mixing, both nets, entropies, picks, gathering."""
    (branches, (batch, _)), (teacher, student) = batches("cutmixpick_student"), nets
    plain, compiled = (TeacherStep(teacher, branches, student, mode) for mode in ("off", "default"))
    _same(compiled(batch), plain(batch))
    assert compiled_graphs() == 1


@pytest.mark.usefixtures("graphs_alone")
def test_measuring_compiles_one_region_over_all_branches(batches, nets, compiled_graphs):
    names = ["identity", "cutout", "crop_flip", "mixup", "cutmix", "cutmixpick_teacher", "cutmixpick_student"]
    (branches, found), (teacher, student) = batches(*names, "cutmix+kld"), nets
    plain, compiled = (
        TeacherStep(teacher, branches, student, mode, student_part="everything", images_per_call=60)
        for mode in ("off", "default")
    )
    for batch in found:
        _same(compiled(batch), plain(batch), 1e-6)
    assert compiled_graphs() == 2


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize(
    ("name", "needs"), [("cutmixpick_teacher", "features"), ("cutmixpick_student", "preactivations")]
)
def test_features_of_the_originals_are_compiled_along(batches, nets, compiled_graphs, name, needs):
    torch.manual_seed(1)
    teacher = Teacher(Normalized(create_model("resnet8", 3), (0.5,) * 3, (0.5,) * 3).double(), fold_bn=True)
    (branches, found), (_, student) = batches(name), nets
    student.learns = True
    plain, compiled = (TeacherStep(teacher, branches, student, mode, {needs}) for mode in ("off", "default"))
    given = [compiled(batch) for batch in found]
    assert compiled_graphs() == 2
    for batch, of_compiled in zip(found, given, strict=True):
        of_plain = plain(batch)
        assert len(of_plain.originals.features) == 5
        assert len(of_plain.originals.preactivations) == (3 if needs == "preactivations" else 0)
        _same(of_compiled, of_plain, 1e-6)


def test_a_compiler_is_asked_for_only_where_it_is_needed(batches, nets, monkeypatch):
    (branches, _), (teacher, student) = batches("cutmix"), nets
    monkeypatch.setattr("dalikd.trainers.launch.shutil.which", lambda name: name == "my-compiler" or None)
    TeacherStep(teacher, branches, student)
    with pytest.raises(ValueError, match=r"--compile max-autotune needs a C\+\+ compiler.*--compile off"):
        TeacherStep(teacher, branches, student, "max-autotune")
    monkeypatch.setenv("CXX", "my-compiler")
    check_compiler("default")


@pytest.mark.parametrize(
    ("on_cpu", "gpu", "compiler", "mode"),
    [
        (False, True, "gcc", "default"),
        (True, True, "gcc", "off"),
        (False, False, "gcc", "off"),
        (False, True, "", "off"),
    ],
)
def test_auto_compiles_on_a_gpu_that_can(monkeypatch, capsys, on_cpu, gpu, compiler, mode):
    automatic_mode.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("dalikd.trainers.launch.find_spec", lambda _: object())
    monkeypatch.setattr("dalikd.trainers.launch.shutil.which", lambda name: name == compiler or None)
    assert [automatic_mode(on_cpu) for _ in range(2)] == [mode] * 2
    said = "dalikd: --compile auto compiles nothing, for lack of a C compiler: " if gpu and not compiler else ""
    found = capsys.readouterr().err
    assert found.startswith(said) if said else found == ""
    automatic_mode.cache_clear()
