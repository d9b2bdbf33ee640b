from pathlib import Path

import numpy as np
import pytest
import torch

from dalikd.pipelines.data import DataConfig, as_used, evaluation_view, open_sources, open_split, training_view
from dalikd.pipelines.datasets.info import default_statistics
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.policies import policy_name
from dalikd.pipelines.sources import Source


def _source(image_size: int) -> Source:
    zeros = (0.0, 0.0, 0.0)
    pixels, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])
    return Source(
        name="x",
        split="train",
        classes=("a", "b"),
        labels=labels,
        mean=zeros,
        std=zeros,
        image_size=image_size,
        arrays=pixels,
    )


@pytest.fixture
def tree(small_images: Path, tmp_path: Path) -> Path:
    """A data set of links: train and val with the three classes of 100."""
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(small_images)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (DataConfig(), 32, View(32, "pad_crop", padding=4)),
        (DataConfig(), 64, View(64, "pad_crop", padding=8)),
        (DataConfig(), 96, View(96, "pad_crop", padding=12)),
        (DataConfig(), 224, View(224, "random_resized_crop", padding=28)),
        (DataConfig(image_size=64), 224, View(64, "pad_crop", padding=8)),
        (DataConfig(crop="random_resized_crop"), 32, View(32, "random_resized_crop", padding=4)),
        (
            DataConfig(crop="pad_crop", padding=2, border="reflect"),
            224,
            View(224, "pad_crop", padding=2, border="reflect"),
        ),
        (DataConfig(interpolation="bicubic"), 32, View(32, "pad_crop", padding=4, interpolation="bicubic")),
    ],
)
def test_training_view(config, size, expected):
    assert training_view(config, _source(size)) == expected


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (DataConfig(), 32, View(32, "center_crop", resize=32)),
        (DataConfig(), 96, View(96, "center_crop", resize=96)),
        (DataConfig(), 224, View(224, "center_crop", resize=256)),
        (DataConfig(val_resize=232), 224, View(224, "center_crop", resize=232)),
        (DataConfig(val_resize=224), 224, View(224, "center_crop", resize=224)),
        (
            DataConfig(image_size=128, interpolation="bicubic"),
            224,
            View(128, "center_crop", 146, interpolation="bicubic"),
        ),
    ],
)
def test_evaluation_view(config, size, expected):
    assert evaluation_view(config, _source(size)) == expected


@pytest.mark.parametrize(
    ("name", "crop", "padding", "resize", "policy"),
    [
        ("cifar10", "pad_crop", 4, 32, "cifar10"),
        ("cifar100", "pad_crop", 4, 32, "cifar10"),
        ("svhn", "pad_crop", 4, 32, "cifar10"),
        ("tinyimagenet", "pad_crop", 8, 64, "imagenet"),
        ("stl10", "pad_crop", 12, 96, "imagenet"),
        ("imagenet", "random_resized_crop", 28, 256, "imagenet"),
        ("imagenet100", "random_resized_crop", 28, 256, "imagenet"),
    ],
)
def test_published_settings_of_each_data_set(name, crop, padding, resize, policy):
    size = default_statistics(name).image_size
    config = DataConfig(name=name)
    assert training_view(config, _source(size)) == View(size, crop, padding=padding)
    assert evaluation_view(config, _source(size)) == View(size, "center_crop", resize=resize)
    assert policy_name(size) == policy


def test_options_out_of_range_are_refused_by_name():
    with pytest.raises(ValueError, match=r"--data\.val_resize 200 is smaller than the image size 224"):
        evaluation_view(DataConfig(val_resize=200), _source(224))
    for padding in (0, 32, -1):
        with pytest.raises(ValueError, match=rf"--data\.padding {padding} must lie between 1 and 31"):
            training_view(DataConfig(padding=padding), _source(32))


