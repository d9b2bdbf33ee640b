"""`dalikd prepare`: gets a data set and checks it; writes it into webdataset tars or TFRecords, read in sequence."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dalikd.pipelines.content import MAX_PIXELS
from dalikd.pipelines.data import DataConfig, FilePath, open_sources, open_split
from dalikd.pipelines.datasets.arrays import PUBLISHED_FILES, published_set
from dalikd.pipelines.datasets.info import DATASET_INFO, Finding
from dalikd.pipelines.datasets.spec import Role
from dalikd.pipelines.objects import ObjectStore, is_object_url
from dalikd.pipelines.shards.layout import CHECKSUMS, MANIFEST, REMEDY, ShardManifest
from dalikd.pipelines.shards.verify import verify_split
from dalikd.pipelines.shards.write import WriteOptions, check_decodable, upload_splits, write_splits
from dalikd.pipelines.sources import Source, check_count
from dalikd.tools.cli import run_function
from dalikd.tools.summary import give_json


@dataclass
class SourceConfig:
    """What is prepared.

    Args:
        name: the data set.
        root: its folder.
        train_split: name of the training split, or of its folder; svhn also has extra and train+extra. Default: the
            data set's own.
        val_split: name of the validation split, or of its folder; default: the data set's own.
        classes: text file of the classes to keep, one a line; default: all, and for imagenet100 a hundred chosen by
            class_seed.
        class_seed: of that choice; default: 0.
        limit: take only so many training images; seeded, class shares kept.
        share: take only this share of each class's training images, or of those that limit leaves; seeded, rounded to
            the nearest whole number.
        val_limit: take only so many validation images; seeded, class shares kept.
        download: let torchvision download CIFAR, SVHN or STL-10 into the root if it is not there.
        max_pixels: of an image: larger ones are taken for bad files by their headers, before memory is asked for them.
    """

    name: Literal[
        "imagefolder", "imagenet", "imagenet100", "tinyimagenet", "cifar10", "cifar100", "svhn", "stl10", "digits"
    ] = "imagefolder"
    root: FilePath | None = None
    train_split: str | None = None
    val_split: str | None = None
    classes: FilePath | None = None
    class_seed: int | None = None
    limit: int | None = None
    share: float = 1.0
    val_limit: int | None = None
    download: bool = False
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class PrepareOptions(WriteOptions):
    """Download a data set, check it, or write it into shards: shuffled, indexed, with checksums.

    Without --output nothing is written but what --data.download fetches: --data.download true and --check true compare
    published files with their MD5, and count the images of Tiny-ImageNet and ImageNet.

    Args:
        data: the data set.
        output: folder of the result, or s3://BUCKET/FOLDER, or gs://; each split gets a folder in it.
        split: train, val, or both.
        verify: read what was written into this folder again and compare every record; nothing is written.
        json: JSON file for what was found, written or verified, - for stdout.
    """

    data: SourceConfig = field(default_factory=SourceConfig)
    output: FilePath | None = None
    split: Literal["both", "train", "val"] = "both"
    verify: Path | None = None
    json: Path | None = None


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Get, check and write the splits that are asked for, and say how to train from them; or verify. Returns what was
    done, which --json also gets where something is not as it should be."""
    found: dict[str, Any] = {}
    try:
        if options.verify is not None:
            verify(options.verify, found)
        else:
            _prepare(options, found)
    finally:
        if any(found.values()):
            give_json(options.json, found)
    return found


def _prepare(options: PrepareOptions, found: dict[str, Any]) -> None:
    if options.output is None and not (options.check or options.data.download):
        raise ValueError(
            "--output FOLDER says where to write; or look at the data set with --check true, "
            "fetch it with --data.download true, verify what was written with --verify FOLDER"
        )
    checks = options.check or options.output is None
    sources = check_published(options, found) if checks else open_splits(options)
    if options.output is None:
        return
    found["written"] = []
    if is_object_url(options.output):
        store = ObjectStore(options.output, writes=True)
        manifests = upload_splits({str(role): source for role, source in sources.items()}, store, options)
    else:
        manifests = write_splits({Path(options.output, role): source for role, source in sources.items()}, options)
    for role, written in zip(sources, manifests, strict=True):
        print(
            f"{options.output}/{role}: {written.images} images of {len(written.classes)} classes in "
            f"{len(written.shards)} files, {written.bytes / 1e6:.1f} MB"
        )
        sizes = {"images": written.images, "classes": len(written.classes), "files": len(written.shards)}
        found["written"].append({"folder": f"{options.output}/{role}", **sizes, "bytes": written.bytes})
    cache = " --data.cache FOLDER" if is_object_url(options.output) else ""
    print(f"read it with --data.name {options.format} --data.root {options.output}{cache}")


