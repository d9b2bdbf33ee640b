from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dalikd.kd.backbones import create_model
from dalikd.kd.mixing import MixDraws, Mixed, cutmix
from dalikd.kd.normalize import Normalized
from dalikd.kd.picking import CRITERIA, entropy, pick_rows
from dalikd.kd.teacher import (
    STUDENT_ENTROPY,
    TEACHER_ENTROPY,
    Criterion,
    Look,
    PoolOutputs,
    Teacher,
    batch_statistics,
    entropies,
    look,
)

HALF = (0.5, 0.5, 0.5)
GROUP = 16


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


class Counting:
    """A net that notes how many rows each call had."""

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        self.net, self.rows = net, []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.rows.append(len(pixels))
        return self.net(pixels)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(Normalized(_net(), HALF, HALF).double())


@pytest.fixture(scope="module")
def student() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(1)
    return Normalized(_net(), HALF, HALF).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2 * GROUP + 6, 3, 32, 32), dtype=torch.uint8, generator=generator)


def _candidates(pixels: Tensor, runs: int = 2) -> Mixed:
    """CutMix within groups of 16; a function of the rows, not of the batch."""
    return Mixed.join([_run(pixels, run) for run in range(runs)])


def _run(pixels: Tensor, run: int) -> Mixed:
    pieces = []
    for start in range(0, len(pixels), GROUP):
        rows = pixels[start : start + GROUP]
        generator = torch.Generator().manual_seed(int(rows.long().sum()) + run)
        draws = MixDraws(
            torch.arange(len(rows)).roll(1 + run),
            torch.rand(len(rows), generator=generator),
            torch.rand(len(rows), 2, generator=generator),
        )
        mixed = cutmix(rows, draws)
        pieces.append(Mixed(mixed.images, mixed.partner + start, mixed.lam))
    return Mixed.join(pieces)


