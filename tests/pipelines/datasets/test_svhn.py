import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from dalikd.pipelines.data import DataConfig, evaluation_view, open_source
from dalikd.pipelines.datasets.arrays import published_set
from dalikd.pipelines.draw_spec import DrawSpec
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler

_CODES = {"uint8": (2, 9), "float64": (9, 6)}  # MATLAB's code of the stored type, and of the array's class


def element(kind: int, content: bytes) -> bytes:
    """One data element of a MATLAB 5 file: type, length, content padded to eight bytes."""
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def variable(name: str, array: np.ndarray) -> bytes:
    """A matrix: flags, dimensions, name, and the values with the first index fastest."""
    stored, kind = _CODES[array.dtype.name]
    parts = (
        element(6, struct.pack("<II", kind, 0)),
        element(5, struct.pack(f"<{array.ndim}i", *array.shape)),
        element(1, name.encode()),
        element(stored, array.tobytes(order="F")),
    )
    return element(14, b"".join(parts))


def mat_file(variables: dict[str, np.ndarray], compressed: bool = True) -> bytes:
    """As MATLAB writes it: a header of 128 bytes, then the variables, each deflated by itself."""
    header = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + struct.pack("<H2s", 0x0100, b"IM")
    written = [variable(name, array) for name, array in variables.items()]
    if compressed:  # the one element that is not padded
        written = [struct.pack("<II", 15, len(packed)) + packed for packed in map(zlib.compress, written)]
    return header + b"".join(written)


