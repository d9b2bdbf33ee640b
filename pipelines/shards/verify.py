"""Compares every record of a split's shards with what was written."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalikd.pipelines.files import file_digest
from dalikd.pipelines.progress import progress
from dalikd.pipelines.shards.layout import ARRAYS, CHECKSUMS, NAMES, Shard, ShardFormat, ShardManifest
from dalikd.pipelines.shards.read import (
    check_index,
    check_listing,
    check_rows,
    check_shard,
    read_array,
    read_listed,
    record_parts,
    record_places,
)
from dalikd.pipelines.shards.tfrecord import unframe
from dalikd.pipelines.shards.write import Sample, pack_members

__all__ = ["verify_split"]

_CHUNK = 1 << 20  # bytes


def verify_split(folder: Path) -> Iterator[str]:
    """Read a split's folder on all cores, and compare it with what was written: each file by its SHA-256; each record
    by its place, id, label and the checksum of its image; where a shard differs, also its headers and TFRecord's
    checksums.

    Yields:
        a line for each file or record that is not as it was written, a record with its shard, its number in that
        (from 0), its id, and where its image came from.

    Raises:
        ValueError: dataset.json is damaged, so that nothing is known of the rest.
    """
    manifest, wrong = ShardManifest.read(folder), []
    _attempt(wrong, check_listing, folder, manifest)
    arrays = {name: _attempt(wrong, read_array, folder, manifest, name) for name in manifest.arrays if name != NAMES}
    origins = _attempt(wrong, read_listed, folder, manifest, NAMES) if NAMES in manifest.arrays else None
    labels, order = (arrays.get(name) for name in ARRAYS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = None
    if labels is not None and order is not None:
        _attempt(wrong, check_rows, folder, manifest, labels, order)
        known = _Known(order, labels, arrays.get(CHECKSUMS), [] if origins is None else origins.decode().splitlines())
    yield from wrong
    firsts = np.cumsum([0, *(shard.images for shard in manifest.shards[:-1])]).tolist()
    verify = partial(_verify_shard, folder, manifest.format, known)
    with (
        progress(f"verifying {folder.name}", total=manifest.images, unit=" images") as bar,
        ThreadPoolExecutor(cores, thread_name_prefix="dalikd-verify") as pool,
    ):
        for shard, found in zip(manifest.shards, pool.map(verify, manifest.shards, firsts), strict=True):
            yield from found
            bar.update(shard.images)


class _Known(NamedTuple):
    """What is known of the records: ids in storage order; labels, checksums and origins by id, the last two where the
    folder has them."""

    order: np.ndarray
    labels: np.ndarray
    checksums: np.ndarray | None
    origins: list[str]


def _attempt(wrong: list[str], check: Callable[..., Any], *arguments: Any) -> Any:
    """What a check returns; if it fails, None, and why goes to the list."""
    try:
        return check(*arguments)
    except (ValueError, OSError) as error:
        wrong.append(str(error))
        return None


def _verify_shard(folder: Path, format: ShardFormat, known: _Known | None, shard: Shard, first: int) -> list[str]:
    """Lines for what is wrong with a shard whose first record has the storage position `first`."""
    path, wrong = folder / shard.name, []
    _attempt(wrong, check_shard, folder, shard)
    lines = _attempt(wrong, check_index, folder, format, shard)
    if not path.is_file():
        return wrong
    if lines is None or known is None:
        if _attempt(wrong, file_digest, path) != shard.sha256:
            wrong.append(
                f"{path} is not as it was written (its checksum differs), and its records cannot be told apart"
            )
        return wrong
    ids = known.order[first : first + shard.images].tolist()
    digest, found = _walk(path, format, known, lines, ids, deep=False)
    if digest != shard.sha256:
        _, found = _walk(path, format, known, lines, ids, deep=True)
        if not found and not wrong:
            found = [f"{path} is not as it was written (its checksum differs); which record differs is not known"]
    return wrong + found


def _walk(
    path: Path, format: ShardFormat, known: _Known, lines: list[str], ids: list[int], *, deep: bool
) -> tuple[str, list[str]]:
    """The shard's SHA-256, and a line for each record that is wrong.

    Args:
        path: of the shard.
        format: of it.
        known: of its records.
        lines: of its index; records follow each other without a gap.
        ids: that its records should have.
        deep: look also at what training never reads.
    """
    digest, found = sha256(), []
    with path.open("rb") as file:
        for number, (line, id) in enumerate(zip(lines, ids, strict=True)):
            start, stop, fields = record_places(line, format)
            content = file.read(stop - start)
            digest.update(content)
            if not content:
                found.append(f"{path} ends before its record {number} of {len(ids)}: it is cut off")
                break
            reason = _reason(content, start, fields, format, known, id, deep=deep)
            if reason:
                origin = f", from {known.origins[id]}" if known.origins else ""
                found.append(f"{path} record {number} (id {id}{origin}): {reason}")
        while content := file.read(_CHUNK):
            digest.update(content)
    return digest.hexdigest(), found


def _reason(
    content: bytes, start: int, fields: list[str], format: ShardFormat, known: _Known, id: int, *, deep: bool
) -> str:
    """What is wrong with a record; empty if nothing is."""
    label = int(known.labels[id])
    try:
        record = record_parts(content, start, fields, format, check=False)
        reason = record.differs(id, label, None if known.checksums is None else int(known.checksums[id]))
        if deep and not reason and format == "tfrecord":
            unframe(content)
    except ValueError as error:
        return str(error)
    if deep and not reason and format == "webdataset":
        expected, _ = pack_members(Sample(id, label, record.encoded, fields[0], ""), start)
        reason = "" if expected == content else "a header or padding of the tar is not as it was written"
    return reason
