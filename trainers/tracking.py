"""The run folder: config.yaml, log.jsonl, TensorBoard and other trackers, results.json."""

import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dalikd.kd.known_weights import file_sha256
from dalikd.pipelines.files import Appended, names_in, remove_litter, write_atomically
from dalikd.pipelines.hardware import package_versions
from dalikd.pipelines.lock import FolderLock, only_writer
from dalikd.pipelines.shards.tfrecord import frame
from dalikd.trainers.trackers import KEPT, Trackers

__all__ = ["LOCK", "RunFolder", "alone", "check_writable", "run_path", "versions", "write_json"]


LOCK = ".lock"  # in a folder that one call writes
_BEGUN = {LOCK, "last", "best", "log.jsonl", "tensorboard", KEPT}  # what may be there before config.yaml
_CUT_OFF = 1 << 62  # the step of a line that a kill has cut off


def run_path(options: Any, command: str) -> Path:
    """The folder that a run of these options is written to, or that of several students."""
    name = f"{command}-{options.data.name}-{options.model}"
    if getattr(options, "students", None) is not None:
        name = f"students-{options.data.name}"
    return Path(options.resume or options.output or f"runs/{name}")


class RunFolder:
    """Files of one run. Only the main process writes.

    Args:
        path: the folder.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self._writes = path, writes
        self.lock: FolderLock | None = None  # of a folder that was locked for the run
        self._log: Appended | None = None
        self._board: Appended | None = None
        self._trackers: Trackers | None = None

    @property
    def state_file(self) -> Path:
        """What a run is resumed from."""
        return self.path / "last" / "trainer.pt"

    @property
    def previous_state_file(self) -> Path:
        """The state that was saved before it, for when it cannot be read."""
        return self.path / "last" / "trainer-previous.pt"

    def has_state(self) -> bool:
        """Whether there is something to go on from."""
        return self.state_file.is_file() or self.previous_state_file.is_file()

    def check_there(self) -> None:
        """Raises OSError: the folder was removed while the run wrote into it."""
        if self.lock is not None:
            self.lock.check()

    def check_new(self, overwrite: bool) -> None:
        """Refuse a folder that holds anything, unless told to overwrite a run.

        Raises:
            ValueError: the folder holds a run, or something else, or cannot be written.
        """
        check_writable("--output", self.path / "config.yaml")
        found = names_in(self.path)
        # begun by another call just now, which holds the lock, or by one that was killed or stopped at once
        kept = (file for file in self.path.rglob("*") if file.is_file() and file.stat().st_size)
        if found <= _BEGUN and (LOCK in found or not any(kept)):
            return
        if "config.yaml" not in found:
            raise ValueError(f"--output {self.path} holds other files and is not touched: name another folder")
        if not overwrite:
            raise ValueError(
                f"--output {self.path} holds a run: go on with it by --resume {self.path}, name another folder, "
                "or replace it with --overwrite true"
            )

    def start(
        self, config: dict[str, Any], resumed_step: int | None, trackers: Sequence[str] = ("tensorboard",)
    ) -> None:
        """Create the folder, write config.yaml, open the logs; on resuming drop log lines after that step.

        Args:
            config: the options of the run as plain values.
            resumed_step: the last step of the state that it goes on from; None: it is a new run.
            trackers: names of those that get what log.jsonl does.
        """
        if not self._writes:
            return
        for folder in (self.path, self.path / "last", self.path / "best"):
            remove_litter(folder)
        lines: list[bytes] = []
        log, done = self.path / "log.jsonl", None if resumed_step is None else (resumed_step, False)
        if resumed_step is None:
            self._clear()
        elif log.exists():
            every = log.read_bytes().splitlines()
            lines = [line for line in every if _step_of(line) <= resumed_step]
            done = max(
                [(_step_of(line), b'"val"' in line) for line in every if _step_of(line) < _CUT_OFF], default=done
            )
        write_atomically(log, b"".join(line + b"\n" for line in lines))
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        self._log = Appended(log)
        if "tensorboard" in trackers:
            self._board = self._begin_board(resumed_step)
        if others := [name for name in dict.fromkeys(trackers) if name != "tensorboard"]:
            self._trackers = Trackers(others, self.path, config, done)

    def _begin_board(self, resumed_step: int | None) -> Appended:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        # written here and not by TensorBoard's writer, whose thread would meet a full disk by itself
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        board = Appended(self.path / "tensorboard" / name)
        begin = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if resumed_step is not None:  # what comes after that step, in the files before, is not shown
            status = SessionLog(status=SessionLog.START)
            begin.append(Event(wall_time=time.time(), step=resumed_step + 1, session_log=status))
        board.append(b"".join(frame(event.SerializeToString()) for event in begin))
        return board

    def log(self, step: int, entry: dict[str, Any]) -> None:
        """Append one line to log.jsonl and hand the numbers of it to the trackers, where a curve has one value a
        step."""
        if self._log is None:
            return
        self.check_there()
        self._log.append((json.dumps({"step": step, **entry}) + "\n").encode())
        # an evaluation's epoch is that of the interval before it
        values = {name: value for name, value in _flat(entry) if name != "epoch" or "val" not in entry}
        if self._board is not None:
            from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
            self._board.append(frame(event.SerializeToString()))
        if self._trackers is not None:
            self._trackers.log(step, "val" in entry, values)

    def results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        if self._writes:
            self.check_there()
            write_json(self.path / "results.json", results)

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each weights file in the folder, by its path there; nothing on processes that do not write."""
        files = sorted(self.path.glob("*/*.safetensors")) if self._writes else []
        return {file.relative_to(self.path).as_posix(): file_sha256(file) for file in files}

    def close(self) -> None:
        """Close the logs."""
        for file in (self._log, self._board):
            if file is not None:
                file.close()
        if self._trackers is not None:
            self._trackers.close()

    def _clear(self) -> None:
        for old in (
            *self.path.glob("tensorboard/events*"),
            *self.path.glob("*/trainer*.pt"),
            *self.path.glob("nan-step*.pt"),
            *self.path.glob("*/*.safetensors"),
        ):
            old.unlink()
        for name in ("results.json", KEPT):
            (self.path / name).unlink(missing_ok=True)


@contextmanager
def alone(
    places: Sequence[tuple[str, Path]], accelerator: Accelerator, option: str = "--output"
) -> Iterator[list[FolderLock]]:
    """Keep other calls from writing somewhere. The main process holds the locks, and all processes enter together.

    Args:
        places: what is written, for messages, and the file that is locked for it.
        accelerator: joins the processes.
        option: that names them.

    Raises:
        ValueError: another call writes there, in every process.
    """
    with ExitStack() as held:
        locks, refused = list[FolderLock](), [""]
        try:
            if accelerator.is_main_process:
                locks = [held.enter_context(only_writer(path, f"{option} {place}")) for place, path in places]
        except (ValueError, OSError) as error:
            refused = [str(error)]
        if broadcast_object_list(refused)[0]:
            raise ValueError(refused[0])
        yield locks


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


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _CUT_OFF  # such a line goes


def _flat(entry: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for name, value in entry.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            pairs.append((prefix + name, float(value)))
    return pairs
