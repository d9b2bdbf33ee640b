import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines.data import open_source
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards import layout, read
from dalikd.pipelines.shards.layout import ShardManifest
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
    """Change the description, as one who knows its checksum."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) | changes
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": layout._own_checksum(content)}))


def _as_version_1(folder: Path) -> None:
    """What an earlier version has written of the same images."""
    content = json.loads((folder / "dataset.json").read_text()) | {"version": 1}
    del content["sha256"]
    for name in ("checksums.npy", "names.txt"):
        del content["arrays"][name]
        (folder / name).unlink()
    for shard in content["shards"]:
        del shard["ends_crc32"]
    (folder / "dataset.json").write_text(json.dumps(content))


def _edit(folder: Path) -> None:
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"bee"', '"bat"'))


def _set_array(folder: Path, name: str, row: int, value: int) -> None:
    """Change an array, and its checksum."""
    array = np.load(folder / name)
    array[row] = value
    np.save(folder / name, array)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    _describe(folder, arrays={**ShardManifest.read(folder).arrays, name: digest})


def _repeat_shard(folder: Path) -> None:
    shards = json.loads((folder / "dataset.json").read_text())["shards"]
    _describe(folder, shards=[*shards[:4], shards[0]])


def _swap_counts(folder: Path) -> None:
    shards = json.loads((folder / "dataset.json").read_text())["shards"]
    shards[0]["images"], shards[1]["images"] = 59, 61
    _describe(folder, shards=shards)


def _cut_index(folder: Path) -> None:
    path = _shard(folder).with_suffix(".idx")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:31]))


def _change_first_byte(folder: Path) -> None:
    path = _shard(folder)
    path.write_bytes(b"?" + path.read_bytes()[1:])


def _add_shard(folder: Path) -> None:
    _shard(folder).with_stem("train-00005").write_bytes(_shard(folder).read_bytes())


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
        (_cut_labels, ValueError, r"labels\.npy is not as it was written \(its checksum differs\): copy it again, or"),
        (_edit, ValueError, r"dataset\.json is not as it was written \(its checksum differs\): copy it again, or"),
        (_repeat_shard, ValueError, r"dataset\.json lists train-00000\.t\w+ more than once: copy it again, or"),
        (_swap_counts, ValueError, r"train-00000\.idx has 60 images, dataset\.json says 59: write"),
        (_cut_index, ValueError, r"train-00002\.idx is not the index that was written .*: make it with `\w+2idx \S+"),
        (_change_first_byte, ValueError, r"train-00002\.t\w+ is another shard, or damaged .*: copy it again, or"),
        (_add_shard, ValueError, r"train-00005\.t\w+ is not of this image set .*: move what belongs to another"),
        (
            lambda folder: _set_array(folder, "labels.npy", 7, 3),
            ValueError,
            r"image 7 the label 3, .* 3 classes",
        ),
        (lambda folder: _set_array(folder, "labels.npy", 7, -1), ValueError, r"image 7 the label -1, .*: write"),
        (lambda folder: _set_array(folder, "order.npy", 7, 300), ValueError, r"order\.npy does not hold every image"),
        (lambda folder: (folder / "names.txt").write_text(""), ValueError, r"names\.txt is not as it was written"),
        (lambda folder: (folder / "checksums.npy").unlink(), FileNotFoundError, r"checksums\.npy is missing: write"),
        (lambda folder: _describe(folder, version=3), ValueError, r"has version 3, this dalikd reads 1 and 2: write"),
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
    monkeypatch.setattr(read.resource, "getrlimit", lambda _: (265, 1000))
    if written.format == "tfrecord":
        assert len(ShardSet(written.folder)) == 300  # DALI opens these one after the other
        return
    with pytest.raises(ValueError, match=r"has 5 tars, .* only 265 files: run `ulimit -n 266` before"):
        ShardSet(written.folder)
    monkeypatch.setattr(read.resource, "getrlimit", lambda _: (266, 1000))
    assert len(ShardSet(written.folder)) == 300


def test_files_that_are_hidden_are_no_shards(copy):
    (copy / f"._{_shard(copy).name}").write_bytes(b"as some systems leave them")
    assert len(ShardSet(copy)) == 300


def test_an_index_made_by_dalis_tool_is_the_one_that_was_written(copy):
    path = _shard(copy)
    index = path.with_suffix(".idx")
    index.unlink()
    tool = {".tar": "wds2idx", ".tfrecord": "tfrecord2idx"}[path.suffix]
    command = shutil.which(tool, path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip(f"{tool} is not installed")
    subprocess.run([command, str(path), str(index)], check=True, capture_output=True)
    assert len(ShardSet(copy)) == 300


# ----------------------------------------------------------------------------------------- earlier version


def test_what_an_earlier_version_wrote_is_read(written, copy):
    _as_version_1(copy)
    shards = ShardSet(copy)
    assert shards.checksums is None
    assert [shards.read(row) for row in (0, 299)] == [Path(written.source.path(row)).read_bytes() for row in (0, 299)]
    source = open_source(written.format, copy.parent, "train")
    assert [note.count("earlier dalikd") for note in source.notes] == [1]
    assert written.open().notes == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut_shard, "bytes instead of"),
        (_cut_index, "is not the index that was written"),
        (_cut_labels, r"labels\.npy is not as it was written"),
        (_add_shard, "is not of this image set"),
    ],
)
def test_of_an_earlier_version_most_is_compared(copy, spoil, message):
    _as_version_1(copy)
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        ShardSet(copy)


# ------------------------------------------------------------------------------------------------ records


def test_a_damaged_record_is_named(written, copy):
    shards = ShardSet(copy)
    row = int(shards.order[2 * 60 + 7])
    path = _shard(copy)
    origin, content = Path(written.source.path(row)), path.read_bytes()
    path.write_bytes(content.replace(origin.read_bytes(), origin.read_bytes()[:-9] + b"123456789"))
    named = rf"train-00002\.t\w+:{row:09d}\S*: record 7 of the shard, from {origin.parent.name}/{origin.name}: "
    reason = {"webdataset": "the image's bytes are not those", "tfrecord": "damaged TFRecord: its checksum"}
    with pytest.raises(ValueError, match=named + reason[written.format]):
        shards.read(row)
    assert not shards.is_whole(row)
    assert all(shards.is_whole(other) for other in range(300) if other != row)
