import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines import sources
from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets.classes import share_rows, stratified_rows
from dalikd.pipelines.datasets.file_list import FileList
from dalikd.pipelines.datasets.info import DATASET_INFO, default_statistics
from dalikd.pipelines.sources import Source, check_count, check_same_classes, why_fingerprints_differ


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


def listed(*names: str, sizes: object = 7) -> FileList:
    return replace(FileList.from_paths(names, "/r"), sizes=np.broadcast_to(sizes, len(names)))


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
        files=listed(*names),
    )
    return replace(source, **changes)


class TestOpenSource:
    def test_unknown_name(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"'cifar11' is unknown: did you mean cifar10.* give one of imagefolder, images, imagenet, ima",
        ):
            open_source("cifar11", None, "train")
        with pytest.raises(ValueError, match="data set 'mnist' is unknown: give one of"):
            open_source("mnist", None, "train")
        with pytest.raises(ValueError, match="'mnist' has no statistics of its own: give one of imagefolder, "):
            default_statistics("mnist")

    def test_unknown_role(self, pets: Path) -> None:
        with pytest.raises(ValueError, match="role 'test' is unknown: give train or val"):
            open_source("imagefolder", pets, "test")  # pyright: ignore[reportArgumentType]

    def test_download_of_what_cannot_be(self, pets: Path) -> None:
        with pytest.raises(
            ValueError,
            match=r"imagenet cannot be downloaded by --data\.download; only cifar10, cifar100, svhn, stl10 can; "
            r"to get it, register at https://image-net\.org, .* /.*/pets/train/<wnid>/",
        ):
            open_source("imagenet", pets, "train", download=True)
        with pytest.raises(ValueError, match=r"tinyimagenet cannot .*; to get it, fetch http://cs231n\.stanford\.edu/"):
            open_source("tinyimagenet", None, "train", download=True)
        for name in ("imagefolder", "digits", "tfrecord"):
            with pytest.raises(ValueError, match=f"{name} cannot be downloaded .* can$"):
                open_source(name, pets, "train", download=True)

    def test_limit_and_seed_are_passed_on(self, tmp_path: Path) -> None:
        root = touch(tmp_path / "root", *(f"train/{label}/{number}.jpg" for label in "ab" for number in range(50)))
        whole = open_source("imagefolder", root, "train")
        small = open_source("imagefolder", root, "train", limit=10, seed=3)
        assert small.fingerprint == whole.limit(10, 3).fingerprint
        assert small.fingerprint != whole.limit(10, 4).fingerprint

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"name": "webdataset", "classes": "c.txt"},
                "shards are read whole; choose classes when they are written",
            ),
            (
                {"name": "imagefolder", "class_seed": 1},
                r"--data\.class_seed 1 chooses the classes of imagenet100 where",
            ),
            (
                {"name": "imagenet100", "class_seed": 0, "classes": "c.txt"},
                r"--data\.classes names none: leave it out$",
            ),
        ],
    )
    def test_options_that_do_not_go_together(self, pets: Path, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_source(options.pop("name"), pets, "train", **options)

    def test_class_lists_lie_where_the_shell_says(
        self, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "list.txt").write_text("dog\ncat\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        for path in ("list.txt", "~/list.txt"):
            assert open_source("imagefolder", pets, "train", classes=path).classes == ("cat", "dog")


class TestFingerprint:
    def test_moves_with_the_folder(self, pets: Path, tmp_path: Path) -> None:
        before = open_source("imagefolder", pets, "train").fingerprint
        assert len(before) == 20
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
            {"classes": ("class1", "class0")},
            {"files": listed("/r/0.jpg", "/r/1.jpg", "/r/3.jpg")},
            {"files": listed("/r/0.jpg1", "/r/.jpg", "/r/2.jpg")},
            {"files": listed("/r/1.jpg", "/r/0.jpg", "/r/2.jpg")},
            {"files": listed("/r/0.jpg", "/r/1.jpg", "/r/2.jpg", sizes=[7, 7, 8])},
        ],
        ids=["name", "split", "classes", "labels", "order of classes", "path", "path bounds", "order", "size"],
    )
    def test_sees_every_change(self, changes: dict[str, object]) -> None:
        source = make_source([0, 1, 0])
        assert replace(source, **changes).fingerprint != source.fingerprint  # pyright: ignore[reportArgumentType]
        assert copy.deepcopy(source).fingerprint == source.fingerprint

    def test_sizes_are_those_of_the_files(self, pets: Path) -> None:
        before = open_source("imagefolder", pets, "train")
        assert before.fingerprint == open_source("imagefolder", pets, "train").fingerprint
        (pets / "train/cat/2.jpg").write_bytes(b"1")
        after = open_source("imagefolder", pets, "train")
        assert after.fingerprint != before.fingerprint

    def test_what_a_difference_tells(self) -> None:
        assert why_fingerprints_differ("a" * 16, "b" * 20).startswith("one holds no file sizes")
        assert why_fingerprints_differ("a" * 16 + "-short64", "b" * 20 + "-short64").startswith(
            "one holds no file sizes"
        )
        for one, other in (("a" * 20, "b" * 20), ("a" * 16, "b" * 16), ("a" * 20 + "-short64", "b" * 20)):
            assert (
                why_fingerprints_differ(one, other) == "the classes, or the images' names, labels or sizes, are others"
            )

    def test_type_of_labels_does_not_matter(self) -> None:
        source = make_source([0, 1, 0])
        assert replace(source, labels=source.labels.astype(np.int32)).fingerprint == source.fingerprint


