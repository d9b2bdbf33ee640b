from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from dalikd.pipelines.datasets.arrays import PUBLISHED_FILES, PublishedSet, _by_pixels, published_set
from dalikd.pipelines.datasets.info import Finding
from dalikd.pipelines.datasets.spec import SplitSpec


def sums(*files: str) -> dict[str, str]:
    """A file's content is its name."""
    return {file: md5(file.encode()).hexdigest() for file in files}


SEPARATE = PublishedSet(
    name="svhn", reader=None, splits={"train": sums("t"), "test": sums("s"), "extra": sums("e1", "e2")}
)
ARCHIVE = PublishedSet(
    name="stl10", reader=None, splits={"train": sums("t"), "test": sums("s")}, common=sums("names"), archive="all"
)


def write(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).write_text(file)
    return folder


def request(name: str, root: Path | None, download: bool = False) -> SplitSpec:
    return SplitSpec(name, root, "train", "train", download)


class TestFolder:
    def test_in_the_root_or_in_the_archive_s_folder(self, tmp_path: Path) -> None:
        assert SEPARATE.folder(tmp_path) == tmp_path
        assert ARCHIVE.folder(tmp_path) == tmp_path / "all"
        assert ARCHIVE.folder(tmp_path / "all") == tmp_path / "all"
        write(tmp_path, "names")
        assert ARCHIVE.folder(tmp_path) == tmp_path


class TestLocate:
    def test_separate_files_are_needed_by_split(self, tmp_path: Path) -> None:
        write(tmp_path, "t", "e2")
        assert SEPARATE.locate(request("svhn", tmp_path), ["train"]) == tmp_path
        with pytest.raises(FileNotFoundError, match=f"^svhn: {tmp_path} lacks e1: put the published files there"):
            SEPARATE.locate(request("svhn", tmp_path), ["train", "extra"])

    def test_of_an_archive_all_are_needed(self, tmp_path: Path) -> None:
        write(tmp_path / "all", "t", "names")
        with pytest.raises(FileNotFoundError, match=r"all lacks s: put .* the folder that holds all as --data\.root"):
            ARCHIVE.locate(request("stl10", tmp_path), ["train"])
        write(tmp_path / "all", "s")
        assert ARCHIVE.locate(request("stl10", tmp_path), ["train"]) == tmp_path / "all"

    def test_root(self, tmp_path: Path) -> None:
        for download in (False, True):
            with pytest.raises(ValueError, match=r"svhn needs a folder: give --data\.root FOLDER"):
                SEPARATE.locate(request("svhn", None, download), ["train"])
        with pytest.raises(FileNotFoundError, match=r"does not exist: check --data\.root, or give --data\."):
            SEPARATE.locate(request("svhn", tmp_path / "x"), ["train"])
        write(tmp_path, "file")
        with pytest.raises(NotADirectoryError, match=r"file is not a folder: check --data\.root"):
            SEPARATE.locate(request("svhn", tmp_path / "file"), ["train"])

    def test_download_that_brings_too_little(self, tmp_path: Path) -> None:
        archive = replace(ARCHIVE, reader=lambda root, download: write(root / "all", "t"))  # noqa: ARG005
        with pytest.raises(FileNotFoundError, match=r"all lacks s, names: put"):
            archive.locate(request("stl10", tmp_path, download=True), ["train"])

    def test_download_without_a_network(self, tmp_path: Path) -> None:
        def fail(root: Path, download: bool) -> None:  # noqa: ARG001
            raise OSError("<urlopen error no route>")

        with pytest.raises(ConnectionError, match=rf"stl10 could not be .* \(.*no route>\): .* into {tmp_path}/all"):
            replace(ARCHIVE, reader=fail).locate(request("stl10", tmp_path, download=True), ["train"])
        assert list(tmp_path.iterdir()) == []


def test_by_pixels() -> None:
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    pixels = _by_pixels(images)
    assert np.array_equal(pixels, images.transpose(0, 2, 3, 1))
    assert pixels.flags.c_contiguous
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_files_are_those_that_torchvision_lists(name: str) -> None:
    published, theirs = published_set(name), getattr(datasets, PUBLISHED_FILES[name])
    assert published.archive == getattr(theirs, "base_folder", "")
    assert set(published.splits) == ({"train", "test", "extra"} if name == "svhn" else {"train", "test"})
    assert all(len(md5) == 32 for md5 in published.files.values())
    assert len(published.files) == {"cifar10": 7, "cifar100": 3, "svhn": 3, "stl10": 4}[name]
    assert "unlabeled_X.bin" not in published.files


class TestVerify:
    def states(self, published: PublishedSet, root: Path, *splits: str) -> dict[str, str]:
        return {Path(finding.place).name: finding.state for finding in published.verify(root, splits)}

    def test_whole_damaged_and_missing(self, tmp_path: Path) -> None:
        write(tmp_path / "all", "t", "names", "other")
        (tmp_path / "all" / "names").write_text("Names")
        assert self.states(ARCHIVE, tmp_path, "train") == {"t": "whole", "s": "missing", "names": "damaged"}

    def test_what_no_split_needs_may_be_missing_but_not_damaged(self, tmp_path: Path) -> None:
        write(tmp_path, "t", "e2")
        (tmp_path / "e2").write_text("")
        assert self.states(SEPARATE, tmp_path, "train", "test") == {"t": "whole", "s": "missing", "e2": "damaged"}
        assert self.states(SEPARATE, tmp_path, "extra") == {"t": "whole", "e1": "missing", "e2": "damaged"}

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert self.states(SEPARATE, tmp_path / "x", "train") == {"t": "missing"}

    def test_says_both_checksums(self, tmp_path: Path) -> None:
        write(tmp_path, "t")
        (tmp_path / "t").write_text("x")
        (finding,) = SEPARATE.verify(tmp_path, ["train"])
        assert finding.detail == f"its MD5 is {md5(b'x').hexdigest()}, published {md5(b't').hexdigest()}"
        assert str(finding) == f"{tmp_path}/t: damaged ({finding.detail})"
        assert str(Finding("a", "whole")) == "a: whole"

    def test_svhn_splits_are_made_of_parts(self, tmp_path: Path) -> None:
        missing = [
            Path(finding.place).name for finding in published_set("svhn").verify(tmp_path, ["train+extra", "test"])
        ]
        assert missing == ["train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"]
        with pytest.raises(ValueError, match="svhn has no split 'val': give one of train, test, extra, train"):
            list(published_set("svhn").verify(tmp_path, ["val"]))

    def test_remedies(self) -> None:
        assert published_set("svhn").remedy == "remove what is damaged, and give --data.download true"
        whole = "remove the folder cifar-10-batches-py if it is there, and give --data.download true"
        assert published_set("cifar10").remedy == whole