def _brute_force_picks(scores: Tensor, batch: int) -> list[int]:
    """As published: of each pool, run after run, the last k of an ascending stable sort, in the order of the pool."""
    picks = []
    for start in range(0, batch, GROUP):
        columns = range(start, min(start + GROUP, batch))
        pool = [run * batch + column for run in range(len(scores) // batch) for column in columns]
        ascending = np.argsort(scores[pool].numpy(), kind="stable")
        picks += [pool[place] for place in sorted(ascending[-len(columns) :])]
    return picks


# ------------------------------------------------------------------------------------------------------ look


def test_identity_uses_the_same_logits_twice(teacher, pixels):
    counting = Counting(teacher)
    seen = look(counting, pixels, None)
    assert counting.rows == [len(pixels)]
    assert seen.augmented is pixels
    assert seen.augmented_logits is seen.logits
    assert seen.partner.tolist() == list(range(len(pixels)))
    assert (seen.lam == 1).all()
    assert torch.equal(seen.logits, teacher(pixels))


def test_a_single_run_is_seen_in_one_call(teacher, pixels):
    counting = Counting(teacher)
    candidates = _candidates(pixels, runs=1)
    seen = look(counting, pixels, candidates)
    assert counting.rows == [2 * len(pixels)]
    assert torch.equal(seen.augmented, candidates.images)
    assert torch.equal(seen.partner, candidates.partner)
    assert torch.equal(seen.lam, candidates.lam)
    torch.testing.assert_close(seen.logits, teacher(pixels), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.augmented_logits, teacher(candidates.images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("runs", [2, 3])
def test_teacher_entropy_takes_one_call_over_originals_and_all_candidates(teacher, pixels, runs):
    counting, batch = Counting(teacher), len(pixels)
    candidates = _candidates(pixels, runs)
    seen = look(counting, pixels, candidates, criterion=TEACHER_ENTROPY, group=GROUP)
    assert counting.rows == [batch + runs * batch]
    picks = _brute_force_picks(entropy(teacher(candidates.images)), batch)
    assert len(set(picks)) == batch
    assert torch.equal(seen.augmented, candidates.images[picks])
    assert torch.equal(seen.partner, candidates.partner[picks])
    assert torch.equal(seen.lam, candidates.lam[picks])
    torch.testing.assert_close(seen.augmented_logits, teacher(seen.augmented), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.logits, teacher(pixels), rtol=0, atol=1e-12)


def test_student_entropy_shows_the_teacher_only_the_picks(teacher, student, pixels):
    counting, scoring, batch = Counting(teacher), Counting(student), len(pixels)
    candidates = _candidates(pixels)
    seen = look(counting, pixels, candidates, criterion=STUDENT_ENTROPY, group=GROUP, student=scoring)
    assert scoring.rows == [2 * batch]
    assert counting.rows == [2 * batch]
    picks = _brute_force_picks(entropy(student(candidates.images)), batch)
    assert torch.equal(seen.augmented, candidates.images[picks])
    assert torch.equal(seen.partner, candidates.partner[picks])
    assert torch.equal(seen.lam, candidates.lam[picks])
    torch.testing.assert_close(seen.augmented_logits, teacher(seen.augmented), rtol=0, atol=1e-12)


def test_the_two_criteria_pick_differently(teacher, student, pixels):
    """Otherwise the tests above could not tell them apart."""
    candidates = _candidates(pixels)
    by_teacher = look(teacher, pixels, candidates, criterion=TEACHER_ENTROPY, group=GROUP)
    by_student = look(teacher, pixels, candidates, criterion=STUDENT_ENTROPY, group=GROUP, student=student)
    assert not torch.equal(by_teacher.augmented, by_student.augmented)


def test_a_criterion_may_need_both_nets(teacher, student, pixels):
    def disagreement(outputs: PoolOutputs, group: int) -> Tensor:
        assert group == GROUP
        assert outputs.teacher is not None
        assert outputs.student is not None
        assert outputs.originals is not None
        assert len(outputs.originals) == len(pixels)
        return (outputs.teacher - outputs.student).abs().sum(dim=1)

    candidates = _candidates(pixels)
    seen = look(
        teacher, pixels, candidates, criterion=Criterion(disagreement, True, True), group=GROUP, student=student
    )
    scores = (teacher(candidates.images) - student(candidates.images)).abs().sum(dim=1)
    assert torch.equal(seen.augmented, candidates.images[_brute_force_picks(scores, len(pixels))])


@pytest.mark.parametrize("criterion", ["none", "teacher", "student"])
@pytest.mark.parametrize("cut", [GROUP, 2 * GROUP])
def test_nothing_depends_on_the_batch_size(teacher, student, pixels, criterion, cut):
    """A batch with a short last group against the same rows cut in two at a group's end."""

    def run(rows: Tensor) -> Look:
        by = {"none": None, "teacher": TEACHER_ENTROPY, "student": STUDENT_ENTROPY}[criterion]
        candidates = _candidates(rows, 1 if by is None else 2)
        return look(teacher, rows, candidates, criterion=by, group=GROUP, student=student)

    whole, first, second = run(pixels), run(pixels[:cut]), run(pixels[cut:])
    assert torch.equal(torch.cat((first.augmented, second.augmented)), whole.augmented)
    assert torch.equal(torch.cat((first.partner, second.partner + cut)), whole.partner)
    assert torch.equal(torch.cat((first.lam, second.lam)), whole.lam)
    for name in ("logits", "augmented_logits"):
        parts = torch.cat((getattr(first, name), getattr(second, name)))
        torch.testing.assert_close(parts, getattr(whole, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["teacher_entropy", "student_entropy", "kld", "dissimilarity"])
@pytest.mark.parametrize("keep", [None, 5, 20])
def test_every_criterion_says_where_its_picks_stem_from(teacher, student, pixels, name, keep):
    """Other numbers than there are originals included; the short last group keeps its share, rounded up."""
    candidates, criterion, batch = _candidates(pixels), CRITERIA[name], len(pixels)
    counting = Counting(teacher)
    seen = look(counting, pixels, candidates, criterion=criterion, group=GROUP, keep=keep, student=student)
    outputs = PoolOutputs(teacher(candidates.images), student(candidates.images), teacher(pixels))
    scores = criterion.score(outputs, GROUP)
    picks = pick_rows(scores.reshape(2, batch), GROUP, keep)
    assert len(picks) == {None: batch, 5: 5 + 5 + 2, 20: 20 + 20 + 8}[keep]
    assert counting.rows == [batch + (2 * batch if criterion.needs_teacher else len(picks))]
    assert torch.equal(seen.picks, picks)
    assert seen.rows.tolist() == [pick % batch for pick in picks.tolist()]
    torch.testing.assert_close(seen.scores, scores, rtol=0, atol=1e-12)
    scoring = outputs.teacher if criterion.needs_teacher else outputs.student
    torch.testing.assert_close(seen.pool_logits, scoring, rtol=0, atol=1e-12)
    assert torch.equal(seen.augmented, candidates.images[picks])
    assert torch.equal(seen.partner, candidates.partner[picks])
    torch.testing.assert_close(seen.augmented_logits, outputs.teacher[picks], rtol=0, atol=1e-12)


def test_without_picks_each_row_stems_from_itself(teacher, pixels):
    for candidates in (None, _candidates(pixels, runs=1)):
        seen = look(teacher, pixels, candidates)
        assert seen.rows.tolist() == list(range(len(pixels)))
        assert seen.picks is seen.scores is seen.pool_logits is seen.hidden is None


@pytest.mark.parametrize("name", ["teacher_entropy", "student_entropy", "kld", "dissimilarity"])
def test_entropies_are_those_of_the_net_that_scores(teacher, student, pixels, name):
    candidates = _candidates(pixels)
    seen = look(teacher, pixels, candidates, criterion=CRITERIA[name], group=GROUP, keep=5, student=student)
    scoring = student if name == "student_entropy" else teacher
    found = entropies(seen, student(pixels) if name == "student_entropy" else None)
    torch.testing.assert_close(found.originals, entropy(scoring(pixels)), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.candidates, entropy(scoring(candidates.images)), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.picks, entropy(scoring(seen.augmented)), rtol=0, atol=1e-12)


def test_entropies_of_a_single_run_are_the_teachers(teacher, pixels):
    candidates = _candidates(pixels, runs=1)
    found = entropies(look(teacher, pixels, candidates))
    assert found.picks is found.candidates
    torch.testing.assert_close(found.candidates, entropy(teacher(candidates.images)), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.originals, entropy(teacher(pixels)), rtol=0, atol=1e-12)


def test_more_picks_than_the_pool_holds_are_refused(teacher, pixels):
    with pytest.raises(ValueError, match=f"--mix.n_pick {2 * GROUP + 1} of a pool of {2 * GROUP}"):
        look(teacher, pixels, _candidates(pixels), criterion=TEACHER_ENTROPY, group=GROUP, keep=2 * GROUP + 1)


def test_float_candidates_join_uint8_originals(teacher, pixels):
    mixed = _candidates(pixels, runs=1)
    seen = look(teacher, pixels, mixed._replace(images=mixed.images.float()))
    torch.testing.assert_close(seen.logits, teacher(pixels), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.augmented_logits, teacher(mixed.images), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------- teacher


class _Task(nn.Module):
    """What would happen if somebody kept the teacher in a module."""

    def __init__(self, student: nn.Module, teacher: Teacher) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher


def test_the_teacher_stays_out_of_the_task(pixels):
    teacher = Teacher(Normalized(_net(), HALF, HALF))
    student = nn.Linear(2, 2)
    task = _Task(student, teacher)
    before = teacher(pixels)
    state = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    task.train().double()
    assert [name for name, _ in task.named_parameters()] == ["student.weight", "student.bias"]
    assert set(task.state_dict()) == {"student.weight", "student.bias"}
    assert not any(module.training for module in teacher.model.modules())
    assert torch.equal(teacher(pixels), before)
    assert all(torch.equal(value, state[key]) for key, value in teacher.model.state_dict().items())


def test_the_teacher_has_no_gradient(pixels):
    teacher = Teacher(Normalized(_net(), HALF, HALF))
    inputs = pixels.float().requires_grad_()
    assert not teacher(inputs).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_teacher_folds_its_batch_norms_on_request(pixels, wrapped):
    torch.manual_seed(4)
    net = _net().double()
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    model = Normalized(net, HALF, HALF).double() if wrapped else net
    rows = pixels.double() if wrapped else pixels.double() / 255
    plain = Teacher(model)
    assert plain.folded == 0
    expected = plain(rows)
    folded = Teacher(model, fold_bn=True)
    assert folded.folded == 1
    assert isinstance(net[1], nn.Identity)
    torch.testing.assert_close(folded(rows), expected, rtol=0, atol=1e-12)


def test_mixed_precision_still_gives_float32(pixels):
    net = Normalized(_net(), HALF, HALF)
    exact, mixed = Teacher(net), Teacher(net, autocast=torch.bfloat16)
    assert mixed(pixels).dtype == torch.float32
    difference = (mixed(pixels) - exact(pixels)).abs().max()
    assert 0 < difference < 0.1


class _CountCasts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "fold", "casts"),  # of float32: pixels, and what norms, softmax and head leave
    [("resnet8", True, 1), ("timm:resnet18", False, 1), ("timm:vit_tiny_patch16_224", False, None)],
)
def test_weights_in_the_compute_type_answer_the_same_without_a_cast_a_call(name, fold, casts):
    torch.manual_seed(0)
    side = {"img_size": 32} if "vit" in name else {}
    net = Teacher(Normalized(create_model(name, 5, **side), HALF, HALF), autocast=torch.bfloat16, fold_bn=fold)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    digest, weights = net.digest_in_use, sum(type(part) in (nn.Linear, nn.Conv2d) for part in net.model.modules())
    with _CountCasts() as before:
        expected = net(pixels)
    assert net.cast_weights(pixels[:2])
    with _CountCasts() as after:
        assert torch.equal(net(pixels), expected)
    assert before.count - after.count >= weights
    assert casts in (None, after.count)
    assert net.digest_in_use == digest
    norms = [part for part in net.model.modules() if isinstance(part, nn.BatchNorm2d | nn.LayerNorm)]
    assert all(part.weight.dtype == torch.float32 for part in norms)


def test_weights_that_a_net_reads_itself_stay(pixels):
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            weight = self.conv.weight - self.conv.weight.mean()
            return nn.functional.conv2d(images, weight).mean((2, 3))

    net = Teacher(Normalized(Standardised(), HALF, HALF), autocast=torch.bfloat16)
    expected = net(pixels)
    assert not net.cast_weights(pixels)
    assert torch.equal(net(pixels), expected)
    assert net.model.model.conv.weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------ batch statistics


def _net_and_inputs() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    net = _net().double()
    net.train()
    net(torch.randn(8, 3, 32, 32).double())  # so that running statistics are not those of the start
    return net, torch.randn(8, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True])
def test_batch_statistics_give_training_outputs_and_change_nothing(training):
    net, images = _net_and_inputs()
    net.train(training)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with batch_statistics(net), torch.no_grad():
        found = net(images)
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(module.training == training for module in net.modules())
    expected = net.train()(images)
    assert torch.equal(found, expected)
    assert not torch.equal(net.eval()(images), expected)
    after = net.state_dict()
    assert after["1.num_batches_tracked"] == state["1.num_batches_tracked"] + 1  # tracking works again
    assert not torch.equal(after["1.running_mean"], state["1.running_mean"])


def test_batch_statistics_are_restored_after_an_error():
    net, images = _net_and_inputs()
    net.eval()
    expected = net(images)
    with pytest.raises(RuntimeError, match="lost"), batch_statistics(net):
        raise RuntimeError("lost")
    assert not any(module.training for module in net.modules())
    assert torch.equal(net(images), expected)
