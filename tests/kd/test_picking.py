"""Entropy and picks against published cases and brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.picking import entropy, pick, pick_rows

CASES = json.loads((Path(__file__).parents[1] / "data" / "picking.json").read_text())["cases"]


def pool_logits(case: dict) -> dict[str, Tensor]:
    random = np.random.RandomState(case["seed"])
    shape = (case["mix_n_run"] * case["batch"], case["num_classes"])
    names = ("teacher_entropy", "student_entropy")
    return {name: torch.from_numpy(case["scale"] * random.randn(*shape)) for name in names}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("criterion", ["teacher_entropy", "student_entropy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_picks(case: dict, criterion: str, dtype: torch.dtype):
    scores = entropy(pool_logits(case)[criterion].to(dtype))
    expected = case["entropy"][criterion]
    assert scores.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert scores[: len(expected)].tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    picks = pick(scores, case["n_pick"])
    assert picks.tolist() == sorted(case["picks"][criterion])
    rows = pick_rows(scores.reshape(case["mix_n_run"], case["batch"]), case["batch"])
    assert torch.equal(rows, picks)


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


def brute_force_rows(scores: Tensor, group: int) -> list[int]:
    runs, batch = scores.shape
    picks = []
    for first in range(0, batch, group):
        columns = range(first, min(first + group, batch))
        pool = [run * batch + column for run in range(runs) for column in columns]
        values = scores.flatten()[pool].numpy()
        kept = np.sort(np.argsort(values, kind="stable")[len(pool) - len(columns) :])
        picks += [pool[index] for index in kept]
    return picks


@pytest.mark.parametrize("runs", [1, 2, 3])
@pytest.mark.parametrize(("batch", "group"), [(12, 4), (13, 4), (3, 4), (4, 4), (5, 1), (9, 4)])
def test_pick_rows_equals_a_loop_over_groups(runs: int, batch: int, group: int):
    generator = torch.Generator().manual_seed(batch)
    scores = torch.randint(0, 5, (runs, batch), generator=generator).float()  # with many ties
    picks = pick_rows(scores, group)
    assert picks.dtype == torch.int64
    assert picks.tolist() == brute_force_rows(scores, group)


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
