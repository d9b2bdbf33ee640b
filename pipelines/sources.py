"""The images of one split: on disk, in memory or in shards. Nothing is decoded here."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import cast

import numpy as np

from dalikd.pipelines.content import BYTES_A_PIXEL, MAX_PIXELS
from dalikd.pipelines.datasets.classes import check_equal_classes, share_rows, shorten, stratified_rows
from dalikd.pipelines.datasets.file_list import FileList, Store, manifest_folder
from dalikd.pipelines.datasets.info import DATASET_INFO, Finding
from dalikd.pipelines.files import read_within
from dalikd.pipelines.shards.read import ShardSet

__all__ = ["Source", "check_count", "check_same_classes", "why_fingerprints_differ"]

_WITHOUT_SIZES, _WITH_SIZES = 16, 20  # hex digits of a fingerprint: its length says what it holds


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """The N images of one split: on disk (`files`), in memory (`arrays`) or in `shards`.

    Attributes:
        name: data set, e.g. "tinyimagenet".
        split: e.g. "train".
        classes: names, index = label.
        labels: int64 [N]; -1 where there are none.
        mean: per-channel mean of pixels scaled to 0..1.
        std: per-channel standard deviation of the same.
        image_size: the data set's usual side in pixels.
        files: encoded files on disk, or None.
        arrays: uint8 [N, H, W, 3] in memory, or None.
        shards: that `dalikd prepare` has written, or None; a row is an image's row in its first source.
        notes: lines that a run prints at its start: what was left out, how classes were ordered.
        max_pixels: images of more are not read.
        labelled: whether there are labels. If not, the classes are those of the net that is asked, and none before.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: np.ndarray
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    files: FileList | None = None
    arrays: np.ndarray | None = None
    shards: ShardSet | None = None
    notes: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS
    labelled: bool = True

    def __post_init__(self) -> None:
        held = [images for images in (self.files, self.arrays, self.shards) if images is not None]
        assert len(held) == 1, "a source has either files or arrays, or shards"
        assert len(held[0]) == len(self.labels), f"{len(held[0])} images, {len(self.labels)} labels"

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digits of a SHA-256 over name, split, classes, labels and pixels; or relative paths and sizes of files.

        The same for a data set that has moved to another folder, or into shards; computed when first asked for.
        Two sets of files with the same fingerprint have the same classes, names, labels and file sizes, except that
        images re-made to exactly the same sizes pass, and of more than 20,000 files, whose sizes are remembered, those
        that were rewritten in place without a change of size in one of the 32,768 or more that each start looks at.
        It has 20 digits where sizes are in it, else 16, as those of files had in earlier versions.
        """
        if self.shards is not None:
            return self.shards.manifest.fingerprint
        classes = self.classes if self.labelled else ()  # a net's are not the images' own
        digest = sha256(json.dumps([self.name, self.split, classes]).encode())
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        if self.files is not None:
            for chunk in self.files.relative_chunks():
                digest.update(chunk.data)
            digest.update(np.ascontiguousarray(self.files.measure(), "<i8").data)
            return digest.hexdigest()[:_WITH_SIZES]
        if self.arrays is not None:
            digest.update(f"{self.arrays.shape}".encode())
            digest.update(np.ascontiguousarray(self.arrays).data)
        return digest.hexdigest()[:_WITHOUT_SIZES]

    def path(self, row: int) -> str:
        """Path of an image; for one in memory or in a shard, a name to print."""
        if self.shards is not None:
            return self.shards.name(row)
        return self.files.path(row) if self.files is not None else f"{self.name}/{self.split}[{row}]"

    def no_files(self) -> np.ndarray:
        """Rows that are known not to be read: of what is no file, as a pipe, and of files with more bytes than the
        largest image has; int64."""
        sizes = None if self.files is None else self.files.sizes
        if sizes is None:
            return np.empty(0, np.int64)
        return np.flatnonzero((sizes < 0) | (sizes > BYTES_A_PIXEL * self.max_pixels))

    def read(self, row: int, seconds: float = 60) -> bytes:
        """The encoded bytes of an image in a file or shard.

        Raises:
            FileNotFoundError: the file is missing; says where the list of files is remembered, if it is.
            OSError: it cannot be read, or not in so many seconds; it is no file, or has more bytes than the largest
                image; or the object is not the one that was listed. StoreError: the object store fails.
            ValueError: the shard is damaged there.
        """
        if self.shards is not None:
            return self.shards.read(row)
        assert self.files is not None, "images in memory are decoded"
        if self.store is not None:
            return self.store.read(*self.files.objects([row])[0])
        try:
            return read_within(self.files.path(row), seconds, BYTES_A_PIXEL * self.max_pixels)
        except FileNotFoundError:
            raise FileNotFoundError(self.files.missing(row)) from None

    @property
    def store(self) -> Store | None:
        """That the images are objects of, or None."""
        return None if self.files is None else self.files.store

    @property
    def encoded(self) -> FileList | ShardSet:
        """The images that are not in memory."""
        encoded = self.files if self.shards is None else self.shards
        assert encoded is not None, "images in memory are decoded"
        return encoded

    @property
    def record_folder(self) -> Path:
        """Where a record of these files is kept."""
        if self.shards is not None:
            return manifest_folder(self.shards.folder)
        files = cast(FileList, self.files)
        return manifest_folder(Path(files.root) if self.store is None else files.root)

    def stamp(self, row: int) -> tuple[int, int]:
        """Size in bytes, and time of the last change in ns, of the file that an image lies in; as `FileList.stamps`.
        Raises OSError."""
        if self.files is not None and self.store is not None:
            return self.files.objects([row])[0][1:]
        path = self.path(row)
        status = Path(path if self.shards is None else path.rpartition(":")[0]).stat()
        return status.st_size, status.st_mtime_ns

    def limit(self, n: int, seed: int = 0, *, option: str = "--data.limit") -> "Source":
        """A subset of `n` images with the classes in the same proportions, in the same order.

        With the same seed, a smaller subset is part of every larger one. `option` is what messages call `n`.

        Raises:
            ValueError: `n` is smaller than the number of classes or larger than the source, `seed` is negative, or
                the images are in shards.
        """
        self._check_divisible(option, n)
        if not len(self.classes) <= n <= len(self):
            raise ValueError(
                f"{option} {n}: {self.name} {self.split} has {len(self)} images of {len(self.classes)} classes; "
                f"give a number from {max(1, len(self.classes))} to {len(self)}"
            )
        return self.take(stratified_rows(np.maximum(self.labels, 0), n, seed))

    def share(self, share: float, seed: int = 0) -> "Source":
        """A subset with this share of each class, drawn class by class, in the same order.

        A class of m images keeps share * m, rounded to the nearest whole number, a half up. With the same seed, a
        smaller share is part of every larger one.

        Raises:
            ValueError: `share` is not above 0 and up to 1, or leaves a class without images, `seed` is negative, or
                the images are in shards.
        """
        if not 0 < share <= 1:
            raise ValueError(f"--data.share {share}: give a share of the training images above 0, up to 1")
        if share == 1:
            return self
        self._check_divisible("--data.share", share)
        labels, classes = np.maximum(self.labels, 0), self.classes or ("images",)
        counts = np.bincount(labels, minlength=len(classes))
        kept = np.floor(np.round(share * counts, 9) + 0.5).astype(np.int64)  # 0.29 * 50 is 14.499999999999998
        if not kept.all():
            fewest = int(counts.argmin())
            least = ceil(500_000 / counts[fewest]) / 1_000_000  # half an image, in six digits
            raise ValueError(
                f"--data.share {share}: {self.name} {self.split} keeps no image of the class {classes[fewest]}, "
                f"which has {counts[fewest]}; give at least {least:g}"
            )
        return self.take(share_rows(labels, kept, seed))

    def _check_divisible(self, option: str, value: float) -> None:
        if self.shards is not None:
            raise ValueError(
                f"{option} {value}: shards are read whole; write smaller ones by `dalikd prepare {option} {value}`"
            )

    def take(self, rows: np.ndarray) -> "Source":
        """The images of some rows, in their order; not of shards."""
        files = None if self.files is None else self.files.take(rows)
        arrays = None if self.arrays is None else self.arrays[rows]
        return replace(self, labels=self.labels[rows], files=files, arrays=arrays)


def why_fingerprints_differ(before: str, now: str) -> str:
    """What two fingerprints that differ tell of their images, in words."""
    if len(before.partition("-")[0]) == _WITHOUT_SIZES < len(now.partition("-")[0]):
        return "one holds no file sizes, as those of arrays and of earlier versions of dalikd: they cannot be compared"
    return "the classes, or the images' names, labels or sizes, are others"


def check_same_classes(train: Source, val: Source) -> None:
    """Check that a label means the same in both.

    Raises:
        ValueError: the class lists differ; names the first differences.
    """
    check_equal_classes(train.name, (train.split, train.classes), (val.split, val.classes))


def check_count(source: Source, split: str, *, part: bool = False) -> Finding:
    """Compare how many classes and images a split has with what is published.

    Args:
        source: the split, not limited.
        split: what it is called in the table; "train+extra" is both together.
        part: classes were left out.
    """
    info, counts = DATASET_INFO[source.name], np.bincount(source.labels, minlength=len(source.classes))
    wrong = []
    if not part and info.classes not in (None, len(counts)):
        wrong.append(f"{info.classes:,} classes are published")
    published = sum(info.images.get(name, 0) for name in split.split("+")) or len(source)
    if not part and published != len(source):
        wrong.append(f"{published:,} images are published")
    if split in info.a_class:
        fewest, most = info.a_class[split]
        pairs = zip(source.classes, counts, strict=True)
        outside = [f"{name} {count}" for name, count in pairs if not fewest <= count <= most]
        usual = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        wrong += [f"a class has {usual} images, but {shorten(outside)}"] if outside else []
    found = f"{len(counts):,} classes, {len(source):,} images"
    return Finding(f"{source.name} {source.split}", "different" if wrong else "whole", "; ".join([found, *wrong]))
