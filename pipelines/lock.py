"""One writer a folder, one call a run: locks that the kernel gives back when their holder ends, however it ends."""

import contextlib
import fcntl
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

__all__ = ["FolderLock", "Unlockable", "holder", "only_writer", "take_lock"]


class Unlockable(ValueError):
    """The file system has no locks."""


def take_lock(path: Path) -> IO[str] | None:
    """Lock a file, which is made where it is missing, and stays; who holds it is written into it.

    Returns:
        the open file, whose closing gives the lock back; None while another call holds it.

    Raises:
        Unlockable: the file system has no locks.
        OSError: the file cannot be made.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")  # NFS locks only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError as error:
            file.close()
            raise Unlockable(
                f"{path} cannot be locked ({error.strerror}), so nothing would keep two calls out of one run: "
                "name a folder on a file system with locks"
            ) from error
        if _is_of(file, path):  # else its last holder has removed it since it was opened
            break
        file.close()
    with contextlib.suppress(OSError):  # a full disk: it is locked all the same
        words = " ".join(shlex.join(sys.argv).split())[:500]
        os.ftruncate(file.fileno(), 0)
        who = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S} ({words})\n"
        os.write(file.fileno(), who.encode(errors="replace"))  # past Python's buffer, which closing would write again
    return file


def holder(path: Path) -> str:
    """Who has locked a file, in words; empty where that is not known."""
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _is_of(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one that lies at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


class FolderLock:
    """What keeps other calls from writing where this one writes.

    Args:
        path: of the file that is locked.
        file: the same, open; None where the file system has no locks.
    """

    def __init__(self, path: Path, file: IO[str] | None) -> None:
        self.path, self._file = path, file

    def check(self) -> None:
        """Raises OSError: the folder was removed, or replaced, since it was locked."""
        if self._file is not None and not _is_of(self._file, self.path):
            raise OSError(
                f"{self.path.parent} was removed or replaced while this call wrote into it ({self.path.name} is gone): "
                "what it would write now would be a part of a run; start it again"
            )


@contextlib.contextmanager
def only_writer(path: Path, option: str) -> Iterator[FolderLock]:
    """Hold the lock of what is written; in the end its file goes, and so do empty folders that were made for it.

    Args:
        path: of the file that is locked, beside or in what is written.
        option: that names what is written, with its value; for messages.

    Raises:
        ValueError: another call writes there; names it.
        OSError: the file cannot be made.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    file = None
    try:
        try:
            file = take_lock(path)
            if file is None:
                other = holder(path) or "another process"
                raise ValueError(f"{option} is being written by {other}: wait for its end, or name another place")
        except Unlockable as error:
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
            warnings.warn(
                f"{path.parent} is on a file system without locks ({reason}): nothing keeps another call from writing "
                "there at the same time",
                stacklevel=4,
            )
            path.unlink(missing_ok=True)
        yield FolderLock(path, file)
    finally:
        if file is not None:
            if _is_of(file, path):
                path.unlink()
            file.close()
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
