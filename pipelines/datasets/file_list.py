"""Folder trees of images: scanned once, remembered in memory-mapped files, held as flat arrays.

A tree is `folder/<class>/**/image`. Its paths lie in one uint8 buffer with int64 offsets, which can be mapped from a
cache file: no list of a million strings in every process, and no walk over a slow disk at every start.

What file servers and desktops put beside images is passed over without a word, and is no class either: names that start
with a dot (`._a.jpg`, `.DS_Store`, `.ipynb_checkpoints`), thumbnails, waste baskets and the like (_NOT_DATA). All other
files whose name does not end as an image's are counted as left out. Whatever else has such a name is listed too,
with a size of -1: folders, pipes, sockets, devices, links to nothing. The loader stops at them or replaces them.
Other links to nothing are errors: they may have led to folders of images.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dalikd.pipelines.content import LONGEST, image_sides
from dalikd.pipelines.files import read_json, read_npy, remove_litter, write_atomically
from dalikd.pipelines.hardware import package_versions
from dalikd.pipelines.progress import progress

__all__ = [
    "ENTRY",
    "EVERYTHING",
    "IMAGE_EXTENSIONS",
    "NEVER",
    "FileList",
    "FileRecord",
    "Listing",
    "Store",
    "Tree",
    "cache_folder",
    "count_of",
    "is_no_data",
    "keep_tree",
    "kept_tree",
    "list_folder",
    "manifest_folder",
    "open_tree",
    "scan",
]

#: Of files that DALI 2.4 decodes, tried with one of each; for JPEG, PNG, BMP, WebP, TIFF, PNM and JPEG 2000.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".mpo", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)

#: In place of class folders: all images of a folder, at any depth.
EVERYTHING = "."

_NOT_DATA = frozenset(  # in lower case: of Mac, Windows, Linux, Synology and QNAP
    {
        *("__macosx", "icon\r", "network trash folder", "temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found"),
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    }
)
_VERSION = 3  # of the manifest's files; raise it also when the rules of what is an image change
_REMEMBER_ABOVE = 20_000  # files; a smaller tree is scanned in well under a second
_SAMPLED = 32_768  # files of a remembered list whose sizes are compared at each start
_THREADS = 8  # that ask for sizes and folders: a disk in the network answers many at once
_CHUNK_FILES = 512  # that a thread asks for at a time
_ARRAYS = ("paths", "offsets", "labels", "sizes")
_MOST_READ = 1 << 28  # bytes of a file whose header is looked for; TIFF may have it at the end
_SETTLED_NS = 2_000_000_000  # 2 s: the coarsest clock of a file system in use
_CHUNK_ROWS = 16_384  # bounds the scratch memory of the vectorised passes over a long list


class Store(Protocol):
    """What is used of an `objects.ObjectStore` by those who read from it."""

    in_flight: int
    cache: Any

    def read(self, url: str, size: int, tag: int) -> bytes: ...

    def kept(self, url: str, size: int, tag: int) -> bytes | None: ...

    def download(self, url: str, size: int, tag: int) -> bytes: ...

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]": ...


@dataclass(frozen=True, eq=False)
class FileList:
    """Absolute paths of N files, or URLs of N objects, in one buffer.

    Attributes:
        buffer: uint8 [total bytes], the paths one after the other without terminators; may be a read-only mapping.
        offsets: int64 [N + 1], path `row` is `buffer[offsets[row]:offsets[row + 1]]`.
        root: folder that every path starts with; left out of fingerprints.
        sizes: of the files in bytes, int64 [N], -1 for what is no file; None: not known yet.
        kept_in: folder of the manifest that remembers the list, or "".
        tags: of objects `objects.tag_of` their ETags, int64 [N].
        store: that the objects are read from; None: these are files.
    """

    buffer: np.ndarray
    offsets: np.ndarray
    root: str = ""
    sizes: np.ndarray | None = None
    kept_in: str = ""
    tags: np.ndarray | None = None
    store: Store | None = None

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

    def objects(self, rows: Sequence[int]) -> list[tuple[str, int, int]]:
        """URL, size and tag of some objects, as their store takes them."""
        assert self.sizes is not None
        assert self.tags is not None
        urls = [os.fsdecode(path.tobytes()) for path in self.encoded(rows)]
        return list(zip(urls, self.sizes[rows].tolist(), self.tags[rows].tolist(), strict=True))

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
        sizes, tags = (None if known is None else known[rows] for known in (self.sizes, self.tags))
        buffer = np.concatenate([np.empty(0, np.uint8), *parts])
        return FileList(buffer, _offsets(lengths), self.root, sizes, self.kept_in, tags, self.store)

    def measure(self) -> np.ndarray:
        """Sizes of the files in bytes, int64 [N]: those that are known, else one stat a file, in threads; -1 for what
        is no file.

        Raises:
            FileNotFoundError: a file is missing, and no link to it is there.
        """
        if self.sizes is not None:
            return self.sizes
        return self._each(f"sizes in {self.root}", _size, 1)[:, 0]

    def stamps(self) -> np.ndarray:
        """Sizes of the files in bytes and times of their last change in ns, as they are now: int64 [N, 2]; of objects
        the ETags stand for the times, as they were listed. Raises as `measure`."""
        if self.tags is not None:
            return np.stack([self.measure(), self.tags], 1)

        def ask(path: bytes) -> tuple[int, int]:
            status = os.stat(path)  # noqa: PTH116 (bytes)
            return status.st_size, status.st_mtime_ns

        return self._each(f"times in {self.root}", ask, 2)

    def names(self) -> list[bytes]:
        """Paths without `root`."""
        prefix, whole = len(os.fsencode(os.path.join(self.root, ""))), self.buffer.tobytes()  # noqa: PTH118 (as below)
        return [whole[start + prefix : stop] for start, stop in pairwise(self.offsets.tolist())]

    def sides(self) -> np.ndarray:
        """Heights and widths in pixels as the headers say, int32 [N, 2]; zeros where one says nothing.

        One look at each header, in threads; of a file that cannot be read it says nothing. Of a remembered list they
        are remembered too; processes of one machine then wait for the first of them to look. A file may have changed
        since: who uses them compares. Of objects none is known before they come: that would ask for each of them twice.
        """
        if self.store is not None:
            return np.zeros((len(self), 2), np.int32)
        if not self.kept_in:
            return self._look()
        target = Path(self.kept_in) / f"sides-{_checksum((self.buffer, self.measure()))}.npy"
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # another user's folder, or one in the network without locks
                lock = stack.enter_context((target.parent / "sides.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(OSError, ValueError):
                kept = read_npy(target)
                if (kept.shape, kept.dtype) == ((len(self), 2), np.int32):
                    return kept
            sides = self._look()
            try:
                write_atomically(target, lambda file: np.save(file, sides), sync=False)
            except OSError as error:
                warnings.warn(f"the sides of images could not be kept in {target.parent}: {error}", stacklevel=2)
            return sides

    def _look(self) -> np.ndarray:
        """At the headers of those files that `dalikd doctor` has not examined."""
        record, sides = FileRecord.read(manifest_folder(Path(self.root))), np.zeros((len(self), 2), np.int32)
        if record.names:
            known = record.pick(self.names())
            same = known["bytes"] == self.measure()
            sides[same] = np.stack([known["height"], known["width"]], 1)[same]
        rows = np.flatnonzero(sides[:, 0] == 0)
        sides[rows] = self.take(rows)._each(f"headers in {self.root}", _sides_in_file, 2).clip(0, LONGEST)
        return sides

    def _each(self, what: str, ask: Callable[[bytes], tuple[int, ...]], count: int) -> np.ndarray:
        """`ask` every path for `count` numbers, in threads: int64 [N, count]."""

        def chunk(start: int) -> np.ndarray:
            bounds = self.offsets[start : start + _CHUNK_FILES + 1]
            paths, cuts = self.buffer[bounds[0] : bounds[-1]].tobytes(), (bounds - bounds[0]).tolist()
            found = np.empty((len(cuts) - 1, count), np.int64)
            for row in range(len(found)):
                try:
                    found[row] = ask(paths[cuts[row] : cuts[row + 1]])
                except FileNotFoundError:
                    raise FileNotFoundError(self.missing(start + row)) from None
            return found

        starts = range(0, len(self), _CHUNK_FILES)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="dalikd-files") as pool:
            bar = progress(what, pool.map(chunk, starts), total=len(starts), unit=f" x {_CHUNK_FILES} files")
            return np.concatenate([np.empty((0, count), np.int64), *bar])

    def missing(self, row: int) -> str:
        """What to say of a file that is listed and not there."""
        path = self.path(row)
        if Path(path).is_symlink():
            return f"{path} is missing: it is a link to nothing"
        if not self.kept_in:
            return f"{path} is missing"
        return (
            f"{path} is missing; the list of files is remembered in {self.kept_in}: restore the file, or "
            "remove that folder to have the list made anew"
        )

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
    """What `folder/<class>/**/image` holds.

    Attributes:
        files: of the N images.
        labels: int64 [N].
        directories: of every folder read, by its name in the tree: mtime and ctime in ns, and a digest of its names.
        left_out: how many files are no images, by what they are: ".gif", ".txt", …
    """

    files: FileList
    labels: np.ndarray
    directories: dict[str, tuple[int, int, str]]
    left_out: dict[str, int]


class Listing(NamedTuple):
    """Sorted names of the `images` and `folders` directly in a folder; `left_out` as in Tree; `digest` of all names."""

    images: list[str]
    folders: list[str]
    left_out: Counter[str]
    digest: str


def cache_folder() -> Path:
    """$DALIKD_CACHE, or ~/.cache/dalikd; not created here."""
    return Path(os.environ.get("DALIKD_CACHE") or "~/.cache/dalikd").expanduser().resolve()


def is_no_data(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that file servers and desktops put beside images."""
    return name.startswith(".") or name.lower() in _NOT_DATA


