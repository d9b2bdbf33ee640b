"""A run that is stopped and resumed ends as one that was never stopped, bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dalikd.kd.backbones import create_model
from dalikd.tools import distill, mutual, train
from dalikd.trainers import checkpoint
from dalikd.trainers.loop import Loop


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "small.pt"
    torch.save(create_model("small", 3).state_dict(), path)
    return str(path)


def _arguments(tree: Path, *more: str) -> list[str]:
    """Five epochs of four steps."""
    return [
        *("--data.root", str(tree), "--data.image_size", "32", "--data.threads", "1", "--device", "cpu"),
        *("--model", "small", "--batch_size", "32", "--mix.group", "8", "--epochs", "5", "--log_every", "1"),
        *("--optimizer.lr", "0.02", "--schedule.name", "cosine", *more),
    ]


def _distill_arguments(tree: Path, teacher: str, *more: str) -> list[str]:
    return _arguments(tree, "--teacher.name", "small", "--teacher.weights", teacher, *more)


def _results(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    del results["versions"]
    return results


def _log(folder: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timings = ("images_per_second", "data_wait_share", "teacher_share")
    return [{key: value for key, value in entry.items() if key not in timings} for entry in entries]


def _assert_same_end(folder: Path, other: Path) -> None:
    assert _results(folder) == _results(other)
    assert _log(folder) == _log(other)
    names = sorted(path.relative_to(other).as_posix() for path in other.glob("*/*.safetensors"))
    assert names == sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors"))
    for name in names:
        ours, theirs = load_file(folder / name), load_file(other / name)
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items()), name


class _Killed(BaseException):
    """Ends a process without a chance to save."""


def _run(command: Any, *arguments: str, kill_at: int | None = None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.step

    def stepping(loop: Loop, *batches: Any) -> None:
        if loop.progress.step == kill_at:
            raise _Killed
        step(loop, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", stepping)
        if kill_at is None:
            command.main(list(arguments))
            return
        with pytest.raises(_Killed):
            command.main(list(arguments))


# ----------------------------------------------------------------------------------------- in every setting

SETTINGS = {
    "picks": ["--augmentation", "cutmixpick_student", "--ema", "0.8", "--clip_grad_norm", "1", "--accumulation", "2"],
    "adamw, dropout, made anew": [
        *("--augmentation", "mixup", "--optimizer", "torch.optim.AdamW", "--no_decay_norms", "true"),
        *("--model_args.dropout", "0.5", "--weights", "TEACHER", "--reinit", "true"),
    ],
    "fixed": [
        "--augmentation",
        "cutmixpick_student",
        "--weights",
        "TEACHER",
        "--freeze_student",
        "true",
        "--ema",
        "0.8",
    ],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_is_resumed_exactly(tree, teacher, tmp_path, monkeypatch, setting):
    """Killed in the middle of an epoch and again later; saved every second step, so that a step is done anew."""
    own = [teacher if word == "TEACHER" else word for word in SETTINGS[setting]]
    common = _distill_arguments(tree, teacher, *own, "--checkpoint_every", "2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(distill, *common, "--output", str(whole), monkeypatch=monkeypatch)
    _run(distill, *common, "--output", str(broken), kill_at=3, monkeypatch=monkeypatch)
    assert torch.load(broken / "last" / "trainer.pt", weights_only=True)["step"] == 2
    _run(distill, "--resume", str(broken), kill_at=7, monkeypatch=monkeypatch)
    _run(distill, "--resume", str(broken), monkeypatch=monkeypatch)
    _assert_same_end(broken, whole)


def test_a_killed_pair_is_resumed_exactly(tree, tmp_path, monkeypatch):
    """Two nets with auxiliary heads, killed in the middle of an epoch."""
    common = _arguments(tree, "--model", "resnet8_aux", "--epochs", "2", "--augmentation", "cutmix")
    common += ["--checkpoint_every", "2", "--ema", "0.8", "--data.limit", "64", "--data.val_limit", "6"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(mutual, *common, "--output", str(whole), monkeypatch=monkeypatch)
    _run(mutual, *common, "--output", str(broken), kill_at=3, monkeypatch=monkeypatch)
    _run(mutual, "--resume", str(broken), monkeypatch=monkeypatch)
    _assert_same_end(broken, whole)
    assert len(list((whole / "last").glob("net[01]*.safetensors"))) == 8  # each, its average, and the backbones of both


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory) -> Path:
    """A supervised run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main([*_arguments(tree), "--output", str(folder)])
    return folder


