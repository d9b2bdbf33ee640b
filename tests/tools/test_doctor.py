import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalikd.tools import doctor, prepare


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str, dict]]:
    """Calls the command; exit code, output, errors, and what its JSON file holds."""

    def call(*arguments: object) -> tuple[int, str, str, dict]:
        capsys.readouterr()
        code, report = 0, tmp_path / "report.json"
        report.unlink(missing_ok=True)
        try:
            doctor.main([*map(str, arguments), "--json", str(report)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err, json.loads(report.read_text()) if report.exists() else {}

    return call


def _noise(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_data_set_that_is_fine(call, tree):
    code, out, _, report = call(tree, "--data.image_size", 48)
    assert (code, report["fine"], report["faults"]) == (0, True, [])
    assert out.splitlines()[-1] == "fine"
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert (train["images"], val["images"]) == (99, 30)
    assert train["classes"] == {"class0": 33, "class1": 33, "class2": 33}
    assert train["sizes"]["smallest"] == train["sizes"]["largest"] == train["sizes"]["median"] == [32, 32]
    assert train["sizes"]["below"] == 99
    assert (train["formats"], train["modes"]) == ({"JPEG": 99}, {"RGB": 99})
    assert train["bytes"] == sum(path.stat().st_size for path in (tree / "train").rglob("*.jpg"))


def test_only_what_has_changed_is_looked_at_again(call, own_tree):
    changed = own_tree / "train/class0/000.jpg"
    call(own_tree)
    assert call(own_tree)[3]["splits"]["train"]["known"] == 99
    os.utime(changed, ns=(1, 1))
    assert call(own_tree)[3]["splits"]["train"]["known"] == 98
    content = changed.read_bytes()
    changed.write_bytes(content[:300])
    code, _, _, report = call(own_tree)
    assert (code, report["splits"]["train"]["known"]) == (1, 98)
    again = call(own_tree)[3]["splits"]["train"]
    assert again["known"] == 99
    assert [item["reason"] for item in again["cannot_decode"]] == ["the JPEG is truncated"]
    changed.write_bytes(content)
    (own_tree / "train/class1/new.jpg").write_bytes(content)
    code, _, _, report = call(own_tree)
    assert (code, report["splits"]["train"]["known"], report["splits"]["train"]["images"]) == (0, 98, 100)


def test_what_images_are_made_of(call, tmp_path):
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        _noise(1).save(tmp_path / "data" / name / "a.jpg")
    folder, exif = tmp_path / "data/a", Image.Exif()
    exif[274] = 6
    _noise(2, 8, 300).save(folder / "turned.jpg", exif=exif)
    _noise(3).convert("CMYK").save(folder / "cmyk.jpg")
    _noise(4).convert("L").save(folder / "grey.jpg")
    _noise(5).convert("RGBA").save(folder / "alpha.png")
    _noise(6).convert("P").save(folder / "palette.png")
    _noise(7).save(folder / "lies.jpg", format="PNG")
    Image.fromarray(np.full((40, 48), 40000, np.uint16)).save(folder / "deep.png")
    code, out, _, report = call(tmp_path / "data", "--data.image_size", 40)
    assert code == 0
    assert list(report["splits"]) == ["train"]
    found = report["splits"]["train"]
    assert found["modes"] == {
        **{"RGB": 4, "CMYK": 1, "grey": 1, "RGB with alpha": 1, "palette": 1},
        "grey, 16 bit": 1,
    }
    assert found["formats"] == {"JPEG": 5, "PNG": 4}
    assert found["orientations"] == {"1": 8, "6": 1}
    assert found["wrong_endings"] == [{"path": f"{folder}/lies.jpg", "format": "PNG"}]
    assert (found["sizes"]["smallest"], found["sizes"]["below"]) == ([40, 48], 1)
    assert found["sizes"]["largest"] == [8, 300]
    assert "1 image with an EXIF orientation, which training leaves alone: 6 1" in out


def test_what_lies_beside_the_images_is_counted_and_is_no_class(call, own_tree):
    train = own_tree / "train"
    for name in ("@eaDir", "class0/@eaDir", "__MACOSX", "lost+found", "#recycle", ".AppleDouble"):
        (train / name).mkdir()
        (train / name / "x.jpg").write_bytes(b"no image")
    for name in ("._000.jpg", ".DS_Store", "Thumbs.db", "a.gif", "b.gif", "readme"):
        (train / "class0" / name).write_bytes(b"no image")
    code, out, _, report = call(own_tree)
    found = report["splits"]["train"]
    assert (code, found["images"], list(found["classes"])) == (0, 99, ["class0", "class1", "class2"])
    assert {kind: len(paths) for kind, paths in found["no_data"].items()} == {
        **{"@eaDir": 2, "__MACOSX": 1, "lost+found": 1, "#recycle": 1, ".AppleDouble": 1},
        **{"._*": 1, ".DS_Store": 1, "Thumbs.db": 1},
    }
    assert found["no_data"]["._*"] == [f"{train}/class0/._000.jpg"]
    assert {kind: len(paths) for kind, paths in found["left_out"].items()} == {".gif": 2, "without an ending": 1}
    assert f"left out for their ending: .gif 2, without an ending 1, such as {train}/class0/a.gif" in out
    shutil.copytree(train / "class0", train / "@Sharebin")
    code, _, _, report = call(own_tree, "--data.val_split", "train")
    assert code == 1
    assert report["faults"][0]["examples"] == ["@Sharebin"]


def test_faults_are_named_and_the_first_to_mend_comes_last(call, own_tree):
    (own_tree / "train/class0/000.jpg").write_bytes(b"")
    (own_tree / "train/hollow").mkdir()
    (own_tree / "val/class1").rename(own_tree / "val/Class1")
    code, out, _, report = call(own_tree)
    assert code == 1
    assert [fault["count"] for fault in report["faults"]] == [1, 1, 1]
    classes, empty, bad = (fault["what"] for fault in report["faults"])
    assert "'class1' and 'Class1' differ only in upper and lower case" in classes
    assert empty == "train: 1 of 4 classes without images"
    assert bad == "train: 1 image that cannot be decoded"
    assert f"  {own_tree}/train/class0/000.jpg (the file is empty)\n" in out
    assert out.splitlines()[-1].startswith("mend first: the classes differ: imagefolder: train has 3 classes, val 3")
    assert report["splits"]["train"]["images"] == 99


def test_only_ten_examples_are_printed_and_all_written(call, own_tree):
    for number in range(0, 60, 3):
        (own_tree / f"train/class0/{number:03d}.jpg").write_bytes(b"")
    _, out, _, report = call(own_tree)
    assert out.count("(the file is empty)") == 10
    assert "  and 10 more\n" in out
    assert len(report["splits"]["train"]["cannot_decode"]) == 20


def test_a_split_that_cannot_be_opened_keeps_no_other_from_being_looked_at(call, own_tree):
    (own_tree / "train/class0/gone.jpg").symlink_to("nowhere")
    os.mkfifo(own_tree / "train/class1/pipe.jpg")
    code, _, _, report = call(own_tree)
    assert code == 1
    assert list(report["splits"]) == ["val"]
    gone, pipe = report["faults"][0]["examples"]
    assert gone == f"{own_tree}/train/class0/gone.jpg is a link to nothing: restore its target or remove it"
    assert pipe.startswith(f"{own_tree}/train/class1/pipe.jpg is no file, but its name ends as an image's")


def test_duplicates(call, own_tree):
    train, val = own_tree / "train", own_tree / "val"
    shutil.copy(train / "class0/000.jpg", train / "class0/twin.jpg")
    shutil.copy(train / "class0/003.jpg", val / "class0/leak.jpg")
    shutil.copy(train / "class0/006.jpg", train / "class1/other.jpg")
    assert call(own_tree)[0] == 0  # not asked for
    code, out, _, report = call(own_tree, "--hash", "true")
    assert (code, report["splits"]["train"]["known"]) == (1, 0)
    other, leak, twin = report["duplicates"]
    assert [(group["labels_differ"], group["in_both_splits"]) for group in (other, leak, twin)] == [
        *((True, False), (False, True), (False, False)),
    ]
    assert [file["path"] for file in other["files"]] == [f"{train}/class0/006.jpg", f"{train}/class1/other.jpg"]
    assert [fault["what"] for fault in report["faults"]] == ["1 image in several classes", "1 image in both splits"]
    assert "1 image several times in one class of one split, such as" in out
    code, _, _, report = call(own_tree, "--hash", "true")
    assert (code, report["splits"]["train"]["known"], len(report["duplicates"])) == (1, 101, 3)


def test_the_manifest_has_a_line_for_each_image(call, own_tree, tmp_path):
    (own_tree / "val/class2/002.jpg").write_bytes(b"")
    call(own_tree, "--manifest", tmp_path / "lines", "--hash", "true")
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(lines) == 129
    path = own_tree / "train/class1/001.jpg"
    (line,) = (line for line in lines if line["path"] == str(path))
    expected = {"split": "train", "class": "class1", "label": 1, "height": 32, "width": 32, "fault": None}
    assert {key: line[key] for key in expected} == expected
    assert (line["bytes"], len(line["sha256"])) == (path.stat().st_size, 64)
    assert [line["path"] for line in lines if line["fault"]] == [f"{own_tree}/val/class2/002.jpg"]


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_shards_are_looked_at_too(call, own_tree, tmp_path, kind):
    prepare.main(["--data.root", str(own_tree), "--output", str(tmp_path / "out"), "--format", kind])
    code, _, _, report = call(tmp_path / "out", "--hash", "true")
    assert (code, report["data"], report["splits"]["train"]["images"]) == (0, kind, 99)
    assert report["splits"]["train"]["formats"] == {"JPEG": 99}
    assert call(tmp_path / "out", "--hash", "true")[3]["splits"]["train"]["known"] == 99
    code, _, _, report = call(tmp_path / "out/val")
    assert (code, report["splits"]["train"]["images"]) == (0, 30)
    (shard,) = (tmp_path / "out/train").glob("*.t*r*")
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, _, report = call(tmp_path / "out")
    assert (code, list(report["splits"])) == (1, ["val"])
    assert f"{shard} has" in report["faults"][0]["what"]


def test_images_in_memory_are_counted_and_compared(call, tmp_path, monkeypatch):
    from dalikd.pipelines import data
    from dalikd.pipelines.datasets.spec import SplitIndex

    arrays = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    arrays[3] = arrays[0]
    found = SplitIndex(("a", "b"), np.array([0, 0, 1, 1]), arrays=arrays)
    monkeypatch.setitem(data._FINDERS, "cifar10", lambda _: found)
    code, out, _, report = call(tmp_path, "--data.name", "cifar10", "--hash", "true")
    assert (code, report["splits"]["val"]["images"]) == (1, 4)
    assert [file["path"] for file in report["duplicates"][0]["files"]] == [
        *("cifar10/train[0]", "cifar10/train[3]", "cifar10/test[0]", "cifar10/test[3]"),
    ]
    assert "images/s" not in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--hash", "true"), "doctor needs DATA: give the folder of a data set"),
        (("nowhere",), "nowhere is no folder: give the folder of a data set"),
        ((".", "--processes", "0"), "--processes 0: give 1 or more"),
        ((".", "--data.val_split", "absent"), "'absent'"),
        ((".", "."), "--data.root takes one value"),
    ],
)
def test_mistakes_on_the_command_line(call, tree, monkeypatch, arguments, error):
    monkeypatch.chdir(tree)
    code, _, err, _ = call(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert error in err


def test_a_run_refuses_or_replaces_what_the_doctor_has_found(call, command, own_tree, data_options, tmp_path):
    bad = own_tree / "train/class0/000.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    assert call(own_tree)[0] == 1
    training = [*data_options(own_tree), "--model", "small", "--batch_size", 16, "--mix.group", 8, "--epochs", 1]
    ended = command("train", *training, "--output", tmp_path / "stopped")
    assert ended.code == 2
    assert f"dalikd doctor could not decode {bad} (the JPEG is truncated)" in ended.err
    assert "--data.bad_files replace" in ended.err
    ended = command("train", *training, "--output", tmp_path / "run", "--data.bad_files", "replace")
    assert ended.code == 0
    assert ended.out.count("could not decode") == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert str(bad) in json.dumps(results["replaced_files"])
