import os
import pickle
import resource
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets.arrays import find_arrays
from dalikd.pipelines.datasets.spec import SplitIndex, SplitSpec

CLASSES_10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Python2Pickler(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Writes bytes as Python 2 wrote its strings, which is how the published files were made."""

    dispatch = dict(pickle._Pickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue] # noqa: RUF012

    def save_bytes(self, content: bytes) -> None:
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def dumps_python2(entry: object) -> bytes:
    file = BytesIO()
    Python2Pickler(file, protocol=2).dump(entry)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def dumps_python3(entry: object) -> bytes:
    return pickle.dumps(entry, protocol=2)


def batch(first: int, count: int = 4, key: bytes = b"labels") -> dict[bytes, object]:
    rows = np.random.default_rng(first).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": rows, key: [(first + row) % 10 for row in range(count)], b"filenames": [b"x.png"] * count}


def write_cifar10(folder: Path, dumps=dumps_python2) -> Path:
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(dumps(batch(number)))
    (folder / "test_batch").write_bytes(dumps(batch(6, 3)))
    names = [name.encode() for name in CLASSES_10]
    (folder / "batches.meta").write_bytes(dumps({b"label_names": names, b"num_vis": 3072}))
    return folder


def write_cifar100(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, first in (("train", 1), ("test", 2)):
        entry = batch(first, key=b"fine_labels") | {b"coarse_labels": [0] * 4}
        (folder / name).write_bytes(dumps_python2(entry))
    names = [f"class{label:02d}".encode() for label in range(100)]
    (folder / "meta").write_bytes(dumps_python2({b"fine_label_names": names, b"coarse_label_names": [b"a"]}))
    return folder


def read(name: str, root: Path, split: str) -> SplitIndex:
    return find_arrays(SplitSpec(name, root, "train", split))


def pixels(found: SplitIndex) -> np.ndarray:
    assert found.arrays is not None
    return found.arrays


@pytest.mark.parametrize("dumps", [dumps_python2, dumps_python3, pickle.dumps])
@pytest.mark.parametrize("parent", [True, False])
def test_cifar10(tmp_path: Path, dumps, parent: bool) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", dumps)
    data = read("cifar10", tmp_path if parent else folder, "train")
    images = pixels(data)
    assert images.shape == (20, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert data.classes == tuple(CLASSES_10)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [(first + row) % 10 for first in range(1, 6) for row in range(4)]
    row = np.asarray(batch(2)[b"data"])[1]  # the sixth image
    assert images[5, 7, 9].tolist() == [row[7 * 32 + 9], row[1024 + 7 * 32 + 9], row[2048 + 7 * 32 + 9]]
    assert len(read("cifar10", folder, "test").labels) == 3


def test_folder_of_another_name(tmp_path: Path) -> None:
    assert len(read("cifar10", write_cifar10(tmp_path / "mine"), "test").labels) == 3


def test_column_order_and_str_keys(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "c")
    entry = batch(6, 3)
    fortran = {"data": np.asfortranarray(entry[b"data"]), "labels": entry[b"labels"]}
    (folder / "test_batch").write_bytes(pickle.dumps(fortran, protocol=2))
    expected = np.asarray(entry[b"data"]).reshape(3, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(pixels(read("cifar10", folder, "test")), expected)


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "cifar-100-python")
    source = open_source("cifar100", tmp_path, "val")
    assert (source.name, source.split, len(source.classes), source.image_size) == ("cifar100", "test", 100, 32)
    assert source.labels.tolist() == [2, 3, 4, 5]
    assert source.classes[3] == "class03"
    assert source.mean == (0.5071, 0.4867, 0.4408)
    assert open_source("cifar100", tmp_path, "train").split == "train"


def test_source_holds_arrays(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    source = open_source("cifar10", tmp_path, "train")
    assert source.files is None
    assert source.arrays is not None
    assert source.std == (0.2470, 0.2435, 0.2616)
    assert source.path(3) == "cifar10/train[3]"
    small = source.limit(12, seed=1)
    assert small.arrays is not None
    kept = [row for row in range(20) if any(np.array_equal(source.arrays[row], image) for image in small.arrays)]
    assert small.labels.tolist() == source.labels[kept].tolist()
    assert len({source.fingerprint, small.fingerprint, open_source("cifar10", tmp_path, "val").fingerprint}) == 3
    pixel = source.arrays.copy()
    pixel[0, 0, 0, 0] ^= 1
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(
        dumps_python2(batch(1) | {b"data": pixel[:4].transpose(0, 3, 1, 2).reshape(4, 3072)})
    )
    assert open_source("cifar10", tmp_path, "train").fingerprint != source.fingerprint


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("place", ["value", "key", "state"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, place: str, protocol: int) -> None:
    folder, trace = write_cifar10(tmp_path / "c"), tmp_path / "trace"
    attack = Call(os.mkdir, str(trace))
    entry = {"value": {b"data": attack}, "key": {attack: 1}, "state": [batch(1), attack]}[place]
    (folder / "test_batch").write_bytes(pickle.dumps(entry, protocol=protocol))
    with pytest.raises(
        ValueError, match=r"test_batch is not a file of .*: it (asks for \w+\.mkdir|has the operation \d+), which"
    ):
        read("cifar10", folder, "test")
    assert not trace.exists()
    if place != "key":  # None is no key
        pickle.loads((folder / "test_batch").read_bytes())
        assert trace.exists()  # the plain unpickler does run it


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x15ndarray.__reduce_ex__\x93.",
        b"cnumpy.core.multiarray\nfrombuffer\n(S'x'\ntR.",
    ],
)
def test_only_four_names_are_known(tmp_path: Path, content: bytes) -> None:
    folder = write_cifar10(tmp_path / "c")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="which data has no need of"):
        read("cifar10", folder, "test")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02K\x00r\xff\xff\xff\x0f.",  # nine bytes for 4.5 GB of the memo of the unpickler in C
        b"\x80\x04\x96" + (1 << 33).to_bytes(8, "little") + b".",  # a bytearray
        b"\x80\x02c_codecs\nencode\nq\x00X\x10'\x00\x00" + b"x" * 10_000 + b"q\x01X\x06\x00\x00\x00latin1q\x02"
        b"]" + b"(" + b"h\x00h\x01h\x02\x86R" * 5 + b"e.",
        b"\x80\x02}N" + b"\x85" * 500_000 + b"K\x01s.",  # a key whose hash overflows the stack
        b"\x80\x02" + b"]" * 2_100_000 + b".",
    ],
)
def test_a_pickle_takes_no_more_memory_than_its_file(tmp_path: Path, content: bytes) -> None:
    folder = write_cifar10(tmp_path / "c")
    (folder / "test_batch").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="test_batch"):
        read("cifar10", folder, "test")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"", "is not a file of the published data set: EOFError"),
        (b"<html>404</html>", "is not a file of the published data set"),
        (dumps_python2(batch(1))[:-2000], "is not a file of the published data set"),
        ([1, 2], "is not a file of the published data set"),
        ({b"labels": [1]}, "has no 'data', only labels"),
        ({b"data": np.zeros((1, 3072), np.uint8)}, "has no 'labels', only data"),
        ({}, "has no 'data', only nothing"),
        ({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, "an array of '?b?'?f4'? instead of bytes"),
        ({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}, "data is not an array of 3072 bytes an image"),
        ({b"data": [[1, 2]], b"labels": [1]}, "data is not an array of 3072 bytes an image"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, r"labels is not 2 labels in 0\.\.9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, r"labels is not 1 labels in 0\.\.9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, r"labels is not 1 labels in 0\.\.9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["1"]}, r"labels is not 1 labels in 0\.\.9"),
    ],
)
def test_damaged_batch(tmp_path: Path, entry: object, message: str) -> None:
    folder = write_cifar10(tmp_path / "c")
    (folder / "test_batch").write_bytes(entry if isinstance(entry, bytes) else dumps_python3(entry))
    with pytest.raises(ValueError, match=message) as caught:
        read("cifar10", folder, "test")
    assert str(folder / "test_batch") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [[], [1], b"airplane", None])
def test_damaged_class_names(tmp_path: Path, names: object) -> None:
    folder = write_cifar10(tmp_path / "c")
    (folder / "batches.meta").write_bytes(dumps_python3({b"label_names": names}))
    with pytest.raises(ValueError, match=r"batches\.meta: label_names is not a list of names"):
        read("cifar10", folder, "test")


def test_unknown_split(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match="cifar10 has no split 'val': give one of train, test"):
        open_source("cifar10", tmp_path, "val", split="val")


def test_missing_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py lacks data_batch_1, .*--data\.download true"):
        open_source("cifar10", tmp_path, "train")
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="lacks data_batch_4: put the published files there"):
        open_source("cifar10", tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: .*--data\.download true to fetch it"):
        open_source("cifar10", tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"cifar100 needs a folder: give --data\.root FOLDER"):
        open_source("cifar100", None, "train")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The roots that torchvision's data set was called with, which writes the files."""
    roots: list[Path] = []

    class Fake(datasets.CIFAR10):
        def __init__(self, root: Path, *, download: bool) -> None:
            assert download
            roots.append(root)
            (root / "cifar-10-python.tar.gz").touch()
            (root / "cifar-10-batches-py").rmdir()
            write_cifar10(root / "cifar-10-batches-py")

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    return roots


def test_download_only_when_asked_and_missing(tmp_path: Path, downloads: list[Path]) -> None:
    root = tmp_path / "data"
    with pytest.raises(FileNotFoundError):
        open_source("cifar10", root, "train")
    assert downloads == []
    assert len(open_source("cifar10", root, "train", download=True)) == 20
    assert len(open_source("cifar10", root, "val", download=True)) == 3
    assert len(open_source("cifar10", root, "val")) == 3
    assert len(downloads) == 1
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]


