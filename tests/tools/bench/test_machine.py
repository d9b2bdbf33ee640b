import subprocess
import sys
import time

import pytest
import torch

from dalikd.tools.bench import machine

CPU = torch.device("cpu")


def test_environment_names_machine_and_versions():
    found = machine.environment(CPU)
    assert found["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert found["cores_available"] == machine.cores() >= 1
    assert found["memory_gib"] > 0
    assert len(found["load_average"]) == 3
    assert found["time"].startswith(found["date"])
    assert found["cpu"]
    assert "gpus" not in found


def test_the_commit_tells_of_changes(monkeypatch, tmp_path):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine.environment(CPU)["commit"] == "unknown"  # outside a clone
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = machine.environment(CPU)["commit"]
    assert len(clean) == 12
    (tmp_path / "new").write_text("")
    assert machine.environment(CPU)["commit"] == f"{clean} + changes"


def test_gpus_are_described_by_nvidia_smi(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    line = "NVIDIA H200, 580.1, 143771 MiB, 700.00 W, 345 MHz, 1980 MHz, 2619 MHz, 3201 MHz\n"
    monkeypatch.setattr(machine, "_output", lambda *_: line + line)
    assert [(gpu["power.limit"], gpu["clocks.max.mem"]) for gpu in machine._gpus()] == [("700.00 W", "3201 MHz")] * 2
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert machine._gpus() == []


def test_a_device_becomes_part_of_a_file_name(monkeypatch):
    assert machine.device_slug(CPU) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert machine.device_slug(torch.device("cuda", 0)) == "nvidia-h100-80gb-hbm3"


def test_cpu_seconds_count_this_process_and_its_children():
    before = machine.cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('x', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert machine.cpu_seconds() - before >= 0.28
        child.communicate(b"\n")


def test_settling_waits_for_children_and_not_for_ever():
    started = time.monotonic()
    machine.settle()
    assert time.monotonic() - started < 2
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        time.sleep(0.3)
        started = time.monotonic()
        machine.settle(longest=0.6)
        assert time.monotonic() - started >= 0.6
        child.kill()


@pytest.mark.gpu
def test_environment_of_a_gpu():
    found = machine.environment(torch.device("cuda", 0))
    assert found["cuda"] == torch.version.cuda
    assert found["gpus_visible"] == torch.cuda.device_count()
