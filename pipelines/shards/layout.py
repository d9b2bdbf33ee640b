"""The folder of a split in shards, as `dalikd prepare` writes it, and what its dataset.json says.

A split is a folder: shards (webdataset tars or TFRecord files) each with its index, `labels.npy` (int64 [N], by id),
`order.npy` (int64 [N], the id at each storage position) and `dataset.json`, which describes them all. An id is the row
that the image has in the source it came from.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dalikd.pipelines.files import read_json

__all__ = [
    "ARRAYS",
    "EXTENSIONS",
    "MANIFEST",
    "MEMBER_EXTENSIONS",
    "REMEDY",
    "VERSION",
    "Feature",
    "Shard",
    "ShardFormat",
    "ShardManifest",
]

ShardFormat = Literal["webdataset", "tfrecord"]

MANIFEST = "dataset.json"
ARRAYS = ("labels.npy", "order.npy")
VERSION = 1  # of the folder's layout
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
    """One shard: file `name`, how many `images` and `bytes`, SHA-256 of it and of its index."""

    name: str
    images: int
    bytes: int
    sha256: str
    index_sha256: str

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
        arrays: SHA-256 of labels.npy and order.npy.
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
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "ShardManifest":
        """Read dataset.json.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        path = folder / MANIFEST
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error
        try:
            if content["version"] != VERSION:
                raise ValueError(f"{path} has version {content['version']}, this dalikd reads {VERSION}: {REMEDY}")
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
        yield "arrays", isinstance(self.arrays, dict) and all(isinstance(self.arrays.get(name), str) for name in ARRAYS)
        for shard in self.shards:
            yield "shards", all(isinstance(text, str) for text in (shard.name, shard.sha256, shard.index_sha256))
            yield "shards", Path(shard.name).name == shard.name and "\0" not in shard.name and len(shard.name) < 256
            yield "shards", _is_count(shard.images) and _is_count(shard.bytes)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 48
