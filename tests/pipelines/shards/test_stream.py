import shutil
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards.read import ShardSet
from dalikd.pipelines.shards.stream import MicrobatchReader, ShardStream, Shuffle


@pytest.fixture(scope="module")
def shards(written) -> ShardSet:
    return ShardSet(written.folder)


@pytest.fixture(scope="module")
def contents(written) -> list[bytes]:
    """Encoded bytes of each row."""
    return [Path(written.source.path(row)).read_bytes() for row in range(300)]


def _ids(shards: ShardSet, shuffle: Shuffle) -> list[int]:
    stream = ShardStream(shards, shuffle, 16)
    return stream.take(stream.length).ids.tolist()


# ----------------------------------------------------------------------------------------------- one epoch


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300, 512])
def test_storage_order(shards, contents, batch_size):
    stream = ShardStream(shards, None, batch_size)
    read = [stream.take(count) for count in (1, 0, 10, 60, 129, 100)]
    assert stream.position == stream.length == 300
    assert np.concatenate([part.ids for part in read]).tolist() == shards.order.tolist()
    for part in read:
        assert part.ids.dtype == np.int64
        assert [content.tobytes() for content in part.contents] == [contents[row] for row in part.ids]


def test_bytes_stay_while_they_are_held(shards, contents):
    stream = ShardStream(shards, Shuffle(1, 0, window=8), 4)
    held = [stream.take(12) for _ in range(25)]
    del stream
    for part in held:
        assert [content.tobytes() for content in part.contents] == [contents[row] for row in part.ids]


def test_an_epoch_holds_every_image_once(shards):
    for window in (1, 8, 1024):
        assert sorted(_ids(shards, Shuffle(1, 0, window=window))) == list(range(300))


@pytest.mark.parametrize("world", [2, 4, 7])
def test_shares_are_disjoint(shards, world):
    shares = [_ids(shards, Shuffle(1, 3, rank, world, 32)) for rank in range(world)]
    assert all(len(share) >= 300 // world for share in shares)
    assert sorted(row for share in shares for row in share) == list(range(300))


def test_an_order_is_a_function_of_seed_and_epoch(shards):
    first = _ids(shards, Shuffle(1, 0))
    assert first == _ids(shards, Shuffle(1, 0))
    others = [_ids(shards, Shuffle(1, 1)), _ids(shards, Shuffle(2, 0)), shards.order.tolist()]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 20  # one of 300 is expected to be


def test_shards_come_in_a_new_order(shards):
    """With a window of one image only the shards are permuted."""
    starts = [shards.order[first] for first in range(0, 300, 60)]
    orders = [[starts.index(row) for row in _ids(shards, Shuffle(1, epoch, window=1))[::60]] for epoch in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_window_parts_neighbours(shards):
    place = {row: position for position, row in enumerate(shards.order)}
    neighbours = [abs(place[a] - place[b]) == 1 for a, b in zip(*2 * [iter(_ids(shards, Shuffle(1, 0)))], strict=True)]
    assert sum(neighbours) < 8  # of 150 pairs; one is expected


@pytest.mark.parametrize("shuffle", [None, Shuffle(1, 2, 1, 2, 32)])
def test_skipping_is_taking_without_looking(shards, shuffle):
    whole, skipped = ShardStream(shards, shuffle, 16), ShardStream(shards, shuffle, 16)
    expected = whole.take(150).ids
    skipped.skip(37)
    first = skipped.take(20).ids
    skipped.skip(64)
    assert np.array_equal(first, expected[37:57])
    assert np.array_equal(skipped.take(29).ids, expected[121:150])


def test_an_epoch_ends(shards):
    stream = ShardStream(shards, None, 16)
    stream.skip(299)
    with pytest.raises(AssertionError, match="epoch ends"):
        stream.take(2)


def test_a_container_that_is_cut_while_it_is_read(written, tmp_path):
    shutil.copytree(written.folder, tmp_path / "train")
    shards = ShardSet(tmp_path / "train")
    stream = ShardStream(shards, None, 1)
    for name in shards.paths[1:]:
        with Path(name).open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(OSError, match=rf"{tmp_path}/train cannot be read: .*`dalikd prepare --verify"):
        stream.skip(300)


# --------------------------------------------------------------------------------------------- microbatches


def _epoch(reader: MicrobatchReader, sampler: Sampler, epoch: int) -> list[int]:
    first = epoch * sampler.microbatches_per_epoch
    indices = range(first, first + sampler.microbatches_per_epoch)
    return [row for index in indices for row in reader.take(index).ids.tolist()]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_training_never_shows_an_image_twice(shards, world, accumulation):
    samplers = [Sampler(300, 64, 7, world=world, rank=rank, accumulation=accumulation) for rank in range(world)]
    readers = [MicrobatchReader(shards, sampler, 32) for sampler in samplers]
    for epoch in range(2):
        seen = [
            row for reader, sampler in zip(readers, samplers, strict=True) for row in _epoch(reader, sampler, epoch)
        ]
        assert len(seen) == len(set(seen)) == 256


@pytest.mark.parametrize("shuffle", [False, True])
def test_exact_passes_show_the_same_batches_to_any_world(shards, shuffle):
    """Also in a second epoch: storage order, each image once, fillers left out."""
    for world in (1, 2, 4):
        samplers = [
            Sampler(300, 128, shuffle=shuffle, drop_last=False, world=world, rank=rank) for rank in range(world)
        ]
        readers = [MicrobatchReader(shards, sampler) for sampler in samplers]
        steps = []
        for index in range(6):
            parts = [reader.take(index).ids for reader in readers]
            valid = [sampler.place(index).valid for sampler in samplers]
            steps.append(np.concatenate([part[:count] for part, count in zip(parts, valid, strict=True)]))
        assert [len(step) for step in steps] == [128, 128, 44] * 2
        assert np.concatenate(steps).tolist() == 2 * shards.order.tolist()


def test_a_process_without_images_gets_a_filler(shards, contents):
    sampler = Sampler(300, 128, shuffle=False, drop_last=False, world=4, rank=3)
    filler = MicrobatchReader(shards, sampler).take(2)  # 44 images are left: the fourth process has none
    assert filler.ids.tolist() == [shards.order[0]]
    assert filler.contents[0].tobytes() == contents[shards.order[0]]


@pytest.mark.parametrize("drop_last", [True, False])
def test_any_microbatch_at_any_time(shards, drop_last):
    sampler = Sampler(300, 32, 7, drop_last=drop_last, world=2, rank=1)
    in_turn = MicrobatchReader(shards, sampler, 32)
    expected = [in_turn.take(index).ids.tolist() for index in range(16)]
    other = MicrobatchReader(shards, sampler, 32)
    for index in (5, 6, 2, 2, 12, 11, 0, 15):
        assert other.take(index).ids.tolist() == expected[index]
    other.close()
    assert other.take(3).ids.tolist() == expected[3]


def test_orders_that_repeat(shards):
    sampler = Sampler(300, 100, 7, repeat=2)
    reader = MicrobatchReader(shards, sampler, 32)
    epochs = [_epoch(reader, sampler, epoch) for epoch in range(5)]
    assert epochs[0] == epochs[2] == epochs[4]
    assert epochs[1] == epochs[3]
    assert epochs[0] != epochs[1]
