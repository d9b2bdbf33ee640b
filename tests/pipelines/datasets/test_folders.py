import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.data import DataConfig, open_source, open_sources, open_split
from dalikd.pipelines.datasets import file_list as manifest
from dalikd.pipelines.datasets.file_list import IMAGE_EXTENSIONS, manifest_folder
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import check_same_classes


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


class TestImages:
    def test_a_bare_folder_is_taken_at_any_depth_without_labels(self, tmp_path: Path) -> None:
        bare = touch(tmp_path / "bare", "b.jpg", "a.png", "deep/er/1.jpg", "deep/.hidden.jpg", "notes.txt")
        source, again = open_sources(DataConfig(name="images", root=str(bare)), seed=0)
        assert [source.path(row) for row in range(3)] == [str(bare / n) for n in ("a.png", "b.jpg", "deep/er/1.jpg")]
        assert (source.labels.tolist(), source.classes, source.labelled, again is source) == ([-1] * 3, (), False, True)
        assert source.notes == (f"{bare}: 1 file is left out: 1 .txt",)
        assert replace(source, classes=("a", "b")).fingerprint == source.fingerprint  # classes are a net's, not its own
        assert (len(source.limit(2)), len(source.share(0.67))) == (2, 2)

    def test_labelled_images_to_evaluate_on(self, pets: Path, tmp_path: Path) -> None:
        bare = touch(tmp_path / "bare", "1.jpg")
        train, val = open_sources(DataConfig(name="images", root=str(bare), val_root=str(pets / "val")), seed=0)
        assert val.fingerprint == open_split(DataConfig(root=str(pets)), "val", 0).fingerprint
        assert (len(train), val.classes, val.labels.tolist()) == (1, ("cat", "dog"), [0, 1])
        inside = DataConfig(name="images", root=str(pets), train_split="train", val_split="val")
        assert [len(source) for source in open_sources(inside, seed=0)] == [3, 2]
        with pytest.raises(ValueError, match=r"val is to be evaluated on, and lies in .*--data\.train_split"):
            open_sources(replace(inside, train_split=None), seed=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "imagefolder", "val_root": "x"}, "--data.val_root is for --data.name images: leave it out"),
            ({"val_root": "nowhere"}, "--data.val_root nowhere is no folder"),
            ({"classes": "list.txt"}, "--data.classes chooses classes, and images have none"),
            ({"train_split": "empty"}, "empty has no image (.jpg"),
        ],
    )
    def test_what_does_not_go_with_them_is_refused(self, pets: Path, options: dict[str, str], message: str) -> None:
        (pets / "empty").mkdir()
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            open_sources(DataConfig(**{"name": "images", "root": str(pets), **options}), seed=0)  # type: ignore[arg-type]


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
            FileNotFoundError, match=r"no folder 'val'; it has test, train: give --data\.val_split test$"
        ):
            open_source("imagefolder", pets, "val")
        with pytest.raises(FileNotFoundError, match=r"no folder 'fit'; .*: give --data\.train_split train$"):
            open_source("imagefolder", pets, "train", split="fit")

    def test_missing_split_without_a_likely_one(self, tmp_path: Path) -> None:
        root = touch(tmp_path / "root", *(f"class{label}/a.jpg" for label in range(7)))
        with pytest.raises(
            FileNotFoundError,
            match=r"it has class0, .*, class4 and 2 more: name one with --data\.val_split, or give --data\.val_split",
        ):
            open_source("imagefolder", root, "val")
        with pytest.raises(FileNotFoundError, match=r"no folder 'train'; it has no folders at all: check --data\.root"):
            open_source("imagefolder", root / "class0", "train")

    def test_root(self, pets: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"imagenet needs a folder: give --data\.root FOLDER"):
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
        with pytest.raises(ValueError, match="train/bird has no image"):
            open_source("imagefolder", pets, "train")
        touch(pets, "flat/1.jpg")
        with pytest.raises(ValueError, match=r"flat has no class folders: put images in .*flat/<class>/"):
            open_source("imagefolder", pets, "train", split="flat")

    def test_whole_numbers_are_ordered_by_number_in_both_splits(self, tmp_path: Path) -> None:
        names = [f"{split}/{number}/0.jpg" for split in ("train", "val") for number in (1, 2, 10)]
        root, note = touch(tmp_path / "numbers", *names), "ordered by number: 1, 2, 10; not as text: 1, 10, 2"
        for source in open_sources(DataConfig(root=str(root)), 0):
            assert source.classes == ("1", "2", "10")
            assert [Path(source.path(row)).parent.name for row in range(3)] == ["1", "2", "10"]
            assert source.notes == (f"class folders that are whole numbers are {note}",)
        touch(root, "val/extra/0.jpg")  # beside words they are words
        with pytest.raises(ValueError, match="only in val: extra"):
            open_sources(DataConfig(root=str(root)), 0)
        (tmp_path / "list.txt").write_text("10\n2\n1\n")
        for source in open_sources(DataConfig(root=str(root), classes=str(tmp_path / "list.txt")), 0):
            assert source.classes == ("1", "2", "10")

    def test_every_ending_is_decoded(self, tmp_path: Path) -> None:
        written = {
            "JPEG": ".jpg .jpeg .jpe .jif .jfif .jfi .mpo", "PNG": ".png .apng", "BMP": ".bmp", "WEBP": ".webp",
            "TIFF": ".tif .tiff", "PPM": ".ppm .pgm .pbm .pnm", "JPEG2000": ".jp2 .j2k .j2c .jpc .jpf .jpx",
        }  # fmt: skip
        colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
        modes, expected = {".pgm": "L", ".pbm": "1"}, []
        (tmp_path / "all/class").mkdir(parents=True)
        for form, endings in written.items():
            for ending in endings.split():
                image, path = colour.convert(modes.get(ending, "RGB")), tmp_path / f"all/class/a{ending}"
                image.save(path, form, **({"no_jp2": True} if ending in (".j2k", ".j2c", ".jpc") else {}))
                expected.append(ending)
        source = open_source("imagefolder", tmp_path, "train", split="all")
        assert (
            sorted(expected)
            == sorted(IMAGE_EXTENSIONS)
            == [Path(source.path(row)).suffix for row in range(len(source))]
        )
        sampler = Sampler(len(source), len(source), shuffle=False, drop_last=False)
        loader = Loader(source, sampler, DrawSpec(View(16, "center_crop", resize=16)), threads=1)
        for row, pixels in enumerate(loader.next().images.numpy()):
            assert np.array_equal(pixels, np.asarray(Image.open(source.path(row)).convert("RGB"))), source.path(row)
        loader.close()

    def test_a_split_that_is_a_link_to_nothing(self, pets: Path) -> None:
        (pets / "val").rename(pets / "gone")
        for target in ("nowhere", "val"):
            (pets / "val").unlink(missing_ok=True)
            (pets / "val").symlink_to(pets / target)
            with pytest.raises(FileNotFoundError, match=r"pets/val is a link, but not to a folder: restore its target"):
                open_source("imagefolder", pets, "val")

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

    @pytest.mark.parametrize("annotations", [True, False])
    @pytest.mark.parametrize("split", ["val", "val/images"])
    def test_sorted_into_folders_below_images(self, root: Path, annotations: bool, split: str) -> None:
        for number, wnid in enumerate(("n02", "n01", "n02")):
            (root / "val/images" / wnid).mkdir(exist_ok=True)
            (root / f"val/images/val_{number}.JPEG").rename(root / f"val/images/{wnid}/val_{number}.JPEG")
        if not annotations:
            (root / "val" / "val_annotations.txt").unlink()
        val = open_source("tinyimagenet", root, "val", split=split)
        assert [(val.classes[label], Path(val.path(row)).name) for row, label in enumerate(val.labels)] == [
            ("n01", "val_1.JPEG"),
            ("n02", "val_0.JPEG"),
            ("n02", "val_2.JPEG"),
        ]
        touch(root / "val/images", "val_9.JPEG")
        if split == "val":
            with pytest.raises(ValueError, match="val/images has 2 class folders, and 1 images beside"):
                open_source("tinyimagenet", root, "val")
        else:
            val = open_source("tinyimagenet", root, "val", split=split)
            assert val.notes == (f"{root}/val/images: 1 file is left out: 1 image(s) beside the class folders",)

    def test_val_is_a_link_and_train_has_another_name(self, root: Path, tmp_path: Path) -> None:
        touch(tmp_path / "shared", "train/n07/a.JPEG")  # a neighbour of the link's target, of other data
        (root / "val").rename(tmp_path / "shared/val")
        (root / "val").symlink_to(tmp_path / "shared/val")
        (root / "train").rename(root / "training")
        train, val = open_sources(DataConfig("tinyimagenet", str(root), train_split="training"), 0)
        assert train.classes == val.classes == ("n01", "n02")
        assert val.labels.tolist() == [1, 0, 1]

    def test_images_that_are_not_listed_are_said(self, root: Path) -> None:
        self.annotate(root, *self.LINES[:2])
        touch(root / "val/images", "notes.txt")
        note = f"{root}/val/images: 2 files are left out: 1 .txt, 1 image(s) that val_annotations.txt does not list"
        assert open_source("tinyimagenet", root, "val").notes == (note,)

    def test_converted_with_other_classes(self, root: Path) -> None:
        touch(root / "val", "n01/a.JPEG", "n03/a.JPEG")
        with pytest.raises(ValueError, match=r"train has 2 classes, val 2; only in train: n02; only in val: n03"):
            open_source("tinyimagenet", root, "val")

    def test_label_without_class(self, root: Path) -> None:
        self.annotate(root, *self.LINES[:1], "val_1.JPEG\tn09\t0\t0\t1\t1")
        with pytest.raises(ValueError, match=r"val/val_annotations\.txt line 2: class 'n09' has no folder in train"):
            open_source("tinyimagenet", root, "val")

    @pytest.mark.parametrize("name", ["val_7.JPEG", "val_0.JPEG", "../val_0.JPEG"])
    def test_image_missing_or_listed_twice(self, root: Path, name: str) -> None:
        self.annotate(root, *self.LINES, f"{name}\tn01\t0\t0\t1\t1")
        with pytest.raises(FileNotFoundError, match=rf"line 4: '{name}' is not in .*val/images, or listed twice"):
            open_source("tinyimagenet", root, "val")

    def test_malformed_line_and_empty_list(self, root: Path) -> None:
        self.annotate(root, *self.LINES, "val_2.JPEG n01")
        with pytest.raises(ValueError, match=r"line 4: 'val_2\.JPEG n01' is not 'image <tab> class <tab> box'"):
            open_source("tinyimagenet", root, "val")
        self.annotate(root)
        with pytest.raises(ValueError, match=r"val_annotations\.txt lists no image"):
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
        with pytest.raises(ValueError, match=r"published test split has no labels\): give --data\.val_split val"):
            open_source("tinyimagenet", root, "val", split="test")
        for split in ("test", "val"):  # what was given, or is not there, is no advice
            (root / "val").rename(root / "old") if split == "test" else (root / "test").rename(root / "val")
            with pytest.raises(ValueError, match=r"no labels\): unpack the data set again, or put images in"):
                open_source("tinyimagenet", root, "val", split=split)


