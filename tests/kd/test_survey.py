import pytest
import torch
from torch import nn

from dalikd.kd.backbones import create_model
from dalikd.kd.manifold import manifold_mixup
from dalikd.kd.mixing import Mixed, cutmix, mixup
from dalikd.kd.picking import CRITERIA
from dalikd.kd.survey import Branch, survey
from dalikd.kd.teacher import Teacher, look
from dalikd.pipelines.draw_spec import MixDraws

B, GROUP, CLASSES = 20, 8, 5


class Counting:
    """A net that remembers how many images each call had."""

    def __init__(self, net):
        self.net, self.calls = net, []

    def __call__(self, pixels, hidden=None):
        self.calls.append(len(pixels))
        return self.net(pixels) if hidden is None else self.net(pixels, hidden)


def _net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
    ).double()


def _draws(run, layer=None):
    generator = torch.Generator().manual_seed(run)
    partner = (torch.arange(B) + 1) % B
    lam, center = torch.rand(B, generator=generator), torch.rand(B, 2, generator=generator)
    return MixDraws(partner, lam, center, layer=layer)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (B, 3, 8, 8), generator=torch.Generator().manual_seed(9)).double()


@pytest.fixture
def runs(pixels):
    own = torch.arange(B)
    flipped = Mixed(pixels.flip(3), own, torch.ones(B))
    return [flipped, mixup(pixels, _draws(1)), cutmix(pixels, _draws(2)), cutmix(pixels, _draws(3))]


BRANCHES = {
    "identity": Branch(()),
    "flip": Branch((0,)),
    "mixup": Branch((1,)),
    "cutmix": Branch((2,)),
    **{name: Branch((2, 3), criterion) for name, criterion in CRITERIA.items()},
    "few": Branch((2, 3), CRITERIA["teacher_entropy"], keep=3),
    "many": Branch((2, 3), CRITERIA["student_entropy"], keep=13),
}


def _looked(branch, runs, teacher, pixels, student):
    candidates = Mixed.join([runs[run] for run in branch.pool]) if branch.pool else None
    return look(teacher, pixels, candidates, criterion=branch.criterion, group=GROUP, keep=branch.keep, student=student)


@pytest.mark.parametrize("images_per_call", [None, 2 * B + 3, 1])
@pytest.mark.parametrize("student_sees_all", [False, True])
def test_a_survey_says_what_one_look_for_each_augmentation_says(pixels, runs, student_sees_all, images_per_call):
    teacher, student = _net(1), _net(2)
    found = survey(
        teacher, pixels, runs, list(BRANCHES.values()), group=GROUP, student=student,
        student_sees_all=student_sees_all, images_per_call=images_per_call,
    )  # fmt: skip
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(found.logits, teacher(pixels), **close)
    for branch, outputs in zip(BRANCHES.values(), found.branches, strict=True):
        expected = _looked(branch, runs, teacher, pixels, student)
        torch.testing.assert_close(outputs.logits, expected.augmented_logits, **close)
        if expected.picks is None:
            assert outputs.picks is None
            assert outputs.pool_logits is None
        else:
            assert torch.equal(outputs.picks, expected.picks)
            torch.testing.assert_close(outputs.pool_logits, expected.pool_logits, **close)
        if student_sees_all:
            torch.testing.assert_close(outputs.student_logits, student(expected.augmented), **close)
            torch.testing.assert_close(found.student_logits, student(pixels), **close)
        else:
            assert outputs.student_logits is None
            assert found.student_logits is None


def test_every_image_is_asked_about_once(pixels, runs):
    teacher, student = Counting(_net(1)), Counting(_net(2))
    survey(teacher, pixels, runs, list(BRANCHES.values()), group=GROUP, student=student)
    assert teacher.calls == [5 * B]  # originals and four runs, for nine augmentations
    assert student.calls == [2 * B]  # the two runs that it scores


def test_calls_are_as_large_as_allowed(pixels, runs):
    teacher = Counting(_net(1))
    survey(teacher, pixels, runs, [Branch((0,)), Branch((1,)), Branch((2,))], group=GROUP, images_per_call=2 * B + 3)
    assert teacher.calls == [2 * B, 2 * B]


def test_the_teacher_sees_picks_alone_where_a_student_picks_and_nobody_else_needs_the_pool(pixels, runs):
    teacher = Counting(_net(1))
    survey(teacher, pixels, runs, [Branch((2, 3), CRITERIA["student_entropy"])], group=GROUP, student=_net(2))
    assert teacher.calls == [2 * B]


def test_originals_are_shown_to_the_student_on_request(pixels, runs):
    student = _net(2)
    branches = [Branch((2, 3), CRITERIA["student_entropy"])]
    found = survey(_net(1), pixels, runs, branches, group=GROUP, student=student, student_sees_originals=True)
    torch.testing.assert_close(found.student_logits, student(pixels))


def test_hidden_states_are_mixed_as_in_a_look():
    torch.manual_seed(0)
    teacher = Teacher(create_model("resnet8", CLASSES).double())
    pixels = torch.rand(B, 3, 32, 32, dtype=torch.float64)
    runs = [manifold_mixup(pixels, _draws(run, layer=torch.arange(B, dtype=torch.int32) % 3)) for run in (4, 5)]
    branches = [Branch(()), Branch((0,)), Branch((0, 1), CRITERIA["teacher_entropy"])]
    found = survey(teacher, pixels, runs, branches, group=GROUP)
    for branch, outputs in zip(branches, found.branches, strict=True):
        expected = _looked(branch, runs, teacher, pixels, None)
        torch.testing.assert_close(outputs.logits, expected.augmented_logits, rtol=0, atol=1e-10)
    assert not torch.allclose(found.branches[1].logits, found.logits)
