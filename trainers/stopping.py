"""What ends a run before its end: signals and bad files, obeyed by all processes at one step; too little memory; and a
process that is gone, for which the others do not wait."""

import atexit
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed

from dalikd.pipelines.hardware import LACK, BadFileError, dali_words
from dalikd.trainers.signals import Asked, command_name, note_reason, obeying, say

__all__ = ["STARTED_BY", "Interrupted", "StopSignals", "Watch", "lack_of_memory", "save_after"]

Result = TypeVar("Result")

#: variable of a process that another one of dalikd has started and waits for
STARTED_BY = "DALIKD_STARTED_BY"

_BAD_FILE = 1 << 8  # above all signals
_ANY_WORK = timedelta(days=30)  # a collective waits as long as the work of another process takes: a Watch ends it
_LOOK = 1.0  # seconds between two looks at the others
_BEAT = 5.0  # seconds from one sign of life to the next
_SILENT = 40.0  # seconds without one, after which a process does not answer
_GRACE = 6.0  # seconds for what a process does by itself once another one is gone
_SAVING = 30.0  # seconds to save in, as torchrun gives them too


class Interrupted(Exception):
    """A signal asked for an end; what there is, is saved.

    Args:
        message: how to go on.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """Inside of this context the first of `signals.SIGNALS` is only noted, until `together`; the next one, later than
    two seconds after it, ends the work at once.

    Args:
        accelerator: whose processes stop together, and enter and leave this context together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._several = accelerator.num_processes > 1
        self._group: Any = None  # of hosts, which run ahead of their devices
        self._asked, self._context = Asked(), ExitStack()

    def __enter__(self) -> "StopSignals":
        if self._several:
            self._group = distributed.new_group(backend="gloo", timeout=_ANY_WORK)
        self._asked = self._context.enter_context(obeying("note"))
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()
        self._asked = Asked()
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def each(self, things: Iterable[Result]) -> Iterator[Result]:
        """What an iterable gives, got by `together`; it gives equally many on all processes, and no None."""
        iterator = iter(things)
        while (thing := self.together(lambda: next(iterator, None))) is not None:
            yield thing

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of what each process does by itself, once it has gone well on all of them and none is to stop.

        All processes call this at the same steps, between two of what they do together. Their hosts meet, and wait for
        no device.

        Raises:
            BadFileError: a file cannot be decoded: the process's own, or else the first one that another one has met.
            Interrupted: one of them had a signal.
        """
        bad: BadFileError | None = None
        result: Any = None
        try:
            result = work()
        except BadFileError as error:
            bad = error
        number, why = self._asked.number, self._asked.why
        if self._group is not None:
            highest = torch.tensor(number if bad is None else _BAD_FILE, dtype=torch.int32)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX, self._group)
            if not highest:
                return result
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, (number, why, bad), self._group)
            number, why = max((number, why) for number, why, _ in found)
            bad = bad or next(filter(None, (error for *_, error in found)), None)
        if bad is not None:
            raise bad
        if number:
            raise Interrupted(why or f"stopped by signal {number}", number)
        return result


@dataclass
class _Peer:
    """Another process of the run."""

    rank: int
    pid: int
    host: str
    place: str  # processes of one place see each other in /proc
    begun: str
    address: tuple[str, int] | None  # where it hears
    left: str = ""  # how it has ended, by its own account; "well" where nobody needs it any more
    silent: float | None = None  # seconds; None: of another place, and never heard of


class Watch:
    """A thread that ends this process where it would wait for ever: another process of the run was killed or does not
    answer, or the launcher that would end them all is gone. Processes that work are left alone, however long it takes.

    Of a process on the same machine /proc knows whether it is there, and whether it is stopped. The first process and
    those on other machines send each other a datagram every five seconds; one that never got through is not judged.
    Whoever ends tells the others so.

    Args:
        accelerator: whose processes watch each other; all of them begin together.
        launched: whether a launcher has started this process, whose end is its too.
    """

    one: "Watch | None" = None  # of this process

    def __init__(self, accelerator: Accelerator, launched: bool) -> None:
        self._rank, self._parent = accelerator.process_index, os.getppid() if launched else 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        port, place, begun = self._socket.getsockname()[1], _place(), _process_state(os.getpid())[1]
        own = os.getpid(), socket.gethostname(), place, begun, port, uuid4().hex
        found = gather_object([own]) if accelerator.num_processes > 1 else [own]
        self._place, self._token = place, found[0][-1]
        self._peers: dict[int, _Peer] = {}
        for rank, (pid, host, where, since, heard, _) in enumerate(found):
            if rank != self._rank:
                self._peers[rank] = _Peer(rank, pid, host, where, since, None, silent=0.0 if where == place else None)
                if where == place:
                    self._peers[rank].address = "127.0.0.1", heard
                elif rank == 0:
                    with suppress(OSError):
                        self._peers[0].address = socket.gethostbyname(os.environ.get("MASTER_ADDR", "")), heard
        self._cause, self._known, self._over = "", threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="dalikd-watch", daemon=True)
        self._thread.start()

    @classmethod
    def begin(cls, accelerator: Accelerator) -> None:
        """Watch from now on, if there is anything to watch; all processes of the run begin together."""
        launched = bool({"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", STARTED_BY} & os.environ.keys())
        several = accelerator.num_processes > 1
        if cls.one is not None or not (several or launched):
            return
        cls.one = cls(accelerator, launched)
        atexit.register(lambda: cls.leave("has failed" if hasattr(sys, "last_value") else "well"))
        if several:
            set_timeout = getattr(distributed, "set_timeout", None)  # public from torch 2.14 on
            (set_timeout or distributed.distributed_c10d._set_pg_timeout)(_ANY_WORK)

    @classmethod
    def leave(cls, how: str = "well") -> None:
        """Tell the others that this process ends, and watch no more.

        Args:
            how: in words that follow its name; "well": nobody needs it any more.
        """
        watch, cls.one = cls.one, None
        if watch is not None:
            watch._over.set()
            for _ in range(3):  # a datagram may be lost
                watch._tell(how)

    def gone(self, seconds: float) -> str:
        """Which process is gone, in a line; empty if none is known to be within so many seconds."""
        self._known.wait(seconds)
        return self._cause

    @property
    def speaks(self) -> bool:
        """Whether it is for this process, of those on its machine, to tell what all of them know."""
        lower = [peer for peer in self._peers.values() if peer.rank < self._rank and peer.place == self._place]
        return all(peer.left or _process_state(peer.pid)[0] in "XZtT" for peer in lower)

    # ---------------------------------------------------------------------------------------------- the thread

    def _look(self) -> None:
        last, told = time.monotonic(), float("-inf")
        while not self._over.wait(_LOOK):
            now = time.monotonic()
            passed, last = min(now - last, 2.0), now  # what this process has slept, nobody was silent for
            if now - told > _BEAT:
                told = now
                self._tell("")
            if self._parent and os.getppid() != self._parent:
                self._follow_launcher()
            there = {rank: _process_state(peer.pid) for rank, peer in self._peers.items()}
            self._hear()  # after it: whoever ends says so before
            lost = (self._lost(peer, *there[rank], passed) for rank, peer in self._peers.items())
            self._cause = next(filter(None, lost), "")
            if self._cause:
                self._known.set()
                if not self._over.wait(_GRACE):
                    self._tell("has ended, as the others wait for one that is gone")
                    self._end(1, self._cause)

    def _tell(self, left: str) -> None:
        word = json.dumps([self._token, self._rank, left]).encode()
        for peer in self._peers.values():
            if peer.address is not None:
                with suppress(OSError):  # as where nobody hears any more
                    self._socket.sendto(word, peer.address)

    def _hear(self) -> None:
        while True:
            try:
                word, address = self._socket.recvfrom(4096, socket.MSG_DONTWAIT)
                token, rank, left = json.loads(word)
            except ConnectionError:  # of what was sent to one that is gone
                continue
            except BlockingIOError:
                return
            except ValueError:
                continue
            if token == self._token and rank in self._peers:
                peer = self._peers[rank]
                peer.left, peer.address = peer.left or left, address
                peer.silent = 0.0 if peer.place != self._place else peer.silent

    def _lost(self, peer: _Peer, state: str, begun: str, passed: float) -> str:
        """How another process is lost, in a line; empty if it is not."""
        if peer.left == "well" or peer.silent is None:
            return ""
        name = f"process {peer.rank} of {len(self._peers) + 1} ({peer.host}, {peer.pid})"
        if peer.left:
            return f"{name} {peer.left}"
        if peer.place != self._place:
            peer.silent += passed
            return f"{name} does not answer: its machine or the network is gone" if peer.silent > _SILENT else ""
        if state in "XZ" or begun != peer.begun:
            return f"{name} was killed"
        peer.silent = peer.silent + passed if state in "tT" else 0.0
        return f"{name} does not answer: it is stopped (SIGSTOP)" if peer.silent > _SILENT else ""

    def _follow_launcher(self) -> None:
        """All processes of the machine see it at once; they save together, as after a signal to the launcher."""
        why, self._parent = f"stopped, as the process that started it ({self._parent}) is gone", 0
        note_reason(why)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._over.wait(_SAVING):
            self._end(128 + signal.SIGTERM, why)

    def _end(self, code: int, line: str) -> None:
        """The main thread may wait inside of a collective, where nothing else reaches it."""
        if self.speaks:
            say(f"{command_name()}: {line}")
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _place() -> str:
    """The same for all processes that see each other by their numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return uuid4().hex


