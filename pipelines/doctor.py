"""Names the files that cannot be decoded: by what they hold, else by asking DALI about each image alone.

DALI's error for a bad file often does not say which one it was.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from dalikd.pipelines.augment import View
from dalikd.pipelines.content import refusal, why_damaged
from dalikd.pipelines.sources import Source

__all__ = ["BadFile", "Decoder", "dali_words", "find_bad_files", "is_decode_failure", "printable"]

_EACH_THREAD = 2  # images at once


class BadFile(NamedTuple):
    """A file that cannot be decoded: its `row` in the source, its `path` to print, and the `reason` in one line."""

    row: int
    path: str
    reason: str


def printable(text: str) -> str:
    """A text that any output takes: bytes of a file name that are no UTF-8 are written as \\xNN."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def find_bad_files(
    source: Source,
    rows: Iterable[int],
    *,
    device: torch.device | None = None,
    threads: int = 1,
    done: Callable[[int], object] = lambda count: None,  # noqa: ARG005 - named for its callers
) -> list[BadFile]:
    """Decode the files of `rows` completely, as training does, and return those that fail, in the order of `rows`.

    Args:
        source: the images. Those in memory are never bad.
        rows: of them.
        device: that decodes; None: the CPU.
        threads: that read and decode.
        done: called with the number of files that were looked at since its last call.
    """
    if source.arrays is not None:
        return []
    listed, bad = [int(row) for row in rows], []
    decoder = Decoder(threads, device)
    parts = [listed[first : first + decoder.at_once] for first in range(0, len(listed), decoder.at_once)]
    with ThreadPoolExecutor(threads, thread_name_prefix="dalikd-check") as pool:
        reading = pool.map(partial(_read, source), listed[: decoder.at_once])
        for part, following in pairwise([*parts, []]):
            contents = list(reading)
            reading = pool.map(partial(_read, source), following)  # while these are decoded
            reasons = zip(part, _reasons(contents, decoder), strict=True)
            bad += [BadFile(row, printable(source.path(row)), why) for row, why in reasons if why is not None]
            done(len(part))
    return bad


def _read(source: Source, row: int) -> bytes | str:
    """The encoded image, or why there is none."""
    try:
        return source.read(row)
    except FileNotFoundError as error:
        return "the file is missing" + str(error).partition(" is missing")[2]
    except OSError as error:
        return f"the file cannot be read: {error.strerror or type(error).__name__}"
    except ValueError as error:  # a damaged container; it says where
        return printable(str(error))


def _reasons(contents: Sequence[bytes | str], decoder: "Decoder") -> list[str | None]:
    """Why each image is bad; None for a good one."""
    reasons = [content if isinstance(content, str) else refusal(content) for content in contents]
    left = [place for place, reason in enumerate(reasons) if reason is None]
    encoded = [content for content, reason in zip(contents, reasons, strict=True) if reason is None]
    for place, pixels in zip(left, decoder.decode(encoded), strict=True):  # type: ignore[arg-type]
        if pixels is None:
            reasons[place] = why_damaged(contents[place])  # type: ignore[arg-type]
    return reasons


class Decoder:
    """Decodes whole images with the operators that training decodes with.

    Args:
        threads: DALI's.
        device: that decodes; None: the CPU.

    Attributes:
        at_once: the images of a call that keep all threads busy; whole, they are large.
    """

    def __init__(self, threads: int, device: torch.device | None = None) -> None:
        self._threads, self.at_once = threads, _EACH_THREAD * threads
        self._device_id = (device.index or 0) if device is not None and device.type == "cuda" else None
        self._graph: Any = None
        self._encoded: list[np.ndarray] = []

    def decode(self, encoded: Sequence[bytes]) -> list[np.ndarray | None]:
        """Pixels of each image, uint8 [H, W, 3]; None for one that DALI fails on.

        Raises:
            RuntimeError: the GPU fails.
        """
        if not encoded:
            return []
        try:
            return self._run(encoded)
        except RuntimeError as error:
            self._graph = None
            if not is_decode_failure(error):
                raise
            return [None] if len(encoded) == 1 else [pixels for one in encoded for pixels in self.decode([one])]

    def _run(self, encoded: Sequence[bytes]) -> list[np.ndarray | None]:
        from dalikd.pipelines.graphs import build_graph

        self._encoded = [np.frombuffer(content, np.uint8) for content in encoded]
        if self._graph is None:
            self._graph = build_graph(
                lambda _: (self._encoded,),
                View(1, "whole"),
                reader="bytes",
                batch_size=max(len(encoded), self.at_once),
                threads=self._threads,
                device_id=self._device_id,
                prefetch=1,  # no batch is asked for before its images are there
                mend_cmyk=True,
            )
        images, *_ = self._graph.run()
        images = images.as_cpu()
        return [np.asarray(images[place]) for place in range(len(encoded))]


def is_decode_failure(error: RuntimeError) -> bool:
    """Whether DALI failed on what it was given, rather than for lack of a GPU's memory or another fault of the GPU."""
    text = str(error)
    return "in pipeline" in text and not re.search(r"CUDA (runtime|driver|allocation)|cudaError|CUDABadAlloc", text)


def dali_words(error: RuntimeError) -> str:
    """What DALI says in one line, without the lines of its graph and of its own code."""
    text = str(error).rpartition("encountered:")[2].partition("C++ context")[0].partition("Current pipeline")[0]
    return " ".join(text.split())[:300]