class TestSource:
    def test_a_file_that_is_gone(self, pets: Path) -> None:
        source = open_source("imagefolder", pets, "train")
        assert source.read(1) == b""
        (pets / "train/cat/2.jpg").unlink()
        for look in (lambda: source.read(1), replace(source.files, sizes=None).measure):
            with pytest.raises(FileNotFoundError, match=r"cat/2\.jpg is missing$"):
                look()
        with pytest.raises(FileNotFoundError, match=r"cat/2\.jpg is missing; the list of files is remembered in KEPT:"):
            replace(source, files=replace(source.files, kept_in="KEPT")).read(1)
        assert source.fingerprint  # of the sizes when it was opened

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
        message = f"--data.limit {n}: imagefolder train has 200 images of 5 classes; give a number from 5 to 200"
        with pytest.raises(ValueError, match=message):
            self.source.limit(n)
        with pytest.raises(ValueError, match=message.replace("limit", "val_limit", 1)):
            self.source.limit(n, option="--data.val_limit")

    def test_negative_seed(self) -> None:
        with pytest.raises(ValueError, match="seed -1 is negative: give 0 or more"):
            self.source.limit(20, -1)


class TestShare:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [100, 50, 41, 10, 3]))
    source = make_source(labels.tolist())

    def rows(self, share: float, seed: int = 0) -> list[int]:
        part = self.source.share(share, seed)
        return [int(Path(part.path(row)).stem) for row in range(len(part))]

    @pytest.mark.parametrize(
        ("share", "kept"),
        [(0.25, [25, 13, 10, 3, 1]), (0.5, [50, 25, 21, 5, 2]), (0.29, [29, 15, 12, 3, 1]), (1, [100, 50, 41, 10, 3])],
    )
    def test_each_class_keeps_its_share_and_a_half_is_rounded_up(self, share: float, kept: list[int]) -> None:
        assert np.bincount(self.source.share(share).labels).tolist() == kept

    def test_a_smaller_share_is_part_of_a_larger_one(self) -> None:
        parts = [set(self.rows(share, seed=3)) for share in (0.2, 0.25, 0.3, 0.5, 0.75, 0.99)]
        assert all(small < large for small, large in pairwise(parts))

    def test_the_seed_alone_chooses_and_the_order_stays(self) -> None:
        assert self.rows(0.5, 1) == self.rows(0.5, 1) == sorted(self.rows(0.5, 1))
        assert self.rows(0.5, 1) != self.rows(0.5, 2)
        fingerprints = {self.source.share(share, seed).fingerprint for share in (0.5, 1.0) for seed in (1, 2)}
        assert len(fingerprints) == 3
        assert self.source.share(1.0).fingerprint == self.source.fingerprint

    def test_values_of_this_version_stay(self) -> None:
        assert share_rows(np.tile(np.arange(2), 10), np.array([3, 2]), 42).tolist() == [4, 9, 10, 12, 13]

    def test_paths_and_labels_go_together(self) -> None:
        assert self.source.share(0.5, 5).labels.tolist() == self.labels[self.rows(0.5, 5)].tolist()

    def test_arrays_are_taken_along(self) -> None:
        pixels = np.arange(len(self.labels), dtype=np.uint8)[:, None, None, None].repeat(3, 3)
        part = replace(self.source, files=None, arrays=pixels).share(0.5, 5)
        assert part.arrays is not None
        assert part.arrays[:, 0, 0, 0].tolist() == self.rows(0.5, 5)

    def test_every_image_of_a_limited_source_is_equally_likely(self) -> None:
        """Two draws of one seed do not depend on each other."""
        source, chosen = make_source([0] * 40), np.zeros(40)
        for seed in range(1000):
            part = source.limit(20, seed).share(0.5, seed)
            chosen[[int(Path(part.path(row)).stem) for row in range(10)]] += 1
        assert np.abs(chosen - 250).max() < 5 * np.sqrt(1000 * 0.25 * 0.75)

    @pytest.mark.parametrize("share", [-0.5, 0, 1.01, float("nan")])
    def test_out_of_range(self, share: float) -> None:
        with pytest.raises(ValueError, match=rf"^--data\.share {share}: give a share of the training images above 0"):
            self.source.share(share)

    def test_a_class_without_images_and_the_least_share_that_leaves_it_one(self) -> None:
        message = "imagefolder train keeps no image of the class class4, which has 3; give at least"
        with pytest.raises(ValueError, match=rf"^--data\.share 0\.04: {message} 0\.166667$"):
            self.source.share(0.04)
        assert np.bincount(self.source.share(0.166667).labels)[4] == 1
        with pytest.raises(ValueError, match=r"give at least 0\.166667$"):
            self.source.share(0.166666)

    @pytest.mark.parametrize("count", [1, 5, 7, 49, 500, 1300])
    def test_the_least_share_does(self, count: int) -> None:
        source = make_source([0] * count)
        with pytest.raises(ValueError, match="give at least") as error:
            source.share(0.4 / count)
        assert len(source.share(float(str(error.value).split()[-1]))) == 1


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


# ---------------------------------------------------------------------------------------- what is published


def published_source(name: str, counts: list[int]) -> Source:
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
    finding = check_count(published_source(name, counts), split, **options)
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
    monkeypatch.setattr(sources, "DATASET_INFO", {"digits": replace(DATASET_INFO["digits"], a_class={"train": (1, 9)})})
    source = replace(published_source("digits", [1, 1]), classes=("a", "b", *"cdefghij"))
    assert check_count(source, "train").detail.endswith("but c 0, d 0, e 0, f 0, g 0 and 3 more")
