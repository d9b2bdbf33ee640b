import pytest
import torch

from dalikd.kd.teacher import Teacher, look
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.trainers.augmentation import AUGMENTATIONS, Augmenter, MixOptions
from dalikd.trainers.launch import automatic_mode, check_compiler
from dalikd.trainers.teacher_step import Looker

GROUP = 8


@pytest.fixture
def batches(make_source):
    """Two batches of an augmentation, the second one short, with a short last group."""

    def make(name):
        source = make_source(44)
        view = View(source.image_size, "pad_crop", padding=1)
        augmenter = Augmenter(name, MixOptions(group=GROUP), source, view, seed=3)
        loader = Loader(source, Sampler(44, 24, 3, drop_last=False, group=GROUP), augmenter.draw_spec, threads=1)
        found = list(loader)
        loader.close()
        assert [len(batch) for batch in found] == [24, 20]
        return augmenter, found

    return make


@pytest.fixture
def nets(make_net):
    return Teacher(make_net(1).double()), make_net(2).double().eval().requires_grad_(False)


def _same(found, expected, tolerance=1e-12):
    for name in ("logits", "augmented", "augmented_logits", "partner", "lam"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_look_joins_augmentation_and_teacher(batches, nets, name):
    (augmenter, found), (teacher, student) = batches(name), nets
    looker = Looker(teacher, augmenter, student)
    for batch in found:
        seen = looker(batch)
        candidates = augmenter.candidates(batch)
        assert augmenter.makes_candidates == (candidates is not None) == (name != "identity")
        expected = look(teacher, batch.pixels, candidates, criterion=augmenter.criterion, group=GROUP, student=student)
        _same(seen, expected)
        assert not seen.logits.requires_grad


def test_a_look_can_enter_a_backward(batches, nets):
    """No inference tensors: they could not be saved for the student's backward."""
    (augmenter, (batch, _)), (teacher, student) = batches("cutmix"), nets
    seen = Looker(teacher, augmenter)(batch)
    assert not seen.logits.is_inference()
    student.requires_grad_()
    (student(batch.pixels) * seen.logits).sum().backward()
    assert student.model.fc.weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["identity", "autoaugment", "mixup", "cutmixpick_teacher", "cutmixpick_student"])
def test_a_compiled_look_is_the_same_and_a_short_batch_costs_one_more_graph(batches, nets, name):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    (augmenter, found), (teacher, student) = batches(name), nets
    plain, compiled = (Looker(teacher, augmenter, student, mode) for mode in ("off", "default"))
    for batch in found * 3:  # several epochs
        _same(compiled(batch), plain(batch), 1e-6)  # mixup's pixels are float32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()


def test_a_compiler_is_asked_for_only_where_it_is_needed(batches, nets, monkeypatch):
    (augmenter, _), (teacher, student) = batches("cutmix"), nets
    monkeypatch.setattr("dalikd.trainers.launch.shutil.which", lambda name: name == "my-compiler" or None)
    Looker(teacher, augmenter, student)
    with pytest.raises(ValueError, match=r"--compile max-autotune needs a C\+\+ compiler.*--compile off"):
        Looker(teacher, augmenter, student, "max-autotune")
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
