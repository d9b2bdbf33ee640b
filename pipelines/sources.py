"""What images there are: paths or arrays, labels, classes, splits. Nothing is decoded here."""

import json
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np

from dalikd.pipelines.cifar import read_cifar
from dalikd.pipelines.containers import ContainerFormat
from dalikd.pipelines.manifest import FileList, list_folders, list_pictures, open_tree
from dalikd.pipelines.records import Records

__all__ = [
    "SOURCE_NAMES",
    "Source",
    "Statistics",
    "check_same_classes",
    "default_statistics",
    "open_source",
    "stratified_rows",
]

Role = Literal["train", "val"]


class Statistics(NamedTuple):
    """Per-channel `mean` and `std` of pixels scaled to 0..1 (RGB), and the usual `image_size` (side in pixels)."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int


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

    def __post_init__(self) -> None:
        held = [images for images in (self.files, self.arrays, self.records) if images is not None]
        assert len(held) == 1, "a source has either files or arrays, or records"
        assert len(held[0]) == len(self.labels), f"{len(held[0])} images, {len(self.labels)} labels"

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over name, split, classes, labels and relative paths (or pixels).

        The same for a data set that has moved to another folder, or into containers; computed when first asked for.
        """
        if self.records is not None:
            return self.records.description.fingerprint
        digest = sha256(json.dumps([self.name, self.split, self.classes]).encode())
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        if self.files is not None:
            for chunk in self.files.relative_chunks():
                digest.update(chunk.data)
        if self.arrays is not None:
            digest.update(f"{self.arrays.shape}".encode())
            digest.update(np.ascontiguousarray(self.arrays).data)
        return digest.hexdigest()[:16]

    def path(self, row: int) -> str:
        """Path of an image; for one in memory or in a container, a name to print."""
        if self.records is not None:
            return self.records.name(row)
        return self.files.path(row) if self.files is not None else f"{self.name}/{self.split}[{row}]"

    def limit(self, n: int, seed: int = 0) -> "Source":
        """A subset of `n` images with the classes in the same proportions, in the same order.

        With the same seed, a smaller subset is part of every larger one.

        Raises:
            ValueError: `n` is smaller than the number of classes or larger than the source, `seed` is negative, or
                the images are in containers.
        """
        if self.records is not None:
            raise ValueError(
                f"--data.limit {n}: containers are read whole; write smaller ones by `dalikd prepare --data.limit {n}`"
            )
        if not len(self.classes) <= n <= len(self):
            raise ValueError(
                f"--data.limit {n}: {self.name} {self.split} has {len(self)} images of {len(self.classes)} classes; "
                f"say a number from {len(self.classes)} to {len(self)}"
            )
        rows = stratified_rows(self.labels, n, seed)
        files = None if self.files is None else self.files.take(rows)
        arrays = None if self.arrays is None else self.arrays[rows]
        return replace(self, labels=self.labels[rows], files=files, arrays=arrays)


