"""What lies in a folder of class folders beside the images."""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from dalikd.pipelines.datasets.file_list import IMAGE_EXTENSIONS, is_no_data
from dalikd.pipelines.doctor import printable

__all__ = ["Surroundings", "look_around"]


@dataclass
class Surroundings:
    """What lies in a folder of class folders beside the images.

    Attributes:
        no_data: paths of what a file server, an archive tool or a system has put there, by its kind; not looked into.
        left_out: paths of files whose ending is not an image's, by their ending.
        classes: images of each folder directly in it.
        blocked: what keeps the folder from being read: links to nothing, what is no file, folders that cannot be read.
    """

    no_data: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    classes: dict[str, int] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)


def look_around(folder: Path) -> Surroundings:  # noqa: C901 - one case an entry may be
    """Walk through a folder; links are followed. No file is opened."""
    found = Surroundings()

    def walk(place: str, above: frozenset[tuple[int, int]]) -> int:
        images = 0
        try:
            status = os.stat(place)  # noqa: PTH116 (no Path for each of a million files)
            if (status.st_dev, status.st_ino) in above:
                found.blocked.append(f"{printable(place)} links back to a folder above it: remove the link")
                return 0
            above |= {(status.st_dev, status.st_ino)}
            with os.scandir(place) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.blocked.append(f"{printable(place)} cannot be read: {error.strerror}")
            return 0
        for entry in listed:
            name, path = entry.name.lower(), printable(entry.path)
            if is_no_data(name):
                kind = "._*" if name.startswith("._") else entry.name
                found.no_data[printable(kind)].append(path)
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110 (as above)
                found.blocked.append(f"{path} is a link to nothing: restore its target or remove it")
            elif name.endswith(IMAGE_EXTENSIONS):
                if entry.is_file():
                    images += 1
                else:
                    found.blocked.append(f"{path} is no file, but its name ends as an image's: rename or remove it")
            elif entry.is_dir():
                below = walk(entry.path, above)
                images += below
                if place == str(folder):
                    found.classes[entry.name] = below
            else:
                found.left_out[Path(name).suffix or "without an ending"].append(path)
        return images

    walk(str(folder), frozenset())
    return found
