"""`dalikd doctor [DATA]`: what a data set is made of, and what is to be mended before a run meets it; without DATA
whether dalikd works on this machine."""

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalikd.pipelines.data import DataConfig, FilePath, open_split
from dalikd.pipelines.datasets.classes import alike, in_order
from dalikd.pipelines.datasets.file_list import is_no_data, scan
from dalikd.pipelines.datasets.info import default_statistics
from dalikd.pipelines.datasets.spec import Role
from dalikd.pipelines.doctor import Child, printable
from dalikd.pipelines.examine import Examination, examine
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.shards.layout import MANIFEST, ShardManifest
from dalikd.pipelines.sources import Source, check_same_classes
from dalikd.pipelines.surroundings import Surroundings, look_around
from dalikd.tools.cli import run_command
from dalikd.tools.installation import examine_installation
from dalikd.tools.summary import give_json, some, split_lines
from dalikd.trainers.tracking import check_writable

_NAMED = 10  # examples of a fault that are printed
_TREES = ("imagefolder", "imagenet", "imagenet100", "webdataset", "tfrecord")  # whose splits are folders of any name
_USUAL: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
}
_FORMATS = {  # that an ending promises
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".mpo"), "JPEG"),
    **{".png": "PNG", ".apng": "PNG", ".bmp": "BMP", ".webp": "WebP", ".tif": "TIFF", ".tiff": "TIFF"},
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PNM"),
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "JPEG 2000"),
}
_ODD_CLASSES = ("__pycache__", "cvs", "found.000", "recycled", "thumbnails", "lightroom", "cache", "tmp", "temp")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Look at every image of a data set as training would, on all cores: `dalikd doctor DATA`, or with --data.name and
    the other options of the data. DATA is --data.root: a folder of splits, of class folders, or of shards. Without DATA
    look at the installation: packages, GPU, cores, decoding, and a training run of two steps.

    What is found is remembered. Called again, it looks only at files that have changed. A run takes the sides of the
    images from there, and refuses to start with files that cannot be decoded, or with --data.bad_files replace goes
    without them from the start.

    Exit code 0: fine; 1: something is to be mended; 2: a mistake on the command line.

    Args:
        data: the data set.
        seed: of --data.limit and --data.share.
        json: JSON file for all that was found, - for stdout.
        manifest: file of JSON lines for all images, one each: path, split, class, label, height, width, bytes, fault,
            and sha256 if it was asked for.
        hash: compare contents too: images that are twice in a split, or in both; those of different classes first.
        processes: that read and decode; default: one a core.
    """

    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    json: FilePath | None = None
    manifest: FilePath | None = None
    hash: bool = False
    processes: int | None = None

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"--processes {self.processes}: give 1 or more")


class Fault(NamedTuple):
    """What is to be mended: `what` in a line, how often, all `examples`, and how to mend it."""

    what: str
    count: int
    examples: list[str]
    remedy: str


class Split(NamedTuple):
    """A split that could be opened, and what was found in it."""

    source: Source
    found: Examination


def doctor(options: DoctorOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Look, print the report, write the files that are asked for, and return the report."""
    if options.data == DataConfig() and not (options.manifest or options.hash):
        report = {"config": config, **examine_installation()}
        for what in report["faults"]:
            print(f"to mend: {what}")
        give_json(options.json, report)
        print(f"mend first: {report['faults'][0]}" if report["faults"] else "fine")
        return report
    if options.manifest is not None:
        check_writable("--manifest", Path(options.manifest))
    data, roles = _as_it_lies(options.data)
    faults: list[Fault] = []
    splits: dict[Role, Split] = {}
    crew: list[Child] = []
    report: dict[str, Any] = {"config": config, "data": data.name, "root": data.root, "splits": {}}
    for role in roles:
        source, around = _open(data, role, options.seed, faults)
        if source is None:
            continue
        splits[role] = Split(source, examine(source, crew, hashing=options.hash, processes=options.processes))
        report["splits"][role] = _describe(data, role, splits[role], around, faults)
        print("\n".join(split_lines(role, report["splits"][role])), flush=True)
    if len(splits) == 2:
        _compare_classes(splits, faults)
    if options.hash:
        report["duplicates"] = _duplicates(splits, faults)
    report |= {"faults": [fault._asdict() for fault in faults], "fine": not faults}
    for fault in faults:
        more = [f"and {len(fault.examples) - _NAMED:,} more"] if len(fault.examples) > _NAMED else []
        print("\n  ".join([f"to mend: {fault.what}", *fault.examples[:_NAMED], *more]))
    if options.manifest is not None:
        write_atomically(Path(options.manifest), lambda file: file.writelines(_rows(splits)))
        print(f"written: {options.manifest}")
    give_json(options.json, report)
    print(f"mend first: {faults[0].remedy or faults[0].what}" if faults else "fine")
    return report


# ------------------------------------------------------------------------------------------------------- opening


