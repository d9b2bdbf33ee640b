"""STL-10 (Coates et al., 2011) as published: bytes of 96 x 96 pictures, column after column, channel after channel."""

from pathlib import Path

import numpy as np

from dalikd.pipelines.datasets.published import PublishedSet, from_columns
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec

__all__ = ["STL10", "find_stl10"]

_SIDE = 96
_PICTURE = 3 * _SIDE * _SIDE  # bytes
_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

STL10 = PublishedSet(
    name="stl10",
    title="STL10",
    splits={
        "train": {
            "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
            "train_y.bin": "5a34089d4802c674881badbb80307741",
        },
        "test": {
            "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
            "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
        },
    },
    archive="stl10_binary",
)


def find_stl10(request: SplitSpec) -> SplitIndex:
    """Read train or test into memory, 28 kB an image.

    Raises:
        ValueError: another split, or a file that is not in the published format.
        FileNotFoundError: files are missing, and none are to be downloaded.
        FileExistsError: files are missing from a folder that is there already, and are to be downloaded.
        ConnectionError: the download failed.
    """
    if "unlabeled" in request.split:
        raise ValueError(f"stl10's split {request.split} has pictures without labels: say train or test")
    if request.split not in STL10.splits:
        raise ValueError(f"stl10 has no split {request.split!r}: say train or test")
    folder = STL10.locate(request, [request.split])
    images_file, labels_file = STL10.splits[request.split]
    images = _read_images(folder / images_file)
    labels = _read_labels(folder / labels_file, len(images))
    return SplitIndex(_CLASSES, labels, arrays=images).keep(request.choose(_CLASSES, request.name))


def _read_images(path: Path) -> np.ndarray:
    """-> uint8 [N, 96, 96, 3]"""
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % _PICTURE:
        raise ValueError(f"{path}: {content.size} bytes are not pictures of {_PICTURE} bytes each; fetch it again")
    return from_columns(content.reshape(-1, 3, _SIDE, _SIDE))


def _read_labels(path: Path, count: int) -> np.ndarray:
    """-> int64 [N]"""
    numbers = np.fromfile(path, np.uint8)
    if numbers.size != count or numbers.min() < 1 or numbers.max() > len(_CLASSES):
        raise ValueError(f"{path}: not {count} labels in 1..{len(_CLASSES)}; fetch the file again")
    return numbers.astype(np.int64) - 1
