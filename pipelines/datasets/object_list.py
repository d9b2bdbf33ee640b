"""Trees of images in object storage: listed by many requests at once, remembered as folders are."""

import fcntl
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dalikd.pipelines.datasets.classes import in_order, shorten
from dalikd.pipelines.datasets.file_list import (
    IMAGE_EXTENSIONS,
    FileList,
    Tree,
    count_of,
    is_no_data,
    keep_tree,
    kept_tree,
    manifest_folder,
)
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec
from dalikd.pipelines.objects import Listed, ObjectStore
from dalikd.pipelines.progress import progress

__all__ = ["find_objects"]

_REMEMBER_ABOVE = 20_000  # objects: 20 requests
_AT_ONCE = 24  # classes: reading an answer takes a core 8 ms, so that more would only wait for each other
_COMPARED = 16  # pages of a remembered list that are asked for again at each start


def find_objects(spec: SplitSpec, store: ObjectStore, *, remember_above: int = _REMEMBER_ABOVE) -> SplitIndex:
    """`split/<class>/**/image` in a store, in the order of `find_tree`; of classes that are left out nothing is listed.

    A list of more objects than `remember_above` is remembered, and taken at the next start if the classes and 16 pages
    of it are as they were: whatever has changed beside is found when it is read, by its size and ETag, except what was
    added. A note says of when the list is.

    Raises:
        ValueError: there are no classes, or one has no image.
        FileNotFoundError: there is no such split.
        StoreError: as `ObjectStore.list_page`.
    """
    split = "" if spec.split == "." else spec.split.strip("/")
    folder = f"{store.url}/{split}".rstrip("/")
    pages = list(store.list_all(split, deep=False))
    present = [name for page in pages for name in (path.rpartition("/")[2] for path in page.folders) if name]
    present = [name for name in present if not is_no_data(name)]
    if not present:
        raise _nothing(spec, store, folder, any(page.objects for page in pages))
    classes, notes = in_order(spec.choose(present, folder), folder)
    target = manifest_folder(folder, classes if spec.takes_part else None)
    beside = sum(_is_image(path.rpartition("/")[2]) for page in pages for path, _, _ in page.objects)

    def remembered() -> Tree | None:
        tree = kept_tree(target, folder, classes)
        return tree if tree is not None and _is_as_listed(tree, store, split, classes) else None

    def listed() -> Tree:
        tree = _list(store, split, folder, classes, beside)
        return keep_tree(target, folder, classes, tree) if len(tree.labels) > remember_above else tree

    if (tree := remembered()) is not None:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime((target / "manifest.json").stat().st_mtime))
        notes.append(f"{folder}: {len(tree.labels):,} objects as listed at {made}; remove {target} to list them again")
    else:
        with _turn(target) as first:
            tree = listed() if first else remembered()
    if tree is None:  # whoever was first had too few for that
        tree = listed()
    count = sum(tree.left_out.values())
    if count:
        notes.append(f"{folder}: {count} object{' is' if count == 1 else 's are'} left out: {count_of(tree.left_out)}")
    return SplitIndex(classes, tree.labels, files=_with(tree.files, store), notes=tuple(notes))


