"""Data sets of a few published files, read into memory: CIFAR-10 and -100, SVHN (cropped digits), STL-10.

Which files there are, their checksums, their download, and the readers of SVHN and STL-10 are torchvision's. CIFAR's
(Krizhevsky, 2009) are Python pickles, and unpickling may call anything that a file names. Here a name is looked up in a
table of four stand-ins, which can hold an array's bytes and nothing else; every other name is an error.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dalikd.pipelines.datasets.info import Finding
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec
from dalikd.pipelines.files import build_once, file_digest, new_folder

__all__ = ["PUBLISHED_FILES", "PublishedSet", "find_arrays", "published_set"]

#: The data sets by name, with the name that torchvision's class has.
PUBLISHED_FILES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}
_CIFAR_LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
_CLASSES = {
    "svhn": tuple("0123456789"),
    "stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
}


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """The files of a data set.

    Attributes:
        name: the data set's.
        reader: torchvision's class, which downloads it.
        splits: file -> MD5 for every split.
        common: the same, of what every split needs.
        archive: folder that the published archive makes; the files come all together or not at all. Empty: each file is
            published by itself, and lies in the root.
    """

    name: str
    reader: Any
    splits: Mapping[str, Mapping[str, str]]
    common: Mapping[str, str] = field(default_factory=dict)
    archive: str = ""

    @property
    def files(self) -> dict[str, str]:
        """All files that are read here, with their MD5."""
        return {file: md5 for files in (*self.splits.values(), self.common) for file, md5 in files.items()}

    @property
    def remedy(self) -> str:
        """What to do about files that are damaged."""
        broken = f"the folder {self.archive} if it is there" if self.archive else "what is damaged"
        return f"remove {broken}, and give --data.download true"

    def folder(self, root: Path) -> Path:
        """Where the files lie: the root itself if it holds one of them, else the archive's folder in it."""
        if root.name == self.archive or any((root / file).is_file() for file in self.files):
            return root
        return root / self.archive

    def parts(self, split: str) -> list[str]:
        """The published splits that one is made of.

        Raises:
            ValueError: there is no such split.
        """
        known = {part: [part] for part in self.splits}
        if "extra" in known:
            known["train+extra"] = ["train", "extra"]
        if split not in known:
            raise ValueError(f"{self.name} has no split {split!r}: give one of {', '.join(known)}")
        return known[split]

    def locate(self, spec: SplitSpec, parts: Sequence[str]) -> Path:
        """The folder that holds all that some published splits need; downloads it if that is asked for.

        Raises:
            ValueError: no root was given.
            FileNotFoundError, NotADirectoryError: a file or folder is missing, or the root is none.
            FileExistsError: a part of an archive is missing, so that it cannot be downloaded into its folder.
            ConnectionError: the download failed.
        """
        folder = self.folder(spec.given_root() if spec.download else spec.check_root())
        if spec.download and self._missing(folder, parts):
            self._download(folder, parts)
        missing = ", ".join(self._missing(folder, parts))
        if missing:
            where = f", give the folder that holds {self.archive} as --data.root" if self.archive else ""
            raise FileNotFoundError(
                f"{self.name}: {folder} lacks {missing}: put the published files there{where}, "
                "or give --data.download true"
            )
        return folder

    def verify(self, root: Path, splits: Sequence[str]) -> Iterator[Finding]:
        """Compare what some splits need, and whatever else is there, with the published MD5, file after file, about
        0.5 GB a second.

        Raises:
            ValueError: there is no such split.
        """
        needed = self._needed([part for split in splits for part in self.parts(split)])
        folder = self.folder(root)
        for file, md5 in self.files.items():
            path = folder / file
            if path.is_file():
                found = file_digest(path, "md5")
                detail = "" if found == md5 else f"its MD5 is {found}, published {md5}"
                yield Finding(str(path), "damaged" if detail else "whole", detail)
            elif file in needed:
                yield Finding(str(path), "missing")

    def _needed(self, parts: Sequence[str]) -> list[str]:
        return list(self.files) if self.archive else [file for part in parts for file in self.splits[part]]

    def _missing(self, folder: Path, parts: Sequence[str]) -> list[str]:
        return [file for file in self._needed(parts) if not (folder / file).is_file()]

    def _download(self, folder: Path, parts: Sequence[str]) -> None:
        """Fetch with torchvision, which checks MD5, and move the archive's folder, or each file, into place whole."""
        try:
            if self.archive:
                build_once(folder, lambda made: self.reader(made.parent, download=True))
                return
            for part in parts:
                if self._missing(folder, [part]):
                    with new_folder(folder, self.name) as scratch:
                        self.reader(scratch, split=part, download=True)
                        for file in self.splits[part]:
                            (scratch / file).replace(folder / file)
        except FileExistsError:
            missing = ", ".join(self._missing(folder, parts))
            if missing:  # else another process has just put it there
                raise FileExistsError(
                    f"{folder} is incomplete (no {missing}): remove it to download it again"
                ) from None
        except (OSError, RuntimeError) as error:  # of the network; a checksum that differs
            raise ConnectionError(
                f"{self.name} could not be downloaded ({error}): try again, or put the published files into {folder}"
            ) from error


