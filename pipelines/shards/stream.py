"""Reads shards in sequence: DALI's own readers deliver encoded images and ids; nothing is decoded here.

Training reads each epoch in a new order: the shards permuted, then a window over them shuffled by DALI, each process
its own share. Everything else reads the storage order, which `dalikd prepare` has shuffled, every image exactly once.
A position is reached by reading up to it.
"""

# DALI's type stubs lack its constants and take every result for a possible list of nodes.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalSubscript=false

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, tfrecord
from nvidia.dali.pipeline import Pipeline, pipeline_def

from dalikd.pipelines.draws import Stream, permutation, philox
from dalikd.pipelines.hardware import dali_words
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards.layout import MEMBER_EXTENSIONS, REMEDY, Feature, image_checksum
from dalikd.pipelines.shards.read import ShardSet

__all__ = ["Encoded", "MicrobatchReader", "ShardStream", "Shuffle"]

_AHEAD = 8  # microbatches before an epoch's end at which the next epoch's reader is opened
_LARGEST_READ = 128  # images that DALI reads at once
_WINDOW = 1024  # images; storage is shuffled, so this need only part those that were neighbours


class Encoded(NamedTuple):
    """Images as read: `contents`, n uint8 arrays of encoded bytes; `ids`, int64 [n]; and `damaged`, bool [n], for those
    whose bytes or id are not as they were written."""

    contents: list[np.ndarray]
    ids: np.ndarray
    damaged: np.ndarray


@dataclass(frozen=True)
class Shuffle:
    """A training order.

    Attributes:
        seed: the run's.
        epoch: the epoch.
        rank: whose share.
        world: of how many shares.
        window: images of the share, next to each other, that are held to draw from.
    """

    seed: int
    epoch: int
    rank: int = 0
    world: int = 1
    window: int = _WINDOW


class ShardStream:
    """One epoch of a DALI reader.

    Args:
        shards: of one split.
        shuffle: a training order; None for the storage order.
        batch_size: images that DALI reads at once.

    Attributes:
        length: images of the epoch, or of this process's share of it.
        position: images taken or skipped so far.
    """

    def __init__(self, shards: ShardSet, shuffle: Shuffle | None = None, batch_size: int = 64) -> None:
        world, rank = (1, 0) if shuffle is None else (shuffle.world, shuffle.rank)
        self.length = len(shards) * (rank + 1) // world - len(shards) * rank // world  # as DALI cuts shares
        self.position = 0
        self._shards, self._batch_size = shards, batch_size
        self._graph = _build(shards, shuffle, batch_size)
        self._outputs: Any = None

    def take(self, count: int) -> Encoded:
        """The next images. Their bytes stay as they are for as long as they are held.

        Raises:
            OSError: a shard cannot be read, or a record is of no image of the set.
        """
        contents: list[np.ndarray] = []
        ids = np.empty(count, np.int64)
        for (encoded, numbers), start, stop in self._pieces(count):
            ids[len(contents) : len(contents) + stop - start] = numbers.as_array().view("<i8")[start:stop, 0]
            contents += [np.asarray(encoded[slot]) for slot in range(start, stop)]  # views, about 1 µs each
        return Encoded(contents, ids, self._damaged(contents, ids))

    def _damaged(self, contents: list[np.ndarray], ids: np.ndarray) -> np.ndarray:
        """Which images are not as they were written. Where a record's id is wrong, `ids` gets that of its place."""
        shards = self._shards
        foreign = (ids < 0) | (ids >= len(shards))
        damaged = foreign.copy()
        if shards.checksums is not None:
            found = np.fromiter(map(image_checksum, contents), np.uint32, len(contents))
            damaged |= found != shards.checksums[np.where(foreign, 0, ids)]
            for slot in np.flatnonzero(damaged).tolist():
                rows = np.flatnonzero(shards.checksums == found[slot])
                rows = rows if foreign[slot] else np.append(ids[slot], rows)
                broken = [row for row in rows.tolist() if not shards.is_whole(row)]
                if broken:
                    ids[slot], foreign[slot] = broken[0], False
        if foreign.any():
            raise OSError(
                f"{shards.folder} holds a record of image {ids[foreign][0]}, and has images 0 to {len(shards) - 1}: "
                f"{_look(shards)}"
            )
        return damaged

    def skip(self, count: int) -> None:
        """Read on without looking at the images."""
        for _ in self._pieces(count):
            pass

    def _pieces(self, count: int) -> Iterator[tuple[Any, int, int]]:
        """DALI's batches that hold the next `count` images, and where these start and stop in each."""
        assert self.position + count <= self.length, "the epoch ends here"
        while count:
            start = self.position % self._batch_size
            if start == 0:
                self._outputs = self._run()
            stop = min(start + count, self._batch_size)
            yield self._outputs, start, stop
            self.position += stop - start
            count -= stop - start

    def _run(self) -> Any:
        try:
            return self._graph.run()
        except RuntimeError as error:
            raise OSError(
                f"{self._shards.folder} cannot be read: {_look(self._shards)}; DALI says: {dali_words(error)}"
            ) from error