def test_a_supervised_run_is_resumed_exactly(tree, whole, tmp_path, monkeypatch):
    """Also at the end of an epoch, the only checkpoint without --checkpoint_every."""
    broken = tmp_path / "broken"
    _run(train, *_arguments(tree), "--output", str(broken), kill_at=4, monkeypatch=monkeypatch)
    _run(train, "--resume", str(broken), kill_at=11, monkeypatch=monkeypatch)
    _run(train, "--resume", str(broken), monkeypatch=monkeypatch)
    _assert_same_end(broken, whole)


def test_a_kill_during_the_evaluation_loses_nothing(tree, whole, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr("dalikd.trainers.loop.evaluate", _raise_killed)
        with pytest.raises(_Killed):
            train.main([*_arguments(tree, "--checkpoint_every", "3"), "--output", str(broken)])
    _run(train, "--resume", str(broken), monkeypatch=monkeypatch)
    _assert_same_end(broken, whole)


def test_a_kill_between_the_last_weights_and_the_last_state_loses_nothing(tree, whole, tmp_path, monkeypatch):
    """Saved after each of five epochs: the last state is not written any more."""
    broken = tmp_path / "broken"
    original, saved = checkpoint.save_state, []

    def save(path: Path, state: dict[str, Any], *previous: Path) -> None:
        if len(saved) == 4:
            raise _Killed
        saved.append(state["step"])
        original(path, state, *previous)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", save)
        with pytest.raises(_Killed):
            train.main([*_arguments(tree), "--output", str(broken)])
    (broken / "last" / "student.safetensors").write_bytes(b"as a kill may leave it")
    _run(train, "--resume", str(broken), monkeypatch=monkeypatch)
    _assert_same_end(broken, whole)


def _raise_killed(*_: Any, **__: Any) -> None:
    raise _Killed


def test_sigterm_saves_says_so_and_ends_with_an_error(tree, whole, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    step = Loop.step

    def stepping(loop: Loop, *batches: Any) -> None:
        if loop.progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        step(loop, *batches)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", stepping)
        with pytest.raises(SystemExit) as stop:
            train.main([*_arguments(tree), "--output", str(broken)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == f"dalikd train: stopped by signal 15; go on with --resume {broken}\n"
    assert torch.load(broken / "last" / "trainer.pt", weights_only=True)["step"] == 5
    _run(train, "--resume", str(broken), monkeypatch=monkeypatch)
    _assert_same_end(broken, whole)


# ---------------------------------------------------------------------------------------- what may be resumed


@pytest.fixture(scope="module")
def finished_once(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.main([*_arguments(tree, "--epochs", "1"), "--output", str(folder)])
    return folder


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A run folder, for a test to resume or to spoil."""
    return shutil.copytree(finished_once, tmp_path / "run")


def test_a_finished_run_gives_its_results_again(finished, monkeypatch, capsys):
    before = _results(finished), _log(finished), (finished / "last" / "student.safetensors").read_bytes()
    assert before[0]["finished"]
    monkeypatch.setattr(Loop, "step", _raise_killed)
    train.main(["--resume", str(finished)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("last epoch (1): top1 ")
    assert printed[-1] == f"run folder: {finished}"
    assert before == (_results(finished), _log(finished), (finished / "last" / "student.safetensors").read_bytes())


def test_a_finished_run_can_be_prolonged(tree, tmp_path, monkeypatch):
    """With a schedule that does not depend on the end, as if it had been asked for from the start."""
    constant = ("--schedule.name", "constant")
    _run(
        train, *_arguments(tree, *constant, "--epochs", "2"), "--output", str(tmp_path / "two"), monkeypatch=monkeypatch
    )
    one = tmp_path / "one"
    _run(train, *_arguments(tree, *constant, "--epochs", "1"), "--output", str(one), monkeypatch=monkeypatch)
    _run(train, "--resume", str(one), "--epochs", "2", monkeypatch=monkeypatch)
    _assert_same_end(one, tmp_path / "two")


def test_results_lost_in_a_kill_are_written_again(finished, monkeypatch):
    before = _results(finished)
    (finished / "results.json").unlink()
    _run(train, "--resume", str(finished), monkeypatch=monkeypatch)
    assert _results(finished) == before


CHANGES = {
    "--seed 1": "--seed was 0, now it is 1",
    "--batch_size 16": "--batch_size was 32, now it is 16",
    "--data.limit 90": "--data.limit was None, now it is 90",
    "--data.share 0.5": "--data.share was 1.0, now it is 0.5",
    "--data.val_limit 9": "--data.val_limit was None, now it is 9",
    "--data.image_size 28": "--data.image_size was 32, now it is 28",
    "--model resnet8": "--model was small, now it is resnet8",
    "--augmentation cutmix --mix.mode per_batch": "--augmentation was identity, now it is cutmix",
    "--optimizer torch.optim.Adam": "belongs to the optimizer SGD, now it is Adam",
    "--output elsewhere": "goes on in that folder, not in --output elsewhere: leave --output out, or copy the folder",
    "--teacher.weights OTHER": "the teacher's weights or normalisation: others than before",
    "--teacher.mean [0.5,0.5,0.5] --teacher.std [0.1,0.1,0.1]": "the teacher's weights or normalisation: others than",
    "--loss.temperature 2": "--loss.temperature was 4.0, now it is 2.0",
    "train": "it is of dalikd distill, not train",
}


@pytest.fixture(scope="module")
def distilled_once(tree, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "run"
    distill.main([*_distill_arguments(tree, teacher, "--epochs", "1"), "--output", str(folder)])
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_not_resumed(distilled_once, tmp_path, capsys, change):
    finished = shutil.copytree(distilled_once, tmp_path / "run")
    torch.manual_seed(4)
    torch.save(create_model("small", 3).state_dict(), tmp_path / "other.pt")
    command = train if change == "train" else distill
    words = change.replace("OTHER", str(tmp_path / "other.pt")).replace("train", "").split()
    before = {path: path.read_bytes() for path in finished.rglob("*.*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        command.main(["--resume", str(finished), *words, "--epochs", "3"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert CHANGES[change] in error
    assert error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in finished.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "there is no run"),
        (lambda folder: (folder / "last" / "trainer.pt").unlink(), "the run has saved no state yet"),
        (lambda folder: (folder / "last" / "trainer.pt").write_bytes(b"x"), "cannot be read as a saved state"),
    ],
)
def test_a_folder_without_a_state_is_refused(finished, capsys, spoil, message):
    spoil(finished)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(finished)])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert message in error


def test_a_resumed_run_computes_with_as_many_threads_unless_told(finished, monkeypatch, capsys):
    own, state = torch.get_num_threads(), torch.load(finished / "last" / "trainer.pt", weights_only=True)
    assert state["threads"] == own
    torch.save({**state, "threads": own + 1}, finished / "last" / "trainer.pt")
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(own + 1))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train.main(["--resume", str(finished)])
    assert chosen == [own + 1, own]  # and back, for what comes after the run
    assert f"{own + 1} thread(s) of torch, not {own}, as the run had" in capsys.readouterr().out
    monkeypatch.setenv("OMP_NUM_THREADS", str(own))
    train.main(["--resume", str(finished)])
    assert chosen == [own + 1, own, own]
    assert f"{own} thread(s) of torch, not {own + 1}: the last bits" in capsys.readouterr().out


def test_settings_of_the_optimizer_are_those_of_the_call(finished, monkeypatch, capsys):
    """No option is read and then ignored: a saved state does not bring old settings back."""
    seen, step = [], Loop.step

    def stepping(loop: Loop, *batches: Any) -> None:
        step(loop, *batches)
        (group,) = loop.optimizer.param_groups
        seen.append((group["lr"], group["weight_decay"], group["momentum"]))

    monkeypatch.setattr(Loop, "step", stepping)
    changed = ("--optimizer.lr", "0.01", "--optimizer.weight_decay", "0.1", "--schedule.name", "constant")
    train.main(["--resume", str(finished), "--epochs", "2", *changed])
    assert seen == [(0.01, 0.1, 0.9)] * 4
    assert capsys.readouterr().out.splitlines()[0] == (
        "resumed, but otherwise than before: --epochs was 1, now it is 2; --optimizer.lr was 0.02, now it is "
        "0.01; --optimizer.weight_decay was 0.0005, now it is 0.1; --schedule.name was cosine, now it is "
        "constant; a run finished with 4 steps has 8 now, and the constant schedule is that of the new length: the "
        "learning rate goes on with 0.01"
    )


def test_the_config_of_a_run_can_start_another(finished, tmp_path, monkeypatch):
    """Neither --resume nor --overwrite is written down, so that reading it cannot continue or destroy a run."""
    _run(train, "--resume", str(finished), monkeypatch=monkeypatch)
    text = (finished / "config.yaml").read_text()
    assert "resume" not in text
    assert "overwrite" not in text
    again = tmp_path / "again"
    _run(train, "--config", str(finished / "config.yaml"), "--output", str(again), monkeypatch=monkeypatch)
    _assert_same_end(again, finished)