def images_of(part: str, count: int) -> np.ndarray:
    """uint8 [N, 32, 32, 3]"""
    seed = {"train": 1, "test": 2, "extra": 3}[part]
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write_part(folder: Path, part: str, labels: list[int]) -> None:
    variables = {"X": images_of(part, len(labels)).transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
    (folder / f"{part}_32x32.mat").write_bytes(mat_file(variables))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_part(tmp_path, "train", [1, 9, 10, 10, 2])
    write_part(tmp_path, "test", [10, 3, 8])
    write_part(tmp_path, "extra", [5, 10])
    return tmp_path


def test_train_and_test(root: Path) -> None:
    train, val = open_source("svhn", root, "train"), open_source("svhn", root, "val")
    assert (train.split, val.split, train.image_size) == ("train", "test", 32)
    assert train.classes == tuple("0123456789")
    assert train.labels.tolist() == [1, 9, 0, 0, 2]
    assert val.labels.tolist() == [0, 3, 8]
    assert train.labels.dtype == np.int64
    assert train.arrays is not None
    assert train.arrays.flags.c_contiguous
    assert np.array_equal(train.arrays, images_of("train", 5))
    assert train.mean == train.std == (0.5, 0.5, 0.5)
    assert train.path(1) == "svhn/train[1]"


def test_extra_and_both(root: Path) -> None:
    extra, both = (open_source("svhn", root, "train", split=split) for split in ("extra", "train+extra"))
    assert extra.labels.tolist() == [5, 0]
    assert both.labels.tolist() == [1, 9, 0, 0, 2, 5, 0]
    assert both.arrays is not None
    assert np.array_equal(both.arrays[5:], images_of("extra", 2))
    assert both.split == "train+extra"
    assert len({extra.fingerprint, both.fingerprint, open_source("svhn", root, "train").fingerprint}) == 3


def test_uncompressed_and_other_number_types(root: Path) -> None:
    variables = {"X": images_of("test", 2).transpose(1, 2, 3, 0), "y": np.array([[10, 4]], np.uint8)}
    (root / "test_32x32.mat").write_bytes(mat_file(variables, compressed=False))
    assert open_source("svhn", root, "val").labels.tolist() == [0, 4]


def test_some_classes_and_a_limit(root: Path) -> None:
    (root / "classes.txt").write_text("9\n0\n")
    source = open_source("svhn", root, "train", classes=root / "classes.txt")
    assert (source.classes, source.labels.tolist()) == (("0", "9"), [1, 0, 0])
    assert len(source.limit(2)) == 2


def test_batches_are_the_images(root: Path) -> None:
    source = open_source("svhn", root, "val")
    sampler = Sampler(len(source), batch_size=3, shuffle=False, drop_last=False)
    loader = Loader(source, sampler, DrawSpec(evaluation_view(DataConfig(name="svhn"), source)), device="cpu")
    (batch,) = loader
    loader.close()
    assert np.array_equal(batch.images.numpy(), images_of("test", 3))
    assert batch.labels.tolist() == [0, 3, 8]


def test_only_what_a_split_needs_must_be_there(root: Path) -> None:
    (root / "extra_32x32.mat").unlink()
    assert len(open_source("svhn", root, "train")) == 5
    with pytest.raises(FileNotFoundError, match=r"svhn: .* lacks extra_32x32\.mat: put .* give --data\.download true$"):
        open_source("svhn", root, "train", split="train+extra")


def test_unknown_split(root: Path) -> None:
    assert published_set("svhn").parts("train+extra") == ["train", "extra"]
    for split in ("val", "train+test", "extra+train", "full"):
        with pytest.raises(ValueError, match=r"no split '.*': give one of train, test, extra, train\+extra$"):
            open_source("svhn", root, "train", split=split)


X, Y = images_of("train", 2).transpose(1, 2, 3, 0), np.array([[1], [2]], np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a file of the published data set"),
        (b"<html>404</html>" * 20, "is not a file of the published data set"),
        (mat_file({"X": X, "y": Y})[:-900], "is not a file of the published data set"),
        (mat_file({"y": Y}), "is not a file of the published data set"),
        (mat_file({"X": X}), r"is not a file of the published data set: 'y'"),
        (mat_file({"X": X.astype(np.float64), "y": Y}), "does not hold images of 32 x 32 x 3 bytes"),
        (mat_file({"X": X[:31], "y": Y}), "does not hold images of 32 x 32 x 3 bytes"),
        (mat_file({"X": X, "y": Y, "z": Y}), r"is not a file of the published data set: it has an array b'z' too many"),
        (mat_file({"X": np.zeros((32, 32, 3, 27_000), np.uint8), "y": Y}), "it ends too early, or has more than 26032"),
        (mat_file({"X": X, "y": Y[:1]}), r"does not hold 2 labels in 1\.\.10"),
        (mat_file({"X": X, "y": Y + 9}), r"does not hold 2 labels in 1\.\.10"),
        (mat_file({"X": X, "y": Y.astype(np.float64) - 5}), r"does not hold 2 labels in 1\.\.10"),
    ],
)
def test_damaged_file(root: Path, content: bytes, message: str) -> None:
    path = root / "test_32x32.mat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_source("svhn", root, "val")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_download_of_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []

    class Fake(datasets.SVHN):
        def __init__(self, root: str, *, split: str, download: bool = False) -> None:
            if not download:
                return super().__init__(root, split)
            splits.append(split)
            write_part(Path(root), split, [1, 2])

    monkeypatch.setattr(datasets, "SVHN", Fake)
    root = tmp_path / "new"
    with pytest.raises(FileNotFoundError, match=r"does not exist: .*--data\.download true to fetch it"):
        open_source("svhn", root, "train")
    assert splits == []
    assert len(open_source("svhn", root, "train", download=True)) == 2
    assert len(open_source("svhn", root, "train", split="train+extra", download=True)) == 4
    assert len(open_source("svhn", root, "val", download=True)) == 2
    assert splits == ["train", "extra", "test"]
    assert sorted(path.name for path in root.iterdir()) == ["extra_32x32.mat", "test_32x32.mat", "train_32x32.mat"]


@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted."), OSError("no route to host")])
def test_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(reader: datasets.SVHN) -> None:
        (Path(reader.root) / "train_32x32.mat").write_bytes(b"half")
        raise error

    monkeypatch.setattr(datasets.SVHN, "download", download)
    with pytest.raises(ConnectionError, match=rf"svhn could not be downloaded \({error}\): try again, or put the"):
        open_source("svhn", tmp_path, "train", download=True)
    assert list(tmp_path.iterdir()) == []
