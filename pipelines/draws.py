"""Everything random about a sample, as a pure function of (seed, epoch, address).

An address is a sample's row, or the number of its mix group where one draw serves a whole group. The generator is
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written over numpy arrays: one
call draws for a whole batch, and no draw depends on a sample's slot, on the rank or on what was drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

__all__ = [
    "Microbatch",
    "Stream",
    "crop_windows",
    "derangements",
    "erasing_boxes",
    "permutation",
    "philox",
    "place_windows",
    "uniforms",
]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.array((0xD2511F53, 0xCD9E8D57), np.uint64)
_WEYL = np.arange(10, dtype=np.uint64)[:, None] * np.array((0x9E3779B9, 0xBB67AE85), np.uint64)  # [rounds, 2]
_ATTEMPTS = 4  # permutations tried at once; a share of (1 - 1/e)^4 = 0.16 of the groups needs another round


class Stream(IntEnum):
    """What a draw is for. The numbers are part of every run's identity: add, never renumber."""

    ORDER = 0
    BASE_VIEW = 1
    AUGMENTED_VIEW = 2
    POLICY = 3
    MIX = 16  # + run, below 240
    PARTNER = 256  # + run
    AUGMENTED_VIEW_RUN = 512  # + run, from 1 on: run 0 is AUGMENTED_VIEW
    POLICY_RUN = 768  # + run, from 1 on: run 0 is POLICY
    RANDAUGMENT = 1024  # + run
    TRIVIALAUGMENT = 1280  # + run
    CELLS = 1536  # + run
    BOX = 1792  # + run
    LAYER = 2048  # + run


@dataclass(frozen=True)
class Microbatch:
    """One process's share of a step.

    `rows` has at least one row: where a short last batch leaves this process nothing, it holds a filler and
    `valid` is 0. Only the first `valid` rows count.
    """

    index: int  # of this process, counted from the start of training
    epoch: int
    start: int  # position of the first row in the epoch's order
    rows: np.ndarray  # int64 [max(valid, 1)]
    valid: int
    total: int  # rows that count over all processes of this microbatch


def philox(counter: Sequence[np.ndarray | np.integer], seed: int) -> np.ndarray:
    """Run Philox4x32-10 on broadcastable counters.

    Args:
        counter: four arrays of non-negative integers below 2**32, broadcast against each other to shape S.
        seed: the 64-bit key.

    Returns:
        uint64 [4, *S], each word below 2**32.
    """
    shape = np.broadcast_shapes(*(np.shape(word) for word in counter))
    words = np.empty((4, *shape), np.uint64)
    for index, word in enumerate(counter):
        words[index, ...] = word
    even, odd = words[::2], words[1::2]
    pair = (2, *(1 for _ in shape))
    multipliers, key = _MULTIPLIERS.reshape(pair), np.array((seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), np.uint64)
    for round_key in (key + _WEYL) & _MASK:
        product = (even * multipliers)[::-1]
        even = product >> _SHIFT
        even ^= odd
        even ^= round_key.reshape(pair)
        odd = product & _MASK
    words[::2], words[1::2] = even, odd
    return words


