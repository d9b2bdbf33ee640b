"""The run folder: config.yaml, log.jsonl, TensorBoard, results.json."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from dalikd.kd.known_weights import file_sha256
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.hardware import package_versions

__all__ = ["RunFolder", "check_writable", "versions", "write_json"]


class RunFolder:
    """Files of one run. Only the main process writes.

    Args:
        path: the folder.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self._writes = path, writes
        self._log: Any = None
        self._board: Any = None

    @property
    def state_file(self) -> Path:
        """What a run is resumed from."""
        return self.path / "last" / "trainer.pt"

    def check_new(self, overwrite: bool) -> None:
        """Refuse a folder that holds anything, unless told to overwrite a run.

        Raises:
            ValueError: the folder holds a run, or something else, or cannot be written.
        """
        check_writable("--output", self.path / "config.yaml")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not (self.path / "config.yaml").exists():
            raise ValueError(f"--output {self.path} holds other files and is not touched: name another folder")
        if not overwrite:
            raise ValueError(
                f"--output {self.path} holds a run: go on with it by --resume {self.path}, name another folder, "
                "or replace it with --overwrite true"
            )

    def start(self, config: dict[str, Any], resumed_step: int | None) -> None:
        """Create the folder, write config.yaml, open the logs; on resuming drop log lines after that step."""
        if not self._writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        log = self.path / "log.jsonl"
        if resumed_step is None:
            self._clear()
        elif log.exists():
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if _step_of(line) <= resumed_step]
        write_atomically(log, "".join(line + "\n" for line in lines).encode())
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        self._log = log.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(self.path / "tensorboard"), purge_step=None if resumed_step is None else resumed_step + 1
        )

    def log(self, step: int, entry: dict[str, Any]) -> None:
        """Append one line to log.jsonl and the numbers of it to TensorBoard, where a curve has one value a step."""
        if self._log is None:
            return
        self._log.write(json.dumps({"step": step, **entry}) + "\n")
        self._log.flush()
        for name, value in _flat(entry):
            if name != "epoch" or "val" not in entry:  # an evaluation's epoch is that of the interval before it
                self._board.add_scalar(name, value, step)

    def results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        if self._writes:
            write_json(self.path / "results.json", results)

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each weights file in the folder, by its path there; nothing on processes that do not write."""
        files = sorted(self.path.glob("*/*.safetensors")) if self._writes else []
        return {file.relative_to(self.path).as_posix(): file_sha256(file) for file in files}

    def close(self) -> None:
        """Close the logs."""
        if self._log is not None:
            self._log.close()
            self._board.close()

    def _clear(self) -> None:
        for old in (
            *self.path.glob("tensorboard/events*"),
            *self.path.glob("*/trainer.pt"),
            *self.path.glob("nan-step*.pt"),
            *self.path.glob("*/*.safetensors"),
        ):
            old.unlink()
        (self.path / "results.json").unlink(missing_ok=True)


def versions(device: torch.device) -> dict[str, str]:
    """What a result depends on besides the config: versions, machine, date."""
    packages = ("torch", "torchvision", "timm", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        **package_versions(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def check_writable(option: str, path: Path) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        ValueError: the path is a folder, or lies where nothing can be created.
    """
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option}: {path} cannot be written; name a place that can")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 1 << 62  # a line cut off by a kill goes


def _flat(entry: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for name, value in entry.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            pairs.append((prefix + name, float(value)))
    return pairs