def list_folder(folder: Path) -> Listing:
    """List a folder; links are followed. `images` holds all whose names end as an image's, files or not.

    Raises:
        FileNotFoundError: another link in it leads to nothing: that may have been a folder of images.
    """
    images, folders, names, left_out = [], [], [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            names.append(os.fsencode(entry.name))
            if is_no_data(name):
                continue
            if name.endswith(IMAGE_EXTENSIONS):
                images.append(entry.name)
                continue
            if entry.is_symlink():
                _check_link(Path(entry.path))
            if entry.is_dir():
                folders.append(entry.name)
            else:
                left_out[Path(name).suffix or "without an ending"] += 1
    return Listing(sorted(images), sorted(folders), left_out, _digest(names))


def _check_link(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        raise FileNotFoundError(
            f"{path} is a link to nothing ({error.strerror}): restore its target or remove it"
        ) from None


def scan(folder: Path, classes: Sequence[str]) -> Tree:
    """List the images of every class, at any depth, without looking inside them.

    The order is fixed: classes as given, in a folder first its images by name, then its folders by name.

    Raises:
        ValueError: a class has no image, its folder's name ends as an image's, or a link leads back into a folder above
            it.
        FileNotFoundError: a link leads to nothing.
    """
    times, listing = _times(folder.stat()), list_folder(folder)
    for name in listing.images:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, but its name ends as an image's: rename or remove it")
    directories = {".": (*times, listing.digest)}
    beside = 0 if EVERYTHING in classes else len(listing.images)
    left_out = Counter({"image(s) beside the class folders": beside} if beside else {})
    buffers, lengths, labels = [], [], []
    for label, name in enumerate(progress(f"scanning {folder}", classes, unit=" classes")):
        others = Counter[str]()
        paths = [os.fsencode(path) for path in _walk(folder, name, directories, others, frozenset())]
        if not paths:
            found = f"; it has {count_of(others)}" if others else ""
            remedy = "check --data.root" if name == EVERYTHING else "add some or remove the folder"
            raise ValueError(f"{folder / name} has no image ({' '.join(IMAGE_EXTENSIONS)}){found}: {remedy}")
        left_out += others
        buffers.append(b"".join(paths))
        lengths.append(np.fromiter(map(len, paths), np.int64, len(paths)))
        labels.append(np.full(len(paths), label, np.int64))
    empty = np.empty(0, np.int64)
    files = FileList(
        np.frombuffer(b"".join(buffers), np.uint8), _offsets(np.concatenate([empty, *lengths])), str(folder)
    )
    return Tree(files, np.concatenate([empty, *labels]), directories, dict(left_out))


def count_of(left_out: Mapping[str, int]) -> str:
    """`2 .gif, 1 .txt`: the most frequent first."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ranked)


def open_tree(
    folder: Path, classes: Sequence[str], *, part: bool = False, remember_above: int = _REMEMBER_ABOVE
) -> Tree:
    """As `scan`, and the files' sizes; read from the cache where the folders have not changed since the last scan.

    Args:
        folder: resolved folder that holds the class folders.
        classes: their names, index = label.
        part: they are some of the class folders; remembered apart, so that runs on all and on some do not take turns in
            scanning.
        remember_above: a tree of more files than this is written to the cache.

    A manifest holds as long as the classes are the same and every folder has its mtime, its ctime, which no tool sets
    back, and the names that it had: where the times of a mounted store or an unpacked archive never change, the names
    tell. Of 32,768 files or more, evenly spread, sizes are compared too, since a file that is rewritten in place
    changes nothing in its folder. For 1,000 folders of 1,300 files all this takes about a second.
    A damaged manifest, or a cache folder that cannot be written, costs a warning and a scan.
    """
    target = manifest_folder(folder, classes if part else None)
    tree = kept_tree(target, folder, classes)
    if tree is not None and _has_same_sizes(tree.files):
        return tree
    started_ns = time.time_ns()
    tree = scan(folder, classes)
    tree = tree._replace(files=replace(tree.files, sizes=tree.files.measure()))  # as they are when the run starts
    # A folder changed within the clock's grain before the scan could change again and keep its mtime.
    settled = max(mtime_ns for mtime_ns, _, _ in tree.directories.values()) < started_ns - _SETTLED_NS
    if settled and len(tree.files) > remember_above:
        return keep_tree(target, folder, classes, tree)
    return tree


def manifest_folder(folder: Path | str, part: Sequence[str] | None = None) -> Path:
    """Where the manifest of a folder or URL, or of some classes of it, lies."""
    key = b"\0".join(map(os.fsencode, (folder, *(part or ()))))
    return cache_folder() / "manifests" / sha256(key).hexdigest()[:16]


def _size(path: bytes) -> tuple[int]:
    try:
        status = os.stat(path)  # noqa: PTH116 (bytes)
    except OSError:
        if not os.path.islink(path):  # noqa: PTH114 (bytes)
            raise
        return (-1,)  # to nothing, or in a circle
    return (status.st_size if stat.S_ISREG(status.st_mode) else -1,)


def _sides_in_file(path: bytes) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        try:
            most = min(os.fstat(file).st_size, _MOST_READ)
            return image_sides(lambda offset, count: os.pread(file, min(count, most), offset))
        finally:
            os.close(file)
    return 0, 0


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """int64 [N] lengths -> int64 [N + 1] bounds."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _digest(names: list[bytes]) -> str:
    """Of all names in a folder, in any order."""
    return sha256(b"\0".join(sorted(names))).hexdigest()[:16]


def _walk(
    root: Path,
    relative: str,
    directories: dict[str, tuple[int, int, str]],
    left_out: Counter[str],
    above: frozenset[tuple[int, int]],
) -> Iterator[str]:
    """Yield the images of `root/relative` and below; note each folder, its times as they were before it was listed."""
    folder = root / relative
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"{folder} links back to a folder above it: remove the link")
    listing = list_folder(folder)
    directories[relative] = (*_times(status), listing.digest)
    left_out.update(listing.left_out)
    yield from (f"{folder}/{name}" for name in listing.images)
    for name in listing.folders:
        yield from _walk(root, f"{relative}/{name}", directories, left_out, above | {identity})


def keep_tree(target: Path, folder: Path | str, classes: Sequence[str], tree: Tree) -> Tree:
    """Remember a tree. The arrays come first, under a name made of their content, then the JSON that names them: safe
    with several writers."""
    arrays = dict(zip(_ARRAYS, (tree.files.buffer, tree.files.offsets, tree.labels, tree.files.measure()), strict=True))
    arrays |= {} if tree.files.tags is None else {"tags": tree.files.tags}
    checksum = _checksum(arrays.values())
    note = {
        "version": _VERSION,
        "folder": str(folder),
        "classes": list(classes),
        "directories": tree.directories,
        "left_out": tree.left_out,
        "checksum": checksum,
        "objects": "tags" in arrays,
    }
    try:
        for name, array in arrays.items():
            place = target / f"{name}-{checksum}.npy"
            write_atomically(place, lambda file, array=array: np.save(file, array), sync=False)
        write_atomically(target / "manifest.json", json.dumps(note).encode("ascii"), sync=False)
        _remove_outdated(target, checksum)
    except OSError as error:
        warnings.warn(f"the list of {folder} could not be kept in {target}: {error}", stacklevel=2)
        return tree
    return tree._replace(files=replace(tree.files, kept_in=str(target)))


def _remove_outdated(target: Path, checksum: str) -> None:
    """Drop the arrays of earlier scans, and what killed processes have left; one that has mapped them keeps them."""
    remove_litter(target)
    for path in target.glob("*.npy"):
        if not path.stem.endswith(checksum):
            path.unlink(missing_ok=True)


def kept_tree(target: Path, folder: Path | str, classes: Sequence[str]) -> Tree | None:
    """The remembered tree; None where there is none or the folders have changed."""
    if not (target / "manifest.json").is_file():
        return None
    try:
        note = read_json(target / "manifest.json")
        if not _is_current(note, folder, classes):
            return None
        tree = _load_arrays(target, folder, note)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        warnings.warn(f"the list of {folder} in {target} is damaged ({error}); scanning again", stacklevel=2)
        return None
    return tree


def _is_current(note: dict, folder: Path | str, classes: Sequence[str]) -> bool:
    """Whether nothing has been added, removed or renamed since the scan; one stat and one listing a folder."""
    if (note["version"], note["folder"], note["classes"]) != (_VERSION, str(folder), list(classes)):
        return False
    folders = [(Path(folder) / name, tuple(state)) for name, state in note["directories"].items()]
    try:
        if any(_times(path.stat()) != state[:2] for path, state in folders):
            return False
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="dalikd-folders") as pool:
            digests = pool.map(lambda item: _digest(os.listdir(os.fsencode(item[0]))), folders)  # noqa: PTH208 (bytes)
            return all(digest == state[2] for digest, (_, state) in zip(digests, folders, strict=True))
    except OSError:  # a folder is gone, or no longer to be read: the scan says so
        return False


