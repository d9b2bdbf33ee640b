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

from dalikd.kd.goodness import GoodnessResult, PickedGroups, TeacherStddev, picked_groups
from dalikd.kd.picking import pick_rows

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
    with pytest.raises(ValueError, match="augmented logits have shape"):
        metric.update(torch.zeros(5, 7), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="do not form mix groups"):
        metric.update(torch.zeros(5, 7), torch.zeros(4, 7), group=2)
    with pytest.raises(ValueError, match="logits are on meta"):
        metric.update(torch.zeros(5, 7, device="meta"))
    metric.update(torch.zeros(5, 7))
    with pytest.raises(ValueError, match="between rows and pairs"):
        metric.update(torch.zeros(5, 7), torch.zeros(5, 7))
    assert metric.compute().images == 5


def with_picks(metric: TeacherStddev, originals: Tensor, picks: Tensor, group: int, keep: int, groups: int = 1):
    """Feed `groups` mix groups at a time; the last group is shorter where the originals end."""
    for start in range(0, math.ceil(len(originals) / group), groups):
        rows, kept = (slice(start * size, (start + groups) * size) for size in (group, keep))
        metric.update(originals[rows], picks[kept], group)
    return metric.compute()


def test_originals_carry_shares_of_their_groups_picks():
    originals, picks = torch.randn(2, 60, 5, dtype=torch.float64).unbind()
    picks = picks[:45]  # groups of 4 originals keep 3
    p, q = torch.softmax(originals, dim=1), torch.softmax(picks, dim=1)
    means = []
    for window in range(10):  # of 6 originals: a group and a half, or half of one and a whole one
        unit = [p[i] + q[i // 4 * 3 : i // 4 * 3 + 3].sum(dim=0) / 4 for i in range(6 * window, 6 * window + 6)]
        means.append(torch.stack(unit).sum(dim=0) / (6 * 1.75))
    per_class = torch.stack(means).std(dim=0)
    for groups in (1, 2, 5, 15):
        result = with_picks(TeacherStddev(5, window=12), originals, picks, 4, 3, groups)
        assert result.per_class == pytest.approx(per_class.tolist(), rel=1e-12)
        assert (result.windows, result.images) == (10, 105)
        assert result.entropy == pytest.approx(brute_force(torch.cat((originals, picks)), 1)[1], rel=1e-12)


def test_windows_of_whole_groups_are_means_over_rows():
    originals, picks = torch.randn(40, 5, dtype=torch.float64), torch.randn(100, 5, dtype=torch.float64)
    result = with_picks(TeacherStddev(5, window=8), originals, picks, 4, 10)
    rows = torch.cat((originals.reshape(10, 4, 5), picks.reshape(10, 10, 5)), dim=1)
    expected = torch.softmax(rows, dim=2).mean(dim=1).std(dim=0)
    assert result.per_class == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_short_last_group_carries_its_own_picks():
    originals, picks = torch.randn(2, 22, 5, dtype=torch.float64).unbind()
    picks = picks[:9]  # 2 groups of 8 keep 3, the last 6 originals keep ceil(3 * 6 / 8)
    metric = TeacherStddev(5, window=4)
    metric.update(originals, picks, 8)
    p, q = torch.softmax(originals, dim=1), torch.softmax(picks, dim=1)
    carried = [(3 / 8, q[:3]), (3 / 8, q[3:6]), (3 / 6, q[6:])]
    means = []
    for window in range(11):  # two originals each: a group holds whole windows
        share, kept = carried[window // 4]
        means.append((p[2 * window : 2 * window + 2].mean(dim=0) + share * kept.mean(dim=0)) / (1 + share))
    assert metric.compute().per_class == pytest.approx(torch.stack(means).std(dim=0).tolist(), rel=1e-12)


def test_a_short_last_group_with_as_many_picks_is_of_pairs():
    originals, picks = torch.randn(2, 14, 5, dtype=torch.float64).unbind()
    picks = picks[:13]  # a group of 8 keeps 7, the last 6 originals keep ceil(7 * 6 / 8)
    metric = TeacherStddev(5, window=2)  # one original each, so that every group is split
    metric.update(originals, picks, 8)
    p, q = torch.softmax(originals, dim=1), torch.softmax(picks, dim=1)
    means = torch.cat(((p[:8] + q[:7].sum(dim=0) / 8) / (1 + 7 / 8), (p[8:] + q[7:]) / 2))
    assert metric.compute().per_class == pytest.approx(means.std(dim=0).tolist(), rel=1e-12)


def test_as_many_picks_as_originals_are_pairs_whatever_the_group():
    originals, picks = torch.randn(2, 64, 5).unbind()
    plain, grouped = TeacherStddev(5, window=6), TeacherStddev(5, window=6)
    plain.update(originals, picks)
    for start in range(0, 64, 8):
        grouped.update(originals[start : start + 8], picks[start : start + 8], 4)
    assert grouped.compute().per_class == pytest.approx(plain.compute().per_class, rel=1e-12)


def test_group_sizes_follow_from_the_numbers():
    assert picked_groups(128, 64, 64) == [PickedGroups(2, 64, 32)]
    assert picked_groups(80, 40, 64) == [PickedGroups(1, 64, 32), PickedGroups(1, 16, 8)]
    assert picked_groups(67, 35, 64) == [PickedGroups(1, 64, 33), PickedGroups(1, 3, 2)]
    assert picked_groups(3, 2, 64) == [PickedGroups(1, 3, 2)]
    assert picked_groups(64, 200, 64) == [PickedGroups(1, 64, 200)]
    for group, keep, whole, last in [(7, 3, 4, 5), (64, 1, 1, 63), (64, 63, 2, 2), (5, 12, 3, 1), (4, 4, 2, 3)]:
        of_last = math.ceil(keep * last / group)
        blocks = picked_groups(whole * group + last, whole * keep + of_last, group)
        assert blocks == [PickedGroups(whole, group, keep), PickedGroups(1, last, of_last)]
    for wrong in [(128, 65, 64), (128, 1, 64), (80, 0, 64), (64, 0, 64), (0, 3, 64), (67, 23, 64)]:
        with pytest.raises(ValueError, match="do not form mix groups"):
            picked_groups(*wrong)
    with pytest.raises(ValueError, match="group is 0"):
        picked_groups(10, 5, 0)


def test_picks_of_pick_rows_form_groups():
    for batch, group, keep in [(64, 64, 10), (100, 16, 5), (100, 16, 31), (7, 16, 3), (33, 8, 7), (33, 8, 8)]:
        picks = len(pick_rows(torch.rand(2, batch), group, keep))
        blocks = picked_groups(batch, picks, group)
        assert sum(block.groups * block.originals for block in blocks) == batch
        assert sum(block.groups * block.picks for block in blocks) == picks
        assert batch < group or blocks[0] == PickedGroups(batch // group, group, keep)


@pytest.mark.parametrize("picks", [None, 22, 14])
def test_several_rows_of_an_image_count_as_their_mean(picks: int | None):
    """Four an image, of 22 images in windows of 4; augmented ones as many, or 5 of a group of 8 and 4 of the last 6."""
    counts = [22] if picks is None else [22, picks]
    rows = [torch.randn(4 * count, 5, dtype=torch.float64) for count in counts]
    means = [torch.softmax(of, dim=1).reshape(-1, 4, 5).mean(dim=1).log() for of in rows]
    whole, before, after = (TeacherStddev(5, window=4, rows_per_image=4) for _ in range(3))
    plain = TeacherStddev(5, window=4)
    whole.update(*rows, group=8)
    plain.update(*means, group=8)
    found, expected = whole.compute(), plain.compute()
    assert found.per_class == pytest.approx(expected.per_class, rel=1e-12)
    assert (found.windows, found.images) == (expected.windows, expected.images) == (22 * len(counts) // 4, sum(counts))
    assert found.entropy == pytest.approx(brute_force(torch.cat(rows), 1)[1], rel=1e-12)
    cuts = [4 * (16 if count == 22 else 10) for count in counts]  # behind the second group
    before.update(*(of[:cut] for of, cut in zip(rows, cuts, strict=True)), group=8)
    after.load_state_dict(before.state_dict())
    after.to("cpu").update(*(of[cut:] for of, cut in zip(rows, cuts, strict=True)), group=8)
    assert after.compute().per_class == pytest.approx(found.per_class, rel=1e-12)


def test_rows_that_make_no_images_are_refused():
    with pytest.raises(ValueError, match=r"shape \(7, 5\): give \[rows, 5\] with 4 rows an image"):
        TeacherStddev(5, rows_per_image=4).update(torch.randn(7, 5))
    with pytest.raises(ValueError, match="rows_per_image is 0: give at least 1"):
        TeacherStddev(5, rows_per_image=0)


def test_a_certain_head_has_a_quarter_of_what_certain_logits_have():
    """Of class and turn: each joint label has a quarter of the class's share of a window."""
    labels = torch.randint(10, (640,), generator=torch.Generator().manual_seed(3))
    joint = (4 * labels[:, None] + torch.arange(4)).flatten()
    head, logits = TeacherStddev(40, window=64, rows_per_image=4), TeacherStddev(10, window=64)
    for metric, of, count in ((head, joint, 40), (logits, labels, 10)):
        rows = 500.0 * torch.nn.functional.one_hot(of, count)
        metric.update(rows, rows)
    assert head.windows == logits.windows == 20
    expected = logits.compute().stddev
    assert expected is not None
    assert head.compute().stddev == pytest.approx(expected / 4, rel=1e-12)


def test_resuming_between_groups_with_a_split_window():
    originals, picks = torch.randn(64, 5), torch.randn(48, 5)
    whole = with_picks(TeacherStddev(5, window=6), originals, picks, 4, 3)
    before, after = TeacherStddev(5, window=6), TeacherStddev(5, window=6)
    with_picks(before, originals[:32], picks[:24], 4, 3)
    after.load_state_dict(before.state_dict())
    assert with_picks(after, originals[32:], picks[24:], 4, 3) == whole
    assert after.originals == 64
    assert after.windows == whole.windows == 21


@pytest.mark.parametrize("paired", [False, True])
def test_states_of_version_1_are_read(paired: bool):
    logits, augmented = torch.randn(2, 77, 7).unbind()
    pairs = augmented if paired else None
    whole = feed(TeacherStddev(7, window=20), logits, 7, pairs)
    before = feed(TeacherStddev(7, window=20), logits[:33], 33, None if pairs is None else pairs[:33])
    state = before.state_dict()
    for name in ("version", "originals", "open_units"):
        del state[name]
    assert isinstance(state["open_rows"], int)
    after = TeacherStddev(7, window=20)
    after.load_state_dict(state)
    feed(after, logits[33:], 7, None if pairs is None else pairs[33:])
    assert after.compute().per_class == pytest.approx(whole.compute().per_class, rel=1e-12)
    assert after.originals == 77


def test_states_of_a_later_version_are_refused():
    with pytest.raises(ValueError, match="version 3"):
        TeacherStddev(7).load_state_dict(TeacherStddev(7).state_dict() | {"version": 3})


def test_the_interval_is_students_t():
    logits = torch.randn(60, 7)
    few, many = (feed(TeacherStddev(7, window=window), logits, 60).compute() for window in (10, 2))
    for result, quantile in ((few, 2.570582), (many, 2.093024)):  # 97.5 % at 5 and at 19 degrees of freedom
        assert result.stddev is not None
        assert result.stderr is not None
        half = quantile * result.stderr
        assert result.interval() == pytest.approx((max(result.stddev - half, 0), result.stddev + half), rel=1e-6)
    wide = few.interval(0.99)
    assert wide is not None
    assert few.stddev is not None
    assert few.stderr is not None
    assert wide[1] - few.stddev == pytest.approx(4.032143 * few.stderr, rel=1e-6)
    assert feed(TeacherStddev(7, window=30), logits, 60).compute().interval() is None
    vague = GoodnessResult(0.01, 1.0, windows=5, stderr=0.01, per_class=[0.01], images=50, window=10)
    assert vague.interval() == pytest.approx((0, 0.01 + 2.776445 * 0.01), rel=1e-6)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"confidence is {confidence}"):
            few.interval(confidence)


def test_the_interval_holds_the_expected_value_as_often_as_it_says():
    generator = torch.Generator().manual_seed(8)
    results = []
    for _ in range(150):
        logits = torch.randn(25 * 4, 6, generator=generator) * 2
        results.append(feed(TeacherStddev(6, window=4), logits, len(logits)).compute())
    center = np.mean([result.stddev for result in results])
    held = [low <= center <= high for low, high in (result.interval(0.8) or (1, 0) for result in results)]
    assert np.mean(held) == pytest.approx(0.8, abs=0.09)


def test_a_jackknife_needs_four_windows():
    metric = feed(TeacherStddev(7, window=2), torch.randn(7, 7), 7)
    with pytest.raises(ValueError, match="3 windows are too few"):
        metric.jackknife()


@pytest.mark.parametrize(
    "other", [TeacherStddev(8, window=20), TeacherStddev(7, window=40), TeacherStddev(7, window=20, rows_per_image=4)]
)
def test_a_state_of_another_metric_is_refused(other: TeacherStddev):
    with pytest.raises(ValueError, match="resume with the same"):
        TeacherStddev(7, window=20).load_state_dict(other.state_dict())
