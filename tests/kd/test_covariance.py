"""Covariances of probabilities and of the cross-entropy against published series, numpy and closed forms."""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.covariance import CrossEntropyCovariance, ProbabilityCovariance

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "goodness_covariance.json").read_text())
FIGURES = ("covariance_samples", "covariance_classes", "correlation_samples", "correlation_classes")
BOTH = [ProbabilityCovariance, CrossEntropyCovariance]


def published_steps(case: dict) -> Iterator[list[Tensor]]:
    """Teacher on originals and augmented images, student on both."""
    random = np.random.RandomState(case["seed"])
    for _ in range(case["steps"]):
        draws = [case["scale"] * random.randn(case["batch"], case["num_classes"]) for _ in range(4)]
        yield [torch.from_numpy(draw) for draw in draws]


def make(kind: type, group: int = 4) -> Any:
    return ProbabilityCovariance(5, group) if kind is ProbabilityCovariance else CrossEntropyCovariance(20, 3, group)


def feed(metric: Any, rows: Tensor, batch: int) -> Any:
    """Rows [4, n, C] in the order of `published_steps`, `batch` at a time."""
    for part in rows.split(batch, dim=1):
        metric.update(*(part[:2] if isinstance(metric, ProbabilityCovariance) else part))
    return metric


def numpy_figures(originals: Tensor, augmented: Tensor) -> dict[str, float]:
    rows = torch.softmax(torch.cat((augmented, originals)), dim=1).numpy()
    matrices = [np.cov(rows), np.cov(rows.T), np.corrcoef(rows), np.corrcoef(rows.T)]
    means = {name: matrix.mean() for name, matrix in zip(FIGURES, matrices, strict=True)}
    return means | {f"{name}_abs": np.abs(matrix).mean() for name, matrix in zip(FIGURES, matrices, strict=True)}


def assert_same(result: Any, expected: Any) -> None:
    for name, value in asdict(expected).items():
        assert asdict(result)[name] == pytest.approx(value, rel=1e-9, abs=1e-16), name


def test_published_probabilities():
    case = REFERENCE["main_mix"]
    metric = ProbabilityCovariance(case["num_classes"])
    for step, (logits, augmented, *_) in enumerate(published_steps(case), start=1):
        metric.update(logits, augmented)
        result = asdict(metric.compute())
        assert result["blocks"] == step
        for name in FIGURES:
            mean, mean_abs = np.mean(case["per_step"][name][:step], axis=0)
            assert result[name] == pytest.approx(mean, rel=1e-10, abs=1e-19)  # of classes: 0 but for rounding
            assert result[f"{name}_abs"] == pytest.approx(mean_abs, rel=1e-12)
    assert (result["constant_samples"], result["constant_classes"], result["left_out"]) == (0, 0, 0)


@pytest.mark.parametrize("name", ["as_written", "small_mix"])
def test_published_cross_entropy(name: str):
    case = REFERENCE[name]
    metric = CrossEntropyCovariance(case["size"], case["draws"], case["batch"])
    for rows in published_steps(case):
        metric.update(*rows)
    result = metric.compute(first=case["draws"])
    assert result.covariance == pytest.approx(case["covariance"], rel=1e-11)
    assert result.approximation == pytest.approx(case["approximation"], rel=1e-11)
    assert (result.draws, result.size, result.complete) == (case["draws"], case["size"], True)
    first = metric.state_dict()["draws"][0, :4]
    assert first[:, 0].tolist() == pytest.approx(case["first_entropies"], rel=1e-12)
    assert first[:, 1].tolist() == pytest.approx(case["first_values"], rel=1e-12)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batching_does_not_matter(kind: type, dtype: torch.dtype):
    rows = torch.randn(4, 107, 5, dtype=dtype) * 2
    whole = feed(make(kind), rows, 107).compute()
    for batch in (1, 3, 4, 10, 64):
        assert_same(feed(make(kind), rows, batch).compute(), whole)


def test_blocks_are_steps_of_consecutive_pairs():
    originals, augmented = torch.randn(2, 11, 5, dtype=torch.float64).unbind()
    metric = ProbabilityCovariance(5, group=4)
    metric.update(originals, augmented)
    result = asdict(metric.compute())
    blocks = [numpy_figures(originals[i : i + 4], augmented[i : i + 4]) for i in (0, 4)]
    assert result["blocks"] == 2  # the open one does not count
    for name in blocks[0]:
        assert result[name] == pytest.approx((blocks[0][name] + blocks[1][name]) / 2, rel=1e-12, abs=1e-16)


