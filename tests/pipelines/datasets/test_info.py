from dataclasses import replace

import numpy as np
import pytest

from dalikd.pipelines.data import SOURCE_NAMES
from dalikd.pipelines.datasets import info
from dalikd.pipelines.datasets.info import DATASET_INFO, check_count, cutout_side, default_statistics
from dalikd.pipelines.sources import Source


def test_every_data_set_has_a_row_but_containers() -> None:
    assert set(DATASET_INFO) == set(SOURCE_NAMES) - {"webdataset", "tfrecord"}


@pytest.mark.parametrize("name", DATASET_INFO)
def test_rows_are_sensible(name: str) -> None:
    facts = DATASET_INFO[name]
    assert all(0.25 < value < 0.55 for value in facts.mean)
    assert all(0.2 < value <= 0.5 for value in facts.std)
    assert facts.image_size in (32, 64, 96, 224)
    for split, (fewest, most) in facts.a_class.items():
        if split in facts.images:
            assert facts.classes is not None
            assert fewest * facts.classes <= facts.images[split] <= most * facts.classes
    assert not (facts.downloadable and facts.origin)


@pytest.mark.parametrize(
    ("name", "mean", "std", "size"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32),
        ("svhn", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32),
        ("stl10", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 96),
        ("tinyimagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
        ("imagenet100", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
    ],
)
def test_published_statistics(name: str, mean: tuple, std: tuple, size: int) -> None:
    assert default_statistics(name) == (mean, std, size)


@pytest.mark.parametrize("name", ["mnist", "webdataset"])
def test_no_statistics(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' has no statistics of its own: give one of imagefolder, "):
        default_statistics(name)


@pytest.mark.parametrize(
    ("name", "size", "side"),
    [
        ("cifar10", 32, 16),
        ("cifar100", 32, 8),
        ("svhn", 32, 20),
        ("stl10", 96, 32),
        ("tinyimagenet", 64, 16),
        ("imagenet", 224, 56),
        ("imagenet100", 224, 56),
        # at another size in proportion
        ("cifar10", 64, 32),
        ("stl10", 32, 11),
        ("tinyimagenet", 32, 8),
        ("imagenet", 176, 44),
        # nothing published: a quarter
        ("imagefolder", 224, 56),
        ("imagefolder", 50, 12),
        ("digits", 32, 8),
        ("random", 32, 8),
        ("imagefolder", 3, 1),
        ("stl10", 1, 1),
    ],
)
def test_cutout_side(name: str, size: int, side: int) -> None:
    assert cutout_side(name, size) == side


# ---------------------------------------------------------------------------------------- what is published


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
    assert check("tinyimagenet", "train", [500] * 200) == ("whole", "200 classes, 100,000 images")
    assert check("tinyimagenet", "val", [50] * 200) == ("whole", "200 classes, 10,000 images")
    assert check("tinyimagenet", "val", [50] * 3 + [49] + [50] * 196) == (
        "different",
        "200 classes, 9,999 images; 10,000 images are published; a class has 50 images, but n3 49",
    )
    assert check("tinyimagenet", "train", [500] * 199) == (
        "different",
        "199 classes, 99,500 images; 200 classes are published; 100,000 images are published",
    )


def test_imagenet_by_the_size_of_its_classes() -> None:
    state, detail = check("imagenet", "train", [1300, 731, 1301, 732])
    assert state == "different"
    assert "; 1,000 classes are published; 1,281,167 images are published; " in detail
    assert detail.endswith("a class has 732 to 1300 images, but n1 731, n2 1301")
    assert check("imagenet", "val", [50] * 1000)[0] == "whole"


def test_some_classes_are_counted_class_by_class() -> None:
    assert check("imagenet100", "train", [1300, 732]) == ("whole", "2 classes, 2,032 images")
    assert check("imagenet100", "val", [50] * 99 + [51])[1].endswith("a class has 50 images, but n99 51")
    assert check("tinyimagenet", "train", [500, 500], part=True)[0] == "whole"
    assert check("tinyimagenet", "train", [500, 499], part=True)[0] == "different"


def test_data_sets_of_files() -> None:
    assert check("stl10", "test", [800] * 10)[0] == "whole"
    assert check("svhn", "extra", [531_121, *[1] * 9])[1].endswith("; 531,131 images are published")
    assert check("svhn", "train+extra", [1] * 10)[1].endswith("; 604,388 images are published")


def test_one_s_own_images() -> None:
    assert check("imagefolder", "train", [3, 1]) == ("whole", "2 classes, 4 images")


def test_a_class_without_an_image_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "DATASET_INFO", {"digits": replace(DATASET_INFO["digits"], a_class={"train": (1, 9)})})
    source = replace(make_source("digits", [1, 1]), classes=("a", "b", *"cdefghij"))
    assert check_count(source, "train").detail.endswith("but c 0, d 0, e 0, f 0, g 0 and 3 more")
