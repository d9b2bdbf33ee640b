"""Files and folders that are whole or not there: whoever is killed, or fails, while writing leaves what was before.

And files that may be damaged, or made to do harm: what they hold is bounded before it is read, and whatever is wrong
with them is a ValueError that names them.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import queue
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import uuid4

import numpy as np
import yaml

__all__ = [
    "LARGEST_TEXT",
    "Appended",
    "Refused",
    "build_once",
    "file_digest",
    "load_yaml",
    "names_in",
    "new_folder",
    "parse_json",
    "read_json",
    "read_npy",
    "read_text",
    "read_within",
    "read_yaml",
    "remove_litter",
    "unwritable",
    "write_atomically",
]

_LITTER = re.compile(r"\..+\.[0-9a-f]{32}")  # `.NAME.HEX`, as parts of files and folders that are being made are called
#: bytes of a text file; as JSON it takes up to 30 times as much memory
LARGEST_TEXT = 8 << 20
_LARGEST_YAML = 64 << 10  # characters; PyYAML reads about 100,000 a second
_DEEPEST_YAML = 32  # groups in groups
_MOST_NODES = 50_000  # of a YAML text, with every alias written out


def write_atomically(
    path: Path,
    write: bytes | Callable[[BinaryIO], object],
    *,
    sync: bool = True,
    previous: Path | None = None,
    replace: bool = True,
) -> None:
    """Write a file beside its place and move it there in one step; its folder is made if it is missing.

    Several may write the same file at once: it then holds what one of them has written. It gets the permissions that
    the umask gives to every new file.

    Args:
        path: of the file; one that is there is replaced.
        write: its bytes, or what writes them to an open file.
        sync: wait until the disk has it, so that not even a power cut leaves less than a whole file. Not needed where
            the content has a checksum and can be made again.
        previous: where the file that is replaced is kept, in the same folder.
        replace: whether a file may be replaced.

    Raises:
        OSError: it cannot be written; names the file and the reason. The file of before stays, and nothing lies beside
            it.
        FileExistsError: the file is there, and may not be replaced.
    """
    part, target = path.with_name(f".{path.name}.{uuid4().hex}"), _Target()  # several machines may share a number
    foreign: Exception | None = None  # what `write` has met elsewhere, such as in what it reads
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(part) as file:
            target.file = file
            try:
                write(cast(BinaryIO, target)) if callable(write) else target.write(write)
            except Exception as error:
                if target.error is not None:  # torch, numpy and others have other words for it
                    raise target.error from error
                foreign = error
                raise
            file.flush()
            if sync:
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                _keep(path, previous)
            if replace:
                part.replace(path)
            else:
                try:
                    os.link(part, path)
                except FileExistsError:
                    foreign = FileExistsError(f"{path} is already there")  # another was quicker
                    raise foreign from None
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        if error is foreign:
            raise
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # as on a disk that has become read-only: the first error counts
            part.unlink()


def unwritable(path: Path, error: OSError) -> OSError:
    """The error in words that name the file; with its number."""
    reason = error.strerror or str(error) or type(error).__name__
    named = _Unwritable(
        str(error) if isinstance(error, _Unwritable) else f"{path} cannot be written: {reason}",
    )
    named.errno, named.strerror = error.errno, reason
    return named


class _Unwritable(OSError):
    """Names the file; the reason alone is its `strerror`."""

    def __str__(self) -> str:
        return str(self.args[0])


class _Target(io.RawIOBase):
    """What is written to in the place of a file: it has no descriptor that others could write past it, and remembers
    what has gone wrong, which PyTorch forgets."""

    file: BinaryIO
    error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._noted(lambda: self.file.write(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._noted(lambda: self.file.seek(offset, whence))

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        if not self.closed and not self.file.closed:
            self._noted(self.file.flush)

    def _noted(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError as error:
            self.error = error
            raise


def _open_locked(part: Path) -> BinaryIO:
    """A new file, locked as long as its writer lives: `remove_litter` takes what nobody has locked."""
    while True:
        file = part.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # no locks on this file system: nothing is taken there
            return file
        if os.fstat(file.fileno()).st_nlink:  # else it was taken before it was locked
            return file
        file.close()


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, so that it is there by its own at every moment; where a file system knows no second
    names it is moved."""
    second = previous.with_name(f".{previous.name}.{uuid4().hex}")
    try:
        os.link(path, second)
    except OSError:
        path.replace(previous)
        return
    try:
        second.replace(previous)  # does nothing where both names are of one file
    finally:
        second.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the disk have the new name too, where the file system can do that for a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


