from hashlib import md5
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines.datasets.published import Finding, PublishedSet, from_columns
from dalikd.pipelines.datasets.spec import SplitSpec


def sums(*files: str) -> dict[str, str]:
    """A file's content is its name."""
    return {file: md5(file.encode()).hexdigest() for file in files}


SEPARATE = PublishedSet(
    name="svhn", title="SVHN", splits={"train": sums("t"), "test": sums("s"), "extra": sums("e1", "e2")}
)
ARCHIVE = PublishedSet(
    name="stl10", title="STL10", splits={"train": sums("t"), "test": sums("s")}, common=sums("names"), archive="all"
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
            with pytest.raises(ValueError, match=r"svhn needs a folder: say --data\.root FOLDER"):
                SEPARATE.locate(request("svhn", None, download), ["train"])
        with pytest.raises(FileNotFoundError, match=r"does not exist: check --data\.root, or say --data\."):
            SEPARATE.locate(request("svhn", tmp_path / "x"), ["train"])
        write(tmp_path, "file")
        with pytest.raises(NotADirectoryError, match=r"file is not a folder: check --data\.root"):
            SEPARATE.locate(request("svhn", tmp_path / "file"), ["train"])

    def test_download_that_brings_too_little(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import datasets

        monkeypatch.setattr(datasets, "STL10", lambda root, download: write(root / "all", "t"))  # noqa: ARG005
        with pytest.raises(FileNotFoundError, match=r"all lacks s, names: put"):
            ARCHIVE.locate(request("stl10", tmp_path, download=True), ["train"])

    def test_download_without_a_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import datasets

        def fail(root: Path, download: bool) -> None:  # noqa: ARG001
            raise OSError("<urlopen error no route>")

        monkeypatch.setattr(datasets, "STL10", fail)
        with pytest.raises(ConnectionError, match=rf"stl10 could not be .* \(.*no route>\): .* into {tmp_path}/all"):
            ARCHIVE.locate(request("stl10", tmp_path, download=True), ["train"])
        assert list(tmp_path.iterdir()) == []


def test_from_columns() -> None:
    pictures = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    columns = np.stack([[picture[..., channel].T for channel in range(3)] for picture in pictures])
    rows = from_columns(columns)
    assert np.array_equal(rows, pictures)
    assert rows.flags.c_contiguous
    assert rows.dtype == np.uint8


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

    def test_large_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dalikd.pipelines.datasets.published._CHUNK", 7)
        content = bytes(range(100))
        published = PublishedSet(name="x", title="X", splits={"train": {"f": md5(content).hexdigest()}})
        (tmp_path / "f").write_bytes(content)
        assert self.states(published, tmp_path, "train") == {"f": "whole"}
