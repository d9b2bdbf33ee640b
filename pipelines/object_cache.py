"""Objects kept on a local disk, a file each, by any number of processes at once.

A file is named by what it holds, bucket, key, size and ETag, so that an object which has changed is another file; it
ends in a checksum, and comes into its place whole. When the folder has its size, those go first that were used the
longest time ago, but none that was used since this process began: orders are random, and of a data set larger than the
cache each image would otherwise go before its turn comes again. So what fits stays, and the rest is fetched each epoch.
"""

import contextlib
import hashlib
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from dalikd.pipelines.files import remove_litter, write_atomically

__all__ = ["ObjectCache", "open_cache"]

_CHECKSUM = struct.Struct("<I")
_FOLDERS = 256
_SHARE = 20  # the folder is counted again whenever this process has added the 20th part of its size
_ROOM = 0.95  # of its size that is left after files had to go
_DISK = 0.9  # of a disk's free room that is taken where no size is given


class ObjectCache:
    """A folder of objects.

    Args:
        folder: is made where it is missing.
        size: bytes that it may have; None: what it has and nine tenths of what is free on its disk.

    Raises:
        OSError: nothing can be written there; names the folder.
    """

    def __init__(self, folder: str, size: int | None) -> None:
        self.folder, self._size = Path(folder), size
        self._began = time.time()
        self._processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # each adds about as much
        self._lock = threading.Lock()
        self._counted: int | None = None  # bytes; None: not yet
        self._added = 0  # by this process since
        self._counting = False
        self._wanted = 0  # bytes of the largest object that there was no room for
        self._fresh = False  # whether all that is there was used since this process began
        self._stopped = ""  # why nothing is kept any more
        try:
            write_atomically(self.folder / ".probe", b"dalikd keeps objects here\n", sync=False)
        except OSError as error:
            raise OSError(f"--data.cache {folder}: {error}; free the disk, or name another folder") from None
        self._count_soon()

    def read(self, url: str, size: int, tag: int) -> bytes | None:
        """An object; None where it is not kept, or damaged."""
        path = self._path(url, size, tag)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            content = os.read(descriptor, size + _CHECKSUM.size + 1)
            while len(content) < size + _CHECKSUM.size and (more := os.read(descriptor, size)):  # 2 GiB at a time
                content += more
            if os.fstat(descriptor).st_mtime < self._began:
                with contextlib.suppress(OSError):  # another user's file
                    os.utime(descriptor)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        body, end = content[:size], content[size:]
        return body if end == _CHECKSUM.pack(zlib.crc32(body)) else None

    def keep(self, url: str, size: int, tag: int, content: bytes) -> None:
        """Write an object, if there is room."""
        whole = size + _CHECKSUM.size
        with self._lock:
            if self._stopped:
                return
            if self._size is not None and self._counted is not None:
                estimate = self._counted + self._processes * self._added + whole
                if estimate > self._size:
                    self._wanted = max(self._wanted, whole)
                if (estimate > self._size and not self._fresh) or self._added > self._size // _SHARE:
                    self._count_soon()
                if estimate > self._size:
                    return
            self._added += whole
        try:
            write_atomically(
                Path(self._path(url, size, tag)), content + _CHECKSUM.pack(zlib.crc32(content)), sync=False
            )
        except OSError as error:  # a full disk, a quota: the images come from the store all the same
            self._stop(f"{error}: nothing more is kept there")

    def _path(self, url: str, size: int, tag: int) -> str:
        name = hashlib.blake2b(f"{url}\0{size}\0{tag}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return f"{self.folder}/{name[:2]}/{name[2:]}"

    def _stop(self, why: str) -> None:
        with self._lock:
            first, self._stopped = not self._stopped, why
        if first:
            print(f"dalikd: --data.cache: {why}", flush=True)

    def _count_soon(self) -> None:
        if not self._counting:
            self._counting = True
            threading.Thread(target=self._count, name="dalikd-cache", daemon=True).start()

    def _count(self) -> None:
        """Count what is there, and let the oldest go where it is too much. A million files take some seconds."""
        try:
            files = sorted(self._files())
            held = sum(size for _, size, _ in files)
            size = self._size
            if size is None:
                size = held + int(_DISK * shutil.disk_usage(self.folder).free)
            most, fresh = _ROOM * size - self._wanted, False
            for used, bytes_of, path in files:
                fresh = used >= self._began
                if held <= (size if fresh else most):  # other processes may have filled it beyond its size
                    break
                with contextlib.suppress(OSError):  # another process was quicker
                    os.unlink(path)  # noqa: PTH108 - one of a million
                held -= bytes_of
            with self._lock:
                self._size, self._counted, self._added, self._fresh = size, held, 0, fresh
        except OSError as error:
            self._stop(f"{self.folder} cannot be read: {error.strerror}: nothing more is kept there")
        finally:
            self._counting = False

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """When each was last used, its size and its path."""
        for number in range(_FOLDERS):
            folder = self.folder / f"{number:02x}"
            remove_litter(folder)
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # gone
                        status = entry.stat()
                        yield status.st_mtime, status.st_size, entry.path


@lru_cache
def open_cache(folder: str, size: int | None) -> ObjectCache:
    """One for all stores of a process."""
    return ObjectCache(os.path.realpath(os.path.expanduser(folder)), size)  # noqa: PTH111 - as a text
