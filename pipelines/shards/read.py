"""The shards of one split, opened: compared with what was written, and read image by image. `stream` reads it in
sequence, `verify` compares every byte."""

import resource
import struct
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalikd.pipelines.files import read_npy
from dalikd.pipelines.shards.layout import (
    ARRAYS,
    CHECKSUMS,
    EXTENSIONS,
    MANIFEST,
    NAMES,
    REMEDY,
    Feature,
    Shard,
    ShardFormat,
    ShardManifest,
    ends_checksum,
    image_checksum,
)
from dalikd.pipelines.shards.tfrecord import decode_example, unframe

__all__ = [
    "Record",
    "ShardSet",
    "check_index",
    "check_listing",
    "check_rows",
    "check_shard",
    "read_array",
    "read_listed",
    "record_parts",
    "record_places",
]

_COPY = f"copy it again, or {REMEDY}"
_TAR_BLOCK = 512  # bytes, of a member's header
_AT_ONCE = 16  # shards that are looked at: each takes less than a millisecond, on a network several
_INDEX_TOOLS: dict[ShardFormat, str] = {"webdataset": "wds2idx", "tfrecord": "tfrecord2idx"}
_INDICES_KEPT = 8  # a batch comes from a few shards
_INDEX_BYTES = 512  # at most for an image
_OTHER_FILES = 256  # that a process may have open besides its shards


class ShardSet:
    """The N images of one split, in shards.

    Opening it compares with dataset.json what can be compared without reading the shards: that file's own checksum,
    those of the arrays and of every index, every shard's size and ends. The rest `dalikd prepare --verify` compares.

    Args:
        folder: the split's folder.
        format: of its shards; None for whatever it has.

    Attributes:
        folder: resolved.
        manifest: what dataset.json says.
        labels: int64 [N], by id.
        order: the id at each storage position, int64 [N].
        checksums: `image_checksum` of each image, by id, uint32 [N]; None in folders of version 1.

    Raises:
        FileNotFoundError: the folder, its manifest, a shard or an index is missing.
        ValueError: a file is not as the manifest says, or not listed in it; the format is another one.
    """

    def __init__(self, folder: Path, format: ShardFormat | None = None) -> None:
        self.folder = folder.expanduser().resolve()
        _check_manifest(self.folder)
        self.manifest = ShardManifest.read(self.folder)
        _check_format(self.folder, self.manifest, format)
        check_listing(self.folder, self.manifest)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="dalikd-shards") as pool:  # its first error is raised
            deque(pool.map(partial(check_shard, self.folder), self.manifest.shards), 0)
            deque(pool.map(partial(check_index, self.folder, self.manifest.format), self.manifest.shards), 0)
        _check_open_files(self.manifest)
        self.labels, self.order = (read_array(self.folder, self.manifest, name).astype(np.int64) for name in ARRAYS)
        self.checksums: np.ndarray | None = None
        self._names = b""  # where each image came from, by id: a line each
        if self.manifest.version > 1:
            self.checksums = read_array(self.folder, self.manifest, CHECKSUMS)
            self._names = read_listed(self.folder, self.manifest, NAMES)
        check_rows(self.folder, self.manifest, self.labels, self.order)
        self._index_lines = lru_cache(maxsize=_INDICES_KEPT)(self._read_index)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def paths(self) -> list[str]:
        """The shards in storage order."""
        return [str(self.folder / shard.name) for shard in self.manifest.shards]

    @property
    def index_paths(self) -> list[str]:
        """Their indices."""
        return [str(self.folder / shard.index) for shard in self.manifest.shards]

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with any byte of any shard: a SHA-256 of dataset.json."""
        return sha256((self.folder / MANIFEST).read_bytes()).hexdigest()[:16]

    @cached_property
    def origins(self) -> list[str]:
        """Where each image came from, by id; empty in folders of version 1."""
        return self._names.decode().splitlines()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run says once of shards whose images it cannot compare."""
        if self.checksums is not None:
            return ()
        return (
            f"{self.folder} was written by an earlier dalikd: {MANIFEST} and the images' bytes cannot be compared with "
            f"what was written while they are read; to have that, {REMEDY}",
        )

    def name(self, row: int) -> str:
        """Where an image is: `shard.tar:member`, or `shard.tfrecord:id`."""
        shard, line, _ = self._find(row)
        member = line.split(" ")[3] if self.manifest.format == "webdataset" else f"{row:09d}"
        return f"{self.folder / shard.name}:{member}"

    def read(self, row: int) -> bytes:
        """The encoded bytes of one image; a millisecond or so, for the few that are wanted out of turn.

        Raises:
            ValueError: the record is not as it was written; names it, and where its image came from.
        """
        format = self.manifest.format
        shard, line, number = self._find(row)
        try:
            start, stop, fields = record_places(line, format)
            if not 0 <= start <= stop <= shard.bytes:
                raise ValueError("its place in the index lies outside of the shard")
            with (self.folder / shard.name).open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
            record = record_parts(content, start, fields, format, check=True)
            reason = record.differs(row, int(self.labels[row]), self._checksum(row))
        except (ValueError, IndexError) as error:  # IndexError: of a line of the index that is too short
            record, reason = None, str(error)
        if record is None or reason:
            origin = f", from {self.origins[row]}" if self._names else ""
            raise ValueError(f"{self.name(row)}: record {number} of the shard{origin}: {reason}; {REMEDY}")
        return record.encoded

    def is_whole(self, row: int) -> bool:
        """Whether `read` finds nothing wrong."""
        try:
            self.read(row)
        except ValueError:
            return False
        return True

    def names(self) -> list[bytes]:
        """A name for each image, by id: its shard's and the id."""
        shards = np.repeat([shard.name for shard in self.manifest.shards], np.diff(self._bounds))
        return [f"{shards[place]}:{row}".encode() for row, place in enumerate(self._positions.tolist())]

    def stamps(self) -> np.ndarray:
        """Of each image the size in bytes and the time of the last change in ns of its shard: int64 [N, 2]."""
        states = [(self.folder / shard.name).stat() for shard in self.manifest.shards]
        each = np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)
        return np.repeat(each, np.diff(self._bounds), 0)[self._positions]

    def _checksum(self, row: int) -> int | None:
        return None if self.checksums is None else int(self.checksums[row])

    @cached_property
    def _positions(self) -> np.ndarray:
        """Storage position of each id, int64 [N]."""
        positions = np.empty_like(self.order)
        positions[self.order] = np.arange(len(self.order))
        return positions

    @cached_property
    def _bounds(self) -> np.ndarray:
        """First position of each shard, and the end: int64 [shards + 1]."""
        return np.cumsum([0, *(shard.images for shard in self.manifest.shards)])

    def _find(self, row: int) -> tuple[Shard, str, int]:
        """The shard of an image, its line in the index, and which record of the shard it is, from 0."""
        position = int(self._positions[row])
        number = int(np.searchsorted(self._bounds, position, side="right")) - 1
        shard = self.manifest.shards[number]
        record = position - int(self._bounds[number])
        return shard, self._index_lines(shard.index)[record], record

    def _read_index(self, name: str) -> list[str]:
        return _index_lines((self.folder / name).read_bytes(), self.manifest.format)


