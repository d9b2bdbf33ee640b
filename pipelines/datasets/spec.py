"""What is asked of a data set and what is found: the two ends of every reader of a layout or format."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dalikd.pipelines.datasets.classes import draw_classes, keep_listed, shorten
from dalikd.pipelines.datasets.file_list import FileList, list_folder
from dalikd.pipelines.datasets.info import DATASET_INFO

__all__ = ["Role", "SplitIndex", "SplitSpec"]

Role = Literal["train", "val"]

_DRAWN = 100  # classes of imagenet100 where none are named


class SplitIndex(NamedTuple):
    """The N images of a split: `classes` (index = label), `labels` int64 [N], and `files`, or `arrays` [N, H, W, 3].

    `notes` are lines that a run prints at its start: what was left out, how classes were ordered.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    files: FileList | None = None
    arrays: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def keep(self, classes: tuple[str, ...]) -> "SplitIndex":
        """The images of some of the classes alone, labelled by the places in `classes`."""
        if classes == self.classes:
            return self
        label_of = np.full(len(self.classes), -1, np.int64)
        label_of[[self.classes.index(name) for name in classes]] = np.arange(len(classes))
        labels = label_of[self.labels]
        rows = np.flatnonzero(labels >= 0)
        files = None if self.files is None else self.files.take(rows)
        arrays = None if self.arrays is None else self.arrays[rows]
        return SplitIndex(classes, labels[rows], files, arrays, self.notes)


@dataclass(frozen=True)
class SplitSpec:
    """Which images of which data set are wanted.

    Attributes:
        name: the data set's.
        root: its folder, resolved; None: not given.
        role: what the images are for.
        split: the split's own name.
        download: fetch what is missing.
        classes: file that lists the classes to keep; None: all, or for imagenet100 a seeded choice.
        class_seed: of that choice.
        train_split: the training split's name: Tiny-ImageNet's validation split takes its classes from there.
    """

    name: str
    root: Path | None
    role: Role
    split: str
    download: bool = False
    classes: Path | None = None
    class_seed: int = 0
    train_split: str = "train"

    @property
    def takes_part(self) -> bool:
        """Whether some of the classes are left out."""
        return self.classes is not None or self.name == "imagenet100"

    def choose(self, present: Sequence[str], where: str | Path) -> tuple[str, ...]:
        """Those of the classes present that are wanted, in the same order.

        Raises:
            ValueError: a class that is named is not there, or there are too few to choose from.
            FileNotFoundError: there is no such list.
        """
        if self.classes is not None:
            return keep_listed(present, self.classes, str(where))
        if self.name == "imagenet100":
            return draw_classes(present, _DRAWN, self.class_seed, f"{self.name}: {where}")
        return tuple(present)

    def given_root(self) -> Path:
        """The root.

        Raises:
            ValueError: none was given.
        """
        if self.root is None:
            raise ValueError(f"{self.name} needs a folder: give --data.root FOLDER")
        return self.root

    def check_root(self) -> Path:
        """The root, which is there.

        Raises:
            ValueError: none was given.
            FileNotFoundError, NotADirectoryError: it is missing, or no folder.
        """
        root = self.given_root()
        if not root.exists():
            raise FileNotFoundError(f"{self.name}: {root} does not exist: check --data.root{self._or_get_it(root)}")
        if not root.is_dir():
            raise NotADirectoryError(f"{self.name}: {root} is not a folder: check --data.root")
        return root

    def split_folder(self) -> Path:
        """The split's folder in the root, resolved.

        Raises:
            ValueError, FileNotFoundError, NotADirectoryError: it is not there; says which folders are.
        """
        root = self.check_root()
        folder = Path(os.path.realpath(root / self.split))  # Path.resolve fails on links in a circle
        if not folder.is_dir() and (root / self.split).is_symlink():
            raise FileNotFoundError(
                f"{self.name}: {root / self.split} is a link, but not to a folder: restore its target or remove it"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.name}: {root} has no folder {self.split!r}; {self._advice(root)}")
        return folder

    def _or_get_it(self, root: Path) -> str:
        info = DATASET_INFO.get(self.name)
        if info is None:
            return ""
        if info.downloadable:
            return ", or give --data.download true to fetch it"
        return f"; to get it, {info.origin.replace('ROOT', str(root))}" if info.origin else ""

    def _advice(self, root: Path) -> str:
        """What to say instead of a split that is missing."""
        folders = list_folder(root).folders
        if not folders:
            return f"it has no folders at all: check --data.root{self._or_get_it(root)}"
        usual = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}[self.role]
        likely = [name for name in usual if name in folders]
        option = f"--data.{self.role}_split"
        if likely:
            return f"it has {shorten(folders)}: give {option} {likely[0]}"
        return f"it has {shorten(folders)}: name one with {option}, or give {option} . if these are the classes"