class Appended:
    """A file that grows: what is appended is handed to the system at once, and a failure is an error there and then.

    Args:
        path: of the file; its folder is made if it is missing.

    Raises:
        OSError: it cannot be opened; names the file and the reason.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise unwritable(path, error) from error

    def append(self, content: bytes) -> None:
        """Raises OSError: it cannot be written, or a part of it alone; names the file and the reason."""
        try:
            while content:  # the system takes as much as there is room for
                content = content[self._file.write(content) :]
        except OSError as error:
            raise unwritable(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def names_in(folder: Path) -> set[str]:
    """What a folder holds, without what living writers are about to put there and killed ones have left; empty where
    there is none."""
    return {path.name for path in folder.iterdir() if not _LITTER.fullmatch(path.name)} if folder.exists() else set()


def remove_litter(folder: Path) -> None:
    """Remove what killed writers have left in a folder. What a living one has locked stays; so does all on a file
    system without locks."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _LITTER.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # gone, another user's, or a living writer's
            # a file system in the network locks only what is open for writing, which no folder is
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder `.NAME.HEX`, of this user alone, that is removed in the end; what killed processes have left beside it
    goes first."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_litter(parent)
    while True:
        scratch = parent / f".{name}.{uuid4().hex}"
        scratch.mkdir(mode=0o700)
        descriptor = os.open(scratch, os.O_RDONLY)
        with contextlib.suppress(OSError):  # no locks on this file system: nothing is taken there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if scratch.exists():  # else it was taken before it was locked
            break
        os.close(descriptor)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def build_once(target: Path, build: Callable[[Path], None], *, replace: bool = False) -> None:
    """Let `build` fill a new folder and move it to `target` whole; where another process was faster, keep its folder.

    Args:
        target: the folder.
        build: is given the new one.
        replace: take the place of a folder that is there, once the new one is filled.

    Raises:
        FileExistsError: `target` was there before, and is not an empty folder.
    """
    if not replace and target.exists() and not _is_empty_folder(target):
        raise FileExistsError(f"{target} is already there")
    with new_folder(target.parent, target.name) as scratch:
        made = scratch / target.name  # a folder below, because the scratch folder is private (mode 0700)
        made.mkdir()
        build(made)
        old = scratch / "old"
        try:
            if replace and target.exists():
                target.rename(old)
            made.rename(target)
        except OSError:
            if not target.is_dir() or _is_empty_folder(target):
                raise
        finally:
            if old.exists() and not target.exists():
                old.rename(target)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digits of a checksum of a file's content: of SHA-256, or of another algorithm of hashlib.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def read_within(path: str, seconds: float, most: int) -> bytes:
    """What a file holds; a disk in the network may never answer, and a pipe waits for a writer.

    Args:
        path: of the file; links are followed.
        seconds: to wait at most.
        most: bytes it may have.

    Raises:
        OSError: it is no file, too large, or cannot be read; TimeoutError: not in that time.
    """
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
                    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
                    raise OSError(errno.EINVAL, f"it is {kind}, not a file", path)
                if status.st_size > most:
                    raise OSError(errno.EFBIG, f"its {status.st_size:,} bytes are more than the {most:,} allowed", path)
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    answer.put(file.read())
            finally:
                os.close(descriptor)
        except BaseException as error:  # passed on
            answer.put(error)

    threading.Thread(
        target=read, name="dalikd-read", daemon=True
    ).start()  # one that hangs keeps no process from ending
    try:
        found = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s", path) from None
    if isinstance(found, BaseException):
        raise found
    return found


