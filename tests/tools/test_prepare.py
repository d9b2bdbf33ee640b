import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from dalikd.pipelines import sources
from dalikd.pipelines.data import DataConfig, open_sources
from dalikd.pipelines.datasets.info import DATASET_INFO
from dalikd.tools import prepare


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls the command; exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            prepare.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_writes_both_splits_and_says_how_to_read_them(call, tree, tmp_path, kind):
    code, out, _ = call("--data.root", tree, "--output", tmp_path / "out", "--format", kind, "--shard_images", 40)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out/train: 99 images of 3 classes in 3 files, ")
    assert lines[1].startswith(f"{tmp_path}/out/val: 30 images of 3 classes in 1 files, ")
    assert lines[2] == f"read it with --data.name {kind} --data.root {tmp_path}/out"
    files = open_sources(DataConfig(root=str(tree)), 0)
    written = open_sources(DataConfig(name=kind, root=str(tmp_path / "out")), 0)
    for one, two in zip(files, written, strict=True):
        assert one.fingerprint == two.fingerprint
        assert np.array_equal(one.labels, two.labels)


def test_one_split_and_fewer_images(call, tree, tmp_path):
    arguments = ["--data.root", tree, "--output", tmp_path / "out", "--split", "train", "--data.limit", 12]
    code, out, _ = call(*arguments, "--json", "-")
    assert code == 0
    (split,) = json.loads(out)["written"]
    assert (split["folder"], split["images"], split["classes"]) == (f"{tmp_path}/out/train", 12, 3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    content = json.loads((tmp_path / "out/train/dataset.json").read_text())
    assert sum(shard["images"] for shard in content["shards"]) == 12


def test_a_share_of_the_training_images(call, tree, tmp_path):
    assert call("--data.root", tree, "--output", tmp_path / "out", "--data.share", 0.5, "--seed", 3)[0] == 0
    files = open_sources(DataConfig(root=str(tree), share=0.5), 3)
    written = open_sources(DataConfig(name="webdataset", root=str(tmp_path / "out")), 0)
    assert [len(source) for source in written] == [51, 30]  # 17 of each 33
    assert [source.fingerprint for source in written] == [source.fingerprint for source in files]


def test_trains_from_what_it_wrote(call, command, options, tree, tmp_path):
    assert call("--data.root", tree, "--output", tmp_path / "out")[0] == 0
    data = ["--data.name", "webdataset", "--data.root", tmp_path / "out"]
    training = ["--batch_size", 16, "--mix.group", 8, "--epochs", 1, "--augmentation", "cutmix"]
    ended = command("train", *options, *data, *training, "--output", tmp_path / "run")
    assert (ended.code, ended.err.count("error")) == (0, 0)
    assert "on 30 images" in ended.out
    assert (tmp_path / "run/results.json").exists()


def test_verifies_a_folder_of_splits_or_one_split(call, tree, tmp_path):
    call("--data.root", tree, "--output", tmp_path / "out")
    code, out, _ = call("--verify", tmp_path / "out")
    assert code == 0
    lines = [
        rf"{tmp_path}/out/train: 99 images in 1 files, all as they were written \([\d,]+ images/s\)\n",
        rf"{tmp_path}/out/val: 30 images in 1 files, all as they were written \([\d,]+ images/s\)\n",
    ]
    assert re.fullmatch("".join(lines), out)
    assert re.fullmatch(lines[1], call("--verify", tmp_path / "out/val")[1])
    code, out, error = call("--verify", tmp_path / "out/val", "--json", "-")
    assert re.fullmatch(lines[1], error)
    split = {"folder": f"{tmp_path}/out/val", "wrong": [], "images": 30, "files": 1}
    assert (code, json.loads(out)) == (0, {"verified": [split]})


def test_damage_is_one_line(call, tree, tmp_path):
    call("--data.root", tree, "--output", tmp_path / "out")
    path = tmp_path / "out/train/train-00000.tar"
    content = bytearray(path.read_bytes())
    content[1100] ^= 1
    path.write_bytes(content)
    code, out, error = call("--verify", tmp_path / "out", "--json", tmp_path / "found.json")
    assert code == 2
    first, second = json.loads((tmp_path / "found.json").read_text())["verified"]
    assert (first["wrong"], second["wrong"]) == (out.splitlines()[:1], [])
    assert re.fullmatch(
        rf"{path} record 0 \(id \d+, from class\d/\d+\.jpg\): the image's bytes are not those that were written\n"
        rf"{tmp_path}/out/val: 30 images in 1 files, all as .*\nwritten: {tmp_path}/found.json\n",
        out,
    )
    assert error == (
        f"dalikd prepare: error: {tmp_path}/out is not as it was written (in 1 places, listed above): copy it again, "
        "or write the folder again with `dalikd prepare`\n"
    )


def test_both_targets_are_looked_at_before_anything_is_written(call, tree, tmp_path):
    (tmp_path / "out/val").mkdir(parents=True)
    (tmp_path / "out/val/notes.txt").write_text("mine")
    code, _, error = call("--data.root", tree, "--output", tmp_path / "out")
    assert code == 2
    assert "out/val is not empty" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output FOLDER says where to write; or look at the data set with --check true, fetch it with"),
        (["--output", "out"], "imagefolder needs a folder: give --data.root FOLDER"),
        (["--verify", "."], r"--verify .: there is no dataset.json in it"),
        (["--output", "out", "--format", "zip"], "zip"),
        (["--output", "out", "--data.name", "webdataset"], "webdataset"),
        (["--check", "true", "--data.name", "svhn"], "svhn needs a folder: give --data.root FOLDER"),
        (["--check", "true", "--data.name", "cifar10", "--data.root", "no"], "cifar10 is not as published ("),
        (["--data.download", "true", "--data.name", "imagenet"], "imagenet cannot be downloaded by --data.download; "),
        (["--data.download", "true", "--data.name", "tinyimagenet"], "fetch http://cs231n.stanford.edu/tiny-imagenet"),
        (["--output", "out", "--threads", "0"], "--threads 0: give 1 or more"),
    ],
)
def test_wrong_calls_are_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = call(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_other_classes_in_the_other_split(call, own_tree, tmp_path):
    (own_tree / "val/class2").rename(own_tree / "val/another")
    code, _, error = call("--data.root", own_tree, "--output", tmp_path / "out")
    assert code == 2
    assert "only in train: class2; only in val: another" in error
    assert not (tmp_path / "out").exists()


def test_looks_at_class_folders(call, own_tree):
    _, out, _ = call("--data.root", own_tree, "--check", "true", "--split", "val", "--json", "-")
    found = {"place": "imagefolder val", "state": "whole", "detail": "3 classes, 30 images"}
    assert json.loads(out) == {"checked": [found]}
    assert call("--data.root", own_tree, "--check", "true")[:2] == (
        0,
        "imagefolder train: whole (3 classes, 99 images)\nimagefolder val: whole (3 classes, 30 images)\n",
    )
    damaged = own_tree / "val/class1/001.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    code, _, error = call("--data.root", own_tree, "--check", "true")
    assert code == 2
    assert f"cannot decode {damaged} (" in error
    assert call("--data.root", own_tree, "--check", "true", "--split", "train")[0] == 0


def test_looks_at_tinyimagenet_and_says_what_is_missing(call, own_tree):
    code, out, error = call("--data.name", "tinyimagenet", "--data.root", own_tree, "--check", "true")
    assert code == 2
    assert out.splitlines() == [
        "tinyimagenet train: different (3 classes, 99 images; 200 classes are published; 100,000 images are "
        "published; a class has 500 images, but class0 33, class1 33, class2 33)",
        "tinyimagenet val: different (3 classes, 30 images; 200 classes are published; 10,000 images are "
        "published; a class has 50 images, but class0 10, class1 10, class2 10)",
    ]
    assert error.startswith(
        "dalikd prepare: error: tinyimagenet is not as published (tinyimagenet train is different, and 1 more): fetch "
    )
    assert error.count("\n") == 1


def test_a_part_is_not_counted(call, own_tree):
    limits = ["--data.limit", 9, "--data.val_limit", 9]
    code, out, _ = call("--data.name", "tinyimagenet", "--data.root", own_tree, "--check", "true", *limits)
    assert (code, out) == (0, "")


def test_another_data_set_is_not_written(call, own_tree, tmp_path):
    arguments = ["--data.name", "tinyimagenet", "--data.root", own_tree, "--check", "true"]
    code, _, error = call(*arguments, "--output", tmp_path / "out")
    assert code == 2
    assert "not as published" in error
    assert not (tmp_path / "out").exists()
    assert call(*arguments[:4], "--output", tmp_path / "out")[0] == 0  # without --check


@pytest.fixture
def small_stl10(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """STL-10 with ten images a split, whose checksums are known; torchvision's download writes them."""
    labels, images = bytes(range(1, 11)), bytes(10 * 27648)
    content = {"train_X.bin": images, "train_y.bin": labels, "test_X.bin": images, "test_y.bin": labels}
    sums = {name: hashlib.md5(data).hexdigest() for name, data in content.items()}

    def download(reader: datasets.STL10) -> None:
        for name, data in content.items():
            (Path(reader.root) / "stl10_binary" / name).write_bytes(data)

    for split in ("train", "test"):
        listed = [[name, md5] for name, md5 in sums.items() if name.startswith(split)]
        monkeypatch.setattr(datasets.STL10, f"{split}_list", listed)
    monkeypatch.setattr(datasets.STL10, "download", download)
    facts = {"stl10": replace(DATASET_INFO["stl10"], images={"train": 10, "test": 10})}
    monkeypatch.setattr(sources, "DATASET_INFO", facts)
    return list(content)


def test_downloads_and_verifies(call, small_stl10, tmp_path):
    arguments = ["--data.name", "stl10", "--data.root", tmp_path / "data"]
    code, out, error = call(*arguments, "--check", "true")
    assert code == 2
    assert out.splitlines() == [f"{tmp_path}/data/stl10_binary/{name}: missing" for name in small_stl10]
    assert "train_X.bin is missing, and 3 more): remove the folder stl10_binary if it is there, and give" in error
    assert not (tmp_path / "data").exists()
    code, out, _ = call(*arguments, "--data.download", "true")
    expected = [f"{tmp_path}/data/stl10_binary/{name}: whole" for name in small_stl10]
    expected += [f"stl10 {split}: whole (10 classes, 10 images)" for split in ("train", "test")]
    assert (code, out.splitlines()) == (0, expected)
    assert call(*arguments, "--check", "true")[:2] == (code, out)


def test_a_damaged_file_is_named(call, small_stl10, tmp_path):
    arguments = ["--data.name", "stl10", "--data.root", tmp_path]
    assert call(*arguments, "--data.download", "true")[0] == 0
    path = tmp_path / "stl10_binary/test_X.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    for output in ([], ["--output", tmp_path / "out"]):
        code, out, error = call(*arguments, "--check", "true", *output)
        assert code == 2
        assert out.splitlines()[2].startswith(f"{path}: damaged (its MD5 is ")
        assert out.count(": whole\n") == 3
        assert f"({path} is damaged): remove" in error
    assert not (tmp_path / "out").exists()
    assert small_stl10[2] == "test_X.bin"


def test_writes_images_in_memory_after_the_check(call, small_stl10, tmp_path):  # noqa: ARG001
    arguments = ["--data.name", "stl10", "--data.root", tmp_path / "data", "--data.download", "true", "--check", "true"]
    code, out, _ = call(*arguments, "--output", tmp_path / "out")
    assert code == 0
    assert "out/val: 10 images of 10 classes in 1 files" in out
    train, val = open_sources(DataConfig(name="webdataset", root=str(tmp_path / "out")), 0)
    assert (train.name, train.split, val.name, val.split) == ("stl10", "train", "stl10", "test")


def test_some_classes_go_into_containers(call, tree, tmp_path):
    (tmp_path / "two.txt").write_text("class2\nclass0\n")
    arguments = ["--data.root", tree, "--data.classes", tmp_path / "two.txt"]
    assert call(*arguments, "--output", tmp_path / "out")[0] == 0
    train, val = open_sources(DataConfig(name="webdataset", root=str(tmp_path / "out")), 0)
    assert train.classes == val.classes == ("class0", "class2")
    assert (len(train), len(val)) == (66, 20)
    code, out, _ = call(*arguments, "--check", "true")
    assert (code, out.count("whole (2 classes, ")) == (0, 2)
    config = DataConfig(name="webdataset", root=str(tmp_path / "out"), classes=str(tmp_path / "two.txt"))
    with pytest.raises(ValueError, match="shards are read whole; choose classes when they are written"):
        open_sources(config, 0)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for option in ("--data.root", "--output", "--format", "--resize", "--check", "--verify", "--shard_images"):
        assert option in words
    for text in ("of the storage order", "images a shard, at most", "nothing is written", "each split gets a folder"):
        assert text in words
