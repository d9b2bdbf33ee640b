"""Writes a source into shards that DALI reads in sequence: webdataset tars or TFRecord files.

The images are shuffled once, so that any stretch of a shard is a fair sample; each keeps its row in the source as its
id. Encoded files go in byte by byte, arrays as PNG. All is written beside the target folder, then moved there whole; or
it goes to object storage file by file, what describes it last.
"""

import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import struct
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image

from dalikd.pipelines.content import extension_of, goes_apart, refusal
from dalikd.pipelines.doctor import Decoder, find_bad_files, printable
from dalikd.pipelines.draws import permutation
from dalikd.pipelines.files import file_digest, write_atomically
from dalikd.pipelines.objects import ObjectStore
from dalikd.pipelines.progress import progress
from dalikd.pipelines.shards.layout import (
    ARRAYS,
    CHECKSUMS,
    EXTENSIONS,
    MANIFEST,
    NAMES,
    VERSION,
    Feature,
    Shard,
    ShardFormat,
    ShardManifest,
    ends_checksum,
    image_checksum,
)
from dalikd.pipelines.shards.tfrecord import encode_example, frame
from dalikd.pipelines.sources import Source

__all__ = [
    "Sample",
    "WriteOptions",
    "check_decodable",
    "check_targets",
    "pack_members",
    "upload_splits",
    "write_shards",
    "write_splits",
]

_CHUNK = 256  # images that are read ahead
_MOST_SHARDS = 256  # by default; DALI keeps every shard of a split open
_USUAL_SHARD = 1000  # images
_MOST_NAMED = 5
_UPLOADS = 2  # files, as of a shard and its index, that go to the store while the next are written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    """Write one split into a folder of its own; as `write_splits`."""
    return write_splits({folder: source}, options)[0]


def write_splits(sources: Mapping[Path, Source], options: WriteOptions) -> list[ShardManifest]:
    """Write splits, each into a folder of its own. Only when all are written they are moved to their places: whoever is
    killed or fails before leaves what was there, and at most folders with names that start with a dot, which the next
    call removes.

    Args:
        sources: images in files or in memory, by folder; folders have one parent, and are empty or missing, unless they
            may be overwritten.
        options: how.

    Raises:
        ValueError: an image is not as it should be.
        FileExistsError: a folder holds something, or another call writes there.
        OSError: a file cannot be read, or the disk is too small.
    """
    [parent] = {folder.absolute().parent for folder in sources}
    check_targets(sources, options)
    with ThreadPoolExecutor(options.threads, thread_name_prefix="dalikd-prepare") as pool:
        for source in sources.values() if options.check else ():
            check_decodable(source, options.threads)
        parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(parent, [folder.name for folder in sources]):
            parts = {folder: folder.with_name(f".{folder.name}-{uuid4().hex}") for folder in sources}
            try:
                manifests = [
                    _write_split(source, parts[folder], folder.name, options, pool)
                    for folder, source in sources.items()
                ]
                for folder, part in parts.items():
                    _put(part, folder, options.overwrite)
            except OSError as error:
                if error.errno in _FULL:
                    raise OSError(
                        f"{parent}: {error.strerror} while shards were written, and nothing of them was kept: "
                        "name another --output, or make images smaller with --resize"
                    ) from error
                raise
            finally:
                for part in parts.values():
                    shutil.rmtree(part, ignore_errors=True)
    return manifests


def upload_splits(sources: Mapping[str, Source], store: ObjectStore, options: WriteOptions) -> list[ShardManifest]:
    """Write splits into object storage. Every file is written into a temporary folder first, which at most two shards
    and their indices occupy, and goes to the store whole; the files that describe the splits go last: what a call that
    was killed has left is no split, and the same call writes over it. Nothing keeps two calls apart.

    Args:
        sources: images in files or in memory, by the name of the split's folder, which is empty or holds what such a
            call has left, unless it may be overwritten: then what describes it goes first.
        store: whose prefix is the folder of the splits.
        options: how.

    Raises:
        ValueError: an image is not as it should be, or a shard is too large.
        FileExistsError: a folder holds something.
        OSError: a file cannot be read, or the disk of the temporary folder is too small.
        StoreError: as `ObjectStore.write`.
    """
    there = {split: _check_prefix(store, split, options.overwrite) for split in sources}
    for source in sources.values() if options.check else ():
        check_decodable(source, options.threads)
    for split in sources:
        if MANIFEST in there[split]:
            store.remove(f"{split}/{MANIFEST}")
    with tempfile.TemporaryDirectory(prefix="dalikd-prepare-") as folder:
        try:
            manifests = _upload(sources, store, Path(folder), options)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(
                f"{folder}: {error.strerror} while shards were written: name a larger disk in TMPDIR, or give "
                "a smaller --shard_images"
            ) from error
    for split, manifest in zip(sources, manifests, strict=True):
        shards = {name for shard in manifest.shards for name in (shard.name, shard.index)}
        for name in sorted(there[split] - shards - {MANIFEST, *manifest.arrays}):
            store.remove(f"{split}/{name}")
    return manifests


