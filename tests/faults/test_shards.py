"""What becomes of shards between `dalikd prepare` and a training, and of a `dalikd prepare` that does not come to its
end."""

import json
import os
import re
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards.layout import ShardFormat
from dalikd.pipelines.shards.read import ShardSet
from dalikd.pipelines.shards.tfrecord import decode_example, encode_example, frame, unframe
from dalikd.pipelines.shards.verify import verify_split
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.tools import prepare

pytestmark = pytest.mark.faults

IMAGES, EACH, RECORD = 36, 9, 5  # of the set, of a shard; a record in its middle


class Copy(NamedTuple):
    """Shards to spoil: the split's `folder`, its `format`, and the folder of other images written alike."""

    folder: Path
    format: ShardFormat
    other: Path

    def shard(self, number: int) -> Path:
        return self.folder / f"train-{number:05d}.{'tar' if self.format == 'webdataset' else 'tfrecord'}"

    def index(self, number: int) -> Path:
        return self.shard(number).with_suffix(".idx")

    def fields(self, record: int = RECORD) -> list[str]:
        """Of a record of the second shard, in the index."""
        return self.index(1).read_text().splitlines()[record + (self.format == "webdataset")].split()

    def place(self, record: int = RECORD) -> tuple[int, int]:
        """Where that record starts and stops."""
        fields = self.fields(record)
        if self.format == "tfrecord":
            return int(fields[0]), int(fields[0]) + int(fields[1])
        return int(fields[1]) - 512, int(fields[9]) + 512

    def put(self, start: int, content: bytes) -> None:
        """Write into the second shard."""
        with self.shard(1).open("r+b") as file:
            file.seek(start)
            file.write(content)

    def change(self, label: int | None = None, id: int | None = None) -> None:
        """Write other numbers into a record, whose own checksums are made to fit."""
        if self.format == "webdataset":
            fields = self.fields()
            if label is not None:
                self.put(int(fields[5]), str(label).encode())
            if id is not None:
                self.put(int(fields[9]), struct.pack("<q", id))
            return
        start, stop = self.place()
        features = decode_example(unframe(self.shard(1).read_bytes()[start:stop]))
        features |= {"image/class/label": label} if label is not None else {}
        features |= {"image/id": id} if id is not None else {}
        record = frame(encode_example(features))
        assert len(record) == stop - start
        self.put(start, record)

    def open(self):
        return open_source(self.format, self.folder.parent, "train")

    def loader(self, bad_files="stop") -> Loader:
        return Loader(
            self.open(), Sampler(IMAGES, 6, seed=3), DrawSpec(View(32, "pad_crop")), threads=1, bad_files=bad_files
        )


