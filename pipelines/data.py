"""The data options of a run, and what follows from them: sources, which are opened here, and views."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NewType, cast

from dalikd.pipelines.content import MAX_PIXELS
from dalikd.pipelines.datasets.arrays import find_arrays
from dalikd.pipelines.datasets.folders import find_digits, find_images, find_tinyimagenet, find_tree
from dalikd.pipelines.datasets.info import DATASET_INFO, Statistics, default_statistics
from dalikd.pipelines.datasets.object_list import find_objects
from dalikd.pipelines.datasets.spec import Role, SplitIndex, SplitSpec
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.hardware import Decode, decoding_on
from dalikd.pipelines.objects import ObjectOptions, ObjectStore, is_object_url
from dalikd.pipelines.shards.layout import EXTENSIONS, ShardFormat
from dalikd.pipelines.shards.read import ShardSet
from dalikd.pipelines.sources import Source, check_same_classes

if TYPE_CHECKING:
    import torch

__all__ = [
    "SOURCE_NAMES",
    "DataConfig",
    "FilePath",
    "as_used",
    "evaluation_view",
    "open_source",
    "open_sources",
    "open_split",
    "training_view",
]

#: the type of options that are paths: command lines and configs may use ~ and $VAR in them
FilePath = NewType("FilePath", str)

_DOWNLOADABLE = tuple(name for name, info in DATASET_INFO.items() if info.downloadable)
_FINDERS: dict[str, Callable[[SplitSpec], SplitIndex]] = {
    "imagefolder": find_tree,
    "images": find_images,
    "imagenet": find_tree,
    "imagenet100": find_tree,
    "tinyimagenet": find_tinyimagenet,
    "cifar10": find_arrays,
    "cifar100": find_arrays,
    "svhn": find_arrays,
    "stl10": find_arrays,
    "digits": find_digits,
}
SOURCE_NAMES = (*_FINDERS, *EXTENSIONS)
_PADDING = {32: 4, 64: 8, 224: 28}


@dataclass
class DataConfig:
    """Which images, and how they are read.

    Args:
        name: the data set: imagefolder (any tree of class folders), images (a folder of images without labels, to
            measure and distil with), imagenet, imagenet100 (a hundred classes of an ImageNet tree), tinyimagenet (its
            original layout), cifar10 and cifar100 (the published python files), svhn and stl10 (the published files),
            digits (scikit-learn's, written out as JPEGs), webdataset and tfrecord (what `dalikd prepare` has written of
            those with labels).
        root: its folder; of images all of it is taken, at any depth. Of imagefolder, imagenet, imagenet100 and shards
            also s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.
        train_split: name of the training split, or of its folder; svhn also has extra and train+extra. Default: the
            data set's own; of images the whole root.
        val_split: name of the validation split, or of its folder; default: the data set's own.
        val_root: for images: the folder of labelled ones that nets are evaluated on; it holds class folders, or has the
            folder that val_split names. Without either there is no evaluation, and the classes are the teacher's.
        classes: text file of the classes to keep, one a line, # before remarks; labels follow the data set's order, not
            the file's. Default: all; for imagenet100 a hundred chosen by class_seed.
        class_seed: of that choice; default: 0. It has nothing to do with the seed of training.
        image_size: side of the training images in pixels; default: the data set's own (imagefolder: 224).
        limit: use only so many training images; seeded, class shares kept.
        share: use only this share of each class's training images, or of those that limit leaves; seeded, rounded to
            the nearest whole number.
        val_limit: use only so many validation images; seeded, class shares kept.
        download: let torchvision download CIFAR, SVHN or STL-10 into the root if it is not there.
        crop: how training images are cut: random_resized_crop, pad_crop (pad, crop, flip), or auto: pad_crop up to
            96 pixels, random_resized_crop above.
        padding: pixels added on each side before cropping; default: 4 at 32, 8 at 64, 28 at 224, an eighth else.
        border: what the padding holds.
        interpolation: filter of every resize.
        val_resize: short side that evaluation resizes to before its centre crop; default: the image size up to 96
            pixels, 8/7 of it above (256 for 224).
        threads: DALI's CPU threads for each process; default: its share of the cores, 16 at most; on a GPU 4 for
            evaluation.
        prefetch: batches made ahead.
        hw_decoder_load: 1: a GPU's JPEG engine decodes what it can; 0: the GPU's cores decode all. Only `bench` takes
            shares between, with which an image's pixels depend on its neighbours in the batch. Default: 1 where the
            GPU has an engine.
        decode: on a GPU, decode windows of JPEGs, or whole ones that are cut then, which takes longer; auto: whole
            ones where nvImageCodec is 0.9 or newer and a test at the start finds that it cannot decode windows.
        resident: decode every image once and keep it in the device's memory, 4 bytes a pixel; for pad_crop views
            (evaluation too, unless it resizes). CIFAR, SVHN and STL-10 are always kept so.
        bad_files: at an image that cannot be decoded stop, or replace it by the next one and go on.
        bad_files_limit: stop nevertheless once more images of a split than this had to be replaced; default: 1 % of
            them, but at least 10 and at most 1000.
        max_pixels: of an image: larger ones are taken for bad files by their headers, before memory is asked for them.
        endpoint: URL of the object store; default: AWS_ENDPOINT_URL, else Amazon's or Google's own.
        in_flight: requests to the object store at once, of each process.
        cache: folder in which objects are kept on this machine; shards are copied there before they are read.
        cache_size: bytes that it may have, as 200G; those that were used the longest time ago go first. Default: what
            it has, and nine tenths of what is free on its disk.
    """

    name: Literal[
        "imagefolder",
        "images",
        "imagenet",
        "imagenet100",
        "tinyimagenet",
        "cifar10",
        "cifar100",
        "svhn",
        "stl10",
        "digits",
        "webdataset",
        "tfrecord",
    ] = "imagefolder"
    root: FilePath | None = None
    train_split: str | None = None
    val_split: str | None = None
    val_root: FilePath | None = None
    classes: FilePath | None = None
    class_seed: int | None = None
    image_size: int | None = None
    limit: int | None = None
    share: float = 1.0
    val_limit: int | None = None
    download: bool = False
    crop: Literal["auto", "random_resized_crop", "pad_crop"] = "auto"
    padding: int | None = None
    border: Literal["zero", "reflect"] = "zero"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    val_resize: int | None = None
    threads: int | None = None
    prefetch: int = 2
    hw_decoder_load: float | None = None
    decode: Decode = "auto"
    resident: bool = False
    bad_files: Literal["stop", "replace"] = "stop"
    bad_files_limit: int | None = None
    max_pixels: int = MAX_PIXELS
    endpoint: str | None = None
    in_flight: int = 128
    cache: FilePath | None = None
    cache_size: str | None = None


def as_used(config: DataConfig, source: Source, device: "torch.device") -> dict[str, Any]:
    """The options for the record of a run: of the decoder what it does on this device, not what was left to it."""
    return {**asdict(config), **decoding_on(source, device, config.decode, config.hw_decoder_load).options()}


def open_sources(config: DataConfig, seed: int) -> tuple[Source, Source]:
    """Open the training and the validation split. Where images have no labels, and none are given to evaluate on, the
    second is the first.

    Raises:
        ValueError: the data set is not as it should be, or the splits have different classes.
        FileNotFoundError: a folder or file is missing.
    """
    train = _open(config, "train", seed)
    if not train.labelled and config.val_root is None and config.val_split is None:
        _print_notes(train)
        return train, train
    val = _open(config, "val", seed)
    _print_notes(train, val)
    if train.labelled:
        check_same_classes(train, val)
    elif train.files is not None and val.files is not None and Path(val.files.root).is_relative_to(train.files.root):
        raise ValueError(
            f"{val.files.root} is to be evaluated on, and lies in the folder that is trained on, {train.files.root}: "
            "name another one with --data.train_split, or move one of them"
        )
    return train, val


def open_split(config: DataConfig, role: Literal["train", "val"], seed: int, *, silent: bool = False) -> Source:
    """Open one split, limited as the options say; print what was left out of it and how its classes are ordered."""
    source = _open(config, role, seed)
    if not silent:
        _print_notes(source)
    return source


def _print_notes(*sources: Source) -> None:
    """Each line once, by the first process: accelerate and torchrun number them in RANK."""
    if os.environ.get("RANK", "0") == "0":
        for note in dict.fromkeys(note for source in sources for note in source.notes):
            print(note, flush=True)


def _open(config: DataConfig, role: Literal["train", "val"], seed: int) -> Source:
    train = role == "train"
    split, limit = (config.train_split, config.limit) if train else (config.val_split, config.val_limit)
    name, root = config.name, config.root
    if config.val_root is not None and name != "images":
        raise ValueError(
            f"--data.val_root is for --data.name images: leave it out, {name} has a validation split of its own"
        )
    if name == "images" and not train:
        if config.val_root is None and split is None:
            raise ValueError(
                "images have no labels: name a folder of labelled ones to evaluate on with --data.val_root"
            )
        if config.val_root is not None and not Path(config.val_root).expanduser().is_dir():
            raise FileNotFoundError(f"--data.val_root {config.val_root} is no folder: name one of class folders")
        name, root, split = "imagefolder", config.val_root or root, split or "."
    source = open_source(
        name,
        root,
        role,
        split=split,
        limit=limit,
        share=config.share if train else 1.0,
        seed=seed,
        download=config.download,
        classes=config.classes,
        class_seed=config.class_seed,
        train_split=config.train_split,
        max_pixels=config.max_pixels,
        objects=_object_options(config),
    )
    if config.name == "images" and not train and split == "." and source.files is not None:
        # as where the folder is a split of labelled images: its fingerprint is the same
        source = replace(source, split=Path(source.files.root).name)
    return source


def _object_options(config: DataConfig) -> ObjectOptions:
    """Raises ValueError: one of them is none, or the images lie on a disk."""
    options = ObjectOptions(config.endpoint, config.in_flight, config.cache, _bytes(config.cache_size))
    if options != ObjectOptions() and not is_object_url(config.root):
        named = [name for name in ("endpoint", "in_flight", "cache", "cache_size") if getattr(config, name) is not None]
        changed = [name for name in named if getattr(config, name) != getattr(DataConfig, name)]
        raise ValueError(
            f"--data.{changed[0]} is for images in object storage, as --data.root s3://BUCKET/FOLDER: leave it out"
        )
    if config.cache is None and config.cache_size is not None:
        raise ValueError("--data.cache_size is that of --data.cache: name a folder with it")
    return options


def _bytes(text: str | None) -> int | None:
    """`200G` in bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1_000_000:
        raise ValueError(f"--data.cache_size {text}: give bytes, as 200G or 500M, at least 1M")
    return size


