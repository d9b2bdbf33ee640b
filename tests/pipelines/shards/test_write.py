import errno
import fcntl
import hashlib
import io
import json
import os
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.draws import permutation
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.objects import Listed, StoreError
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards import write as convert
from dalikd.pipelines.shards.layout import MANIFEST, ShardManifest
from dalikd.pipelines.shards.tfrecord import decode_example, unframe
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.pipelines.sources import Source

ONE_THREAD = WriteOptions(threads=1)


@pytest.fixture
def tree(small_images: Path, tmp_path: Path) -> Path:
    """Twelve small images in three classes, for a test to spoil."""
    for path in sorted(small_images.glob("*/00[0-3].jpg")):
        target = tmp_path / "tree" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "tree"


def _open(tree: Path) -> Source:
    return open_source("imagefolder", tree, "train", split=".")


def _members(folder: Path) -> dict[str, bytes]:
    """Every member of every tar, in order."""
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    return members


def _records(folder: Path) -> list[dict[str, bytes | int]]:
    """Every record of every TFRecord file, cut by its own lengths."""
    shards = []
    for path in sorted(folder.glob("*.tfrecord")):
        content = path.read_bytes()
        while content:
            size = struct.unpack_from("<Q", content)[0] + 16
            shards.append(decode_example(unframe(content[:size])))
            content = content[size:]
    return shards


# ------------------------------------------------------------------------------------------------ content


def test_what_a_folder_holds(written):
    extension = {"webdataset": "tar", "tfrecord": "tfrecord"}[written.format]
    shards = [f"train-0000{number}.{ending}" for number in range(5) for ending in (extension, "idx")]
    assert sorted(path.name for path in written.folder.iterdir()) == sorted(
        [*shards, "dataset.json", "labels.npy", "order.npy", "checksums.npy", "names.txt"]
    )
    source, order = written.source, np.load(written.folder / "order.npy")
    assert np.array_equal(np.load(written.folder / "labels.npy"), source.labels)
    assert np.array_equal(order, permutation(4, 0, 300))
    paths = [Path(source.path(row)) for row in range(300)]
    assert np.load(written.folder / "checksums.npy").tolist() == [zlib.crc32(path.read_bytes()) for path in paths]
    names = "".join(f"{path.parent.name}/{path.name}\n" for path in paths)
    assert (written.folder / "names.txt").read_text() == names


def test_the_description(written):
    content = json.loads((written.folder / "dataset.json").read_text())
    source, shards = written.source, content.pop("shards")
    arrays = content.pop("arrays")
    assert arrays.keys() == {"labels.npy", "order.npy", "checksums.npy", "names.txt"}
    for name, digest in arrays.items():
        assert digest == hashlib.sha256((written.folder / name).read_bytes()).hexdigest()
    assert len(content.pop("sha256")) == 64
    assert content == {
        "version": 2,
        "format": written.format,
        "name": "imagefolder",
        "split": ".",
        "classes": ["ant", "bee", "cat"],
        "mean": list(source.mean),
        "std": list(source.std),
        "image_size": 224,
        "fingerprint": source.fingerprint,
        "seed": 4,
        "resize": None,
    }
    assert [shard["images"] for shard in shards] == [60] * 5
    for shard in shards:
        path = written.folder / shard["name"]
        assert shard["bytes"] == path.stat().st_size
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["ends_crc32"] == zlib.crc32(path.read_bytes()[:1024] + path.read_bytes()[-1024:])
        assert shard["index_sha256"] == hashlib.sha256(path.with_suffix(".idx").read_bytes()).hexdigest()


def test_tars_hold_the_files_byte_by_byte(tree, tmp_path):
    source = _open(tree)
    write_shards(source, tmp_path / "out", ONE_THREAD)
    members = _members(tmp_path / "out")
    order = permutation(0, 0, 12)
    assert list(members)[::3] == [f"{row:09d}.jpg" for row in order]
    for row in range(12):
        assert members[f"{row:09d}.jpg"] == Path(source.path(row)).read_bytes()
        assert members[f"{row:09d}.cls"] == str(source.labels[row]).encode()
        assert members[f"{row:09d}.id"] == struct.pack("<q", row)


