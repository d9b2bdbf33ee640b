"""Writes a source into shards that DALI reads in sequence: webdataset tars or TFRecord files.

The images are shuffled once, so that any stretch of a shard is a fair sample; each keeps its row in the source as its
id. Encoded files go in byte by byte, arrays as PNG. All is written beside the target folder, then moved there whole.
"""

import hashlib
import io
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dalikd.pipelines.content import extension_of, goes_apart, refusal
from dalikd.pipelines.doctor import Decoder, find_bad_files, printable
from dalikd.pipelines.draws import permutation
from dalikd.pipelines.files import build_once, file_digest
from dalikd.pipelines.progress import progress
from dalikd.pipelines.shards.layout import (
    ARRAYS,
    EXTENSIONS,
    MANIFEST,
    VERSION,
    Feature,
    Shard,
    ShardFormat,
    ShardManifest,
)
from dalikd.pipelines.shards.tfrecord import encode_example, frame
from dalikd.pipelines.sources import Source

__all__ = ["WriteOptions", "check_decodable", "check_target", "write_shards"]

_CHUNK = 256  # images that are read ahead
_MOST_SHARDS = 256  # by default; DALI keeps every shard of a split open
_USUAL_SHARD = 1000  # images
_MOST_NAMED = 5
_SAMPLED = 200  # files whose sizes stand for all of them
_REPAIR = "{} cannot be decoded ({}): repair or remove it (--check true names all such files before writing)"


@dataclass(frozen=True)
class WriteOptions:
    """How shards are written.

    Args:
        format: webdataset tars, or TFRecord files.
        seed: of the storage order.
        shard_images: images a shard, at most; None: 1000, or as many as make 256 shards.
        resize: images whose short side is longer are resized to it, and stored as JPEG of quality 95; None: no.
        check: decode every image first, and name those that cannot be.
        overwrite: replace what an earlier call has written.
        threads: that read, decode and encode.
    """

    format: ShardFormat = "webdataset"
    seed: int = 0
    shard_images: int | None = None
    resize: int | None = None
    check: bool = False
    overwrite: bool = False
    threads: int = 8

    def __post_init__(self) -> None:
        if self.format not in EXTENSIONS:
            raise ValueError(f"--format {self.format} is unknown: give {' or '.join(EXTENSIONS)}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} is negative: give 0 or more")
        for option in ("shard_images", "resize", "threads"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option} {value}: give 1 or more")


def write_shards(source: Source, folder: Path, options: WriteOptions) -> ShardManifest:
    """Write one split into a folder of its own.

    Args:
        source: images in files or in memory.
        folder: must be empty or missing, unless it may be overwritten.
        options: how.

    Raises:
        ValueError: an image is not as it should be.
        FileExistsError: the folder holds something.
        OSError: a file cannot be read, or the disk is too small.
    """
    check_target(source, folder, options)
    target = folder if not folder.exists() else folder.with_name(f".{folder.name}-new")
    shutil.rmtree(folder.with_name(f".{folder.name}-new"), ignore_errors=True)  # left by an interrupted call
    with ThreadPoolExecutor(options.threads, thread_name_prefix="dalikd-prepare") as pool:
        if options.check:
            check_decodable(source, options.threads)
        build_once(target, lambda made: _write_split(source, made, folder.name, options, pool))
    if target != folder:
        shutil.rmtree(folder)
        target.rename(folder)
    return ShardManifest.read(folder)


def check_target(source: Source, folder: Path, options: WriteOptions) -> None:
    """Check that `write_shards` may write there, and that there is room.

    Raises:
        FileExistsError: the folder holds something that may not be replaced.
        OSError: the disk is too small.
    """
    assert source.shards is None, "shards are made of files or arrays"
    _check_folder(folder, options.overwrite)
    _check_space(source, folder, options.resize)


