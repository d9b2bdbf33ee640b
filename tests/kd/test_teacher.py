from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.manifold import manifold_mixup
from dalikd.kd.mixing import Mixed, cutmix, mixup
from dalikd.kd.picking import CRITERIA, STUDENT_ENTROPY, TEACHER_ENTROPY, Criterion, PoolOutputs, entropy, pick_rows
from dalikd.kd.teacher import Branch, Teacher, TeacherPass, Teachers, batch_statistics, entropies, teacher_pass
from dalikd.pipelines.draw_spec import MixDraws

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


def _runs(pixels: Tensor, runs: int = 2) -> list[Mixed]:
    """CutMix within groups of 16; a function of the rows, not of the batch."""
    return [_run(pixels, run) for run in range(runs)]


def _candidates(pixels: Tensor, runs: int = 2) -> Mixed:
    return Mixed.join(_runs(pixels, runs))


def _pass(
    teacher: Callable[[Tensor], Tensor], pixels: Tensor, runs: int = 2, n_pick: int | None = None, **options: Any
) -> TeacherPass:
    """The pass of training: one branch."""
    branch = Branch(tuple(range(runs)), options.pop("criterion", None), n_pick)
    return teacher_pass(teacher, pixels, _runs(pixels, runs), [branch], group=GROUP, **options)


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


# ------------------------------------------------------------------------------------------------------ the pass


def test_identity_uses_the_same_logits_twice(teacher, pixels):
    counting = Counting(teacher)
    found = _pass(counting, pixels, 0)
    (branch,) = found.branches
    assert counting.rows == [len(pixels)]
    assert branch.mixed.images is pixels
    assert branch.logits is found.originals.logits
    assert branch.mixed.partner.tolist() == list(range(len(pixels)))
    assert (branch.mixed.lam == 1).all()
    assert torch.equal(branch.logits, teacher(pixels))


def test_a_single_run_is_seen_in_one_call(teacher, pixels):
    counting = Counting(teacher)
    candidates = _run(pixels, 0)
    found = _pass(counting, pixels, 1)
    (branch,) = found.branches
    assert counting.rows == [2 * len(pixels)]
    for part, expected in zip(branch.mixed[:3], candidates[:3], strict=True):
        assert torch.equal(part, expected)
    torch.testing.assert_close(found.originals.logits, teacher(pixels), rtol=0, atol=1e-12)
    torch.testing.assert_close(branch.logits, teacher(candidates.images), rtol=0, atol=1e-12)


def _assert_picked(found: TeacherPass, candidates: Mixed, picks: list[int], teacher: Teacher, pixels: Tensor) -> None:
    (branch,) = found.branches
    for part, pool in zip(branch.mixed[:3], candidates[:3], strict=True):
        assert torch.equal(part, pool[picks])
    torch.testing.assert_close(branch.logits, teacher(branch.mixed.images), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.originals.logits, teacher(pixels), rtol=0, atol=1e-12)


@pytest.mark.parametrize("runs", [2, 3])
def test_teacher_entropy_takes_one_call_over_originals_and_all_candidates(teacher, pixels, runs):
    counting, batch = Counting(teacher), len(pixels)
    candidates = _candidates(pixels, runs)
    found = _pass(counting, pixels, runs, criterion=TEACHER_ENTROPY)
    assert counting.rows == [batch + runs * batch]
    picks = _brute_force_picks(entropy(teacher(candidates.images)), batch)
    assert len(set(picks)) == batch
    _assert_picked(found, candidates, picks, teacher, pixels)


def test_student_entropy_shows_the_teacher_only_the_picks(teacher, student, pixels):
    counting, scoring, batch = Counting(teacher), Counting(student), len(pixels)
    candidates = _candidates(pixels)
    found = _pass(counting, pixels, criterion=STUDENT_ENTROPY, student=scoring)
    assert scoring.rows == [2 * batch]
    assert counting.rows == [2 * batch]
    picks = _brute_force_picks(entropy(student(candidates.images)), batch)
    _assert_picked(found, candidates, picks, teacher, pixels)


