"""A study in processes of its own: killed at any moment, and dealt over shards, it ends as one that ran in peace."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dalikd.tools.study import read_study
from dalikd.trainers.study.ready import make_ready

pytestmark = pytest.mark.slow

CELLS = 1 + 2 + 2 + 6  # teacher, students alone, T. stddev with and without a student, students


@pytest.fixture(scope="module")
def config(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {
        "data": {"name": "imagefolder", "root": str(tree), "image_size": 32, "threads": 1, "limit": 48, "val_limit": 9},
        "device": "cpu",
        "batch_size": 16,
        "mix": {"group": 8},
        "epochs": 2,
        "train": {"checkpoint_every": 2},
        "measure": {"window": 24, "epochs": 1},
        "study": {
            "pairs": [{"teacher": "resnet14", "student": "resnet8"}],
            "augmentation": ["flip", "mixup", "cutmixpick_student"],
            "seeds": [0, 1],
        },
    }
    path = tmp_path_factory.mktemp("config") / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def expected(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a study that is never interrupted, in a process with as many threads as the others have."""
    folder = tmp_path_factory.mktemp("peace") / "study"
    process = _start(config, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return _results(folder)


def _results(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    del results["runs_on"]
    return results


def _start(config: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "dalikd.tools.study", "--config", str(config), "--output", str(folder), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _files(folder: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))  # passes over what just vanished


def _kill_later(process: subprocess.Popen[str], folder: Path, files: int, delay: float) -> None:
    """Kill -9 a moment after so many files have been written."""
    deadline = time.monotonic() + 120
    while _files(folder) < files and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()


def test_a_study_killed_at_random_moments_ends_the_same(config, expected, tmp_path):
    folder, chance = tmp_path / "study", random.Random(5)
    for _ in range(2):
        _kill_later(_start(config, folder), folder, _files(folder) + chance.randrange(3, 40), chance.uniform(0, 0.3))
    last = _start(config, folder)
    out, error = last.communicate(timeout=300)
    assert last.returncode == 0, error
    assert _results(folder) == expected
    assert f"/{CELLS}]" in out


def test_two_shards_make_what_one_makes(config, expected, tmp_path):
    """The shard without the teacher starts first, does what it can, and waits."""
    folder = tmp_path / "study"
    dealt = make_ready(read_study(["--config", str(config), "--shard", "1/2"])).shards["teachers/resnet14"]
    first = _start(config, folder, "--shard", f"{3 - dealt}/2", "--poll_seconds", "0.1")
    assert first.stdout is not None
    printed = []
    while not printed or not printed[-1].startswith("waiting for teachers/resnet14"):
        printed.append(first.stdout.readline())
        assert first.poll() is None, printed
    assert f"(shard {dealt})" in printed[-1]
    second = _start(config, folder, "--shard", f"{dealt}/2", "--poll_seconds", "0.1")
    ended = [shard.communicate(timeout=300) for shard in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], ended
    outputs = ["".join(printed) + ended[0][0], ended[1][0]]
    assert outputs[0].count("waiting for teachers/resnet14") == 1
    assert any("written: " in out for out in outputs)
    assert sum(out.count("run folder: ") for out in outputs) == CELLS - 2
    assert _results(folder) == expected


def test_two_equal_calls_at_once_make_each_run_once(config, expected, tmp_path):
    folder = tmp_path / "study"
    calls = [_start(config, folder, "--poll_seconds", "0.1") for _ in range(2)]
    ended = [call.communicate(timeout=300) for call in calls]
    assert [call.returncode for call in calls] == [0, 0], ended
    assert sum(out.count("run folder: ") for out, _ in ended) == CELLS - 2
    assert _results(folder) == expected


def test_all_processes_of_a_launcher_do_the_same_runs(config, tmp_path):
    folder = tmp_path / "study"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "dalikd.tools.study", "--config", str(config), "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    short = ["--augmentation", "mixup", "--seeds", "0", "--epochs", "1", "--measure.epochs", "1"]
    result = subprocess.run(
        [*command, *short], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((folder / "results.json").read_text())
    assert (results["complete"], results["runs_on"]["processes"]) == (True, [2])
    assert result.stdout.count("run folder: ") == 3
