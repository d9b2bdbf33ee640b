"""T. stddev against published series, closed forms and simulation."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.goodness import TeacherStddev

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "goodness.json").read_text())
CLASSES = 100
FLOOR = math.sqrt(0.01 * 0.99 / 320)  # T. stddev of a one-hot teacher over 100 classes and identity


def published_steps(case: dict) -> Iterator[tuple[Tensor, Tensor]]:
    random = np.random.RandomState(case["seed"])
    for _ in range(case["steps"]):  # originals, augmented images, and the student on both
        draws = [case["scale"] * random.randn(case["batch"], case["num_classes"]) for _ in range(4)]
        yield torch.from_numpy(draws[0]), torch.from_numpy(draws[1])


def one_hot_logits(rows: int, seed: int) -> Tensor:
    labels = torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(labels, CLASSES) * 500.0


def feed(metric: TeacherStddev, logits: Tensor, batch: int, augmented: Tensor | None = None) -> TeacherStddev:
    for start in range(0, len(logits), batch):
        part = slice(start, start + batch)
        metric.update(logits[part], None if augmented is None else augmented[part])
    return metric


def brute_force(logits: Tensor, window: int) -> tuple[np.ndarray, float]:
    probabilities = torch.softmax(logits.double(), dim=1).numpy()
    windows = len(probabilities) // window
    means = probabilities[: windows * window].reshape(windows, window, -1).mean(axis=1)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=1).mean()
    return means.std(axis=0, ddof=1), float(entropy)


@pytest.mark.parametrize("name", ["main_nomix", "main_mix"])
def test_published_series(name: str):
    case = REFERENCE[name]
    metric = TeacherStddev(case["num_classes"], window=640 if case["mixing"] else 320)
    series = iter(case["series"])
    for step, (logits, augmented) in enumerate(published_steps(case)):
        metric.update(logits, augmented if case["mixing"] else None)
        if step % 5 == 4:
            images, stddev, entropy = next(series)
            result = metric.compute()
            assert result.images == images
            assert result.stddev == (None if stddev is None else pytest.approx(stddev, rel=1e-9))
            assert result.entropy == pytest.approx(entropy, rel=1e-9)
    assert next(series, None) is None


@pytest.mark.parametrize("batch", [64, 100, 512])
def test_one_hot_teacher_and_identity_reach_the_closed_form(batch: int):
    logits = one_hot_logits(320 * 300, seed=1)
    result = feed(TeacherStddev(CLASSES), logits, batch, logits).compute()
    assert result.windows == 300
    assert result.stddev is not None
    assert result.stderr is not None
    assert abs(result.stddev - FLOOR) < 3 * result.stderr
    assert result.stderr < 0.02 * FLOOR
    assert result.entropy == 0.0


def test_originals_before_copies_would_fall_below_the_floor():
    logits = one_hot_logits(512 * 200, seed=2)
    metric = TeacherStddev(CLASSES)
    for start in range(0, len(logits), 512):
        metric.update(torch.cat([logits[start : start + 512]] * 2))
    stddev = metric.compute().stddev
    assert stddev == pytest.approx(0.00430, rel=0.03)


def test_independent_halves_reach_their_own_floor():
    logits, augmented = one_hot_logits(320 * 300, seed=3), one_hot_logits(320 * 300, seed=4)
    stddev = feed(TeacherStddev(CLASSES), logits, 512, augmented).compute().stddev
    assert stddev == pytest.approx(FLOOR / math.sqrt(2), rel=0.02)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batching_does_not_matter(paired: bool, dtype: torch.dtype):
    torch.manual_seed(5)
    logits, augmented = (torch.randn(2, 1037, 7, dtype=dtype) * 3).unbind()
    results = [
        feed(TeacherStddev(7, window=20), logits, batch, augmented if paired else None).compute()
        for batch in (1037, 512, 100, 64, 20, 7, 1)
    ]
    first = results[0]
    assert first.windows == (103 if paired else 51)
    assert first.images == (2074 if paired else 1037)
    for other in results[1:]:
        assert (other.windows, other.images) == (first.windows, first.images)
        assert other.per_class == pytest.approx(first.per_class, rel=1e-12)
        for name in ("stddev", "entropy", "stderr"):
            assert getattr(other, name) == pytest.approx(getattr(first, name), rel=1e-10)


def test_rows_equal_brute_force():
    logits = torch.randn(1037, 7, dtype=torch.float64)
    per_class, entropy = brute_force(logits, 20)
    result = feed(TeacherStddev(7, window=20), logits, 33).compute()
    assert result.per_class == pytest.approx(per_class.tolist(), rel=1e-12)
    assert result.stddev == pytest.approx(per_class.mean(), rel=1e-12)
    assert result.entropy == pytest.approx(entropy, rel=1e-12)
    assert result.window == 20


def test_pairs_equal_interleaved_rows():
    logits, augmented = torch.randn(2, 200, 7, dtype=torch.float64).unbind()
    pairs = feed(TeacherStddev(7, window=20), logits, 33, augmented).compute()
    interleaved = torch.stack([logits, augmented], dim=1).flatten(0, 1)
    rows = feed(TeacherStddev(7, window=20), interleaved, 33).compute()
    assert pairs.per_class == pytest.approx(rows.per_class, rel=1e-12)
    assert (pairs.windows, pairs.images) == (rows.windows, rows.images) == (20, 400)


def test_an_incomplete_window_counts_for_the_entropy_only():
    logits = torch.randn(59, 7, dtype=torch.float64)
    result = feed(TeacherStddev(7, window=20), logits, 59).compute()
    complete = feed(TeacherStddev(7, window=20), logits[:40], 40).compute()
    assert result.per_class == complete.per_class
    assert result.images == 59
    assert result.entropy == pytest.approx(brute_force(logits, 20)[1], rel=1e-12)


def test_short_streams_have_no_result_yet():
    metric = TeacherStddev(7, window=20)
    empty = metric.compute()
    assert (empty.stddev, empty.entropy, empty.stderr, empty.per_class, empty.images) == (None, None, None, [], 0)
    metric.update(torch.randn(39, 7))
    one = metric.compute()
    assert (one.stddev, one.stderr, one.windows) == (None, None, 1)
    assert one.entropy is not None
    metric.update(torch.randn(30, 7))
    three = metric.compute()
    assert (three.stddev is None, three.stderr is None, three.windows) == (False, True, 3)
    metric.update(torch.randn(11, 7))
    assert metric.compute().stderr is not None


def test_underflowed_probabilities_have_no_entropy():
    metric = TeacherStddev(3, window=2)
    metric.update(torch.tensor([[500.0, -500.0, 0.0], [0.0, 500.0, -500.0], [0.0, 0.0, -1e30], [0.0, 0.0, -torch.inf]]))
    result = metric.compute()
    assert result.entropy == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert result.stddev is not None
    assert math.isfinite(result.stddev)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_read_in_float32(dtype: torch.dtype):
    logits = torch.randn(100, 7).to(dtype)
    half, full = (feed(TeacherStddev(7, window=10), values, 32).compute() for values in (logits, logits.float()))
    assert half == full


def test_a_stream_resumes_inside_a_window():
    logits, augmented = torch.randn(2, 777, 7).unbind()
    whole = feed(TeacherStddev(7, window=20), logits, 37, augmented)
    before = feed(TeacherStddev(7, window=20), logits[:333], 37, augmented[:333])
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    after = TeacherStddev(7, window=20)
    after.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    feed(after, logits[333:], 37, augmented[333:])
    assert after.compute() == whole.compute()


def test_a_saved_state_does_not_change_afterwards():
    metric = feed(TeacherStddev(7, window=20), torch.randn(50, 7), 50)
    state = metric.state_dict()
    before = metric.compute()
    feed(metric, torch.randn(50, 7), 50)
    restored = TeacherStddev(7, window=20)
    restored.load_state_dict(state)
    assert restored.compute() == before


def test_moving_keeps_the_stream():
    logits = torch.randn(90, 7)
    moved = feed(TeacherStddev(7, window=20), logits[:50], 50).to("cpu")
    assert feed(moved, logits[50:], 40).compute() == feed(TeacherStddev(7, window=20), logits, 50).compute()


@pytest.mark.parametrize("windows", [10, 25, 60])  # fewer than the groups, uneven groups, even groups
def test_stderr_is_the_spread_over_repeated_streams(windows: int):
    generator = torch.Generator().manual_seed(windows)
    results = []
    for _ in range(150):
        logits = torch.randn(windows * 10, 6, generator=generator) * 2
        results.append(feed(TeacherStddev(6, window=10), logits, len(logits)).compute())
    spread = np.std([result.stddev for result in results], ddof=1)
    claimed = np.sqrt(np.mean([result.stderr**2 for result in results if result.stderr is not None]))
    assert claimed == pytest.approx(spread, rel=0.3)


def test_stderr_of_single_window_groups_is_the_plain_jackknife():
    logits = torch.randn(12 * 20, 7, dtype=torch.float64)
    result = feed(TeacherStddev(7, window=20), logits, 240).compute()
    means = torch.softmax(logits, dim=1).reshape(12, 20, 7).mean(dim=1).numpy()
    without = np.array([np.delete(means, window, axis=0).std(axis=0, ddof=1).mean() for window in range(12)])
    expected = math.sqrt(11 / 12 * ((without - without.mean()) ** 2).sum())
    assert result.stderr == pytest.approx(expected, rel=1e-9)


def test_memory_does_not_grow_with_the_stream():
    metric = TeacherStddev(7, window=20)

    def numbers() -> int:
        return sum(value.numel() for value in metric.state_dict().values() if isinstance(value, Tensor))

    before = numbers()
    feed(metric, torch.randn(5000, 7), 500)
    assert numbers() == before


@pytest.mark.parametrize("window", [0, -640, 5])
def test_unusable_windows_are_refused(window: int):
    with pytest.raises(ValueError, match=f"window is {window}"):
        TeacherStddev(7, window=window)


def test_unusable_rows_are_refused():
    metric = TeacherStddev(7, window=20)
    with pytest.raises(ValueError, match="num_classes"):
        TeacherStddev(0)
    for shape in [(5, 8), (7,), (5, 7, 1)]:
        with pytest.raises(ValueError, match="give \\[rows, 7\\]"):
            metric.update(torch.zeros(shape))
    with pytest.raises(ValueError, match="give pairs"):
        metric.update(torch.zeros(5, 7), torch.zeros(4, 7))
    with pytest.raises(ValueError, match="logits are on meta"):
        metric.update(torch.zeros(5, 7, device="meta"))
    metric.update(torch.zeros(5, 7))
    with pytest.raises(ValueError, match="between rows and pairs"):
        metric.update(torch.zeros(5, 7), torch.zeros(5, 7))
    assert metric.compute().images == 5


@pytest.mark.parametrize("other", [TeacherStddev(8, window=20), TeacherStddev(7, window=40)])
def test_a_state_of_another_metric_is_refused(other: TeacherStddev):
    with pytest.raises(ValueError, match="resume with the same"):
        TeacherStddev(7, window=20).load_state_dict(other.state_dict())