def test_open_sources_takes_each_split_with_its_own_limit(tree):
    train, val = open_sources(DataConfig(root=str(tree), limit=30, val_limit=9), seed=1)
    assert (len(train), train.split, len(val), val.split) == (30, "train", 9, "val")
    assert np.bincount(val.labels).tolist() == [3, 3, 3]
    again, _ = open_sources(DataConfig(root=str(tree), limit=30), seed=1)
    other, _ = open_sources(DataConfig(root=str(tree), limit=30), seed=2)
    assert again.fingerprint == train.fingerprint != other.fingerprint


def test_a_share_is_of_the_training_images_that_the_limit_leaves(tree):
    train, val = open_sources(DataConfig(root=str(tree), share=0.25), seed=1)
    assert (np.bincount(train.labels).tolist(), len(val)) == ([25, 25, 25], 300)
    both = open_split(DataConfig(root=str(tree), limit=30, share=0.5), "train", seed=1)
    assert np.bincount(both.labels).tolist() == [5, 5, 5]
    other, _ = open_sources(DataConfig(root=str(tree), share=0.25), seed=2)
    assert other.fingerprint != train.fingerprint
    assert as_used(DataConfig(share=0.25), train, torch.device("cpu"))["share"] == 0.25


def test_what_was_left_out_and_how_classes_are_ordered_is_printed_once(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        for number in range(1, 11):
            (tmp_path / split / str(number)).mkdir(parents=True)
            (tmp_path / split / str(number) / "a.jpg").touch()
    for name in ("1/a.gif", "2/b.gif", "2/b.txt"):
        (tmp_path / "train" / name).touch()
    config = DataConfig(root=str(tmp_path))
    open_sources(config, 0)
    order = "class folders that are whole numbers are ordered by number: 1, 2, 3, 4, 5 and 5 more; not as text: 1, 10,"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(order)
    assert lines[1:] == [f"{tmp_path}/train: 3 files are left out: 2 .gif, 1 .txt"]
    open_split(config, "val", 0)
    assert [line.startswith(order) for line in capsys.readouterr().out.splitlines()] == [True]
    monkeypatch.setenv("RANK", "1")  # the first process says it
    open_sources(config, 0)
    assert capsys.readouterr().out == ""


def test_the_option_that_was_given_is_named(tree):
    with pytest.raises(ValueError, match=r"^--data\.val_limit 1000: imagefolder val has 300 images of 3 classes"):
        open_sources(DataConfig(root=str(tree), limit=30, val_limit=1000), 0)
    with pytest.raises(ValueError, match=r"^--data\.limit 0: imagefolder train has"):
        open_sources(DataConfig(root=str(tree), limit=0, val_limit=0), 0)


def test_some_classes_in_both_splits(tree, tmp_path):
    (tmp_path / "two.txt").write_text("cat\nant\n")
    train, val = open_sources(DataConfig(root=str(tree), classes=str(tmp_path / "two.txt"), limit=20), seed=0)
    assert train.classes == val.classes == ("ant", "cat")
    assert (len(train), len(val)) == (20, 200)


def test_a_class_seed_is_for_imagenet100_alone(tree):
    with pytest.raises(ValueError, match=r"--data\.class_seed 3 chooses the classes of imagenet100"):
        open_sources(DataConfig(root=str(tree), class_seed=3), seed=0)
    with pytest.raises(ValueError, match="has 3 class folders of which 100 are to be chosen"):
        open_sources(DataConfig(name="imagenet100", root=str(tree), class_seed=3), seed=0)


def test_open_split_by_another_name(tree):
    (tree / "holdout").symlink_to(tree / "val")
    config = DataConfig(root=str(tree), val_split="holdout", train_split="val")
    assert open_split(config, "val", 0).split == "holdout"
    assert open_split(config, "train", 0).split == "val"


def test_splits_of_different_classes_are_refused(tree):
    (tree / "few").mkdir()
    (tree / "few" / "ant").symlink_to(tree / "train" / "ant")
    with pytest.raises(ValueError, match="train has 3 classes, few 1"):
        open_sources(DataConfig(root=str(tree), val_split="few"), 0)