def stratified_rows(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows of a stratified random subset, ascending: int64 [n] out of labels int64 [N], n <= N.

    Member k of a class of m (in random order) gets the key (k + 1/2) / m, first members come before all others, and
    the n smallest keys are kept: proportions hold to about one image a class, and subsets are nested in n.

    Raises:
        ValueError: `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} is negative: say 0 or more")
    # The raw bits of Philox, unlike a Generator's methods, are promised to stay the same between numpy versions.
    noise = np.random.Philox(key=seed).random_raw(len(labels))
    by_class = np.lexsort((noise, labels))
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    ordered = labels[by_class]
    rank = np.arange(len(labels)) - starts[ordered]
    key = np.where(rank == 0, -1.0, (rank + 0.5) / counts[ordered])
    chosen = by_class[np.lexsort((noise[by_class], key))[:n]]
    return np.sort(chosen).astype(np.int64)


def check_same_classes(train: Source, val: Source) -> None:
    """Check that a label means the same in both.

    Raises:
        ValueError: the class lists differ; names the first differences.
    """
    if train.classes == val.classes:
        return
    differences = [
        f"only in {source.split}: {_some(missing)}"
        for source, other in ((train, val), (val, train))
        if (missing := [name for name in source.classes if name not in set(other.classes)])
    ]
    if not differences:
        label = next(i for i, pair in enumerate(zip(train.classes, val.classes, strict=False)) if pair[0] != pair[1])
        differences = [f"label {label} is {train.classes[label]} and {val.classes[label]}"]
    raise ValueError(
        f"{train.name}: {train.split} has {len(train.classes)} classes, {val.split} {len(val.classes)}; "
        f"{'; '.join(differences)}: both must have the same class folders"
    )


def default_statistics(name: str) -> Statistics:
    """Usual mean, std and side of a data set by its name.

    Raises:
        ValueError: unknown name; lists the known ones. Or containers, which hold their own.
    """
    _check_name(name)
    if name not in _STATISTICS:
        raise ValueError(f"{name} has no statistics of its own: what `dalikd prepare` has written holds them")
    return _STATISTICS[name]


def open_source(
    name: str,
    root: str | Path | None,
    role: Role,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> Source:
    """Find the images of one split.

    Args:
        name: one of SOURCE_NAMES.
        root: the data set's folder; digits needs none.
        role: what the images are for; decides the split where none is named.
        split: the split's own name. For folder trees the folder, "." where `root` itself holds the class folders.
        limit: keep this many, stratified.
        seed: of `limit`.
        download: fetch CIFAR-10 or CIFAR-100 if it is missing.

    Raises:
        ValueError: unknown name, role, split or layout; a class without pictures; a limit out of range.
        FileNotFoundError, NotADirectoryError, FileExistsError: a folder or file is missing or in the way.
    """
    _check_name(name)
    if role not in ("train", "val"):
        raise ValueError(f"role {role!r} is unknown: say train or val")
    if download and name not in _DOWNLOADABLE:
        raise ValueError(f"{name} cannot be downloaded by --data.download; only {', '.join(_DOWNLOADABLE)} can")
    default = "test" if role == "val" and name in _DOWNLOADABLE else role
    folder = None if root is None else Path(root).expanduser().resolve()
    source = _OPENERS[name](_Request(name, folder, role, split or default, download))
    return source if limit is None else source.limit(limit, seed)


@dataclass(frozen=True)
class _Request:
    name: str
    root: Path | None
    role: Role
    split: str
    download: bool


def _open_tree_source(request: _Request) -> Source:
    folder = _split_folder(request)
    classes = list_folders(folder)
    if not classes:
        raise ValueError(f"{request.name}: {folder} has no class folders: put pictures in {folder}/<class>/")
    tree = open_tree(folder, classes)
    return _source(request, classes, tree.labels, files=tree.files)


def _open_tinyimagenet(request: _Request) -> Source:
    """The published layout, train/<wnid>/images and val/images with val_annotations.txt, or class folders for both."""
    folder = _split_folder(request)
    if request.role == "train":
        return _open_tree_source(request)
    train = folder.parent / "train"
    if not train.is_dir():
        raise FileNotFoundError(f"{request.name}: {train} is missing; its folders are the classes of {request.split}")
    classes = list_folders(train)
    annotations = folder / "val_annotations.txt"
    # Converters leave val_annotations.txt where it is, and often an empty images folder.
    folders = tuple(name for name in list_folders(folder) if name != "images")
    if not folders and annotations.is_file():
        files, labels = _read_annotations(annotations, classes)
        return _source(request, classes, labels, files=files)
    if not folders:
        raise ValueError(
            f"{request.name}: {folder} has neither class folders nor val_annotations.txt "
            f"(the published test split has no labels): say --data.val_split val"
        )
    tree = open_tree(folder, folders)
    source = _source(request, folders, tree.labels, files=tree.files)
    check_same_classes(replace(source, split="train", classes=classes), source)
    return source


def _read_annotations(path: Path, classes: tuple[str, ...]) -> tuple[FileList, np.ndarray]:
    """Lines of `picture <tab> wnid <tab> box`, in their order -> files, labels int64 [N]."""
    folder = path.parent / "images"
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is there, but {folder} is not: unpack the data set again")
    present, label_of = set(list_pictures(folder)), {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        picture, wnid = _read_annotation(line, f"{path} line {number}")
        if wnid not in label_of:
            raise ValueError(f"{path} line {number}: class {wnid!r} has no folder in train")
        if picture not in present:
            raise FileNotFoundError(f"{path} line {number}: {picture!r} is not in {folder}, or listed twice")
        present.remove(picture)
        paths.append(f"{folder}/{picture}")
        labels.append(label_of[wnid])
    if not paths:
        raise ValueError(f"{path} lists no picture: unpack the data set again")
    return FileList.from_paths(paths, path.parent), np.array(labels, np.int64)


def _read_annotation(line: str, where: str) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) < 2:
        raise ValueError(f"{where}: {line!r} is not 'picture <tab> class <tab> box'")
    return fields[0], fields[1]


def _open_cifar(request: _Request) -> Source:
    root = _given_root(request)
    if not request.download:
        _check_folder(request, root)
    data = read_cifar(request.name, root, request.split, download=request.download)
    return _source(request, data.classes, data.labels, arrays=data.images)


def _open_records(request: _Request) -> Source:
    """What `dalikd prepare` has written. The statistics are those of the data set that it was made from."""
    folder = _split_folder(request)
    records = Records(folder, cast(ContainerFormat, request.name))
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


def _open_digits(request: _Request) -> Source:
    from dalikd.pipelines.digits import SPLIT_SIZES, prepare_digits

    folder = prepare_digits(request.root)
    source = _open_tree_source(replace(request, root=folder))
    expected = SPLIT_SIZES.get(request.split)
    if expected is not None and len(source) != expected:
        raise ValueError(
            f"digits: {folder / request.split} has {len(source)} pictures instead of {expected}: "
            f"remove {folder} to have it written again"
        )
    return source


def _source(
    request: _Request,
    classes: tuple[str, ...],
    labels: np.ndarray,
    *,
    files: FileList | None = None,
    arrays: np.ndarray | None = None,
) -> Source:
    statistics = _STATISTICS[request.name]
    return Source(
        name=request.name,
        split=request.split,
        classes=classes,
        labels=labels,
        mean=statistics.mean,
        std=statistics.std,
        image_size=statistics.image_size,
        files=files,
        arrays=arrays,
    )


def _given_root(request: _Request) -> Path:
    if request.root is None:
        raise ValueError(f"{request.name} needs a folder: say --data.root FOLDER")
    return request.root


def _check_folder(request: _Request, folder: Path) -> None:
    if not folder.exists():
        advice = ", or --data.download true to fetch it" if request.name in _DOWNLOADABLE else ""
        raise FileNotFoundError(f"{request.name}: {folder} does not exist: check --data.root{advice}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{request.name}: {folder} is not a folder: check --data.root")


def _split_folder(request: _Request) -> Path:
    root = _given_root(request)
    _check_folder(request, root)
    folder = (root / request.split).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{request.name}: {root} has no folder {request.split!r}; {_advice(request, root)}")
    return folder


def _advice(request: _Request, root: Path) -> str:
    """What to say instead of a split that is missing."""
    folders = list_folders(root)
    if not folders:
        return "it has no folders at all: check --data.root"
    usual = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}[request.role]
    likely = [name for name in usual if name in folders]
    option = f"--data.{request.role}_split"
    if likely:
        return f"it has {_some(folders)}: say {option} {likely[0]}"
    return f"it has {_some(folders)}: name one with {option}, or say {option} . if these are the classes"


def _some(names: tuple[str, ...] | list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _check_name(name: str) -> None:
    if name not in _OPENERS:
        close = get_close_matches(name, SOURCE_NAMES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"data set {name!r} is unknown: {hint}say one of {', '.join(SOURCE_NAMES)}")


# Not the data's own, but what ImageNet models have been trained with ever since.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_STATISTICS = {
    "imagefolder": Statistics(_IMAGENET_MEAN, _IMAGENET_STD, 224),
    "imagenet": Statistics(_IMAGENET_MEAN, _IMAGENET_STD, 224),
    "tinyimagenet": Statistics(_IMAGENET_MEAN, _IMAGENET_STD, 64),
    # CIFAR-10: over all pixels of the 50,000 training images, as most published CIFAR-10 recipes use them.
    "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32),
    # CIFAR-100: the same computation; the values of the CRD protocol (Tian et al., ICLR 2020).
    "cifar100": Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32),
    # digits: over all pixels of the 1,347 training JPEGs; grey, so the channels are equal.
    "digits": Statistics((0.3092, 0.3092, 0.3092), (0.3479, 0.3479, 0.3479), 32),
}
_DOWNLOADABLE = ("cifar10", "cifar100")
_OPENERS = {
    "imagefolder": _open_tree_source,
    "imagenet": _open_tree_source,
    "tinyimagenet": _open_tinyimagenet,
    "cifar10": _open_cifar,
    "cifar100": _open_cifar,
    "digits": _open_digits,
    "webdataset": _open_records,
    "tfrecord": _open_records,
}
SOURCE_NAMES = tuple(_OPENERS)
