"""How far everything is that takes longer than a few seconds."""

import os
import sys
import time
from collections.abc import Iterable
from threading import RLock
from typing import Any

from tqdm import tqdm

__all__ = ["progress"]

_DELAY, _LINES_EVERY = 2.0, 10.0  # seconds

tqdm.set_lock(RLock())  # its own is one of processes too: a semaphore in /dev/shm, which a kill leaves behind


def progress(label: str, iterable: Iterable[Any] | None = None, *, hidden: bool = False, **options: Any) -> tqdm:
    """A bar on a terminal, after two seconds; into a file or pipe a whole line every ten seconds, and one at the end.

    Args:
        label: what goes on.
        iterable: what is gone through; otherwise `update` counts.
        hidden: show nothing; as the processes of a launcher do, but for the first, and with TQDM_DISABLE set.
        options: of tqdm, such as total and unit.
    """
    hidden = hidden or os.environ.get("RANK", "0") != "0" or os.environ.get("TQDM_DISABLE", "0") != "0"
    if sys.stderr.isatty():
        return tqdm(iterable, label, delay=_DELAY, dynamic_ncols=True, disable=hidden, **options)
    return _Lines(iterable, label, delay=_LINES_EVERY, mininterval=_LINES_EVERY, ncols=100, disable=hidden, **options)


class _Lines(tqdm):
    """Its state as lines that end."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, if it is time for one; a new label or postfix alone is not worth one."""
        del msg, pos
        now = time.time()
        if self.disable or now - getattr(self, "written", getattr(self, "start_t", now)) >= self.mininterval:
            self.written = now
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        """Write the last line, if it took long enough for one."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue]
        if time.time() >= self.start_t + self.delay:
            self.display()