def _upload(
    sources: Mapping[str, Source], store: ObjectStore, folder: Path, options: WriteOptions
) -> list[ShardManifest]:
    coming = deque[Any]()

    def ready(path: Path) -> None:
        coming.append(store.submit(lambda: (store.write(f"{path.parent.name}/{path.name}", path), path.unlink())))
        while len(coming) > _UPLOADS:
            coming.popleft().result()

    with ThreadPoolExecutor(options.threads, thread_name_prefix="dalikd-prepare") as pool:
        manifests = [
            _write_split(source, folder / split, split, options, pool, ready) for split, source in sources.items()
        ]
    while coming:
        coming.popleft().result()
    for split in sources:
        store.write(f"{split}/{MANIFEST}", folder / split / MANIFEST)
    return manifests


def _check_prefix(store: ObjectStore, split: str, overwrite: bool) -> set[str]:
    """What an earlier call has written there, by names."""
    pages = store.list_all(split, deep=False)
    found = {key.rpartition("/")[2] for page in pages for key, _, _ in page.objects if not key.endswith("/")}
    own = re.compile(rf"{re.escape(split)}-\d{{5,}}\.(tar|tfrecord|idx)")
    others = sorted(name for name in found - {MANIFEST, *ARRAYS, CHECKSUMS, NAMES} if not own.fullmatch(name))
    if others:
        raise FileExistsError(f"{store.url}/{split} holds something else ({others[0]}): name another --output")
    if MANIFEST in found and not overwrite:
        raise FileExistsError(
            f"{store.url}/{split} is not empty: name another --output, or replace it with --overwrite true"
        )
    return found


@contextmanager
def _alone_in(parent: Path, names: list[str]) -> Iterator[None]:
    """Keep other calls out of a folder, and remove what killed ones have left there of splits of these names: at once
    what they had not written to the end, and the rest, which may be the only copy, when this call has ended well.

    Where the file system has no locks for folders, as NFS, others are kept apart by the names of their parts alone.
    """
    lock = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = [part for name in names for part in parent.glob(f".{name}-{'[0-9a-f]' * 32}")]
    except BlockingIOError as error:
        os.close(lock)
        raise FileExistsError(
            f"another `dalikd prepare` writes into {parent}: wait for it, or name another --output"
        ) from error
    except OSError:
        left = []
    try:
        for part in left:
            if not (part / MANIFEST).exists():
                shutil.rmtree(part)
        yield
        for part in left:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)


def _put(part: Path, folder: Path, overwrite: bool) -> None:
    """Move what was written to its place."""
    if not folder.is_dir() or not any(folder.iterdir()):
        part.rename(folder)
        return
    if not overwrite:
        raise FileExistsError(f"{folder} has been filled by another call meanwhile: name another --output")
    old = folder.with_name(f".{folder.name}-{uuid4().hex}")
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old)


def check_targets(sources: Mapping[Path, Source], options: WriteOptions) -> None:
    """Check that the folders may be written, and that there is room for all of them."""
    for folder, source in sources.items():
        assert source.shards is None, "shards are made of files or arrays"
        _check_folder(folder, options.overwrite)
    _check_space(sources, options.resize)


