"""Which classes of a data set are used: all, those of a list, or a seeded choice; their order; whether splits agree."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np

from dalikd.pipelines.files import read_text

__all__ = [
    "alike",
    "check_equal_classes",
    "draw_classes",
    "in_order",
    "keep_listed",
    "read_class_list",
    "share_rows",
    "shorten",
    "stratified_rows",
]

_RENAME = "rename one of them, for example with `convmv -f utf8 -t utf8 --nfc -r --notest FOLDER`"


def _visible(name: str) -> str:
    """Without spaces, byte order marks and other signs that are not seen."""
    return "".join(sign for sign in name if unicodedata.category(sign) not in ("Zs", "Cc", "Cf"))


#: How two names may look alike, what to do, and what is equal then; each also allows for those before.
_ALIKE: tuple[tuple[str, str, Callable[[str], str]], ...] = (
    ("Unicode form (NFC, NFD)", _RENAME, lambda name: unicodedata.normalize("NFC", name)),
    ("upper and lower case", "write them alike", lambda name: unicodedata.normalize("NFC", name).casefold()),
    (
        "spaces or signs that are not seen",
        "write them alike",
        lambda name: _visible(unicodedata.normalize("NFC", name).casefold()),
    ),
)


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class names of a text file, one a line, in its order. A # at the start or after a space begins a remark.

    Raises:
        ValueError: a name is listed twice, fewer than two names are left, or it is no text.
        FileNotFoundError: there is no such file.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        name = re.sub(r"(^|\s)#.*", "", line).strip()
        if name in lines:
            raise ValueError(f"--data.classes {path} line {number}: {name} is listed in line {lines[name]} already")
        if name:
            lines[name] = number
    if len(lines) < 2:
        raise ValueError(f"--data.classes {path} lists {len(lines)} classes: name two or more, one a line")
    return tuple(lines)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"--data.classes {path} is no file: name a text file of class names, one a line")
    try:
        return read_text(path, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"--data.classes {error}") from None


def keep_listed(present: Sequence[str], path: Path, where: str) -> tuple[str, ...]:
    """The classes that a file lists, in the order of `present`, whatever their order in the file.

    Args:
        present: all classes of the data set, index = label.
        path: of the file.
        where: what has those classes, for messages.

    Raises:
        ValueError: as for `read_class_list`, or a listed class is not there.
    """
    listed = read_class_list(path)
    missing = sorted(set(listed) - set(present))
    if missing:
        raise ValueError(
            f"--data.classes {path}: {len(missing)} of {len(listed)} classes are not in {where}: {shorten(missing)}; "
            f"it has {shorten(present)}{_lookalikes(missing, present)}"
        )
    return tuple(name for name in present if name in set(listed))


def in_order(names: Iterable[str], where: str | Path) -> tuple[tuple[str, ...], list[str]]:
    """Class folders in the order of their labels: by number where all are whole numbers, else as text.

    Returns:
        the names, and a line to print where the order by number is not that of the text.

    Raises:
        ValueError: two names are the same number, such as 1 and 01.
    """
    names = sorted(names)
    if not all(re.fullmatch("-?[0-9]+", name) for name in names):
        return tuple(names), []
    ordered = sorted(names, key=int)
    for one, other in pairwise(ordered):
        if int(one) == int(other):
            raise ValueError(f"{where}: the class folders {one} and {other} are the same number: merge or rename them")
    if ordered == names:
        return tuple(names), []
    return tuple(ordered), [
        f"class folders that are whole numbers are ordered by number: {shorten(ordered)}; not as text: {shorten(names)}"
    ]


def draw_classes(present: Sequence[str], count: int, seed: int, where: str) -> tuple[str, ...]:
    """A seeded choice of `count` classes, in the order of `present`.

    Those with the smallest SHA-256 of "seed/name". So the choice depends on the names and the seed alone, is the same
    on every machine and for every split, and hardly changes when a class is added.

    Raises:
        ValueError: fewer than `count` classes are there.
    """
    if len(present) < count:
        raise ValueError(
            f"{where} has {len(present)} class folders of which {count} are to be chosen: give a tree with {count} or "
            "more, or name the classes with --data.classes FILE"
        )
    chosen = set(sorted(present, key=lambda name: sha256(f"{seed}/{name}".encode()).digest())[:count])
    return tuple(name for name in present if name in chosen)


def stratified_rows(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows of a stratified random subset, ascending: int64 [n] out of labels int64 [N], n <= N.

    Member k of a class of m (in random order) gets the key (k + 1/2) / m, first members come before all others, and
    the n smallest keys are kept: proportions hold to about one image a class, and subsets are nested in n.

    Raises:
        ValueError: `seed` is negative.
    """
    noise, by_class, rank = _shuffle_classes(labels, seed)
    key = np.where(rank == 0, -1.0, (rank + 0.5) / np.bincount(labels)[labels[by_class]])
    chosen = by_class[np.lexsort((noise[by_class], key))[:n]]
    return np.sort(chosen).astype(np.int64)


