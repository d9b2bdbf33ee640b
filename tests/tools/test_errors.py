"""Every mistake of a user is one line on stderr, exit code 2, and no run folder."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dalikd.kd.backbones import create_model
from dalikd.pipelines.data import open_source
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.cli import guarded
from dalikd.trainers.checkpoint import save_weights


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def refused(command: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail, and returns its one line."""

    def call(name: str, *arguments: object, output: object = "run") -> str:
        there = [] if name in ("measure", "evaluate") else ["--output", output]
        ended = command(name, *arguments, *there)
        assert ended.code == 2, ended
        assert ended.out == ""
        assert ended.err.startswith(f"dalikd {name}: error: ")
        assert ended.err.count("\n") == 1
        assert ended.err.endswith("\n")
        assert list((tmp_path / "here").iterdir()) == []
        return ended.err

    return call


def _spoil(root: Path, kind: str) -> Path:
    if kind == "empty class":
        (root / "train" / "aaa").mkdir()
    elif kind == "other classes":
        (root / "val" / "class1").rename(root / "val" / "dog")
    elif kind == "no validation":
        shutil.rmtree(root / "val")
    elif kind == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
        Image.new("RGB", (32, 32)).save(root / "train" / "loose.jpg")
    return root


# ------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty class", ["aaa"]),
        ("other classes", ["class1", "dog"]),
        ("no validation", ["val", "--data.val_split"]),
        ("no classes", ["train"]),
    ],
)
def test_data_that_are_not_as_they_should_be(refused, own_tree, data_options, kind, words):
    error = refused("train", *data_options(_spoil(own_tree, kind)), "--model", "small", "--batch_size", 16)
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("name", ["train", "distill", "measure", "evaluate"])
def test_a_missing_folder(refused, data_options, teacher, weights, name):
    more = {"measure": teacher, "distill": teacher, "evaluate": ["--weights", weights]}.get(name, [])
    error = refused(name, *data_options(Path("/nowhere/at/all")), "--model", "small", *more)
    assert "/nowhere/at/all" in error
    assert "--data.root" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch_size", 128], ["--batch_size 128 is larger than the data set (99 images)"]),
        (["--batch_size", 64, "--mix.group", 24], ["--batch_size 64", "not a multiple of --mix.group 24", "use"]),
        (["--batch_size", 64, "--accumulation", 3], ["--batch_size 64", "--accumulation 3", "multiple of 3"]),
        (["--data.limit", 2], ["--data.limit 2", "from 3 to 99"]),
        (["--data.limit", 1000], ["--data.limit 1000", "from 3 to 99"]),
        (["--data.share", 0], ["--data.share 0", "above 0, up to 1"]),
        (["--data.share", 0.01], ["--data.share 0.01", "no image of the class", "give at least 0.015152"]),
        (["--data.val_resize", 16], ["--data.val_resize 16 is smaller than the image size 32"]),
        (["--data.padding", 32], ["--data.padding 32 must lie between 1 and 31"]),
        (["--data.name", "imagefoldr"], ["data.name", "imagefoldr", "'imagefolder'"]),
        (["--seed", -1], ["--seed -1"]),
    ],
)
def test_sizes_that_do_not_fit(refused, options, arguments, words):
    error = refused("train", *options, *arguments)
    assert [word for word in words if word not in error] == []


# ----------------------------------------------------------------------------------------------- nets, options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnte20"], ['unknown model "resnte20"', "resnet20", "timm:"]),
        (["--model", "timm:resnte18"], ["resnte18", "resnet18"]),
        (["--model_args.depth", 3], ["small has no option depth"]),
        (["--augmentation", "mixpu"], ['--augmentation "mixpu"', "mixup"]),
        (["--augmentation", "cutmixpick_teacher"], ["cutmixpick_teacher picks images for distillation", "cutmix"]),
        (["--weights", "nowhere.pt"], ["nowhere.pt"]),
        (["--weights", "pretrained"], ["small has no pretrained weights"]),
        (["--epoch", 3], ["--epoch"]),
        (["--epochs", "three"], ["epochs", "three"]),
        (["--optimizer", "torch.optim.Nope"], ["Nope"]),
        (["--optimizer.lr", -1], ["--optimizer.lr -1.0: give a number above 0"]),
        (["--optimizer.momentum", -1], ["--optimizer: Invalid momentum value: -1.0"]),
        (["--schedule.name", "step"], ["schedule.name", "step", "multistep"]),
        (["--precision", "fp16"], ["--precision fp16 needs a GPU"]),
        (["--resume", "nowhere"], ["--resume nowhere", "config.yaml"]),
    ],
)
def test_options_that_mean_nothing(refused, options, arguments, words):
    error = refused("train", *options, "--batch_size", 16, "--mix.group", 8, *arguments)
    assert [word for word in words if word not in error] == []