def _write_split(
    source: Source,
    folder: Path,
    prefix: str,
    options: WriteOptions,
    pool: ThreadPoolExecutor,
    ready: Callable[[Path], object] = lambda _: None,
) -> ShardManifest:
    """Write a split; `ready` is called for every file of it but the one that describes them, when nothing is read from
    it or written to it any more."""
    folder.mkdir()
    order = permutation(options.seed, 0, len(source))
    count = -(-len(source) // (options.shard_images or max(_USUAL_SHARD, -(-len(source) // _MOST_SHARDS))))
    checksums, names = np.empty(len(source), np.uint32), [""] * len(source)

    def noted() -> Iterator[Sample]:
        for sample in _samples(source, order, options, pool):
            checksums[sample.id], names[sample.id] = image_checksum(sample.encoded), sample.name
            yield sample

    samples, shards = noted(), list[Shard]()
    for number, part in enumerate(np.array_split(order, count)):
        path = folder / f"{prefix}-{number:05d}{EXTENSIONS[options.format]}"
        shards.append(_write_shard(path, options.format, samples, len(part)))
        ready(path)
        ready(path.with_suffix(".idx"))
    arrays = (source.labels.astype("<i8"), order.astype("<i8"), checksums.astype("<u4"))
    for name, array in zip((*ARRAYS, CHECKSUMS), arrays, strict=True):
        write_atomically(folder / name, partial(np.save, arr=array))
    write_atomically(folder / NAMES, "".join(f"{name}\n" for name in names).encode())
    resized = "" if options.resize is None else f"-short{options.resize}"
    manifest = ShardManifest(
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
        arrays={name: file_digest(folder / name) for name in (*ARRAYS, CHECKSUMS, NAMES)},
        shards=tuple(shards),
    )
    for name in manifest.arrays:
        ready(folder / name)
    manifest.write(folder)
    return manifest


# ------------------------------------------------------------------------------------------------ shards


class Sample(NamedTuple):
    """An image: its `id`, `label`, `encoded` bytes, their `extension`, and the `name` that it had."""

    id: int
    label: int
    encoded: bytes
    extension: str
    name: str


def _write_shard(path: Path, format: ShardFormat, samples: Iterator[Sample], images: int) -> Shard:
    """Take so many samples and write them and their index."""
    layout, offset, lines, digest = _LAYOUTS[format], 0, [], hashlib.sha256()

    def write(file: BinaryIO) -> None:
        nonlocal offset
        for _ in range(images):
            content, line = layout.pack(next(samples), offset)
            offset += file.write(content)
            digest.update(content)
            lines.append(line)
        offset += file.write(layout.end)
        digest.update(layout.end)

    write_atomically(path, write)
    index = path.with_suffix(".idx")
    write_atomically(index, (layout.heading.format(images) + "".join(f"{line}\n" for line in lines)).encode("ascii"))
    return Shard(path.name, images, offset, digest.hexdigest(), file_digest(index), ends_checksum(path))


def pack_members(sample: Sample, offset: int) -> tuple[bytes, str]:
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


def _pack_example(sample: Sample, offset: int) -> tuple[bytes, str]:
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

    pack: Callable[[Sample, int], tuple[bytes, str]]
    end: bytes
    heading: str


_LAYOUTS: dict[str, _Layout] = {
    "webdataset": _Layout(pack_members, bytes(2 * tarfile.BLOCKSIZE), "v1.2 {}\n"),
    "tfrecord": _Layout(_pack_example, b"", ""),
}


# ----------------------------------------------------------------------------------------------- samples


def _samples(source: Source, order: np.ndarray, options: WriteOptions, pool: ThreadPoolExecutor) -> Iterator[Sample]:
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


def _sample(source: Source, row: int) -> Sample:
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
    name = "\\n".join(printable(name).splitlines())  # a line in names.txt
    return Sample(row, int(source.labels[row]), encoded, extension_of(encoded), name)


def _check_apart(source: Source, samples: list[Sample], decoder: Decoder) -> None:
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
    source: Source, samples: list[Sample], short_side: int, decoder: Decoder, pool: ThreadPoolExecutor
) -> list[Sample]:
    """JPEGs of what training would see, their short side `short_side`, the long one floored; those that are not larger
    than that stay as they are.

    Raises:
        ValueError: DALI cannot decode one.
    """

    def resize(sample: Sample, pixels: np.ndarray | str) -> Sample:
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


def _check_space(sources: Mapping[Path, Source], resize: int | None) -> None:
    """Check that all of them have room, by their folders' parent."""
    folder = next(iter(sources))
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    needed = sum(_bytes_needed(source, resize) for source in sources.values())
    if needed > free:
        raise OSError(
            f"{' and '.join(source.split for source in sources.values())}: takes about {needed / 1e9:.1f} GB, "
            f"{existing} has {free / 1e9:.1f} GB free: name another --output, or make images smaller with --resize"
        )


def _bytes_needed(source: Source, resize: int | None) -> int:
    """Estimated from some files' sizes; arrays are larger than their PNGs, a JPEG has below 1 byte a pixel."""
    if source.arrays is not None:
        needed = source.arrays.nbytes
    else:
        assert source.files is not None
        rows = np.linspace(0, len(source) - 1, min(_SAMPLED, len(source)), dtype=np.int64)
        needed = int(source.files.take(rows).measure().sum()) * len(source) // len(rows)
    if resize is not None:
        needed = min(needed, 2 * resize * resize * len(source))
    return needed + 4 * tarfile.BLOCKSIZE * len(source)


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