def uniforms(seed: int, epoch: int, addresses: np.ndarray, streams: dict[int, int]) -> dict[int, np.ndarray]:
    """Draw uniform numbers in [0, 1) for many addresses and several streams in one call.

    Args:
        seed: the run's seed.
        epoch: the epoch, below 2**32.
        addresses: integers [n] below 2**32.
        streams: for each stream how many numbers an address gets.

    Returns:
        for each stream float64 [n, count], multiples of 2**-32.
    """
    if not streams:
        return {}
    blocks = {stream: -(-count // 4) for stream, count in streams.items()}
    stream_of_block = np.repeat(list(blocks), list(blocks.values()))
    number_of_block = np.concatenate([np.arange(count) for count in blocks.values()])
    words = philox((addresses[:, None], np.uint64(epoch), stream_of_block, number_of_block), seed)
    numbers = np.moveaxis(words, 0, -1).reshape(len(addresses), -1) * 2.0**-32
    ends = np.cumsum([4 * count for count in blocks.values()])
    starts = [0, *ends[:-1]]
    return {
        stream: numbers[:, start : start + count]
        for (stream, count), start in zip(streams.items(), starts, strict=True)
    }


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Order `size` rows at random for one epoch.

    Returns:
        int64 [size]: the row at each position. The same on every machine and numpy version.
    """
    keys = np.empty(size, np.uint64)
    for start in range(0, size, 1 << 20):  # in pieces: the generator's temporaries stay below 100 MB
        rows = np.arange(start, min(start + (1 << 20), size), dtype=np.uint64)
        words = philox((rows, np.uint64(epoch), np.uint64(Stream.ORDER), np.uint64(0)), seed)
        keys[start : start + len(rows)] = (words[0] << _SHIFT) | words[1]
    return np.argsort(keys, kind="stable")


def derangements(
    seed: int, epoch: int, groups: np.ndarray, size: int, run: int = 0, fixed_points: bool = False
) -> np.ndarray:
    """Draw one uniformly random permutation of `size` members for each group.

    Unless `fixed_points`, nobody is their own partner (rejection of whole permutations, so the result is uniform over
    the derangements). A group of one has nobody else: its member is its own partner.

    Args:
        seed: the run's seed.
        epoch: the epoch.
        groups: group numbers within the epoch, [g].
        size: members of a group.
        run: which of several independent permutations.
        fixed_points: accept the first permutation, whatever it is.

    Returns:
        int64 [g, size], indices inside the group.
    """
    found = np.zeros((len(groups), size), np.int64)
    open_groups = np.arange(len(groups)) if size > 1 else np.arange(0)
    attempts = 1 if fixed_points else _ATTEMPTS
    blocks = -(-attempts * size // 4)
    start = 0
    while len(open_groups):
        counters = (
            np.asarray(groups)[open_groups, None],
            np.uint64(epoch),
            np.uint64(Stream.PARTNER + run),
            np.arange(start, start + blocks),
        )
        words = np.moveaxis(philox(counters, seed), 0, -1).reshape(len(open_groups), -1)
        tried = words[:, : attempts * size].reshape(len(open_groups), attempts, size).argsort(-1, kind="stable")
        good = (tried != np.arange(size)).all(-1) | fixed_points
        first = good.argmax(1)
        done = good.any(1)
        found[open_groups[done]] = tried[done, first[done]]
        open_groups = open_groups[~done]
        start += blocks
    return found


def crop_windows(
    numbers: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Turn uniform numbers into the size-free draws of RandomResizedCrop.

    Args:
        numbers: uniform [n, 22]: ten areas, ten aspect ratios, two offsets.
        scale: range of the area as a share of the image's.
        ratio: range of width / height, drawn log-uniformly.

    Returns:
        tries, float64 [n, 10, 2] (area share, aspect ratio), and offsets, float64 [n, 2] (y, x) in [0, 1).
    """
    areas = scale[0] + (scale[1] - scale[0]) * numbers[:, :10]
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * numbers[:, 10:20])
    return np.stack((areas, ratios), -1), numbers[:, 20:22]


def place_windows(
    tries: np.ndarray, offsets: np.ndarray, sides: np.ndarray, ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's RandomResizedCrop windows: the first of ten tries that fits, else the largest centred one.

    Args:
        tries: float64 [n, 10, 2] (area share, aspect ratio).
        offsets: float64 [n, 2] (y, x) in [0, 1).
        sides: heights and widths of the images in pixels, [n, 2].
        ratio: range of width / height.

    Returns:
        top left corners and sides of the windows, (y, x) in pixels, float32 [n, 2] each.
    """
    height, width = sides.T.astype(np.float64)
    area, aspect = tries[:, :, 0] * height[:, None] * width[:, None], tries[:, :, 1]
    tried = np.sqrt((area / aspect, area * aspect))  # heights and widths, [2, n, 10]
    tried = np.floor(tried + 0.5, out=tried)
    fits = np.all((tried > 0) & (tried <= np.stack((height, width))[:, :, None]), 0)
    rows, first = np.arange(len(sides)), fits.argmax(-1)
    shape, found = tried[:, rows, first].T, fits[rows, first, None]
    start = np.floor(offsets * (sides - shape + 1.0))
    if not found.all():  # keep as much as the ratio range allows, in the middle
        largest = np.floor(np.stack((width / min(ratio), height * max(ratio)), -1) + 0.5)
        largest = np.minimum(sides, largest)
        start = np.where(found, start, np.floor((sides - largest) / 2.0))
        shape = np.where(found, shape, largest)
    return start.astype(np.float32), shape.astype(np.float32)


def erasing_boxes(
    numbers: np.ndarray, side: int, probability: float, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Turn uniform numbers into the boxes of random erasing, as torchvision's RandomErasing draws them.

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, arXiv 1708.04896. Of ten tries the first counts whose
    box is smaller than the image, in both directions.

    Args:
        numbers: uniform [n, 23]: whether to erase, ten areas, ten aspect ratios, two offsets.
        side: of the images, in pixels.
        probability: of erasing.
        scale: range of the area as a share of the image's.
        ratio: range of height / width, drawn log-uniformly.

    Returns:
        top, left, height and width, int32 [n, 4]; zeros where nothing is erased.
    """
    tries, offsets = crop_windows(numbers[:, 1:23], scale, ratio)
    areas, ratios = side * side * tries[:, :, 0], tries[:, :, 1]
    shapes = np.rint(np.sqrt(np.stack((areas * ratios, areas / ratios), -1)))  # [n, 10, 2] height, width
    fits = (shapes < side).all(-1)
    shape = np.take_along_axis(shapes, fits.argmax(-1)[:, None, None], 1)[:, 0]
    start = np.floor(offsets * (side - shape + 1))
    erased = (numbers[:, 0] < probability) & fits.any(-1) & (shape > 0).all(-1)
    return np.where(erased[:, None], np.concatenate((start, shape), 1), 0).astype(np.int32)
