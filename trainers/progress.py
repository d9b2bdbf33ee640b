"""The progress bar of a run: one process shows it."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from dalikd.pipelines.progress import progress as progress_bar

__all__ = ["progress"]


def progress(accelerator: Accelerator, label: str, iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """As `dalikd.pipelines.progress`, on the main process."""
    return progress_bar(label, iterable, hidden=not accelerator.is_main_process, **options)
