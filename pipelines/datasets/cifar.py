"""CIFAR-10 and CIFAR-100 as published (Krizhevsky, 2009): Python pickles, read without running a pickle's code.

Unpickling may call anything a file names. Here a name is looked up in a table of four stand-ins, which can hold an
array's bytes and nothing else; every other name is an error.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalikd.pipelines.datasets.published import PublishedSet
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec

__all__ = ["CIFAR", "find_cifar"]

#: The two data sets by name.
CIFAR = {
    "cifar10": PublishedSet(
        name="cifar10",
        title="CIFAR10",
        splits={
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        common={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        archive="cifar-10-batches-py",
    ),
    "cifar100": PublishedSet(
        name="cifar100",
        title="CIFAR100",
        splits={
            "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
            "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        },
        common={"meta": "7973b15100ade9c7d40fb424638fde48"},
        archive="cifar-100-python",
    ),
}


@dataclass(frozen=True)
class _Keys:
    """What the two call their labels and class names."""

    labels: str
    classes: str


_KEYS = {
    "cifar10": _Keys(labels="labels", classes="label_names"),
    "cifar100": _Keys(labels="fine_labels", classes="fine_label_names"),
}


def find_cifar(request: SplitSpec) -> SplitIndex:
    """Read one split into memory; CIFAR-100 with its 100 fine classes.

    Raises:
        ValueError: another split than train or test, or a file that is not in the published format.
        FileNotFoundError: files are missing, and none are to be downloaded.
        FileExistsError: files are missing from a folder that is there already, and are to be downloaded.
        ConnectionError: the download failed.
    """
    published, keys = CIFAR[request.name], _KEYS[request.name]
    if request.split not in published.splits:
        raise ValueError(f"{request.name} has no split {request.split!r}: say train or test")
    folder = published.locate(request, [request.split])
    (meta,) = published.common
    classes = _read_classes(folder / meta, keys.classes)
    files = published.splits[request.split]
    parts = [_read_batch(folder / file, keys.labels, len(classes)) for file in files]
    rows = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    # A row holds 1024 red, 1024 green, then 1024 blue values.
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return SplitIndex(classes, labels, arrays=images).keep(request.choose(classes, request.name))


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
