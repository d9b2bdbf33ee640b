"""Files and folders that are whole or not there: whoever is killed, or fails, while writing leaves what was before."""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import uuid4

__all__ = ["Appended", "build_once", "file_digest", "new_folder", "remove_litter", "unwritable", "write_atomically"]

_LITTER = re.compile(r"\..+\.[0-9a-f]{32}")  # `.NAME.HEX`, as parts of files and folders that are being made are called


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
    named = OSError(reason if reason.startswith(f"{path} cannot be written") else f"{path} cannot be written: {reason}")
    named.errno = error.errno
    return named


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


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a new folder and move it to `target` whole; where another process was faster, keep its folder.

    Raises:
        FileExistsError: `target` was there before, and is not an empty folder.
    """
    if target.exists() and not _is_empty_folder(target):
        raise FileExistsError(f"{target} is already there")
    with new_folder(target.parent, target.name) as scratch:
        made = scratch / target.name  # a folder below, because the scratch folder is private (mode 0700)
        made.mkdir()
        build(made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir() or _is_empty_folder(target):
                raise


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digits of a checksum of a file's content: of SHA-256, or of another algorithm of hashlib.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
