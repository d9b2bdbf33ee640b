"""What `dalikd doctor` looks at where no data set is named: packages, GPU, cores, decoding, and a training run."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from packaging.requirements import Requirement
from PIL import Image

from dalikd.pipelines.datasets.file_list import cache_folder
from dalikd.pipelines.doctor import Decoder
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.hardware import PLAIN, check_libraries, decoding_on
from dalikd.pipelines.loader import default_threads
from dalikd.trainers.launch import start
from dalikd.trainers.signals import signal_name
from dalikd.trainers.tracking import check_writable, versions

__all__ = ["examine_installation"]

_LEAST_SPACE = 1 << 30  # bytes, for what a run writes
_TRAINING_SECONDS = 180  # that two steps may take: hundreds of times as long as they do
_COLOURS = 12.0  # of 255, that decoders may be apart on average


def examine_installation() -> dict[str, Any]:
    """Look whether dalikd works on this machine, and print what is found. Nothing is left behind.

    Returns:
        "versions", "gpus", "cpu", "cache", "decode" and "training", and "faults", what is to be mended, in lines.
    """
    faults = _wrong_packages()
    try:
        device = start("auto", "fp32").device
    except ValueError as error:  # a GPU that torch cannot see
        faults.append(str(error))
        device = torch.device("cpu")
    with TemporaryDirectory(prefix="dalikd-doctor-") as folder:
        training = _begin_training(Path(folder), device)  # in a process of its own, meanwhile
        found: dict[str, Any] = {"versions": versions(device), "gpus": _gpus(faults)}
        print("versions: " + ", ".join(f"{name} {number}" for name, number in found["versions"].items()))
        print(
            "GPU: "
            + ("; ".join(map("{name}, {memory:.1f} GiB, {free:.1f} free".format_map, found["gpus"])) or "no GPU")
        )
        found["cpu"] = cpu = {
            "cores": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)),
            "torch_threads": torch.get_num_threads(),
            "dali_threads": default_threads(),
            "memory": psutil.virtual_memory().total / 2**30,
            "free": psutil.virtual_memory().available / 2**30,
        }
        print(
            "CPU: {cores} cores, {usable} for this process; torch computes with {torch_threads} thread(s), DALI "
            "decodes with {dali_threads}; memory {memory:.1f} GiB, {free:.1f} free".format(**cpu)
        )
        found["cache"] = _cache(faults)
        print("cache: {folder}, {free:.1f} GiB free; umask {umask}".format(**found["cache"]))
        found["decode"] = {"cpu": _decode(torch.device("cpu"), faults)}
        found["decode"]["gpu"] = "no GPU" if device.type == "cpu" else _decode(device, faults)
        print("decode: on the CPU {cpu}, on the GPU {gpu}".format(**found["decode"]))
        found["training"] = _end_training(*training, faults)
        print(f"training: two steps on {device.type}: {found['training']}")
    return {**found, "faults": faults, "fine": not faults}


def _wrong_packages() -> list[str]:
    """Packages that dalikd does not work with, as it was installed."""
    try:
        needs = [Requirement(line) for line in requires("dalikd") or ()]
    except PackageNotFoundError:  # it is run from its source
        return []
    wrong = []
    for need in needs:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(need.name)
        except PackageNotFoundError:
            there = ""
        if not there or not need.specifier.contains(there, prereleases=True):
            here = f"{there} is installed" if there else "it is not installed"
            wrong.append(f"dalikd needs {need.name}{need.specifier}, and {here}: pip install '{need}'")
    return wrong


def _gpus(faults: list[str]) -> list[dict[str, Any]]:
    """Those that torch sees, with their memory in GiB."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, memory = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "memory": memory / 2**30, "free": free / 2**30})
    if gpus:
        try:
            check_libraries()
        except ValueError as error:
            faults.append(str(error))
    return gpus


def _cache(faults: list[str]) -> dict[str, Any]:
    """The folder of what is remembered of data sets, and how files come to be there."""
    folder = cache_folder()
    try:
        check_writable("the cache folder (DALIKD_CACHE)", folder / "x")
    except ValueError as error:
        faults.append(str(error))
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if free < _LEAST_SPACE:
        faults.append(f"{nearest} has {free / 2**20:.0f} MiB left: free some, or name another disk with DALIKD_CACHE")
    umask = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)
    if umask is not None and int(umask[1], 8) & 0o700:
        faults.append(f"the umask {umask[1]} keeps you out of what you write yourself: umask 022")
    return {"folder": str(folder), "free": free / 2**30, "umask": umask[1] if umask else "unknown"}


def _image() -> tuple[np.ndarray, bytes]:
    """Pixels without fine detail, [96, 128, 3], and the same as a JPEG."""
    y, x = np.mgrid[:96, :128]
    pixels = np.stack([x, 2 * y, 127 + 100 * np.sin(x / 40) * np.cos(y / 30)], 2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return pixels, buffer.getvalue()


class _Encoded:
    """Images that are not in memory, for `decoding_on`."""

    arrays = None


def _decode(device: torch.device, faults: list[str]) -> str:
    """Decode a JPEG as training does. Returns how it went."""
    expected, encoded = _image()
    started = time.perf_counter()
    try:
        how = PLAIN if device.type == "cpu" else decoding_on(_Encoded(), device)
        decoder = Decoder(1, device, how)
        (pixels,) = decoder.decode([encoded])
        decoder.close()
    except (RuntimeError, ValueError, OSError) as error:
        pixels = " ".join(str(error).split())[:300]
    if isinstance(pixels, str):
        words = pixels
    elif pixels.shape != expected.shape or np.abs(pixels.astype(int) - expected).mean() > _COLOURS:
        words = "its pixels are others than the image's"
    else:
        return f"fine ({time.perf_counter() - started:.1f} s)"
    where = "CPU" if device.type == "cpu" else "GPU"
    faults.append(f"DALI does not decode a JPEG on the {where} ({words}): install it anew, as setup.py names it")
    return f"it fails: {words}"


def _begin_training(folder: Path, device: torch.device) -> tuple[subprocess.Popen[str], float]:
    """Start a run of two steps, which a native crash may end, in a process of its own."""
    _, encoded = _image()
    for split, images in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            for number in range(images):
                write_atomically(folder / "data" / split / name / f"{number}.jpg", encoded, sync=False)
    words = ["--data.root", folder / "data", "--data.image_size", 32, "--model", "resnet8", "--epochs", 1]
    words += ["--batch_size", 8, "--mix.group", 8, "--compile", "off", "--device", device.type]
    command = [sys.executable, "-m", "dalikd.tools.train", *map(str, words), "--output", str(folder / "run")]
    environment = {**os.environ, "DALIKD_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ), time.perf_counter()


def _end_training(process: subprocess.Popen[str], started: float, faults: list[str]) -> str:
    """How the run went."""
    try:
        _, said = process.communicate(timeout=_TRAINING_SECONDS)
        code = process.returncode
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        words = f"signal {-code} ({signal_name(-code)}) has ended it" if code < 0 else last
    except subprocess.TimeoutExpired:
        code, words = 1, f"not done after {_TRAINING_SECONDS} s"
    finally:
        process.kill()
        process.wait()
    if code == 0:
        return f"fine ({time.perf_counter() - started:.1f} s with its start)"
    faults.append(f"a training run of two steps fails: {words}")
    return f"it fails: {words}"
