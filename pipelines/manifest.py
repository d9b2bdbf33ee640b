"""Folder trees of pictures: scanned once, remembered in memory-mapped files, held as two flat arrays.

A tree is `folder/<class>/**/picture`. Its paths lie in one uint8 buffer with int64 offsets, which can be mapped from a
cache file: no list of a million strings in every process, and no walk over a slow disk at every start.
"""

import json
import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

__all__ = [
    "IMAGE_EXTENSIONS",
    "FileList",
    "Tree",
    "build_once",
    "cache_folder",
    "list_folders",
    "list_pictures",
    "manifest_folder",
    "open_tree",
    "scan",
]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

_VERSION = 1  # of the manifest's files; raise it also when the rules of what is a picture change
_REMEMBER_ABOVE = 20_000  # files; a smaller tree is scanned in well under a second
_SETTLED_NS = 2_000_000_000  # 2 s: the coarsest clock of a file system in use
_CHUNK_ROWS = 16_384  # bounds the scratch memory of the vectorised passes over a long list


@dataclass(frozen=True, eq=False)
class FileList:
    """Absolute paths of N files in one buffer.

    Attributes:
        buffer: uint8 [total bytes], the paths one after the other without terminators; may be a read-only mapping.
        offsets: int64 [N + 1], path `row` is `buffer[offsets[row]:offsets[row + 1]]`.
        root: folder that every path starts with; left out of fingerprints.
    """

    buffer: np.ndarray
    offsets: np.ndarray
    root: str = ""

    @classmethod
    def from_paths(cls, paths: Iterable[str | bytes], root: str | Path = "") -> "FileList":
        """Pack absolute paths, all of them below `root`, in the order given."""
        encoded = [os.fsencode(path) for path in paths]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), _offsets(lengths), str(root))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def path(self, row: int) -> str:
        """Path of one file."""
        return os.fsdecode(self.encoded([row])[0].tobytes())

    def encoded(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Paths as uint8 views, what `fn.io.file.read` takes; rows in 0..N-1, about 0.2 µs a row."""
        rows = np.asarray(rows, np.int64)
        assert rows.size == 0 or rows.min() >= 0, "negative rows would give empty paths"
        starts, stops = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        buffer = self.buffer
        return [buffer[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def take(self, rows: Sequence[int] | np.ndarray) -> "FileList":
        """The files of `rows`, in that order, in a buffer of their own."""
        rows = np.asarray(rows, np.int64)
        chunks = [rows[first : first + _CHUNK_ROWS] for first in range(0, len(rows), _CHUNK_ROWS)]
        parts = [np.concatenate(self.encoded(chunk)) for chunk in chunks]
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        return FileList(np.concatenate([np.empty(0, np.uint8), *parts]), _offsets(lengths), self.root)

    def relative_chunks(self) -> Iterator[np.ndarray]:
        """The list without `root`, as arrays to be hashed: first the lengths int64 [N], then the bytes."""
        prefix = len(os.fsencode(os.path.join(self.root, "")))  # noqa: PTH118 (Path drops the closing slash)
        yield np.diff(self.offsets) - prefix
        for first in range(0, len(self), _CHUNK_ROWS):
            bounds = self.offsets[first : first + _CHUNK_ROWS + 1]
            keep = np.ones(bounds[-1] - bounds[0], dtype=bool)
            keep[(bounds[:-1, None] - bounds[0] + np.arange(prefix)).ravel()] = False
            yield self.buffer[bounds[0] : bounds[-1]][keep]


class Tree(NamedTuple):
    """What `folder/<class>/**/picture` holds: `files`, `labels` int64 [N] and the mtime_ns of every folder read."""

    files: FileList
    labels: np.ndarray
    directories: dict[str, int]


def cache_folder() -> Path:
    """$DALIKD_CACHE, or ~/.cache/dalikd; not created here."""
    return Path(os.environ.get("DALIKD_CACHE") or "~/.cache/dalikd").expanduser().resolve()


def list_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the folders in `folder` (links are followed), without hidden ones."""
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def list_pictures(folder: Path) -> list[str]:
    """Sorted names of the pictures in `folder` itself."""
    return _list_directory(folder)[0]


def scan(folder: Path, classes: Sequence[str]) -> Tree:
    """List the pictures of every class, at any depth, without looking inside them.

    The order is fixed: classes as given, in a folder first its pictures by name, then its folders by name.
    Hidden files and folders (their name starts with a dot) and files of another extension are left out.

    Raises:
        ValueError: a class has no picture, or a link leads back into a folder above it.
        FileNotFoundError: a picture is a link to nothing.
    """
    directories = {".": folder.stat().st_mtime_ns}
    buffers, lengths, labels = [], [], []
    for label, name in enumerate(tqdm(classes, f"scanning {folder}", unit=" classes", delay=2, disable=None)):
        paths = [os.fsencode(path) for path in _walk(folder, name, directories, frozenset())]
        if not paths:
            raise ValueError(
                f"{folder / name} has no picture ({' '.join(IMAGE_EXTENSIONS)}): add some or remove the folder"
            )
        buffers.append(b"".join(paths))
        lengths.append(np.fromiter(map(len, paths), np.int64, len(paths)))
        labels.append(np.full(len(paths), label, np.int64))
    empty = np.empty(0, np.int64)
    files = FileList(
        np.frombuffer(b"".join(buffers), np.uint8), _offsets(np.concatenate([empty, *lengths])), str(folder)
    )
    return Tree(files, np.concatenate([empty, *labels]), directories)


def open_tree(
    folder: Path, classes: Sequence[str], *, part: bool = False, remember_above: int = _REMEMBER_ABOVE
) -> Tree:
    """As `scan`, read from the cache where the folders have not changed since the last scan.

    Args:
        folder: resolved folder that holds the class folders.
        classes: their names, index = label.
        part: they are some of the class folders; remembered apart, so that runs on all and on some do not take turns in
            scanning.
        remember_above: a tree of more files than this is written to the cache.

    A manifest holds as long as the classes and the mtime_ns of every folder are the same: one stat a folder.
    A damaged manifest, or a cache folder that cannot be written, costs a warning and a scan.
    """
    target = manifest_folder(folder, classes if part else None)
    tree = _load(target, folder, classes)
    if tree is not None:
        return tree
    started_ns = time.time_ns()
    tree = scan(folder, classes)
    # A folder changed within the clock's grain before the scan could change again and keep its mtime.
    settled = max(tree.directories.values()) < started_ns - _SETTLED_NS
    if settled and len(tree.files) > remember_above:
        _save(target, folder, classes, tree)
    return tree


def manifest_folder(folder: Path, part: Sequence[str] | None = None) -> Path:
    """Where the manifest of `folder`, or of some classes of it, lies."""
    key = b"\0".join(map(os.fsencode, (folder, *(part or ()))))
    return cache_folder() / "manifests" / sha256(key).hexdigest()[:16]


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a new folder and move it to `target` whole; where another process was faster, keep its folder.

    Raises:
        FileExistsError: `target` was there before, and is not an empty folder.
    """
    if target.exists() and not _is_empty_folder(target):
        raise FileExistsError(f"{target} is already there")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / target.name  # a folder below, because the scratch folder is private (mode 0700)
        made.mkdir()
        build(made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir() or _is_empty_folder(target):
                raise


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """int64 [N] lengths -> int64 [N + 1] bounds."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _walk(root: Path, relative: str, directories: dict[str, int], above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the pictures of `root/relative` and below; note the mtime_ns of each folder before it is listed."""
    folder = root / relative
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"{folder} links back to a folder above it: remove the link")
    directories[relative] = status.st_mtime_ns
    pictures, folders = _list_directory(folder)
    yield from (f"{folder}/{name}" for name in pictures)
    for name in folders:
        yield from _walk(root, f"{relative}/{name}", directories, above | {identity})


