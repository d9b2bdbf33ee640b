"""Runs that are started again after a crash: by `--restarts`, or by torchrun's `--max_restarts`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from dalikd.trainers.checkpoint import read_state
from dalikd.trainers.signals import SIGNALS, Stopped, obeying, say, signal_name
from dalikd.trainers.stopping import STARTED_BY
from dalikd.trainers.tracking import run_path

__all__ = ["RESTARTED", "after_launcher", "going_on", "supervise"]

#: commands that write a run folder, which a new process goes on with
RESTARTED = ("train", "distill", "mutual", "probe")


def supervise(command: str, words: Sequence[str], options: Any) -> int:
    """Run a command in a process of its own, which is started again from its last saved state after a crash (a signal
    that nobody sends to ask for an end), up to `options.restarts` times.

    Not after a mistake of the user, which would come again, and not after Ctrl-C or another of `SIGNALS`, which are
    handed on to it.

    Returns:
        the exit code of the last of these processes; 128 + n where signal n has ended it.

    Raises:
        ValueError: a launcher has started this process, and would not know of the new one.
    """
    if {"TORCHELASTIC_RUN_ID", "RANK"} & os.environ.keys():
        raise ValueError(
            f"--restarts {options.restarts} is for a run that is started without a launcher: torchrun starts all its "
            f"processes again itself, torchrun --max_restarts {options.restarts}, and they go on by themselves"
        )
    folder, extra = run_path(options, command), list[str]()
    with obeying("note") as asked:
        for attempt in range(options.restarts + 1):
            killed = _memory_kills()
            arguments = [*words, *extra, "--restarts", "0"]
            child = subprocess.Popen(
                [sys.executable, "-m", f"dalikd.tools.{command}", *arguments],
                env={**os.environ, STARTED_BY: str(os.getpid())},
            )
            code = _wait(child, lambda: asked.number)
            if code >= 0 or -code in SIGNALS or asked.number:
                return code if code >= 0 else 128 - code
            cause = f"process {child.pid} was ended by signal {-code} ({signal_name(-code)}"
            cause += ", the machine ran out of memory)" if _memory_kills() > killed and code == -signal.SIGKILL else ")"
            if attempt == options.restarts:
                say(f"dalikd {command}: {cause}, and --restarts {options.restarts} allows no more")
                return 128 - code
            extra, where = going_on(folder)
            say(f"dalikd {command}: {cause}: restart {attempt + 1} of {options.restarts}, {where}")
    raise AssertionError


def _wait(child: subprocess.Popen[bytes], number: Callable[[], int]) -> int:
    """Its exit code. Every request of a signal is handed on: the second one ends it at once, the third one both."""
    sent = False
    while True:
        try:
            while (code := child.poll()) is None:
                if number() and not sent:
                    sent = True
                    child.send_signal(number())
                time.sleep(0.1)
            return code
        except Stopped as again:
            child.send_signal(again.signal)


def going_on(folder: Path, since: float = 0.0) -> tuple[list[str], str]:
    """What to add to a command line so that it goes on with the run that the same command has begun.

    Args:
        folder: of the run.
        since: seconds of the clock; a run that was begun before is another one, and left alone.

    Returns:
        the words, and where it goes on, to be printed.
    """
    begun = folder / "config.yaml"
    if not begun.is_file() or begun.stat().st_mtime < since:
        return [], "from the start"
    if states := [*folder.glob("last/trainer.pt"), *folder.glob("*/last/trainer.pt")]:
        step = min(read_state(state)["step"] for state in states)
        return ["--resume", str(folder)], f"from step {step} of {folder}"
    return ["--overwrite", "true"], "from the start, as nothing was saved yet"


def after_launcher(command: str, options: Any) -> list[str]:
    """What torchrun's restarts add to the command line of a run: it goes on with what an earlier start of the same
    launcher has begun."""
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if not restart or options.resume is not None:
        return []
    # each rank finds the same, as the main process writes there once all of them have come
    words, where = going_on(run_path(options, command), psutil.Process(os.getppid()).create_time())
    if os.environ.get("RANK", "0") == "0":
        say(f"dalikd {command}: torchrun's restart {restart}: {where}")
    return words


def _memory_kills() -> int:
    """Processes that the kernel has killed for lack of memory since the machine was started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