def test_no_model(refused, tree, data_options):
    assert "--model resnet20" in refused("train", *data_options(tree), "--batch_size", 16, "--mix.group", 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loss", "dalikd.kd.losses.Nope"], ["Nope"]),
        (["--loss.temperature", 0], ["--loss: temperature is 0", "above 0"]),
        (["--loss.ce_weight", ".nan"], ["--loss: ce_weight is nan: give 0 or more"]),
        (["--loss.temprature", 1], ["temprature"]),
        (["--loss.kd_share", "-1"], ["kd_share is -1.0: give 0 or more"]),
        (["--teacher.name", "resnte8"], ["teacher resnte8", "did you mean resnet8"]),
        (["--teacher.weights", "nowhere.pt"], ["nowhere.pt"]),
    ],
)
def test_what_distilling_needs(refused, training, teacher, arguments, words):
    error = refused("distill", *training, *teacher, *arguments)
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("name", ["distill", "measure"])
def test_a_teacher_must_have_a_name_and_weights(refused, training, tmp_path, name):
    assert "--teacher.name" in refused(name, *training)
    assert "--teacher.weights" in refused(name, *training, "--teacher.name", "small")
    torch.save(create_model("small", 10).state_dict(), tmp_path / "ten.pt")
    error = refused(name, *training, "--teacher.name", "small", "--teacher.weights", tmp_path / "ten.pt")
    assert "teacher small" in error
    assert "the weights have 10 classes, the model 3" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no net given", "--run", "--model", "--weights"]),
        (["--run", "/nowhere"], ["--run /nowhere is no run folder"]),
        (["--model", "small", "--weights", "WEIGHTS"], ["--model small", "SmallNet names no classifier"]),
        (["--model", "resnet8", "--weights", "WEIGHTS"], ["--model resnet8", "small.pt is not of this model"]),
        (["--model", "resnet8", "--weights", "nowhere.pt"], ["there is no weights file nowhere.pt"]),
        (["--model", "small", "--weights", "WEIGHTS", "--knn", 100], ["--knn 100", "training images, 99"]),
    ],
)
def test_what_a_probe_needs(refused, tree, data_options, weights, arguments, words):
    given = [weights if word == "WEIGHTS" else word for word in arguments]
    error = refused("probe", *data_options(tree), "--batch_size", 16, "--mix.group", 8, *given)
    assert [word for word in words if word not in error] == []


def test_evaluate_needs_weights(refused, options, tree, data_options, weights):
    assert "--weights" in refused("evaluate", *options)
    assert "--model" in refused("evaluate", *data_options(tree), "--weights", weights)


def test_weights_of_another_net(refused, training, options, weights, tmp_path):
    error = refused("train", *training, "--model", "resnet8", "--weights", weights)
    assert str(weights) in error
    assert "missing keys" in error
    (tmp_path / "note.pt").write_text("no weights at all")
    assert "note.pt is damaged or not a checkpoint" in refused("evaluate", *options, "--weights", tmp_path / "note.pt")


def test_what_measuring_needs(refused, training, teacher, tree, data_options):
    assert "--window 63" in refused("measure", *training, *teacher, "--augmentation", "flip", "--window", 63)
    assert 'unknown --augmentation "flop"' in refused("measure", *training, *teacher, "--augmentation", "flop", "mixup")
    bare = [*data_options(tree), "--batch_size", 16, "--mix.group", 8, *teacher]
    assert "cutmixpick_student is scored by a student: name its architecture with --model" in refused("measure", *bare)


# ------------------------------------------------------------------------------------------------ the machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(refused, training, monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/dev/nvidia0" and exists(path))
    assert "--device cuda: this machine has no CUDA device; use --device cpu" in refused(
        "train", *training, "--device", "cuda"
    )


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_see(refused, training, monkeypatch, device):
    exists = Path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    error = refused("train", *training, "--device", device)
    assert "cannot see" in error
    assert "--device cpu" in error


def test_places_that_cannot_be_written(refused, training, options, teacher, weights, tmp_path):
    """SplitIndex before the work, not after it."""
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below"
    assert f"--output: {place}" in refused("train", *training, output=place)
    assert f"--json: {place}" in refused("measure", *training, *teacher, "--augmentation", "flip", "--json", place)
    assert f"--json: {place}" in refused("evaluate", *options, "--weights", weights, "--json", place)


def test_a_folder_that_is_taken(command, training, tmp_path):
    run = tmp_path / "run"
    assert command("train", *training, "--output", run).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = command("train", *training, "--output", run)
    assert ended.code == 2
    assert f"--resume {run}" in ended.err
    assert "--overwrite true" in ended.err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command("train", *training, "--output", run, "--overwrite", "true").code == 0


# ---------------------------------------------------------------------------------- a image that is broken