def test_download_does_not_touch_an_incomplete_folder(tmp_path: Path, downloads: list[Path]) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").unlink()
    with pytest.raises(FileExistsError, match=r"cifar-10-batches-py is incomplete \(no test_batch\): remove it"):
        open_source("cifar10", tmp_path, "train", download=True)
    assert downloads == []


def test_some_classes(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "classes.txt").write_text("dog\ncat # small\n")
    whole = open_source("cifar10", tmp_path, "train")
    source = open_source("cifar10", tmp_path, "train", classes=tmp_path / "classes.txt")
    assert source.classes == ("cat", "dog")  # the data set's order
    rows = [row for row, label in enumerate(whole.labels) if label in (3, 5)]
    assert source.labels.tolist() == [{3: 0, 5: 1}[int(whole.labels[row])] for row in rows]
    assert source.arrays is not None
    assert whole.arrays is not None
    assert np.array_equal(source.arrays, whole.arrays[rows])
    assert source.fingerprint != whole.fingerprint
    (tmp_path / "classes.txt").write_text("dog\nlion\n")
    with pytest.raises(ValueError, match=r"1 of 2 classes are not in cifar10: lion; it has airplane, .* more$"):
        open_source("cifar10", tmp_path, "train", classes=tmp_path / "classes.txt")
