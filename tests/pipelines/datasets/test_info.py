import pytest

from dalikd.pipelines.data import SOURCE_NAMES
from dalikd.pipelines.datasets.info import DATASET_INFO, cutout_side, default_statistics


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
