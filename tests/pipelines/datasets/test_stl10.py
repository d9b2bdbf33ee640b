from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler

CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def write_split(folder: Path, split: str, labels: list[int]) -> np.ndarray:
    """The published bytes of random images uint8 [N, 96, 96, 3], which are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(split))
    images = random.integers(0, 256, (len(labels), 96, 96, 3), dtype=np.uint8)
    with (folder / f"{split}_X.bin").open("wb") as file:
        for image in images:
            for channel in range(3):
                for column in range(96):
                    file.write(image[:, column, channel].tobytes())
    (folder / f"{split}_y.bin").write_bytes(bytes(labels))
    return images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "stl10_binary"
    write_split(folder, "train", [1, 10, 3])
    write_split(folder, "test", [2, 2])
    return folder


@pytest.mark.parametrize("parent", [True, False])
def test_train_and_test(folder: Path, parent: bool) -> None:
    root = folder.parent if parent else folder
    train, val = open_source("stl10", root, "train"), open_source("stl10", root, "val")
    assert (train.split, val.split, train.image_size) == ("train", "test", 96)
    assert train.classes == CLASSES
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 9, 2], [1, 1])
    assert train.labels.dtype == np.int64
    assert train.arrays is not None
    assert train.arrays.flags.c_contiguous
    assert np.array_equal(train.arrays, write_split(folder, "train", [1, 10, 3]))
    assert train.mean == train.std == (0.5, 0.5, 0.5)


def test_folder_of_another_name(folder: Path) -> None:
    folder.rename(folder.parent / "mine")
    assert len(open_source("stl10", folder.parent / "mine", "val")) == 2


def test_some_classes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("truck\nairplane\n")
    source = open_source("stl10", folder, "train", classes=tmp_path / "classes.txt")
    assert (source.classes, source.labels.tolist()) == (("airplane", "truck"), [0, 1])


@pytest.mark.parametrize("view", [View(96, "pad_crop", padding=12), View(32, "center_crop", resize=32)])
def test_batches_at_its_own_and_at_another_size(folder: Path, view: View) -> None:
    source = open_source("stl10", folder, "train")
    loader = Loader(source, Sampler(3, batch_size=3), DrawSpec(view, seed=1), device="cpu", threads=1)
    batch = next(iter(loader))
    loader.close()
    assert batch.images.shape == (3, view.size, view.size, 3)
    assert sorted(batch.labels.tolist()) == [0, 2, 9]


@pytest.mark.parametrize("split", ["unlabeled", "train+unlabeled"])
def test_unlabelled_images_are_refused(folder: Path, split: str) -> None:
    with pytest.raises(ValueError, match="has images without labels: give train or test"):
        open_source("stl10", folder, "train", split=split)


def test_unknown_split(folder: Path) -> None:
    with pytest.raises(ValueError, match="stl10 has no split 'extra': give one of train, test"):
        open_source("stl10", folder, "train", split="extra")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test_X.bin", b"", "test_X.bin does not hold images of 96 x 96 x 3 bytes; fetch it again"),
        ("test_X.bin", bytes(27647), "test_X.bin is not a file of the published data set: cannot reshape"),
        ("test_X.bin", bytes(27648), r"test_y.bin does not hold 1 labels in 1\.\.10"),
        ("test_y.bin", b"", r"test_y.bin does not hold 2 labels in 1\.\.10; fetch it again"),
        ("test_y.bin", bytes([0, 1]), r"test_y.bin does not hold 2 labels in 1\.\.10"),
        ("test_y.bin", bytes([1, 11]), r"test_y.bin does not hold 2 labels in 1\.\.10"),
    ],
)
def test_damaged_file(folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_source("stl10", folder, "val")
    assert str(folder) in str(caught.value)


def test_missing_files(folder: Path) -> None:
    (folder / "test_y.bin").unlink()
    message = (
        r"stl10_binary lacks test_y\.bin: put .* the folder that holds stl10_binary as --data\.root, or give --data"
    )
    with pytest.raises(FileNotFoundError, match=message):
        open_source("stl10", folder.parent, "train")


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(datasets.STL10):
        def __init__(self, root: Path, *, split: str = "train", download: bool = False) -> None:
            if not download:
                return super().__init__(root, split)
            (root / "stl10_binary.tar.gz").touch()
            for part in ("train", "test"):
                write_split(root / "stl10_binary", part, [1])
            (root / "stl10_binary/unlabeled_X.bin").touch()

    monkeypatch.setattr(datasets, "STL10", Fake)
    assert len(open_source("stl10", tmp_path / "data", "train", download=True)) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["stl10_binary"]
    (tmp_path / "data/stl10_binary/train_y.bin").unlink()
    with pytest.raises(FileExistsError, match=r"incomplete \(no train_y\.bin\): remove it to download it again"):
        open_source("stl10", tmp_path / "data", "train", download=True)