def _list_directory(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the pictures and of the folders directly in `folder`."""
    pictures, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                if not entry.is_file():
                    raise FileNotFoundError(f"{entry.path} is a link to nothing: restore its target or remove it")
                pictures.append(entry.name)
    return sorted(pictures), sorted(folders)


def _save(target: Path, folder: Path, classes: Sequence[str], tree: Tree) -> None:
    """Write the arrays under a name made of their content, then the JSON that names them: safe with several writers."""
    arrays = {"paths": tree.files.buffer, "offsets": tree.files.offsets, "labels": tree.labels}
    checksum = _checksum(arrays.values())
    note = {
        "version": _VERSION,
        "folder": str(folder),
        "classes": list(classes),
        "directories": tree.directories,
        "checksum": checksum,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            _replace(target / f"{name}-{checksum}.npy", lambda path, array=array: _write_array(path, array))
        _replace(target / "manifest.json", lambda path: path.write_text(json.dumps(note), encoding="ascii"))
        _remove_outdated(target, checksum)
    except OSError as error:
        warnings.warn(f"the list of {folder} could not be kept in {target}: {error}", stacklevel=2)


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, then move it there in one step."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{time.time_ns()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remove_outdated(target: Path, checksum: str) -> None:
    """Drop the arrays of earlier scans; a process that has mapped them keeps them."""
    for path in target.glob("*.npy"):
        if not path.stem.endswith(checksum):
            path.unlink(missing_ok=True)


def _load(target: Path, folder: Path, classes: Sequence[str]) -> Tree | None:
    """The remembered tree; None where there is none or the folders have changed."""
    if not (target / "manifest.json").is_file():
        return None
    try:
        note = json.loads((target / "manifest.json").read_text(encoding="ascii"))
        return _load_arrays(target, folder, note) if _is_current(note, folder, classes) else None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"the list of {folder} in {target} is damaged ({error}); scanning again", stacklevel=2)
        return None


def _is_current(note: dict, folder: Path, classes: Sequence[str]) -> bool:
    """Whether nothing has been added, removed or renamed since the scan; one stat a folder."""
    if (note["version"], note["folder"], note["classes"]) != (_VERSION, str(folder), list(classes)):
        return False
    return all(_mtime_ns(folder / name) == mtime_ns for name, mtime_ns in note["directories"].items())


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _load_arrays(target: Path, folder: Path, note: dict) -> Tree:
    """Map the arrays. np.asarray takes the memmap class off: slicing that costs ten times as much.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    checksum = note["checksum"]
    paths, offsets, labels = (
        np.asarray(np.load(target / f"{name}-{checksum}.npy", mmap_mode="r")) for name in ("paths", "offsets", "labels")
    )
    if _checksum((paths, offsets, labels)) != checksum:
        raise ValueError("checksum differs")
    return Tree(FileList(paths, offsets, str(folder)), labels, note["directories"])


def _checksum(arrays: Iterable[np.ndarray]) -> str:
    """CRC-32 of each array with its type and shape, well under 0.1 s for a million files."""
    parts = [zlib.crc32(array.data, zlib.crc32(f"{array.dtype}{array.shape}".encode())) for array in arrays]
    return "".join(f"{part:08x}" for part in parts)
