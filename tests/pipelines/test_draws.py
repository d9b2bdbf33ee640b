import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomErasing, RandomResizedCrop

from dalikd.pipelines.draws import (
    Stream,
    crop_windows,
    derangements,
    erasing_boxes,
    permutation,
    philox,
    place_windows,
    uniforms,
)

# Random123's published known answers for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox([np.uint64(word) for word in counter], key[0] | key[1] << 32)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_philox_broadcasts_like_single_calls():
    rows, blocks = np.array([[3], [1 << 31]]), np.array([0, 5, 7])
    words = philox((rows, np.uint64(2), np.uint64(1), blocks), seed=11)
    assert words.shape == (4, 2, 3)
    for i, row in enumerate(rows[:, 0]):
        for j, block in enumerate(blocks):
            single = philox([np.uint64(word) for word in (row, 2, 1, block)], seed=11)
            assert np.array_equal(words[:, i, j], single)


def test_draws_do_not_depend_on_the_batch_or_its_order():
    rows = np.random.default_rng(0).permutation(1000)[:300]
    streams: dict[int, int] = {Stream.BASE_VIEW: 23, Stream.MIX: 3, Stream.MIX + 1: 3}
    together = uniforms(5, 2, rows, streams)
    one_by_one = [uniforms(5, 2, rows[k : k + 1], streams) for k in range(len(rows))]
    shuffled = uniforms(5, 2, rows[::-1], streams)
    for stream in streams:
        assert np.array_equal(together[stream], np.concatenate([part[stream] for part in one_by_one]))
        assert np.array_equal(together[stream], shuffled[stream][::-1])


def test_a_stream_is_the_same_whatever_is_drawn_beside_it():
    rows = np.arange(50)
    alone = uniforms(5, 2, rows, {Stream.MIX: 3})[Stream.MIX]
    beside = uniforms(5, 2, rows, {Stream.BASE_VIEW: 23, Stream.MIX: 3, Stream.POLICY: 5})[Stream.MIX]
    assert np.array_equal(alone, beside)


def test_seed_epoch_row_and_stream_all_matter():
    def draw(seed: int = 5, epoch: int = 2, row: int = 7, stream: int = Stream.MIX) -> tuple[float, ...]:
        return tuple(uniforms(seed, epoch, np.array([row]), {stream: 3})[stream][0])

    others = [draw(seed=6), draw(seed=5 | 1 << 32), draw(epoch=3), draw(row=8), draw(stream=Stream.MIX + 1)]
    assert len({draw(), *others}) == 6


def test_uniform_numbers_are_uniform():
    numbers = uniforms(1, 0, np.arange(5000), {Stream.BASE_VIEW: 23})[Stream.BASE_VIEW]
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    # each number of a sample by itself: 23 tests, so a hundredth of the usual bound
    assert min(stats.kstest(column, "uniform").pvalue for column in numbers.T) > 1e-4


def test_streams_columns_and_epochs_are_independent():
    rows = np.arange(20_000)
    streams: dict[int, int] = {Stream.BASE_VIEW: 6, Stream.AUGMENTED_VIEW: 3, Stream.POLICY: 5, Stream.MIX: 3}
    epochs = [np.concatenate(list(uniforms(1, epoch, rows, streams).values()), axis=1) for epoch in (0, 1)]
    columns = np.concatenate([*epochs, np.roll(epochs[0], 1, axis=0)], axis=1)  # and the next row
    correlations = np.corrcoef(columns.T)
    np.fill_diagonal(correlations, 0)
    # 51 columns, 1275 pairs of standard deviation 1 / sqrt(20000) = 0.0071
    assert np.abs(correlations).max() < 4.5 * 0.0071


@pytest.mark.parametrize("size", [1, 2, 1003])
def test_permutation_is_one(size):
    order = permutation(3, 0, size)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


def test_permutation_changes_with_epoch_and_seed_only():
    order = permutation(3, 0, 1003)
    assert np.array_equal(order, permutation(3, 0, 1003))
    for other in (permutation(3, 1, 1003), permutation(4, 0, 1003)):
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.1
    assert abs(np.corrcoef(order, np.arange(1003))[0, 1]) < 0.1


def test_permutation_in_pieces():
    """A set larger than one piece is drawn as if there were no pieces: rows are addresses."""
    size = (1 << 20) + 5
    order = permutation(3, 0, size)
    words = philox((np.array([0, size - 1], np.uint64), np.uint64(0), np.uint64(Stream.ORDER), np.uint64(0)), 3)
    keys = words[0].astype(float)
    position = np.empty(size, np.int64)
    position[order] = np.arange(size)
    # the position of a row in the order is, up to chance, its key's share of the range
    assert np.allclose(position[[0, size - 1]] / size, keys / 2**32, atol=0.005)


