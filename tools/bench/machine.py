"""What a measured number depends on besides the code: the machine, its load, and the images that are read."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from dalikd.pipelines.datasets.file_list import IMAGE_EXTENSIONS
from dalikd.pipelines.sources import Source
from dalikd.trainers.signals import SIGNALS
from dalikd.trainers.stopping import STARTED_BY
from dalikd.trainers.tracking import versions

_ROOT = Path(__file__).parents[2]
_GPU = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, load and commit. Take it before the work: the load average is part of it."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ("git", "--no-optional-locks", "-C", str(_ROOT))
    commit = _output(*git, "rev-parse", "--short=12", "HEAD").strip() if (_ROOT / ".git").exists() else ""
    found: dict[str, Any] = {
        **versions(device),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": (commit or "unknown") + (" + changes" if commit and _output(*git, "status", "--porcelain") else ""),
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
        lines = _output("nvidia-smi", f"--query-gpu={_GPU}", "--format=csv,noheader").splitlines()
        gpus = [dict(zip(_GPU.split(","), map(str.strip, line.split(",")), strict=False)) for line in lines]
        found |= {"cuda": torch.version.cuda, "gpus_visible": torch.cuda.device_count(), "gpus": gpus}
    return found


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def run_process(command: Sequence[str], longest: float | None = None, **options: Any) -> int | None:
    """Run a command. Whatever ends this process's wait for it ends it and its descendants too, in order if they can.

    Args:
        command: a program and its arguments.
        longest: seconds it may take.
        options: of Popen.

    Returns:
        its exit code; None where it took too long.

    Raises:
        SystemExit: a signal came, and the command has told so and ended by it.
    """
    shown = "stderr" not in options
    options["env"] = {**os.environ, **options.get("env", {}), STARTED_BY: str(os.getpid())}
    process = psutil.Popen(command, **options)
    try:
        return process.wait(longest)
    except psutil.TimeoutExpired:
        end_family(process)
        return None
    except BaseException:
        end_family(process)
        if shown and process.wait() in {128 + number for number in SIGNALS}:
            sys.exit(process.returncode)
        raise


def end_family(process: psutil.Process) -> None:
    """End a process and its descendants: five seconds for doing it in order, then at once."""
    family = [*process.children(recursive=True), process]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for member in family:
            with suppress(psutil.NoSuchProcess):
                end(member)
        family = psutil.wait_procs(family, timeout=5)[1]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_slug(device: torch.device) -> str:
    """The device as a part of a file name: cpu, or the GPU's name such as nvidia-h200."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else device.type
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """CPU time that this process, its threads and its living descendants have used so far."""
    used = 0.0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
            used += sum(process.cpu_times()[:2])
    return used


def settle(longest: float = 5.0) -> None:
    """Wait, at most so many seconds, until all processes rest: what works ahead has filled its queue."""
    ends, before, now = time.monotonic() + longest, -1.0, cpu_seconds()
    while time.monotonic() < ends and now - before > 0.01:  # one tick of the clock
        time.sleep(0.1)
        before, now = now, cpu_seconds()


def describe(source: Source) -> dict[str, Any] | None:
    """Number of a source's images, and of a sample {"mean", "median", "p95"} of width, height and, for files,
    encoded_bytes; None for those in shards or object storage."""
    from PIL import Image

    if source.shards is not None or source.store is not None:
        return None
    sides, found, count = [], {}, len(source)
    if source.arrays is not None:
        sides.append(source.arrays.shape[2:0:-1])
    else:
        paths = [Path(source.path(int(row))) for row in np.random.default_rng(0).permutation(count)[:500]]
        for path in paths:
            with Image.open(path) as image:  # reads the header alone
                sides.append(image.size)
        found["encoded_bytes"], count = [path.stat().st_size for path in paths], len(paths)
    found = dict(zip(("width", "height"), zip(*sides, strict=True), strict=True)) | found
    about = {"name": source.name, "split": source.split, "number": len(source), "sampled": count}
    spread = {"mean": np.mean, "median": np.median, "p95": lambda values: np.quantile(values, 0.95)}
    return about | {name: {word: float(of(values)) for word, of in spread.items()} for name, values in found.items()}


def read_ahead(source: Source) -> str:
    """Bring a source's files into the page cache, as far as half of the free memory holds them; a sentence on that."""
    if source.store is not None:
        return "none; objects come from their store, or from --data.cache."
    paths = [] if source.files is None else [source.path(row) for row in range(len(source))]
    paths = [Path(path) for path in (paths if source.shards is None else source.shards.paths)]
    sizes, read = [path.stat().st_size for path in paths], 0
    for path, size in zip(paths, sizes, strict=True):
        if read + size > psutil.virtual_memory().available // 2:
            break
        read += size
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return f"warm; {read / sum(sizes):.0%} of the files' bytes were read before." if paths else "no files."


def draw_images(folder: Path, count: int, width: int, height: int, classes: int = 10) -> None:
    """Write class folders of JPEGs with what photographs have for a decoder: slow gradients, hard edges, grain."""
    from PIL import Image

    random = np.random.default_rng(0)
    grain = random.normal(0, 6, (height, width, 1))
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + grain
        top, left = random.integers(0, (height // 2, width // 2))
        pixels[top : top + height // 3, left : left + width // 3] += random.integers(-90, 90, 3)
        path = folder / f"class{number % classes}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def repeat_images(folder: Path, target: Path, *, count: int = 200_000) -> None:
    """Copy the images of class folders under new names, again and again, for sets larger than the page cache.

    Args:
        folder: class folders with images.
        target: a folder that does not exist, or is empty; it gets the same class folders.
        count: images wanted.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no images: name a folder of class folders with images")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name another folder")
    for number in range(count):
        source = paths[number % len(paths)]
        copy = target / source.relative_to(folder).with_stem(f"{source.stem}-{number // len(paths)}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
