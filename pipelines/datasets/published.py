"""Data sets of a few files with published checksums: where they lie, what is missing, downloads, verification."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dalikd.pipelines.datasets.file_list import build_once
from dalikd.pipelines.datasets.spec import SplitSpec

__all__ = ["Finding", "PublishedSet", "from_columns"]

_CHUNK = 2**20  # bytes read at once


class Finding(NamedTuple):
    """Whether a file or split at `place` is as published; `detail` says what was found."""

    place: str
    state: Literal["whole", "damaged", "missing", "different"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.state}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """The files of a data set.

    Attributes:
        name: the data set's.
        title: of torchvision's class, which downloads it.
        splits: file -> MD5 for every split.
        common: the same, of what every split needs.
        archive: folder that the published archive makes; the files come all together or not at all. Empty: each file is
            published by itself, and lies in the root.
    """

    name: str
    title: str
    splits: Mapping[str, Mapping[str, str]]
    common: Mapping[str, str] = field(default_factory=dict)
    archive: str = ""

    @property
    def files(self) -> dict[str, str]:
        """All files that are read here, with their MD5."""
        return {file: md5 for files in (*self.splits.values(), self.common) for file, md5 in files.items()}

    def folder(self, root: Path) -> Path:
        """Where the files lie: the root itself if it holds one of them, else the archive's folder in it."""
        if root.name == self.archive or any((root / file).is_file() for file in self.files):
            return root
        return root / self.archive

    def locate(self, request: SplitSpec, splits: Sequence[str]) -> Path:
        """The folder that holds all that some splits need; downloads it if that is asked for.

        Raises:
            ValueError: no root was given.
            FileNotFoundError, NotADirectoryError: a file or folder is missing, or the root is none.
            FileExistsError: a part of an archive is missing, so that it cannot be downloaded into its folder.
            ConnectionError: the download failed.
        """
        root = request.given_root() if request.download else request.check_root()
        folder = self.folder(root)
        missing = self._missing(folder, splits)
        if missing and request.download:
            self._download(folder, splits)
            missing = self._missing(folder, splits)
        if missing:
            raise FileNotFoundError(f"{self.name}: {folder} lacks {', '.join(missing)}: {self._remedy()}")
        return folder

    def verify(self, root: Path, splits: Sequence[str]) -> Iterator[Finding]:
        """Compare what some splits need, and whatever else is there, with the published checksums; file after file."""
        unknown = [split for split in splits if split not in self.splits]
        if unknown:
            raise ValueError(f"{self.name} has no split {unknown[0]!r}: say one of {', '.join(self.splits)}")
        folder, needed = self.folder(root), self._needed(splits)
        for file, md5 in self.files.items():
            path = folder / file
            if not path.is_file():
                if file in needed:
                    yield Finding(str(path), "missing")
                continue
            found = _md5(path)
            detail = "" if found == md5 else f"its MD5 is {found}, published {md5}"
            yield Finding(str(path), "damaged" if detail else "whole", detail)

    def _needed(self, splits: Sequence[str]) -> list[str]:
        if self.archive:
            return list(self.files)
        return [*self.common, *(file for split in splits for file in self.splits[split])]

    def _missing(self, folder: Path, splits: Sequence[str]) -> list[str]:
        return [file for file in self._needed(splits) if not (folder / file).is_file()]

    def _remedy(self) -> str:
        if self.archive:
            return (
                "put the published files there, give the folder that holds "
                f"{self.archive} as --data.root, or say --data.download true"
            )
        return "put the published files there, or say --data.download true"

    def _download(self, folder: Path, splits: Sequence[str]) -> None:
        try:
            if self.archive:
                self._download_archive(folder)
            else:
                for split in splits:
                    self._download_split(folder, split)
        except FileExistsError:
            raise
        except (OSError, RuntimeError) as error:  # of the network; a checksum that differs
            raise ConnectionError(
                f"{self.name} could not be downloaded ({error}): try again, or put the published files into {folder}"
            ) from error

    def _download_archive(self, folder: Path) -> None:
        """Fetch with torchvision, which checks the archive's MD5, and move its folder into place whole."""

        def fetch(made: Path) -> None:
            from torchvision import datasets

            getattr(datasets, self.title)(made.parent, download=True)

        try:
            build_once(folder, fetch)
        except FileExistsError:
            missing = ", ".join(self._missing(folder, ()))
            if missing:  # else another process has just put it there
                raise FileExistsError(
                    f"{folder} is incomplete (no {missing}): remove it to download it again"
                ) from None

    def _download_split(self, folder: Path, split: str) -> None:
        """Fetch the files of a split with torchvision, which checks their MD5, and move each into place whole."""
        if not [file for file in self.splits[split] if not (folder / file).is_file()]:
            return
        from torchvision import datasets

        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.name}-", dir=folder) as scratch:
            getattr(datasets, self.title)(scratch, split=split, download=True)
            for file in self.splits[split]:
                (Path(scratch) / file).replace(folder / file)


def from_columns(columns: np.ndarray) -> np.ndarray:
    """Pictures as MATLAB stores them, uint8 [N, 3, W, H] -> [N, H, W, 3]; by channel, which is five times as fast."""
    count, channels, width, height = columns.shape
    pictures = np.empty((count, height, width, channels), columns.dtype)
    for channel in range(channels):
        pictures[..., channel] = columns[:, channel].transpose(0, 2, 1)
    return pictures


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