def open_source(
    name: str,
    root: str | Path | None,
    role: Role,
    *,
    split: str | None = None,
    limit: int | None = None,
    share: float = 1.0,
    seed: int = 0,
    download: bool = False,
    classes: str | Path | None = None,
    class_seed: int | None = None,
    train_split: str | None = None,
    max_pixels: int = MAX_PIXELS,
    objects: ObjectOptions = ObjectOptions(),  # noqa: B008 - it is frozen
) -> Source:
    """Find the images of one split.

    Args:
        name: one of SOURCE_NAMES.
        root: the data set's folder; digits needs none.
        role: what the images are for; decides the split where none is named.
        split: the split's own name. For folder trees the folder, "." where `root` itself holds the class folders.
        limit: keep this many, stratified.
        share: keep this share of each class, of what `limit` leaves.
        seed: of `limit` and `share`.
        download: fetch what torchvision can fetch if it is missing.
        classes: file that lists the classes to keep; default: all, for imagenet100 a hundred chosen by `class_seed`.
        class_seed: of that choice; default: 0.
        train_split: the training split's own name, where Tiny-ImageNet's validation split finds its classes.
        max_pixels: images of more are not read.
        objects: how they are read from object storage, if `root` is a URL.

    Raises:
        ValueError: unknown name, role, split or layout; a class without images or one that is not there; a limit or
            share out of range; an option that does not go with the data set.
        FileNotFoundError, NotADirectoryError, FileExistsError: a folder or file is missing or in the way.
        ConnectionError: the download failed, or the object store.
    """
    if name not in SOURCE_NAMES:
        close = get_close_matches(name, SOURCE_NAMES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"data set {name!r} is unknown: {hint}give one of {', '.join(SOURCE_NAMES)}")
    if role not in ("train", "val"):
        raise ValueError(f"role {role!r} is unknown: give train or val")
    url = root if isinstance(root, str) and is_object_url(root) else None
    folder, listed = (
        None if path is None else Path(os.path.realpath(Path(path).expanduser()))
        for path in (None if url else root, classes)
    )
    _check_options(name, folder, download, listed, class_seed)
    if name == "images":
        split = split or "."
    split = split or ("test" if role == "val" and name in _DOWNLOADABLE else role)  # as these are published
    spec = SplitSpec(name, folder, role, split, download, listed, class_seed or 0, train_split or "train")
    if url is not None and name not in EXTENSIONS and _FINDERS[name] is not find_tree:
        raise ValueError(f"{name} is not read from object storage: copy it to a disk, or give imagefolder")
    if name in EXTENSIONS:
        source = _open_shards(spec if url is None else _copied(spec, url, objects))
    else:
        index = _FINDERS[name](spec) if url is None else find_objects(spec, ObjectStore(url, objects))
        source = Source(
            name=name,
            split=split,
            classes=index.classes,
            labels=index.labels,
            files=index.files,
            arrays=index.arrays,
            notes=index.notes,
            labelled=name != "images",
            **default_statistics(name)._asdict(),
        )
    source = replace(source, max_pixels=max_pixels)
    option = "--data.limit" if role == "train" else "--data.val_limit"
    source = source if limit is None else source.limit(limit, seed, option=option)
    return source.share(share, seed)


