"""Runs that are interrupted, killed, stopped or left alone: each ends soon, in one line, and loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dalikd.kd.backbones import create_model

pytestmark = pytest.mark.faults

# the limits after which a process does not answer, so short that a test need not wait for them
QUICK = """
import os
import sys

from dalikd.tools.main import main
from dalikd.trainers import stopping

stopping._SILENT, stopping._BEAT, stopping._GRACE = 4.0, 1.0, 2.0
sys.argv = ["dalikd", *sys.argv[1:]]
if sys.argv.pop(1) == "apart":
    stopping._place = lambda: os.environ["RANK"]
main()
"""


@pytest.fixture
def training(small_images: Path) -> list[str]:
    """A run of 280 steps, which takes some seconds."""
    data = ["--data.root", str(small_images), "--data.train_split", ".", "--data.val_split", "."]
    run = ["--model", "resnet8", "--batch_size", "40", "--mix.group", "10", "--epochs", "40", "--eval_every", "40"]
    return [*data, "--data.image_size", "32", "--data.threads", "1", "--device", "cpu", *run, "--log_every", "1"]


def _wait(ready: Callable[[], bool], process: Any = None, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        assert process is None or process.runs(), (process.out, process.err)
        time.sleep(0.02)


def _steps(folder: Path) -> int:
    log = folder / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _last(text: str) -> str:
    """The last line, behind what a progress bar has left in it."""
    assert "Traceback" not in text, text
    return text.replace("\r", "\n").strip().splitlines()[-1].strip()


def _weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "last").glob("*.safetensors")}


def _ends(process: Any) -> tuple[int, float]:
    """The exit code of a process, and the seconds until it has ended."""
    begun = time.monotonic()
    return process.wait(120), time.monotonic() - begun


# -------------------------------------------------------------------------------------- one process of several


@pytest.mark.parametrize(
    ("lost", "number", "where", "words"),
    [
        (1, signal.SIGKILL, "here", "was killed"),
        (0, signal.SIGSTOP, "here", "does not answer: it is stopped (SIGSTOP)"),
        (1, signal.SIGSTOP, "apart", "does not answer: its machine or the network is gone"),
        (0, signal.SIGKILL, "here", "was killed"),
        (1, signal.SIGSTOP, "here", "does not answer: it is stopped (SIGSTOP)"),
        (0, signal.SIGKILL, "apart", "does not answer: its machine or the network is gone"),
    ],
)
def test_where_one_is_lost_the_other_ends_with_the_cause(
    start_joined, training, tmp_path, full, lost, number, where, words
):
    """With --full, and on one machine, after as long as users wait for it."""
    if not full and (lost, where) != (1, "apart") and (lost, number, where) != (1, signal.SIGKILL, "here"):
        pytest.skip("asked for by --full")
    script = tmp_path / "quick.py"
    script.write_text(QUICK)
    command = ["train"] if full and where == "here" else [script, where, "train"]
    both = start_joined(2, tmp_path / "said", *command, *training, "--output", tmp_path / "run")
    _wait(lambda: _steps(tmp_path / "run") > 3, both[0])
    gone, other = both[lost], both[1 - lost]
    os.kill(gone.pid, number)
    code, seconds = _ends(other)
    gone.kill()
    assert (code, seconds < 60) == (1, True), (code, seconds, other.err)
    line = _last(other.err)
    assert f"process {lost} of 2 (" in line, other.err
    assert f", {gone.pid}) {words}" in line


def test_a_mistake_that_one_process_meets_ends_the_other_with_its_name(start_joined, training, tmp_path):
    """The folder of the run is removed while it lasts."""
    both = start_joined(2, tmp_path / "said", "train", *training, "--output", tmp_path / "run")
    _wait(lambda: _steps(tmp_path / "run") > 3, both[0])
    os.kill(both[1].pid, signal.SIGSTOP)
    os.kill(both[1].pid, signal.SIGCONT)  # a short stop is none
    time.sleep(1.0)
    assert both[0].runs()
    shutil.rmtree(tmp_path / "run")
    both[0].wait(), both[1].wait()
    assert "Traceback" not in both[0].err + both[1].err
    assert "dalikd train: error: " in both[0].err
    assert "process 0 of 2" in _last(both[1].err)


# -------------------------------------------------------------------------------------------------- launchers


def _torchrun(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def test_processes_whose_launcher_is_killed_save_and_end(training, tmp_path, full):
    """With --max_restarts they go on by themselves before, when one of them has crashed."""
    again = ["--max_restarts", "1"] if full else []
    launcher = _torchrun(*again, "-m", "dalikd.tools.train", *training, "--output", tmp_path / "run")
    _wait(lambda: _steps(tmp_path / "run") > 3 or launcher.poll() is not None)
    assert launcher.poll() is None, launcher.communicate()
    ranks = psutil.Process(launcher.pid).children()
    if full:
        _wait(lambda: (tmp_path / "run/last/trainer.pt").exists())
        ranks[1].kill()
        psutil.wait_procs(ranks, 60)
        done = _steps(tmp_path / "run")
        _wait(lambda: len(psutil.Process(launcher.pid).children()) == 2 and _steps(tmp_path / "run") > done + 3)
        ranks = psutil.Process(launcher.pid).children()
    launcher.kill()
    begun = time.monotonic()
    assert psutil.wait_procs(ranks, 60)[1] == []
    assert time.monotonic() - begun < 20
    err = launcher.communicate()[1]
    assert "is gone; go on with --resume" in _last(err), err
    assert err.count("is gone; go on") == 1
    assert (tmp_path / "run/last/trainer.pt").exists()


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGUSR2, 140), (signal.SIGINT, 130)])
def test_a_run_saves_on_every_signal_however_often_it_comes(start_forked, training, tmp_path, number, code):
    process = start_forked(tmp_path / "said", "train", *training, "--output", tmp_path / "run")
    _wait(lambda: _steps(tmp_path / "run") > 3, process)
    for _ in range(3):
        os.kill(process.pid, number)
        time.sleep(0.01)
    assert process.wait() == code
    assert f"dalikd train: stopped by signal {number}; go on with --resume {tmp_path / 'run'}" in _last(process.err)
    assert process.err.count("dalikd train") == 1
    assert (tmp_path / "run/last/trainer.pt").exists()


def test_a_signal_to_one_of_two_that_write_down_a_teacher_stops_both(start_joined, small_images, tmp_path):
    """And the same command goes on where both of them stopped."""
    data = ["--data.root", small_images, "--data.train_split", ".", "--data.image_size", "32", "--device", "cpu"]
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "teacher.pt")
    teacher = ["--teacher.name", "resnet8", "--teacher.weights", tmp_path / "teacher.pt", "--data.threads", "1"]
    size = ["--batch_size", "20", "--mix.group", "10", "--epochs", "40", "--teacher.verify", "false"]
    words = ["cache", *data, *teacher, *size, "--output", tmp_path / "cache"]
    both = start_joined(2, tmp_path / "said", *words)
    _wait(lambda: (tmp_path / "cache/epoch-0002").exists() or (tmp_path / "cache/config.yaml").exists(), both[0])
    time.sleep(1.0)
    os.kill(both[1].pid, signal.SIGTERM)
    assert [process.wait() for process in both] == [143, 143], [process.err for process in both]
    assert "stopped by signal 15; the same command goes on" in _last(both[0].err)
    for process in start_joined(2, tmp_path / "again", *words):
        process.end()


def _commands(small_images: Path, folder: Path) -> dict[str, Sequence[object]]:
    data = ["--data.root", small_images, "--data.train_split", ".", "--data.image_size", "32", "--device", "cpu"]
    split = [*data, "--data.val_split", "."]
    torch.save(create_model("resnet8", 3).state_dict(), folder / "teacher.pt")
    weights = ["--teacher.name", "resnet8", "--teacher.weights", folder / "teacher.pt", "--teacher.verify", "false"]
    points = [{"da": name, "t_stddev": 0.1 * place, "s_test_loss": 1.0 + place} for place, name in enumerate("abcd")]
    (folder / "points.json").write_text(json.dumps({"points": points}))
    net = ["--model", "resnet8"]
    return {
        "prepare": [*data[:4], "--split", "train", "--output", folder / "prepared"],
        "measure": [*data, *weights, "--augmentation", "flip", "cutmix", "--epochs", "90", "--json", folder / "m.json"],
        "methods": [],
        "demo": ["--output", folder / "demo"],
        "train": [*split, *net, "--epochs", "50", "--output", folder / "run"],
        "distill": [*split, *net, *weights, "--epochs", "50", "--output", folder / "distilled"],
        "cache": [*data, *weights, "--epochs", "100", "--output", folder / "cache"],
        "probe": [*split, *net, "--weights", folder / "teacher.pt", "--epochs", "50", "--output", folder / "probe"],
        "study": ["--config", Path(__file__).parents[2] / "configs/demo_study.yaml", "--output", folder / "study"],
        "correlate": [folder / "points.json", "--plot", folder / "plot.png"],
        "evaluate": [*split, *net, "--weights", folder / "teacher.pt"],
        "bench loader": [*data, "--backends", "dalikd", "--batch_size", "60", "--output", folder / "bench"],
        "bench step": [*split, *net, *weights, "--steps", "50", "--output", folder / "bench"],
    }


def test_ctrl_c_ends_any_command_at_any_moment_in_one_line(start_forked, small_images, tmp_path, full):
    """Twice at once. One that is done before it comes has ended well. No temporary folder, no part of a file stays."""
    wrong, (temporary, out) = [], (tmp_path / "tmp", tmp_path / "out")
    temporary.mkdir()
    out.mkdir()
    commands = _commands(small_images, out)
    for name in commands if full else ("prepare", "measure"):
        for moment in (0.05, 0.3, 1.0, 3.0, 8.0) if full else (0.5,):
            words = [*name.split(), *commands[name], *(["--overwrite", "true"] if name == "prepare" else [])]
            process = start_forked(tmp_path / "said", *words, TMPDIR=str(temporary))
            _wait(lambda process=process: _catches(process.pid) or not process.runs())
            time.sleep(moment)
            with suppress(ProcessLookupError):
                for _ in range(2):
                    os.kill(process.pid, signal.SIGINT)
            code = process.wait(120)
            left = [path.name for folder in (temporary, out) for path in folder.rglob(".*") if path.name != ".locks"]
            said = [line for line in process.err.replace("\r", "\n").splitlines() if "stopped" in line]
            done = code == 0 or (code == 2 and "holds a" in process.err)
            if not (done or (code == 130 and len(said) == 1)) or left or "Traceback" in process.err:
                wrong.append(f"{name} after {moment} s: {code}, {left}, {process.err[-2000:]}")
    assert not wrong, "\n".join(wrong)


def test_ctrl_c_ends_a_command_while_it_is_loaded_and_what_it_has_started(small_images, tmp_path, full):
    """A terminal sends it to all of them."""
    words = ["bench", "all", "--root", str(small_images), "--output", str(tmp_path / "out"), "--only", "loader"]
    for command, moment in (("methods", 0.2), ("bench", 20.0 if full else 0.0)):
        given = words if command == "bench" else [command]
        process = subprocess.Popen(
            [sys.executable, "-m", "dalikd", *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        _wait(lambda process=process: _catches(process.pid))
        if command == "bench":
            _wait(lambda process=process: bool(psutil.Process(process.pid).children()))
            _wait(lambda process=process: _catches(psutil.Process(process.pid).children()[0].pid))
        time.sleep(moment)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
        err = process.communicate(timeout=120)[1]
        assert process.returncode == 130, err
        assert err.count("stopped (Ctrl-C)") == 1, err
        assert "Traceback" not in err
        assert _group(process.pid) == []


def _catches(pid: int) -> bool:
    """Whether a process has a handler for SIGHUP, which Python by itself has not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16) if "SigCgt:" in status else 0
    return bool(caught & 1 << (signal.SIGHUP - 1))