def published_set(name: str) -> PublishedSet:
    """The files of one of PUBLISHED_FILES, as torchvision lists them."""
    from torchvision import datasets

    reader: Any = getattr(datasets, PUBLISHED_FILES[name])
    if name == "svhn":
        files = {split: {file: md5} for split, (_, file, md5) in reader.split_list.items()}
        return PublishedSet(name=name, reader=reader, splits=files)
    lists = {"train": reader.train_list, "test": reader.test_list}
    # STL-10's images without labels are of no use here
    splits = {split: {file: md5 for file, md5 in files if file != "unlabeled_X.bin"} for split, files in lists.items()}
    common: dict[str, str] = {reader.meta["filename"]: reader.meta["md5"]} if name in _CIFAR_LABELS else {}
    return PublishedSet(name=name, reader=reader, splits=splits, common=common, archive=reader.base_folder)


def find_arrays(spec: SplitSpec) -> SplitIndex:
    """Read one split into memory; CIFAR-100 with its 100 fine classes.

    Raises:
        ValueError: there is no such split, or a file is not in the published format.
        FileNotFoundError: files are missing, and none are to be downloaded.
        FileExistsError: files are missing from a folder that is there already, and are to be downloaded.
        ConnectionError: the download failed.
    """
    published = published_set(spec.name)
    if spec.name == "stl10" and "unlabeled" in spec.split:
        raise ValueError(f"stl10's split {spec.split} has images without labels: give train or test")
    parts = published.parts(spec.split)
    folder = published.locate(spec, parts)
    if spec.name in _CIFAR_LABELS:
        classes = _read_classes(folder / published.reader.meta["filename"], published.reader.meta["key"])
        files = published.splits[spec.split]
        read = [_read_batch(folder / file, _CIFAR_LABELS[spec.name], len(classes)) for file in files]
    else:
        classes = _CLASSES[spec.name]
        read = [_read_by_torchvision(published, folder, part) for part in parts]
    images, labels = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in zip(*read, strict=True))
    return SplitIndex(classes, labels, arrays=images).keep(spec.choose(classes, spec.name))


def _by_pixels(images: np.ndarray) -> np.ndarray:
    """[N, 3, H, W] -> [N, H, W, 3] in memory of its own; by channel, which is five times as fast."""
    count, channels, height, width = images.shape
    pixels = np.empty((count, height, width, channels), images.dtype)
    for channel in range(channels):
        pixels[..., channel] = images[:, channel]
    return pixels