def test_groups_with_fewer_picks_are_blocks_and_the_short_one_is_counted():
    originals, augmented = torch.randn(2, 10, 5, dtype=torch.float64).unbind()
    metric = ProbabilityCovariance(5, group=4)
    metric.update(originals, augmented[:8])  # 3 of each 4, ceil(3 * 2 / 4) of the last 2
    metric.update(originals[:2], augmented[:2])  # a short group alone, that keeps as many as it has
    result = asdict(metric.compute())
    blocks = [numpy_figures(originals[4 * i : 4 * i + 4], augmented[3 * i : 3 * i + 3]) for i in (0, 1)]
    assert (result["blocks"], result["left_out"]) == (2, 4)
    for name in blocks[0]:
        assert result[name] == pytest.approx((blocks[0][name] + blocks[1][name]) / 2, rel=1e-12, abs=1e-16)


def test_constant_rows_and_columns_have_no_correlation():
    rows = torch.randn(8, 5, dtype=torch.float64)
    rows[3] = 0.7  # a row of 1/5 each
    rows[:, 2] = -torch.inf  # after which every row's column 2 is 0, and row 3 is no longer constant
    rows[6] = -1e4
    rows[6, 2] = -1e4  # constant after all
    metric = ProbabilityCovariance(5, group=4)
    metric.update(rows[4:], rows[:4])
    metric.update(torch.zeros(4, 5), torch.zeros(4, 5))  # nothing varies
    result = metric.compute()
    probabilities = torch.softmax(rows, dim=1).numpy()
    probabilities = np.concatenate((probabilities[:4], probabilities[4:]))
    varying_rows = np.delete(probabilities, 6, axis=0)
    assert (result.constant_samples, result.constant_classes, result.blocks) == (1 + 8, 5, 2)
    assert result.correlation_samples == pytest.approx(np.corrcoef(varying_rows).mean(), rel=1e-9)
    assert result.correlation_samples_abs == pytest.approx(np.abs(np.corrcoef(varying_rows)).mean(), rel=1e-9)
    assert result.correlation_classes == pytest.approx(np.corrcoef(probabilities.T).mean(), rel=1e-9)
    assert result.covariance_samples == pytest.approx(np.cov(probabilities).mean() / 2, rel=1e-9)


def test_a_column_whose_variance_underflows_is_constant():
    rows = torch.randn(8, 5, dtype=torch.float64)
    rows[:, 2] -= 390  # probabilities of about 1e-170, that differ
    metric = ProbabilityCovariance(5, group=4)
    metric.update(rows[4:], rows[:4])
    result = metric.compute()
    probabilities = torch.softmax(rows, dim=1).numpy()
    varying = np.delete(probabilities, 2, axis=1)
    assert (result.constant_samples, result.constant_classes) == (0, 1)
    assert result.correlation_classes == pytest.approx(np.corrcoef(varying.T).mean(), rel=1e-9)


@pytest.mark.parametrize("classes", [7, 13, 23])
def test_equal_values_are_constant_though_their_mean_is_rounded(classes: int):
    rows = torch.randn(8, classes, dtype=torch.float64)
    rows[5] = 0
    metric = ProbabilityCovariance(classes, group=4)
    metric.update(rows[4:], rows[:4])
    varying = np.delete(torch.softmax(rows, dim=1).numpy(), 5, axis=0)
    assert metric.compute().constant_samples == 1
    assert metric.compute().correlation_samples == pytest.approx(np.corrcoef(varying).mean(), rel=1e-9)


def test_nothing_but_constants_has_no_correlation_at_all():
    metric = ProbabilityCovariance(5, group=4)
    metric.update(torch.zeros(4, 5), torch.zeros(4, 5))
    result = metric.compute()
    assert (result.correlation_samples, result.correlation_classes_abs) == (None, None)
    assert (result.covariance_samples, result.covariance_classes_abs) == (0, 0)


