"""Kills, damage, full disks and removed folders while something is written, in whole commands."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dalikd.tools import train
from dalikd.trainers.loop import Loop

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def root(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images to train on and 12 to validate with."""
    root = tmp_path_factory.mktemp("data")
    for split, numbers in (("train", range(16)), ("val", range(20, 24))):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(small_images / name / f"{number:03d}.jpg", root / split / name)
    return root


def _arguments(root: Path) -> list[str]:
    """Three epochs of three steps, saved after each step."""
    return [
        *("--data.root", str(root), "--data.image_size", "32", "--data.threads", "1", "--device", "cpu"),
        *("--model", "resnet8", "--batch_size", "16", "--mix.group", "8", "--augmentation", "cutmix"),
        *("--epochs", "3", "--log_every", "1", "--checkpoint_every", "1", "--ema", "0.9"),
    ]


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main([*_arguments(root), "--output", str(folder)])
    return folder


def _same(folder: Path, other: Path, *, besides: Sequence[str] = ()) -> bool:
    ours, theirs = (sorted(path.relative_to(one) for path in one.glob("*/*.safetensors")) for one in (folder, other))
    if ours != theirs:
        return False
    for name in ours:
        if name.as_posix() not in besides:
            mine, others = load_file(folder / name), load_file(other / name)
            if not all(torch.equal(value, mine[key]) for key, value in others.items()):
                return False
    return True


def _parts(folder: Path) -> list[Path]:
    """What is being written, or was when its writer died."""
    return [path for path in folder.rglob(".*.*") if len(path.suffix) == 33]


def _lines(process: Any) -> int:
    """How many lines a command has said, beside the progress bar that a slow machine is shown."""
    return sum("it/s" not in line and "s/step" not in line for line in process.err.splitlines())


# ----------------------------------------------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def whole_of_two(root: Path, tmp_path_factory: pytest.TempPathFactory, start_joined: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("whole of two")
    for process in start_joined(2, folder, "train", *_arguments(root), "--output", folder / "run"):
        process.end()
    return folder / "run"


def _kill(processes: Sequence[Any], run: Path, *, writing: bool, draw: random.Random) -> None:
    """Kill them at a random moment after the first checkpoint; or at the first one at which a file is being written."""
    deadline = time.monotonic() + 120
    while not (run / "last" / "trainer.pt").exists() and time.monotonic() < deadline and processes[0].runs():
        time.sleep(0.001)
    assert (run / "last" / "trainer.pt").exists(), [process.err for process in processes]
    if writing:
        draw_from = time.monotonic() + draw.random() * 0.2
        while time.monotonic() < draw_from or not _parts(run / "last"):
            if time.monotonic() > deadline or not processes[0].runs():
                break
    else:
        time.sleep(draw.random() * 0.5)
    for process in processes:
        process.kill()


def test_kill_9_at_any_moment_loses_nothing(
    root: Path,
    whole: Path,
    whole_of_two: Path,
    tmp_path: Path,
    full: bool,
    start_joined: Callable[..., Any],
    start_forked: Any,
) -> None:
    cut = 0
    for case in range(20 if full else 2):
        two, writing, run = case % 2 == 1, case % 4 < 2, tmp_path / str(case) / "run"

        def start(place: Path, *words: object, several: bool = two) -> list[Any]:
            return start_joined(2, place, "train", *words) if several else [start_forked(place, "train", *words)]

        victims = start(run.parent / "victim", *_arguments(root), "--output", run)
        _kill(victims, run, writing=writing, draw=random.Random(case))
        cut += bool(_parts(run))
        for process in start(run.parent / "resumed", "--resume", run):
            process.end()
        assert _same(run, whole_of_two if two else whole), case
        assert not _parts(run)
        assert not (run / ".lock").exists()
        steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines() if "lr" in line]
        assert steps == list(range(1, 10)), case
        shutil.rmtree(run.parent)
    assert cut or not full  # some of them were in the middle of a file


# ---------------------------------------------------------------------------------------------------------- damage


