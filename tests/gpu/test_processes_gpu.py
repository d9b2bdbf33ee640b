"""Two processes, each with a GPU of its own, exchanging by NCCL: what they train, and how they are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dalikd.kd.backbones import create_model
from dalikd.tools import distill

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("two_gpus")]

DEVICE = "cuda"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture
def common(cifar, tmp_path):
    """Everything but student and run folder; mix groups that two processes share without cutting one."""
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "teacher.pt")
    teacher = ["--teacher.name", "resnet8", "--teacher.weights", str(tmp_path / "teacher.pt")]
    sizes = ["--batch_size", "64", "--mix.group", "16", "--optimizer.lr", "0.01", "--schedule.name", "constant"]
    return [*cifar, *teacher, *sizes, "--device", DEVICE, "--compile", "off"]


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def _launch(words: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        [*LAUNCHER, "-m", "dalikd.tools.distill", *words],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize("augmentation", ["identity", "cutmixpick_teacher"])
@pytest.mark.parametrize("model", ["resnet8", "timm:test_efficientnet"])
def test_two_gpus_with_shared_statistics_train_as_one_does(common, tmp_path, model, augmentation):
    """Batch norms of timm hold an activation too, which sharing statistics must leave in."""
    words = [*common, "--model", model, "--augmentation", augmentation, "--epochs", "2"]
    distill.main([*words, "--output", str(tmp_path / "one")])
    _launch([*words, "--sync_bn", "true", "--output", str(tmp_path / "two")])
    one, two = _results(tmp_path / "one"), _results(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["steps"] == two["steps"] == 10
    for split in ("train", "val"):
        assert two["last"][split]["loss"] == pytest.approx(one["last"][split]["loss"], rel=2e-2)
    assert two["last"]["t_stddev"] == pytest.approx(one["last"]["t_stddev"], rel=1e-3)
    assert two["last"]["val"]["images"] == one["last"]["val"]["images"] == 40
    ours, theirs = (load_file(tmp_path / name / "last/student.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_gpus_train_with_statistics_of_their_own(common, tmp_path, precision):
    """The last batch of an evaluation is short and shared unevenly."""
    words = [*common, "--model", "resnet8", "--augmentation", "mixup", "--epochs", "4", "--precision", precision]
    _launch(
        [*words, "--data.val_limit", "33", "--ema", "0.9", "--clip_grad_norm", "1", "--output", str(tmp_path / "two")]
    )
    results = _results(tmp_path / "two")
    entries = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    losses = [entry["epoch_train"]["loss"] for entry in entries if "epoch_train" in entry]
    assert results["finished"]
    assert results["last"]["val"]["images"] == 33
    assert losses[-1] < losses[0]


def _all_children(launcher: psutil.Process) -> None:
    launcher.send_signal(signal.SIGTERM)


def _one_child(launcher: psutil.Process) -> None:
    """The one that is not the main process: the others do not know."""
    (child,) = (one for one in launcher.children(recursive=True) if _rank(one) == "1")
    child.send_signal(signal.SIGTERM)


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def _stop_and_resume(words: list[str], run_folder: Path, stop: Callable[[psutil.Process], None]) -> dict[str, int]:
    """Distil on two processes, have them stopped once 20 steps are done, and go on to the end. The steps "seen" before
    it was stopped, "saved", and in the end ("steps")."""
    distill = [*LAUNCHER, "-m", "dalikd.tools.distill"]
    log, seen = run_folder / "log.jsonl", 0
    first = psutil.Popen([*distill, *words, "--log_every", "10", "--output", str(run_folder)])
    while first.poll() is None and seen < 20:
        time.sleep(0.05)
        lines = log.read_text().splitlines() if log.exists() else []
        seen = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    if first.poll() is None:
        stop(first)
    first.wait()
    saved = torch.load(run_folder / "last/trainer.pt", map_location="cpu", weights_only=False)["step"]
    subprocess.run([*distill, "--resume", str(run_folder)], check=True)
    results = _results(run_folder)
    assert results["finished"]
    return {"seen": seen, "saved": saved, "steps": results["steps"]}


@pytest.mark.parametrize("stop", [_all_children, _one_child])
def test_a_signal_stops_all_at_one_step_and_the_run_goes_on(common, tmp_path, stop):
    words = [*common, "--model", "resnet8", "--augmentation", "cutmixpick_teacher", "--eval_every", "1000"]
    found = _stop_and_resume([*words, "--epochs", "100"], tmp_path / "run", stop)
    assert found["seen"] <= found["saved"] < found["steps"] == 500