@pytest.mark.parametrize("size", [2, 3, 5, 64])
def test_derangements_are_permutations_without_fixed_points(size):
    partners = derangements(1, 0, np.arange(200), size)
    assert np.array_equal(np.sort(partners, axis=1), np.broadcast_to(np.arange(size), (200, size)))
    assert not (partners == np.arange(size)).any()


def test_a_group_of_one_is_its_own_partner():
    assert np.array_equal(derangements(1, 0, np.arange(4), 1), np.zeros((4, 1)))


def test_a_group_of_two_swaps():
    assert np.array_equal(derangements(1, 0, np.arange(4), 2), np.tile([1, 0], (4, 1)))


def test_derangements_are_uniform_over_all_derangements():
    partners = derangements(1, 0, np.arange(9000), 4)
    found, counts = np.unique(partners, axis=0, return_counts=True)
    assert len(found) == 9  # !4
    assert stats.chisquare(counts).pvalue > 0.01


def test_derangements_are_uniform_over_partners():
    partners = derangements(2, 0, np.arange(2000), 64)
    for member in (0, 1, 40, 63):
        counts = np.delete(np.bincount(partners[:, member], minlength=64), member)
        assert stats.chisquare(counts).pvalue > 0.001, member


def test_with_fixed_points_all_permutations_are_equally_likely():
    partners = derangements(1, 0, np.arange(6000), 3, fixed_points=True)
    found, counts = np.unique(partners, axis=0, return_counts=True)
    assert len(found) == 6
    assert stats.chisquare(counts).pvalue > 0.01


def test_derangements_depend_on_group_epoch_run_and_seed_alone():
    groups = np.array([9, 4, 17])
    partners = derangements(1, 0, groups, 64)
    assert np.array_equal(partners[1], derangements(1, 0, np.array([4]), 64)[0])
    for other in (
        derangements(1, 0, groups, 64, run=1),
        derangements(1, 1, groups, 64),
        derangements(2, 0, groups, 64),
    ):
        assert (partners == other).mean() < 0.05


def test_derangements_of_groups_that_need_more_than_one_round():
    # a share of 0.16 of the groups is not done after one round of attempts, 6e-4 after four
    partners = derangements(1, 0, np.arange(5000), 8)
    assert not (partners == np.arange(8)).any()


def test_crop_windows_lie_in_their_ranges():
    numbers = uniforms(1, 0, np.arange(5000), {Stream.BASE_VIEW: 22})[Stream.BASE_VIEW]
    tries, offsets = crop_windows(numbers, (0.08, 1.0), (3 / 4, 4 / 3))
    assert tries.shape == (5000, 10, 2)
    assert offsets.shape == (5000, 2)
    areas, ratios = tries[..., 0].ravel(), tries[..., 1].ravel()
    assert stats.kstest(areas, stats.uniform(0.08, 0.92).cdf).pvalue > 0.01
    low, high = np.log([3 / 4, 4 / 3])
    assert stats.kstest(np.log(ratios), stats.uniform(low, high - low).cdf).pvalue > 0.01
    assert np.array_equal(offsets, numbers[:, 20:])


