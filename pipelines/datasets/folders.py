"""Folder trees: class folders, bare images, Tiny-ImageNet's own layout, scikit-learn's digits as written here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dalikd.pipelines.datasets.classes import check_equal_classes, in_order, stratified_rows
from dalikd.pipelines.datasets.file_list import EVERYTHING, FileList, cache_folder, count_of, list_folder, open_tree
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec
from dalikd.pipelines.files import build_once, read_text, write_atomically

__all__ = ["find_digits", "find_images", "find_tinyimagenet", "find_tree"]

_DIGITS = {"train": 1347, "val": 450}  # images of each split


def find_tree(spec: SplitSpec) -> SplitIndex:
    """`split/<class>/**/image`. Of classes that are left out nothing is read."""
    folder = spec.split_folder()
    present = list_folder(folder).folders
    if not present:
        raise ValueError(f"{spec.name}: {folder} has no class folders: put images in {folder}/<class>/")
    return _read_classes(spec, folder, present)


def find_images(spec: SplitSpec) -> SplitIndex:
    """`split/**/image`, without labels: they are -1, which no cross-entropy takes, and there are no classes yet."""
    folder = spec.split_folder()
    tree = open_tree(folder, [EVERYTHING], part=True)  # remembered apart from its class folders, if it has any
    labels = np.full(len(tree.labels), -1, np.int64)
    return SplitIndex((), labels, files=tree.files, notes=tuple(_left_out(folder, tree.left_out)))


def find_tinyimagenet(spec: SplitSpec) -> SplitIndex:
    """train/<wnid>/images, and val/images with val_annotations.txt as published; or val sorted into val/<wnid> or
    val/images/<wnid>, as converters leave it. The classes are those of the training split, wherever val is."""
    if spec.role == "train":
        return find_tree(spec)
    folder, train = spec.split_folder(), spec.check_root() / spec.train_split
    if not train.is_dir():
        raise FileNotFoundError(
            f"{spec.name}: {train} is missing; its folders are the classes of {spec.split}: check --data.root "
            "and --data.train_split"
        )
    classes, _ = in_order(list_folder(train).folders, train)
    images, annotations = folder / "images", folder / "val_annotations.txt"
    # Converters leave val_annotations.txt where it is, and often an empty images folder.
    present = [name for name in list_folder(folder).folders if name != images.name]
    if not present and images.is_dir():
        listing = list_folder(images)
        folder, present = images, listing.folders
        if present and listing.images:
            raise ValueError(
                f"{spec.name}: {images} has {len(present)} class folders, and {len(listing.images)} images beside "
                "them: sort these into their classes too, or unpack the data set again"
            )
    if present:
        check_equal_classes(spec.name, (spec.train_split, classes), (spec.split, in_order(present, folder)[0]))
        return _read_classes(spec, folder, present)
    if annotations.is_file():
        return _read_annotations(annotations, classes, spec.train_split).keep(spec.choose(classes, train))
    advice = f"unpack the data set again, or put images in {folder}/<class>/"
    if spec.split != "val" and (spec.check_root() / "val").is_dir():
        advice = "give --data.val_split val"
    raise ValueError(
        f"{spec.name}: {spec.split_folder()} has neither class folders nor val_annotations.txt "
        f"(the published test split has no labels): {advice}"
    )


def find_digits(spec: SplitSpec) -> SplitIndex:
    """scikit-learn's digits, written out when first asked for."""
    folder = _prepare_digits(spec.root)
    whole = SplitSpec(spec.name, folder, spec.role, spec.split)
    found = find_tree(whole)
    expected = _DIGITS.get(spec.split)
    if expected is not None and len(found.labels) != expected:
        raise ValueError(
            f"digits: {folder / spec.split} has {len(found.labels)} images instead of {expected}: "
            f"remove {folder} to have it written again"
        )
    return found.keep(spec.choose(found.classes, folder / spec.split))


def _read_classes(spec: SplitSpec, folder: Path, present: list[str]) -> SplitIndex:
    """Those class folders that are wanted."""
    classes, order = in_order(spec.choose(present, folder), folder)
    tree = open_tree(folder, classes, part=spec.takes_part)
    return SplitIndex(classes, tree.labels, files=tree.files, notes=(*order, *_left_out(folder, tree.left_out)))


def _left_out(folder: Path, left_out: dict[str, int]) -> list[str]:
    count = sum(left_out.values())
    verb = "file is" if count == 1 else "files are"
    return [f"{folder}: {count} {verb} left out: {count_of(left_out)}"] if count else []


def _read_annotations(path: Path, classes: tuple[str, ...], train_split: str) -> SplitIndex:
    """Lines of `image <tab> wnid <tab> box`, in their order."""
    folder = path.parent / "images"
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is there, but {folder} is not: unpack the data set again")
    listing = list_folder(folder)
    present, label_of = set(listing.images), {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        image, wnid = _read_annotation(line, f"{path} line {number}")
        if wnid not in label_of:
            raise ValueError(f"{path} line {number}: class {wnid!r} has no folder in {train_split}")
        if image not in present:
            raise FileNotFoundError(f"{path} line {number}: {image!r} is not in {folder}, or listed twice")
        present.remove(image)
        paths.append(f"{folder}/{image}")
        labels.append(label_of[wnid])
    if not paths:
        raise ValueError(f"{path} lists no image: unpack the data set again")
    left_out = {**listing.left_out, **({f"image(s) that {path.name} does not list": len(present)} if present else {})}
    files = FileList.from_paths(paths, path.parent)
    files = replace(files, sizes=files.measure())
    return SplitIndex(classes, np.array(labels, np.int64), files=files, notes=tuple(_left_out(folder, left_out)))


def _read_annotation(line: str, where: str) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) < 2:
        raise ValueError(f"{where}: {line!r} is not 'image <tab> class <tab> box'")
    return fields[0], fields[1]


# -------------------------------------------------------------------------------------------------- digits


def _prepare_digits(root: Path | None = None) -> Path:
    """Write the tree if it is not there, and return its folder: `{train,val}/{0..9}/NNNN.jpg`.

    A real data set that needs no download: 1797 grey images of 8x8 pixels (Alpaydin and Kaynak, 1998, UCI ML
    repository), enlarged to 32x32 RGB.

    Args:
        root: the tree's folder; by default digits-v1 in the cache folder. The name changes when the files would.

    Raises:
        FileExistsError: `root` is a folder with something else in it.
    """
    folder = cache_folder() / "digits-v1" if root is None else root
    if _is_there(folder):
        return folder
    try:
        build_once(folder, _write_tree)
    except FileExistsError:
        if not _is_there(folder):  # else another process has just put it there
            raise FileExistsError(
                f"digits: {folder} has something else in it than train and val: empty it or name a new --data.root"
            ) from None
    return folder


def _is_there(folder: Path) -> bool:
    return all((folder / split).is_dir() for split in _DIGITS)


def _write_tree(folder: Path) -> None:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = np.round(data["images"] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0..16 -> 0..255
    labels = data["target"].astype(np.int64)
    is_train = np.zeros(len(labels), dtype=bool)
    is_train[stratified_rows(labels, _DIGITS["train"], seed=0)] = True
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "train" if is_train[row] else "val"
        _write_image(image, folder / split / str(label) / f"{row:04d}.jpg")


def _write_image(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    enlarged = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    write_atomically(path, lambda file: enlarged.convert("RGB").save(file, format="JPEG", quality=95), sync=False)
