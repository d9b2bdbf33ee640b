import copy
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines import manifest
from dalikd.pipelines.manifest import FileList, manifest_folder
from dalikd.pipelines.sources import (
    SOURCE_NAMES,
    Source,
    check_same_classes,
    default_statistics,
    open_source,
    stratified_rows,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return touch(
        tmp_path / "pets", "train/dog/1.jpg", "train/cat/2.jpg", "train/cat/1.jpg", "val/cat/3.jpg", "val/dog/4.png"
    )


def make_source(labels: list[int], names: list[str] | None = None, **changes: object) -> Source:
    names = names or [f"/r/{row}.jpg" for row in range(len(labels))]
    source = Source(
        name="imagefolder",
        split="train",
        classes=tuple(f"class{label}" for label in range(max(labels) + 1)),
        labels=np.array(labels),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_size=32,
        files=FileList.from_paths(names, "/r"),
    )
    return replace(source, **changes)


class TestImageFolder:
    def test_train_and_val(self, pets: Path) -> None:
        train, val = open_source("imagefolder", pets, "train"), open_source("imagefolder", str(pets), "val")
        assert train.classes == val.classes == ("cat", "dog")
        assert [train.path(row) for row in range(3)] == [
            str(pets / "train" / n) for n in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
        ]
        assert train.labels.tolist() == [0, 0, 1]
        assert (train.name, train.split, train.image_size) == ("imagefolder", "train", 224)
        assert (val.split, len(val), val.arrays) == ("val", 2, None)
        assert train.mean == (0.485, 0.456, 0.406)
        assert open_source("imagenet", pets, "val").name == "imagenet"

    def test_explicit_split(self, pets: Path) -> None:
        (pets / "val").rename(pets / "test")
        source = open_source("imagefolder", pets, "val", split="test")
        assert (source.split, len(source)) == ("test", 2)
        assert len(open_source("imagefolder", pets / "train", "train", split=".")) == 3

    def test_missing_split_names_the_folders(self, pets: Path) -> None:
        (pets / "val").rename(pets / "test")
        with pytest.raises(
            FileNotFoundError, match=r"no folder 'val'; it has test, train: say --data\.val_split test$"
        ):
            open_source("imagefolder", pets, "val")
        with pytest.raises(FileNotFoundError, match=r"no folder 'fit'; .*: say --data\.train_split train$"):
            open_source("imagefolder", pets, "train", split="fit")

    def test_missing_split_without_a_likely_one(self, tmp_path: Path) -> None:
        root = touch(tmp_path / "root", *(f"class{label}/a.jpg" for label in range(7)))
        with pytest.raises(
            FileNotFoundError,
            match=r"it has class0, .*, class4 and 2 more: name one with --data\.val_split, or say --data\.val_split \.",
        ):
            open_source("imagefolder", root, "val")
        with pytest.raises(FileNotFoundError, match=r"no folder 'train'; it has no folders at all: check --data\.root"):
            open_source("imagefolder", root / "class0", "train")

    def test_root(self, pets: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"imagenet needs a folder: say --data\.root FOLDER"):
            open_source("imagenet", None, "train")
        with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: check --data\.root$"):
            open_source("imagefolder", tmp_path / "nowhere", "train")
        with pytest.raises(NotADirectoryError, match=r"1\.jpg is not a folder: check --data\.root"):
            open_source("imagefolder", pets / "train" / "dog" / "1.jpg", "train")

    def test_home_and_links_are_resolved(self, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "link").symlink_to(pets)
        assert open_source("imagefolder", "~/link", "train").path(0) == str(pets / "train/cat/1.jpg")

    def test_empty_class_and_no_classes(self, pets: Path) -> None:
        (pets / "train" / "bird").mkdir()
        with pytest.raises(ValueError, match="train/bird has no picture"):
            open_source("imagefolder", pets, "train")
        touch(pets, "flat/1.jpg")
        with pytest.raises(ValueError, match=r"flat has no class folders: put pictures in .*flat/<class>/"):
            open_source("imagefolder", pets, "train", split="flat")

    def test_large_trees_are_remembered(self, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for path in [pets / "train", *(pets / "train").iterdir()]:
            os.utime(path, (1_000_000_000, 1_000_000_000))
        monkeypatch.setitem(manifest.open_tree.__kwdefaults__, "remember_above", 2)
        first = open_source("imagefolder", pets, "train")
        assert (manifest_folder(pets / "train") / "manifest.json").is_file()
        monkeypatch.setattr(manifest, "scan", None)
        second = open_source("imagefolder", pets, "train")
        assert second.fingerprint == first.fingerprint
        assert pickle.loads(pickle.dumps(second)).fingerprint == first.fingerprint


class TestTinyImageNet:
    LINES = ("val_0.JPEG\tn02\t0\t0\t9\t9", "val_1.JPEG\tn01\t1\t2\t3\t4", "val_2.JPEG\tn02\t0\t0\t1\t1")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = touch(
            tmp_path / "tiny",
            *(f"train/{wnid}/images/{wnid}_{number}.JPEG" for wnid in ("n02", "n01") for number in range(2)),
            "train/n01/n01_boxes.txt",
            *(f"val/images/val_{number}.JPEG" for number in range(3)),
            "test/images/test_0.JPEG",
            "words.txt",
        )
        (root / "wnids.txt").write_text("n02\nn01\n")
        self.annotate(root, *self.LINES)
        return root

    def annotate(self, root: Path, *lines: str) -> None:
        (root / "val" / "val_annotations.txt").write_text("".join(f"{line}\n" for line in lines))

    def test_published_layout(self, root: Path) -> None:
        train, val = open_source("tinyimagenet", root, "train"), open_source("tinyimagenet", root, "val")
        assert train.classes == val.classes == ("n01", "n02")
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert train.path(2) == str(root / "train/n02/images/n02_0.JPEG")
        assert val.labels.tolist() == [1, 0, 1]
        assert [val.path(row) for row in range(3)] == [str(root / f"val/images/val_{row}.JPEG") for row in range(3)]
        assert val.labels.dtype == np.int64
        assert (train.image_size, train.mean) == (64, (0.485, 0.456, 0.406))
        check_same_classes(train, val)

    @pytest.mark.parametrize("leftover", [True, False])
    @pytest.mark.parametrize("below", ["", "images/"])
    def test_converted_to_class_folders(self, root: Path, leftover: bool, below: str) -> None:
        for path in (root / "val" / "images").iterdir():
            path.unlink()
        if not leftover:
            (root / "val" / "images").rmdir()
            (root / "val" / "val_annotations.txt").unlink()
        touch(root / "val", f"n01/{below}val_1.JPEG", f"n02/{below}val_0.JPEG", f"n02/{below}val_2.JPEG")
        val = open_source("tinyimagenet", root, "val")
        assert val.classes == ("n01", "n02")
        assert val.labels.tolist() == [0, 1, 1]

    def test_converted_with_other_classes(self, root: Path) -> None:
        touch(root / "val", "n01/a.JPEG", "n03/a.JPEG")
        with pytest.raises(ValueError, match=r"train has 2 classes, val 2; only in train: n02; only in val: n03"):
            open_source("tinyimagenet", root, "val")

    def test_label_without_class(self, root: Path) -> None:
        self.annotate(root, *self.LINES[:1], "val_1.JPEG\tn09\t0\t0\t1\t1")
        with pytest.raises(ValueError, match=r"val/val_annotations\.txt line 2: class 'n09' has no folder in train"):
            open_source("tinyimagenet", root, "val")

    @pytest.mark.parametrize("name", ["val_7.JPEG", "val_0.JPEG", "../val_0.JPEG"])
    def test_picture_missing_or_listed_twice(self, root: Path, name: str) -> None:
        self.annotate(root, *self.LINES, f"{name}\tn01\t0\t0\t1\t1")
        with pytest.raises(FileNotFoundError, match=rf"line 4: '{name}' is not in .*val/images, or listed twice"):
            open_source("tinyimagenet", root, "val")

    def test_malformed_line_and_empty_list(self, root: Path) -> None:
        self.annotate(root, *self.LINES, "val_2.JPEG n01")
        with pytest.raises(ValueError, match=r"line 4: 'val_2\.JPEG n01' is not 'picture <tab> class <tab> box'"):
            open_source("tinyimagenet", root, "val")
        self.annotate(root)
        with pytest.raises(ValueError, match=r"val_annotations\.txt lists no picture"):
            open_source("tinyimagenet", root, "val")

    def test_half_unpacked(self, root: Path) -> None:
        (root / "val" / "images").rename(root / "elsewhere")
        with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt is there, but .*val/images is not"):
            open_source("tinyimagenet", root, "val")
        (root / "train").rename(root / "gone")
        with pytest.raises(FileNotFoundError, match="train is missing; its folders are the classes of val"):
            open_source("tinyimagenet", root, "val")
        with pytest.raises(FileNotFoundError, match="has no folder 'train'"):
            open_source("tinyimagenet", root, "train")

    def test_test_split_has_no_labels(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"published test split has no labels\): say --data\.val_split val"):
            open_source("tinyimagenet", root, "val", split="test")


class TestOpenSource:
    def test_unknown_name(self) -> None:
        with pytest.raises(
            ValueError, match=r"'cifar11' is unknown: did you mean cifar10.* say one of imagefolder, imagenet, tiny"
        ):
            open_source("cifar11", None, "train")
        with pytest.raises(ValueError, match="data set 'mnist' is unknown: say one of"):
            default_statistics("mnist")

    def test_unknown_role(self, pets: Path) -> None:
        with pytest.raises(ValueError, match="role 'test' is unknown: say train or val"):
            open_source("imagefolder", pets, "test")  # pyright: ignore[reportArgumentType]

    def test_download_of_what_cannot_be(self, pets: Path) -> None:
        with pytest.raises(
            ValueError, match=r"imagenet cannot be downloaded by --data\.download; only cifar10, cifar100 can"
        ):
            open_source("imagenet", pets, "train", download=True)

    def test_limit_and_seed_are_passed_on(self, tmp_path: Path) -> None:
        root = touch(tmp_path / "root", *(f"train/{label}/{number}.jpg" for label in "ab" for number in range(50)))
        whole = open_source("imagefolder", root, "train")
        small = open_source("imagefolder", root, "train", limit=10, seed=3)
        assert small.fingerprint == whole.limit(10, 3).fingerprint
        assert small.fingerprint != whole.limit(10, 4).fingerprint

    def test_statistics_of_every_data_set(self) -> None:
        for name in set(SOURCE_NAMES) - {"webdataset", "tfrecord"}:
            mean, std, side = default_statistics(name)
            assert all(0.25 < value < 0.55 for value in mean)
            assert all(0.2 < value < 0.4 for value in std)
            assert side in (32, 64, 224)


class TestFingerprint:
    def test_moves_with_the_folder(self, pets: Path, tmp_path: Path) -> None:
        before = open_source("imagefolder", pets, "train").fingerprint
        assert len(before) == 16
        assert int(before, 16) >= 0
        pets.rename(tmp_path / "a much longer name")
        assert open_source("imagefolder", tmp_path / "a much longer name", "train").fingerprint == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "imagenet"},
            {"split": "val"},
            {"classes": ("class0", "other")},
            {"labels": np.array([0, 1, 1])},
            {"files": FileList.from_paths(["/r/0.jpg", "/r/1.jpg", "/r/3.jpg"], "/r")},
            {"files": FileList.from_paths(["/r/0.jpg1", "/r/.jpg", "/r/2.jpg"], "/r")},
            {"files": FileList.from_paths(["/r/1.jpg", "/r/0.jpg", "/r/2.jpg"], "/r")},
        ],
        ids=["name", "split", "classes", "labels", "path", "path bounds", "order"],
    )
    def test_sees_every_change(self, changes: dict[str, object]) -> None:
        source = make_source([0, 1, 0])
        assert replace(source, **changes).fingerprint != source.fingerprint  # pyright: ignore[reportArgumentType]
        assert copy.deepcopy(source).fingerprint == source.fingerprint

    def test_type_of_labels_does_not_matter(self) -> None:
        source = make_source([0, 1, 0])
        assert replace(source, labels=source.labels.astype(np.int32)).fingerprint == source.fingerprint