def _process_state(pid: int) -> tuple[str, str]:
    """The letter of a process's state (X: there is none), and when it has begun."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]


def save_after(error: Exception, save: Callable[[], object], how_to_go_on: str) -> None:
    """Save after an error, whose text then says how to go on. A second error, such as a full disk, does not hide it."""
    try:
        save()
    except Exception as second:
        how_to_go_on = f"the state could not be saved ({type(second).__name__}: {second})"
    error.args = (f"{error}; {how_to_go_on}",)


def lack_of_memory(error: Exception) -> str | None:
    """One line that says what ran out of memory, and what helps; None for any other error."""
    if isinstance(error, MemoryError):
        words = str(error) or "the machine ran out of memory"
        return words if ": try " in words else f"{words}: try fewer --data.threads or a smaller --batch_size"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if not LACK.search(text):
        return None
    if "in pipeline" in text:
        helps = "--data.prefetch 1, fewer --data.threads, --data.resident false or a smaller --batch_size"
        return f"DALI ran out of memory ({dali_words(error)}): try {helps}"
    # torch goes on with what its allocator holds
    words = " ".join(re.split(r"\n| Including non-PyTorch| Process \d| Of the allocated", text)[0].split())
    helps = "--accumulation 2 or more, a smaller --batch_size, --precision bf16, with measure --images_per_call"
    return f"{words.rstrip('.')}: try {helps}"
