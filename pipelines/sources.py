"""What images there are: paths or arrays, labels, classes, splits. Nothing is decoded here."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import cast

import numpy as np

from dalikd.pipelines.datasets.cifar import find_cifar
from dalikd.pipelines.datasets.classes import check_equal_classes, stratified_rows
from dalikd.pipelines.datasets.file_list import FileList
from dalikd.pipelines.datasets.folders import find_digits, find_tinyimagenet, find_tree
from dalikd.pipelines.datasets.info import DATASET_INFO, Statistics, default_statistics
from dalikd.pipelines.datasets.spec import Role, SplitIndex, SplitSpec
from dalikd.pipelines.datasets.stl10 import find_stl10
from dalikd.pipelines.datasets.svhn import find_svhn
from dalikd.pipelines.shards.layout import EXTENSIONS, ContainerFormat
from dalikd.pipelines.shards.read import Records

__all__ = [
    "SOURCE_NAMES",
    "Source",
    "Statistics",
    "check_same_classes",
    "default_statistics",
    "open_source",
    "why_fingerprints_differ",
]

_WITHOUT_SIZES, _WITH_SIZES = 16, 20  # hex digits of a fingerprint: its length says what it holds


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """The N labelled images of one split: on disk (`files`), in memory (`arrays`) or in containers (`records`).

    Attributes:
        name: data set, e.g. "tinyimagenet".
        split: e.g. "train".
        classes: names, index = label.
        labels: int64 [N].
        mean: per-channel mean of pixels scaled to 0..1.
        std: per-channel standard deviation of the same.
        image_size: the data set's usual side in pixels.
        files: encoded files on disk, or None.
        arrays: uint8 [N, H, W, 3] in memory, or None.
        records: containers that `dalikd prepare` has written, or None; a row is an image's row in its first source.
        notes: lines that a run prints at its start: what was left out, how classes were ordered.
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
    records: Records | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        held = [images for images in (self.files, self.arrays, self.records) if images is not None]
        assert len(held) == 1, "a source has either files or arrays, or records"
        assert len(held[0]) == len(self.labels), f"{len(held[0])} images, {len(self.labels)} labels"

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digits of a SHA-256 over name, split, classes, labels and pixels; or relative paths and sizes of files.

        The same for a data set that has moved to another folder, or into containers; computed when first asked for.
        Two sets of files with the same fingerprint have the same classes, names, labels and file sizes, except that
        images re-made to exactly the same sizes pass, and of more than 20,000 files, whose sizes are remembered, those
        that were rewritten in place without a change of size in one of the 32,768 or more that each start looks at.
        It has 20 digits where sizes are in it, else 16, as those of files had in earlier versions.
        """
        if self.records is not None:
            return self.records.description.fingerprint
        digest = sha256(json.dumps([self.name, self.split, self.classes]).encode())
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
        """Path of an image; for one in memory or in a container, a name to print."""
        if self.records is not None:
            return self.records.name(row)
        return self.files.path(row) if self.files is not None else f"{self.name}/{self.split}[{row}]"

    def read(self, row: int) -> bytes:
        """The encoded bytes of an image in a file or container.

        Raises:
            FileNotFoundError: the file is missing; says where the list of files is remembered, if it is.
            OSError: it cannot be read.
            ValueError: the container is damaged there.
        """
        if self.records is not None:
            return self.records.read(row)
        assert self.files is not None, "images in memory are decoded"
        try:
            return Path(self.files.path(row)).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(self.files.missing(row)) from None

    def limit(self, n: int, seed: int = 0, *, option: str = "--data.limit") -> "Source":
        """A subset of `n` images with the classes in the same proportions, in the same order.

        With the same seed, a smaller subset is part of every larger one. `option` is what messages call `n`.

        Raises:
            ValueError: `n` is smaller than the number of classes or larger than the source, `seed` is negative, or
                the images are in containers.
        """
        if self.records is not None:
            raise ValueError(
                f"{option} {n}: containers are read whole; write smaller ones by `dalikd prepare {option} {n}`"
            )
        if not len(self.classes) <= n <= len(self):
            raise ValueError(
                f"{option} {n}: {self.name} {self.split} has {len(self)} images of {len(self.classes)} classes; "
                f"say a number from {len(self.classes)} to {len(self)}"
            )
        rows = stratified_rows(self.labels, n, seed)
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


def open_source(
    name: str,
    root: str | Path | None,
    role: Role,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
    classes: str | Path | None = None,
    class_seed: int | None = None,
    train_split: str | None = None,
) -> Source:
    """Find the images of one split.

    Args:
        name: one of SOURCE_NAMES.
        root: the data set's folder; digits needs none.
        role: what the images are for; decides the split where none is named.
        split: the split's own name. For folder trees the folder, "." where `root` itself holds the class folders.
        limit: keep this many, stratified.
        seed: of `limit`.
        download: fetch what torchvision can fetch if it is missing.
        classes: file that lists the classes to keep; default: all, for imagenet100 a hundred chosen by `class_seed`.
        class_seed: of that choice; default: 0.
        train_split: the training split's own name, where Tiny-ImageNet's validation split finds its classes.

    Raises:
        ValueError: unknown name, role, split or layout; a class without pictures or one that is not there; a limit out
            of range; an option that does not go with the data set.
        FileNotFoundError, NotADirectoryError, FileExistsError: a folder or file is missing or in the way.
        ConnectionError: the download failed.
    """
    _check_name(name)
    if role not in ("train", "val"):
        raise ValueError(f"role {role!r} is unknown: say train or val")
    folder, listed = (
        None if path is None else Path(os.path.realpath(Path(path).expanduser())) for path in (root, classes)
    )
    _check_options(name, folder, download, listed, class_seed)
    split = split or _default_split(name, role)
    request = SplitSpec(name, folder, role, split, download, listed, class_seed or 0, train_split or "train")
    source = _open_records(request) if name in EXTENSIONS else _source(request, _FINDERS[name](request))
    option = "--data.limit" if role == "train" else "--data.val_limit"
    return source if limit is None else source.limit(limit, seed, option=option)


def _check_name(name: str) -> None:
    if name not in SOURCE_NAMES:
        close = get_close_matches(name, SOURCE_NAMES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"data set {name!r} is unknown: {hint}say one of {', '.join(SOURCE_NAMES)}")


def _check_options(name: str, root: Path | None, download: bool, classes: Path | None, class_seed: int | None) -> None:
    if download and name not in _DOWNLOADABLE:
        origin = DATASET_INFO[name].origin if name in DATASET_INFO else ""
        advice = f"; to get it, {origin.replace('ROOT', str(root or 'ROOT'))}" if origin else ""
        raise ValueError(f"{name} cannot be downloaded by --data.download; only {', '.join(_DOWNLOADABLE)} can{advice}")
    if classes is not None and name in EXTENSIONS:
        raise ValueError(
            "--data.classes: containers are read whole; choose classes when they are written: "
            "`dalikd prepare --data.classes FILE`"
        )
    if class_seed is not None and (name != "imagenet100" or classes is not None):
        raise ValueError(
            f"--data.class_seed {class_seed} chooses the classes of imagenet100 where --data.classes names none: "
            "leave it out"
        )


def _default_split(name: str, role: Role) -> str:
    """Arrays are published as train and test."""
    return "test" if role == "val" and name in _DOWNLOADABLE else role


def _open_records(request: SplitSpec) -> Source:
    """What `dalikd prepare` has written. The statistics are those of the data set that it was made from."""
    records = Records(request.split_folder(), cast(ContainerFormat, request.name))
    described = records.description
    return Source(
        name=described.name,
        split=described.split,
        classes=described.classes,
        labels=records.labels,
        mean=described.mean,
        std=described.std,
        image_size=described.image_size,
        records=records,
    )


def _source(request: SplitSpec, found: SplitIndex) -> Source:
    return Source(
        name=request.name,
        split=request.split,
        classes=found.classes,
        labels=found.labels,
        files=found.files,
        arrays=found.arrays,
        notes=found.notes,
        **default_statistics(request.name)._asdict(),
    )


_DOWNLOADABLE = tuple(name for name, facts in DATASET_INFO.items() if facts.downloadable)
_FINDERS: dict[str, Callable[[SplitSpec], SplitIndex]] = {
    "imagefolder": find_tree,
    "imagenet": find_tree,
    "imagenet100": find_tree,
    "tinyimagenet": find_tinyimagenet,
    "cifar10": find_cifar,
    "cifar100": find_cifar,
    "svhn": find_svhn,
    "stl10": find_stl10,
    "digits": find_digits,
}
SOURCE_NAMES = (*_FINDERS, *EXTENSIONS)