@pytest.mark.parametrize("kind", BOTH)
def test_a_broken_teacher_is_not_hidden(kind: type):
    rows = torch.randn(4, 60, 5)
    rows[:, 9, 1] = torch.nan
    result = asdict(feed(make(kind), rows, 60).compute())
    for name in FIGURES if kind is ProbabilityCovariance else ("covariance", "approximation"):
        assert math.isnan(result[name])


def test_cross_entropy_equals_the_matrix():
    teacher, student = torch.randn(2, 60, 5, dtype=torch.float64).unbind()
    metric = CrossEntropyCovariance(size=12, draws=5)
    for start in (0, 25, 50):
        metric.update(teacher[start : start + 25], student=student[start : start + 25])
    target = torch.softmax(teacher, dim=1)
    for of, found in ((student, metric.compute().covariance), (teacher, metric.compute().approximation)):
        values = -(target * torch.log_softmax(of, dim=1)).sum(dim=1).reshape(5, 12).numpy()
        matrix = np.cov(values / values.max(axis=0), rowvar=False)
        assert found == pytest.approx(np.tril(matrix, -1).sum() / 144, rel=1e-10)


def test_values_of_a_step_are_originals_then_augmented():
    teacher, augmented = torch.randn(2, 8, 5, dtype=torch.float64).unbind()
    pairs = CrossEntropyCovariance(size=8, group=4, student=False)
    pairs.update(teacher[:3], augmented[:3])
    pairs.update(teacher[3:], augmented[3:])
    groups = CrossEntropyCovariance(size=3, group=4, student=False)
    groups.update(teacher[:6], augmented[:6][:3])  # 2 of 4, 1 of the last 2
    ordered = torch.cat((teacher[:4], augmented[:4], teacher[4:], augmented[4:]))
    picked = torch.cat((teacher[:4], augmented[:2], teacher[4:6], augmented[2:3]))
    for metric, rows in ((pairs, ordered), (groups, picked)):
        expected = -(torch.softmax(rows, dim=1) * torch.log_softmax(rows, dim=1)).sum(dim=1)
        assert metric.state_dict()["draws"].flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_without_a_student_there_is_the_approximation():
    rows = torch.randn(4, 60, 5, dtype=torch.float64)
    both = feed(make(CrossEntropyCovariance), rows, 60)
    alone = CrossEntropyCovariance(20, 3, 4, student=False)
    alone.update(rows[0], rows[1])
    assert alone.compute().covariance is None
    assert alone.compute().approximation == both.compute().approximation


def test_draws_beyond_the_published_number_count_as_well():
    metric = make(CrossEntropyCovariance, group=5)  # 3 draws of 20
    seen = []
    rows = torch.randn(4, 50, 5, dtype=torch.float64)
    for part in rows.split(10, dim=1):  # one draw each
        result = feed(metric, part, 10).compute()
        seen.append((result.draws, result.complete, result.covariance is None))
    assert seen == [(1, False, True), (2, False, False), (3, True, False), (4, True, False), (5, True, False)]
    assert metric.compute(first=3) == feed(make(CrossEntropyCovariance, group=5), rows[:, :30], 30).compute()
    assert metric.compute(first=3) != metric.compute()


def test_sure_teachers_and_students_stay_finite():
    teacher, student = torch.randn(2, 60, 5).unbind()
    teacher[::6] = torch.tensor([5e3, -5e3, 0.0, 0.0, 0.0])  # entropy 0 at position 0 of each draw
    student[1, 2] = -torch.inf
    teacher[1, 2] = -torch.inf
    metric = CrossEntropyCovariance(size=6, draws=5)
    metric.update(teacher, student=student)
    result = metric.compute()
    assert result.constant_positions == 1
    assert result.covariance is not None
    assert math.isfinite(result.covariance)
    values = metric.state_dict()["draws"][:, :, 0].numpy()[:, 1:]
    matrix = np.cov(values / values.max(axis=0), rowvar=False)
    assert result.approximation == pytest.approx(np.tril(matrix, -1).sum() / 36, rel=1e-9)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("seen", [0, 33])
def test_resuming_in_the_middle(kind: type, seen: int):
    rows = torch.randn(4, 77, 5)
    file = io.BytesIO()
    torch.save(feed(make(kind), rows[:, :seen], 9).state_dict() if seen else make(kind).state_dict(), file)
    resumed = make(kind)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert_same(feed(resumed, rows[:, seen:], 11).compute(), feed(make(kind), rows, 7).compute())