# ------------------------------------------------------------------------------------------------ records


class Record(NamedTuple):
    """What a record holds: the `encoded` image, its `label` and its `id`."""

    encoded: bytes
    label: int
    id: int

    def differs(self, id: int, label: int, checksum: int | None) -> str:
        """What is not as it was written; empty where all is. A checksum of None is not compared."""
        found = []
        if self.id != id:
            found.append(f"id {self.id} instead of {id}")
        if self.label != label:
            found.append(f"label {self.label} instead of {label}")
        if checksum is not None and image_checksum(self.encoded) != checksum:
            found.append("the image's bytes are not those that were written")
        return ", ".join(found)


def _index_lines(content: bytes, format: ShardFormat) -> list[str]:
    """A line a record."""
    lines = content.decode("ascii").splitlines()
    return lines[1:] if format == "webdataset" else lines  # a tar's index begins with the count


def record_places(line: str, format: ShardFormat) -> tuple[int, int, list[str]]:
    """Where a record starts and stops in its shard, in bytes, by its line in the index; and that line's fields."""
    fields = line.split(" ")
    if format == "tfrecord":
        return int(fields[0]), int(fields[0]) + int(fields[1]), fields
    return int(fields[1]) - _TAR_BLOCK, int(fields[-3]) + _TAR_BLOCK, fields


def record_parts(content: bytes, start: int, fields: list[str], format: ShardFormat, *, check: bool) -> Record:
    """Take a record apart.

    Args:
        content: of the record.
        start: its first byte's place in the shard.
        fields: of its line in the index.
        format: of the shard.
        check: compare a TFRecord's own checksums, which takes about 5 ms a megabyte.

    Raises:
        ValueError: it cannot be taken apart.
    """
    if format == "tfrecord":
        payload = unframe(content) if check else content[12:-4]
        try:
            features = decode_example(payload)
            encoded, label, id = features[Feature.ENCODED], features[Feature.LABEL], features[Feature.ID]
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError("it holds no example as `dalikd prepare` writes them") from error
    else:
        encoded, label, id = (
            content[int(place) - start : int(place) - start + int(size)]
            for place, size in (fields[part : part + 2] for part in (1, 5, 9))
        )
        if not label.isdigit() or len(id) != 8:
            raise ValueError("its label or id is no number")
        label, id = int(label), struct.unpack("<q", id)[0]
    if not (isinstance(encoded, bytes) and isinstance(label, int) and isinstance(id, int)):
        raise ValueError("it holds no example as `dalikd prepare` writes them")
    return Record(encoded, label, id)


