"""Data sets of a few published files, read into memory: CIFAR-10 and -100, SVHN (cropped digits), STL-10.

Which files there are, their checksums and their download are torchvision's. They are read here, because a file that
was made to do harm must not: SVHN's (Netzer et al., 2011) are deflated, and a small one may hold any number of zeros;
CIFAR's (Krizhevsky, 2009) are Python pickles, and unpickling may call anything that a file names. Here a name is looked
up in a table of four stand-ins, which can hold an array's bytes and nothing else; every other name is an error, and so
is every operation that data has no need of.
"""

import io
import pickle
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dalikd.pipelines.datasets.info import DATASET_INFO, Finding
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec
from dalikd.pipelines.files import build_once, file_digest, new_folder

__all__ = ["PUBLISHED_FILES", "PublishedSet", "find_arrays", "published_set"]

#: The data sets by name, with the name that torchvision's class has.
PUBLISHED_FILES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}
_LARGEST_PICKLE = 256 << 20  # bytes; CIFAR-100's training images take 155 million
_MOST_PIECES = 2_000_000  # of a pickle; CIFAR-100's training images take 0.6 million
_Unpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
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
        read = [_read_images(published, folder, part) for part in parts]
    images, labels = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in zip(*read, strict=True))
    return SplitIndex(classes, labels, arrays=images).keep(spec.choose(classes, spec.name))


def _by_pixels(images: np.ndarray) -> np.ndarray:
    """[N, 3, H, W] -> [N, H, W, 3] in memory of its own; by channel, which is five times as fast."""
    count, channels, height, width = images.shape
    pixels = np.empty((count, height, width, channels), images.dtype)
    for channel in range(channels):
        pixels[..., channel] = images[:, channel]
    return pixels


def _read_images(published: PublishedSet, folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """SVHN or STL-10 -> uint8 [N, S, S, 3], int64 [N]; 3 kB an image of SVHN, 28 kB of STL-10, and twice that while
    reading. No more images than were published."""
    files, most = [folder / file for file in published.splits[part]], DATASET_INFO[published.name].images[part]
    read, side = (_read_mat, 32) if published.name == "svhn" else (_read_bins, 96)
    try:
        images, labels = read(files, most)
    except OSError:
        raise
    except Exception as error:  # numbers in a damaged file may lead anywhere
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{files[0]} is not a file of the published data set: {reason}; fetch it again") from None
    if images.dtype != np.uint8 or images.shape[1:] != (3, side, side) or not len(images):
        raise ValueError(f"{files[0]} does not hold images of {side} x {side} x 3 bytes; fetch it again")
    if len(labels) != len(images) or not np.isin(labels, np.arange(1, 11)).all():
        raise ValueError(f"{files[-1]} does not hold {len(images)} labels in 1..10; fetch it again")
    labels = labels.astype(np.int64)
    return _by_pixels(images), labels % 10 if published.name == "svhn" else labels - 1  # SVHN's class 10 is the digit 0


def _read_bins(files: Sequence[Path], most: int) -> tuple[np.ndarray, np.ndarray]:
    """STL-10: bytes of images, column after column, and a byte for each label."""
    sizes = [path.stat().st_size for path in files]
    if sizes[0] > most * 3 * 96 * 96 or sizes[1] > most:
        raise ValueError(f"it has {sizes[0]} bytes, more than {most} images")
    pixels, labels = (np.fromfile(path, np.uint8) for path in files)
    return pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2), labels


# --------------------------------------------------------------------------------------- SVHN's MATLAB files

_MATRIX, _COMPRESSED = 14, 15  # types of an element
_MAT_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_HEADS = 4096  # bytes around the values of an array


