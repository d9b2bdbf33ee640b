"""The pictures a benchmark reads: what they are, whether they lie in the page cache, and more of them.

python -m dalikd.tools.bench.images PHOTOS MANY --count 200000     copies photos under new names, for a set that
                                                                   exceeds the page cache
"""

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dalikd.pipelines.datasets.file_list import IMAGE_EXTENSIONS
from dalikd.pipelines.sources import Source

__all__ = [
    "bring_into_page_cache",
    "cached_share",
    "describe",
    "draw_pictures",
    "drop_from_page_cache",
    "main",
    "picture_paths",
    "repeat_pictures",
    "sample_rows",
]

_READ_AT_ONCE = 1 << 24  # bytes


def describe(source: Source, sample: int = 500, seed: int = 0) -> dict[str, Any]:
    """What the pictures of a source are like, from a sample of their headers.

    Args:
        source: the pictures.
        sample: how many are looked at.
        seed: of the sample.

    Returns:
        number, sampled, `width` and `height` in pixels, and for files `encoded_bytes`, each {"mean", "median", "p95"}.
    """
    found: dict[str, Any] = {"name": source.name, "split": source.split, "number": len(source)}
    if source.files is None:
        assert source.arrays is not None
        height, width = source.arrays.shape[1:3]
        return {**found, "sampled": len(source), "width": _spread([width]), "height": _spread([height])}
    paths = [source.path(int(row)) for row in sample_rows(len(source), sample, seed)]
    widths, heights = zip(*map(_side_lengths, paths), strict=True)
    sizes = [Path(path).stat().st_size for path in paths]
    sides = {"width": _spread(widths), "height": _spread(heights)}
    return {**found, "sampled": len(paths), **sides, "encoded_bytes": _spread(sizes)}


def sample_rows(size: int, count: int, seed: int = 0) -> np.ndarray:
    """Rows of a random sample without repetition, ascending: int64 [min(count, size)]."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:count])


def picture_paths(folder: Path) -> list[Path]:
    """All pictures below a folder, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())


def bring_into_page_cache(paths: Iterable[str | Path]) -> None:
    """Read the files, as far as half of the free memory holds them."""
    left = psutil.virtual_memory().available // 2
    for path in paths:
        left -= Path(path).stat().st_size
        if left < 0:
            return
        with Path(path).open("rb", buffering=0) as file:
            while file.read(_READ_AT_ONCE):
                pass


def drop_from_page_cache(paths: Iterable[str | Path]) -> None:
    """Make the kernel forget the files' content, so that the next read comes from the disk. No root is needed."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # what is not yet written stays
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def cached_share(paths: Iterable[str | Path]) -> float:
    """The share, 0 to 1, of the files' pages that lie in the page cache.

    Some kernels and file systems do not tell and call every page cached: then the answer is 1.
    """
    pages = cached = 0
    for path in paths:
        if Path(path).stat().st_size:
            found = _resident_pages(Path(path))
            pages, cached = pages + len(found), cached + int((found & 1).sum())
    return cached / pages if pages else 0.0


def draw_pictures(folder: Path, count: int, width: int, height: int, classes: int = 10) -> None:
    """Write class folders of JPEGs with what photographs have for a decoder: slow gradients, hard edges, grain."""
    from PIL import Image

    random = np.random.default_rng(0)
    grain = random.normal(0, 6, (height, width, 1))
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + grain
        top, left = random.integers(0, (height // 2, width // 2))
        pixels[top : top + height // 3, left : left + width // 3] += random.integers(-90, 90, 3)
        path = folder / f"class{number % classes}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def repeat_pictures(folder: Path, target: Path, *, count: int | None = None, size: int | None = None) -> int:
    """Copy the pictures of class folders under new names, again and again: real bytes, no links.

    For sets larger than the page cache. `target` gets the same class folders.

    Args:
        folder: class folders with pictures.
        target: a folder that does not exist, or is empty.
        count: pictures wanted.
        size: bytes wanted, in place of `count`.

    Returns:
        how many were written.

    Raises:
        ValueError: there are no pictures, neither or both of count and size are given, or the disk is too small.
        FileExistsError: the target holds something.
    """
    if (count is None) == (size is None):
        raise ValueError("repeat_pictures: say either how many pictures or how many bytes")
    paths = picture_paths(folder)
    if not paths:
        raise ValueError(f"{folder} holds no pictures: name a folder of class folders with pictures")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name another folder")
    _check_space(paths, target, count, size)
    number = written = 0
    while number < (count or 0) or written < (size or 0):
        source = paths[number % len(paths)]
        copy = target / source.relative_to(folder).with_stem(f"{source.stem}-{number // len(paths)}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        number, written = number + 1, written + copy.stat().st_size
    return number


def _check_space(paths: Sequence[Path], target: Path, count: int | None, size: int | None) -> None:
    mean = sum(path.stat().st_size for path in paths) / len(paths)
    needed = mean * count if count is not None else size or 0
    free = shutil.disk_usage(next(folder for folder in target.absolute().parents if folder.exists())).free
    if needed > 0.9 * free:
        raise ValueError(f"{target} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB: say fewer pictures")


def _side_lengths(path: str) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:  # reads the header alone
        return picture.size


def _spread(numbers: Sequence[int]) -> dict[str, float]:
    values = np.asarray(numbers, np.float64)
    return {"mean": float(values.mean()), "median": float(np.median(values)), "p95": float(np.quantile(values, 0.95))}


def _resident_pages(path: Path) -> np.ndarray:
    """uint8 [pages]: bit 0 is set where a page lies in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        pages = np.zeros(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
        start = ctypes.c_char.from_buffer(mapping)  # ACCESS_COPY, as this asks for a writable buffer
        arguments = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapping)), pages.ctypes
        failed = ctypes.CDLL(None, use_errno=True).mincore(*arguments)
        del start  # an exported pointer keeps the mapping from closing
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore cannot tell what of {path} is cached")
    return pages


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `repeat_pictures`."""
    from dalikd.tools.cli import run_function

    run_function("bench images", repeat_pictures, argv, positional=True)


if __name__ == "__main__":
    main()
