"""Whether a data set on disk is as published: files by their checksums, folder trees by what they count."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dalikd.pipelines.datasets.cifar import CIFAR
from dalikd.pipelines.datasets.classes import shorten
from dalikd.pipelines.datasets.info import DATASET_INFO
from dalikd.pipelines.datasets.published import Finding, PublishedSet
from dalikd.pipelines.datasets.stl10 import STL10
from dalikd.pipelines.datasets.svhn import SVHN, parts_of
from dalikd.pipelines.sources import Source

__all__ = ["PUBLISHED", "check_count", "remedy", "verify_files"]

#: Data sets of a few files, by name.
PUBLISHED: dict[str, PublishedSet] = {**CIFAR, "svhn": SVHN, "stl10": STL10}


def verify_files(name: str, root: Path, splits: Sequence[str]) -> Iterator[Finding]:
    """Compare the files of a data set with their published MD5, one after the other, about 0.5 GB a second.

    Args:
        name: one of PUBLISHED.
        root: its folder.
        splits: whose files must be there; others are verified where they are.

    Raises:
        ValueError: there is no such split.
    """
    parts = [part for split in splits for part in (parts_of(split) if name == "svhn" else [split])]
    return PUBLISHED[name].verify(root, parts)


def check_count(source: Source, split: str, *, part: bool = False) -> Finding:
    """Compare how many classes and pictures a split has with what is published.

    Args:
        source: the split, not limited.
        split: what it is called in the table of facts.
        part: classes were left out.
    """
    facts, counts = DATASET_INFO[source.name], np.bincount(source.labels, minlength=len(source.classes))
    wrong = []
    if not part and facts.classes not in (None, len(counts)):
        wrong.append(f"{facts.classes:,} classes are published")
    parts = parts_of(split) if source.name == "svhn" else [split]
    published = sum(facts.images.get(name, 0) for name in parts) or len(source)
    if not part and published != len(source):
        wrong.append(f"{published:,} pictures are published")
    if split in facts.a_class:
        wrong += _uneven(source.classes, counts, *facts.a_class[split])
    found = f"{len(counts):,} classes, {len(source):,} pictures"
    return Finding(f"{source.name} {source.split}", "different" if wrong else "whole", "; ".join([found, *wrong]))


def remedy(name: str, root: str | None) -> str:
    """What to do about a data set that is not as published."""
    published, origin = PUBLISHED.get(name), DATASET_INFO[name].origin
    if published is not None:
        broken = f"the folder {published.archive} if it is there" if published.archive else "what is damaged"
        return f"remove {broken}, and say --data.download true"
    return origin.replace("ROOT", root or "ROOT") if origin else "repair it"


def _uneven(classes: Sequence[str], counts: np.ndarray, fewest: int, most: int) -> list[str]:
    outside = [f"{name} {count}" for name, count in zip(classes, counts, strict=True) if not fewest <= count <= most]
    usual = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return [f"a class has {usual} pictures, but {shorten(outside)}"] if outside else []
