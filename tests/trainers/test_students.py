"""Several students on one teacher pass: each ends as in a run of its own, bit for bit, killed or not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dalikd.kd.backbones import create_model
from dalikd.kd.teacher import Teacher
from dalikd.tools import distill
from dalikd.tools.cli import parse
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.run import Planned, run_students

SUM = {
    "class_path": "dalikd.kd.losses.WeightedSum",
    "init_args": {
        "losses": [
            {"class_path": "dalikd.kd.losses.KD"},
            {"class_path": "dalikd.kd.losses.AT", "init_args": {"weight": 9.0, "ce_weight": 0.0}},
        ]
    },
}
#: with the words that say the same on a command line
STUDENTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"name": "plain", "model": "small"}, []),
    (
        {"name": "clipped", "model": "small", "model_args": {"dropout": 0.5}, "seed": 3, "clip_grad_norm": 0.5},
        ["--model_args.dropout", "0.5", "--init_seed", "3", "--clip_grad_norm", "0.5"],
    ),
    (
        {"name": "averaged", "model": "small", "ema": 0.8, "optimizer.lr": 0.01},
        ["--ema", "0.8", "--optimizer.lr", "0.01"],
    ),
    (
        {"name": "attention", "model": "resnet8", "loss": SUM},
        ["--loss", json.dumps(SUM)],
    ),
    ({"name": "heads", "model": "resnet8_aux", "loss.kd_mix_share": 1.0}, ["--loss.kd_mix_share", "1.0"]),
    ({"name": "adam", "model": "small", "optimizer": "torch.optim.AdamW"}, ["--optimizer", "torch.optim.AdamW"]),
]


class _Killed(BaseException):
    """Ends a process without a chance to save."""


@pytest.fixture(scope="module")
def common(tree, tmp_path_factory) -> list[str]:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(create_model("resnet8_aux", 3).state_dict(), path)
    return [
        *("--data.root", str(tree), "--data.image_size", "16", "--data.threads", "1", "--device", "cpu"),
        *("--teacher.name", "resnet8_aux", "--teacher.weights", str(path), "--batch_size", "32", "--mix.group", "8"),
        *("--epochs", "2", "--checkpoint_every", "3", "--schedule.milestones", "[1]", "--accumulation", "2"),
    ]


def students_file(folder: Path, entries: Any) -> str:
    path = folder / "students.yaml"
    path.write_text(yaml.safe_dump(entries))
    return str(path)


def results_of(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    for name in ("versions", "sha256"):
        del results[name]
    return results


def killed_in(method: str, step: int, name: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Where one student is about to do that, after some others have done it and before the rest."""
    original = getattr(Loop, method)

    def doing(loop: Loop, *given: Any, **how: Any) -> None:
        if loop.progress.step == step and loop.folder.path.name == name:
            raise _Killed
        original(loop, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, method, doing)
        with pytest.raises(_Killed):
            distill.main(arguments)


def test_each_student_ends_as_alone(common, tmp_path, monkeypatch):
    """Killed twice meanwhile, with states of different steps; the teacher is asked once a batch, and once for turns."""
    together, asked = tmp_path / "together", []
    file = students_file(tmp_path, [entry for entry, _ in STUDENTS])
    words = [*common, "--augmentation", "cutmixpick_teacher"]
    killed_in("step", 1, "heads", monkeypatch, [*words, "--students", file, "--output", str(together)])
    killed_in("write", 4, "averaged", monkeypatch, ["--resume", str(together)])
    states = [together / entry["name"] / "last" / "trainer.pt" for entry, _ in STUDENTS]
    assert [torch.load(state, weights_only=True)["step"] for state in states] == [4, 4, 3, 3, 3, 3]
    call = Teacher.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", lambda *given, **named: asked.append(1) or call(*given, **named))
        distill.main(["--resume", str(together)])
    assert len(asked) <= 4 * 2 * 3 + 10  # steps, microbatches, originals and candidates, turned originals; and set-up
    for entry, own in STUDENTS:
        alone, name = tmp_path / "alone" / entry["name"], entry["name"]
        distill.main([*words, "--model", entry["model"], *own, "--output", str(alone)])
        assert results_of(together / name) == results_of(alone), name
        for file_there in sorted(alone.glob("last/*.safetensors")):
            ours, theirs = load_file(together / name / "last" / file_there.name), load_file(file_there)
            assert all(torch.equal(value, ours[key]) for key, value in theirs.items()), (name, file_there.name)
        copied = load_file(together / "last" / f"{name}.safetensors")
        assert all(
            torch.equal(value, copied[key]) for key, value in load_file(alone / "last/student.safetensors").items()
        )
    summary = json.loads((together / "results.json").read_text())
    assert list(summary["students"]) == [entry["name"] for entry, _ in STUDENTS]