def _as_it_lies(data: DataConfig) -> tuple[DataConfig, tuple[Role, ...]]:
    """The data options, completed by what lies in the folder: shards, which splits there are; and these."""
    if data.root is None and data.name in _TREES:
        raise ValueError("doctor needs DATA: give the folder of a data set, as `dalikd doctor FOLDER`")
    if data.name not in _TREES:
        return data, ("train", "val")
    root = Path(os.path.realpath(Path(str(data.root)).expanduser()))
    if not root.is_dir():
        raise FileNotFoundError(f"{data.root} is no folder: give the folder of a data set, as `dalikd doctor FOLDER`")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    manifests = [root / folder for folder in (".", *folders) if (root / folder / MANIFEST).is_file()]
    if manifests and data.name == "imagefolder":
        data = replace(data, name=ShardManifest.read(manifests[0]).format)
    named: dict[Role, str | None] = {"train": data.train_split, "val": data.val_split}
    for role, usual in _USUAL.items():
        named[role] = named[role] or next((name for name in usual if name in folders), None)
    if named["train"] is None and (named["val"] is None or set(folders) - set(_USUAL["val"])):
        named = {"train": ".", "val": data.val_split}  # these are classes, one of them called test or val
    found: tuple[Role, ...] = tuple(role for role in named if named[role] is not None)
    return replace(data, train_split=named["train"], val_split=named["val"]), found


def _open(data: DataConfig, role: Role, seed: int, faults: list[Fault]) -> tuple[Source | None, Surroundings | None]:
    """The split, None where it cannot be opened before something is mended; and what lies beside its images."""
    around, split = None, data.train_split if role == "train" else data.val_split
    folder = Path(os.path.realpath(Path(str(data.root)).expanduser())) / (split or role)
    if data.name in (*_TREES[:3], "tinyimagenet") and folder.is_dir():
        around = look_around(folder)
        if around.blocked:
            what = f"{role}: {folder} cannot be opened for {some(len(around.blocked), 'entry', 'entries')} in it"
            faults.append(Fault(what, len(around.blocked), around.blocked, around.blocked[0]))
            return None, around
        empty = [name for name, count in around.classes.items() if not count] if data.name in _TREES else []
        if empty and len(empty) < len(around.classes):
            names = [str(folder / name) for name in empty]
            what = f"{role}: {len(empty):,} of {len(around.classes):,} classes without images"
            faults.append(Fault(what, len(empty), names, f"add images to {names[0]} or remove it"))
            return _without(data.name, folder, role, set(around.classes) - set(empty)), around
    try:
        return open_split(data, role, seed, silent=True), around
    except (ValueError, OSError) as error:
        if "--data." in str(error):  # it names the option that is mistaken
            raise
        faults.append(Fault(f"{role}: {error}", 1, [], ""))
        return None, around


def _without(name: str, folder: Path, role: Role, classes: Iterable[str]) -> Source:
    """Of a tree the classes that have images."""
    ordered, notes = in_order(classes, folder)
    tree = scan(folder, ordered)
    statistics = default_statistics(name)._asdict()
    return Source(
        name=name, split=role, classes=ordered, labels=tree.labels, files=tree.files, notes=tuple(notes), **statistics
    )


# ------------------------------------------------------------------------------------------------ what was found


def _describe(
    data: DataConfig, role: Role, split: Split, around: Surroundings | None, faults: list[Fault]
) -> dict[str, Any]:
    """All that is to be told of a split; what is to be mended goes to the faults."""
    source, found = split
    entries, words = found.record.entries, found.record.words
    counts = dict(zip(map(printable, source.classes), _counts(source), strict=True))
    bad = [
        {"path": printable(source.path(row)), "class": _class(source, row), "reason": words[entries["fault"][row]]}
        for row in np.flatnonzero(entries["fault"]).tolist()
    ]
    if len(counts) == 1:
        remedy = f"{role} has one class: add another; or if its own folders are the classes, give it as DATA"
        faults.append(Fault(f"{role}: there is one class, {next(iter(counts))}", 1, [], remedy))
    odd = [name for name in source.classes if is_no_data(name) or name[0] in "@#$~" or name.lower() in _ODD_CLASSES]
    if odd:
        what = f"{role}: {some(len(odd), 'class', 'classes')} that may be the work of a file server, tool or system"
        faults.append(Fault(what, len(odd), [printable(name) for name in odd], f"remove {odd[0]}, or rename the class"))
    if twins := alike(source.classes):
        faults.append(Fault(f"{role}: {some(len(twins), 'class')} with a look-alike", len(twins), twins, twins[0]))
    if bad:
        names = [f"{item['path']} ({item['reason']})" for item in bad]
        remedy = f"repair or remove {bad[0]['path']}, or train without such files by --data.bad_files replace"
        faults.append(Fault(f"{role}: {some(len(bad))} that cannot be decoded", len(bad), names, remedy))
    return {
        "split": source.split,
        "images": len(source),
        "bytes": int(entries["bytes"].sum()) if source.files is not None else None,
        "classes": counts,
        "sizes": _sizes(entries, data.image_size or source.image_size),
        "formats": _tally(entries["format"], words),
        "modes": _tally(entries["mode"], words),
        "orientations": {str(key): count for key, count in sorted(Counter(entries["orientation"].tolist()).items())},
        "wrong_endings": _wrong_endings(source, found) if source.files is not None else [],
        "cannot_decode": bad,
        "no_data": {} if around is None else around.no_data,
        "left_out": {} if around is None else around.left_out,
        "notes": list(source.notes),
        "known": found.known,
        "seconds": found.seconds,
        "seconds_of_processes": found.spent,
    }