def _published_window(
    width: int, height: int, tries: np.ndarray, offsets: np.ndarray, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's algorithm in double precision, given its random numbers: y, x, height, width."""
    for area, aspect in tries:
        w = round(math.sqrt(height * width * area * aspect))
        h = round(math.sqrt(height * width * area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(offsets[0] * (height - h + 1)), math.floor(offsets[1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_windows_are_those_of_torchvision(scale, ratio):
    sides = np.random.default_rng(1).integers(1, 2000, (1500, 2), dtype=np.int32)
    numbers = uniforms(1, 0, np.arange(1500), {Stream.BASE_VIEW: 22})[Stream.BASE_VIEW]
    tries, offsets = crop_windows(numbers, scale, ratio)
    found = np.hstack(place_windows(tries, offsets, sides, ratio))
    drawn = zip(sides.tolist(), tries, offsets, strict=True)
    expected = [_published_window(width, height, areas, pair, ratio) for (height, width), areas, pair in drawn]
    assert np.array_equal(found, expected)


def test_the_window_where_no_try_fits_is_torchvisions_own():
    """Areas of 1 to 1.2 times an image outside the ratio range never fit, whatever torchvision draws."""
    ratio = (3 / 4, 4 / 3)
    sides = np.array([(200, 800), (601, 150), (100, 199), (1, 900), (900, 1), (333, 101)], np.int32)
    numbers = uniforms(1, 0, np.arange(len(sides)), {Stream.BASE_VIEW: 22})[Stream.BASE_VIEW]
    found = np.hstack(place_windows(*crop_windows(numbers, (1.0, 1.2), ratio), sides, ratio))
    for window, (height, width) in zip(found, sides.tolist(), strict=True):
        assert tuple(window) == RandomResizedCrop.get_params(Image.new("L", (width, height)), [1.0, 1.2], list(ratio))


# ---------------------------------------------------------------------------------------------------- erasing


def _published_box(numbers: np.ndarray, side: int, probability: float) -> tuple[int, int, int, int]:
    """torchvision's RandomErasing, one step after the other, given its random numbers."""
    if numbers[0] >= probability:
        return 0, 0, 0, 0
    low, high = math.log(0.3), math.log(3.3)
    for share, place in zip(numbers[1:11], numbers[11:21], strict=True):
        area = side * side * (0.02 + (0.33 - 0.02) * share)
        ratio = math.exp(low + (high - low) * place)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < side and width < side:
            return (
                math.floor(numbers[21] * (side - height + 1)),
                math.floor(numbers[22] * (side - width + 1)),
                height,
                width,
            )
    return 0, 0, 0, 0


def _boxes(side: int, images: int, probability: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    numbers = uniforms(1, 0, np.arange(images), {Stream.BOX: 23})[Stream.BOX]
    return erasing_boxes(numbers, side, probability, (0.02, 0.33), (0.3, 3.3)), numbers


@pytest.mark.parametrize("side", [32, 64, 224])
def test_erasing_boxes_are_torchvisions_step_by_step(side):
    boxes, numbers = _boxes(side, 3000)
    assert boxes.dtype == np.int32
    assert [tuple(box) for box in boxes.tolist()] == [_published_box(row, side, 0.5) for row in numbers]


def test_erasing_boxes_are_distributed_like_torchvisions():
    """Against boxes that torchvision draws itself."""
    torch.manual_seed(0)
    image = torch.zeros(1, 32, 32)
    drawn = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)]
    published = np.array(drawn)
    boxes, _ = _boxes(32, 4000, probability=1.0)
    assert (boxes[:, 2:] > 0).all()
    for column in range(4):
        test: Any = stats.ks_2samp(boxes[:, column], published[:, column])
        assert test.pvalue > 0.01
    areas, expected = (part[:, 2] * part[:, 3] for part in (boxes, published))
    test = stats.ks_2samp(areas, expected)
    assert test.pvalue > 0.01


def test_half_of_the_images_are_erased_inside_their_borders():
    boxes, _ = _boxes(32, 20_000)
    erased = boxes[:, 2] > 0
    assert stats.binomtest(int(erased.sum()), 20_000).pvalue > 0.001
    assert (boxes[~erased] == 0).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 32).all()
    assert boxes[erased, :2].min() == 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() == 32  # up to both borders
    assert not _boxes(32, 500, probability=0.0)[0].any()


def test_boxes_that_never_fit_and_boxes_without_area_are_none():
    numbers = uniforms(1, 0, np.arange(200), {Stream.BOX: 23})[Stream.BOX]
    assert not erasing_boxes(numbers, 32, 1.0, (1.0, 1.0), (1.0, 1.0)).any()  # as large as the image
    assert not erasing_boxes(numbers, 32, 1.0, (0.0, 0.0), (0.3, 3.3)).any()
    assert not erasing_boxes(numbers, 8, 1.0, (0.01, 0.01), (12.0, 12.0)).any()  # 3 x 0 pixels


def test_streams_keep_their_numbers():
    """They are part of every run's identity."""
    assert {stream.name: int(stream) for stream in Stream} == {
        "ORDER": 0,
        "BASE_VIEW": 1,
        "AUGMENTED_VIEW": 2,
        "POLICY": 3,
        "MIX": 16,
        "PARTNER": 256,
        "AUGMENTED_VIEW_RUN": 512,
        "POLICY_RUN": 768,
        "RANDAUGMENT": 1024,
        "TRIVIALAUGMENT": 1280,
        "CELLS": 1536,
        "BOX": 1792,
        "LAYER": 2048,
    }
