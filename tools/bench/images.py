"""The images a benchmark reads: what they are, where they are stored, whether they lie in the page cache, more of them.

dalikd bench images PHOTOS MANY --count 200000     copies photos under new names, for a set that exceeds the page cache
"""

import ctypes
import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets.file_list import IMAGE_EXTENSIONS
from dalikd.pipelines.draw_spec import Batch, DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter, MixOptions

__all__ = ["STORES", "cached", "describe", "draw_images", "open_store", "own_store", "repeat_images", "stored_files"]

_PUBLISHED_GROUP = 64

#: Where the same images can be read from.
STORES = ("files", "resident", "webdataset", "tfrecord")
_SAMPLE = 500  # files that stand for all
_DECODED_AT_ONCE = 256
_READ_AT_ONCE = 1 << 24  # bytes


def describe(source: Source) -> dict[str, Any] | None:
    """What the images of a source are like, from a sample of their headers; None for those in shards.

    Returns:
        number, sampled, `width` and `height` in pixels, and for files `encoded_bytes`, each {"mean", "median", "p95"}.
    """
    from PIL import Image

    if source.shards is not None:
        return None
    paths: list[str] = []
    found: dict[str, Any] = {}
    if source.arrays is not None:
        found = {"width": [source.arrays.shape[2]], "height": [source.arrays.shape[1]]}
    else:
        paths, sides = [source.path(int(row)) for row in sample_rows(len(source), _SAMPLE)], []
        for path in paths:
            with Image.open(path) as image:  # reads the header alone
                sides.append(image.size)
        found = dict(zip(("width", "height"), zip(*sides, strict=True), strict=True))
        found["encoded_bytes"] = [Path(path).stat().st_size for path in paths]
    spreads = {
        name: {"mean": float(np.mean(of)), "median": float(np.median(of)), "p95": float(np.quantile(of, 0.95))}
        for name, of in found.items()
    }
    number = len(source)
    return {"name": source.name, "split": source.split, "number": number, "sampled": len(paths) or number, **spreads}


def sample_rows(size: int, count: int) -> np.ndarray:
    """Rows of a random sample without repetition, ascending: int64 [min(count, size)]."""
    return np.sort(np.random.default_rng(0).permutation(size)[:count])


# ---------------------------------------------------------------------------------------------------- stores


def own_store(source: Source) -> str:
    """Where a source's images are."""
    if source.files is not None:
        return "files"
    return "resident" if source.shards is None else source.shards.manifest.format


def stored_files(source: Source) -> list[str]:
    """The files that a source's images lie in."""
    if source.files is not None:
        return [source.path(row) for row in range(len(source))]
    return [] if source.shards is None else source.shards.paths


def open_store(store: str, source: Source, view: View, folder: Path) -> Source:
    """The images of a source, read from another of STORES. What has to be written goes into the folder.

    Raises:
        ValueError: the images cannot be had there.
    """
    if store == own_store(source):
        return source
    if store == "files":
        raise ValueError(f"--sources files: the images of {source.name} are no files; leave it out")
    if store != "resident":
        kind = "webdataset" if store == "webdataset" else "tfrecord"
        write_shards(source, folder / store / "train", WriteOptions(format=kind))  # shuffled, as `dalikd prepare` does
        return open_source(store, folder / store, "train")
    if source.files is None:
        raise ValueError(f"--sources resident: give the data set that {source.name} was made from")
    if view.crop != "pad_crop":
        raise ValueError(
            f"--sources resident keeps squares of one size, but {view.crop} cuts another window of the whole image "
            "each time: leave it out, or give --data.crop pad_crop"
        )
    sampler = Sampler(len(source), min(_DECODED_AT_ONCE, len(source)), shuffle=False, drop_last=False)
    loader = Loader(source, sampler, DrawSpec(replace(view, crop="square")))
    arrays = np.concatenate([batch.images.numpy() for batch in loader])
    loader.close()
    return replace(source, files=None, arrays=arrays)


# ------------------------------------------------------------------------------------------------ page cache


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
        with Path(path).open("rb") as file:
            os.fsync(file)  # what is not yet written stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(paths: Iterable[str | Path]) -> float:
    """The share, 0 to 1, of the files' pages that lie in the page cache.

    Some kernels and file systems do not tell and call every page cached: then the answer is 1.
    """
    pages = [_resident_pages(path) for path in map(Path, paths) if path.stat().st_size]
    return float((np.concatenate(pages) & 1).mean()) if pages else 0.0


def cached(source: Source) -> str:
    """One sentence on where the images come from."""
    if source.files is None:
        return "no files, the images lie in memory."
    share = cached_share(source.path(int(row)) for row in sample_rows(len(source), _SAMPLE))
    return f"{share:.0%} of a sample of {min(_SAMPLE, len(source))} files lay in memory at the start."


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


# ----------------------------------------------------------------------------------------------- more images


def draw_images(folder: Path, count: int, width: int, height: int, classes: int = 10) -> None:
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


def image_paths(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())


def repeat_images(folder: Path, target: Path, *, count: int | None = None, size: int | None = None) -> int:
    """Copy the images of class folders under new names, again and again: real bytes, no links.

    For sets larger than the page cache. `target` gets the same class folders. Returns how many were written.

    Args:
        folder: class folders with images.
        target: a folder that does not exist, or is empty.
        count: images wanted.
        size: bytes wanted, in place of `count`.
    """
    if (count is None) == (size is None):
        raise ValueError("give either --count, how many images, or --size, how many bytes")
    paths = image_paths(folder)
    if not paths:
        raise ValueError(f"{folder} holds no images: name a folder of class folders with images")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name another folder")
    mean = sum(path.stat().st_size for path in paths) / len(paths)
    needed = mean * count if count is not None else size or 0
    free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
    if needed > 0.9 * free:
        raise ValueError(f"{target} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB: give fewer images")
    number = written = 0
    while number < (count or 0) or written < (size or 0):
        source = paths[number % len(paths)]
        copy = target / source.relative_to(folder).with_stem(f"{source.stem}-{number // len(paths)}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        number, written = number + 1, written + copy.stat().st_size
    return number


def mixing(name: str, source: Source, view: View, batch_size: int) -> Augmenter:
    """An augmentation by its defaults, in mix groups that fit the batch."""
    return Augmenter(name, MixOptions(group=gcd(batch_size, _PUBLISHED_GROUP)), source, view, seed=0)


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch of changed tensors."""
    return Batch(**tree_map_only(Tensor, change, vars(batch)))
