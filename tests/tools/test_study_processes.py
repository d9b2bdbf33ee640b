"""A study in processes of its own: killed at any moment, and dealt over shards, it ends as one that ran in peace."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dalikd.tools.study import read_study
from dalikd.trainers.study.ready import make_ready

pytestmark = pytest.mark.slow

CELLS = 1 + 1 + 2 + 2  # teacher, student alone, T. stddev with and without a student, students


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
            "augmentation": ["mixup", "cutmixpick_student"],
            "seeds": [0],
        },
    }
    path = tmp_path_factory.mktemp("config") / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def start(config: Path, start_forked: Any) -> Any:
    """Starts a process of a study, which prints beside the study's folder."""
    return lambda folder, number, *more: start_forked(
        folder.with_name(f"{folder.name}{number}"), "study", "--config", config, "--output", folder, *more
    )


@pytest.fixture(scope="module")
def expected(start: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a study that is never interrupted, in a process with as many threads as the others have."""
    folder = tmp_path_factory.mktemp("peace") / "study"
    start(folder, 0).end()
    return _results(folder)


def _results(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    del results["runs_on"]
    return results


def _files(folder: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))  # passes over what just vanished


def _kill_later(process: Any, folder: Path, files: int, delay: float) -> None:
    """Kill -9 a moment after so many files have been written."""
    deadline = time.monotonic() + 120
    while _files(folder) < files and process.runs() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    assert process.kill() == -signal.SIGKILL


def test_a_study_killed_at_random_moments_ends_the_same_by_two_equal_calls_at_once(start, expected, tmp_path):
    """Each of the runs that are left is made once."""
    folder, chance = tmp_path / "study", random.Random(5)
    for number in range(2):
        _kill_later(start(folder, number), folder, _files(folder) + chance.randrange(3, 40), chance.uniform(0, 0.3))
    done = sum(json.loads(path.read_text())["finished"] for path in folder.glob("*/**/results.json"))
    printed = [call.end() for call in [start(folder, number, "--poll_seconds", "0.1") for number in (2, 3)]]
    assert sum(out.count("run folder: ") for out in printed) == CELLS - 2 - done
    assert any(f"/{CELLS}]" in out for out in printed)
    assert _results(folder) == expected


def test_two_shards_make_what_one_makes(config, start, expected, tmp_path):
    """The shard without the teacher starts first, does what it can, and waits."""
    folder = tmp_path / "study"
    dealt = make_ready(read_study(["--config", str(config), "--shard", "1/2"])).shards["teachers/resnet14"]
    first = start(folder, 1, "--shard", f"{3 - dealt}/2", "--poll_seconds", "0.1")
    while "waiting for teachers/resnet14" not in first.out:
        assert first.runs(), first.err
        time.sleep(0.02)
    assert first.out.splitlines()[-1].endswith(f"(shard {dealt})")
    second = start(folder, 2, "--shard", f"{dealt}/2", "--poll_seconds", "0.1")
    outputs = [first.end(), second.end()]
    assert outputs[0].count("waiting for teachers/resnet14") == 1
    assert any("written: " in out for out in outputs)
    assert sum(out.count("run folder: ") for out in outputs) == CELLS - 2
    assert _results(folder) == expected


def test_all_processes_of_a_launcher_do_the_same_runs(config, start_joined, tmp_path):
    folder = tmp_path / "study"
    short = ["--augmentation", "mixup", "--seeds", "0", "--epochs", "1", "--measure.epochs", "1"]
    calls = start_joined(2, tmp_path / "printed", "study", "--config", config, "--output", folder, *short)
    printed = [call.end() for call in calls]
    results = json.loads((folder / "results.json").read_text())
    assert (results["complete"], results["runs_on"]["processes"]) == (True, [2])
    assert sum(out.count("run folder: ") for out in printed) == 3