def _write_split(source: Source, folder: Path, prefix: str, options: WriteOptions, pool: ThreadPoolExecutor) -> None:
    order = permutation(options.seed, 0, len(source))
    count = -(-len(source) // (options.shard_images or max(_USUAL_SHARD, -(-len(source) // _MOST_SHARDS))))
    samples = _samples(source, order, options, pool)
    shards = tuple(
        _write_shard(folder / f"{prefix}-{number:05d}{EXTENSIONS[options.format]}", options.format, samples, images)
        for number, images in enumerate(len(part) for part in np.array_split(order, count))
    )
    for name, array in zip(ARRAYS, (source.labels, order), strict=True):
        np.save(folder / name, array.astype("<i8"))
    resized = "" if options.resize is None else f"-short{options.resize}"
    ShardManifest(
        version=VERSION,
        format=options.format,
        name=source.name,
        split=source.split,
        classes=source.classes,
        mean=source.mean,
        std=source.std,
        image_size=source.image_size,
        fingerprint=source.fingerprint + resized,
        seed=options.seed,
        resize=options.resize,
        arrays={name: file_digest(folder / name) for name in ARRAYS},
        shards=shards,
    ).write(folder)


# ------------------------------------------------------------------------------------------------ shards


class _Sample(NamedTuple):
    """An image: its `id`, `label`, `encoded` bytes, their `extension`, and the `name` that it had."""

    id: int
    label: int
    encoded: bytes
    extension: str
    name: str


def _write_shard(path: Path, format: ShardFormat, samples: Iterator[_Sample], images: int) -> Shard:
    """Take so many samples and write them and their index."""
    layout, offset, lines, digest = _LAYOUTS[format], 0, [], hashlib.sha256()
    with path.open("xb") as file:
        for _ in range(images):
            content, line = layout.pack(next(samples), offset)
            offset += file.write(content)
            digest.update(content)
            lines.append(line)
        offset += file.write(layout.end)
        digest.update(layout.end)
    index = path.with_suffix(".idx")
    index.write_text(layout.heading.format(images) + "".join(f"{line}\n" for line in lines), encoding="ascii")
    return Shard(path.name, images, offset, digest.hexdigest(), file_digest(index))


def _pack_members(sample: _Sample, offset: int) -> tuple[bytes, str]:
    """A sample as tar members, and its line in the index: extension, offset, size and name of each."""
    contents = {
        sample.extension: sample.encoded,
        "cls": str(sample.label).encode(),
        "id": struct.pack("<q", sample.id),
    }
    members, line = [], []
    for extension, content in contents.items():
        header = tarfile.TarInfo(f"{sample.id:09d}.{extension}")
        header.size = len(content)
        padding = -len(content) % tarfile.BLOCKSIZE
        line.append(f"{extension} {offset + tarfile.BLOCKSIZE} {len(content)} {header.name}")
        members += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(padding)]
        offset += tarfile.BLOCKSIZE + len(content) + padding
    return b"".join(members), " ".join(line)


def _pack_example(sample: _Sample, offset: int) -> tuple[bytes, str]:
    """A sample as a TFRecord, and its line in the index: offset and size."""
    features: dict[str, bytes | int] = {
        Feature.ENCODED: sample.encoded,
        Feature.LABEL: sample.label,
        Feature.ID: sample.id,
        Feature.FILENAME: sample.name.encode(),
    }
    record = frame(encode_example(features))
    return record, f"{offset} {len(record)}"


class _Layout(NamedTuple):
    """How a shard is laid out: a sample's content and index line, what ends it, the index's heading."""

    pack: Callable[[_Sample, int], tuple[bytes, str]]
    end: bytes
    heading: str


_LAYOUTS: dict[str, _Layout] = {
    "webdataset": _Layout(_pack_members, bytes(2 * tarfile.BLOCKSIZE), "v1.2 {}\n"),
    "tfrecord": _Layout(_pack_example, b"", ""),
}


# ----------------------------------------------------------------------------------------------- samples