@pytest.mark.parametrize("kind", BOTH)
def test_a_saved_state_does_not_change_afterwards(kind: type):
    metric = feed(make(kind), torch.randn(4, 50, 5), 50)
    state, before = metric.state_dict(), metric.compute()
    feed(metric, torch.randn(4, 50, 5), 50)
    restored = make(kind)
    restored.load_state_dict(state)
    assert restored.compute() == before
    feed(restored, torch.randn(4, 50, 5), 50)
    again = make(kind)
    again.load_state_dict(state)
    assert again.compute() == before


@pytest.mark.parametrize("kind", BOTH)
def test_moving_keeps_the_stream(kind: type):
    rows = torch.randn(4, 90, 5)
    moved = feed(make(kind), rows[:, :50], 50).to("cpu")
    assert_same(feed(moved, rows[:, 50:], 40).compute(), feed(make(kind), rows, 90).compute())


@pytest.mark.parametrize("kind", BOTH)
def test_unusable_rows_are_refused(kind: type):
    metric = make(kind)
    rows = torch.zeros(4, 5)
    students = [] if kind is ProbabilityCovariance else [rows, rows]
    with pytest.raises(ValueError, match="logits have shape"):
        metric.update(torch.zeros(4), rows, *students)
    with pytest.raises(ValueError, match="augmented logits are on meta"):
        metric.update(rows, rows.to("meta"), *students)
    metric.update(rows, rows, *students)
    with pytest.raises(ValueError, match="changes from pairs to groups"):
        metric.update(rows, torch.zeros(2, 5), *[rows[: 4 - 2 * i] for i in range(len(students))])
    with pytest.raises(ValueError, match="do not form mix groups"):
        metric.update(rows[:3].repeat(3, 1), rows, *[rows[:3].repeat(3, 1), rows][: len(students)])


def test_missing_and_needless_logits_are_refused():
    rows = torch.zeros(4, 5)
    both, alone = CrossEntropyCovariance(20), CrossEntropyCovariance(20, student=False)
    for metric, given in [
        (both, (rows,)), (both, (rows, rows, rows)), (both, (rows, None, rows, rows)), (alone, (rows, None, rows)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="missing or too many"):
            metric.update(*given)
    with pytest.raises(ValueError, match="same rows and classes"):
        both.update(rows, student=rows[:3])
    both.update(rows, student=rows)
    with pytest.raises(ValueError, match="changes from rows to pairs"):
        both.update(rows, rows, rows, rows)
    with pytest.raises(ValueError, match="give \\[rows, 5\\]"):
        ProbabilityCovariance(5).update(torch.zeros(4, 6), torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("arguments", "message"), [((1,), "size is 1"), ((20, 1), "draws is 1"), ((20, 2, 0), "group is 0")]
)
def test_unusable_sizes_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        CrossEntropyCovariance(*arguments)


def test_unusable_blocks_are_refused():
    with pytest.raises(ValueError, match="num_classes is 1"):
        ProbabilityCovariance(1)
    with pytest.raises(ValueError, match="group is 0"):
        ProbabilityCovariance(5, group=0)


@pytest.mark.parametrize(
    ("metric", "other"),
    [
        (ProbabilityCovariance(5), ProbabilityCovariance(6)),
        (ProbabilityCovariance(5), ProbabilityCovariance(5, group=32)),
        (CrossEntropyCovariance(20), CrossEntropyCovariance(21)),
        (CrossEntropyCovariance(20), CrossEntropyCovariance(20, group=32)),
        (CrossEntropyCovariance(20), CrossEntropyCovariance(20, student=False)),
    ],
)
def test_a_state_of_another_metric_is_refused(metric: Any, other: Any):
    with pytest.raises(ValueError, match="resume with the same"):
        metric.load_state_dict(other.state_dict())


def test_only_draws_stay_in_memory():
    metric = CrossEntropyCovariance(size=20, draws=3, group=4)
    feed(metric, torch.randn(4, 40, 5), 40)
    kept = [value for value in metric.state_dict().values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in kept) == 4 * 20 * 2
