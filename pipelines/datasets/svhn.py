"""SVHN, cropped digits (Netzer et al., 2011), as published: MATLAB files of X, uint8 [32, 32, 3, N], and y, [N, 1]."""

from pathlib import Path
from typing import Any

import numpy as np

from dalikd.pipelines.datasets.published import PublishedSet, from_columns
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec

__all__ = ["SVHN", "find_svhn", "parts_of"]

SVHN = PublishedSet(
    name="svhn",
    title="SVHN",
    splits={
        "train": {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373"},
        "test": {"test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
        "extra": {"extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7"},
    },
)
_CLASSES = tuple("0123456789")
_PARTS = {"train": ("train",), "test": ("test",), "extra": ("extra",), "train+extra": ("train", "extra")}


def parts_of(split: str) -> tuple[str, ...]:
    """The published splits that one is made of.

    Raises:
        ValueError: there is no such split.
    """
    if split not in _PARTS:
        raise ValueError(f"svhn has no split {split!r}: say {', '.join(_PARTS)}")
    return _PARTS[split]


def find_svhn(request: SplitSpec) -> SplitIndex:
    """Read train, test, extra or train+extra into memory: 3 kB an image, and twice that while reading.

    Raises:
        ValueError: another split, or a file that is not in the published format.
        FileNotFoundError: files are missing, and none are to be downloaded.
        ConnectionError: the download failed.
    """
    parts = parts_of(request.split)
    folder = SVHN.locate(request, parts)
    read = [_read_part(folder / file) for part in parts for file in SVHN.splits[part]]
    images, labels = _join([images for images, _ in read]), _join([labels for _, labels in read])
    return SplitIndex(_CLASSES, labels, arrays=images).keep(request.choose(_CLASSES, request.name))


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    """One after the other, without a copy where there is one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> uint8 [N, 32, 32, 3], int64 [N]"""
    content = _load(path)
    pixels, numbers = content.get("X"), content.get("y")
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[:3] != (32, 32, 3)
        or pixels.ndim != 4
    ):
        raise ValueError(f"{path}: X is not an array of 32 x 32 x 3 bytes an image; fetch the file again")
    images = from_columns(pixels.transpose(3, 2, 1, 0))
    if not isinstance(numbers, np.ndarray) or not _are_numbers(numbers, len(images)):
        raise ValueError(f"{path}: y is not {len(images)} labels in 1..10; fetch the file again")
    return images, numbers.reshape(-1).astype(np.int64) % 10  # 10 stands for the digit 0


def _are_numbers(values: np.ndarray, count: int) -> bool:
    if values.dtype.kind not in "ui" or values.size != count or count == 0:
        return False
    return bool(values.min() >= 1 and values.max() <= 10)


def _load(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # a damaged file can raise almost anything, OSError without a number too
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is not a file of the published data set: {error}; fetch it again") from None