# ------------------------------------------------------------------------------------------------- checks


def _check_manifest(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: check --data.root")
    raise FileNotFoundError(
        f"{folder} has no {MANIFEST}: only what `dalikd prepare` has written can be read; "
        "write it with `dalikd prepare --data.name NAME --data.root FOLDER --output DIR`"
    )


def _check_format(folder: Path, manifest: ShardManifest, format: ShardFormat | None) -> None:
    if format is not None and manifest.format != format:
        raise ValueError(f"{folder} holds {manifest.format}, not {format}: give --data.name {manifest.format}")
    if manifest.format not in EXTENSIONS:
        raise ValueError(f"{folder / MANIFEST}: format {manifest.format!r} is unknown: {REMEDY}")
    if not manifest.images:
        raise ValueError(f"{folder / MANIFEST} lists no image: {REMEDY}")


def check_listing(folder: Path, manifest: ShardManifest) -> None:
    """Check that the shards in a folder are those that its manifest lists, each once.

    Raises:
        ValueError: they are not.
    """
    listed = [shard.name for shard in manifest.shards]
    twice = sorted({name for name in listed if listed.count(name) > 1}) if len(set(listed)) < len(listed) else []
    if twice:
        raise ValueError(f"{folder / MANIFEST} lists {twice[0]} more than once: {_COPY}")
    names = {path.name for path in folder.iterdir() if path.suffix in EXTENSIONS.values() and path.name[0] != "."}
    if strange := sorted(names.difference(listed)):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"{folder / strange[0]}{more} is not of this image set ({MANIFEST} lists {len(listed)} others), and would "
            f"not be read: move what belongs to another set into a folder of its own, or {REMEDY}"
        )


def check_shard(folder: Path, shard: Shard) -> None:
    """Compare a shard's size and ends with what was written.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not as it was written.
    """
    path = folder / shard.name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the folder again, or {REMEDY}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(f"{path} has {size} bytes instead of {shard.bytes}: {_COPY}")
    if shard.ends_crc32 is not None and ends_checksum(path) != shard.ends_crc32:
        raise ValueError(f"{path} is another shard, or damaged (its first or last bytes differ): {_COPY}")


def check_index(folder: Path, format: ShardFormat, shard: Shard) -> list[str]:
    """Compare a shard's index with what was written.

    Returns:
        its lines, one a record.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not as it was written.
    """
    index = folder / shard.index
    make = f"make it with `{_INDEX_TOOLS[format]} {folder / shard.name} {index}`, or {REMEDY}"
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: {make}")
    content = index.read_bytes()
    if sha256(content).hexdigest() != shard.index_sha256:
        raise ValueError(f"{index} is not the index that was written (its checksum differs): {make}")
    lines = _index_lines(content, format)
    if len(lines) != shard.images:
        raise ValueError(f"{index} has {len(lines)} images, {MANIFEST} says {shard.images}: {REMEDY}")
    return lines


def read_array(folder: Path, manifest: ShardManifest, name: str) -> np.ndarray:
    """An array [N] of a folder.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not as it was written.
    """
    read_listed(folder, manifest, name)
    array = read_npy(folder / name)
    if array.shape != (manifest.images,) or array.dtype.kind not in "iu":
        found = f"{array.size} entries ({array.dtype})"
        raise ValueError(f"{folder / name} has {found}, {MANIFEST} {manifest.images}: {REMEDY}")
    return array


def read_listed(folder: Path, manifest: ShardManifest, name: str) -> bytes:
    """A file of a folder that lists something of every image.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not as it was written.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REMEDY}")
    content = path.read_bytes()
    if sha256(content).hexdigest() != manifest.arrays.get(name):
        raise ValueError(f"{path} is not as it was written (its checksum differs): {_COPY}")
    return content


def check_rows(folder: Path, manifest: ShardManifest, labels: np.ndarray, order: np.ndarray) -> None:
    """Check that every image is there once, and has a label that is a class.

    Raises:
        ValueError: not so.
    """
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(f"{folder / 'order.npy'} does not hold every image once: {REMEDY}")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(manifest.classes)))
    if len(wrong):
        raise ValueError(
            f"{folder / 'labels.npy'} gives image {wrong[0]} the label {labels[wrong[0]]}, and {MANIFEST} lists "
            f"{len(manifest.classes)} classes: {REMEDY}"
        )


def _check_open_files(manifest: ShardManifest) -> None:
    """DALI keeps every tar open, and those of the next epoch while it changes over."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = 2 * len(manifest.shards) + _OTHER_FILES
    if manifest.format == "webdataset" and allowed != resource.RLIM_INFINITY and needed > allowed:
        raise ValueError(
            f"{manifest.split} has {len(manifest.shards)} tars, and this process may open only {allowed} files: "
            f"run `ulimit -n {needed}` before, or prepare with a larger --shard_images"
        )