@contextmanager
def _turn(target: Path) -> Iterator[bool]:
    """Processes that list the same objects come one after the other, so that the others find what the first has listed.
    Gives whether this one is the first."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.with_name(f".{target.name}.lock").open("w")
    except OSError:  # nothing is remembered there
        yield True
        return
    with file:
        first = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            first = False
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield first


def _with(files: FileList, store: ObjectStore) -> FileList:
    return FileList(files.buffer, files.offsets, files.root, files.sizes, files.kept_in, files.tags, store)


def _nothing(spec: SplitSpec, store: ObjectStore, folder: str, others: bool) -> Exception:
    """What to say where there are no class folders."""
    if others:
        return ValueError(f"{spec.name}: {folder} has no class folders: put images in {folder}/<class>/")
    folders = [path for page in store.list_all("", deep=False) for path in page.folders]
    found = f"it has {shorten(folders)}: name one with --data.{spec.role}_split" if folders else "it is empty"
    return FileNotFoundError(f"{spec.name}: {store.url} has no folder {spec.split!r}; {found}, or check --data.root")


class _Class(NamedTuple):
    """The N images of a class: URLs one after the other with their lengths, sizes and tags; and what is left out."""

    urls: bytes
    numbers: np.ndarray  # int64 [3, N]
    left_out: Counter[str]


def _list(store: ObjectStore, split: str, folder: str, classes: Sequence[str], beside: int) -> Tree:
    """List every class, a thread each, some at a time."""
    asked = (store.submit(_list_class, store, f"{split}/{name}".lstrip("/")) for name in classes)
    coming, found = deque(islice(asked, _AT_ONCE)), []
    for _ in progress(f"listing {folder}", classes, unit=" classes"):
        found.append(coming.popleft().result())
        coming.extend(islice(asked, 1))
    numbers = np.concatenate([one.numbers for one in found], 1)
    left_out = sum((one.left_out for one in found), Counter({"image(s) beside the class folders": beside}) + Counter())
    labels = np.repeat(np.arange(len(classes)), [one.numbers.shape[1] for one in found])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(numbers[0])])
    buffer = np.frombuffer(b"".join(one.urls for one in found), np.uint8)
    sizes, tags = np.ascontiguousarray(numbers[1]), np.ascontiguousarray(numbers[2])
    return Tree(FileList(buffer, offsets, folder, sizes, "", tags), labels, {}, dict(left_out))


def _list_class(store: ObjectStore, path: str) -> _Class:
    images, left_out = [], Counter[str]()
    for page in store.list_all(path, deep=True):
        images += _images(page, path, left_out)
    if not images:
        found = f"; it has {count_of(left_out)}" if left_out else ""
        raise ValueError(
            f"{store.url}/{path} has no image ({' '.join(IMAGE_EXTENSIONS)}){found}: add some or remove the folder"
        )
    if any("/" in key for key, _, _ in images):
        images.sort(key=lambda image: _place(image[0]))
    else:
        images.sort()
    urls = [f"{store.url}/{path}/{key}".encode("utf-8", "surrogateescape") for key, _, _ in images]
    numbers = np.array([[len(url) for url in urls], *([image[part] for image in images] for part in (1, 2))], np.int64)
    return _Class(b"".join(urls), numbers, left_out)


def _images(page: Listed, path: str, left_out: Counter[str]) -> list[tuple[str, int, int]]:
    """Those of a class, without its folder's name. Names that end in a slash are put there for folders."""
    found = []
    for key, size, tag in page.objects:
        own = key[len(path) + 1 :]
        *folders, name = own.split("/")
        if not name or is_no_data(name) or any(is_no_data(part) for part in folders):
            continue
        if "" in folders or ".." in folders:  # no file has such a path
            left_out["under a name that no folder has"] += 1
        elif _is_image(name):
            found.append((own, size, tag))
        else:
            left_out[PurePosixPath(name.lower()).suffix or "without an ending"] += 1
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_no_data(name)


def _place(key: str) -> tuple[tuple[bool, str], ...]:
    """In a folder first its images by name, then its folders."""
    *folders, name = key.split("/")
    return (*((True, folder) for folder in folders), (False, name))


def _is_as_listed(tree: Tree, store: ObjectStore, split: str, classes: Sequence[str]) -> bool:
    """Whether the first pages of classes, evenly spread, are as they are remembered."""
    assert tree.files.sizes is not None
    assert tree.files.tags is not None
    labels = range(0, len(classes), max(1, -(-len(classes) // _COMPARED)))
    paths = [f"{split}/{classes[label]}".lstrip("/") for label in labels]
    pages = [store.submit(store.list_page, path, deep=True) for path in paths]
    for label, path, page in zip(labels, paths, [page.result() for page in pages], strict=True):
        rows = np.flatnonzero(tree.labels == label)
        known = {(tree.files.path(row), int(tree.files.sizes[row]), int(tree.files.tags[row])) for row in rows.tolist()}
        found = {(f"{store.url}/{path}/{key}", size, tag) for key, size, tag in _images(page, path, Counter())}
        if not found <= known or (not page.more and len(found) != len(known)):
            return False
    return True