def test_records_hold_the_files_byte_by_byte(tree, tmp_path):
    source = _open(tree)
    write_shards(source, tmp_path / "out", replace(ONE_THREAD, format="tfrecord"))
    shards = _records(tmp_path / "out")
    assert [record["image/id"] for record in shards] == permutation(0, 0, 12).tolist()
    for record in shards:
        row = record["image/id"]
        assert isinstance(row, int)
        path = Path(source.path(row))
        assert record["image/encoded"] == path.read_bytes()
        assert record["image/class/label"] == source.labels[row]
        assert record["image/filename"] == f"{path.parent.name}/{path.name}".encode()


def test_indices_of_tars_are_those_of_dalis_tool(written, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    if written.format != "webdataset":
        return
    for path in sorted(written.folder.glob("*.tar")):
        with wds2idx.IndexCreator(str(path), str(tmp_path / "made.idx"), verbose=False) as creator:
            creator.create_index()
        assert path.with_suffix(".idx").read_text() == (tmp_path / "made.idx").read_text()


def test_indices_of_records_tell_offset_and_size(written):
    if written.format != "tfrecord":
        return
    for path in sorted(written.folder.glob("*.tfrecord")):
        content, offset = path.read_bytes(), 0
        for line in path.with_suffix(".idx").read_text().splitlines():
            size = struct.unpack_from("<Q", content, offset)[0] + 16  # as tfrecord2idx walks through it
            assert line == f"{offset} {size}"
            offset += size
        assert offset == len(content)


def test_arrays_are_written_without_loss(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    tree = open_source("imagefolder", _images(tmp_path / "any", 10), "train", split=".")
    source = replace(tree, files=None, arrays=arrays, name="cifar10")
    write_shards(source, tmp_path / "out", ONE_THREAD)
    members = _members(tmp_path / "out")
    for row in range(10):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members[f"{row:09d}.png"]))), arrays[row])


def _images(folder: Path, count: int) -> Path:
    (folder / "class").mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "class" / f"{number}.png")
    return folder


