"""The folder of a split in shards, as `dalikd prepare` writes it, and what its dataset.json says.

A split is a folder: shards (webdataset tars or TFRecord files) each with its index, `labels.npy` (int64 [N], by id),
`order.npy` (int64 [N], the id at each storage position), `checksums.npy` (uint32 [N], `image_checksum` of each encoded
image, by id), `names.txt` (where each image came from, a line each, by id) and `dataset.json`, which describes them all
and holds a checksum of each, and of itself. An id is the row that the image has in the source it came from.

Version 1 of the layout had no checksums.npy, no names.txt, no checksum of dataset.json and none of a shard's ends.
"""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dalikd.pipelines.files import read_json, write_atomically

__all__ = [
    "ARRAYS",
    "CHECKSUMS",
    "EXTENSIONS",
    "MANIFEST",
    "MEMBER_EXTENSIONS",
    "NAMES",
    "REMEDY",
    "VERSION",
    "Feature",
    "Shard",
    "ShardFormat",
    "ShardManifest",
    "ends_checksum",
    "image_checksum",
]

ShardFormat = Literal["webdataset", "tfrecord"]

MANIFEST = "dataset.json"
ARRAYS = ("labels.npy", "order.npy")
CHECKSUMS, NAMES = "checksums.npy", "names.txt"
VERSION = 2  # of the folder's layout
_READ_VERSIONS = (1, VERSION)
_WORDS = 509  # of 8 bytes, in a block: a prime, so that blocks of disks and pages of memory that are swapped show
_SMALL = 32 << 10  # bytes
_END_BYTES = 1024  # of each end of a shard: of a tar the first name and pixels, of a TFRecord also the last id
REMEDY = "write the folder again with `dalikd prepare`"
#: Of the shards, by format.
EXTENSIONS: dict[ShardFormat, str] = {"webdataset": ".tar", "tfrecord": ".tfrecord"}
#: Of an image in a tar, by its content; each sample has one of them.
MEMBER_EXTENSIONS = ("jpg", "png", "bmp", "webp", "tiff", "ppm", "jp2")


class Feature:
    """Names in the tf.train.Example of an image."""

    ENCODED = "image/encoded"
    LABEL = "image/class/label"
    ID = "image/id"
    FILENAME = "image/filename"


@dataclass(frozen=True)
class Shard:
    """One shard: file `name`, how many `images` and `bytes`, SHA-256 of it and of its index, and `ends_checksum` of it;
    None in version 1."""

    name: str
    images: int
    bytes: int
    sha256: str
    index_sha256: str
    ends_crc32: int | None = None

    @property
    def index(self) -> str:
        """Name of the index file."""
        return Path(self.name).with_suffix(".idx").name


@dataclass(frozen=True)
class ShardManifest:
    """What `dataset.json` says.

    Attributes:
        version: of the layout.
        format: of the shards.
        name: the data set the images came from, e.g. "tinyimagenet".
        split: its split, e.g. "train".
        classes: names, index = label.
        mean: per-channel mean of pixels scaled to 0..1.
        std: the same for the standard deviation.
        image_size: the data set's usual side in pixels.
        fingerprint: of the source; where images were resized, with that appended.
        seed: of the storage order.
        resize: images were resized to this short side in pixels; None: kept byte by byte.
        arrays: SHA-256 of labels.npy and order.npy, and from version 2 on of checksums.npy and names.txt.
        shards: the shards in storage order.
    """

    version: int
    format: ShardFormat
    name: str
    split: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    fingerprint: str
    seed: int
    resize: int | None
    arrays: dict[str, str]
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        """Images of all shards."""
        return sum(shard.images for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write dataset.json into a folder."""
        content = asdict(self)
        content["sha256"] = _own_checksum(content)
        write_atomically(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "ShardManifest":
        """Read dataset.json.

        Raises:
            ValueError: it is damaged, was edited, or is of another version.
        """
        path = folder / MANIFEST
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error
        try:
            version = content["version"]
            if version not in _READ_VERSIONS:
                raise ValueError(f"{path} has version {version}, this dalikd reads 1 and {VERSION}: {REMEDY}")
            if version > 1 and content.pop("sha256") != _own_checksum(content):
                raise ValueError(f"{path} is not as it was written (its checksum differs): copy it again, or {REMEDY}")
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            tuples: dict[str, Any] = {name: tuple(content.pop(name)) for name in ("classes", "mean", "std")}
            manifest = cls(**content, **tuples, shards=shards)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {REMEDY}") from error
        wrong = next((name for name, holds in manifest._checks() if not holds), None)
        if wrong:
            raise ValueError(f"{path} is damaged ({wrong} is not of its kind): {REMEDY}")
        return manifest

    def _checks(self) -> Iterator[tuple[str, bool]]:
        """Whether each entry is of its kind; a shard lies in the folder itself."""
        for name in ("format", "name", "split", "fingerprint"):
            yield name, isinstance(getattr(self, name), str)
        for name, least in (("image_size", 1), ("seed", 0), *([] if self.resize is None else [("resize", 1)])):
            yield name, _is_count(getattr(self, name), least)
        yield "classes", all(isinstance(name, str) for name in self.classes)
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            yield name, len(numbers) == 3 and all(type(one) in (int, float) and -1e6 < one < 1e6 for one in numbers)
        listed = ARRAYS if self.version == 1 else (*ARRAYS, CHECKSUMS, NAMES)
        yield "arrays", isinstance(self.arrays, dict) and all(isinstance(self.arrays.get(name), str) for name in listed)
        for shard in self.shards:
            yield "shards", all(isinstance(text, str) for text in (shard.name, shard.sha256, shard.index_sha256))
            yield "shards", Path(shard.name).name == shard.name and "\0" not in shard.name and len(shard.name) < 256
            yield "shards", _is_count(shard.images) and _is_count(shard.bytes)
            yield "shards", self.version == 1 or _is_count(shard.ends_crc32)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 48


def _own_checksum(content: dict[str, Any]) -> str:
    """Of what dataset.json says, however it is laid out."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ends_checksum(path: Path) -> int:
    """CRC-32 of the first and the last 1,024 bytes of a shard: shows, without reading it, that it is not another one.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        start = file.read(_END_BYTES)
        file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
        return zlib.crc32(file.read(_END_BYTES), zlib.crc32(start))


def image_checksum(content: bytes | np.ndarray) -> int:
    """zlib's CRC-32 of encoded bytes; of 32 KiB or more, of the exclusive or of all whole blocks of 4,072 bytes, and
    then of what follows them: 1 µs for a thumbnail, 10 µs for a photo of 110 kB, whose plain CRC-32 takes 30. Of
    what a CPU needs for an image that is about 1 %."""
    if len(content) < _SMALL:
        return zlib.crc32(content)  # pyright: ignore[reportArgumentType] - numpy's stubs lack the buffer protocol
    values = np.frombuffer(content, np.uint8)
    rest = len(values) // (8 * _WORDS) * (8 * _WORDS)
    folded = np.bitwise_xor.reduce(values[:rest].view(np.uint64).reshape(-1, _WORDS))
    return zlib.crc32(values[rest:].data, zlib.crc32(folded.data))