@pytest.fixture(scope="module", params=["webdataset", "tfrecord"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """Images of noise, all but one of one size, so that one shard is as long as another."""
    root, folders = tmp_path_factory.mktemp(request.param), []
    for seed in range(2):
        random = np.random.default_rng(seed)
        for number in range(IMAGES):
            path = root / f"tree{seed}" / f"class{number % 3}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            text = PngInfo()
            text.add_text("Comment", "longer" if number == 0 else "long")
            Image.fromarray(pixels).save(path, compress_level=0, pnginfo=text)
        folders.append(root / f"set{seed}" / "train")
        source = open_source("imagefolder", root / f"tree{seed}", "train", split=".")
        write_shards(source, folders[-1], WriteOptions(request.param, shard_images=EACH, threads=1))
    return Copy(folders[0], request.param, folders[1])


@pytest.fixture
def copy(written: Copy, tmp_path: Path) -> Copy:
    shutil.copytree(written.folder, tmp_path / "train")
    return written._replace(folder=tmp_path / "train")


# ------------------------------------------------------------------------------------------------ at opening


def _cut_index(copy: Copy) -> None:
    lines = copy.index(1).read_text().splitlines(keepends=True)
    copy.index(1).write_text("".join(lines[: len(lines) // 2]))


def _index_of_another(copy: Copy) -> None:
    """One that differs, which is that of the shard with the longer image, or any if it is this one."""
    own = copy.index(1).read_bytes()
    copy.index(1).write_bytes(next(other for other in map(Path.read_bytes, map(copy.index, range(4))) if other != own))


def _another_shard(copy: Copy) -> None:
    shutil.copy(copy.shard(2), copy.shard(1))
    shutil.copy(copy.index(2), copy.index(1))


def _shard_of_another_set(copy: Copy) -> None:
    shutil.copy(copy.other / copy.shard(1).name, copy.shard(1))
    shutil.copy(copy.other / copy.index(1).name, copy.index(1))


def _shard_twice(copy: Copy) -> None:
    copy.shard(3).write_bytes(2 * copy.shard(3).read_bytes())


def _cut_at_a_record(copy: Copy) -> None:
    os.truncate(copy.shard(1), copy.place()[0])


def _two_sets(copy: Copy) -> None:
    shutil.copy(copy.other / copy.shard(0).name, copy.shard(7))
    shutil.copy(copy.other / copy.index(0).name, copy.index(7))


def _edit(name: str, change: Callable[[dict], object]) -> Callable[[Copy], None]:
    def edit(copy: Copy) -> None:
        path = copy.folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content, indent=1) + "\n")

    return edit


def _array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Copy], None]:
    def edit(copy: Copy) -> None:
        np.save(copy.folder / name, change(np.load(copy.folder / name)))

    return edit


AT_OPENING = {
    "index cut to half": (_cut_index, r"train-00001\.idx is not the index that was written"),
    "index of another shard": (_index_of_another, r"train-00001\.idx is not the index that was written"),
    "another shard with its index": (_another_shard, r"train-00001\.t\w+ (is another shard|has \d+ bytes)"),
    "shard of another set": (_shard_of_another_set, r"train-00001\.t\w+ is another shard"),
    "last shard missing": (lambda copy: copy.shard(3).unlink(), r"train-00003\.t\w+ is missing"),
    "index missing": (lambda copy: copy.index(3).unlink(), r"train-00003\.idx is missing: make it with"),
    "shard appended twice": (_shard_twice, r"train-00003\.t\w+ has \d+ bytes instead of"),
    "cut at a record's border": (_cut_at_a_record, r"train-00001\.t\w+ has \d+ bytes instead of"),
    "two sets in one folder": (_two_sets, r"train-00007\.t\w+ is not of this image set"),
    "shard listed twice": (
        _edit("dataset.json", lambda content: content["shards"].append(content["shards"][0])),
        r"dataset\.json is not as it was written",
    ),
    "last shard not listed": (
        _edit("dataset.json", lambda content: content["shards"].pop()),
        r"dataset\.json is not as it was written",
    ),
    "shards in another order": (
        _edit("dataset.json", lambda content: content["shards"].reverse()),
        r"dataset\.json is not as it was written",
    ),
    "classes in another order": (
        _edit("dataset.json", lambda content: content["classes"].reverse()),
        r"dataset\.json is not as it was written",
    ),
    "labels swapped": (_array("labels.npy", lambda labels: labels[::-1]), r"labels\.npy is not as it was written"),
    "label of no class": (_array("labels.npy", lambda labels: labels + 1), r"labels\.npy is not as it was written"),
    "image ordered twice": (
        _array("order.npy", lambda order: np.append(order[:-1], order[0])),
        r"order\.npy is not as it was written",
    ),
    "checksums of another set": (
        lambda copy: shutil.copy(copy.other / "checksums.npy", copy.folder),
        r"checksums\.npy is not as it was written",
    ),
}


@pytest.mark.parametrize("fault", AT_OPENING)
def test_found_at_opening(copy, fault):
    spoil, message = AT_OPENING[fault]
    spoil(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        copy.open()
    assert "\n" not in str(error.value)
    assert "`dalikd prepare`" in str(error.value)


@pytest.mark.parametrize("fault", AT_OPENING)
def test_named_by_verify_too(copy, fault, capsys):
    spoil, message = AT_OPENING[fault]
    spoil(copy)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--verify", str(copy.folder)])
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert re.search(message, out + error)


# -------------------------------------------------------------------------------------- in a record's bytes


def _flip_image(copy: Copy) -> None:
    start, stop = copy.place()
    at = (start + stop) // 2
    copy.put(at, bytes([copy.shard(1).read_bytes()[at] ^ 1]))


def _image_of_another_set(copy: Copy) -> None:
    place = slice(*copy.place())
    other = (copy.other / copy.shard(1).name).read_bytes()[place]
    copy.put(place.start, other)


def _swap_images(copy: Copy) -> None:
    """Of two records, whose ids stay."""
    content, places = copy.shard(1).read_bytes(), []
    for record in (RECORD, RECORD + 1):
        start, stop = copy.place(record)
        found = content.index(b"\x89PNG", start)
        places.append(slice(found, content.index(b"IEND", found, stop) + 8))
    one, two = places
    copy.put(one.start, content[two])
    copy.put(two.start, content[one])


IN_TRAINING = {
    "byte of an image flipped": (_flip_image, "the image's bytes are not those that were written"),
    "image of another set": (_image_of_another_set, "the image's bytes are not those that were written"),
    "images of two records swapped": (_swap_images, "the image's bytes are not those that were written"),
    "id of another image": (lambda copy: copy.change(id=1), r"id 1 instead of \d+"),
    "id of no image": (lambda copy: copy.change(id=IMAGES + 5), rf"id {IMAGES + 5} instead of \d+"),
}


def _row(copy: Copy, record: int = RECORD) -> int:
    return int(np.load(copy.folder / "order.npy")[EACH + record])


@pytest.mark.parametrize("fault", IN_TRAINING)
def test_a_record_that_is_wrong_is_a_bad_file(written, copy, fault, capsys):
    spoil, reason = IN_TRAINING[fault]
    expected = list(written.loader())
    spoil(copy)
    loader = copy.loader()
    with pytest.raises(BadFileError, match=rf"train-00001\.t\w+:{_row(copy):09d}.*bad_files replace") as error:
        list(loader)
    own = "damaged TFRecord" if copy.format == "tfrecord" and reason.startswith("the image") else reason
    if fault != "image of another set":
        assert re.search(rf"record {RECORD} of the shard, from class\d/\d+\.png: .*({own})", str(error.value))
    loader = copy.loader("replace")
    bad = {_row(copy), _row(copy, RECORD + 1)} if "swapped" in fault else {_row(copy)}
    for _ in range(2):  # epochs
        batches = list(loader)
        assert loader.replaced.keys() == bad
    loader.seek(0)
    for batch, other in zip(loader, expected, strict=True):
        kept = torch.tensor([row not in bad for row in other.ids.tolist()])
        assert [loader.replaced.get(row, row) for row in other.ids.tolist()] == batch.ids.tolist()
        assert torch.equal(batch.images[kept], other.images[kept])
    assert len(batches) == len(expected)
    assert capsys.readouterr().out.count("cannot decode") in (1, 2)


def _flip_name(copy: Copy) -> None:
    """In a header of a tar, or in the origin that a TFRecord tells, which nobody reads."""
    start, stop = copy.place()
    at = start if copy.format == "webdataset" else stop - 8
    copy.put(at, bytes([copy.shard(1).read_bytes()[at] ^ 1]))


def _flip_last(copy: Copy) -> None:
    """In a TFRecord's own checksum, in a tar's padding."""
    _, stop = copy.place()
    copy.put(stop - 1, bytes([copy.shard(1).read_bytes()[stop - 1] ^ 1]))


BY_VERIFY = {name: (spoil, reason) for name, (spoil, reason) in IN_TRAINING.items()} | {
    "label of another class": (lambda copy: copy.change(label=9), r"label 9 instead of \d"),
    "name": (_flip_name, "header or padding|checksum does not fit"),
    "checksum or padding": (_flip_last, "header or padding|checksum does not fit"),
}


@pytest.mark.parametrize("fault", BY_VERIFY)
def test_verify_names_the_record(copy, fault):
    spoil, reason = BY_VERIFY[fault]
    assert list(verify_split(copy.folder)) == []
    spoil(copy)
    lines = list(verify_split(copy.folder))
    records = [RECORD, RECORD + 1] if "swapped" in fault else [RECORD]
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        name = rf"{copy.shard(1)} record {record} \(id {_row(copy, record)}, from class\d/\d+\.png\): "
        assert re.fullmatch(rf"{name}.*({reason}).*", line)


def test_verify_names_each_of_many(copy):
    """Also where the index of the shard is damaged, and an array, it tells what it can."""
    _shard_of_another_set(copy)
    assert len(list(verify_split(copy.folder))) == EACH + 1  # and that it is another shard
    _cut_index(copy)
    lines = list(verify_split(copy.folder))
    assert [re.search(r"another shard|not the index|cannot be told apart", line) is not None for line in lines] == [
        True
    ] * 3
    (copy.folder / "labels.npy").unlink()
    assert "labels.npy is missing" in next(verify_split(copy.folder))


# -------------------------------------------------------------------------------------------- while writing


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits whose writing takes some tenths of a second."""
    root = tmp_path_factory.mktemp("tree")
    random = np.random.default_rng(5)
    for split in ("train", "val"):
        for number in range(24):
            path = root / split / f"class{number % 3}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (400, 400, 3), dtype=np.uint8)).save(path, compress_level=0)
    return root


def _is_whole(folder: Path) -> bool:
    """Whether both splits are; one alone does not open as a set."""
    return all(
        len(ShardSet(folder / split)) == 24 and not [*verify_split(folder / split)] for split in ("train", "val")
    )


def test_a_killed_call_leaves_nothing_that_opens(tree, tmp_path, start_forked, full):
    arguments = ("prepare", "--data.root", tree, "--output", tmp_path / "out", "--resize", 256, "--shard_images", 2)
    killed = 0
    for attempt in range(20 if full else 3):
        process = start_forked(tmp_path / f"process{attempt}", *arguments)
        while process.runs() and not list(tmp_path.glob(f"out/.*/*-{attempt % 8:05d}.tar")):
            time.sleep(0.001)
        process.kill()
        if (tmp_path / "out/val").exists():  # it was faster
            shutil.rmtree(tmp_path / "out")
            continue
        killed += 1
        with pytest.raises((FileNotFoundError, ValueError)):
            open_source("webdataset", tmp_path / "out", "val")
    assert killed
    left = {path.name for path in tmp_path.glob("out/.*")}
    start_forked(tmp_path / "last", *arguments).end()
    assert _is_whole(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "val"}, left


def test_a_killed_call_leaves_what_it_was_to_replace(tree, tmp_path, start_forked):
    arguments = ("prepare", "--data.root", tree, "--output", tmp_path / "out", "--shard_images", 2)
    start_forked(tmp_path / "first", *arguments).end()
    before = (tmp_path / "out/train/dataset.json").read_bytes()
    process = start_forked(tmp_path / "second", *arguments, "--resize", 256, "--overwrite", "true")
    while process.runs() and not list(tmp_path.glob("out/.train-*/*-00003.tar")):
        time.sleep(0.001)
    process.kill()
    assert (tmp_path / "out/train/dataset.json").read_bytes() == before
    assert _is_whole(tmp_path / "out")
    start_forked(tmp_path / "third", *arguments, "--resize", 256, "--overwrite", "true").end()
    assert _is_whole(tmp_path / "out")
    assert ShardSet(tmp_path / "out/train").manifest.resize == ShardSet(tmp_path / "out/val").manifest.resize == 256
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "val"}


def test_two_calls_at_once(tree, tmp_path, start_forked):
    arguments = ("prepare", "--data.root", tree, "--output", tmp_path / "out", "--resize", 256)
    formats = ("webdataset", "tfrecord")
    calls = [start_forked(tmp_path / kind, *arguments, "--format", kind) for kind in formats]
    codes = [call.wait() for call in calls]
    assert sorted(codes) == [0, 2]
    assert (
        "another `dalikd prepare` writes into" in calls[codes.index(2)].err
        or "is not empty" in calls[codes.index(2)].err
    )
    assert _is_whole(tmp_path / "out")
    assert ShardSet(tmp_path / "out/train").manifest.format == formats[codes.index(0)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "val"}


@pytest.mark.parametrize("most", [300, 3000, 400_000, 5_000_000])  # bytes a file may have
def test_a_disk_that_is_full(tree, tmp_path, capsys, most):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            prepare.main(["--data.root", str(tree), "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop.value.code == 2
    assert re.fullmatch(
        rf"dalikd prepare: error: {tmp_path}/out: .* while shards were written, .*: name another --output, or .*\n",
        capsys.readouterr().err,
    )
    assert list((tmp_path / "out").iterdir()) == []
