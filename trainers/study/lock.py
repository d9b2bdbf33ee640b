"""One run, one call: a lock that the kernel gives back when its holder ends, however it ends."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

__all__ = ["holder", "take_lock"]


def take_lock(path: Path) -> IO[str] | None:
    """Lock a file, which is made where it is missing, and stays.

    Returns:
        the open file, whose closing gives the lock back; None while another call holds it.

    Raises:
        ValueError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")  # NFS locks only what is open for writing
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:
        file.close()
        raise ValueError(
            f"{path} cannot be locked ({error.strerror}), so nothing would keep two calls out of one run: "
            "name a folder on a file system with locks"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def holder(path: Path) -> str:
    """Who has locked a file, in words; empty where that is not known."""
    return path.read_text("utf-8").strip() if path.exists() else ""
