import json
from collections.abc import Callable

import numpy as np
import pytest

from dalikd.pipelines.data import DataConfig, open_sources
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
    assert call(*arguments)[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    content = json.loads((tmp_path / "out/train/dataset.json").read_text())
    assert sum(shard["images"] for shard in content["shards"]) == 12


def test_trains_from_what_it_wrote(call, command, options, tree, tmp_path):
    assert call("--data.root", tree, "--output", tmp_path / "out")[0] == 0
    data = ["--data.name", "webdataset", "--data.root", tmp_path / "out"]
    training = ["--batch_size", 16, "--mix_group", 8, "--epochs", 1, "--augmentation", "cutmix"]
    ended = command("train", *options, *data, *training, "--output", tmp_path / "run")
    assert (ended.code, ended.err.count("error")) == (0, 0)
    assert "on 30 images" in ended.out
    assert (tmp_path / "run/results.json").exists()


def test_verifies_a_folder_of_splits_or_one_split(call, tree, tmp_path):
    call("--data.root", tree, "--output", tmp_path / "out")
    code, out, _ = call("--verify", tmp_path / "out")
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path}/out/train: 99 images in 1 files, all checksums fit",
        f"{tmp_path}/out/val: 30 images in 1 files, all checksums fit",
    ]
    assert call("--verify", tmp_path / "out/val")[1].splitlines() == out.splitlines()[1:]


def test_damage_is_one_line(call, tree, tmp_path):
    call("--data.root", tree, "--output", tmp_path / "out")
    path = tmp_path / "out/train/train-00000.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    code, _, error = call("--verify", tmp_path / "out")
    assert code == 2
    assert error.splitlines()[-1] == (
        f"dalikd prepare: error: checksum differs: {path}; write the folder again with `dalikd prepare`"
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
        ([], "--output FOLDER says where to write; or verify"),
        (["--output", "out"], "imagefolder needs a folder: say --data.root FOLDER"),
        (["--verify", "."], r"--verify .: there is no dataset.json in it"),
        (["--output", "out", "--format", "zip"], "zip"),
        (["--output", "out", "--data.name", "webdataset"], "webdataset"),
        (["--output", "out", "--threads", "0"], "--threads 0: say 1 or more"),
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


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for option in ("--data.root", "--output", "--format", "--resize", "--check", "--verify", "--shard_images"):
        assert option in words
    for text in ("of the storage order", "images a shard, at most", "nothing is written", "each split gets a folder"):
        assert text in words
