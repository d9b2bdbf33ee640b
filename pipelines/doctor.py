"""Names the files that cannot be decoded: by what they hold, else by asking DALI about each image alone.

DALI's error for a bad file often does not say which one it was. Damaged JPEG 2000 and TIFF images can end the process
that decodes them: a process of their own does it, which imports this file, so that torch is no part of it.
"""

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from dalikd.pipelines.content import MAX_PIXELS, goes_apart, lacks_end, refusal, why_damaged
from dalikd.pipelines.datasets.file_list import FileRecord
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.hardware import PLAIN, Decoding, dali_words, is_decode_failure

if TYPE_CHECKING:
    import torch

    from dalikd.pipelines.sources import Source

__all__ = [
    "BadFile",
    "Child",
    "Decoder",
    "answer_questions",
    "decode_windows",
    "find_bad_files",
    "known_bad_files",
    "printable",
    "serve",
    "why_unreadable",
]

_EACH_THREAD = 2  # images at once
_LONGEST = 120  # s, for so many images


class BadFile(NamedTuple):
    """A file that cannot be decoded: its `row` in the source, its `path` to print, and the `reason` in one line."""

    row: int
    path: str
    reason: str


def printable(text: str) -> str:
    """A text that any output takes: bytes of a file name that are no UTF-8 are written as \\xNN."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def find_bad_files(
    source: "Source",
    rows: Iterable[int],
    *,
    device: "torch.device | None" = None,
    decoding: Decoding = PLAIN,
    threads: int = 1,
    done: Callable[[int], object] = lambda count: None,  # noqa: ARG005 - named for its callers
) -> list[BadFile]:
    """Decode the files of `rows` completely, as training does, and return those that fail, in the order of `rows`.

    Args:
        source: the images. Those in memory are never bad.
        rows: of them.
        device: that decodes; None: the CPU.
        decoding: how a GPU does.
        threads: that read and decode.
        done: called with the number of files that were looked at since its last call.

    Raises:
        RuntimeError: as `Decoder.decode`.
    """
    if source.arrays is not None:
        return []
    listed, bad = [int(row) for row in rows], []
    decoder = Decoder(threads, device, decoding, source.max_pixels)
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


def known_bad_files(source: "Source") -> list[BadFile]:
    """The files of a source that `dalikd doctor` could not decode and that have not changed since."""
    if source.arrays is not None:
        return []
    record = FileRecord.read(source.record_folder, faulty=True)
    places = {name: place for place, name in enumerate(record.names)}
    names = source.encoded.names() if places else ()
    found = [(row, places[name]) for row, name in enumerate(names) if name in places]
    bad = []
    for row, place in found:
        entry = record.entries[place]
        with contextlib.suppress(OSError):  # it is gone: the run meets that where it reads
            if source.stamp(row) == (entry["bytes"], entry["mtime_ns"]):
                bad.append(BadFile(row, printable(source.path(row)), record.words[entry["fault"]]))
    return bad


def _read(source: "Source", row: int) -> bytes | str:
    """The encoded image, or why there is none."""
    try:
        return source.read(row)
    except ConnectionError:  # a store fails, not the object
        raise
    except (OSError, ValueError) as error:
        return why_unreadable(error)


def why_unreadable(error: OSError | ValueError) -> str:
    """In one line why there is no encoded image."""
    if isinstance(error, FileNotFoundError):
        return "the file is missing" + str(error).partition(" is missing")[2]
    if isinstance(error, OSError):
        return f"the file cannot be read: {error.strerror or type(error).__name__}"
    return printable(str(error))  # a damaged shard; it says where


def _reasons(contents: Sequence[bytes | str], decoder: "Decoder") -> list[str | None]:
    """Why each image is bad; None for a good one."""
    decoded = iter(decoder.decode([content for content in contents if isinstance(content, bytes)]))
    answers = [content if isinstance(content, str) else next(decoded) for content in contents]
    return [answer if isinstance(answer, str) else None for answer in answers]


class Decoder:
    """Decodes whole images with the operators that training decodes with.

    Args:
        threads: DALI's.
        device: that decodes; None: the CPU.
        decoding: how a GPU does.
        max_pixels: of an image; larger ones are not decoded.
        at_once: the most images of a call; default: so many that all threads are busy, since whole they are large.
    """

    def __init__(
        self,
        threads: int,
        device: "torch.device | None" = None,
        decoding: Decoding = PLAIN,
        max_pixels: int = MAX_PIXELS,
        at_once: int | None = None,
    ) -> None:
        device_id = (device.index or 0) if device is not None and device.type == "cuda" else None
        self.at_once = at_once or _EACH_THREAD * threads
        self._max_pixels = max_pixels
        how = decoding, self.at_once, max_pixels
        self._here = _Dali(threads, device_id, *how, apart=False)
        self._on_cpu = self._here if device_id is None else _Dali(threads, None, *how, apart=False)
        self._apart = _Apart(threads, device_id, *how)

    def decode(self, encoded: Sequence[bytes]) -> list[np.ndarray | str]:
        """Pixels of each image, uint8 [H, W, 3], or why there are none: its header is refused, DALI fails on it, or it
        is a JPEG 2000 image that DALI decodes otherwise than Pillow.

        Raises:
            RuntimeError: the GPU fails, or the process that decodes JPEG 2000 and TIFF images cannot work.
        """
        answers: list[Any] = [refusal(content, self._max_pixels) for content in encoded]
        decoders = [
            self._decoder_of(content) if reason is None else None
            for content, reason in zip(encoded, answers, strict=True)
        ]
        for decoder in {self._here, self._on_cpu, self._apart}:
            places = [place for place, own in enumerate(decoders) if own is decoder]
            for place, answer in zip(places, decoder.decode([encoded[place] for place in places]), strict=True):
                answers[place] = answer
        return answers

    def _decoder_of(self, content: bytes) -> "_Dali | _Apart":
        """Of an image. nvJPEG may decode a JPEG that is cut off to grey without a word: such are for the CPU."""
        return self._apart if goes_apart(content) is not None else self._on_cpu if lacks_end(content) else self._here

    def close(self) -> None:
        """End the process that decodes JPEG 2000 and TIFF images. The next one starts another."""
        self._apart.close()


class _Dali:
    """A graph that decodes in this process; of JPEG 2000 and TIFF all or none."""

    def __init__(
        self, threads: int, device_id: int | None, decoding: Decoding, at_once: int, max_pixels: int, *, apart: bool
    ) -> None:
        self._threads, self._device_id, self._decoding, self._apart = threads, device_id, decoding, apart
        self._at_once, self._max_pixels = at_once, max_pixels
        self._graph: Any = None
        self._batch: tuple[Any, ...] = ()

    def decode(self, encoded: Sequence[bytes]) -> list[np.ndarray | str]:
        if not encoded:
            return []
        try:
            return self._run(encoded)
        except RuntimeError as error:
            self._graph = None
            if not is_decode_failure(error):
                raise
            if len(encoded) == 1:
                return [why_damaged(encoded[0])]
            return [answer for one in encoded for answer in self.decode([one])]

    def _run(self, encoded: Sequence[bytes]) -> list[np.ndarray | str]:
        from dalikd.pipelines.graphs import build_graph

        self._batch = ([np.frombuffer(content, np.uint8) for content in encoded],)
        if self._apart:
            self._batch += (np.ones(len(encoded), np.uint8),)
        if self._graph is None:
            self._graph = build_graph(
                lambda _: self._batch,
                View(1, "whole"),
                reader="bytes",
                batch_size=self._at_once,
                threads=self._threads,
                device_id=self._device_id,
                prefetch=1,  # no batch is asked for before its images are there
                decoding=self._decoding,
                mend_cmyk=True,
                apart=self._apart,
                max_pixels=self._max_pixels,
            )
        images, *_ = self._graph.run()
        images = images.as_cpu()
        return [np.asarray(images[place]) for place in range(len(encoded))]


def decode_windows(device_id: int | None, hw_decoder_load: float) -> None:
    """Decode windows of a JPEG, and the whole of it; exit with a line on stderr if that fails or the pixels are others
    than Pillow's. Where nvImageCodec is broken this ends the process."""
    from dalikd.pipelines.graphs import build_graph

    y, x = np.mgrid[:375, :500]
    image = np.stack([x / 2, y / 2, 127 + 100 * np.sin(x / 40) * np.cos(y / 30)], 2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    windows = np.array([(0, 0, 375, 500), (17, 33, 200, 301), (120, 7, 255, 96), (301, 402, 74, 98)] * 2)
    start, shape = windows[:, :2].astype(np.float32), windows[:, 2:].astype(np.float32)
    inputs = ([np.frombuffer(buffer.getvalue(), np.uint8)] * len(windows), start, shape)
    graph = build_graph(
        lambda _: inputs,
        View(1, "window"),
        reader="bytes",
        batch_size=len(windows),
        threads=1,
        device_id=device_id,
        prefetch=1,
        decoding=Decoding(hw_decoder_load),
    )
    try:
        decoded = graph.run()[0].as_cpu()
    except RuntimeError as error:
        sys.exit(dali_words(error))
    expected = np.asarray(Image.open(buffer), np.int16)
    for number, (top, left, height, width) in enumerate(windows):
        pixels = np.asarray(decoded[number])
        if pixels.shape[:2] != (height, width):
            sys.exit(f"a window of {height} x {width} pixels came out as {pixels.shape[0]} x {pixels.shape[1]}")
        if np.abs(expected[top : top + height, left : left + width] - pixels).mean() > 4:
            sys.exit("its pixels are others than Pillow's")


# ----------------------------------------------------------------------------------- JPEG 2000 and TIFF


class _Apart:
    """Decodes JPEG 2000 and TIFF images in a process of its own, which damaged ones can end."""

    def __init__(self, threads: int, device_id: int | None, decoding: Decoding, at_once: int, max_pixels: int) -> None:
        self._code = (
            "from dalikd.pipelines.doctor import serve; "
            f"serve({threads}, {device_id}, {at_once}, {max_pixels}, *{tuple(decoding)})"
        )
        self._child: Child | None = None

    def decode(self, encoded: Sequence[bytes]) -> list[np.ndarray | str]:
        if not encoded:
            return []
        child, self._child = self._child or Child(self._code), None
        answers = child.ask(encoded, _LONGEST)
        if not isinstance(answers, str):
            self._child = child  # one that was interrupted is not asked again
            return answers
        if len(encoded) == 1:
            return [f"this {goes_apart(encoded[0])} ends the process that decodes it ({answers}), as damaged ones do"]
        return [answer for one in encoded for answer in self.decode([one])]

    def close(self) -> None:
        self._child = None


class Child:
    """A Python process that answers what comes to its stdin, pickled, on its stdout; it ends with this object.

    Args:
        code: that it runs. It finds modules where this process finds them.
    """

    def __init__(self, code: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._end = weakref.finalize(self, _end, self._process, self._errors)

    def ask(self, question: Any, seconds: float | None = None) -> Any:
        """Its answer, which is no text; or the name of the signal that it has died by. One that takes longer than these
        seconds is killed.

        Raises:
            RuntimeError: it has failed for a reason of its own.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        late = threading.Timer(seconds or threading.TIMEOUT_MAX, self._process.kill)
        late.start()
        try:
            pickle.dump(question, stdin)
            stdin.flush()
            return pickle.load(stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
        finally:
            late.cancel()
        if code < 0:
            return signal.Signals(-code).name
        self._errors.seek(0)
        words = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"a process that decodes images has failed: {words}")

    def kill(self) -> None:
        """Whoever waits for an answer then gets SIGKILL."""
        self._process.kill()


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    process.kill()
    process.communicate()
    errors.close()


def answer_questions(answer: Callable[[Any], Any]) -> None:
    """What a `Child` runs: answers until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    Image.MAX_IMAGE_PIXELS = None
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer(question), answers)
        answers.flush()


def serve(threads: int, device_id: int | None, at_once: int, max_pixels: int, *decoding: Any) -> None:
    """That process: of each list of images what `Decoder.decode` says of them."""
    dali = _Dali(threads, device_id, Decoding(*decoding), at_once, max_pixels, apart=True)
    with ThreadPoolExecutor(threads) as pool:
        answer_questions(lambda encoded: list(pool.map(_compare, encoded, dali.decode(encoded))))


def _compare(encoded: bytes, answer: np.ndarray | str) -> np.ndarray | str:
    """The pixels that DALI has made; of JPEG 2000 if Pillow makes the same, to within rounding."""
    if isinstance(answer, str) or goes_apart(encoded) != "JPEG 2000":
        return answer
    try:
        image = Image.open(io.BytesIO(encoded), formats=["JPEG2000"])
        deep = image.mode.startswith("I;16")  # whose convert("RGB") makes all levels above 255 white
        pixels = np.asarray(image)[..., None] / 257 if deep else np.asarray(image.convert("RGB"), np.int16)
    except Exception:  # it has many for damaged files
        return "Pillow fails on this JPEG 2000: it is damaged, or of a rare kind"
    if pixels.shape[:2] != answer.shape[:2] or np.abs(pixels - answer).max() > 1:
        return f"DALI decodes this JPEG 2000 ({image.mode}) to other pixels than Pillow; save it as PNG or JPEG"
    return answer
