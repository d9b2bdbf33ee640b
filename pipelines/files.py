"""Files and folders that are whole or not there: whoever is killed, or fails, while writing leaves what was before."""

import contextlib
import errno
import hashlib
import os
import queue
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

__all__ = ["build_once", "file_digest", "read_within", "write_atomically"]


def write_atomically(path: Path, write: bytes | Callable[[BinaryIO], object], *, sync: bool = True) -> None:
    """Write a file beside its place and move it there in one step; its folder is made if it is missing.

    Several may write the same file at once: it then holds what one of them has written. It gets the permissions that
    the umask gives to every new file.

    Args:
        path: of the file; one that is there is replaced.
        write: its bytes, or what writes them to an open file.
        sync: wait until the disk has it, so that not even a power cut leaves less than a whole file. Not needed where
            the content has a checksum and can be made again.

    Raises:
        OSError: it cannot be written. The file of before stays, and nothing lies beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}")  # processes of several machines may have one number
    try:
        with part.open("xb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if sync:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Let the disk have the new name too, where the file system can do that for a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


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
