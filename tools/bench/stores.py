"""Where the same pictures are read from: files, memory, webdataset tars, TFRecords."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dalikd.pipelines.data import DataConfig, open_source, open_split
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards.layout import ShardFormat
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.pipelines.sources import Source

__all__ = ["STORES", "open_pictures", "open_store", "own_store", "stored_files"]

_DECODED_AT_ONCE = 256


def open_pictures(data: DataConfig, random: int | None) -> Source:
    """The training split, or pictures of random pixels.

    Raises:
        ValueError, OSError: the data set is not as it should be, or both are asked for.
    """
    if random is None:
        return open_split(data, "train", seed=0)
    if data.root is not None:
        raise ValueError("--random takes the place of a data set: leave out --data.root")
    return _random_pictures(random, data.image_size or 32)


def own_store(source: Source) -> str:
    """Where a source's pictures are."""
    if source.files is not None:
        return "files"
    return "resident" if source.shards is None else source.shards.manifest.format


def stored_files(source: Source) -> list[str]:
    """The files that a source's pictures lie in."""
    if source.files is not None:
        return [source.path(row) for row in range(len(source))]
    return [] if source.shards is None else source.shards.paths


def open_store(store: str, source: Source, view: View, folder: Path) -> Source:
    """The pictures of a source, read from elsewhere.

    Args:
        store: a name in STORES.
        source: the pictures.
        view: how they are cut.
        folder: for what has to be written.

    Raises:
        ValueError: the pictures cannot be had there.
    """
    return source if store == own_store(source) else STORES[store](source, view, folder)


def _as_files(source: Source, view: View, folder: Path) -> Source:  # noqa: ARG001
    raise ValueError(f"--sources files: the pictures of {source.name} are no files; leave it out")


def _in_memory(source: Source, view: View, folder: Path) -> Source:  # noqa: ARG001
    if source.files is None:
        raise ValueError(f"--sources resident: give the data set that {source.name} was made from")
    if view.crop != "pad_crop":
        raise ValueError(
            f"--sources resident keeps squares of one size, but {view.crop} cuts another window of the whole picture "
            "each time: leave it out, or say --data.crop pad_crop"
        )
    sampler = Sampler(len(source), min(_DECODED_AT_ONCE, len(source)), shuffle=False, drop_last=False)
    loader = Loader(source, sampler, DrawSpec(replace(view, crop="square")))
    arrays = np.concatenate([batch.images.numpy() for batch in loader])
    loader.close()
    return replace(source, files=None, arrays=arrays)


def _as_webdataset(source: Source, view: View, folder: Path) -> Source:  # noqa: ARG001
    return _as_records(source, folder, "webdataset")


def _as_tfrecord(source: Source, view: View, folder: Path) -> Source:  # noqa: ARG001
    return _as_records(source, folder, "tfrecord")


#: The places, and how pictures get there.
STORES: dict[str, Callable[[Source, View, Path], Source]] = {
    "files": _as_files,
    "resident": _in_memory,
    "webdataset": _as_webdataset,
    "tfrecord": _as_tfrecord,
}


def _as_records(source: Source, folder: Path, kind: ShardFormat) -> Source:
    """Written shuffled, as `dalikd prepare` does, and opened."""
    write_shards(source, folder / kind / "train", WriteOptions(format=kind))
    return open_source(kind, folder / kind, "train")


def _random_pictures(count: int, side: int) -> Source:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Source(
        name="random",
        split="train",
        classes=("0", "1"),
        labels=np.arange(count) % 2,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=side,
        arrays=pixels,
    )