def test_the_same_seed_writes_the_same_bytes(tree, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        write_shards(_open(tree), tmp_path / name / "train", replace(ONE_THREAD, seed=seed, threads=3))
    one, two, other = ((tmp_path / name / "train/train-00000.tar").read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


# ------------------------------------------------------------------------------------------------ options


def test_shards_without_being_told(monkeypatch, tree, tmp_path):
    assert len(write_shards(_open(tree), tmp_path / "few", ONE_THREAD).shards) == 1
    monkeypatch.setattr(convert, "_USUAL_SHARD", 2)
    assert [shard.images for shard in write_shards(_open(tree), tmp_path / "more", ONE_THREAD).shards] == [2] * 6
    monkeypatch.setattr(convert, "_MOST_SHARDS", 3)
    assert [shard.images for shard in write_shards(_open(tree), tmp_path / "most", ONE_THREAD).shards] == [4] * 3


def test_larger_images_are_resized(photos, tmp_path):
    source = open_source("imagefolder", photos, "train", split=".")
    manifest = write_shards(source, tmp_path / "out", replace(ONE_THREAD, resize=100))
    assert manifest.resize == 100
    assert manifest.fingerprint == f"{source.fingerprint}-short100"
    members = _members(tmp_path / "out")
    for row in range(len(source)):
        path = Path(source.path(row))
        before, after = Image.open(path), Image.open(io.BytesIO(members[f"{row:09d}.jpg"]))
        width, height = before.size
        short = min(width, height)
        if short <= 100:
            assert members[f"{row:09d}.jpg"] == path.read_bytes()
        else:
            assert after.size == (100 * width // short, 100 * height // short)
            assert after.mode == "RGB"
            expected = before.convert("RGB").resize(after.size, Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(after, np.int32) - np.asarray(expected)).mean() < 3  # JPEG's own loss


def test_what_is_resized_is_what_training_sees(tmp_path):
    """Kinds of image that Pillow's convert("RGB") sees otherwise, or refuses."""
    folder = tmp_path / "tree" / "class"
    folder.mkdir(parents=True)
    photo = Image.fromarray(np.random.default_rng(0).integers(60, 200, (4, 4, 3), dtype=np.uint8)).resize((96, 80), 3)
    grey = np.asarray(photo.convert("L"))
    see_through = photo.copy()
    see_through.putalpha(photo.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "1.tif")
    photo.quantize(64).save(folder / "2.png", transparency=bytes(range(0, 256, 4)))
    see_through.save(folder / "3.png")
    see_through.convert("LA").save(folder / "4.png")
    photo.convert("CMYK").save(folder / "5.jpg", quality=95)
    encoded = (folder / "5.jpg").read_bytes()
    (folder / "6.jpg").write_bytes(encoded.replace(b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\0", b""))
    photo.save(folder / "7.png", icc_profile=bytes(3_000_000))
    source = _open(tmp_path / "tree")
    write_shards(source, tmp_path / "out", replace(ONE_THREAD, resize=32))
    members = _members(tmp_path / "out")
    sampler = Sampler(8, 8, shuffle=False, drop_last=False)
    seen = Loader(source, sampler, DrawSpec(View(32, "center_crop", resize=32, interpolation="bicubic")), threads=1)
    for row, pixels in enumerate(seen.next().images.numpy().astype(np.int64)):
        stored = np.asarray(Image.open(io.BytesIO(members[f"{row:09d}.jpg"])))
        assert stored.shape == (32, 38, 3)
        assert np.abs(pixels - stored[:, 3:35]).mean() < 4, row
        assert abs(pixels.mean() - (grey if row in (0, 1, 4) else np.asarray(photo)).mean()) < 6


def test_names_in_records_are_utf8(tree, tmp_path):
    (tree / "ant" / "000.jpg").rename(tree / "ant" / os.fsdecode(b"caf\xe9.jpg"))
    write_shards(_open(tree), tmp_path / "out", replace(ONE_THREAD, format="tfrecord"))
    names = {record["image/filename"].decode() for record in _records(tmp_path / "out")}
    assert r"ant/caf\xe9.jpg" in names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, r"--format zip is unknown: give webdataset or tfrecord"),
        ({"seed": -1}, r"--seed -1"),
        ({"shard_images": 0}, r"--shard_images 0"),
        ({"resize": 0}, r"--resize 0"),
        ({"threads": 0}, r"--threads 0"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        WriteOptions(**changes)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("content", "reason"), [(b"", "the file is empty"), (b"text", "the content is no image but")])
def test_a_file_that_is_no_image_is_named(tree, tmp_path, content, reason):
    (tree / "bee/002.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tree/bee/002\.jpg cannot be decoded \({reason}.*--check"):
        write_shards(_open(tree), tmp_path / "out" / "train", ONE_THREAD)
    assert list((tmp_path / "out").iterdir()) == []  # nothing is left


def test_a_file_that_is_gone_is_named(tree, tmp_path):
    source = _open(tree)
    (tree / "cat/001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"cat/001\.jpg"):
        write_shards(source, tmp_path / "out", ONE_THREAD)


def test_a_file_that_cannot_be_resized_is_named(tree, tmp_path):
    path = tree / "ant/000.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"ant/000\.jpg cannot be decoded"):
        write_shards(_open(tree), tmp_path / "out", replace(ONE_THREAD, resize=16))


@pytest.mark.parametrize("format", ["webdataset", "tfrecord"])
def test_jpeg_2000_is_copied_once_it_has_been_decoded(tree, tmp_path, format):
    pixels = []
    for path in sorted(tree.glob("*/*.jpg")):
        image = Image.open(path).convert("RGB")
        image.save(path, "JPEG2000")
        pixels.append(np.asarray(image))
    source, options = _open(tree), WriteOptions(format, threads=1)
    write_shards(source, tmp_path / "out/train", options)
    sampler = Sampler(len(source), 5, shuffle=False, drop_last=False)
    view = View(32, "center_crop", resize=32)
    for batch in Loader(open_source(format, tmp_path / "out", "train"), sampler, DrawSpec(view), threads=1):
        assert np.array_equal(batch.images, [pixels[row] for row in batch.ids])


@pytest.mark.parametrize("changes", [{}, {"resize": 16}, {"check": True}])
def test_jpeg_2000_that_ends_a_process_is_named(tree, tmp_path, crashing_jpeg2000, changes):
    (tree / "ant/001.jpg").write_bytes(crashing_jpeg2000)
    with pytest.raises(ValueError, match=r"ant/001\.jpg .*this JPEG 2000 ends the process that decodes it \(SIGFPE\)"):
        write_shards(_open(tree), tmp_path / "out", replace(ONE_THREAD, **changes))


def test_check_names_every_bad_file_before_writing(tree, tmp_path):
    source = _open(tree)
    (tree / "ant/001.jpg").write_bytes((tree / "ant/001.jpg").read_bytes()[:-200])  # a header, but not all pixels
    (tree / "cat/003.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ant/001\.jpg \(.*cat/003\.jpg \(the file is empty\): repair or remove them"):
        write_shards(source, tmp_path / "out", replace(ONE_THREAD, check=True))
    assert not (tmp_path / "out").exists()
    (tree / "cat/003.jpg").write_bytes((tree / "cat/002.jpg").read_bytes())
    (tree / "ant/001.jpg").write_bytes((tree / "ant/002.jpg").read_bytes())
    assert write_shards(source, tmp_path / "out", replace(ONE_THREAD, check=True)).images == 12


def test_a_folder_with_content_is_kept(tree, tmp_path):
    write_shards(_open(tree), tmp_path / "out", ONE_THREAD)
    before = (tmp_path / "out/dataset.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"out is not empty: .*--overwrite true"):
        write_shards(_open(tree), tmp_path / "out", replace(ONE_THREAD, seed=1))
    assert (tmp_path / "out/dataset.json").read_bytes() == before


def test_overwriting_replaces_the_folder_whole(tree, tmp_path):
    write_shards(_open(tree), tmp_path / "out", replace(ONE_THREAD, shard_images=4))
    manifest = write_shards(_open(tree), tmp_path / "out", WriteOptions("tfrecord", overwrite=True, threads=1))
    assert ShardManifest.read(tmp_path / "out") == manifest
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tfrecord", ".idx", ".npy", ".json", ".txt"}
    assert len(list((tmp_path / "out").iterdir())) == 7
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_overwriting_keeps_the_old_where_writing_fails(tree, tmp_path):
    write_shards(_open(tree), tmp_path / "out", ONE_THREAD)
    (tree / "ant/001.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match="no image but text"):
        write_shards(_open(tree), tmp_path / "out", replace(ONE_THREAD, overwrite=True))
    assert ShardManifest.read(tmp_path / "out").images == 12


def test_overwriting_spares_foreign_folders(tree, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something else"):
        write_shards(_open(tree), tmp_path / "home", replace(ONE_THREAD, overwrite=True))
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file"):
        write_shards(_open(tree), tmp_path / "home/thesis.txt", ONE_THREAD)
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_told_before(monkeypatch, tree, tmp_path):
    needed = sum(path.stat().st_size for path in tree.glob("*/*")) + 12 * 2048
    usage = convert.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=r"takes about 0\.0 GB, .* name another --output"):
        write_shards(_open(tree), tmp_path / "new/folder", ONE_THREAD)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert write_shards(_open(tree), tmp_path / "new/folder", ONE_THREAD).images == 12


def test_splits_come_together_or_not_at_all(tree, tmp_path):
    sources = {tmp_path / "out" / name: _open(tree) for name in ("train", "val")}
    usage = convert.shutil.disk_usage(tmp_path)
    needed = 2 * (sum(path.stat().st_size for path in tree.glob("*/*")) + 12 * 2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(OSError, match="name another --output"):
            convert.write_splits(sources, ONE_THREAD)
    written = convert.write_splits(sources, ONE_THREAD)
    assert [ShardManifest.read(folder) for folder in sources] == written
    before = [path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.json"))]
    path = tree / "ant/001.jpg"
    broken = {**sources, tmp_path / "out" / "val": _open(tree)}
    path.rename(tree / "away.jpg")
    with pytest.raises(FileNotFoundError, match=r"ant/001\.jpg"):
        convert.write_splits(broken, replace(ONE_THREAD, overwrite=True, seed=3))
    assert [path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.json"))] == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "val"}


def test_what_a_killed_call_has_left_is_removed(tree, tmp_path):
    left = [tmp_path / f".train-{digit * 32}" for digit in "ab"]
    for part in left:
        part.mkdir()
    (left[1] / "dataset.json").touch()
    (tmp_path / ".train-notes").mkdir()
    write_shards(_open(tree), tmp_path / "train", ONE_THREAD)
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "train", ".train-notes"}


def test_only_one_call_writes_into_a_folder(monkeypatch, tree, tmp_path):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another `dalikd prepare` writes into"):
        write_shards(_open(tree), tmp_path / "train", ONE_THREAD)

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "no locks here")

    part = tmp_path / f".train-{32 * 'a'}"
    part.mkdir()
    monkeypatch.setattr(convert.fcntl, "flock", refuse)
    write_shards(_open(tree), tmp_path / "train", ONE_THREAD)
    assert part.exists()  # it may be another's
    os.close(lock)


def test_a_folder_that_another_call_has_filled_meanwhile_is_kept(monkeypatch, tree, tmp_path):
    write_split = convert._write_split

    def late(*arguments):
        manifest = write_split(*arguments)
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "dataset.json").write_text("another's")
        return manifest

    monkeypatch.setattr(convert, "_write_split", late)
    with pytest.raises(FileExistsError, match="has been filled by another call meanwhile"):
        write_shards(_open(tree), tmp_path / "train", ONE_THREAD)
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "train"}
    assert (tmp_path / "train" / "dataset.json").read_text() == "another's"


# ------------------------------------------------------------------------------------------------ object storage


class _Bucket:
    """A store in memory: what each file was, and what was done in which order."""

    url = "s3://bucket/out"

    def __init__(self) -> None:
        self.held, self.done, self.full = dict[str, bytes](), list[str](), 10**6

    def list_all(self, folder: str, *, deep: bool) -> list[Listed]:
        assert not deep
        return [Listed([(key, 0, 0) for key in self.held if key.startswith(f"{folder}/")], [], "")]

    def write(self, name: str, path: Path) -> None:
        self.done.append(name)
        if len(self.done) > self.full:
            raise StoreError("SlowDown")
        self.held[name] = path.read_bytes()

    def remove(self, name: str) -> None:
        self.done.append(f"- {name}")
        del self.held[name]

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(call())
        except OSError as error:
            future.set_exception(error)
        return future


def test_a_store_gets_what_a_folder_gets_and_what_describes_it_last(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket: Any = _Bucket()
    sources, options = {"train": _open(tree), "val": _open(tree)}, replace(ONE_THREAD, shard_images=5)
    expected = convert.write_splits({tmp_path / "out" / name: source for name, source in sources.items()}, options)
    bucket.full = 9
    with pytest.raises(StoreError):
        convert.upload_splits(sources, bucket, options)
    assert not any(name.endswith(MANIFEST) for name in bucket.held)
    bucket.done.clear()
    bucket.full = 10**6
    assert convert.upload_splits(sources, bucket, options) == expected  # over what the other has left
    files = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in tmp_path.glob("out/*/*")}
    assert bucket.held == files
    assert bucket.done[-2:] == [f"train/{MANIFEST}", f"val/{MANIFEST}"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tree"}


def test_shards_in_a_store_are_replaced_where_that_is_asked_for(tree):
    bucket: Any = _Bucket()
    convert.upload_splits({"train": _open(tree)}, bucket, replace(ONE_THREAD, shard_images=5))
    with pytest.raises(FileExistsError, match=r"s3://bucket/out/train is not empty.*--overwrite true"):
        convert.upload_splits({"train": _open(tree)}, bucket, ONE_THREAD)
    bucket.done.clear()
    convert.upload_splits({"train": _open(tree)}, bucket, replace(ONE_THREAD, overwrite=True))
    assert bucket.done[0] == f"- train/{MANIFEST}"
    assert bucket.done[-4:] == [f"- train/train-0000{number}.{kind}" for number in (1, 2) for kind in ("idx", "tar")]
    assert "train/train-00000.tar" in bucket.held
    bucket.held["train/thesis.txt"] = b""
    with pytest.raises(FileExistsError, match=r"train holds something else \(thesis.txt\): name another --output"):
        convert.upload_splits({"train": _open(tree)}, bucket, replace(ONE_THREAD, overwrite=True))


def test_a_full_temporary_folder_is_named(tree, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "write_atomically", full)
    with pytest.raises(OSError, match=r"/dalikd-prepare-\w+: No space left on device while.* in TMPDIR, or give"):
        convert.upload_splits({"train": _open(tree)}, cast(Any, _Bucket()), ONE_THREAD)