def open_splits(options: PrepareOptions) -> dict[Role, Source]:
    """The splits that are asked for, downloaded if that is asked for too."""
    config = DataConfig(**vars(options.data))
    if options.split == "both":
        return dict(zip(_roles(options), open_sources(config, options.seed), strict=True))
    return {options.split: open_split(config, options.split, options.seed)}


def check_published(options: PrepareOptions, found: dict[str, Any]) -> dict[Role, Source]:
    """Open the splits and compare the data set with what is published, line by line; they go into `found` too.

    Raises:
        ValueError: something is not as published, or an image cannot be decoded.
    """
    data, listed = options.data, found.setdefault("checked", [])
    sources = open_splits(options) if data.download else None  # else a missing file would be an error, not a line
    if data.name in PUBLISHED_FILES:
        published = published_set(data.name).verify(_root(data), [_split(data, role) for role in _roles(options)])
        _report(data, published, listed)
    sources = open_splits(options) if sources is None else sources
    part = data.classes is not None
    fewer = {"train": data.limit is not None or data.share < 1, "val": data.val_limit is not None}
    whole = ((_split(data, role), source) for role, source in sources.items() if not fewer[role])
    _report(data, (check_count(source, split, part=part) for split, source in whole), listed)
    if options.check and options.output is None:  # else they are decoded before they are written
        for source in sources.values():
            check_decodable(source, options.threads)
    return sources


def _report(data: SourceConfig, findings: Iterable[Finding], listed: list[dict[str, Any]]) -> None:
    """Print and list them as they come.

    Raises:
        ValueError: not all are as published.
    """
    bad = []
    for finding in findings:
        print(finding, flush=True)
        listed.append(finding._asdict())
        bad += [finding] if finding.state != "whole" else []
    if bad:
        first, more = f"{bad[0].place} is {bad[0].state}", f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{data.name} is not as published ({first}{more}): {_remedy(data)}")


def _remedy(data: SourceConfig) -> str:
    if data.name in PUBLISHED_FILES:
        return published_set(data.name).remedy
    origin = DATASET_INFO[data.name].origin
    return origin.replace("ROOT", data.root or "ROOT") if origin else "repair it"


def _roles(options: PrepareOptions) -> tuple[Role, ...]:
    return ("train", "val") if options.split == "both" else (options.split,)


def _split(data: SourceConfig, role: Role) -> str:
    """What the split is called where its files or images are counted; folders may have other names."""
    if data.name not in PUBLISHED_FILES:
        return role
    named = data.train_split if role == "train" else data.val_split
    return named or {"train": "train", "val": "test"}[role]


def _root(data: SourceConfig) -> Path:
    if data.root is None:
        raise ValueError(f"{data.name} needs a folder: give --data.root FOLDER")
    return Path(data.root).resolve()


def verify(folder: Path, report: dict[str, Any]) -> None:
    """Verify every split in a folder, or the one that it is; print a line for each file or record that is wrong, which
    also goes into the report.

    Raises:
        ValueError: one is not as it was written.
    """
    found = sorted(path.parent.resolve() for path in (*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")))
    if not found:
        raise FileNotFoundError(f"--verify {folder}: there is no {MANIFEST} in it or in its folders: name an --output")
    report["verified"] = []
    for split in found:
        started, lines = time.perf_counter(), list[str]()
        report["verified"].append({"folder": str(split), "wrong": lines})
        for line in verify_split(split):
            print(line, flush=True)
            lines.append(line)
        if not lines:
            manifest = ShardManifest.read(split)
            report["verified"][-1] |= {"images": manifest.images, "files": len(manifest.shards)}
            rate = manifest.images / (time.perf_counter() - started)
            old = "" if CHECKSUMS in manifest.arrays else f"; an earlier dalikd wrote no checksum of {MANIFEST} itself"
            print(
                f"{split}: {manifest.images} images in {len(manifest.shards)} files, all as they were written "
                f"({rate:,.0f} images/s){old}"
            )
    if wrong := sum(len(split["wrong"]) for split in report["verified"]):
        raise ValueError(
            f"{folder} is not as it was written (in {wrong} places, listed above): copy it again, or {REMEDY}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("prepare", prepare, argv, options=PrepareOptions)


if __name__ == "__main__":
    main()
