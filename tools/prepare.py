"""`dalikd prepare`: an image set into webdataset tars or TFRecord files, which are read in one sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from dalikd.pipelines.containers import DESCRIPTION
from dalikd.pipelines.convert import WriteOptions, check_target, write_records
from dalikd.pipelines.data import DataConfig, open_split
from dalikd.pipelines.records import Records
from dalikd.pipelines.sources import check_same_classes
from dalikd.tools.cli import guarded


@dataclass
class SourceConfig:
    """What is prepared.

    Args:
        name: the data set.
        root: its folder.
        train_split: name of the training split's folder; default: the data set's own.
        val_split: name of the validation split's folder; default: the data set's own.
        limit: take only so many training pictures; seeded, class shares kept.
        val_limit: take only so many validation pictures; seeded, class shares kept.
        download: let torchvision download CIFAR into the root if it is not there.
    """

    name: Literal["imagefolder", "imagenet", "tinyimagenet", "cifar10", "cifar100", "digits"] = "imagefolder"
    root: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    limit: int | None = None
    val_limit: int | None = None
    download: bool = False


@dataclass(frozen=True)
class PrepareOptions(WriteOptions):
    """Write a data set into containers, shuffled, indexed and with checksums; or verify what was written.

    Args:
        data: the data set.
        output: folder of the result; each split gets a folder in it.
        split: train, val, or both.
        verify: read this folder's files again and compare them with their checksums; nothing is written.
    """

    data: SourceConfig = field(default_factory=SourceConfig)
    output: Path | None = None
    split: Literal["both", "train", "val"] = "both"
    verify: Path | None = None


def prepare(options: PrepareOptions) -> None:
    """Write the splits that are asked for, and say how to train from them; or verify."""
    if options.verify is not None:
        return verify(options.verify)
    if options.output is None:
        raise ValueError("--output FOLDER says where to write; or verify what was written with --verify FOLDER")
    roles = ("train", "val") if options.split == "both" else (options.split,)
    config = DataConfig(**vars(options.data))
    sources = {role: open_split(config, role, options.seed) for role in roles}
    if len(sources) == 2:
        check_same_classes(*sources.values())
    for role, source in sources.items():
        check_target(source, options.output / role, options)
    for role, source in sources.items():
        written = write_records(source, options.output / role, options)
        print(
            f"{options.output / role}: {written.images} images of {len(written.classes)} classes in "
            f"{len(written.shards)} files, {written.bytes / 1e6:.1f} MB"
        )
    print(f"read it with --data.name {options.format} --data.root {options.output}")


def verify(folder: Path) -> None:
    """Verify every split in a folder, or the one that it is."""
    found = sorted(path.parent for path in (*folder.glob(DESCRIPTION), *folder.glob(f"*/{DESCRIPTION}")))
    if not found:
        raise FileNotFoundError(
            f"--verify {folder}: there is no {DESCRIPTION} in it or in its folders: name an --output"
        )
    for split in found:
        records = Records(split)
        records.verify()
        print(f"{split}: {len(records)} images in {len(records.paths)} files, all checksums fit")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with guarded("prepare"):
        arguments = None if argv is None else list(argv)
        prepare(auto_cli(PrepareOptions, args=arguments, prog="dalikd prepare", exit_on_error=False))


if __name__ == "__main__":
    main()