def _results(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    del results["versions"]
    return results


def _same_end(folder: Path, other: Path) -> None:
    assert _results(folder) == _results(other)
    ours, theirs = (load_file(path / "last" / "student.safetensors") for path in (folder, other))
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_image_stops_the_run_which_goes_on_once_it_is_mended(command, own_tree, data_options, tmp_path, split):
    """A truncated file: of the training split in the middle of the first epoch, or the last one to be validated."""
    training = [*data_options(own_tree), "--model", "small", "--batch_size", 16, "--mix.group", 8, "--epochs", 2]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command("train", *training, "--output", whole).code == 0

    source = open_source("imagefolder", own_tree, split)
    row = int(Sampler(99, 16).order(0)[16 * 3 + 5]) if split == "train" else 29
    image = Path(source.path(row))
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    ended = command("train", *training, "--output", broken)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert ended.err.startswith(f"dalikd train: error: cannot decode {image} (")
    assert "--data.bad_files replace" in ended.err
    saved = torch.load(broken / "last" / "trainer.pt", weights_only=True)
    assert saved["step"] == (3 if split == "train" else 6)

    again = command("train", "--resume", broken)
    assert (again.code, again.err) == (2, ended.err)
    image.write_bytes(content)
    assert command("train", "--resume", broken).code == 0
    _same_end(broken, whole)


def test_a_measurement_goes_on_once_a_broken_image_is_mended(command, own_tree, data_options, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    save_weights(weights, create_model("small", 3), None, ["class0", "class1", "class2"])
    bare = [*data_options(own_tree), "--batch_size", 16, "--mix.group", 8, "--window", 16, "--epochs", 1]
    asked = ["--teacher.name", "small", "--teacher.weights", weights, "--augmentation", "flip"]
    reports = [tmp_path / "whole.json", tmp_path / "mended.json"]
    assert command("measure", *bare, *asked, "--json", reports[0]).code == 0
    image = Path(open_source("imagefolder", own_tree, "train").path(int(Sampler(99, 16).order(0)[16 * 3 + 5])))
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    kept = ["--checkpoint", tmp_path / "state.pt", "--json", reports[1]]
    assert command("measure", *bare, *asked, *kept).code == 2
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    image.write_bytes(content)
    assert command("measure", *bare, *asked, *kept).code == 0
    whole, mended = (json.loads(path.read_text())["results"] for path in reports)
    assert mended == whole
    other = next(path for path in image.parent.glob("*.jpg") if path != image)
    other.write_bytes(other.read_bytes() + bytes(1))
    ended = command("measure", *bare, *asked, *kept)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "cannot resume with other images (imagefolder, train): their fingerprint was" in ended.err


def test_broken_images_can_be_replaced_and_are_recorded(command, own_tree, data_options, tmp_path):
    """Those of both splits, also after the run was resumed and where a name is no UTF-8."""
    bare = [*data_options(own_tree), "--model", "small", "--data.bad_files", "replace"]
    broken = own_tree / "train" / "class1" / "004.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    unnamed = own_tree / "val" / "class2" / os.fsdecode(b"02\xe9.jpg")  # the last but one: 023, 026, 029, 02é
    unnamed.write_bytes(b"")
    run, report = tmp_path / "run", tmp_path / "report.json"
    arguments = ("--batch_size", 16, "--mix.group", 8, "--epochs", 2, "--output", run)
    ended = command("train", *bare, *arguments)
    assert ended.code == 0
    assert ended.out.count("cannot decode") == 2
    replaced = {
        str(broken): str(broken.with_name("007.jpg")),
        str(unnamed.with_name(r"02\xe9.jpg")): str(own_tree / "val" / "class0" / "000.jpg"),
    }
    assert _results(run)["replaced_files"] == replaced
    assert _results(run)["last"]["val"]["replaced"] == 1
    assert ended.out.count("on 31 images; 1 of them stand in for others that cannot be decoded") == 2

    (run / "results.json").unlink()
    assert command("train", "--resume", run).code == 0  # nothing is left to do, and nothing is looked at again
    assert _results(run)["replaced_files"] == replaced

    student = run / "last" / "student.safetensors"
    ended = command("evaluate", *bare, "--weights", student, "--json", report)
    assert "on 31 images; 1 of them" in ended.out
    assert list(json.loads(report.read_text())["replaced_files"]) == list(replaced)[1:]
    teacher = ("--teacher.name", "small", "--teacher.weights", student, "--augmentation", "flip", "--window", 16)
    assert command("measure", *bare, *teacher, "--batch_size", 16, "--mix.group", 8, "--json", report).code == 0
    assert list(json.loads(report.read_text())["replaced_files"]) == list(replaced)[:1]


def test_no_name_ends_a_command_by_being_printed(monkeypatch, capsys):
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", strict)
    with guarded("train"):
        print("caf\udce9", flush=True)
    with pytest.raises(SystemExit), guarded("train"):
        raise ValueError("no caf\udce9")
    assert strict.buffer.getvalue() == b"caf\\udce9\n"  # type: ignore[attr-defined]
    assert capsys.readouterr().err == "dalikd train: error: no caf\\xe9\n"


def test_a_diverged_run_says_so(command, training, tmp_path):
    ended = command("train", *training, "--optimizer.lr", "1e12", "--output", tmp_path / "run")
    assert ended.code == 2
    assert "training has diverged; lower --optimizer.lr" in ended.err
    assert ended.err.count("\n") == 1


# -------------------------------------------------------------------------------------- in a process of its own


def test_nothing_else_is_printed(tmp_path):
    """What a terminal shows: no traceback, no warning of a library."""
    command = [sys.executable, "-m", "dalikd.tools.train", "--data.root", "nowhere", "--device", "cpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("dalikd train: error: ")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