def _samples(source: Source, order: np.ndarray, options: WriteOptions, pool: ThreadPoolExecutor) -> Iterator[_Sample]:
    """The images in storage order, read and resized by the pool."""
    decoder = Decoder(options.threads, max_pixels=source.max_pixels)
    chunk = _CHUNK if options.resize is None else decoder.at_once
    with progress(f"writing {source.split}", total=len(order), unit=" images") as bar:
        for start in range(0, len(order), chunk):
            samples = list(pool.map(lambda row: _sample(source, row), order[start : start + chunk].tolist()))
            if options.resize is None:
                _check_apart(source, samples, decoder)
            else:
                samples = _resized(source, samples, options.resize, decoder, pool)
            for sample in samples:
                yield sample
                bar.update()


def _sample(source: Source, row: int) -> _Sample:
    """An image as it is.

    Raises:
        ValueError: DALI could not decode it, as its header tells.
        OSError: it cannot be read.
    """
    path = source.path(row)
    arrays = source.arrays
    encoded = source.read(row) if arrays is None else _encode(Image.fromarray(arrays[row]), "PNG")
    reason = refusal(encoded, source.max_pixels)
    if reason is not None:
        raise ValueError(_REPAIR.format(printable(path), reason))
    name = path if source.files is None else path[len(source.files.root) :].lstrip("/")
    return _Sample(row, int(source.labels[row]), encoded, extension_of(encoded), printable(name))


def _check_apart(source: Source, samples: list[_Sample], decoder: Decoder) -> None:
    """No header tells whether such an image is for DALI.

    Raises:
        ValueError: it is not.
    """
    found = [sample for sample in samples if goes_apart(sample.encoded) is not None]
    for first in range(0, len(found), decoder.at_once):
        part = found[first : first + decoder.at_once]
        for sample, answer in zip(part, decoder.decode([sample.encoded for sample in part]), strict=True):
            if isinstance(answer, str):
                raise ValueError(_REPAIR.format(printable(source.path(sample.id)), answer))


def _resized(
    source: Source, samples: list[_Sample], short_side: int, decoder: Decoder, pool: ThreadPoolExecutor
) -> list[_Sample]:
    """JPEGs of what training would see, their short side `short_side`, the long one floored; those that are not larger
    than that stay as they are.

    Raises:
        ValueError: DALI cannot decode one.
    """

    def resize(sample: _Sample, pixels: np.ndarray | str) -> _Sample:
        if isinstance(pixels, str):
            raise ValueError(_REPAIR.format(printable(source.path(sample.id)), pixels))
        height, width = pixels.shape[:2]
        short = min(height, width)
        if short <= short_side:
            return sample
        size = (short_side * width // short, short_side * height // short)
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        return sample._replace(encoded=_encode(image, "JPEG", quality=95), extension="jpg")

    return list(pool.map(resize, samples, decoder.decode([sample.encoded for sample in samples])))


def _encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ checks


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name another --output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty: name another --output, or replace it with --overwrite true")
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} holds something else than an image set ({MANIFEST}): name another --output")


def _check_space(source: Source, folder: Path, resize: int | None) -> None:
    """Estimate the bytes from some files' sizes; arrays are larger than their PNGs, a JPEG has below 1 byte a pixel."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if source.arrays is not None:
        needed = source.arrays.nbytes
    else:
        assert source.files is not None
        rows = np.linspace(0, len(source) - 1, min(_SAMPLED, len(source)), dtype=np.int64)
        needed = int(source.files.take(rows).measure().sum()) * len(source) // len(rows)
    if resize is not None:
        needed = min(needed, 2 * resize * resize * len(source))
    needed += 4 * tarfile.BLOCKSIZE * len(source)
    if needed > free:
        raise OSError(
            f"{source.split} takes about {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB free: "
            "name another --output, or make images smaller with --resize"
        )


def check_decodable(source: Source, threads: int) -> None:
    """Decode everything as training does; images in memory are decoded already.

    Raises:
        ValueError: names the first images that cannot be decoded, and says how many there are.
    """
    with progress(f"checking {source.split}", total=len(source), unit=" images") as bar:
        bad = find_bad_files(source, range(len(source)), threads=threads, done=bar.update)
    if bad:
        names = ", ".join(f"{item.path} ({item.reason})" for item in bad[:_MOST_NAMED])
        more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        raise ValueError(f"cannot decode {names}{more}: repair or remove them")
