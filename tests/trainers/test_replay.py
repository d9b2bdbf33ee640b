"""The step at which a run diverged, out of its file."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml

from dalikd.kd.backbones import create_model
from dalikd.tools import cache, distill, mutual, probe, replay, train

TEACHER = ["--teacher.name", "small", "--teacher.weights", "0.pt"]
TEACHERS = ["--teachers", "[{name: small, weights: 0.pt}, {name: small, weights: 1.pt}]"]
RUNS = {
    "train": (train, ["--augmentation", "cutmix", "--accumulation", "2", "--ema", "0.5"]),
    "picks": (distill, [*TEACHER, "--augmentation", "cutmixpick_teacher", "--clip_grad_norm", "1e30"]),
    "views": (distill, [*TEACHER, "--augmentation", "randaugment", "--joint_forward", "true"]),
    "students": (distill, [*TEACHER, "--augmentation", "cutmixpick_student"]),
    "teachers": (distill, [*TEACHERS, "--augmentation", "mixup"]),
    "cache": (distill, ["--teacher.cache", "cache", "--augmentation", "cutmix"]),
    "memory": (distill, ["--teacher.name", "resnet8", "--teacher.weights", "2.pt", "--loss", "CRD"]),
    "mutual": (mutual, []),
    "probe": (probe, ["--weights", "2.pt"]),
}


@pytest.fixture
def words(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of every command, in a folder with three teachers."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("small", "small", "resnet8")):
        torch.manual_seed(seed)
        torch.save(create_model(name, 3).state_dict(), f"{seed}.pt")
    data = ["--data.root", str(tree), "--data.image_size", "32", "--data.threads", "1", "--device", "cpu"]
    return [*data, "--batch_size", "32", "--mix.group", "8", "--epochs", "3"]


def _ended(command, *words: str) -> object:
    with pytest.raises(SystemExit) as stop:
        command.main(list(words))
    return stop.value.code


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.full] * (kind in ("views", "memory", "mutual"))) for kind in RUNS]
)
def test_a_step_that_was_not_finite_is_not_when_it_is_run_again(kind, words, capsys):
    """Of every way to train; the images, the teacher and the run may be gone, but for a teacher cache."""
    command, own = RUNS[kind]
    if kind == "cache":
        cache.main([*words, *TEACHER, "--augmentation", "cutmix", "--output", "cache"])
    model = ["--model", {"mutual": "resnet8_aux", "memory": "resnet8", "probe": "resnet8"}.get(kind, "small")]
    rate = ["--schedule.name", "constant", "--optimizer.lr", "1e38" if kind == "probe" else "1e30"]
    assert _ended(command, *words, *model, *own, *rate, "--output", "run") == 2
    told = capsys.readouterr().err
    assert "training has diverged" in told
    (file,) = Path("run").glob("nan-step*.pt")
    for path in Path().glob("*.pt"):
        path.unlink()
    file.replace("step.pt")
    assert _ended(replay, "step.pt", "--device", "cpu") == 1
    out = capsys.readouterr().out
    step = re.search(r" at step (\d+): training has diverged", told)[1]
    assert out.startswith(f"step {step} of dalikd {command.__name__.rpartition('.')[2]}, where ")
    assert f"on cpu, fp32, from the weights of step {int(step) - 1}\nimages      " in out
    assert out.endswith("\nit is not finite again\n")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[2:-1])
    assert {"loss", "forward", "gradients", "the"} <= lines.keys()


def test_a_step_that_is_finite_elsewhere_says_so(words, capsys):
    """In float64 the numbers that were too large for float32 are not."""
    own = ["--model", "small", "--schedule.name", "constant", "--optimizer.lr", "1e30", "--output", "run"]
    assert _ended(train, *words, *own) == 2
    (file,) = Path("run").glob("nan-step*.pt")
    capsys.readouterr()
    replay.main([str(file), "--precision", "fp64", "--json", "-"])
    text, out = capsys.readouterr()
    found = json.loads(text)
    assert (found["finite"], found["forward"], found["command"], found["precision"]) == (True, None, "train", "fp64")
    assert found["terms"]["loss"] > 0
    assert "forward     first not finite: nothing\ngradients   first not finite: nothing\n" in out
    assert out.splitlines()[-1] == "it is finite"


def test_the_first_module_and_gradient_that_are_not_finite_are_named(words, capsys):
    own = ["--model", "small", "--schedule.name", "constant", "--optimizer.lr", "1e30", "--output", "run"]
    assert _ended(train, *words, *own) == 2
    (file,) = Path("run").glob("nan-step*.pt")
    content = torch.load(file, weights_only=True)
    fresh = create_model("small", 3).state_dict()
    fresh["norm.weight"][3] = float("inf")
    content["state"]["task"] |= {f"student.model.{key}": value for key, value in fresh.items()}
    torch.save(content, file)
    assert _ended(replay, str(file), "--json", "found.json") == 1
    found = json.loads(Path("found.json").read_text())
    assert (found["finite"], found["forward"], found["terms"]["loss"]) == (False, "student.model.norm", None)
    out = capsys.readouterr().out
    assert "forward     first not finite: student.model.norm\n" in out
    assert "gradients   first not finite: student.model." in out


def test_what_a_file_holds_is_read_without_running_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Harm:
        def __reduce__(self):
            return Path.touch, (Path("harm"),)

    torch.save({"batches": [], "state": {}, "options": Harm()}, "harmful.pt")
    Path("pickled.pt").write_bytes(pickle.dumps(Harm(), protocol=2))
    Path("text.pt").write_text(yaml.safe_dump({"batches": []}))
    torch.save({"step": 3}, "other.pt")
    for name in ("harmful", "pickled", "text"):
        assert _ended(replay, f"{name}.pt") == 2
        error = capsys.readouterr().err
        assert error == f"dalikd replay: error: {name}.pt is damaged, or no nan-stepN.pt of a run that has diverged\n"
    assert not Path("harm").exists()
    assert _ended(replay, "other.pt") == _ended(replay, "nowhere.pt") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("other.pt holds no training step: give a nan-stepN.pt of a run that has diverged")
    assert second.endswith("there is no file nowhere.pt: a run that diverges writes nan-stepN.pt into its folder")


def test_the_file_names_its_images(words):
    own = ["--model", "small", "--schedule.name", "constant", "--optimizer.lr", "1e30", "--output", "run"]
    assert _ended(train, *words, *own, "--log_every", "1") == 2
    (file,) = Path("run").glob("nan-step*.pt")
    (batch,) = torch.load(file, weights_only=True)["batches"]
    assert len(batch["paths"]) == len(set(batch["paths"])) == 32
    labels = [int(Path(path).parent.name.removeprefix("class")) for path in batch["paths"]]
    assert labels == batch["labels"].tolist()
    assert all(Path(path).is_file() for path in batch["paths"])
    assert json.dumps(torch.load(file, weights_only=True)["options"])
