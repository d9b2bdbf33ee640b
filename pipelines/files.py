"""Files and folders that are whole or not there: whoever is killed, or fails, while writing leaves what was before.

And files that may be damaged, or made to do harm: what they hold is bounded before it is read, and whatever is wrong
with them is a ValueError that names them.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import queue
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import yaml

__all__ = [
    "LARGEST_TEXT",
    "Refused",
    "build_once",
    "file_digest",
    "load_yaml",
    "parse_json",
    "read_json",
    "read_npy",
    "read_text",
    "read_within",
    "read_yaml",
    "write_atomically",
]

#: bytes of a text file; as JSON it takes up to 30 times as much memory
LARGEST_TEXT = 8 << 20
_LARGEST_YAML = 64 << 10  # characters; PyYAML reads about 100,000 a second
_DEEPEST_YAML = 32  # groups in groups
_MOST_NODES = 50_000  # of a YAML text, with every alias written out


def write_atomically(path: Path, write: bytes | Callable[[BinaryIO], object], *, sync: bool = True) -> None:
    """Write a file beside its place and move it there in one step; its folder is made if it is missing.

    Several may write the same file at once: it then holds what one of them has written. It gets the permissions that
    the umask gives to every new file.

    Args:
        path: of the file; one that is there is replaced.
        write: its bytes, or what writes them to an open file.
        sync: wait until the disk has it, so that not even a power cut leaves less than a whole file. Not needed where
            the content has a checksum and can be made again.

    Raises:
        OSError: it cannot be written. The file of before stays, and nothing lies beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}")  # processes of several machines may have one number
    try:
        with part.open("xb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if sync:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Let the disk have the new name too, where the file system can do that for a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a new folder and move it to `target` whole; where another process was faster, keep its folder.

    Raises:
        FileExistsError: `target` was there before, and is not an empty folder.
    """
    if target.exists() and not _is_empty_folder(target):
        raise FileExistsError(f"{target} is already there")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / target.name  # a folder below, because the scratch folder is private (mode 0700)
        made.mkdir()
        build(made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir() or _is_empty_folder(target):
                raise


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digits of a checksum of a file's content: of SHA-256, or of another algorithm of hashlib.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def read_within(path: str, seconds: float, most: int) -> bytes:
    """What a file holds; a disk in the network may never answer, and a pipe waits for a writer.

    Args:
        path: of the file; links are followed.
        seconds: to wait at most.
        most: bytes it may have.

    Raises:
        OSError: it is no file, too large, or cannot be read; TimeoutError: not in that time.
    """
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
                    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
                    raise OSError(errno.EINVAL, f"it is {kind}, not a file", path)
                if status.st_size > most:
                    raise OSError(errno.EFBIG, f"its {status.st_size:,} bytes are more than the {most:,} allowed", path)
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    answer.put(file.read())
            finally:
                os.close(descriptor)
        except BaseException as error:  # passed on
            answer.put(error)

    threading.Thread(
        target=read, name="dalikd-read", daemon=True
    ).start()  # one that hangs keeps no process from ending
    try:
        found = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s", path) from None
    if isinstance(found, BaseException):
        raise found
    return found


# ------------------------------------------------------------------------------------------------- reading


def read_text(path: Path, largest: int = LARGEST_TEXT, encoding: str = "utf-8") -> str:
    """The text of a file.

    Args:
        path: of the file.
        largest: size in bytes.
        encoding: of the text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no text.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(largest, size + LARGEST_TEXT) + 1)  # as much memory is taken as is asked for
    if len(content) > largest:
        raise ValueError(f"{path} is larger than {largest >> 10} KiB: this is no file for this place, name another")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = {"utf-8-sig": "UTF-8"}.get(encoding, encoding.upper())
        raise ValueError(
            f"{path} is not {name} text ({error.reason} at byte {error.start}): save it as {name}"
        ) from None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than LARGEST_TEXT, or no JSON; names the file.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, place: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or too long or deep; begins with `place`.
    """
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"{place}: its JSON is longer than {LARGEST_TEXT >> 20} Mi characters")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON file ({error})") from None


class Refused(ValueError):
    """A text that could be read, but costs too much or means two things."""


class _YamlLoader(yaml.SafeLoader):
    """Reads a text of bounded depth and size, counted with every alias written out, in which no key stands twice."""

    place = ""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # of whole nodes, by their id

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise Refused(f"{self.place} line {line}: an alias means what it is a part of: write it out")
            self._nodes += self._sizes[id(node)]
        else:
            self._depth, before = self._depth + 1, self._nodes
            if self._depth > _DEEPEST_YAML:
                raise Refused(f"{self.place} line {line}: more than {_DEEPEST_YAML} groups lie in each other")
            node = super().compose_node(parent, index)
            self._depth, self._nodes = self._depth - 1, self._nodes + 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise Refused(f"{self.place} line {line}: its aliases stand for more than {_MOST_NODES} values: write less")
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return node

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise Refused(f"{self.place} line {line}: {key.value} is given twice in one group: leave one out")
            seen.add((key.tag, key.value))


def load_yaml(text: str, place: str) -> tuple[Any, Any]:
    """What a YAML text holds, and the same with every scalar as it is written.

    Raises:
        Refused: it is too long or too deep, its aliases stand for too much, or a key stands twice in a group.
        ValueError: it is no YAML; all begin with `place`.
    """
    if len(text) > _LARGEST_YAML:
        raise Refused(
            f"{place} is longer than {_LARGEST_YAML >> 10} Ki characters: this is no config, name another file"
        )
    try:
        loader = _YamlLoader(text)
        loader.place = place
        node = loader.get_single_node()
        return (None, None) if node is None else (loader.construct_document(node), _as_written(node))
    except Refused:
        raise
    except Exception as error:  # of PyYAML's constructors, some raise what Python does: for `!!int x`, a 13th month
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{place} is not YAML: {reason}") from error


def _as_written(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _as_written(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    return [_as_written(one) for one in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises OSError; ValueError as `load_yaml`, or as `read_text`."""
    return load_yaml(read_text(path, 4 * _LARGEST_YAML), str(path))[0]


def read_npy(path: Path, *, mode: Any = None) -> np.ndarray:
    """The numbers of an .npy file, which the file is large enough for.

    Args:
        path: of the file.
        mode: "r" or "r+": mapped into memory, for reading or for both; None: read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; names the file.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](file)
            if dtype.kind not in "biuf" or not all(type(side) is int and side >= 0 for side in shape):
                raise ValueError(f"an array of {dtype} {shape}")
            needed, there = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
            if needed > there:
                raise ValueError(f"it has {there} bytes of an array that takes {needed}")
        return np.load(path, mmap_mode=mode)
    except OSError:
        raise
    except Exception as error:  # its header is Python, whose parser can raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or not an .npy file: {reason}") from error
