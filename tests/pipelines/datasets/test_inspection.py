from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines.datasets import inspection
from dalikd.pipelines.datasets.info import DATASET_INFO
from dalikd.pipelines.datasets.inspection import check_count, remedy, verify_files
from dalikd.pipelines.sources import Source


def make_source(name: str, counts: list[int]) -> Source:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Source(
        name=name,
        split="folder",
        classes=tuple(f"n{label}" for label in range(len(counts))),
        labels=labels,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        image_size=1,
        arrays=np.zeros((len(labels), 1, 1, 3), np.uint8),
    )


def check(name: str, split: str, counts: list[int], **options: bool) -> tuple[str, str]:
    finding = check_count(make_source(name, counts), split, **options)
    assert finding.place == f"{name} folder"
    return finding.state, finding.detail


def test_tinyimagenet() -> None:
    assert check("tinyimagenet", "train", [500] * 200) == ("whole", "200 classes, 100,000 pictures")
    assert check("tinyimagenet", "val", [50] * 200) == ("whole", "200 classes, 10,000 pictures")
    assert check("tinyimagenet", "val", [50] * 3 + [49] + [50] * 196) == (
        "different",
        "200 classes, 9,999 pictures; 10,000 pictures are published; a class has 50 pictures, but n3 49",
    )
    assert check("tinyimagenet", "train", [500] * 199) == (
        "different",
        "199 classes, 99,500 pictures; 200 classes are published; 100,000 pictures are published",
    )


def test_imagenet_by_the_size_of_its_classes() -> None:
    state, detail = check("imagenet", "train", [1300, 731, 1301, 732])
    assert state == "different"
    assert "; 1,000 classes are published; 1,281,167 pictures are published; " in detail
    assert detail.endswith("a class has 732 to 1300 pictures, but n1 731, n2 1301")
    assert check("imagenet", "val", [50] * 1000)[0] == "whole"


def test_some_classes_are_counted_class_by_class() -> None:
    assert check("imagenet100", "train", [1300, 732]) == ("whole", "2 classes, 2,032 pictures")
    assert check("imagenet100", "val", [50] * 99 + [51])[1].endswith("a class has 50 pictures, but n99 51")
    assert check("tinyimagenet", "train", [500, 500], part=True)[0] == "whole"
    assert check("tinyimagenet", "train", [500, 499], part=True)[0] == "different"


def test_data_sets_of_files() -> None:
    assert check("stl10", "test", [800] * 10)[0] == "whole"
    assert check("svhn", "extra", [531_121, *[1] * 9])[1].endswith("; 531,131 pictures are published")
    assert check("svhn", "train+extra", [1] * 10)[1].endswith("; 604,388 pictures are published")


def test_one_s_own_pictures() -> None:
    assert check("imagefolder", "train", [3, 1]) == ("whole", "2 classes, 4 pictures")


def test_a_class_without_a_picture_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inspection, "DATASET_INFO", {"digits": replace(DATASET_INFO["digits"], a_class={"train": (1, 9)})}
    )
    source = replace(make_source("digits", [1, 1]), classes=("a", "b", *"cdefghij"))
    assert check_count(source, "train").detail.endswith("but c 0, d 0, e 0, f 0, g 0 and 3 more")


def test_svhn_splits_are_made_of_parts(tmp_path: Path) -> None:
    missing = [Path(finding.place).name for finding in verify_files("svhn", tmp_path, ["train+extra", "test"])]
    assert missing == ["train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"]
    with pytest.raises(ValueError, match="svhn has no split 'val'"):
        verify_files("svhn", tmp_path, ["val"])


def test_remedies() -> None:
    assert remedy("svhn", "DATA") == "remove what is damaged, and say --data.download true"
    assert (
        remedy("cifar10", "DATA")
        == "remove the folder cifar-10-batches-py if it is there, and say --data.download true"
    )
    assert remedy("imagenet", "DATA").endswith("DATA/train/<wnid>/*.JPEG and DATA/val/<wnid>/*.JPEG")
    assert remedy("imagefolder", None) == "repair it"