def test_the_two_criteria_pick_differently(teacher, student, pixels):
    """Otherwise the tests above could not tell them apart."""
    (by_teacher,) = _pass(teacher, pixels, criterion=TEACHER_ENTROPY).branches
    (by_student,) = _pass(teacher, pixels, criterion=STUDENT_ENTROPY, student=student).branches
    assert not torch.equal(by_teacher.mixed.images, by_student.mixed.images)


def test_a_criterion_may_need_both_nets(teacher, student, pixels):
    def disagreement(outputs: PoolOutputs, group: int) -> Tensor:
        assert group == GROUP
        assert len(outputs.originals) == len(pixels)
        return (outputs.teacher - outputs.student).abs().sum(dim=1)

    candidates = _candidates(pixels)
    found = _pass(teacher, pixels, criterion=Criterion(disagreement, True, True), student=student)
    scores = (teacher(candidates.images) - student(candidates.images)).abs().sum(dim=1)
    _assert_picked(found, candidates, _brute_force_picks(scores, len(pixels)), teacher, pixels)


@pytest.mark.parametrize("criterion", ["none", "teacher", "student"])
@pytest.mark.parametrize("cut", [GROUP, 2 * GROUP])
def test_nothing_depends_on_the_batch_size(teacher, student, pixels, criterion, cut):
    """A batch with a short last group against the same rows cut in two at a group's end."""
    by = {"none": None, "teacher": TEACHER_ENTROPY, "student": STUDENT_ENTROPY}[criterion]

    def run(rows: Tensor) -> TeacherPass:
        return _pass(teacher, rows, 1 if by is None else 2, criterion=by, student=student)

    whole, first, second = run(pixels), run(pixels[:cut]), run(pixels[cut:])
    mixed, *parts = (found.branches[0].mixed for found in (whole, first, second))
    assert torch.equal(torch.cat([part.images for part in parts]), mixed.images)
    assert torch.equal(torch.cat((parts[0].partner, parts[1].partner + cut)), mixed.partner)
    assert torch.equal(torch.cat([part.lam for part in parts]), mixed.lam)
    for logits in (lambda found: found.originals.logits, lambda found: found.branches[0].logits):
        joined = torch.cat((logits(first), logits(second)))
        torch.testing.assert_close(joined, logits(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("n_pick", [None, 5, 20])
def test_every_criterion_gives_where_its_picks_stem_from(teacher, student, pixels, name, n_pick):
    """Other numbers than there are originals included; the short last group keeps its share, rounded up."""
    candidates, criterion, batch = _candidates(pixels), CRITERIA[name], len(pixels)
    counting = Counting(teacher)
    (branch,) = _pass(counting, pixels, criterion=criterion, n_pick=n_pick, student=student).branches
    outputs = PoolOutputs(teacher(candidates.images), student(candidates.images), teacher(pixels))
    picks = pick_rows(criterion.score(outputs, GROUP).reshape(2, batch), GROUP, n_pick)
    assert len(picks) == {None: batch, 5: 5 + 5 + 2, 20: 20 + 20 + 8}[n_pick]
    assert counting.rows == [batch + (2 * batch if criterion.needs_teacher else len(picks))]
    assert torch.equal(branch.picks, picks)
    assert branch.rows.tolist() == [pick % batch for pick in picks.tolist()]
    scoring = outputs.teacher if criterion.needs_teacher else outputs.student
    torch.testing.assert_close(branch.pool_logits, scoring, rtol=0, atol=1e-12)
    assert torch.equal(branch.mixed.images, candidates.images[picks])
    assert torch.equal(branch.mixed.partner, candidates.partner[picks])
    torch.testing.assert_close(branch.logits, outputs.teacher[picks], rtol=0, atol=1e-12)


def test_without_picks_each_row_stems_from_itself(teacher, pixels):
    for runs in (0, 1):
        (branch,) = _pass(teacher, pixels, runs).branches
        assert branch.rows.tolist() == list(range(len(pixels)))
        assert branch.picks is branch.pool_logits is branch.mixed.hidden is None


@pytest.mark.parametrize("name", CRITERIA)
def test_entropies_are_those_of_the_net_that_scores(teacher, student, pixels, name):
    scoring = student if name == "student_entropy" else teacher
    (branch,) = _pass(teacher, pixels, criterion=CRITERIA[name], n_pick=5, student=student).branches
    originals, candidates, picks = entropies(scoring(pixels), branch)
    torch.testing.assert_close(originals, entropy(scoring(pixels)), rtol=0, atol=1e-12)
    torch.testing.assert_close(candidates, entropy(scoring(_candidates(pixels).images)), rtol=0, atol=1e-12)
    torch.testing.assert_close(picks, entropy(scoring(branch.mixed.images)), rtol=0, atol=1e-12)


def test_entropies_of_a_single_run_are_the_teachers(teacher, pixels):
    found = _pass(teacher, pixels, 1)
    originals, candidates, picks = entropies(found.originals.logits, *found.branches)
    assert picks is candidates
    torch.testing.assert_close(candidates, entropy(teacher(_candidates(pixels, 1).images)), rtol=0, atol=1e-12)
    torch.testing.assert_close(originals, entropy(teacher(pixels)), rtol=0, atol=1e-12)


def test_more_picks_than_the_pool_holds_are_refused(teacher, pixels):
    with pytest.raises(ValueError, match=f"--mix.n_pick {2 * GROUP + 1} of a pool of {2 * GROUP}"):
        _pass(teacher, pixels, criterion=TEACHER_ENTROPY, n_pick=2 * GROUP + 1)


def test_float_candidates_join_uint8_originals(teacher, pixels):
    mixed = _run(pixels, 0)
    found = teacher_pass(teacher, pixels, [mixed._replace(images=mixed.images.float())], [Branch((0,))])
    torch.testing.assert_close(found.originals.logits, teacher(pixels), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.branches[0].logits, teacher(mixed.images), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- several branches

BRANCHES = {
    "identity": Branch(()),
    "flip": Branch((0,)),
    "mixup": Branch((1,)),
    "cutmix": Branch((2,)),
    **{name: Branch((2, 3), criterion) for name, criterion in CRITERIA.items()},
    "few": Branch((2, 3), TEACHER_ENTROPY, n_pick=3),
    "many": Branch((2, 3), STUDENT_ENTROPY, n_pick=25),
}


@pytest.fixture(scope="module")
def runs(pixels) -> list[Mixed]:
    own, batch = torch.arange(len(pixels)), len(pixels)
    draws = MixDraws((own + 1) % batch, torch.linspace(0, 1, batch), torch.full((batch, 2), 0.5))
    return [Mixed(pixels.flip(3), own, torch.ones(batch)), mixup(pixels.double(), draws), *_runs(pixels)]


def _alone(branch: Branch, runs: list[Mixed], *nets: Callable[..., Tensor], pixels: Tensor) -> TeacherPass:
    teacher, student = nets
    own = branch._replace(runs=tuple(range(len(branch.runs))))
    return teacher_pass(teacher, pixels, [runs[run] for run in branch.runs], [own], group=GROUP, student=student)


@pytest.mark.parametrize("images_per_call", [None, 2 * 38 + 3, 1])
@pytest.mark.parametrize("part", ["candidates", "everything"])
def test_several_branches_give_what_one_pass_for_each_gives(teacher, student, pixels, runs, part, images_per_call):
    found = teacher_pass(
        teacher, pixels, runs, list(BRANCHES.values()), group=GROUP, student=student, student_part=part,
        images_per_call=images_per_call,
    )  # fmt: skip
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(found.originals.logits, teacher(pixels), **close)
    for branch, outputs in zip(BRANCHES.values(), found.branches, strict=True):
        (expected,) = _alone(branch, runs, teacher, student, pixels=pixels).branches
        torch.testing.assert_close(outputs.logits, expected.logits, **close)
        assert torch.equal(outputs.mixed.images.double(), expected.mixed.images.double())
        assert torch.equal(outputs.rows, expected.rows)
        if expected.picks is None:
            assert outputs.picks is outputs.pool_logits is None
        else:
            assert torch.equal(outputs.picks, expected.picks)
            torch.testing.assert_close(outputs.pool_logits, expected.pool_logits, **close)
        if part == "everything":
            torch.testing.assert_close(outputs.student_logits, student(expected.mixed.images), **close)
            torch.testing.assert_close(found.student_logits, student(pixels), **close)
        else:
            assert outputs.student_logits is found.student_logits is None


def test_every_image_is_asked_about_once(teacher, student, pixels, runs):
    counting, scoring = Counting(teacher), Counting(student)
    teacher_pass(counting, pixels, runs, list(BRANCHES.values()), group=GROUP, student=scoring)
    assert counting.rows == [5 * len(pixels)]  # originals and four runs, for ten augmentations
    assert scoring.rows == [2 * len(pixels)]  # the two runs that it scores


def test_calls_are_as_large_as_allowed(teacher, pixels, runs):
    counting, batch = Counting(teacher), len(pixels)
    branches = [Branch((0,)), Branch((1,)), Branch((2,))]
    teacher_pass(counting, pixels, runs, branches, group=GROUP, images_per_call=2 * batch + 3)
    assert counting.rows == [2 * batch, 2 * batch]


def test_originals_are_shown_to_the_student_on_request(teacher, student, pixels, runs):
    branches = [Branch((2, 3), STUDENT_ENTROPY)]
    found = teacher_pass(
        teacher, pixels, runs, branches, group=GROUP, student=student, student_part="originals"
    )  # fmt: skip
    torch.testing.assert_close(found.student_logits, student(pixels))
    assert found.branches[0].student_logits is None


@pytest.mark.parametrize("images_per_call", [None, 1])
def test_hidden_states_are_mixed_whatever_else_is_asked(images_per_call):
    torch.manual_seed(0)
    teacher, batch = Teacher(create_model("resnet8", 5).double()), 20
    pixels = torch.rand(batch, 3, 32, 32, dtype=torch.float64)
    own, lam = torch.arange(batch), torch.linspace(0, 1, batch)
    draws = [MixDraws(own.roll(run), lam, torch.zeros(batch, 2), layer=own.int() % 3) for run in (1, 2)]
    runs = [*(manifold_mixup(pixels, of_run) for of_run in draws), mixup(pixels, draws[0])]
    branches = [Branch(()), Branch((0,)), Branch((0, 1), TEACHER_ENTROPY), Branch((2,))]
    found = teacher_pass(teacher, pixels, runs, branches, group=GROUP, images_per_call=images_per_call)
    for branch, outputs in zip(branches, found.branches, strict=True):
        (expected,) = _alone(branch, runs, teacher, teacher, pixels=pixels).branches
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-10)
        assert (outputs.mixed.hidden is None) == (branch.runs in ((), (2,)))
    assert not torch.allclose(found.branches[1].logits, found.originals.logits)


@pytest.mark.parametrize(("runs", "criterion"), [(0, None), (1, None), (2, TEACHER_ENTROPY), (2, STUDENT_ENTROPY)])
def test_features_are_those_of_the_originals_alone(student, pixels, runs, criterion):
    """Copied, where the net is asked about more: a part would keep the features of the whole pool."""
    torch.manual_seed(0)
    teacher = Teacher(Normalized(create_model("resnet8", 5), HALF, HALF).double())
    found = _pass(partial(teacher.outputs, preactivations=True), pixels, runs, criterion=criterion, student=student)
    expected = teacher.outputs(pixels, preactivations=True)
    (plain,) = _pass(teacher, pixels, runs, criterion=criterion, student=student).branches
    torch.testing.assert_close(found.originals, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.branches[0].logits, plain.logits, rtol=0, atol=1e-10)
    for features in (*found.originals.features, *found.originals.preactivations):
        assert features.untyped_storage().nbytes() == features.nbytes


# ----------------------------------------------------------------------------------------------- several teachers

SHARES = (0.2, 0.5, 0.3)


@pytest.fixture(scope="module")
def several() -> list[Teacher]:
    found = []
    for seed in range(3):
        torch.manual_seed(10 + seed)
        found.append(Teacher(Normalized(_net(), (0.1 * (seed + 4),) * 3, HALF).double()))
        found[-1].model.model[-1].weight.mul_(10)  # sure enough to differ in entropy
    return found


def _teachers(several: list[Teacher], by_entropy: bool) -> Teachers:
    return Teachers(several, "abc"[: len(several)], [10 * share for share in SHARES], by_entropy=by_entropy)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_mean_of_logits_is_the_geometric_mean_of_distributions(several, pixels, temperature):
    found = _teachers(several, by_entropy=False)(pixels)
    given = np.stack([teacher(pixels).numpy() for teacher in several])
    powers = np.exp(given / temperature)
    powers /= powers.sum(2, keepdims=True)
    geometric = np.prod([distribution**share for distribution, share in zip(powers, SHARES, strict=True)], axis=0)
    expected = geometric / geometric.sum(1, keepdims=True)
    np.testing.assert_allclose((found.logits / temperature).softmax(1).numpy(), expected, rtol=1e-12)
    assert all(torch.equal(own, teacher(pixels)) for own, teacher in zip(found.each, several, strict=True))


def test_a_teacher_that_is_sure_of_an_image_counts_more_there(several, pixels):
    found = _teachers(several, by_entropy=True)(pixels).logits
    given = [teacher(pixels).numpy() for teacher in several]
    for row, logits in enumerate(found.numpy()):
        weights = []
        for share, own in zip(SHARES, given, strict=True):
            distribution = np.exp(own[row]) / np.exp(own[row]).sum()
            weights.append(share * np.exp((distribution * np.log(distribution)).sum()))
        expected = sum(weight * own[row] for weight, own in zip(weights, given, strict=True)) / sum(weights)
        np.testing.assert_allclose(logits, expected, rtol=1e-10)
    certain = torch.tensor([[50.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 40.0]])
    combined = Teachers(several[:2], "ab", by_entropy=True).combine(certain)
    torch.testing.assert_close(combined, torch.tensor([[100.0 / 3, 0.0], [0.0, 80.0 / 3]]))  # exp(-ln 2) is a half


@pytest.mark.parametrize("by_entropy", [False, True])
def test_one_of_several_is_itself(several, pixels, by_entropy):
    alone = Teachers(several[:1], "a", by_entropy=by_entropy)
    assert torch.equal(alone(pixels).logits, several[0](pixels))


@pytest.mark.parametrize("by_entropy", [False, True])
def test_several_pick_by_what_they_say_together_and_are_asked_once(several, pixels, by_entropy):
    teachers, rows = _teachers(several, by_entropy), []
    hooks = [net.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))) for net in teachers.model]
    found = _pass(teachers, pixels, criterion=TEACHER_ENTROPY)
    for hook in hooks:
        hook.remove()
    assert rows == [3 * len(pixels)] * 3
    (branch,) = found.branches
    candidates = _candidates(pixels).images
    pool = teachers(candidates)
    picks = _brute_force_picks(entropy(pool.logits), len(pixels))
    assert branch.picks is not None
    assert branch.picks.tolist() == picks
    assert picks != _brute_force_picks(entropy(pool.each[0]), len(pixels))
    torch.testing.assert_close(branch.logits, pool.logits[picks])
    torch.testing.assert_close(branch.each, tuple(own[picks] for own in pool.each))
    torch.testing.assert_close(found.originals.each, teachers(pixels).each)
    torch.testing.assert_close(found.originals.logits, teachers(pixels).logits)


@pytest.mark.parametrize("criterion", [None, TEACHER_ENTROPY, STUDENT_ENTROPY])
def test_the_pass_of_several_compiles_whole(several, student, pixels, criterion):
    teachers, torn = _teachers(several, by_entropy=True), _runs(pixels, 1 if criterion is None else 2)
    branch = Branch(tuple(range(len(torn))), criterion)

    def ask(pixels: Tensor) -> TeacherPass:
        return teacher_pass(teachers.__call__, pixels, torn, [branch], group=GROUP, student=student)

    torch.compiler.reset()
    found, expected = torch.compile(ask, fullgraph=True, backend="eager")(pixels), ask(pixels)
    torch.compiler.reset()
    assert len(found.branches[0].each) == 3
    torch.testing.assert_close(found.originals, expected.originals)
    torch.testing.assert_close(found.branches[0].logits, expected.branches[0].logits)
    torch.testing.assert_close(found.branches[0].each, expected.branches[0].each)


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
