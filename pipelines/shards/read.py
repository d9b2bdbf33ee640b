"""The shards of one split, opened: checked, and read image by image. `stream` reads it in sequence."""

import hashlib
import resource
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from dalikd.pipelines.files import file_digest
from dalikd.pipelines.progress import progress
from dalikd.pipelines.shards.layout import (
    ARRAYS,
    EXTENSIONS,
    MANIFEST,
    REMEDY,
    Feature,
    Shard,
    ShardFormat,
    ShardManifest,
)
from dalikd.pipelines.shards.tfrecord import decode_example, unframe

__all__ = ["ShardSet"]

_INDEX_TOOLS: dict[ShardFormat, str] = {"webdataset": "wds2idx", "tfrecord": "tfrecord2idx"}
_INDICES_KEPT = 8  # a batch comes from a few shards
_OTHER_FILES = 256  # that a process may have open besides its shards


class ShardSet:
    """The N images of one split, in shards.

    Args:
        folder: the split's folder.
        format: of its shards; None for whatever it has.

    Attributes:
        folder: resolved.
        manifest: what dataset.json says.
        labels: int64 [N], by id.
        order: the id at each storage position, int64 [N].

    Raises:
        FileNotFoundError: the folder, its manifest, a shard or an index is missing.
        ValueError: a file is not as the manifest says; the format is another one.
    """

    def __init__(self, folder: Path, format: ShardFormat | None = None) -> None:
        self.folder = folder.expanduser().resolve()
        _check_manifest(self.folder)
        self.manifest = ShardManifest.read(self.folder)
        _check_format(self.folder, self.manifest, format)
        for shard in self.manifest.shards:
            _check_shard(self.folder, shard, self.manifest.format)
        _check_open_files(self.manifest)
        self.labels, self.order = (self._read_array(name) for name in ARRAYS)
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
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()[:16]

    def name(self, row: int) -> str:
        """Where an image is: `shard.tar:member`, or `shard.tfrecord:id`."""
        shard, line = self._find(row)
        member = line.split(" ")[3] if self.manifest.format == "webdataset" else f"{row:09d}"
        return f"{self.folder / shard.name}:{member}"

    def read(self, row: int) -> bytes:
        """The encoded bytes of one image; a millisecond or so, for the few that are wanted out of turn.

        Raises:
            ValueError: the shard is damaged there.
        """
        shard, line = self._find(row)
        fields = line.split(" ")
        offset, size = (int(field) for field in (fields[1:3] if self.manifest.format == "webdataset" else fields))
        with (self.folder / shard.name).open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if self.manifest.format == "webdataset":
            return content
        try:
            encoded = decode_example(unframe(content))[Feature.ENCODED]
        except ValueError as error:
            raise ValueError(f"{self.name(row)}: {error}; {REMEDY}") from error
        assert isinstance(encoded, bytes)
        return encoded

    def names(self) -> list[bytes]:
        """A name for each image, by id: its shard's and the id."""
        shards = np.repeat([shard.name for shard in self.manifest.shards], np.diff(self._bounds))
        return [f"{shards[place]}:{row}".encode() for row, place in enumerate(self._positions.tolist())]

    def stamps(self) -> np.ndarray:
        """Of each image the size in bytes and the time of the last change in ns of its shard: int64 [N, 2]."""
        states = [(self.folder / shard.name).stat() for shard in self.manifest.shards]
        each = np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)
        return np.repeat(each, np.diff(self._bounds), 0)[self._positions]

    def verify(self) -> None:
        """Read every file and compare checksums.

        Raises:
            ValueError: names every file that differs.
        """
        checks = list(self._checksums())
        bar = progress(f"verifying {self.folder.name}", checks, unit=" files")
        wrong = [str(path) for path, expected in bar if file_digest(path) != expected]
        if wrong:
            raise ValueError(f"checksum differs: {', '.join(wrong)}; {REMEDY}")

    def _checksums(self) -> Iterator[tuple[Path, str]]:
        for name in ARRAYS:
            yield self.folder / name, self.manifest.arrays[name]
        for shard in self.manifest.shards:
            yield self.folder / shard.name, shard.sha256
            yield self.folder / shard.index, shard.index_sha256

    def _read_array(self, name: str) -> np.ndarray:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {REMEDY}")
        array = np.load(path).astype(np.int64)
        if array.shape != (self.manifest.images,):
            raise ValueError(f"{path} has {array.size} entries, {MANIFEST} {self.manifest.images}: {REMEDY}")
        return array

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

    def _find(self, row: int) -> tuple[Shard, str]:
        """The shard of an image, and its line in the index."""
        position = int(self._positions[row])
        number = int(np.searchsorted(self._bounds, position, side="right")) - 1
        shard = self.manifest.shards[number]
        return shard, self._index_lines(shard.index)[position - int(self._bounds[number])]

    def _read_index(self, name: str) -> list[str]:
        lines = (self.folder / name).read_text(encoding="ascii").splitlines()
        return lines[1:] if self.manifest.format == "webdataset" else lines  # a tar's index begins with the count


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


def _check_shard(folder: Path, shard: Shard, format: ShardFormat) -> None:
    path, index = folder / shard.name, folder / shard.index
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the folder again, or {REMEDY}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(f"{path} has {size} bytes instead of {shard.bytes}: copy it again, or {REMEDY}")
    if not index.is_file():
        raise FileNotFoundError(
            f"{index} is missing: make it with `{_INDEX_TOOLS[format]} {path} {index}`, or {REMEDY}"
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
