import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.data import open_source
from dalikd.pipelines.sources import Source


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DALIKD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def train(cache: Path) -> Source:  # noqa: ARG001
    return open_source("digits", None, "train")


@pytest.fixture(scope="module")
def val(train: Source) -> Source:  # noqa: ARG001 (written once, by the first)
    return open_source("digits", None, "val")


def pixels(source: Source) -> np.ndarray:
    return np.stack([np.asarray(Image.open(source.path(row))) for row in range(len(source))])


def test_sizes_and_place(cache: Path, train: Source, val: Source) -> None:
    assert (len(train), len(val), train.image_size) == (1347, 450, 32)
    assert train.classes == val.classes == tuple("0123456789")
    assert train.path(0).startswith(f"{cache}/digits-v1/train/0/")
    assert [path.name for path in cache.iterdir()] == ["digits-v1"]
    assert (cache / "digits-v1").stat().st_mode & 0o055 == 0o055 & ~_umask()  # as readable as any new folder


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_split_is_fixed_stratified_and_disjoint(train: Source, val: Source) -> None:
    shares = np.bincount(train.labels) / (np.bincount(train.labels) + np.bincount(val.labels))
    assert np.abs(shares - 1347 / 1797).max() < 0.007
    numbers = {
        split: {int(Path(source.path(row)).stem) for row in range(len(source))}
        for split, source in (("train", train), ("val", val))
    }
    assert numbers["train"] | numbers["val"] == set(range(1797))
    assert not numbers["train"] & numbers["val"]
    assert (train.fingerprint, val.fingerprint) == ("51d1917323fbbd34fae9", "a49329d0def0c9a70f91")


def test_images_and_labels_are_those_of_scikit_learn(val: Source) -> None:
    from sklearn.datasets import load_digits

    data, images = load_digits(), pixels(val)
    rows = [int(Path(val.path(row)).stem) for row in range(len(val))]
    assert images.shape == (450, 32, 32, 3)
    assert val.labels.tolist() == data["target"][rows].tolist()
    small = images.reshape(450, 8, 4, 8, 4, 3).mean((2, 4, 5)).reshape(450, 1, 64)
    originals = data["images"].reshape(1, 1797, 64) * (255 / 16)
    assert np.abs(small - originals).mean(2).argmin(1).tolist() == rows  # each is nearest to its own original


def test_statistics_are_those_of_the_training_images(train: Source) -> None:
    scaled = pixels(train) / 255
    assert np.allclose(scaled.mean((0, 1, 2)), train.mean, atol=5e-4)
    assert np.allclose(scaled.std((0, 1, 2)), train.std, atol=5e-4)


def test_second_call_writes_nothing(cache: Path, train: Source) -> None:
    folder = cache / "digits-v1"
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert open_source("digits", None, "train").fingerprint == train.fingerprint
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_root_overrides_and_bytes_are_identical(tmp_path: Path, cache: Path, train: Source) -> None:
    other = open_source("digits", tmp_path / "mine", "train")
    assert other.path(0).startswith(str(tmp_path / "mine"))
    assert other.fingerprint == train.fingerprint
    names = sorted(path.relative_to(cache / "digits-v1") for path in (cache / "digits-v1").rglob("*.jpg"))
    assert len(names) == 1797
    assert all((tmp_path / "mine" / name).read_bytes() == (cache / "digits-v1" / name).read_bytes() for name in names)


def test_two_processes_at_once(tmp_path: Path, start_forked: Any) -> None:
    script, cache = tmp_path / "digits.py", tmp_path / "cache"
    script.write_text(
        "from dalikd.pipelines.data import open_source; print(open_source('digits', None, 'val').fingerprint)"
    )
    workers = [start_forked(tmp_path / str(number), script, DALIKD_CACHE=str(cache)) for number in range(2)]
    assert [worker.end().strip() for worker in workers] == ["a49329d0def0c9a70f91"] * 2
    assert [path.name for path in cache.iterdir()] == ["digits-v1"]


def test_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="something else in it than train and val: empty it or name a new"):
        open_source("digits", tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_image_missing(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name / "0").mkdir(parents=True)
        (tmp_path / name / "0" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"val has 1 images instead of 450: remove .* to have it written again"):
        open_source("digits", tmp_path, "val")
