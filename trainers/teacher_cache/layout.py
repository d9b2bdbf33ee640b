"""Teacher outputs on disk: written once, read by every later run that makes the same images.

Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022, arXiv 2106.05237: long runs
in which teacher and student see the same crops and mixes. Where every draw is a function of (seed, epoch, sample), the
images of an epoch come again in every run, and so may what the teacher gives for them.

A cache is a folder: `cache.json` says what it holds and of what run, and each epoch has a folder of memory-mapped .npy
files. Row i of each belongs to sample id i: the original, and the augmented image at the original's place in its mix
group. Processes write disjoint rows of the same files, on one machine.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor
from torch.nn import functional

from dalikd.pipelines.files import (
    build_once,
    names_in,
    read_json,
    read_npy,
    remove_litter,
    unwritable,
    write_atomically,
)
from dalikd.trainers.renamed import renamed
from dalikd.trainers.tracking import LOCK

__all__ = [
    "CacheLayout",
    "Storage",
    "TeacherCache",
    "differing",
    "from_group_picks",
    "pack_logits",
    "to_group_picks",
    "unpack_logits",
]

Storage = Literal["float32", "float16", "topk"]

_VERSION = 1  # of the folder's layout
_DESCRIPTION = "cache.json"
_MOST = 1 << 31  # samples, classes, …
_FILLED = "filled"  # uint8 [N], 1 where a row is written; the last file of an epoch to be created
_CHECKSUMS = "checksums.json"  # of an epoch whose rows are all there: the CRC-32 of each of its files
_CHUNK = 1 << 20  # bytes
_LARGEST_HALF = 65504.0
_SMALLEST_MASS = float(np.finfo(np.float32).tiny)  # instead of a residual mass of 0, whose logarithm is not finite


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds.

    Attributes:
        rows: samples of the data set, N.
        classes: columns of the logits, C.
        epochs: passes over the data, E.
        storage: float32; float16; or topk: the `k` largest logits and the probability that the others share.
        k: of topk.
        augmented: whether there are logits of augmented images beside those of the originals (not so for identity).
        pool: candidates of a mix group, where images were picked out of several runs; 0 for no picks.
        fingerprint: what outputs and images depend on, by name; plain values.
        microbatch: originals in a call of the teacher, by whose size outputs are rounded; 0 where it is not known.
    """

    rows: int
    classes: int
    epochs: int
    storage: Storage = "float32"
    k: int = 0
    augmented: bool = True
    pool: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    microbatch: int = field(default=0, compare=False)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the teacher's outputs."""
        return ("logits", "augmented") if self.augmented else ("logits",)

    def columns(self) -> dict[str, np.ndarray]:
        """An epoch's files by name, each as one empty row that has its type and shape."""
        columns = {name: part for output in self.outputs for name, part in self._parts(output).items()}
        if self.pool:
            columns["picks"] = np.empty((), _index_type(self.pool))
        return {**columns, _FILLED: np.empty((), np.uint8)}

    @property
    def epoch_bytes(self) -> int:
        """Size of an epoch's arrays."""
        return self.rows * sum(row.nbytes for row in self.columns().values())

    def _parts(self, output: str) -> dict[str, np.ndarray]:
        if self.storage != "topk":
            return {output: np.empty(self.classes, self.storage)}
        return {
            f"{output}_classes": np.empty(self.k, _index_type(self.classes)),
            f"{output}_values": np.empty(self.k, np.float16),
            f"{output}_rest": np.empty((), np.float32),
        }


