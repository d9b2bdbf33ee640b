"""Looks at every image of a source on all cores: what its header says, whether it can be decoded, what it hashes to.

Processes of their own read and decode: so all cores are used for small images too, and what a damaged image does to
the process that decodes it, the command outlives. Torch is no part of them.
"""

import errno
import hashlib
import os
import stat
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dalikd.pipelines.content import BYTES_A_PIXEL, Facts, facts_of
from dalikd.pipelines.datasets.file_list import ENTRY, NEVER, FileRecord
from dalikd.pipelines.doctor import Child, Decoder, answer_questions, why_unreadable
from dalikd.pipelines.progress import progress
from dalikd.pipelines.shards.read import ShardSet

if TYPE_CHECKING:
    from dalikd.pipelines.sources import Source

__all__ = ["Examination", "examine", "serve"]

_PART_IMAGES, _PART_BYTES = 1024, 64 << 20  # that a process is asked about at once: a second or two of work
_LEAST_IMAGES = 32  # of a part, where there are enough
_SPANS, _READ_TOGETHER, _READERS = 4, 32, 4  # of a part, one is read while the one before is decoded; by threads
_DECODED_IMAGES, _DECODED_PIXELS = 256, 16 << 20  # by DALI at once
_HERE = 256  # so few images are looked at in this process
_SAVE_SECONDS, _STOP_SECONDS = 60.0, 10.0
_NOTHING = Facts("", 0, 0, "")


class Part(NamedTuple):
    """Images that a process is asked about: the files at `paths`, or `rows` of the shards in `folder`."""

    paths: Sequence[bytes]
    folder: str
    rows: Sequence[int]
    hashing: bool
    decoding: bool
    max_pixels: int


class Look(NamedTuple):
    """What is found of one image. `stamp`: bytes and mtime in ns of its file; None where it cannot be read, which may
    change without a trace. `fault`: why it cannot be decoded, or nothing."""

    stamp: tuple[int, int] | None
    facts: Facts
    fault: str
    sha256: bytes


@dataclass
class Examination:
    """What is found of the N images of a source.

    Attributes:
        record: of all of them, by row.
        known: how many had been looked at before.
        seconds: that it took.
        spent: seconds of all processes, each by what they did: waiting for files, headers and hashes, decoding.
    """

    record: FileRecord
    known: int = 0
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("reading", "headers", "decoding"), 0.0))


# ---------------------------------------------------------------------------------------------- all of a source