def test_augmentations_are_branches_of_one_pass(common, tmp_path, monkeypatch):
    """Each student ends as alone, and what is kept of a step has its own draws only."""
    names, asked, kept = ["identity", "mixup", "cutmixpick_teacher", "autoaugment"], [], []
    words = [*common, "--epochs", "1", "--schedule.milestones", "[]", "--model", "small"]

    def planned(place: str, name: str) -> Planned:
        return Planned(*parse("distill", [*words, "--augmentation", name, "--output", str(tmp_path / place / name)]))

    call, step = Teacher.__call__, Loop.step

    def noted(loop: Loop, batches: Any) -> None:
        kept.append((loop.folder.path, [loop.task.own_draws(batch) for batch in batches]))
        step(loop, batches)

    monkeypatch.setattr(Loop, "step", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", lambda *given, **named: asked.append(1) or call(*given, **named))
        run_students({name: planned("together", name) for name in names}, start("cpu", "fp32"))
    assert len(asked) <= 2 * 2 * 2 + 10  # steps, microbatches, originals and candidates; and set-up
    for name in names:
        run_students({name: planned("alone", name)}, start("cpu", "fp32"))
        ours, theirs = results_of(tmp_path / "together" / name), results_of(tmp_path / "alone" / name)
        assert ours["last"]["val"] == pytest.approx(theirs["last"]["val"], rel=1e-5)
        assert ours["last"]["t_entropy"] == pytest.approx(theirs["last"]["t_entropy"], rel=1e-5)
        batches, expected = (
            [batch for path, some in kept if path == tmp_path / place / name for batch in some]
            for place in ("together", "alone")
        )
        assert len(batches) == len(expected) > 0
        for one, other in zip(batches, expected, strict=True):
            assert [draws._fields for draws in one.mix] == [draws._fields for draws in other.mix]
            assert all(map(torch.equal, one.augmented, other.augmented))
            assert len(one.augmented) == len(other.augmented)
            for mine, its in zip(one.mix, other.mix, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True) if isinstance(a, torch.Tensor))


def test_one_that_diverges_does_not_stop_the_others(common, tmp_path, capsys):
    entries = [{"name": name, "model": "small", "optimizer.lr": 1e30} for name in ("wild", "wilder")]
    entries.append({"name": "calm", "model": "small"})
    words = [*common, "--students", students_file(tmp_path, entries), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        distill.main(words)
    told = capsys.readouterr().err
    assert "error: wild: the loss is" in told
    assert "; wilder: the loss is" in told
    assert results_of(tmp_path / "out" / "calm")["finished"]
    assert (tmp_path / "out" / "last" / "calm.safetensors").is_file()
    assert not (tmp_path / "out" / "last" / "wild.safetensors").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "a", "model": "small"}] * 2, "two students have the name a"),
        ([{"model": "small"}], "student 1 has the name None: give each one that can name a folder"),
        ([{"name": "../a", "model": "small"}], "student 1 has the name '../a'"),
        (
            [{"name": "a", "model": "small", "augmentation": "cutmix"}],
            "student a: augmentation is no option of a student",
        ),
        ([{"name": "a", "model": "small", "batch_size": 8}], "student a: batch_size is no option of a student"),
        ([{"name": "a", "modell": "small"}], "student a: modell is no option of a student"),
        ([{"name": "a", "model": "small", "loss": "Unknown"}], "student a: .*Unknown"),
        ([{"name": "a"}], "no model given"),
        ({"a": "small"}, "give a list of students"),
    ],
)
def test_what_is_no_list_of_students_is_named(common, tmp_path, capsys, entries, message):
    with pytest.raises(SystemExit):
        distill.main([*common, "--students", students_file(tmp_path, entries), "--output", str(tmp_path / "out")])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_students_that_pick_for_themselves_share_no_pass(common, tmp_path, capsys):
    file = students_file(tmp_path, [{"name": name, "model": "small"} for name in "ab"])
    for augmentation in ("cutmixpick_student", "mixup+kld"):
        words = [*common, "--augmentation", augmentation, "--students", file, "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            distill.main(words)
        assert f"--augmentation {augmentation} lets each student pick its own images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_share_a_pass_as_well(common, tmp_path, start_joined):
    entries = [{"name": "first", "model": "resnet8"}, {"name": "second", "model": "resnet8", "seed": 1, "ema": 0.5}]
    words = [*common, "--epochs", "1", "--schedule.milestones", "[]", "--accumulation", "1", "--augmentation", "cutmix"]
    together = ["--students", students_file(tmp_path, entries), "--output", str(tmp_path / "together")]
    alone = ["--model", "resnet8", "--init_seed", "1", "--ema", "0.5", "--output", str(tmp_path / "alone")]
    for name, own in (("together", together), ("alone", alone)):
        for process in start_joined(2, tmp_path / f"printed-{name}", "distill", *words, *own):
            process.end()
    for name in ("student", "ema"):
        ours, theirs = (
            load_file(folder / "last" / f"{name}.safetensors")
            for folder in (tmp_path / "together" / "second", tmp_path / "alone")
        )
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert (tmp_path / "together" / "last" / "first.safetensors").is_file()
