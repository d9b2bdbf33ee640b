"""scikit-learn's handwritten digits as a small tree of JPEGs: a real data set that needs no download.

1797 grey images of 8x8 pixels (Alpaydin and Kaynak, 1998, UCI ML repository), enlarged to 32x32 RGB.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dalikd.pipelines.datasets.classes import stratified_rows
from dalikd.pipelines.datasets.file_list import build_once, cache_folder

__all__ = ["SPLIT_SIZES", "prepare_digits"]

SPLIT_SIZES = {"train": 1347, "val": 450}


def prepare_digits(root: Path | None = None) -> Path:
    """Write the tree if it is not there, and return its folder: `{train,val}/{0..9}/NNNN.jpg`.

    Args:
        root: the tree's folder; by default digits-v1 in the cache folder. The name changes when the files would.

    Raises:
        FileExistsError: `root` is a folder with something else in it.
    """
    folder = cache_folder() / "digits-v1" if root is None else root
    if _is_there(folder):
        return folder
    try:
        build_once(folder, _write_tree)
    except FileExistsError:
        if not _is_there(folder):  # else another process has just put it there
            raise FileExistsError(
                f"digits: {folder} has something else in it than train and val: empty it or name a new --data.root"
            ) from None
    return folder


def _is_there(folder: Path) -> bool:
    return all((folder / split).is_dir() for split in SPLIT_SIZES)


def _write_tree(folder: Path) -> None:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = np.round(data["images"] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0..16 -> 0..255
    labels = data["target"].astype(np.int64)
    is_train = np.zeros(len(labels), dtype=bool)
    is_train[stratified_rows(labels, SPLIT_SIZES["train"], seed=0)] = True
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "train" if is_train[row] else "val"
        _write_image(image, folder / split / str(label) / f"{row:04d}.jpg")


def _write_image(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    enlarged = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    enlarged.convert("RGB").save(path, format="JPEG", quality=95)