def _read_mat(files: Sequence[Path], most: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays X [32, 32, 3, N] and y of a MATLAB 5 file, as uint8 [N, 3, 32, 32] and [N].

    A file is a header of 128 bytes, then elements: type, length, content. One that is an array is often deflated by
    itself; no more of it is inflated than `most` images take.
    """
    content = files[0].read_bytes()
    if content[124:128] != b"\x00\x01IM":
        raise ValueError("it is no MATLAB 5 file")
    found: dict[str, np.ndarray] = {}
    for kind, element in _mat_elements(memoryview(content)[128:], aligned=False):
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()
            element = memoryview(stream.decompress(element, most * 3 * 32 * 32 + _HEADS))
            if not stream.eof:
                raise ValueError(f"it ends too early, or has more than {most} images")
            [(kind, element)] = _mat_elements(element)
        if kind != _MATRIX:
            raise ValueError("it has something else than arrays")
        _, (_, sides), (_, name), (kind, values) = _mat_elements(element)
        if bytes(name) not in (b"X", b"y") or bytes(name).decode() in found:
            raise ValueError(f"it has an array {bytes(name[:20])!r} too many")
        shape = np.frombuffer(sides, "<i4").tolist()
        if min(shape) < 0:
            raise ValueError(f"an array of {shape}")
        found[bytes(name).decode()] = np.frombuffer(values, _MAT_TYPES[kind]).reshape(shape, order="F")
    missing = [name for name in ("X", "y") if name not in found]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing")
    return found["X"].transpose(3, 2, 0, 1), found["y"].reshape(-1)


def _mat_elements(content: memoryview, *, aligned: bool = True) -> Iterator[tuple[int, memoryview]]:
    """Type and content of elements; those in others begin at multiples of eight bytes."""
    place = 0
    while place < len(content):
        kind, size = struct.unpack_from("<II", content, place)
        start = place + 8
        if kind >> 16:  # up to four bytes, in the place of their length
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
        if start + size > len(content):
            raise ValueError("it ends too early")
        yield kind, content[start : start + size]
        place = max(place + 8, start + size)
        place += -place % 8 if aligned else 0


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
    if path.stat().st_size > _LARGEST_PICKLE:
        raise ValueError(f"{path} is larger than any file of the published data set; fetch it again")
    content = path.read_bytes()
    try:
        entry: Any = _ArrayUnpickler(content).load()
        pairs = [(key.decode() if isinstance(key, bytes) else key, value) for key, value in entry.items()]
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a file of the published data set: {reason}; fetch it again") from None
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


class _Entry(dict[bytes | str, object]):
    """A dictionary whose keys are names: the hash of tuples in tuples, deep enough, overflows the stack."""

    def __setitem__(self, key: bytes | str, value: object) -> None:
        if not isinstance(key, bytes | str):
            raise pickle.UnpicklingError(f"a key that is a {type(key).__name__}")
        super().__setitem__(key, value)


class _CountedBytes(io.BytesIO):
    """A pickle, which gives so many pieces: each operation takes one, and may make an object of 100 bytes."""

    left = _MOST_PIECES

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"more than {_MOST_PIECES} parts")
        return super().read(size)


class _Operations(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it has the operation {code}, which data has no need of")


def _operations() -> _Operations:
    """Those of pickle's that make containers, strings, numbers and calls, by their code."""
    names = (
        *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    )
    codes = [getattr(pickle, name)[0] for name in names]
    return _Operations({code: _Unpickler.dispatch[code] for code in codes})


class _ArrayUnpickler(_Unpickler):
    """Builds byte arrays, containers, strings and numbers; in Python, as the one in C takes any memory it is told to.

    Its memory is in proportion to the file.
    """

    dispatch = _operations()

    def __init__(self, content: bytes) -> None:
        super().__init__(_CountedBytes(content), encoding="bytes")
        self._to_encode = len(content)

    def _encode(self, text: str, encoding: str) -> bytes:
        """Stands for `_codecs.encode`, by which Python 3 writes bytes in the old protocols; each of them once."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
        self._to_encode -= len(text)
        if self._to_encode < 0:
            raise pickle.UnpicklingError("bytes that are encoded again and again")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> object:
        """Raises: pickle.UnpicklingError for every name outside the table."""
        stand_ins = {
            "numpy.core.multiarray._reconstruct": _PickledArray,
            "numpy._core.multiarray._reconstruct": _PickledArray,
            "numpy.ndarray": _PickledArray,
            "numpy.dtype": _PickledType,
            "_codecs.encode": self._encode,
        }
        if f"{module}.{name}" not in stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data has no need of")
        return stand_ins[f"{module}.{name}"]

    def load_empty_dictionary(self) -> None:
        self.append(_Entry())

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _PickledArray | _PickledType):
            raise pickle.UnpicklingError("it sets what is no array")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary
    dispatch[pickle.BUILD[0]] = load_build