def _group(leader: int) -> list[int]:
    return [one.pid for one in psutil.process_iter() if one.is_running() and _group_of(one.pid) == leader]


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


# --------------------------------------------------------------------------------------------------- restarts


def test_a_run_that_crashes_is_started_again_and_ends_as_if_nothing_had_been(start_forked, training, tmp_path, full):
    words = ["train", *training, "--epochs", "15", "--eval_every", "15", "--checkpoint_every", "10"]
    whole = start_forked(tmp_path / "whole said", *words, "--output", tmp_path / "whole")
    process = start_forked(
        tmp_path / "said", *words, "--output", tmp_path / "run", "--restarts", "2",
        PYTHONPATH=os.environ.get("PYTHONPATH", ""),
    )  # fmt: skip
    for number in (signal.SIGSEGV, signal.SIGKILL) if full else (signal.SIGSEGV,):
        done = _steps(tmp_path / "run")
        _wait(lambda: (tmp_path / "run/last/trainer.pt").exists(), process)
        _wait(lambda done=done: _steps(tmp_path / "run") > done, process)
        child = psutil.Process(process.pid).children()[-1]
        child.send_signal(number)
        crashed = time.monotonic()
        _wait(lambda number=number: f"was ended by signal {int(number)} " in process.err, process)
        lines = _steps(tmp_path / "run")
        _wait(lambda lines=lines: _steps(tmp_path / "run") != lines or not process.runs())
        print(f"restart to a step: {time.monotonic() - crashed:.1f} s")
    assert process.wait() == 0, process.err
    assert "restart 1 of 2, from step " in process.err
    whole.end()
    assert _weights(tmp_path / "run") == _weights(tmp_path / "whole")


def test_a_mistake_is_not_tried_again_and_a_signal_is_handed_on(start_forked, training, tmp_path):
    own = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("not ours")
    words = ["train", *training, "--restarts", "3"]
    wrong = start_forked(tmp_path / "wrong", *words, "--output", tmp_path / "other", **own)
    process = start_forked(tmp_path / "said", *words, "--output", tmp_path / "run", **own)
    _wait(lambda: _steps(tmp_path / "run") > 3, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    assert "stopped by signal 15; go on with --resume" in _last(process.err)
    assert wrong.wait() == 2
    assert wrong.err.count("dalikd train: error: ") == 1
