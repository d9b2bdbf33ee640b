import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from dalikd.trainers import launch
from dalikd.trainers.launch import autocast_type, model_type, start


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("precision", "mixed", "compute", "kept_in"),
    [
        ("fp32", "no", None, torch.float32),
        ("tf32", "no", None, torch.float32),
        ("fp64", "no", None, torch.float64),
        ("bf16", "bf16", torch.bfloat16, torch.float32),
    ],
)
def test_precision_decides_types(precision, mixed, compute, kept_in):
    accelerator = start("cpu", precision)
    assert accelerator.device.type == "cpu"
    assert accelerator.mixed_precision == mixed
    assert autocast_type(precision) == compute
    assert model_type(precision) == kept_in


def test_commands_of_one_process_may_differ_in_precision():
    assert start("cpu", "bf16").mixed_precision == "bf16"
    assert start("cpu", "fp32").mixed_precision == "no"


def test_fp32_is_true_float32():
    start("cpu", "tf32")
    assert torch.backends.cuda.matmul.allow_tf32
    start("cpu", "fp32")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def _exists(path: Path, *, visible: tuple[str, ...], real=Path.exists) -> bool:
    return str(path) in visible or real(path)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_see_is_not_ignored(monkeypatch, device):
    monkeypatch.setattr(Path, "exists", lambda path: _exists(path, visible=("/dev/nvidia0",)))
    with pytest.raises(
        ValueError, match=r"has a GPU .* cannot see .*; driver: .*Update the driver.* or use --device cpu"
    ):
        start(device, "fp32")
    assert start("cpu", "fp32").device.type == "cpu"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    message = r"^4 processes .* torch sees 2 GPU\(s\), .* torchrun --nproc_per_node 2, or use --device cpu$"
    with pytest.raises(ValueError, match=message):
        start(device, "fp32")


@pytest.mark.usefixtures("no_gpu")
def test_the_driver_is_named(monkeypatch):
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02\nGCC version: 10\n"
    real = Path.read_text
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in ("/dev/nvidia0", "/proc/driver/nvidia/version"))
    monkeypatch.setattr(Path, "read_text", lambda path, **how: text if "nvidia" in str(path) else real(path, **how))
    reason = r"too old \(found version 11040\); CUDA_VISIBLE_DEVICES is '0'\)"
    driver = r"driver: NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02\. Update"
    with pytest.raises(ValueError, match=f"{reason}; {driver}"):
        start("auto", "fp32")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("device", "precision", "environment", "message"),
    [
        ("cuda", "fp32", {}, "--device cuda: this machine has no CUDA device; use --device cpu"),
        ("cpu", "fp16", {}, "--precision fp16 needs a GPU"),
        ("auto", "fp16", {}, "--precision fp16 needs a GPU"),
        (
            "cpu",
            "fp32",
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "--precision fp32, but ACCELERATE_MIXED_PRECISION is bf16",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_refused(monkeypatch, device, precision, environment, message):
    monkeypatch.setattr(Path, "exists", lambda path: _exists(path, visible=()) and str(path) != "/dev/nvidia0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start(device, precision)


def test_the_launchers_word_against_the_gpu_is_a_conflict(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="--device cuda, but ACCELERATE_USE_CPU is set"):
        start("cuda", "fp32")


@pytest.mark.parametrize("asked", [["--num_processes", "2"], ["--num-processes=2"], []])
def test_one_process_of_several_is_refused(monkeypatch, asked):
    """What `accelerate launch --cpu --num_processes 2` sets for the one process that it starts."""
    launcher = SimpleNamespace(cmdline=lambda: ["accelerate", "launch", *asked, "--cpu", "-m", "dalikd.tools.train"])
    monkeypatch.setattr("psutil.Process.parent", lambda _: launcher)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data.root", "my images"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="dalikd.tools.train"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert start("cpu", "fp32").num_processes == 1  # one was asked for
    monkeypatch.setenv("MASTER_PORT", "29500")
    number = "2" if asked else "NUMBER"
    command = f"torchrun --nproc_per_node {number} -m dalikd.tools.train --data.root 'my images'"
    with pytest.raises(ValueError, match=f"one process on the CPU, and several were asked for: .* {command}$"):
        start("cpu", "fp32")


@pytest.mark.gpu
def test_auto_takes_the_gpu():
    assert start("auto", "fp32").device.type == "cuda"


FAULTS = """
import resource, sys, torch
from dalikd.trainers.launch import start

if sys.argv[1] == "start":
    start("cpu", "fp32")
torch.set_num_threads(1)
total = torch.zeros(())
def work():
    for _ in range(10):
        total.add_(torch.ones(64, 3, 224, 224).sum())  # 38 MB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.full
def test_freed_batches_are_not_given_back_to_the_system(monkeypatch):
    """Each of ten batches of 38 MB has some 9,400 pages: touched anew, they would be as many faults."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("start") < 2_000
    assert faults("plain") > 20_000


def test_processes_that_torchrun_starts_again_do_not_meet_those_before(monkeypatch):
    """Its store still has the addresses of these."""
    store, joined = launch.TCPStore("127.0.0.1", 0, 1, is_master=True), []
    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "init_process_group", lambda _, **others: joined.append(others["store"]))
    for count in ("0", "2"):  # at the first start Accelerate does it
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        launch._join_again("gloo")
    monkeypatch.delenv("RANK")  # one that these start for themselves joins nobody
    launch._join_again("gloo")
    (given,) = joined
    given.set("address", "of this start")
    assert (store.check(["start 2/address"]), store.check(["address"])) == (True, False)


def test_what_several_nodes_need_for_it_is_said(monkeypatch, capsys):
    names = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0", "GROUP_WORLD_SIZE": "2"}
    for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}).items():
        monkeypatch.setenv(name, value)
    launch._join_again("gloo")
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node" in capsys.readouterr().err
