"""What a measured number depends on besides the code, and how busy the machine is."""

import os
import platform
import shutil
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from dalikd.trainers.tracking import versions

__all__ = ["cores", "cpu_seconds", "device_slug", "environment", "settle", "synchronize"]

_ROOT = Path(__file__).parents[2]
_GPU_FIELDS = (
    *("name", "driver_version", "memory.total", "power.limit"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, load and commit. Take it before the work: the load average is part of it."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        **versions(device),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "kernel": platform.release(),
        "cpu": (models or [platform.machine()])[0],
        "cores": os.cpu_count(),
        "cores_available": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "gpus_visible": torch.cuda.device_count(), "gpus": _gpus()}
    return found


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_slug(device: torch.device) -> str:
    """The device as a part of a file name: cpu, or the GPU's name such as nvidia-h200."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower()
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """CPU time that this process, its threads and its living descendants have used so far."""
    used = 0.0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it has ended in the meantime
            continue
        used += times.user + times.system
    return used


def settle(longest: float = 5.0) -> None:
    """Wait, at most so many seconds, until all processes rest: what works ahead has filled its queue."""
    ends, before = time.monotonic() + longest, cpu_seconds()
    while time.monotonic() < ends:
        time.sleep(0.1)
        now = cpu_seconds()
        if now - before <= 0.01:  # one tick of the clock
            return
        before = now


def _gpus() -> list[dict[str, str]]:
    """Each GPU of the machine as nvidia-smi describes it; none where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    lines = _output("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader").splitlines()
    return [dict(zip(_GPU_FIELDS, (value.strip() for value in line.split(",")), strict=False)) for line in lines]


def _commit() -> str:
    """The commit of the code, "+ changes" where files differ from it, or "unknown" outside a clone."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    git = ("git", "--no-optional-locks", "-C", str(_ROOT))
    commit = _output(*git, "rev-parse", "--short=12", "HEAD").strip() or "unknown"
    return commit + (" + changes" if _output(*git, "status", "--porcelain") else "")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