class TestSource:
    def test_either_files_or_arrays(self) -> None:
        with pytest.raises(AssertionError, match="either files or arrays"):
            make_source([0], arrays=np.zeros((1, 2, 2, 3), np.uint8))
        with pytest.raises(AssertionError, match="2 images, 3 labels"):
            make_source([0, 1, 0], ["/r/a", "/r/b"])


class TestLimit:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [100, 50, 40, 9, 1]))
    source = make_source(labels.tolist())

    def rows(self, n: int, seed: int = 0) -> np.ndarray:
        return stratified_rows(self.labels, n, seed)

    def test_a_smaller_subset_is_part_of_a_larger_one(self) -> None:
        sizes = [*range(5, 200, 13), 200]
        subsets = [set(self.rows(n).tolist()) for n in sizes]
        assert [len(subset) for subset in subsets] == sizes
        assert all(small < large for small, large in pairwise(subsets))

    @pytest.mark.parametrize("n", [5, 6, 20, 50, 101, 199, 200])
    def test_proportions_hold(self, n: int) -> None:
        counts = np.bincount(self.labels[self.rows(n)], minlength=5)
        assert counts.min() >= 1
        assert np.abs(counts - n * np.bincount(self.labels) / 200).max() <= 1.5

    def test_equal_classes_stay_equal(self) -> None:
        labels = np.tile(np.arange(10), 30)
        for n in (10, 55, 200, 299):
            counts = np.bincount(labels[stratified_rows(labels, n, 7)])
            assert counts.max() - counts.min() <= 1

    def test_rows_ascend_and_depend_on_the_seed_alone(self) -> None:
        rows = self.rows(60, 1)
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert np.array_equal(rows, self.rows(60, 1))
        assert not np.array_equal(rows, self.rows(60, 2))

    def test_values_of_this_version_stay(self) -> None:
        assert stratified_rows(np.tile(np.arange(2), 10), 6, 42).tolist() == [1, 6, 7, 10, 11, 12]

    def test_every_member_is_equally_likely(self) -> None:
        labels = np.zeros(40, np.int64)
        chosen = np.bincount(np.concatenate([stratified_rows(labels, 10, seed) for seed in range(1000)]), minlength=40)
        assert np.abs(chosen - 250).max() < 5 * np.sqrt(1000 * 0.25 * 0.75)

    def test_paths_and_labels_go_together(self) -> None:
        limited = self.source.limit(20, 5)
        rows = self.rows(20, 5)
        assert [limited.path(row) for row in range(20)] == [f"/r/{row}.jpg" for row in rows]
        assert limited.labels.tolist() == self.labels[rows].tolist()
        assert limited.classes == self.source.classes
        assert limited.limit(20, 9).fingerprint == limited.fingerprint
        assert self.source.limit(200).fingerprint == self.source.fingerprint

    @pytest.mark.parametrize("n", [-1, 0, 4, 201])
    def test_out_of_range(self, n: int) -> None:
        message = f"--data.limit {n}: imagefolder train has 200 images of 5 classes; say a number from 5 to 200"
        with pytest.raises(ValueError, match=message):
            self.source.limit(n)

    def test_negative_seed(self) -> None:
        with pytest.raises(ValueError, match="seed -1 is negative: say 0 or more"):
            self.source.limit(20, -1)


class TestCheckSameClasses:
    def check(self, train: tuple[str, ...], val: tuple[str, ...]) -> None:
        make: Callable[..., Source] = make_source
        check_same_classes(make([0], classes=train), make([0], classes=val, split="val"))

    def test_same(self) -> None:
        self.check(("a", "b"), ("a", "b"))

    def test_missing_in_one(self) -> None:
        with pytest.raises(
            ValueError, match="train has 8 classes, val 1; only in train: b, c, d, e, f and 2 more: both must"
        ):
            self.check(tuple("abcdefgh"), ("a",))
        with pytest.raises(ValueError, match="train has 1 classes, val 2; only in val: b: both must have the same"):
            self.check(("a",), ("a", "b"))

    def test_another_order(self) -> None:
        with pytest.raises(ValueError, match="label 1 is b and c"):
            self.check(("a", "b", "c"), ("a", "c", "b"))