class TestSomeClasses:
    @pytest.fixture
    def animals(self, tmp_path: Path) -> Path:
        names = [f"{split}/{name}/{n}.jpg" for split in ("train", "val") for name in "abcd" for n in range(2)]
        return touch(tmp_path / "animals", *names)

    @pytest.fixture
    def listed(self, tmp_path: Path) -> Path:
        path = tmp_path / "classes.txt"
        path.write_text("d\nb\n")
        return path

    @pytest.mark.parametrize("name", ["imagefolder", "imagenet", "imagenet100"])
    def test_of_a_list_in_both_splits(self, animals: Path, listed: Path, name: str) -> None:
        train, val = (open_source(name, animals, role, classes=str(listed)) for role in ("train", "val"))
        assert train.classes == val.classes == ("b", "d")
        assert train.labels.tolist() == [0, 0, 1, 1]
        paths = [val.path(row) for row in range(4)]
        assert paths == [str(animals / "val" / entry) for entry in ("b/0.jpg", "b/1.jpg", "d/0.jpg", "d/1.jpg")]
        assert (
            train.fingerprint
            != open_source(name if name != "imagenet100" else "imagenet", animals, "train").fingerprint
        )

    def test_the_order_in_the_file_does_not_matter(self, animals: Path, listed: Path) -> None:
        before = open_source("imagefolder", animals, "train", classes=listed).fingerprint
        listed.write_text("# the same\nb\nd\n")
        assert open_source("imagefolder", animals, "train", classes=listed).fingerprint == before
        listed.write_text("b\nc\n")
        assert open_source("imagefolder", animals, "train", classes=listed).fingerprint != before

    def test_what_is_left_out_is_not_read(self, animals: Path, listed: Path) -> None:
        for path in (animals / "train" / "a").iterdir():
            path.unlink()
        assert len(open_source("imagefolder", animals, "train", classes=listed)) == 4
        with pytest.raises(ValueError, match="train/a has no image"):
            open_source("imagefolder", animals, "train")

    def test_a_class_without_a_folder(self, animals: Path, listed: Path) -> None:
        listed.write_text("b\n../train\n")
        with pytest.raises(
            ValueError, match=r"1 of 2 classes are not in .*animals/val: \.\./train; it has a, b, c, d$"
        ):
            open_source("imagefolder", animals, "val", classes=listed)

    @pytest.mark.parametrize("converted", [False, True])
    def test_tinyimagenet(self, tmp_path: Path, converted: bool) -> None:
        root = touch(tmp_path / "tiny", *(f"train/{wnid}/images/0.JPEG" for wnid in ("n01", "n02", "n03")))
        if converted:
            touch(root / "val", *(f"{wnid}/val_{wnid}.JPEG" for wnid in ("n01", "n02", "n03")))
        else:
            touch(root / "val", *(f"images/val_{wnid}.JPEG" for wnid in ("n03", "n02", "n01")))
            lines = [f"val_{wnid}.JPEG\t{wnid}\t0\t0\t1\t1\n" for wnid in ("n03", "n02", "n01")]
            (root / "val" / "val_annotations.txt").write_text("".join(lines))
        (tmp_path / "two.txt").write_text("n03\nn01\n")
        train, val = (
            open_source("tinyimagenet", root, role, classes=tmp_path / "two.txt") for role in ("train", "val")
        )
        check_same_classes(train, val)
        assert train.classes == ("n01", "n03")
        assert train.labels.tolist() == [0, 1]
        assert sorted((label, Path(val.path(row)).stem) for row, label in enumerate(val.labels.tolist())) == [
            (0, "val_n01"),
            (1, "val_n03"),
        ]

    def test_digits(self, tmp_path: Path) -> None:
        (tmp_path / "two.txt").write_text("7\n1\n")
        source = open_source("digits", tmp_path / "digits", "val", classes=tmp_path / "two.txt")
        assert source.classes == ("1", "7")
        assert {Path(source.path(row)).parent.name for row in np.flatnonzero(source.labels == 1)} == {"7"}
        assert 80 < len(source) < 100

    def test_imagenet100_draws_the_same_for_both_splits(self, tmp_path: Path) -> None:
        names = [f"{split}/n{number}/0.JPEG" for split in ("train", "val") for number in range(1000, 1150)]
        root = touch(tmp_path / "imagenet", *names)
        train, val = (open_source("imagenet100", root, role) for role in ("train", "val"))
        check_same_classes(train, val)
        assert (len(train.classes), len(val), train.image_size) == (100, 100, 224)
        assert open_source("imagenet100", root, "train", class_seed=0).fingerprint == train.fingerprint
        assert open_source("imagenet100", root, "train", class_seed=1).fingerprint != train.fingerprint
        assert open_source("imagenet100", root, "train", limit=100, seed=5).classes == train.classes

    def test_all_and_some_are_remembered_apart(
        self, animals: Path, listed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for path in [animals / "train", *(animals / "train").iterdir()]:
            os.utime(path, (1_000_000_000, 1_000_000_000))
        monkeypatch.setitem(manifest.open_tree.__kwdefaults__, "remember_above", 2)
        opened = [open_source("imagefolder", animals, "train", classes=file).fingerprint for file in (None, listed)]
        monkeypatch.setattr(manifest, "scan", None)
        again = [open_source("imagefolder", animals, "train", classes=file).fingerprint for file in (None, listed)]
        assert again == opened
