"""Entropy and picks against published cases and brute force."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.picking import (
    CRITERIA,
    PoolOutputs,
    criterion_by_name,
    dissimilarity,
    entropy,
    kl_divergence,
    pick,
    pick_count,
    pick_rows,
)

CASES = json.loads((Path(__file__).parents[1] / "data" / "picking.json").read_text())["cases"]


def pool_outputs(case: dict, dtype: torch.dtype) -> PoolOutputs:
    random = np.random.RandomState(case["seed"])
    pool = case["mix_n_run"] * case["batch"]
    return PoolOutputs(
        *(
            torch.from_numpy(case["scale"] * random.randn(rows, case["num_classes"])).to(dtype)
            for rows in (pool, pool, case["batch"])
        )
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_picks(case: dict, name: str, dtype: torch.dtype):
    criterion, outputs = criterion_by_name(name, case["temperature"]), pool_outputs(case, dtype)
    needed = (criterion.needs_teacher, criterion.needs_student, True)
    given = PoolOutputs(*(logits if needs else None for logits, needs in zip(outputs, needed, strict=True)))
    scores = criterion.score(given, case["batch"])
    picks = pick_rows(scores.reshape(-1, case["batch"]), case["batch"])
    expected = case["scores"][name]
    assert scores.dtype == dtype
    assert len(scores) == case["mix_n_run"] * case["batch"]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert scores[: len(expected)].tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert picks.tolist() == sorted(case["picks"][name])
    assert torch.equal(pick(scores, case["n_pick"]), picks)


def test_entropy_of_certainty_and_of_ignorance():
    assert entropy(torch.tensor([[1e4, 0.0, -1e4]])).item() == 0.0
    assert entropy(torch.zeros(1, 100)).item() == pytest.approx(np.log(100))


def test_entropy_is_never_nan_for_an_impossible_class():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert entropy(logits).item() == pytest.approx(np.log(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropy_of_half_logits_is_computed_in_float32(dtype: torch.dtype):
    logits = torch.randn(8, 1000).to(dtype)
    assert entropy(logits).dtype == torch.float32
    assert torch.equal(entropy(logits), entropy(logits.float()))


def test_divergence_is_that_of_softened_outputs():
    teacher, student = (torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).unbind()
    p, q = (logits.div(3).exp() / logits.div(3).exp().sum(1, keepdim=True) for logits in (teacher, student))
    torch.testing.assert_close(kl_divergence(teacher, student, 3.0), (p * (p / q).log()).sum(1))
    torch.testing.assert_close(kl_divergence(teacher, teacher), torch.zeros(6, dtype=torch.float64))
    assert CRITERIA["kld"].score(PoolOutputs(teacher, student, None), 4).tolist() == (
        kl_divergence(teacher, student, 4.0).tolist()
    )


def test_divergence_is_never_nan_for_an_impossible_class():
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert kl_divergence(teacher, torch.zeros(1, 3), 1.0).item() == pytest.approx(np.log(1.5))
    assert kl_divergence(teacher, teacher).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_logits_are_computed_in_float32(dtype: torch.dtype):
    teacher, student = torch.randn(2, 8, 100).to(dtype)
    for score in (kl_divergence, lambda pool, originals: dissimilarity(pool, originals, 4)):
        assert score(teacher, student).dtype == torch.float32
        assert torch.equal(score(teacher, student), score(teacher.float(), student.float()))


@pytest.mark.parametrize(("batch", "group"), [(12, 4), (13, 4), (3, 4), (5, 1)])
@pytest.mark.parametrize("runs", [1, 3])
def test_dissimilarity_is_to_the_nearest_original_of_the_group(batch: int, group: int, runs: int):
    generator = torch.Generator().manual_seed(batch)
    pool = 3 * torch.randn(runs * batch, 7, dtype=torch.float64, generator=generator)
    originals = 3 * torch.randn(batch, 7, dtype=torch.float64, generator=generator)
    own, theirs = pool.softmax(1), originals.softmax(1)
    expected = []
    for place in range(runs * batch):
        first = place % batch // group * group
        distances = [((own[place] - original) ** 2).sum().item() for original in theirs[first : first + group]]
        expected.append(min(distances))
    assert dissimilarity(pool, originals, group).tolist() == pytest.approx(expected, rel=1e-12)


def test_dissimilarity_tells_confident_outputs_apart():
    """Inner products of such probabilities differ by less than float32 resolves."""
    pool = torch.tensor([[9.0, 0.0, -9.0], [9.0, -1.0, -9.0], [9.0, -2.0, -9.0]])
    scores = dissimilarity(pool, torch.tensor([[9.0, -9.0, -9.0]]), 1)
    exact = dissimilarity(pool.double(), torch.tensor([[9.0, -9.0, -9.0]]).double(), 1)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-2, atol=0)


def test_unusable_criteria_are_refused():
    with pytest.raises(ValueError, match=r'unknown criterion "entropy": there are teacher_entropy, student_entropy'):
        criterion_by_name("entropy")
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"--mix.pick_temperature .*: give a number above 0"):
            criterion_by_name("kld", temperature)
    with pytest.raises(ValueError, match="7 candidates are no whole runs over 4 originals"):
        dissimilarity(torch.zeros(7, 3), torch.zeros(4, 3), 4)
    with pytest.raises(ValueError, match="group is 0"):
        dissimilarity(torch.zeros(8, 3), torch.zeros(4, 3), 0)


def test_picks_are_in_pool_order_segment_by_segment():
    scores = torch.tensor([5.0, 1.0, 9.0, 7.0, 0.0, 0.5, 0.25, 0.125])
    assert pick(scores, 2, groups=2).tolist() == [2, 3, 5, 6]
    assert pick(scores, 4, groups=2).tolist() == list(range(8))


def test_of_equal_scores_the_later_are_kept():
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    published = np.sort(np.argsort(scores.numpy(), kind="stable")[-3:])
    assert pick(scores, 3).tolist() == published.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("k", "groups"), [(5, 2), (0, 1), (-1, 1), (9, 1), (1, 3), (1, 0)])
def test_impossible_picks_are_refused(k: int, groups: int):
    with pytest.raises(ValueError, match=r"cannot pick|equal groups"):
        pick(torch.zeros(8), k, groups)


def brute_force_rows(scores: Tensor, group: int, keep: int | None = None) -> list[int]:
    runs, batch = scores.shape
    picks = []
    for first in range(0, batch, group):
        columns = range(first, min(first + group, batch))
        pool = [run * batch + column for run in range(runs) for column in columns]
        values = scores.flatten()[pool].numpy()
        count = math.ceil((keep or group) * len(columns) / group)
        kept = np.sort(np.argsort(values, kind="stable")[len(pool) - count :])
        picks += [pool[index] for index in kept]
    return picks


@pytest.mark.parametrize("keep", [None, 1, 3, 4])
@pytest.mark.parametrize("runs", [1, 2, 3])
@pytest.mark.parametrize(("batch", "group"), [(12, 4), (13, 4), (3, 4), (4, 4), (15, 4)])
def test_pick_rows_equals_a_loop_over_groups(runs: int, batch: int, group: int, keep: int | None):
    generator = torch.Generator().manual_seed(batch)
    scores = torch.randint(0, 5, (runs, batch), generator=generator).float()  # with many ties
    picks = pick_rows(scores, group, keep)
    assert picks.dtype == torch.int64
    assert picks.tolist() == brute_force_rows(scores, group, keep)
    assert len(picks) == pick_count(batch, group, keep)


def test_groups_of_one_original():
    assert pick_rows(torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0]]), 1).tolist() == [3, 1, 5]


def test_more_may_be_kept_than_there_are_originals():
    scores = torch.rand(3, 13, generator=torch.Generator().manual_seed(0))
    picks = pick_rows(scores, 4, 10)
    assert picks.tolist() == brute_force_rows(scores, 4, 10)
    assert len(picks) == pick_count(13, 4, 10) == 3 * 10 + 3  # of the last group's 3 candidates all, as 2.5 round up
    assert sorted(pick_rows(scores, 4, 12).tolist()) == list(range(39))
    assert pick_count(13, 4) == 13


@pytest.mark.parametrize("keep", [0, -1, 9])
def test_more_than_the_pool_holds_is_refused(keep: int):
    with pytest.raises(ValueError, match=rf"--mix.n_pick {keep} of a pool of 8: .*--mix.n_run 2 x --mix.group 4"):
        pick_rows(torch.zeros(2, 8), 4, keep)


def test_pick_rows_of_a_group_do_not_depend_on_the_batch():
    scores = torch.rand(2, 256)
    whole = pick_rows(scores, 64)
    for start in range(0, 256, 128):
        part = pick_rows(scores[:, start : start + 128], 64)
        run, column = part // 128, part % 128 + start
        assert torch.equal(run * 256 + column, whole[start : start + 128])


def test_unusable_rows_are_refused():
    with pytest.raises(ValueError, match="group is 0"):
        pick_rows(torch.zeros(2, 8), 0)
    for shape in [(8,), (2, 0), (0, 8)]:
        with pytest.raises(ValueError, match="give \\[runs, batch\\]"):
            pick_rows(torch.zeros(shape), 4)