def _check_options(name: str, root: Path | None, download: bool, classes: Path | None, class_seed: int | None) -> None:
    if download and name not in _DOWNLOADABLE:
        origin = DATASET_INFO[name].origin if name in DATASET_INFO else ""
        advice = f"; to get it, {origin.replace('ROOT', str(root or 'ROOT'))}" if origin else ""
        raise ValueError(f"{name} cannot be downloaded by --data.download; only {', '.join(_DOWNLOADABLE)} can{advice}")
    if classes is not None and name == "images":
        raise ValueError("--data.classes chooses classes, and images have none: leave it out")
    if classes is not None and name in EXTENSIONS:
        raise ValueError(
            "--data.classes: shards are read whole; choose classes when they are written: "
            "`dalikd prepare --data.classes FILE`"
        )
    if class_seed is not None and (name != "imagenet100" or classes is not None):
        raise ValueError(
            f"--data.class_seed {class_seed} chooses the classes of imagenet100 where --data.classes names none: "
            "leave it out"
        )


def _copied(spec: SplitSpec, url: str, objects: ObjectOptions) -> SplitSpec:
    """The same split on this machine, copied from object storage: DALI reads shards there one request at a time."""
    if objects.cache is None:
        raise ValueError("shards in object storage are copied before they are read: name a folder with --data.cache")
    store = ObjectStore(url, objects)
    root = Path(os.path.realpath(objects.cache)) / "shards" / sha256(store.url.encode()).hexdigest()[:16]
    store.copy_folder(spec.split.strip("/") if spec.split != "." else "", root / spec.split)
    return replace(spec, root=root)