def examine(
    source: "Source", crew: list[Child] | None = None, *, hashing: bool = False, processes: int | None = None
) -> Examination:
    """Look at every image that has changed since it was last looked at; of images in memory at what there is.

    What is found is remembered, also if this is interrupted, and by the way once a minute. Where that cannot be
    written a warning says so.

    Args:
        source: the images.
        crew: processes of an earlier call; those that are started are added to it.
        hashing: take the SHA-256 of each encoded image.
        processes: that read and decode; default: one a core.

    Raises:
        OSError: a process was killed.
        RuntimeError: a process has failed.
    """
    if source.arrays is not None:
        return _in_memory(source.arrays, hashing)
    started, folder = time.perf_counter(), source.record_folder
    names, stamps = source.encoded.names(), source.encoded.stamps()
    before = FileRecord.read(folder)
    entries = before.pick(names)
    same = (entries["bytes"] == stamps[:, 0]) & (entries["mtime_ns"] == stamps[:, 1])
    entries[~same] = _entry()
    unhashed = same & ~entries["hashed"] if hashing else np.zeros_like(same)
    found = Examination(FileRecord(names, entries, before.words), int(np.count_nonzero(same & ~unhashed)))
    others = _others(source, before, names)
    lock = threading.Lock()

    def save() -> None:
        with lock:
            kept = np.flatnonzero(entries["mtime_ns"] != NEVER)
            listed = [*(names[row] for row in kept.tolist()), *others.names]
            record = FileRecord(listed, np.concatenate([entries[kept], others.entries]), list(found.record.words))
        try:
            record.write(folder)
        except OSError as error:
            warnings.warn(f"what was found of {source.split} could not be kept in {folder}: {error}", stacklevel=2)

    total = len(names) - found.known
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = processes or cores
    most = max(_LEAST_IMAGES, min(_PART_IMAGES, total // (_SPANS * count)))  # so that all have parts to the end
    order = np.arange(len(names)) if source.shards is None else source.shards.order
    parts = [
        (rows, Part(*_where(source, rows), hashing, decoding, source.max_pixels))
        for wanted, decoding in ((~same, True), (unhashed, False))
        for rows in _cut(order[wanted[order]], stamps[:, 0] if source.files is not None else None, most)
    ]
    with progress(f"examining {source.split}", total=total, unit=" images") as bar:

        def note(rows: np.ndarray, decoding: bool, looks: Sequence[Look], spent: dict[str, float]) -> None:
            with lock:
                for row, look in zip(rows.tolist(), looks, strict=True):
                    _note(found.record, row, look, decoding)
                for what, seconds in spent.items():
                    found.spent[what] += seconds
                bar.update(len(rows))

        try:
            if total <= _HERE:
                for rows, part in parts:
                    note(rows, part.decoding, *look_at(part, _decoder(part.max_pixels)))
            else:
                _share_out(parts, [] if crew is None else crew, min(count, len(parts)), note, save)
        finally:
            if total:
                save()
    found.seconds = time.perf_counter() - started
    return found


def _entry() -> np.ndarray:
    """Of a file of which nothing is known."""
    entry = np.zeros((), ENTRY)
    entry["mtime_ns"] = NEVER
    return entry


def _others(source: "Source", before: FileRecord, names: Sequence[bytes]) -> FileRecord:
    """What is remembered of files that are there, but no part of this source, which may be some of the classes."""
    listed, root = set(names), b"" if source.files is None else os.fsencode(source.files.root)
    kept = [
        place
        for place, name in enumerate(before.names)
        if name not in listed and root and os.path.lexists(os.path.join(root, name))  # noqa: PTH118 (bytes)
    ]
    return FileRecord([before.names[place] for place in kept], before.entries[kept], before.words)


def _where(source: "Source", rows: np.ndarray) -> tuple[Sequence[bytes], str, Sequence[int]]:
    if source.files is None:
        assert source.shards is not None
        return (), str(source.shards.folder), rows.tolist()
    return [path.tobytes() for path in source.files.encoded(rows)], "", ()


def _cut(rows: np.ndarray, sizes: np.ndarray | None, most: int) -> Iterator[np.ndarray]:
    """Divide rows into parts of at most so many images, and of bounded bytes."""
    bytes_of = np.full(len(rows), _PART_BYTES // _PART_IMAGES) if sizes is None else sizes[rows]
    first, held = 0, 0
    for place, size in enumerate(bytes_of.tolist()):
        if place > first and (place - first == most or held + size > _PART_BYTES):
            yield rows[first:place]
            first, held = place, 0
        held += size
    if len(rows) > first:
        yield rows[first:]


def _note(record: FileRecord, row: int, look: Look, decoding: bool) -> None:
    entry = record.entries[row]
    if not decoding:  # it was known but for its hash
        if look.stamp == (entry["bytes"], entry["mtime_ns"]):
            entry["hashed"], entry["sha256"] = True, np.frombuffer(look.sha256, np.uint8)
        return
    facts, (size, mtime_ns) = look.facts, look.stamp or (0, NEVER)
    fields = {
        **{"bytes": size, "height": facts.height, "width": facts.width},
        **{"format": record.number(facts.format), "mode": record.number(facts.mode)},
        **{"fault": record.number(look.fault), "orientation": facts.orientation, "hashed": bool(look.sha256)},
        "sha256": np.frombuffer(look.sha256.ljust(32, b"\0"), np.uint8),
        "mtime_ns": mtime_ns,  # last: an entry that has it is whole
    }
    for name, value in fields.items():
        entry[name] = value


def _in_memory(arrays: np.ndarray, hashing: bool) -> Examination:
    record = FileRecord([], np.zeros(len(arrays), ENTRY), [""])
    record.entries["height"], record.entries["width"] = arrays.shape[1:3]
    record.entries["mode"], record.entries["format"] = record.number("RGB"), record.number("in memory")
    record.entries["orientation"] = 1
    started = time.perf_counter()
    for row in range(len(arrays)) if hashing else ():
        digest = hashlib.sha256(arrays[row].tobytes()).digest()
        record.entries["sha256"][row] = np.frombuffer(digest, np.uint8)
    record.entries["hashed"] = hashing
    return Examination(record, seconds=time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------- processes


def _share_out(
    parts: Sequence[tuple[np.ndarray, Part]],
    crew: list[Child],
    count: int,
    note: Callable[..., object],
    save: Callable[[], object],
) -> None:
    """Let `count` processes look at all parts, each served by a thread."""
    left, taking, stopping = iter(parts), threading.Lock(), threading.Event()
    crew += [Child(_CODE) for _ in range(count - len(crew))]

    def work(number: int) -> None:
        while not stopping.is_set():
            with taking:
                item = next(left, None)
            if item is None:
                return
            rows, part = item
            note(rows, part.decoding, *_ask(crew, number, part))

    with ThreadPoolExecutor(count, thread_name_prefix="dalikd-examine") as pool:
        running = {pool.submit(work, number) for number in range(count)}
        try:
            while running:
                done, running = wait(running, timeout=_SAVE_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if running:
                    save()
        except BaseException:
            stopping.set()  # what they are at is soon done
            try:
                wait(running, timeout=_STOP_SECONDS)
            finally:
                for child in crew:
                    child.kill()
            raise


def _ask(crew: list[Child], number: int, part: Part) -> tuple[list[Look], dict[str, float]]:
    """What `look_at` answers in one of the processes; if that dies of it, of each half in a new one."""
    answer = crew[number].ask(part)
    if not isinstance(answer, str):
        return answer
    if answer == "SIGKILL":
        raise OSError("a process that decodes was killed (SIGKILL), as where memory is short: give fewer --processes")
    crew[number] = Child(_CODE)
    count = len(part.paths or part.rows)
    if count == 1:
        ((_, stamp),) = _read(part, [0])
        return [Look(stamp, _NOTHING, f"this image ends the process that decodes it ({answer})", b"")], {}
    looks, spent = [], defaultdict[str, float](float)
    for half in (slice(count // 2), slice(count // 2, None)):
        more, seconds = _ask(crew, number, part._replace(paths=part.paths[half], rows=part.rows[half]))
        looks += more
        for what, each in seconds.items():
            spent[what] += each
    return looks, dict(spent)


_CODE = "from dalikd.pipelines.examine import serve; serve()"


def serve() -> None:
    """Such a process: of each Part what `look_at` finds."""
    answer_questions(lambda part: look_at(part, _decoder(part.max_pixels)))


@cache
def _decoder(max_pixels: int) -> Decoder:
    return Decoder(1, max_pixels=max_pixels, at_once=_DECODED_IMAGES)


def look_at(part: Part, decoder: Decoder) -> tuple[list[Look], dict[str, float]]:
    """Look at the images of a part: one Look each, and the seconds that were spent for what."""
    from dalikd.pipelines import graphs  # noqa: F401 - DALI takes a second to import: that is no decoding

    total, looks, spent = len(part.paths or part.rows), [], defaultdict[str, float](float)
    length = min(_DECODED_IMAGES, -(-total // _SPANS))
    spans = [range(first, min(first + length, total)) for first in range(0, total, length)]
    with ThreadPoolExecutor(_READERS) as pool:

        def start(span: Sequence[int]) -> Iterator[list[Any]]:
            some = [span[first : first + _READ_TOGETHER] for first in range(0, len(span), _READ_TOGETHER)]
            return pool.map(partial(_read, part), some)

        reading = start(spans[0])
        for _, following in pairwise([*spans, range(0)]):
            times = [time.perf_counter()]
            images = [image for some in reading for image in some]
            reading = start(following)  # while these are decoded
            times.append(time.perf_counter())
            facts = [facts_of(content) if isinstance(content, bytes) else _NOTHING for content, _ in images]
            hashes = [
                hashlib.sha256(content).digest() if part.hashing and isinstance(content, bytes) else b""
                for content, _ in images
            ]
            times.append(time.perf_counter())
            faults = (
                _faults([content for content, _ in images], facts, decoder) if part.decoding else [""] * len(images)
            )
            stamps = [None if isinstance(content, str) else stamp for content, stamp in images]
            looks += map(Look, stamps, facts, faults, hashes)
            times.append(time.perf_counter())
            for what, (before, after) in zip(("reading", "headers", "decoding"), pairwise(times), strict=True):
                spent[what] += after - before
    return looks, dict(spent)


def _read(part: Part, places: Sequence[int]) -> list[tuple[bytes | str, tuple[int, int]]]:
    """Content and stamp of some images of a part, or why they cannot be read."""
    found: list[tuple[bytes | str, tuple[int, int]]] = []
    for place in places:
        try:
            if part.paths:
                status = os.stat(part.paths[place])  # noqa: PTH116 (bytes)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "it is no file")
                if status.st_size > BYTES_A_PIXEL * part.max_pixels:
                    raise OSError(errno.EFBIG, f"its {status.st_size:,} bytes are more than an image has")
                with open(part.paths[place], "rb", buffering=0) as file:  # noqa: PTH123 (bytes)
                    found.append((file.readall(), (status.st_size, status.st_mtime_ns)))
            else:
                shards, stamps = _shards(part.folder)
                found.append((shards.read(part.rows[place]), tuple(stamps[part.rows[place]].tolist())))
        except (OSError, ValueError) as error:
            found.append((why_unreadable(error), (0, NEVER)))
    return found


@cache
def _shards(folder: str) -> tuple[ShardSet, np.ndarray]:
    shards = ShardSet(Path(folder))
    return shards, shards.stamps()


def _faults(contents: Sequence[bytes | str], facts: Sequence[Facts], decoder: Decoder | None) -> list[str]:
    """Why each image cannot be read or decoded, or nothing; so many at once as are small enough together."""
    faults = ["" if isinstance(content, bytes) else content for content in contents]
    if decoder is None:
        return faults
    places: list[int] = []
    pixels = 0

    def decode() -> None:
        for place, answer in zip(places, decoder.decode([contents[place] for place in places]), strict=True):  # type: ignore[misc]
            faults[place] = answer if isinstance(answer, str) else ""

    for place, content in enumerate(contents):
        if isinstance(content, str):
            continue
        own = facts[place].height * facts[place].width
        if places and pixels + own > _DECODED_PIXELS:
            decode()
            places, pixels = [], 0
        places.append(place)
        pixels += own
    decode()
    return faults
