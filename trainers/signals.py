"""Exit codes, and signals that ask a process to end, from its first line to its last. Light: it is there before torch
is imported."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "EXIT_CODES",
    "SIGNALS",
    "Asked",
    "Stopped",
    "command_name",
    "note_reason",
    "obeying",
    "prepare_process",
    "quiet_without_reader",
    "say",
    "signal_name",
    "stop_words",
]

#: each asks for an end; what is not saved yet is saved first
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)

#: Of every command; they stay as they are. Another signal n, as of a native crash or a kill, ends it with 128 + n too.
EXIT_CODES = {
    0: "all is done, or the help that was asked for is shown",
    1: "something was found by doctor or cache --verify; another process of the run is gone; or a fault of dalikd, "
    "which shows where",
    2: "what you can mend: options, data, files, memory, a full disk, a run that diverges",
    os.EX_TEMPFAIL: "what may pass by itself: an object store that does not answer any more",
    128 + signal.SIGINT: "stopped by Ctrl-C (SIGINT)",
    128 + signal.SIGTERM: "stopped by SIGTERM",
    128 + signal.SIGHUP: "stopped by SIGHUP: the terminal was closed",
    128 + signal.SIGUSR2: "stopped by SIGUSR2: a scheduler wants the machine back",
    128 + signal.SIGPIPE: "nobody reads what it prints any more, as after a pipe into `head`",
}

_AGAIN = 2.0  # seconds: a launcher hands a signal on that its processes have had from the terminal already


class Stopped(KeyboardInterrupt):
    """A signal ends what is under way; the stack is unwound, so that temporary folders and child processes go.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(stop_words(number))
        self.signal = number


@dataclass
class Asked:
    """What signals have asked of this process.

    Attributes:
        number: of the first signal, or 0.
        why: what else is known of it.
        raised: the stack is being unwound.
        said: the user knows that the process ends.
        mode: at_once: it ends now, with nothing to clear away; unwind: by `Stopped`; note: it is only noted.
    """

    number: int = 0
    why: str = ""
    raised: bool = False
    said: bool = False
    mode: Literal["at_once", "unwind", "note"] = "at_once"
    since: float = 0.0


_asked = Asked()  # of this process
_depth = 0  # of `obeying` contexts


@contextmanager
def obeying(mode: Literal["unwind", "note"]) -> Iterator[Asked]:
    """Inside of this context the first signal is obeyed as `mode` tells. More of them within two seconds are the same
    request; a later one ends what is under way by `Stopped`, one after that the process.

    Signals that the process was told to ignore, as by nohup, stay ignored; but not Ctrl-C, which shells let commands
    in the background ignore, whoever sends it to one of them.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield Asked(mode=mode)
        return
    if _depth == 0:
        _asked.number, _asked.why, _asked.raised, _asked.said = 0, "", False, False
    before, _asked.mode, _depth = _asked.mode, mode, _depth + 1
    kept = _handle()
    try:
        yield _asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        _asked.mode, _depth = before, _depth - 1


def note_reason(why: str) -> None:
    """What the user is told of the signal that comes next, in place of its number."""
    _asked.why = _asked.why or why


def _handle() -> dict[int, Any]:
    """Take the signals over. Returns who had them."""
    kept = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler is not None and (handler != signal.SIG_IGN or number == signal.SIGINT):
            kept[number] = handler
            signal.signal(number, _arrive)
    return kept


def _arrive(number: int, _frame: object) -> None:
    now, first = time.monotonic(), not _asked.number
    if not first and now - _asked.since < _AGAIN:
        return
    _asked.number, _asked.since = _asked.number or number, now
    if _asked.mode == "at_once" or _asked.raised:
        if not _asked.said:
            say(f"{command_name()}: {stop_words(number)}")
        with suppress(Exception):  # it may be at this very moment that somebody writes
            sys.stdout.flush()
        os._exit(128 + number)
    if _asked.mode == "unwind" or not first:
        _asked.raised = True
        raise Stopped(number)


def stop_words(number: int) -> str:
    """What the user is told of a signal that stops a command."""
    return "stopped (Ctrl-C)" if number == signal.SIGINT else f"stopped by signal {number} ({signal_name(number)})"


def signal_name(number: int) -> str:
    """Of a signal; its number, where it has no name."""
    return signal.Signals(number).name if number in signal.valid_signals() & set(signal.Signals) else str(number)


def say(line: str) -> None:
    """Write a line where the user sees it, from any thread and inside of signal handlers, even if nobody reads it."""
    with suppress(OSError):  # the terminal was closed
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


@contextmanager
def quiet_without_reader() -> Iterator[None]:
    """End the process with 128 + SIGPIPE, as other programs end, where the reader of the standard output has gone."""
    try:
        yield
        if sys.stdout:  # none where it was closed before the process began
            sys.stdout.flush()
    except BrokenPipeError:
        state = select.poll()
        state.register(1, 0)
        if not any(events & select.POLLERR for _, events in state.poll(0)):
            raise  # of another pipe or connection
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is not written yet
        sys.exit(128 + signal.SIGPIPE)


def command_name() -> str:
    """`dalikd COMMAND` as this process was started; "dalikd" where that is not known."""
    return " ".join(["dalikd", *_own_words()[:1]])


def _own_words() -> list[str]:
    """What follows `dalikd` on the command line of this process."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    if module.startswith("dalikd.tools."):
        return [module.removeprefix("dalikd.tools.").removesuffix(".main").replace(".", " ")]
    name = module or next((word for word in words if Path(word).name == "dalikd"), "")
    return words[words.index(name) + 1 :] if name else []


def prepare_process() -> None:
    """Of a process that runs a command: a signal that comes before the command has begun, as while torch is imported,
    or after it is done, ends the process with one line. Any other process that imports dalikd is left alone."""
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv[:-1] else ""
    if Path(sys.argv[0]).name == "dalikd" or module == "dalikd" or module.startswith("dalikd.tools."):
        _handle()
        sys.unraisablehook = _ask_again


def _ask_again(event: Any) -> None:
    """What is raised while an object is deleted goes no further than that: the signal is sent once more, a moment
    later. Objects that a signal has left half made may complain when they are deleted; of no use to the user."""
    if isinstance(event.exc_value, Stopped):
        _asked.number, _asked.raised = 0, False
        threading.Timer(0.01, os.kill, (os.getpid(), event.exc_value.signal)).start()
    elif not _asked.raised:
        sys.__unraisablehook__(event)