def _open_shards(spec: SplitSpec) -> Source:
    """What `dalikd prepare` has written. The statistics are those of the data set that it was made from."""
    shards = ShardSet(spec.split_folder(), cast(ShardFormat, spec.name))
    manifest = shards.manifest
    return Source(
        name=manifest.name,
        split=manifest.split,
        classes=manifest.classes,
        labels=shards.labels,
        mean=manifest.mean,
        std=manifest.std,
        image_size=manifest.image_size,
        shards=shards,
        notes=shards.notes,
    )


def training_view(config: DataConfig, source: Source) -> View:
    """The view that training sees: RandomResizedCrop and flip, or pad, crop and flip."""
    size = config.image_size or source.image_size
    crop = config.crop if config.crop != "auto" else ("pad_crop" if size <= 96 else "random_resized_crop")
    return View(size, crop, padding=_padding(config, size), border=config.border, interpolation=config.interpolation)


def evaluation_view(config: DataConfig, source: Source | Statistics) -> View:
    """The view that evaluation sees: resize the short side, crop the centre."""
    size = config.image_size or source.image_size
    resize = config.val_resize or (size if size <= 96 else round(size * 8 / 7))
    if resize < size:
        raise ValueError(f"--data.val_resize {resize} is smaller than the image size {size}: set it to at least {size}")
    return View(size, "center_crop", resize=resize, interpolation=config.interpolation)


def _padding(config: DataConfig, size: int) -> int:
    padding = config.padding if config.padding is not None else _PADDING.get(size, size // 8)
    if not 0 < padding < size:
        given = f"{padding}" if config.padding is not None else f"is {padding} where it is not given, but"
        raise ValueError(f"--data.padding {given} must lie between 1 and {size - 1}, below the image size")
    return padding
