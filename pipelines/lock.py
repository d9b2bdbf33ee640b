"""One writer a folder, one call a run: locks that the kernel gives back when their holder ends, however it ends. On a
file system without locks, leases in their place, which their holder shows to be alive."""

import contextlib
import errno
import fcntl
import itertools
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

__all__ = ["FolderLock", "Lease", "Unlockable", "holder", "is_held", "only_writer", "take_lock"]

#: seconds from one sign of life of a lease's holder to the next; the same on all machines
HEARTBEAT = 20.0
_DEAD = 3  # heartbeats without a sign of life
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class Unlockable(ValueError):
    """The file system has no locks."""


def take_lock(path: Path, lost: Callable[[str], object] = lambda _: None) -> "IO[str] | Lease | None":
    """Lock a file, which is made where it is missing, and stays; who holds it is written into it. On a file system
    without locks a lease is taken in its place.

    Args:
        path: of the file.
        lost: called, with the reason in words, by a thread, once another call may have taken the lease for dead: this
            one must not write any more.

    Returns:
        what gives the lock back when it is closed; None while another call holds it.

    Raises:
        Unlockable: the file system has neither locks nor hard links.
        OSError: the file cannot be made.
    """
    try:
        return _lock(path)
    except Unlockable as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _NO_LOCKS:
            raise
    return _take_lease(_lease_path(path), lost)


def _lock(path: Path) -> IO[str] | None:
    """`take_lock` where there are locks; else Unlockable is raised."""
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
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), _this_process())  # past Python's buffer, which closing would write again
    return file


def _this_process() -> bytes:
    words = " ".join(shlex.join(sys.argv).split())[:500]
    who = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S} ({words})\n"
    return who.encode(errors="replace")


def holder(path: Path) -> str:
    """Who has locked a file, in words; empty where that is not known."""
    if lease := _read(_lease_path(path)):
        return lease.partition(b"\n")[2].decode(errors="replace").strip()
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def is_held(path: Path) -> bool:
    """Whether a call holds the lock of a file, or its lease, whose holder may have ended less than three heartbeats
    ago."""
    if _read(_lease_path(path)):
        return True
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # there is none, or none can be
        return False
    return False


# ---------------------------------------------------------------------------------------------------------- leases


class Lease:
    """A lock on a file system that has none: a file, linked to its place in one step, into which its holder writes a
    number every heartbeat. Whoever sees the same number for three heartbeats, by its own monotonic clock, may take it:
    no clock of one machine is compared with that of another.

    Args:
        path: of the lease.
        file: the same, open.
        token: that this lease alone has.
        lost: as of `take_lock`.
    """

    def __init__(self, path: Path, file: IO[bytes], token: str, lost: Callable[[str], object]) -> None:
        self._path, self._file, self._token, self._lost = path, file, token, lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="dalikd-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give it back, unless another call has taken it."""
        self._over.set()
        self._thread.join()
        self._file.close()
        with contextlib.suppress(OSError):
            _change(self._path, self._token, self._path.unlink)

    def _live(self) -> None:
        beat, last = 0, time.monotonic()
        while not self._over.wait(HEARTBEAT):
            beat += 1
            with contextlib.suppress(OSError):  # a network that is away for a moment
                os.pwrite(self._file.fileno(), b"%010d" % beat, 0)  # through the open file: into no other call's lease
                os.fsync(self._file.fileno())
                if not _is_of(self._file, self._path):
                    self._lost(f"{self._path} was taken by {holder(self._path.with_suffix('')) or 'another call'}")
                    return
                last = time.monotonic()
            if time.monotonic() - last > (_DEAD - 1) * HEARTBEAT:
                self._lost(f"{self._path} could not be written for {time.monotonic() - last:.0f} s")
                return


def _lease_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lease")


def _take_lease(path: Path, lost: Callable[[str], object]) -> Lease | None:
    """The lease, if nobody has one, or nobody alive."""
    there = _read(path)
    if there is not None and not _is_silent(path, there):
        return None
    token = uuid4().hex
    own = path.with_name(f".{path.name}.{token}")
    try:
        file = own.open("x+b", buffering=0)
        file.write(b"%010d %s\n%s" % (0, token.encode(), _this_process()))
        os.fsync(file.fileno())
        if there is not None:
            won = _change(path, _token(there), lambda: own.replace(path))
        else:
            with contextlib.suppress(FileExistsError):  # another was quicker, or the answer was lost on its way
                os.link(own, path)
            won = _is_of(file, path)
    except OSError as error:
        if error.errno in _NO_LOCKS | {errno.EPERM}:
            raise Unlockable(
                f"{path.parent} is on a file system with neither locks nor hard links ({error.strerror}), so nothing "
                "would keep two calls out of one run: name another folder"
            ) from error
        raise
    finally:
        own.unlink(missing_ok=True)
    if won:
        return Lease(path, file, token, lost)
    file.close()
    return None


def _change(path: Path, token: str, change: Callable[[], object]) -> bool:
    """Replace or remove the lease with a token, unless somebody else does: that is for whoever makes a file that is
    named after it, of which there is one. Returns whether it was done."""
    claims: list[Path] = []
    for number in itertools.count():
        claims.append(path.with_name(f".{path.name}.{token}.{number}"))
        try:
            claims[-1].open("xb").close()
            break
        except FileExistsError:
            if not _is_silent(claims[-1], b""):  # else its maker was killed before it could do it
                return False
    # a claim goes after its lease has changed: if the lease is still there now, nobody but this call may change it
    there = _read(path)
    if mine := there is not None and _token(there) == token:
        change()
    for claim in claims:
        claim.unlink(missing_ok=True)
        _seen.pop(claim, None)
    return mine


_seen: dict[Path, tuple[bytes, float]] = {}  # what this process has read, and when it has read that for the first time


def _is_silent(path: Path, content: bytes) -> bool:
    """Whether a file has stayed as it is for so long that whoever should write into it is gone."""
    now = time.monotonic()
    before, since = _seen.get(path, (None, now))
    if before != content:
        _seen[path] = content, now
        return False
    return now - since > _DEAD * HEARTBEAT


def _token(lease: bytes) -> str:
    return lease.partition(b"\n")[0].partition(b" ")[2].decode(errors="replace")


def _read(path: Path) -> bytes | None:
    """The content of a lease; None: there is none. It is opened anew each time: a file system in the network then asks
    its server for it."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------- folders


def _is_of(file: IO[Any], path: Path) -> bool:
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
            file = _lock(path)
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
        if file is None and path.exists():  # a signal may have come as it was made
            with contextlib.suppress(OSError, Unlockable):
                file = _lock(path)
        if file is not None:
            if _is_of(file, path):
                path.unlink()
            file.close()
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
