"""What `dalikd doctor` has found of each file, remembered beside the list of a folder's files.

A file is known by its name in the folder, its size and the time of its last change. So a second look needs only those
that have changed, and a run takes the sides of images and the files that cannot be decoded from here.
"""

import json
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.hardware import package_versions

__all__ = ["ENTRY", "NEVER", "FileRecord"]

_NAME, _VERSION = "examined.npz", 1
NEVER = int(np.iinfo(np.int64).min)  #: a time of change that no file has

#: One file. `format`, `mode` and `fault` are places in `words`; 0 is nothing: no fault. `sha256` counts where `hashed`.
ENTRY = np.dtype(
    [
        *(("bytes", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"), ("width", "<i4")),
        *(("format", "<i4"), ("mode", "<i4"), ("fault", "<i4"), ("orientation", "u1")),
        *(("hashed", "?"), ("sha256", "u1", (32,))),
    ]
)


@dataclass(eq=False)
class FileRecord:
    """What is known of N files.

    Attributes:
        names: in their folder.
        entries: of ENTRY, [N].
        words: that entries point to; the first is empty.
    """

    names: list[bytes]
    entries: np.ndarray
    words: list[str]

    @classmethod
    def read(cls, folder: Path) -> "FileRecord":
        """What a manifest's folder remembers; nothing where there is no record, or, with a warning, a damaged one."""
        path = folder / _NAME
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as kept:  # a zip archive, with checksums
                    names, entries = kept["names"].tobytes().split(b"\0")[:-1], kept["entries"]
                    version, decoders, *words = json.loads(kept["words"].tobytes())
                if version == _VERSION and entries.dtype == ENTRY and len(entries) == len(names):
                    if decoders != _decoders():
                        entries["mtime_ns"] = NEVER  # what they can decode may be another; sides stay
                    return cls(names, entries, words)
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                warnings.warn(f"{path} is damaged ({error}): all files are looked at again", stacklevel=2)
        return cls([], np.zeros(0, ENTRY), [""])

    def write(self, folder: Path) -> None:
        """Remember it. Raises OSError."""
        arrays = {
            "names": np.frombuffer(b"".join(name + b"\0" for name in self.names), np.uint8),
            "entries": self.entries,
            "words": np.frombuffer(json.dumps([_VERSION, _decoders(), *self.words]).encode("ascii"), np.uint8),
        }
        write_atomically(folder / _NAME, lambda file: np.savez(file, **arrays), sync=False)

    def pick(self, names: Iterable[bytes]) -> np.ndarray:
        """The entries of these files, [N]; the time of change of one that is not known is NEVER."""
        place_of = {name: place for place, name in enumerate(self.names)}
        places = np.array([place_of.get(name, -1) for name in names], np.int64)
        entries = np.zeros(len(places), ENTRY)
        entries["mtime_ns"] = NEVER
        entries[places >= 0] = self.entries[places[places >= 0]]
        return entries

    def number(self, word: str) -> int:
        """A word's place."""
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)


def _decoders() -> str:
    """The versions of what decodes: other ones may fail on other files."""
    versions = package_versions()
    return f"{versions.get('dali')} {versions.get('nvimgcodec')}"
