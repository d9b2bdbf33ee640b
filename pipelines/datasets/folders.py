"""Folder trees of images: class folders, and Tiny-ImageNet's own layout."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dalikd.pipelines.datasets.classes import check_equal_classes, in_order
from dalikd.pipelines.datasets.digits import SPLIT_SIZES, prepare_digits
from dalikd.pipelines.datasets.file_list import FileList, count_of, list_folder, open_tree
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec

__all__ = ["find_digits", "find_tinyimagenet", "find_tree"]


def find_tree(request: SplitSpec) -> SplitIndex:
    """`split/<class>/**/image`. Of classes that are left out nothing is read."""
    folder = request.split_folder()
    present = list_folder(folder).folders
    if not present:
        raise ValueError(f"{request.name}: {folder} has no class folders: put pictures in {folder}/<class>/")
    return _read_classes(request, folder, present)


def find_tinyimagenet(request: SplitSpec) -> SplitIndex:
    """train/<wnid>/images, and val/images with val_annotations.txt as published; or val sorted into val/<wnid> or
    val/images/<wnid>, as converters leave it. The classes are those of the training split, wherever val is."""
    if request.role == "train":
        return find_tree(request)
    folder, train = request.split_folder(), request.check_root() / request.train_split
    if not train.is_dir():
        raise FileNotFoundError(
            f"{request.name}: {train} is missing; its folders are the classes of {request.split}: check --data.root "
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
                f"{request.name}: {images} has {len(present)} class folders, and {len(listing.images)} images beside "
                "them: sort these into their classes too, or unpack the data set again"
            )
    if present:
        check_equal_classes(request.name, (request.train_split, classes), (request.split, in_order(present, folder)[0]))
        return _read_classes(request, folder, present)
    if annotations.is_file():
        return _read_annotations(annotations, classes, request.train_split).keep(request.choose(classes, train))
    advice = f"unpack the data set again, or put images in {folder}/<class>/"
    if request.split != "val" and (request.check_root() / "val").is_dir():
        advice = "say --data.val_split val"
    raise ValueError(
        f"{request.name}: {request.split_folder()} has neither class folders nor val_annotations.txt "
        f"(the published test split has no labels): {advice}"
    )


def find_digits(request: SplitSpec) -> SplitIndex:
    """scikit-learn's digits, written out when first asked for."""
    folder = prepare_digits(request.root)
    whole = SplitSpec(request.name, folder, request.role, request.split)
    found = find_tree(whole)
    expected = SPLIT_SIZES.get(request.split)
    if expected is not None and len(found.labels) != expected:
        raise ValueError(
            f"digits: {folder / request.split} has {len(found.labels)} pictures instead of {expected}: "
            f"remove {folder} to have it written again"
        )
    return found.keep(request.choose(found.classes, folder / request.split))


def _read_classes(request: SplitSpec, folder: Path, present: list[str]) -> SplitIndex:
    """Those class folders that are wanted."""
    classes, order = in_order(request.choose(present, folder), folder)
    tree = open_tree(folder, classes, part=request.takes_part)
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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        image, wnid = _read_annotation(line, f"{path} line {number}")
        if wnid not in label_of:
            raise ValueError(f"{path} line {number}: class {wnid!r} has no folder in {train_split}")
        if image not in present:
            raise FileNotFoundError(f"{path} line {number}: {image!r} is not in {folder}, or listed twice")
        present.remove(image)
        paths.append(f"{folder}/{image}")
        labels.append(label_of[wnid])
    if not paths:
        raise ValueError(f"{path} lists no picture: unpack the data set again")
    left_out = {**listing.left_out, **({f"image(s) that {path.name} does not list": len(present)} if present else {})}
    files = FileList.from_paths(paths, path.parent)
    files = replace(files, sizes=files.measure())
    return SplitIndex(classes, np.array(labels, np.int64), files=files, notes=tuple(_left_out(folder, left_out)))


def _read_annotation(line: str, where: str) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) < 2:
        raise ValueError(f"{where}: {line!r} is not 'picture <tab> class <tab> box'")
    return fields[0], fields[1]
