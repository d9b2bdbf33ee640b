"""CIFAR-10 and CIFAR-100 as published (Krizhevsky, 2009): Python pickles, read without running a pickle's code.

Unpickling may call anything a file names. Here a name is looked up in a table of four stand-ins, which can hold an
array's bytes and nothing else; every other name is an error.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalikd.pipelines.manifest import build_once

__all__ = ["CifarSplit", "read_cifar"]


class CifarSplit(NamedTuple):
    """`images` uint8 [N, 32, 32, 3] (RGB), `labels` int64 [N], `classes` in the data set's own order."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """Where one of the two data sets keeps what."""

    title: str
    folder: str
    splits: dict[str, tuple[str, ...]]
    meta: str
    labels_key: str
    classes_key: str

    @property
    def files(self) -> list[str]:
        return [name for names in self.splits.values() for name in names] + [self.meta]


_LAYOUTS = {
    "cifar10": _Layout(
        title="CIFAR10",
        folder="cifar-10-batches-py",
        splits={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        labels_key="labels",
        classes_key="label_names",
    ),
    "cifar100": _Layout(
        title="CIFAR100",
        folder="cifar-100-python",
        splits={"train": ("train",), "test": ("test",)},
        meta="meta",
        labels_key="fine_labels",
        classes_key="fine_label_names",
    ),
}


def read_cifar(name: str, root: Path, split: str, *, download: bool = False) -> CifarSplit:
    """Read one split into memory.

    Args:
        name: "cifar10" or "cifar100" (its 100 fine classes).
        root: the folder of the published files, or the folder above it.
        split: "train" or "test".
        download: fetch the data set where it is missing.

    Raises:
        ValueError: another split, or a file that is not in the published format.
        FileNotFoundError: files are missing and `download` is off.
        FileExistsError: files are missing from a folder that is there already and `download` is on.
    """
    layout = _LAYOUTS[name]
    if split not in layout.splits:
        raise ValueError(f"{name} has no split {split!r}: say train or test")
    folder = _locate(name, layout, root, download)
    classes = _read_classes(folder / layout.meta, layout.classes_key)
    parts = [_read_batch(folder / file, layout.labels_key, len(classes)) for file in layout.splits[split]]
    rows = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    # A row holds 1024 red, 1024 green, then 1024 blue values.
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return CifarSplit(images, labels, classes)


def _locate(name: str, layout: _Layout, root: Path, download: bool) -> Path:
    folder = root if (root / layout.meta).is_file() or root.name == layout.folder else root / layout.folder
    missing = _missing(layout, folder)
    if missing and download:
        _download(layout, folder)
        missing = _missing(layout, folder)
    if missing:
        raise FileNotFoundError(
            f"{name}: {folder} lacks {', '.join(missing)}: put the published Python version there, "
            f"give the folder that holds {layout.folder} as --data.root, or say --data.download true"
        )
    return folder


def _missing(layout: _Layout, folder: Path) -> list[str]:
    return [name for name in layout.files if not (folder / name).is_file()]


def _download(layout: _Layout, folder: Path) -> None:
    """Fetch with torchvision, which checks the files' MD5, and move the folder into place whole."""

    def fetch(made: Path) -> None:
        from torchvision import datasets

        getattr(datasets, layout.title)(made.parent, download=True)

    try:
        build_once(folder, fetch)
    except FileExistsError:
        missing = ", ".join(_missing(layout, folder))
        if missing:  # else another process has just put it there
            raise FileExistsError(f"{folder} is incomplete (no {missing}): remove it to download it again") from None


def _read_classes(path: Path, key: str) -> tuple[str, ...]:
    names = _field(_load(path), key, path)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{path}: {key} is not a list of names; fetch the data set again")
    return tuple(name.decode() if isinstance(name, bytes) else name for name in names)


def _read_batch(path: Path, labels_key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """-> uint8 [N, 3072], int64 [N]"""
    entry = _load(path)
    rows, labels = _field(entry, "data", path), _field(entry, labels_key, path)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072:
        raise ValueError(f"{path}: data is not an array of 3072 bytes an image; fetch the data set again")
    if not _are_labels(labels, len(rows), num_classes):
        raise ValueError(f"{path}: {labels_key} is not {len(rows)} labels in 0..{num_classes - 1}; fetch it again")
    return rows, np.asarray(labels, np.int64)


def _are_labels(labels: object, count: int, num_classes: int) -> bool:
    """A list of ints (in range), one an image."""
    if not isinstance(labels, list) or len(labels) != count:
        return False
    return all(type(label) is int and 0 <= label < num_classes for label in labels)


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
