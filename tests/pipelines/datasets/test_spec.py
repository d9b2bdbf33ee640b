from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines.datasets.file_list import FileList
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec


class TestKeep:
    labels = np.array([0, 2, 1, 2, 0])

    def test_files(self) -> None:
        files = FileList.from_paths([f"/r/{row}" for row in range(5)], "/r")
        kept = SplitIndex(("a", "b", "c"), self.labels, files=files).keep(("a", "c"))
        assert kept.files is not None
        assert [kept.files.path(row) for row in range(4)] == ["/r/0", "/r/1", "/r/3", "/r/4"]
        assert (kept.classes, kept.labels.tolist(), kept.arrays) == (("a", "c"), [0, 1, 1, 0], None)
        assert kept.labels.dtype == np.int64

    def test_arrays(self) -> None:
        arrays = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
        kept = SplitIndex(("a", "b", "c"), self.labels, arrays=arrays).keep(("c", "b"))
        assert kept.arrays is not None
        assert kept.arrays.ravel().tolist() == [1, 2, 3]
        assert (kept.labels.tolist(), kept.files) == ([0, 1, 0], None)

    def test_all_are_not_copied(self) -> None:
        found = SplitIndex(("a", "b", "c"), self.labels, arrays=np.zeros((5, 1, 1, 3), np.uint8))
        assert found.keep(("a", "b", "c")) is found


class TestChoose:
    def test_all_by_default(self) -> None:
        request = SplitSpec("imagefolder", None, "train", "train")
        assert not request.takes_part
        assert request.choose(["b", "a"], "DATA") == ("b", "a")

    def test_a_list_wins_over_the_draw(self, tmp_path: Path) -> None:
        path = tmp_path / "classes.txt"
        path.write_text("b\na\n")
        for name in ("imagefolder", "imagenet100"):
            request = SplitSpec(name, None, "train", "train", classes=path)
            assert request.takes_part
            assert request.choose(("a", "b", "c"), "DATA") == ("a", "b")

    def test_imagenet100_draws(self) -> None:
        names = tuple(f"n{number}" for number in range(1000, 1200))
        chosen = [
            SplitSpec("imagenet100", None, "train", "train", class_seed=seed).choose(names, "D") for seed in (0, 1)
        ]
        assert [len(names) for names in chosen] == [100, 100]
        assert chosen[0] != chosen[1]
        with pytest.raises(ValueError, match=r"^imagenet100: /data/train has 5 class folders of which 100"):
            SplitSpec("imagenet100", None, "val", "val").choose(tuple("abcde"), Path("/data/train"))


class TestMissingRoot:
    @pytest.mark.parametrize(
        ("name", "advice"),
        [
            ("imagefolder", r"check --data\.root$"),
            ("webdataset", r"check --data\.root$"),
            ("svhn", r"check --data\.root, or give --data\.download true to fetch it$"),
            ("tinyimagenet", r"; to get it, fetch http://cs231n\.stanford\.edu/tiny-imagenet-200\.zip, unpack it, "),
            (
                "imagenet",
                r"; to get it, register at https://image-net\.org, .* {root}/train/<wnid>/\*\.JPEG and {root}/val",
            ),
            ("imagenet100", r"; to get it, register at "),
        ],
    )
    def test_says_how_to_get_it(self, tmp_path: Path, name: str, advice: str) -> None:
        root = tmp_path / "nowhere"
        with pytest.raises(FileNotFoundError, match=advice.replace("{root}", str(root))) as caught:
            SplitSpec(name, root, "train", "train").check_root()
        assert f"{root} does not exist" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_an_empty_folder_too(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no folders at all: check --data\.root; to get it, fetch http"):
            SplitSpec("tinyimagenet", tmp_path, "train", "train").split_folder()

    def test_no_root(self) -> None:
        with pytest.raises(ValueError, match=r"svhn needs a folder: give --data\.root FOLDER"):
            SplitSpec("svhn", None, "train", "train").check_root()
