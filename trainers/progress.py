"""The progress bar of everything that takes longer than two seconds."""

import sys
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

__all__ = ["progress"]


def progress(accelerator: Accelerator, label: str, iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar on the main process, shown after two seconds; into a file or pipe it writes a line every 10 s at most."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    hidden = not accelerator.is_main_process
    return tqdm(iterable, label, delay=2, mininterval=interval, dynamic_ncols=True, disable=hidden, **options)