def _read_by_torchvision(published: PublishedSet, folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """-> uint8 [N, S, S, 3], int64 [N]; 3 kB an image of SVHN, 28 kB of STL-10, and twice that while reading.

    Without its check of every file's MD5, among them 2.6 GB of STL-10 that nobody reads: `PublishedSet.verify` does it.
    """
    whole = {"base_folder": "", "_check_integrity": lambda self: True}  # noqa: ARG005 - a method
    path, side = folder / next(iter(published.splits[part])), {"svhn": 32, "stl10": 96}[published.name]
    try:
        read = type("_Unchecked", (published.reader,), whole)(folder, split=part)
        images, labels = np.asarray(read.data), np.asarray(read.labels).astype(np.int64).reshape(-1)
    except Exception as error:  # a damaged file can raise almost anything, OSError without a number too
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is not a file of the published data set: {error}; fetch it again") from None
    if images.dtype != np.uint8 or images.shape[1:] != (3, side, side) or not len(images):
        raise ValueError(f"{path} does not hold images of {side} x {side} x 3 bytes; fetch it again")
    if len(labels) != len(images) or labels.min() < 0 or labels.max() > 9:
        file = folder / list(published.splits[part])[-1]
        raise ValueError(f"{file} does not hold {len(images)} labels in 1..10; fetch it again")
    return _by_pixels(images), labels


# ----------------------------------------------------------------------------------------- CIFAR's pickles


def _read_classes(path: Path, key: str) -> tuple[str, ...]:
    names = _field(_load(path), key, path)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{path}: {key} is not a list of names; fetch the data set again")
    return tuple(name.decode() if isinstance(name, bytes) else name for name in names)


def _read_batch(path: Path, labels_key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """-> uint8 [N, 32, 32, 3], int64 [N]"""
    entry = _load(path)
    rows, labels = _field(entry, "data", path), _field(entry, labels_key, path)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072:
        raise ValueError(f"{path}: data is not an array of 3072 bytes an image; fetch the data set again")
    if (
        not isinstance(labels, list)
        or len(labels) != len(rows)
        or not all(type(label) is int and 0 <= label < num_classes for label in labels)
    ):
        raise ValueError(f"{path}: {labels_key} is not {len(rows)} labels in 0..{num_classes - 1}; fetch it again")
    # a row holds 1024 red, 1024 green, then 1024 blue values
    return _by_pixels(rows.reshape(-1, 3, 32, 32)), np.asarray(labels, np.int64)


def _field(entry: dict[str, object], key: str, path: Path) -> object:
    if key not in entry:
        raise ValueError(f"{path} has no {key!r}, only {', '.join(sorted(entry)) or 'nothing'}; fetch it again")
    return entry[key]


def _load(path: Path) -> dict[str, object]:
    """The dictionary in a file, arrays unwrapped. Strings of Python 2 come as bytes."""
    try:
        with path.open("rb") as file:
            entry = _ArrayUnpickler(file, encoding="bytes").load()
        pairs = [(key.decode() if isinstance(key, bytes) else str(key), value) for key, value in entry.items()]
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path} is not a file of the published data set: {error}; fetch it again") from None
    return {key: value.values if isinstance(value, _PickledArray) else value for key, value in pairs}


class _PickledArray:
    """Stands for numpy's `_reconstruct` and `ndarray`: takes an array's state and keeps its bytes as uint8."""

    def __init__(self, *_arguments: object) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, Sequence[int], object, bool, bytes]) -> None:
        _version, shape, _dtype, fortran, content = state
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _PickledType:
    """Stands for `numpy.dtype`: unsigned bytes only."""

    def __init__(self, code: bytes | str, *_arguments: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of {code!r} instead of bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: nothing that matters for single bytes."""


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, by which Python 3 writes bytes in the old protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds byte arrays, containers, strings and numbers."""

    stand_ins = {  # noqa: RUF012 (never written)
        "numpy.core.multiarray._reconstruct": _PickledArray,
        "numpy._core.multiarray._reconstruct": _PickledArray,
        "numpy.ndarray": _PickledArray,
        "numpy.dtype": _PickledType,
        "_codecs.encode": _encode,
    }

    def find_class(self, module: str, name: str) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raises: pickle.UnpicklingError for every name outside the table."""
        if f"{module}.{name}" not in self.stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data has no need of")
        return self.stand_ins[f"{module}.{name}"]