def _times(status: os.stat_result) -> tuple[int, int]:
    """mtime and ctime in ns."""
    return status.st_mtime_ns, status.st_ctime_ns


def _has_same_sizes(files: FileList) -> bool:
    """Whether files, evenly spread over the list, have the sizes that are remembered."""
    assert files.sizes is not None
    rows = np.arange(0, len(files), max(1, len(files) // _SAMPLED))
    try:
        return np.array_equal(replace(files.take(rows), sizes=None).measure(), files.sizes[rows])
    except OSError:  # missing, or no longer to be read: the scan says which
        return False


def _load_arrays(target: Path, folder: Path | str, note: dict) -> Tree:
    """Map the arrays. np.asarray takes the memmap class off: slicing that costs ten times as much.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    checksum = note["checksum"]
    if not re.fullmatch("[0-9a-f]+", checksum):
        raise ValueError(f"checksum {checksum!r}")
    names = (*_ARRAYS, "tags") if note.get("objects") else _ARRAYS
    arrays = [np.asarray(read_npy(target / f"{name}-{checksum}.npy", mode="r")) for name in names]
    if _checksum(arrays) != checksum:
        raise ValueError("checksum differs")
    paths, offsets, labels, sizes, *tags = arrays
    if any((array.shape, array.dtype) != (sizes.shape, np.int64) for array in tags):
        raise ValueError("its ETags are of another kind")
    files = FileList(paths, offsets, str(folder), sizes, str(target), tags[0] if tags else None)
    _check_files(files, labels, len(note["classes"]))
    directories = {name: (mtime, ctime, digest) for name, (mtime, ctime, digest) in note["directories"].items()}
    left_out = {str(kind): int(count) for kind, count in note["left_out"].items()}
    return Tree(files, labels, directories, left_out)


def _check_files(files: FileList, labels: np.ndarray, classes: int) -> None:
    """Check what a checksum does not: that the list was made by `scan`, and not by someone who wants other files read.

    Raises:
        ValueError: a label, size or bound is none, or a path leads out of the folder.
    """
    paths, offsets, sizes = files.buffer, files.offsets, files.sizes
    assert sizes is not None
    kinds = (paths, np.uint8), (offsets, np.int64), (labels, np.int64), (sizes, np.int64)
    if any(array.ndim != 1 or array.dtype != dtype for array, dtype in kinds):
        raise ValueError("an array is of another kind")
    if not len(offsets) - 1 == len(labels) == len(sizes) > 0:
        raise ValueError("its arrays are of different lengths")
    start = np.frombuffer(os.fsencode(os.path.join(files.root, "")), np.uint8)  # noqa: PTH118 (Path drops the slash)
    if offsets[0] != 0 or offsets[-1] != len(paths) or np.diff(offsets).min() <= len(start):
        raise ValueError("its paths have impossible lengths")
    if sizes.min() < 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError("it has an impossible size or label")
    for first in range(0, len(labels), _CHUNK_ROWS):
        chunk = offsets[first : min(first + _CHUNK_ROWS, len(labels))]
        if (paths[chunk[:, None] + np.arange(len(start))] != start).any():
            raise ValueError(f"a path does not begin with {files.root}")
    # no name has a zero byte; a path begins with /, so that the last one may end the path before it
    if not paths.all() or b"/../" in paths.tobytes() + b"/":
        raise ValueError(f"a path leads out of {files.root}")


def _checksum(arrays: Iterable[np.ndarray]) -> str:
    """CRC-32 of each array with its type and shape, well under 0.1 s for a million files."""
    parts = [zlib.crc32(array.data, zlib.crc32(f"{array.dtype}{array.shape}".encode())) for array in arrays]
    return "".join(f"{part:08x}" for part in parts)


# ------------------------------------------------------------------------------------------ what was found in files

NEVER = int(np.iinfo(np.int64).min)  #: a time of change that no file has

#: One file. `format`, `mode` and `fault` are places in `words`; 0 is nothing: no fault. `sha256` counts where `hashed`.
ENTRY = np.dtype(
    [
        *(("bytes", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"), ("width", "<i4")),
        *(("format", "<i4"), ("mode", "<i4"), ("fault", "<i4"), ("orientation", "u1")),
        *(("hashed", "?"), ("sha256", "u1", (32,))),
    ]
)


@dataclass(eq=False)
class FileRecord:
    """What `dalikd doctor` has found in N files, remembered beside the manifest of their folder.

    A file is known by its name in the folder, its size and the time of its last change. So a second look needs only
    those that have changed, and a run takes the sides of images and the files that cannot be decoded from here.

    Attributes:
        names: in their folder.
        entries: of ENTRY, [N].
        words: that entries point to; the first is empty.
    """

    names: list[bytes]
    entries: np.ndarray
    words: list[str]

    @classmethod
    def read(cls, folder: Path, *, faulty: bool = False) -> "FileRecord":
        """What a manifest's folder remembers; nothing where there is no record, or, with a warning, a damaged one.

        Args:
            folder: of the manifest.
            faulty: read those files only that could not be decoded; of a million files that takes no time.
        """
        path, kind = folder / _RECORD, "faulty" if faulty else "all"
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as kept:  # a zip archive, with checksums
                    names, entries = kept[f"{kind}_names"].tobytes().split(b"\0")[:-1], kept[kind]
                    version, decoders, *words = json.loads(kept["words"].tobytes())
                if version == _RECORD_VERSION and entries.dtype == ENTRY and len(entries) == len(names):
                    if decoders != _decoders():
                        entries["mtime_ns"] = NEVER  # what they can decode may be another; sides stay
                    return cls(names, entries, words)
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                warnings.warn(f"{path} is damaged ({error}): all files are looked at again", stacklevel=2)
        return cls([], np.zeros(0, ENTRY), [""])

    def write(self, folder: Path) -> None:
        """Remember it. Raises OSError."""
        arrays: dict[str, Any] = {
            "words": np.frombuffer(json.dumps([_RECORD_VERSION, _decoders(), *self.words]).encode(), np.uint8)
        }
        for kind, rows in (("all", np.arange(len(self.names))), ("faulty", np.flatnonzero(self.entries["fault"]))):
            names = b"".join(self.names[row] + b"\0" for row in rows.tolist())
            arrays |= {kind: self.entries[rows], f"{kind}_names": np.frombuffer(names, np.uint8)}
        write_atomically(folder / _RECORD, lambda file: np.savez(file, **arrays), sync=False)

    def pick(self, names: list[bytes]) -> np.ndarray:
        """The entries of these files, [N]; the time of change of one that is not known is NEVER."""
        if names == self.names:  # of a million the rest takes seconds
            return self.entries.copy()
        place_of = {name: place for place, name in enumerate(self.names)}
        places = np.array([place_of.get(name, -1) for name in names], np.int64)
        entries = np.zeros(len(places), ENTRY)
        entries["mtime_ns"] = NEVER
        entries[places >= 0] = self.entries[places[places >= 0]]
        return entries

    def number(self, word: str) -> int:
        """A word's place."""
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)


_RECORD, _RECORD_VERSION = "examined.npz", 1


def _decoders() -> str:
    """The versions of what decodes: other ones may fail on other files."""
    versions = package_versions()
    return f"{versions.get('dali')} {versions.get('nvimgcodec')}"