# ------------------------------------------------------------------------------------------------- reading


def read_text(path: Path, largest: int = LARGEST_TEXT, encoding: str = "utf-8") -> str:
    """The text of a file.

    Args:
        path: of the file.
        largest: size in bytes.
        encoding: of the text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no text.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(largest, size + LARGEST_TEXT) + 1)  # as much memory is taken as is asked for
    if len(content) > largest:
        raise ValueError(f"{path} is larger than {largest >> 10} KiB: this is no file for this place, name another")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = {"utf-8-sig": "UTF-8"}.get(encoding, encoding.upper())
        raise ValueError(
            f"{path} is not {name} text ({error.reason} at byte {error.start}): save it as {name}"
        ) from None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than LARGEST_TEXT, or no JSON; names the file.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, place: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or too long or deep; begins with `place`.
    """
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"{place}: its JSON is longer than {LARGEST_TEXT >> 20} Mi characters")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON file ({error})") from None


class Refused(ValueError):
    """A text that could be read, but costs too much or means two things."""


class _YamlLoader(yaml.SafeLoader):
    """Reads a text of bounded depth and size, counted with every alias written out, in which no key stands twice."""

    place = ""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # of whole nodes, by their id

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise Refused(f"{self.place} line {line}: an alias means what it is a part of: write it out")
            self._nodes += self._sizes[id(node)]
        else:
            self._depth, before = self._depth + 1, self._nodes
            if self._depth > _DEEPEST_YAML:
                raise Refused(f"{self.place} line {line}: more than {_DEEPEST_YAML} groups lie in each other")
            node = super().compose_node(parent, index)
            self._depth, self._nodes = self._depth - 1, self._nodes + 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise Refused(f"{self.place} line {line}: its aliases stand for more than {_MOST_NODES} values: write less")
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return node

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise Refused(f"{self.place} line {line}: {key.value} is given twice in one group: leave one out")
            seen.add((key.tag, key.value))


def load_yaml(text: str, place: str) -> tuple[Any, Any]:
    """What a YAML text holds, and the same with every scalar as it is written.

    Raises:
        Refused: it is too long or too deep, its aliases stand for too much, or a key stands twice in a group.
        ValueError: it is no YAML; all begin with `place`.
    """
    if len(text) > _LARGEST_YAML:
        raise Refused(
            f"{place} is longer than {_LARGEST_YAML >> 10} Ki characters: this is no config, name another file"
        )
    try:
        loader = _YamlLoader(text)
        loader.place = place
        node = loader.get_single_node()
        return (None, None) if node is None else (loader.construct_document(node), _as_written(node))
    except Refused:
        raise
    except Exception as error:  # of PyYAML's constructors, some raise what Python does: for `!!int x`, a 13th month
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{place} is not YAML: {reason}") from error


def _as_written(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _as_written(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    return [_as_written(one) for one in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises OSError; ValueError as `load_yaml`, or as `read_text`."""
    return load_yaml(read_text(path, 4 * _LARGEST_YAML), str(path))[0]


def read_npy(path: Path, *, mode: Any = None) -> np.ndarray:
    """The numbers of an .npy file, which the file is large enough for.

    Args:
        path: of the file.
        mode: "r" or "r+": mapped into memory, for reading or for both; None: read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; names the file.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](file)
            if dtype.kind not in "biuf" or not all(type(side) is int and side >= 0 for side in shape):
                raise ValueError(f"an array of {dtype} {shape}")
            needed, there = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
            if needed > there:
                raise ValueError(f"it has {there} bytes of an array that takes {needed}")
        return np.load(path, mmap_mode=mode)
    except OSError:
        raise
    except Exception as error:  # its header is Python, whose parser can raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or not an .npy file: {reason}") from error