class TeacherCache:
    """An opened cache.

    Rows survive a kill of the process that wrote them; after a failure of the machine, verify the cache.

    Args:
        folder: made by `create`.
        writable: for filling; else for reading.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the folder's cache.json is not one of this program.
    """

    def __init__(self, folder: Path, writable: bool = False) -> None:
        self.folder, self.layout = folder, _read_layout(folder)
        self._mode: Literal["r", "r+"] = "r+" if writable else "r"
        self._columns = self.layout.columns()
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._verified: set[int] = set()

    @classmethod
    def check_target(cls, folder: Path, layout: CacheLayout) -> tuple[int, int]:
        """Check that a cache can be made or gone on with in a folder.

        Returns:
            bytes that are needed, and bytes that are free on the disk.

        Raises:
            ValueError: the folder holds another cache or other files, or the disk is too small.
        """
        _check_folder(folder, layout)
        needed, free = len(_missing_epochs(folder, layout)) * layout.epoch_bytes, _free_bytes(folder)
        if needed > free:
            raise ValueError(
                f"--output {folder}: the teacher cache needs {needed / 2**30:.2f} GiB, the disk has "
                f"{free / 2**30:.2f} GiB free: use --storage float16 or topk, fewer --epochs, or another disk"
            )
        return needed, free

    @classmethod
    def create(cls, folder: Path, layout: CacheLayout) -> "TeacherCache":
        """Make a cache's files, or those that are missing: a cache may be gone on with, and may get more epochs.

        Disk space is reserved here, so that no write fails later. One process does this; the others open it after.

        Raises:
            ValueError: as for `check_target`.
        """
        cls.check_target(folder, layout)
        missing = _missing_epochs(folder, layout)
        remove_litter(folder)
        description = json.dumps({"version": _VERSION, **asdict(layout)}, indent=2) + "\n"
        write_atomically(folder / _DESCRIPTION, description.encode())
        for epoch in missing:
            _make_epoch(_epoch_folder(folder, epoch), layout)
        return cls(folder, writable=True)

    def write(self, epoch: int, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Store rows of an epoch, then mark them as filled.

        Args:
            epoch: below the layout's epochs.
            rows: sample ids, int64 [B], each once.
            arrays: every column but "filled", each [B, ...].

        Raises:
            ValueError: the teacher's outputs are not finite.
        """
        columns = self._epoch(epoch)
        assert {*arrays, _FILLED} == columns.keys(), (*arrays, *columns)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(
                    f"the teacher's outputs are not finite in epoch {epoch}, {name}: check its weights, use "
                    "--precision fp32 or --storage float32"
                )
            columns[name][rows] = array
        columns[_FILLED][rows] = 1

    def read(self, epoch: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of an epoch: every column but "filled", each [B, ...] in memory of its own. Before the first ones the
        epoch's files are compared with their checksums, which also brings them into memory.

        Raises:
            ValueError: a file is damaged, or has changed since it was written.
        """
        if epoch not in self._verified and self._mode == "r":
            self._verified.add(epoch)
            self.check_bytes(epoch)
        found = {name: array[rows] for name, array in self._epoch(epoch).items() if name != _FILLED}
        for name, array in found.items():  # of these alone every value is a place in something
            most = self.layout.pool if name == "picks" else self.layout.classes
            if (name == "picks" or name.endswith("_classes")) and (array.min() < 0 or array.max() >= most):
                path = _epoch_folder(self.folder, epoch) / f"{name}.npy"
                raise ValueError(f"{path} holds a number outside of 0..{most - 1}: make the cache anew")
        return found

    def filled(self, epoch: int, rows: np.ndarray) -> bool:
        """Whether all these rows of an epoch are written."""
        return bool(self._epoch(epoch)[_FILLED][rows].all())

    def flush(self, epoch: int) -> None:
        """Have an epoch's rows written to the disk."""
        for array in self._epoch(epoch).values():
            if isinstance(array.base, np.memmap):
                array.base.flush()

    def seal(self) -> None:
        """Write the checksums of all epochs that have none. To be called once every row is there, by one process."""
        for epoch in range(self.layout.epochs):
            folder = _epoch_folder(self.folder, epoch)
            if not (folder / _CHECKSUMS).exists():
                found = {path.name: _checksum(path) for path in self._paths(folder)}
                write_atomically(folder / _CHECKSUMS, (json.dumps(found, indent=2) + "\n").encode())

    def check_bytes(self, epoch: int) -> bool:
        """Compare an epoch's files with their checksums.

        Returns:
            whether there are any: caches of earlier versions have none.

        Raises:
            ValueError: a file has changed since it was written, or the checksums themselves.
        """
        folder = _epoch_folder(self.folder, epoch)
        if not (folder / _CHECKSUMS).exists():
            return False
        try:
            written = dict(json.loads((folder / _CHECKSUMS).read_text("utf-8")))
        except (ValueError, TypeError):
            written = {}
        for path in self._paths(folder):
            if written.get(path.name) != _checksum(path):
                raise ValueError(
                    f"{path} is not what dalikd cache has written (by its checksum in {_CHECKSUMS}): it was changed or "
                    "damaged; copy the cache again, or make it anew in another folder"
                )
        return True

    def _paths(self, folder: Path) -> list[Path]:
        return [folder / f"{name}.npy" for name in self._columns]

    def check_filled(self) -> None:
        """Check that every row of every epoch is there.

        Raises:
            ValueError: an epoch is missing, or some of its rows.
        """
        for epoch in range(self.layout.epochs):
            found = int(np.count_nonzero(self._epoch(epoch)[_FILLED]))
            if found < self.layout.rows:
                raise ValueError(
                    f"the teacher cache {self.folder} is not finished: epoch {epoch} of {self.layout.epochs} has "
                    f"{found} of {self.layout.rows} rows; call the same dalikd cache again, which goes on where it "
                    "stopped"
                )

    def check_made_for(self, fingerprint: Mapping[str, Any], remedy: str) -> None:
        """Check that the cache belongs to a run.

        Args:
            fingerprint: what is known of the run; names that are left out are not compared.
            remedy: ends the message.

        Raises:
            ValueError: it belongs to another; names every difference.
        """
        found = differing(self.layout.fingerprint, fingerprint)
        if found:
            raise ValueError(f"the teacher cache {self.folder} was made for another run: {'; '.join(found)}. {remedy}")

    def _epoch(self, epoch: int) -> dict[str, np.ndarray]:
        if epoch not in self._open:
            folder = _epoch_folder(self.folder, epoch)
            self._open[epoch] = {name: self._map(folder / f"{name}.npy", row) for name, row in self._columns.items()}
        return self._open[epoch]

    def _map(self, path: Path, row: np.ndarray) -> np.ndarray:
        if not path.exists():
            raise ValueError(
                f"{path} is missing: call the same dalikd cache again, which makes epochs that are not there, or make "
                "the cache anew in another folder"
            )
        array = read_npy(path, mode=self._mode)
        if array.shape != (self.layout.rows, *row.shape) or array.dtype != row.dtype:
            raise ValueError(
                f"{path} holds {array.dtype} {array.shape}, {_DESCRIPTION} says otherwise: make the cache anew in "
                "another folder"
            )
        return np.asarray(array)  # plain: indexing a memmap object costs several times as much


# ------------------------------------------------------------------------------------------------- logits, packed


def pack_logits(logits: Tensor, storage: Storage, k: int) -> dict[str, Tensor]:
    """Bring logits into the form in which they are stored.

    Args:
        logits: [B, C].
        storage: as in CacheLayout.
        k: of topk.

    Returns:
        float32 or float16: "" [B, C]. topk: "_classes" int64 [B, K]; "_values" float16 [B, K], the largest logits less
        the largest of all, in descending order; "_rest" float32 [B], the other classes' probability at temperature 1.
    """
    if storage == "float32":
        return {"": logits.float()}
    if storage == "float16":
        return {"": logits.half()}
    values, classes = logits.topk(k, dim=1)
    probabilities = functional.softmax(logits.double(), dim=1)
    rest = probabilities.scatter(1, classes, 0.0).sum(1)  # not 1 - sum: that would lose small masses
    values = (values - values[:, :1]).clamp(min=-_LARGEST_HALF)
    return {"_classes": classes, "_values": values.half(), "_rest": rest.float()}


def unpack_logits(parts: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """Undo `pack_logits`, without waiting for the device.

    With topk the result is known up to a constant a row, which no softmax sees, and the classes outside the K share the
    residual mass equally at temperature 1: there the K probabilities are exact. At another temperature this is an
    approximation: for T > 1 it gives the others too much together, as the mean of p^(1/T) is at most the same power of
    the mean of p; the flatter they are among themselves, the smaller the error.

    Args:
        parts: as `pack_logits` gives them, in the types they are stored in.
        num_classes: C.

    Returns:
        float32 [B, C].
    """
    if "" in parts:
        return parts[""].float()
    values, rest = parts["_values"].float(), parts["_rest"].float()
    others = max(num_classes - values.shape[1], 1)
    share = rest.clamp(min=_SMALLEST_MASS).log() - (1 - rest).log() + values.logsumexp(1) - float(np.log(others))
    full = share[:, None].repeat(1, num_classes)
    return full.scatter(1, parts["_classes"].long(), values)


# ------------------------------------------------------------------------------------------------------- picks


def to_group_picks(picks: np.ndarray, batch: int, group: int) -> np.ndarray:
    """Say picks of a batch by their place in the pool of their mix group, which no batch size changes.

    Args:
        picks: indices into the pool [runs * batch] of a batch, run after run, at each original's position [batch].
        batch: originals in the batch; it starts with a whole group.
        group: originals in a mix group; the batch's last group may be shorter.

    Returns:
        int64 [batch], indices into the pool [runs * w] of a group of w originals.
    """
    run, column = np.divmod(picks, batch)
    first, width = _groups(batch, group)
    return run * width + column - first


def from_group_picks(picks: np.ndarray, batch: int, group: int) -> np.ndarray:
    """Undo `to_group_picks`."""
    first, width = _groups(batch, group)
    run, column = np.divmod(picks.astype(np.int64), width)
    return run * batch + first + column


def _groups(batch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """First position and number of originals of each position's group, int64 [batch]."""
    first = np.arange(batch) // group * group
    return first, np.minimum(first + group, batch) - first


# ------------------------------------------------------------------------------------------------- fingerprints


def differing(cached: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What differs between a cache's fingerprint and that of a run, in words; names the run leaves out do not count."""
    plain = json.loads(json.dumps(dict(own)))  # tuples become lists, as in cache.json
    return [
        f"{name}: cache has {cached.get(name)}, this run has {value}{_older(name, cached.get(name), value)}"
        for name, value in plain.items()
        if name not in cached or cached[name] != value
    ]


def _older(name: str, cached: Any, own: Any) -> str:
    """What to add where the cache is of an earlier dalikd: its fingerprints of files had fewer digits."""
    if name != "data.fingerprint" or not isinstance(cached, str) or len(cached) >= len(own):
        return ""
    return " (which holds file sizes, as none did in earlier versions of dalikd: they cannot be compared)"


# -------------------------------------------------------------------------------------------------------- files


def _checksum(path: Path) -> str:
    """The CRC-32 of a file: it finds damage at the speed of the disk, and no more is wanted of it."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"


def _missing_epochs(folder: Path, layout: CacheLayout) -> list[int]:
    """Epochs that have no files yet."""
    return [epoch for epoch in range(layout.epochs) if not (_epoch_folder(folder, epoch) / f"{_FILLED}.npy").exists()]


def _free_bytes(folder: Path) -> int:
    """Free space of the disk on which a folder lies, or will."""
    absolute = folder.absolute()
    return shutil.disk_usage(next(place for place in (absolute, *absolute.parents) if place.exists())).free


def _epoch_folder(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}"


def _index_type(count: int) -> type[np.signedinteger]:
    return np.int16 if count <= np.iinfo(np.int16).max else np.int32


def _make_epoch(folder: Path, layout: CacheLayout) -> None:
    """All files of an epoch or none; those that a kill, or an earlier dalikd, left incomplete go."""

    def make(made: Path) -> None:
        for name, row in layout.columns().items():
            path = made / f"{name}.npy"
            try:
                np.lib.format.open_memmap(path, "w+", row.dtype, (layout.rows, *row.shape))
                with path.open("r+b") as file:  # a memory-mapped write to a full disk would kill the process
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise unwritable(folder / path.name, error) from error

    if folder.exists():
        shutil.rmtree(folder)
    build_once(folder, make)


def _read_layout(folder: Path) -> CacheLayout:
    path = folder / _DESCRIPTION
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no teacher cache ({path} is missing): make one with dalikd cache")
    try:
        content = read_json(path)
        version = content.pop("version")
        layout = CacheLayout(**{**content, "fingerprint": renamed(content["fingerprint"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a teacher cache: make one with dalikd cache") from error
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, this program reads {_VERSION}: make the cache anew")
    counts = layout.rows, layout.classes, layout.epochs, layout.k, layout.pool, layout.microbatch
    if (
        not all(type(count) is int and 0 <= count <= _MOST for count in counts)
        or layout.storage not in get_args(Storage)
        or min(counts[:3]) < 1
        or not int(layout.storage == "topk") <= layout.k <= layout.classes
    ):
        raise ValueError(f"{path} describes no teacher cache that can be ({counts}): make the cache anew")
    return layout


def _form(layout: CacheLayout) -> dict[str, Any]:
    return {
        name: value for name, value in asdict(layout).items() if name not in ("epochs", "fingerprint", "microbatch")
    }


def _check_folder(folder: Path, layout: CacheLayout) -> None:
    """A new folder, or one that holds a cache of the same run with as many epochs or fewer."""
    if names_in(folder) <= {LOCK}:
        return
    if not (folder / _DESCRIPTION).exists():
        raise ValueError(f"--output {folder} holds other files and is not touched: name another folder")
    old = _read_layout(folder)
    found = differing({**_form(old), **old.fingerprint}, {**_form(layout), **layout.fingerprint})
    if found:
        raise ValueError(
            f"--output {folder} holds another teacher cache: {'; '.join(found)}. Name another folder, or remove this "
            "one"
        )
    if old.epochs > layout.epochs:
        raise ValueError(
            f"--output {folder} holds a teacher cache of {old.epochs} epochs, --epochs asks for {layout.epochs}: give "
            f"at least {old.epochs}, or name another folder"
        )
