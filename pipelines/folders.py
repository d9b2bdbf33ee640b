"""Folder trees of pictures: class folders, and Tiny-ImageNet's own layout."""

from pathlib import Path

import numpy as np

from dalikd.pipelines.classes import check_equal_classes
from dalikd.pipelines.manifest import FileList, list_folders, list_pictures, open_tree
from dalikd.pipelines.request import Found, Request

__all__ = ["find_digits", "find_tinyimagenet", "find_tree"]


def find_tree(request: Request) -> Found:
    """`split/<class>/**/picture`. Of classes that are left out nothing is read."""
    folder = request.split_folder()
    present = list_folders(folder)
    if not present:
        raise ValueError(f"{request.name}: {folder} has no class folders: put pictures in {folder}/<class>/")
    classes = request.choose(present, folder)
    tree = open_tree(folder, classes, part=request.takes_part)
    return Found(classes, tree.labels, files=tree.files)


def find_tinyimagenet(request: Request) -> Found:
    """The published layout, train/<wnid>/images and val/images with val_annotations.txt, or class folders for both."""
    if request.role == "train":
        return find_tree(request)
    folder = request.split_folder()
    train = folder.parent / "train"
    if not train.is_dir():
        raise FileNotFoundError(f"{request.name}: {train} is missing; its folders are the classes of {request.split}")
    classes = list_folders(train)
    annotations = folder / "val_annotations.txt"
    # Converters leave val_annotations.txt where it is, and often an empty images folder.
    folders = tuple(name for name in list_folders(folder) if name != "images")
    if not folders and annotations.is_file():
        return _read_annotations(annotations, classes).keep(request.choose(classes, train))
    if not folders:
        raise ValueError(
            f"{request.name}: {folder} has neither class folders nor val_annotations.txt "
            f"(the published test split has no labels): say --data.val_split val"
        )
    check_equal_classes(request.name, ("train", classes), (request.split, folders))
    tree = open_tree(folder, request.choose(folders, folder), part=request.takes_part)
    return Found(request.choose(folders, folder), tree.labels, files=tree.files)


def find_digits(request: Request) -> Found:
    """scikit-learn's digits, written out when first asked for."""
    from dalikd.pipelines.digits import SPLIT_SIZES, prepare_digits

    folder = prepare_digits(request.root)
    whole = Request(request.name, folder, request.role, request.split)
    found = find_tree(whole)
    expected = SPLIT_SIZES.get(request.split)
    if expected is not None and len(found.labels) != expected:
        raise ValueError(
            f"digits: {folder / request.split} has {len(found.labels)} pictures instead of {expected}: "
            f"remove {folder} to have it written again"
        )
    return found.keep(request.choose(found.classes, folder / request.split))


def _read_annotations(path: Path, classes: tuple[str, ...]) -> Found:
    """Lines of `picture <tab> wnid <tab> box`, in their order."""
    folder = path.parent / "images"
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is there, but {folder} is not: unpack the data set again")
    present, label_of = set(list_pictures(folder)), {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        picture, wnid = _read_annotation(line, f"{path} line {number}")
        if wnid not in label_of:
            raise ValueError(f"{path} line {number}: class {wnid!r} has no folder in train")
        if picture not in present:
            raise FileNotFoundError(f"{path} line {number}: {picture!r} is not in {folder}, or listed twice")
        present.remove(picture)
        paths.append(f"{folder}/{picture}")
        labels.append(label_of[wnid])
    if not paths:
        raise ValueError(f"{path} lists no picture: unpack the data set again")
    return Found(classes, np.array(labels, np.int64), files=FileList.from_paths(paths, path.parent))


def _read_annotation(line: str, where: str) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) < 2:
        raise ValueError(f"{where}: {line!r} is not 'picture <tab> class <tab> box'")
    return fields[0], fields[1]