def _counts(source: Source) -> list[int]:
    return np.bincount(source.labels, minlength=len(source.classes)).tolist()


def _class(source: Source, row: int) -> str:
    return printable(source.classes[source.labels[row]])


def _tally(places: np.ndarray, words: list[str]) -> dict[str, int]:
    counts = Counter(places.tolist())
    return {str(words[place]) or "unknown": count for place, count in counts.most_common()}


def _sizes(entries: np.ndarray, training: int) -> dict[str, Any]:
    """Height and width of the smallest, the largest and the median, and how many are below the training size."""
    sides = np.stack([entries["height"], entries["width"]], 1).astype(np.int64)
    sides = sides[(sides > 0).all(1)]
    if not len(sides):
        return {"training_size": training, "below": 0}
    area = sides.prod(1)
    return {
        "smallest": sides[area.argmin()].tolist(),
        "median": np.median(sides, 0).tolist(),
        "largest": sides[area.argmax()].tolist(),
        "training_size": training,
        "below": int(np.count_nonzero(sides.min(1) < training)),
    }


def _wrong_endings(source: Source, found: Examination) -> list[dict[str, str]]:
    names, words = found.record.names, found.record.words
    promised = [_FORMATS.get(os.path.splitext(os.fsdecode(name))[1].lower(), "") for name in names]  # noqa: PTH122 (of many)
    held = [words[place] for place in found.record.entries["format"].tolist()]
    return [
        {"path": printable(source.path(row)), "format": own}
        for row, (own, other) in enumerate(zip(held, promised, strict=True))
        if own and own != other
    ]


def _compare_classes(splits: dict[Role, Split], faults: list[Fault]) -> None:
    try:
        check_same_classes(splits["train"].source, splits["val"].source)
    except ValueError as error:
        faults.insert(0, Fault(f"the classes differ: {error}", 1, [], ""))


def _duplicates(splits: dict[Role, Split], faults: list[Fault]) -> list[dict[str, Any]]:
    """Groups of images with the same bytes: first those of different classes, then those in both splits."""
    places: list[tuple[Role, int]] = [(role, row) for role, split in splits.items() for row in range(len(split.source))]
    digests = np.concatenate([split.found.record.entries["sha256"] for split in splits.values()])
    hashed = np.concatenate([split.found.record.entries["hashed"] for split in splits.values()])
    _, group, counts = np.unique(digests, axis=0, return_inverse=True, return_counts=True)
    members = defaultdict[int, list[int]](list)
    for place in np.flatnonzero(hashed & (counts[group] > 1)).tolist():
        members[int(group[place])].append(place)
    groups = []
    for number, own in members.items():
        if len(own) < 2:  # the other one is an image that could not be read
            continue
        files = [
            {"split": role, "path": printable(splits[role].source.path(row)), "class": _class(splits[role].source, row)}
            for role, row in (places[place] for place in own)
        ]
        groups.append(
            {
                "sha256": digests[members[number][0]].tobytes().hex(),
                "labels_differ": len({file["class"] for file in files}) > 1,
                "in_both_splits": len({file["split"] for file in files}) > 1,
                "files": files,
            }
        )
    groups.sort(key=lambda item: (not item["labels_differ"], not item["in_both_splits"]))
    for kind, what, remedy in (
        ("labels_differ", "in several classes", "keep the one whose class is right"),
        ("in_both_splits", "in both splits", "remove it from one, for validation must be unseen"),
    ):
        lines = [_same(item["files"]) for item in groups if item[kind]]
        if lines:
            faults.append(Fault(f"{some(len(lines))} {what}", len(lines), lines, f"{lines[0]}: {remedy}"))
    rest = [item for item in groups if not (item["labels_differ"] or item["in_both_splits"])]
    if rest:
        print(f"{some(len(rest))} several times in one class of one split, such as {_same(rest[0]['files'])}")
    return groups


def _same(files: Sequence[dict[str, str]]) -> str:
    more = f" and {len(files) - 4} more" if len(files) > 4 else ""
    return " = ".join(f"{file['path']} ({file['split']}, {file['class']})" for file in files[:4]) + more


def _rows(splits: dict[Role, Split]) -> Iterable[bytes]:
    """The lines of the manifest."""
    for role, (source, found) in splits.items():
        for row, entry in enumerate(found.record.entries):
            line = {
                **{"path": printable(source.path(row)), "split": role, "class": _class(source, row)},
                **{"label": int(source.labels[row]), "height": int(entry["height"]), "width": int(entry["width"])},
                **{"bytes": int(entry["bytes"]), "fault": found.record.words[entry["fault"]] or None},
                **({"sha256": entry["sha256"].tobytes().hex()} if entry["hashed"] else {}),
            }
            yield json.dumps(line).encode() + b"\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--data.root")
    if not run_command("doctor", doctor, words)["fine"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
