import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines.data import open_source
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards import read as records_module
from dalikd.pipelines.shards.read import ShardSet
from dalikd.pipelines.shards.write import WriteOptions, write_shards


@pytest.fixture
def copy(written, tmp_path: Path) -> Path:
    """A copy for a test to spoil."""
    shutil.copytree(written.folder, tmp_path / "copy" / "train")
    return tmp_path / "copy" / "train"


def _shard(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.name.startswith("train-00002.t"))


def _describe(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------ reading


def test_what_is_opened(written):
    shards = ShardSet(written.folder)
    assert len(shards) == 300
    assert np.array_equal(shards.labels, written.source.labels)
    assert sorted(shards.order.tolist()) == list(range(300))
    extension = {"webdataset": ".tar", "tfrecord": ".tfrecord"}[written.format]
    assert shards.paths == [str(written.folder / f"train-0000{number}{extension}") for number in range(5)]
    assert shards.index_paths == [str(written.folder / f"train-0000{number}.idx") for number in range(5)]


def test_every_image_is_read_by_its_row(written):
    shards = ShardSet(written.folder)
    for row in range(300):
        assert shards.read(row) == Path(written.source.path(row)).read_bytes()


def test_names_say_where_an_image_is(written):
    shards = ShardSet(written.folder)
    position = 3 * 60 + 7
    row = int(shards.order[position])
    ending = {"webdataset": f".tar:{row:09d}.jpg", "tfrecord": f".tfrecord:{row:09d}"}[written.format]
    assert shards.name(row) == str(written.folder / "train-00003") + ending


def test_the_digest_follows_the_content(written, copy, tmp_path):
    assert ShardSet(copy).digest == ShardSet(written.folder).digest
    write_shards(written.source, tmp_path / "other", WriteOptions(written.format, seed=5, threads=1))
    assert ShardSet(tmp_path / "other").digest != ShardSet(written.folder).digest


def test_the_source_is_that_of_the_files(written):
    source = written.open()
    assert source.shards is not None
    assert source.files is source.arrays is None
    for name in ("name", "split", "classes", "mean", "std", "image_size", "fingerprint"):
        assert getattr(source, name) == getattr(written.source, name)
    assert np.array_equal(source.labels, written.source.labels)
    assert source.path(17) == source.shards.name(17)


def test_a_part_cannot_be_taken(written):
    with pytest.raises(ValueError, match=r"--data\.limit 30: .* `dalikd prepare --data\.limit 30`"):
        open_source(written.format, written.folder.parent, "train", limit=30)
    with pytest.raises(ValueError, match=r"--data\.share 0\.5: .* `dalikd prepare --data\.share 0\.5`"):
        open_source(written.format, written.folder.parent, "train", share=0.5)


@pytest.mark.parametrize(
    ("shuffle", "drop_last", "expected"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_shares_are_for_training(shuffle, drop_last, expected):
    assert Sampler(10, 5, shuffle=shuffle, drop_last=drop_last).reads_shares is expected


# ------------------------------------------------------------------------------------------------- errors


def _remove_shard(folder: Path) -> None:
    _shard(folder).unlink()


def _cut_shard(folder: Path) -> None:
    path = _shard(folder)
    path.write_bytes(path.read_bytes()[:-512])


def _remove_index(folder: Path) -> None:
    _shard(folder).with_suffix(".idx").unlink()


def _remove_description(folder: Path) -> None:
    (folder / "dataset.json").unlink()


def _cut_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.zeros(299, np.int64))


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (_remove_shard, FileNotFoundError, r"train-00002\.t\w+ is missing: copy the folder again, or write"),
        (_cut_shard, ValueError, r"train-00002\.t\w+ has \d+ bytes instead of \d+: copy it again, or write"),
        (
            _remove_index,
            FileNotFoundError,
            r"train-00002\.idx is missing: make it with `\w+2idx \S+ \S+idx`, or",
        ),
        (_remove_description, FileNotFoundError, r"train has no dataset\.json: .*`dalikd prepare --data\.name"),
        (lambda folder: (folder / "order.npy").unlink(), FileNotFoundError, r"order\.npy is missing: write"),
        (_cut_labels, ValueError, r"labels\.npy has 299 entries, dataset\.json 300: write"),
        (lambda folder: _describe(folder, version=2), ValueError, r"has version 2, this dalikd reads 1: write"),
        (lambda folder: _describe(folder, seeds=2), ValueError, r"dataset\.json is damaged \(TypeError"),
        (lambda folder: _describe(folder, shards=[]), ValueError, r"dataset\.json lists no image: write"),
        (lambda folder: _describe(folder, format="zip"), ValueError, r"format 'zip' is unknown: write"),
        (lambda folder: (folder / "dataset.json").write_text("{"), ValueError, r"is damaged \(.*not a JSON file"),
        (shutil.rmtree, FileNotFoundError, r"train does not exist: check --data\.root"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(copy: Path, spoil: Callable[[Path], None], kind, message):
    spoil(copy)
    with pytest.raises(kind, match=message):
        ShardSet(copy)


def test_an_empty_folder(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train has no dataset\.json: only what `dalikd prepare` has written"):
        open_source("webdataset", tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="has no folder 'val'"):
        open_source("tfrecord", tmp_path, "val")


def test_the_other_format_is_named(written):
    other = {"webdataset": "tfrecord", "tfrecord": "webdataset"}[written.format]
    message = rf"train holds {written.format}, not {other}: give --data\.name {written.format}"
    with pytest.raises(ValueError, match=message):
        open_source(other, written.folder.parent, "train")


def test_more_tars_than_may_be_open(monkeypatch, written):
    monkeypatch.setattr(records_module.resource, "getrlimit", lambda _: (265, 1000))
    if written.format == "tfrecord":
        assert len(ShardSet(written.folder)) == 300  # DALI opens these one after the other
        return
    with pytest.raises(ValueError, match=r"has 5 tars, .* only 265 files: run `ulimit -n 266` before"):
        ShardSet(written.folder)
    monkeypatch.setattr(records_module.resource, "getrlimit", lambda _: (266, 1000))
    assert len(ShardSet(written.folder)) == 300


# ------------------------------------------------------------------------------------------------- verify


def test_what_is_whole_is_verified(written):
    ShardSet(written.folder).verify()


def test_every_changed_file_is_named(copy):
    changed = [_shard(copy), copy / "train-00004.idx", copy / "labels.npy"]
    for path in changed:
        content = bytearray(path.read_bytes())
        content[-8 if path.suffix == ".npy" else -1] ^= 2  # a label of another class
        path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum differs") as error:
        ShardSet(copy).verify()
    assert all(str(path) in str(error.value) for path in changed)
    assert str(error.value).count(str(copy)) == 3


def test_a_damaged_record_is_named(copy):
    path = _shard(copy)
    if path.suffix != ".tfrecord":
        return
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    shards = ShardSet(copy)
    row = int(shards.order[120])  # the first image of the third shard
    with pytest.raises(ValueError, match=rf"train-00002\.tfrecord:{row:09d}: damaged TFRecord"):
        shards.read(row)