def _look(shards: ShardSet) -> str:
    return f"look for damage with `dalikd prepare --verify {shards.folder}`, then copy it again or {REMEDY}"


class MicrobatchReader:
    """The encoded images of a sampler's microbatches; asked for one after the other, they are read in sequence.

    Args:
        shards: of one split.
        sampler: cuts epochs into microbatches.
        window: images that a training order draws from.
    """

    def __init__(self, shards: ShardSet, sampler: Sampler, window: int = _WINDOW) -> None:
        self._shards, self._sampler, self._window = shards, sampler, window
        self._streams: dict[int, Future[ShardStream]] = {}  # by epoch, counted on where orders repeat
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dalikd-records")

    def take(self, index: int) -> Encoded:
        """The images of this process's microbatch number `index`; where it has none, the first whole one as filler."""
        place = self._sampler.place(index)
        if not place.valid:
            filler = next(row for row in self._shards.order.tolist() if self._shards.is_whole(row))
            content = np.frombuffer(self._shards.read(filler), np.uint8)
            return Encoded([content], np.array([filler]), np.zeros(1, bool))
        per_epoch = self._sampler.microbatches_per_epoch
        epoch, within = divmod(index, per_epoch)
        start = within * self._sampler.microbatch if self._sampler.reads_shares else place.start
        stream = self._stream(epoch, start)
        stream.skip(start - stream.position)
        if within + _AHEAD >= per_epoch and epoch + 1 not in self._streams:
            self._streams[epoch + 1] = self._thread.submit(self._open, epoch + 1)
        return stream.take(place.valid)

    def close(self) -> None:
        """Free the readers. Can be used again."""
        self._streams.clear()

    def _stream(self, epoch: int, start: int) -> ShardStream:
        """The epoch's stream, opened anew if it has gone past `start`."""
        for other in [number for number in self._streams if number not in (epoch, epoch + 1)]:
            del self._streams[other]
        if epoch not in self._streams or self._streams[epoch].result().position > start:
            self._streams[epoch] = self._thread.submit(self._open, epoch)
        return self._streams[epoch].result()

    def _open(self, epoch: int) -> ShardStream:
        sampler = self._sampler
        batch_size = min(sampler.microbatch, _LARGEST_READ)
        if not sampler.reads_shares:
            return ShardStream(self._shards, None, batch_size)
        folded = sampler.place(epoch * sampler.microbatches_per_epoch).epoch
        shuffle = Shuffle(sampler.seed, folded, sampler.rank, sampler.world, self._window)
        return ShardStream(self._shards, shuffle, batch_size)


# ------------------------------------------------------------------------------------------------ reader


def _build(shards: ShardSet, shuffle: Shuffle | None, batch_size: int) -> Pipeline:
    """A built pipeline with two outputs: encoded bytes, and ids as uint8 [8] or int64 [1]."""
    numbers = range(len(shards.paths))
    options: dict[str, Any] = {"dont_use_mmap": True, "pad_last_batch": False, "stick_to_shard": True}
    seed = 0
    if shuffle is not None:
        numbers = permutation(shuffle.seed, shuffle.epoch, len(numbers)).tolist()
        options |= {"random_shuffle": True, "initial_fill": shuffle.window}
        options |= {"shard_id": shuffle.rank, "num_shards": shuffle.world}
        # the counters of `permutation` have 0 where this has 1
        words = philox((np.uint64(0), np.uint64(shuffle.epoch), np.uint64(Stream.ORDER), np.uint64(1)), shuffle.seed)
        seed = int(words[0]) >> 1
    paths, indices = ([names[number] for number in numbers] for names in (shards.paths, shards.index_paths))
    reader = _READERS[shards.manifest.format]
    graph = _graph(reader, paths, indices, options, batch_size=batch_size, num_threads=1, device_id=None, seed=seed)
    graph.build()
    return graph


@pipeline_def
def _graph(reader, paths: list[str], indices: list[str], options: dict[str, Any]):
    return tuple(reader(paths, indices, options))


def _read_webdataset(paths: list[str], indices: list[str], options: dict[str, Any]):
    components = [";".join(MEMBER_EXTENSIONS), "id"]
    return fn.readers.webdataset(
        paths=paths, index_paths=indices, ext=components, missing_component_behavior="error", **options
    )


def _read_tfrecord(paths: list[str], indices: list[str], options: dict[str, Any]):
    wanted = {
        Feature.ENCODED: tfrecord.FixedLenFeature((), tfrecord.string, ""),
        Feature.ID: tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
    }
    outputs = fn.readers.tfrecord(path=paths, index_path=indices, features=wanted, **options)
    return outputs[Feature.ENCODED], outputs[Feature.ID]


_READERS = {"webdataset": _read_webdataset, "tfrecord": _read_tfrecord}