def share_rows(labels: np.ndarray, kept: np.ndarray, seed: int) -> np.ndarray:
    """Rows of a random subset with so many of each class, ascending: int64 [sum of kept] out of labels int64 [N].

    The first of each class in a random order of its own: with the same seed, more of a class hold those of fewer. The
    order is another than that of `stratified_rows`, so that a subset of its subset is drawn evenly too.

    Args:
        labels: of all images.
        kept: how many of each class, int64 [C], at most as many as there are.
        seed: of the order.

    Raises:
        ValueError: `seed` is negative.
    """
    _, by_class, rank = _shuffle_classes(labels, seed, stream=1)
    return np.sort(by_class[rank < kept[labels[by_class]]]).astype(np.int64)


def _shuffle_classes(labels: np.ndarray, seed: int, stream: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class after class, each in a random order: the noise of all rows, the rows, and of each its place in its class.

    Each stream of a seed is a draw of its own.

    Raises:
        ValueError: `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} is negative: give 0 or more")
    # The raw bits of Philox, unlike a Generator's methods, are promised to stay the same between numpy versions. Its
    # key has 128 bits, of which seeds take 63.
    noise = np.random.Philox(key=(stream << 64) + seed).random_raw(len(labels))
    by_class = np.lexsort((noise, labels))
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    return noise, by_class, np.arange(len(labels)) - starts[labels[by_class]]


def check_equal_classes(name: str, one: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]]) -> None:
    """Check that a label means the same in two splits.

    Args:
        name: the data set's, for the message.
        one: a split's name, and its classes in the order of their labels.
        other: the same of another split.

    Raises:
        ValueError: the class lists differ; names the first differences.
    """
    (split, classes), (other_split, other_classes) = one, other
    if tuple(classes) == tuple(other_classes):
        return
    differences = [
        f"only in {where}: {shorten(missing)}"
        for where, names, others in ((split, classes, other_classes), (other_split, other_classes, classes))
        if (missing := [name for name in names if name not in set(others)])
    ]
    if not differences:
        label = next(i for i, pair in enumerate(zip(classes, other_classes, strict=False)) if pair[0] != pair[1])
        differences = [f"label {label} is {classes[label]} and {other_classes[label]}"]
    raise ValueError(
        f"{name}: {split} has {len(classes)} classes, {other_split} {len(other_classes)}; "
        f"{'; '.join(differences)}{_lookalikes(classes, other_classes)}: both must have the same class folders"
    )


def _lookalikes(names: Iterable[str], others: Iterable[str]) -> str:
    """What to add where a name has a twin among the others that differs in what is hardly seen; else nothing."""
    missing, found = sorted(set(names) - set(others)), sorted(set(others) - set(names))
    for difference, advice, form in _ALIKE:
        twins = {form(name): name for name in found}
        for name in missing:
            if form(name) in twins:
                return f"; {name!a} and {twins[form(name)]!a} differ only in {difference}: {advice}"
    return ""


def alike(names: Sequence[str]) -> list[str]:
    """A line for each name that differs from one before it in what is hardly seen only."""
    found: dict[str, str] = {}
    for difference, advice, form in reversed(_ALIKE):
        seen: dict[str, str] = {}
        for name in names:
            twin = seen.setdefault(form(name), name)
            if twin != name:
                found[name] = f"{twin!a} and {name!a} differ only in {difference}: {advice}"
    return list(found.values())


def shorten(names: Sequence[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