class _Killed(BaseException):
    """Ends a process without a chance to save."""


@pytest.fixture(scope="module")
def broken(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its second epoch."""
    folder, step = tmp_path_factory.mktemp("broken") / "run", Loop.step

    def stepping(loop: Loop, *batches: Any) -> None:
        if loop.progress.step == 5:
            raise _Killed
        step(loop, *batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", stepping)
        with pytest.raises(_Killed):
            train.main([*_arguments(root), "--output", str(folder)])
    return folder


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _emptied(_: bytes) -> bytes:
    return b""


def _flipped(content: bytes, place: float = 0.5) -> bytes:
    changed = bytearray(content)
    changed[int(place * (len(content) - 1))] ^= 1 << 2
    return bytes(changed)


DAMAGES = (_cut, _emptied, _flipped)


def test_damage_to_any_file_is_mended_or_said(
    broken: Path, whole: Path, tmp_path: Path, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never another result without a word."""
    for kind, (start, goes_on) in {"killed": (broken, True), "finished": (whole, False)}.items():
        files = sorted(path.relative_to(start) for path in start.rglob("*") if path.is_file())
        assert {"trainer.pt", "trainer-previous.pt", "student.safetensors"} <= {path.name for path in files}
        for number, file in enumerate(files):
            for damage in DAMAGES if full else [DAMAGES[(number // 2 + goes_on) % 3]] * ((number + goes_on) % 2):
                folder = tmp_path / kind / f"{number}{damage.__name__}"
                shutil.copytree(start, folder)
                (folder / file).write_bytes(damage((folder / file).read_bytes()))
                capsys.readouterr()
                try:
                    train.main(["--resume", str(folder)])
                    code: object = 0
                except SystemExit as stop:
                    code = stop.code
                if code:
                    error = capsys.readouterr().err
                    assert (code, error.count("\n")) == (2, 1), (kind, file, damage, error)
                    assert file.name == "config.yaml", (kind, file, damage, error)  # the others can be mended
                    continue
                said = capsys.readouterr().out
                if file.parts[0] == "last" and file.name == "trainer.pt":
                    assert "trainer.pt cannot be read as a saved state: " in said, (kind, damage, said)
                    assert "resumed from the state before it, of step " in said
                lost = [str(file)] if f"{file} is not what was saved of epoch" in said else []
                assert _same(folder, whole, besides=lost) or "but otherwise than before" in said, (kind, file, damage)
                shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------- full disks

_LIMITED = """
import resource, sys
from dalikd.tools.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["dalikd", *sys.argv[2:]]
main()
"""


def _size(path: Path) -> int:
    return path.stat().st_size


@pytest.fixture(scope="module")
def writers(root: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """Commands that are to write into OUT, by what cannot be written, each with the size that a file may have. DALI
    writes files of its own, of some kB, into the folder for temporary files: where one fails is for it to say."""
    trained, points = _arguments(root), tmp_path_factory.mktemp("points") / "points.json"
    named = [{"da": str(n), "t_stddev": n, "s_test_loss": n * n} for n in range(5)]
    points.write_text(json.dumps({"points": named}))
    return {
        "config.yaml": (400, ["train", *trained, "--output", "OUT"]),
        "student.safetensors": (
            _size(whole / "last" / "student.safetensors") - 9,
            ["train", *trained, "--output", "OUT"],
        ),
        "trainer.pt": (_size(whole / "last" / "trainer.pt") - 9, ["train", *trained, "--output", "OUT"]),
        "plot.png": (400, ["correlate", str(points), "--plot", "OUT/plot.png"]),
        "train-00000.tar": (3000, ["prepare", "--data.root", str(root), "--output", "OUT"]),
    }


_SHORT = ("trainer.pt", "plot.png", "train-00000.tar")


def test_a_full_disk_ends_in_a_line_that_names_the_file(
    writers: dict[str, tuple[int, list[str]]], tmp_path: Path, full: bool, start_forked: Any
) -> None:
    script = tmp_path / "limited.py"
    script.write_text(_LIMITED)
    for name in writers if full else _SHORT:
        size, words = writers[name]
        out = tmp_path / name / "there"
        cache = tmp_path / name / "cache"  # lists of files are kept there, or not: no result depends on them
        words = [word.replace("OUT", str(out)) for word in words]
        process = start_forked(tmp_path / name, script, size, *words, DALIKD_CACHE=str(cache))
        assert process.wait() == 2, (name, process.out, process.err)
        lines = [line for line in process.err.splitlines() if "error: " in line]
        assert len(lines) == 1, (name, process.err)
        assert "File too large" in lines[0], (name, process.err)
        assert "Traceback" not in process.err, (name, process.err)
        assert str(out) in lines[0], (name, process.err)
        assert not _parts(tmp_path / name), name
        assert not list(out.rglob(".lock")), name


def test_the_checkpoint_before_a_full_disk_can_be_gone_on_with(
    whole: Path, broken: Path, tmp_path: Path, start_forked: Any
) -> None:
    script, run = tmp_path / "limited.py", tmp_path / "run"
    script.write_text(_LIMITED)
    shutil.copytree(broken, run)
    before = (run / "last" / "trainer.pt").read_bytes()
    process = start_forked(tmp_path / "0", script, len(before) * 3 // 4, "train", "--resume", run)
    assert process.wait() == 2
    assert _lines(process) == 1
    assert f"{run}/last/trainer.pt cannot be written: File too large" in process.err
    assert (run / "last" / "trainer.pt").read_bytes() == before
    start_forked(tmp_path / "1", "train", "--resume", run).end()
    assert _same(run, whole)


# ------------------------------------------------------------------------------------------- folders and their owners


def _wait_for(path: Path, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.runs(), (process.out, process.err)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_that_is_removed_ends_its_run(root: Path, tmp_path: Path, start_forked: Any) -> None:
    run = tmp_path / "run"
    process = start_forked(tmp_path / "0", "train", *_arguments(root), "--epochs", "2000", "--output", run)
    _wait_for(run / "last" / "trainer.pt", process)
    run.rename(tmp_path / "gone")
    assert process.wait(60) == 2
    assert _lines(process) == 1
    assert f"{run} was removed or replaced while this call wrote into it" in process.err
    assert not list(run.glob("last/trainer.pt"))


def test_a_folder_has_one_writer(root: Path, tmp_path: Path, full: bool, start_forked: Any) -> None:
    """Others are refused while it runs, and not after it was killed."""
    run = tmp_path / "run"
    first = start_forked(tmp_path / "0", "train", *_arguments(root), "--epochs", "2000", "--output", run)
    _wait_for(run / "last" / "trainer.pt", first)
    second = {"overwrite": [*_arguments(root), "--output", run, "--overwrite", "true"], "resume": ["--resume", run]}
    for name, words in second.items() if full else [("resume", second["resume"])]:
        refused = start_forked(tmp_path / name, "train", *words)
        assert refused.wait() == 2
        assert _lines(refused) == 1
        assert f"--output {run} is being written by process {first.pid} on " in refused.err
    assert first.runs()
    assert first.kill() == -signal.SIGKILL
    assert (run / ".lock").exists()
    start_forked(tmp_path / "again", "train", "--resume", run, "--epochs", "1").wait()
    os.sync()
    assert not (run / ".lock").exists()


def test_of_two_that_start_together_one_runs(root: Path, tmp_path: Path, start_forked: Any) -> None:
    run, whole = tmp_path / "run", [*_arguments(root), "--epochs", "6"]
    both = [start_forked(tmp_path / str(n), "train", *whole, "--seed", n, "--output", run) for n in range(2)]
    assert sorted(process.wait() for process in both) == [0, 2]
    refused = next(process for process in both if process.wait() == 2)
    assert _lines(refused) == 1
    assert "is being written by " in refused.err or "holds a run" in refused.err
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines() if "lr" in line]
    assert steps == list(range(1, 19))
